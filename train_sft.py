r"""Supervised fine-tuning on reference summaries: stage 1.

    loss = - mean over tokens of log pi(token | what came before)

over query and response, as in summarize_from_feedback_details/sft.py (github vwxyzjn; "The N Implementation
Details of RLHF with PPO"), or over the response alone (--loss_on=response). Every token of a batch weighs the
same, however the batch is cut into micro-batches. EOS is learnt: it ends every response; no post is padded.
Leaves out: dropout (off there too), packing of several posts into one context (each post sees itself only).

CPU, toy world (half a minute; greedy/gold 0.49):
    python train_sft.py --data_dir=out/toy/data --model=out/toy/data/base --init=scratch \
        --out_dir=out/toy/sft --lr=2e-3 --warmup=0.05 --batch_size=16 --train_rows=4800 --loss_on=response \
        --max_grad_norm=1
GPU, Pythia 1B (ROUGE-L on validation published there: 0.247):
    python train_sft.py --data_dir=out/tldr --model=EleutherAI/pythia-1b-deduped --out_dir=out/1b/sft
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch

from data.gold import gold
from rlhf.common import adamw, learning_rate, load_model, optimizer_step, set_lr, setup
from rlhf.config import UserError, check_ranges, command_line
from rlhf.data import batch_indices, check_tables, column_names, read_meta, read_table
from rlhf.dist import deal, gather
from rlhf.forward import summed_nll
from rlhf.generate import generate_all
from rlhf.groups import micro_batches, pack
from rlhf.memory import dry_run
from rlhf.pretrained import load_tokenizer
from rlhf.run import Run
from rlhf.summaries import summary_metrics


@dataclass(frozen=True, kw_only=True)
class Config:
    # I/O
    data_dir: str  # prepared data (data/tldr.py or data/toy.py)
    model: str  # Hugging Face directory or hub id to start from
    revision: str = "main"  # revision of a hub id
    init: Literal["pretrained", "scratch"] = "pretrained"
    #   scratch: only the config and the tokenizer of --model are read
    out_dir: str  # the run: model, metrics.jsonl, checkpoints
    resume: bool = False  # continue the newest checkpoint of out_dir
    overwrite: bool = False  # replace an existing run in out_dir
    # data
    train_rows: int = 0  # rows of sft_train used (0 = all)
    loss_on: Literal["all", "response"] = "all"  # learnt tokens: query and response, or the response only
    # optimization
    lr: float = 3e-6  # peak learning rate
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after warm-up; would be 0 one update later
    warmup: float = 0.0  # share of the updates with a rising learning rate
    batch_size: int = 128  # posts per update
    epochs: float = 1.0  # passes over the training rows
    weight_decay: float = 0.01  # AdamW, on all parameters
    adam_eps: float = 1e-5  # AdamW epsilon
    max_grad_norm: float = 0.0  # clip the gradient to this norm (0 = no clipping)
    # eval and logging
    eval_rows: int = 256  # validation rows for the loss and for greedy samples (ROUGE, length, EOS)
    eval_every: int = 0  # updates between two validation losses (0 = only at the end)
    save_every: int = 200  # updates between two checkpoints (0 = none)
    keep: int = 2  # checkpoints kept, of which two can be resumed (0 = all)
    wandb: str = ""  # Weights & Biases project that gets the log too (pip install wandb)
    tensorboard: bool = False  # the log also as out_dir/tensorboard (pip install tensorboard)
    # system
    seed: int = 1  # data order and, from scratch, the weights
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    #   of matrix products; auto: bfloat16 on CUDA, float32 on CPU
    compile: bool = False  # torch.compile the model
    plain: bool = False  # no flex_attention, no CUDA graph, no torch.compile: slower, needs no compiler
    micro_batch_tokens: int = 8192  # tokens in one forward and backward: memory and speed, not the result
    gradient_checkpointing: bool = False  # recompute activations in the backward: less memory, more time
    rank_timeout: float = 600.0  # seconds that a rank (torchrun) waits for another one
    dry_run: bool = False  # print the memory that each stage takes, by arithmetic, and end


TARGET = "reference_response_token"  # the column that is learnt


def learnt_part(query: list[int], response: list[int], loss_on: str) -> tuple[list[int], list[list[int]]]:
    """(prompt, [response]) such that the response holds the tokens that are learnt: with "all", every token
    but the very first, which nothing predicts."""
    if loss_on == "all":
        return query[:1], [query[1:] + response]
    return query, [response]


def main(cfg: Config) -> dict:
    check_ranges(cfg)
    if cfg.dry_run:
        return dry_run(cfg, {"policy": cfg.model}, {}, table="sft_validation", prompts=64)
    device = setup(cfg.seed, cfg.device, cfg.plain, cfg.rank_timeout)
    R = read_meta(cfg.data_dir)["response_tokens"]  # longest response of the greedy samples
    there = column_names(cfg.data_dir, "sft_train")
    if there and TARGET not in there:
        raise UserError(f"{cfg.data_dir}: its prompts have no responses, so there is nothing to learn: "
                        "prepare rows with a response (train_rloo.py, train_ppo.py and others need none)")
    columns = ["query_token", TARGET]
    train = read_table(cfg.data_dir, "sft_train", columns, cfg.train_rows)
    valid = read_table(cfg.data_dir, "sft_validation", columns, cfg.eval_rows)
    rows = len(train["query_token"])
    total = int(rows * cfg.epochs / cfg.batch_size)  # the last incomplete batch is dropped
    if total < 1:
        raise UserError(f"--batch_size={cfg.batch_size} is more than {rows} rows x {cfg.epochs} epochs: "
                        "no update to make; lower --batch_size or raise --epochs")
    out = Run(cfg, total)
    if out.finished:
        return out.earlier_result()

    model = load_model(
        cfg.model, data_dir=cfg.data_dir, revision=cfg.revision, init=cfg.init, seed=cfg.seed,
        device=device, dtype=cfg.dtype, compiled=cfg.compile, sharded=True,
    )
    tokenizer = load_tokenizer(cfg.model, cfg.revision)
    uses = [("sft_train", cfg.train_rows, 0), ("sft_validation", cfg.eval_rows, 0)]
    uses += [("sft_validation", cfg.eval_rows, R)]
    check_tables(cfg.data_dir, [model], *uses)
    model.gpt_neox.gradient_checkpointing = cfg.gradient_checkpointing
    optimizer = adamw(model, cfg.lr, eps=cfg.adam_eps, weight_decay=cfg.weight_decay)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{rows} posts, {total} updates of {cfg.batch_size}; "
          f"{parameters / 1e6:.2f}M parameters on {device}")

    def groups_of(table: dict, indices: list[int]) -> tuple[list, list]:
        posts = [(table["query_token"][i], table["reference_response_token"][i]) for i in indices]
        pairs = [learnt_part(query, response, cfg.loss_on) for query, response in posts]
        return [p for p, _ in pairs], [r for _, r in pairs]

    def batch_loss(prompts: list, responses: list, tokens: int) -> torch.Tensor:
        """Sum of -log pi over the tokens of these groups, divided by the tokens of the whole batch."""
        groups = pack(prompts, responses, max_positions=model.config.max_position_embeddings, device=device)
        return summed_nll(model, groups) / tokens

    @torch.no_grad()
    def validation_loss() -> float:
        prompts, responses = groups_of(valid, range(len(valid["query_token"])))
        tokens = sum(len(r[0]) for r in responses)
        slices = deal(micro_batches(prompts, responses, cfg.micro_batch_tokens))
        parts = [batch_loss(prompts[s], responses[s], tokens).item() for s in slices]
        return sum(gather(parts, slices))

    for step in range(out.begin(model, optimizer), total):
        began = time.time()
        prompts, responses = groups_of(train, batch_indices(rows, cfg.batch_size, step, cfg.seed))
        tokens = sum(len(r[0]) for r in responses)
        slices = deal(micro_batches(prompts, responses, cfg.micro_batch_tokens))
        parts = []
        for s in slices:
            part = batch_loss(prompts[s], responses[s], tokens)
            part.backward()
            parts.append(part.item())
        loss = sum(gather(parts, slices))
        lr = learning_rate(step, total, cfg.lr, cfg.schedule, cfg.warmup)
        set_lr(optimizer, lr)
        grad_norm = optimizer_step(model, optimizer, loss, cfg.max_grad_norm, step)
        speed = tokens / (time.time() - began)
        metrics = {"loss": loss, "grad_norm": grad_norm, "lr": lr, "tokens_per_second": speed}
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0:
            metrics["eval/loss"] = validation_loss()
        out.log(step + 1, metrics, show=("loss", "lr"))
        out.checkpoint(step + 1, model, tokenizer, optimizer)

    greedy, ended = generate_all(model, valid["query_token"], 1, R, batch=64, progress="greedy samples")
    quality = summary_metrics(cfg.data_dir, "sft_validation", tokenizer, greedy, ended, gold(cfg.data_dir))
    losses = {"loss": out.last.get("loss"), "eval/loss": validation_loss()}
    return out.finish(model, tokenizer, {**losses, **quality})


if __name__ == "__main__":
    command_line(main, Config)
