r"""Reward model from human preferences: stage 2.

    loss = - mean over pairs of log sigmoid(r(x, y_chosen) - r(x, y_rejected))

That is eq. 1 and L_R (2.1) of "Failure Modes of Maximum Entropy RLHF" (arXiv 2509.20265); the recipe is
summarize_from_feedback_details/reward.py (github vwxyzjn). The backbone starts from the SFT model, the head
is N(0, 1/sqrt(C+1)); the reward is read at the last token of the response, its EOS. After training, the mean
reward of the SFT training references is subtracted: a reward of 0 means "as good as a reference"
(--center=false leaves it out). Leaves out: dropout, standardising the reward's scale (as there).

CPU, toy world (a minute and a half), from scratch: study/settings.py says why
    python train_rm.py --data_dir=out/toy/data --model=out/toy/data/base --init=scratch --out_dir=out/toy/rm \
        --lr=1.5e-3 --warmup=0.1 --max_grad_norm=0.5 --adam_eps=1e-8 --batch_size=32 --train_rows=20000 \
        --center_rows=500
GPU, Pythia 1B (accuracy published there: 0.629):
    python train_rm.py --data_dir=out/tldr --model=out/1b/sft --out_dir=out/1b/rm
"""

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm

from rlhf.common import adamw, learning_rate, load_model, optimizer_step, set_lr, setup
from rlhf.config import UserError, check_ranges, command_line
from rlhf.data import (
    batch_indices,
    check_tables,
    has_column,
    read_meta,
    read_table,
    tables,
)
from rlhf.dist import deal, gather
from rlhf.forward import response_scores
from rlhf.groups import micro_batches, pack
from rlhf.losses import bradley_terry_loss
from rlhf.memory import dry_run
from rlhf.pretrained import load_tokenizer
from rlhf.run import Run


@dataclass(frozen=True, kw_only=True)
class Config:
    # I/O
    data_dir: str  # prepared data (data/tldr.py or data/toy.py)
    model: str  # the SFT model: Hugging Face directory, run directory or hub id
    revision: str = "main"  # revision of a hub id
    init: Literal["pretrained", "scratch"] = "pretrained"
    #   scratch: only the config and the tokenizer of --model are read
    out_dir: str  # the run: model, metrics.jsonl, checkpoints
    resume: bool = False  # continue the newest checkpoint of out_dir
    overwrite: bool = False  # replace an existing run in out_dir
    # data
    train_rows: int = 0  # rows of pairs_train used (0 = all)
    center_rows: int = 0  # SFT training references whose mean reward becomes 0 (0 = all)
    # optimization
    center: bool = True  # subtract the mean reward of the references after training
    lr: float = 3e-6  # peak learning rate
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after warm-up; would be 0 one update later
    warmup: float = 0.0  # share of the updates with a rising learning rate
    batch_size: int = 64  # pairs per update
    epochs: float = 1.0  # passes over the pairs
    weight_decay: float = 0.01  # AdamW, on all parameters
    adam_eps: float = 1e-5  # AdamW epsilon
    max_grad_norm: float = 0.0  # clip the gradient to this norm (0 = no clipping)
    # eval and logging
    eval_rows: int = 0  # rows of each validation table (0 = all)
    save_every: int = 200  # updates between two checkpoints (0 = none)
    keep: int = 2  # checkpoints kept, of which two can be resumed (0 = all)
    wandb: str = ""  # Weights & Biases project that gets the log too (pip install wandb)
    tensorboard: bool = False  # the log also as out_dir/tensorboard (pip install tensorboard)
    # system
    seed: int = 1  # data order, the weights of the head, with --init=scratch all weights
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    #   of matrix products; auto: bfloat16 on CUDA, float32 on CPU
    compile: bool = False  # torch.compile the model
    plain: bool = False  # no flex_attention, no CUDA graph, no torch.compile: slower, needs no compiler
    micro_batch_tokens: int = 8192  # tokens in one forward and backward: memory and speed, not the result
    gradient_checkpointing: bool = False  # recompute activations in the backward: less memory, more time
    rank_timeout: float = 600.0  # seconds that a rank (torchrun) waits for another one
    dry_run: bool = False  # print the memory that each stage takes, by arithmetic, and end


NOTES = ("split", "batch", "confidence")  # accuracy is told by each of these that a validation table has


def share_right(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """(pairs,): 1 where the chosen response has the higher number, 0.5 at a tie, else 0."""
    return (chosen > rejected).double() + 0.5 * (chosen == rejected).double()


def accuracies(chosen: torch.Tensor, rejected: torch.Tensor, table: dict) -> dict[str, float]:
    """Share of pairs whose chosen response scores higher: of all, and by each of NOTES that the table has;
    and the share in which it is the longer one."""
    right = share_right(chosen, rejected)  # (pairs,)
    chosen_length = torch.tensor([len(tokens) for tokens in table["chosen_token"]])
    rejected_length = torch.tensor([len(tokens) for tokens in table["rejected_token"]])
    longer = share_right(chosen_length, rejected_length)  # (pairs,)
    out = {"accuracy": right.mean().item(), "longer_wins_accuracy": longer.mean().item(), "pairs": len(right)}
    for column in [column for column in NOTES if column in table]:
        members = defaultdict(list)
        for i, value in enumerate(table[column]):
            if value is not None:
                members[value].append(i)
        if len(members) > 1:
            for value, rows in sorted(members.items()):
                out[f"accuracy/{column}={value}"] = right[rows].mean().item()
    return out


def main(cfg: Config) -> dict:
    check_ranges(cfg)
    if cfg.dry_run:
        return dry_run(cfg, {"reward model": cfg.model}, {})
    device = setup(cfg.seed, cfg.device, cfg.plain, cfg.rank_timeout)
    read_meta(cfg.data_dir)
    columns = ["query_token", "chosen_token", "rejected_token"]
    train = read_table(cfg.data_dir, "pairs_train", columns, cfg.train_rows)
    rows = len(train["query_token"])
    total = int(rows * cfg.epochs / cfg.batch_size)  # the last incomplete batch is dropped
    if total < 1:
        raise UserError(f"--batch_size={cfg.batch_size} is more than {rows} pairs x {cfg.epochs} epochs: "
                        "no update to make; lower --batch_size or raise --epochs")
    if cfg.center and not has_column(cfg.data_dir, "sft_train", "reference_response_token"):
        raise UserError(f"{cfg.data_dir}: no table sft_train with responses, whose mean reward is to become "
                        "0: give --center=false, then the rewards keep their offset")
    out = Run(cfg, total)
    if out.finished:
        return out.earlier_result()

    model = load_model(
        cfg.model, data_dir=cfg.data_dir, revision=cfg.revision, init=cfg.init, head="score", new_head=True,
        seed=cfg.seed, device=device, dtype=cfg.dtype, compiled=cfg.compile, sharded=True,
    )
    tokenizer = load_tokenizer(cfg.model, cfg.revision)
    uses = [("pairs_train", cfg.train_rows, 0)]
    uses += [(name, cfg.eval_rows, 0) for name in tables(cfg.data_dir, "pairs_validation")]
    uses += [("sft_train", cfg.center_rows, 0)] if cfg.center else []
    check_tables(cfg.data_dir, [model], *uses)
    model.gpt_neox.gradient_checkpointing = cfg.gradient_checkpointing
    optimizer = adamw(model, cfg.lr, eps=cfg.adam_eps, weight_decay=cfg.weight_decay)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{rows} pairs, {total} updates of {cfg.batch_size}; "
          f"{parameters / 1e6:.2f}M parameters on {device}")

    def scores(prompts: list, responses: list) -> torch.Tensor:
        """Rewards (N, K) of K responses to each prompt, read at the last token of each."""
        groups = pack(prompts, responses, max_positions=model.config.max_position_embeddings, device=device)
        return response_scores(model, groups)  # (N, K)

    @torch.no_grad()
    def all_scores(prompts: list, responses: list, name: str) -> torch.Tensor:
        slices = deal(micro_batches(prompts, responses, cfg.micro_batch_tokens))
        bar = tqdm(slices, desc=name, leave=False, disable=None)
        parts = [scores(prompts[s], responses[s]).cpu() for s in bar]
        return torch.cat(gather(parts, slices))  # (N, K)

    for step in range(out.begin(model, optimizer), total):
        began = time.time()
        indices = batch_indices(rows, cfg.batch_size, step, cfg.seed)
        prompts = [train["query_token"][i] for i in indices]
        pairs = [[train["chosen_token"][i], train["rejected_token"][i]] for i in indices]
        slices = deal(micro_batches(prompts, pairs, cfg.micro_batch_tokens))
        parts, seen = [], []
        for s in slices:
            rewards = scores(prompts[s], pairs[s])  # (n, 2)
            part = bradley_terry_loss(rewards[:, 0], rewards[:, 1]).sum() / cfg.batch_size
            part.backward()
            parts.append(part.item())
            seen.append(rewards.detach())
        loss = sum(gather(parts, slices))
        lr = learning_rate(step, total, cfg.lr, cfg.schedule, cfg.warmup)
        set_lr(optimizer, lr)
        grad_norm = optimizer_step(model, optimizer, loss, cfg.max_grad_norm, step)
        chosen, rejected = torch.cat(gather(seen, slices)).unbind(1)  # (N,)
        metrics = {
            "loss": loss,
            "accuracy": share_right(chosen, rejected).mean().item(),
            "chosen_rewards": chosen.mean().item(),
            "rejected_rewards": rejected.mean().item(),
            "margins": (chosen - rejected).mean().item(),
            "grad_norm": grad_norm,
            "lr": lr,
            "seconds": time.time() - began,
        }
        out.log(step + 1, metrics, show=("loss", "accuracy"))
        out.checkpoint(step + 1, model, tokenizer, optimizer)

    if cfg.center:
        answered = ["query_token", "reference_response_token"]
        references = read_table(cfg.data_dir, "sft_train", answered, cfg.center_rows)
        answers = [[r] for r in references["reference_response_token"]]
        rewards = all_scores(references["query_token"], answers, "mean reward of the references")
        model.fold_offset(rewards.double().mean().item())
    result = {"loss": out.last.get("loss")}
    for name in tables(cfg.data_dir, "pairs_validation"):
        notes = [column for column in NOTES if has_column(cfg.data_dir, name, column)]
        table = read_table(cfg.data_dir, name, [*columns, *notes], cfg.eval_rows)
        pairs = [list(pair) for pair in zip(table["chosen_token"], table["rejected_token"])]
        chosen, rejected = all_scores(table["query_token"], pairs, name).unbind(1)
        measured = accuracies(chosen, rejected, table)
        measured |= {"chosen_rewards": chosen.mean().item(), "rejected_rewards": rejected.mean().item()}
        prefix = "" if name == "pairs_validation" else name.removeprefix("pairs_") + "/"
        result |= {prefix + key: value for key, value in measured.items()}
    return out.finish(model, tokenizer, result)


if __name__ == "__main__":
    command_line(main, Config)
