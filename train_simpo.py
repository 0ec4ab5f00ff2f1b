"""Offline preference optimisation, SimPO and DPO: the closed form of maximum-entropy RL beside that of KL-constrained RL
(2.2, 2.3 and 3.2 of "Failure Modes of Maximum Entropy RLHF", arXiv 2509.20265).

    simpo       -log sigmoid(beta (m_w - m_l) - gamma)                       m = (1/|y|) log pi(y|x), no reference
    dpo         -log sigmoid(beta [(s_w - s_l) - (s_ref,w - s_ref,l)])       s = log pi(y|x)
    simpo_pl    SimPO on K ranked responses (Plackett-Luce, eq. 12): reads rankings_train instead of pairs_train
    dpo_length, ipo     as all of them in rlhf/losses.py: a new loss is one function there

There is no hidden NLL term (TRL's CPO adds one by default). Leaves out: dropout.
    CPU, toy world:  python train_simpo.py --data_dir=out/toy/data --model=out/toy/sft --loss=simpo --out_dir=out/toy/simpo
                         --lr=1e-4 --train_rows=5000 --batch_size=32      (20 s; eval/accuracies 0.78)
    GPU, Pythia 1B:  python train_simpo.py --data_dir=out/tldr --model=out/1b/sft --loss=dpo --out_dir=out/1b/dpo
                         (published implicit accuracy 0.621: vwxyzjn/summarize_from_feedback_details, DPO)
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from data.gold import gold
from rlhf.common import adamw, frozen, learning_rate, optimizer_step, set_lr, setup
from rlhf.config import UserError, check_ranges, command_line
from rlhf.data import batch_indices, check_tables, check_tokenizer, read_meta, read_table
from rlhf.forward import token_stats
from rlhf.generate import generate_all
from rlhf.groups import micro_batches, pack
from rlhf.logprobs import compile_kernels
from rlhf.losses import PREFERENCE_LOSSES, RANKED, describe, loss_options, needs_reference
from rlhf.masked import mean_logprobs, seq_logprobs
from rlhf.model import compile_layers
from rlhf.pretrained import from_pretrained, load_tokenizer
from rlhf.run import Run
from rlhf.summaries import summary_metrics

OPTIONS = ("beta", "gamma", "label_smoothing")  # of losses; each loss names those that it has


@dataclass(frozen=True, kw_only=True)
class Config:
    # I/O
    data_dir: str  # prepared data (data/tldr.py or data/toy.py)
    model: str  # the SFT model the policy starts from: Hugging Face directory, run directory or hub id
    ref_model: str = ""  # reference of the losses that read one (default: --model as it was at the start)
    revision: str = "main"  # revision of hub ids
    out_dir: str  # the run: model, metrics.jsonl, checkpoints
    resume: bool = False  # continue the newest checkpoint of out_dir
    overwrite: bool = False  # replace an existing run in out_dir
    # data
    train_rows: int = 0  # rows of the training table used (0 = all)
    # loss (its options and their defaults: at the end of this help)
    loss: str = "simpo"  # name of a loss in rlhf/losses.py
    beta: float | None = None  # scale of the implicit reward
    gamma: float | None = None  # target margin, absolute
    gamma_beta_ratio: float | None = None  # target margin as gamma / beta, as in the SimPO repository
    label_smoothing: float | None = None  # share of labels taken to be flipped
    # optimization
    lr: float = 1e-6  # peak learning rate (the paper: 1e-6 for DPO, 1e-6 and 2e-7 for SimPO)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after warm-up, towards 0 after the last update
    warmup: float = 0.0  # share of the updates with a rising learning rate
    batch_size: int = 64  # pairs (or rankings) per update
    epochs: float = 1.0  # passes over the training table
    weight_decay: float = 0.0  # AdamW, on all parameters
    adam_eps: float = 1e-5  # AdamW epsilon
    max_grad_norm: float = 0.0  # clip the gradient to this norm (0 = no clipping)
    # eval and logging
    eval_rows: int = 256  # validation pairs for the loss and accuracy, validation prompts for greedy samples
    eval_every: int = 0  # updates between two evaluations on validation pairs (0 = only at the end)
    save_every: int = 200  # updates between two checkpoints (0 = none)
    keep: int = 2  # checkpoints kept, of which two can be resumed (0 = all)
    wandb: str = ""  # Weights & Biases project that gets the log too (pip install wandb)
    tensorboard: bool = False  # the log also as out_dir/tensorboard (pip install tensorboard)
    # system
    seed: int = 1  # data order
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: bfloat16 on CUDA,
    #                     float32 on CPU
    compile: bool = False  # torch.compile the models
    micro_batch_tokens: int = 8192  # tokens in one forward and backward; changes memory and speed, not the result
    gradient_checkpointing: bool = False  # recompute activations in the backward: less memory, a third more time


def with_options(cfg: Config) -> tuple[Config, dict[str, float]]:
    """The configuration with every option of the loss filled in, so that run.json tells what was used; the options."""
    given = {name: getattr(cfg, name) for name in OPTIONS}
    if cfg.gamma_beta_ratio is not None:
        if cfg.gamma is not None:
            raise UserError("--gamma and --gamma_beta_ratio are two spellings of one number: give one of them")
        beta = loss_options(cfg.loss, {"beta": cfg.beta})["beta"]
        given["gamma"] = cfg.gamma_beta_ratio * beta
    options = loss_options(cfg.loss, given)
    return replace(cfg, gamma_beta_ratio=None, **options), options


def read_groups(data_dir: str, split: str, ranked: bool, limit: int) -> tuple[list, list]:
    """Prompts and their responses, best first: K ranked ones, or chosen and rejected."""
    if ranked:
        table = read_table(data_dir, f"rankings_{split}", ["query_token", "responses_token"], limit)
        return table["query_token"], table["responses_token"]
    table = read_table(data_dir, f"pairs_{split}", ["query_token", "chosen_token", "rejected_token"], limit)
    return table["query_token"], [list(pair) for pair in zip(table["chosen_token"], table["rejected_token"])]


def main(cfg: Config) -> dict:
    check_ranges(cfg)
    cfg, options = with_options(cfg)
    loss_fn = PREFERENCE_LOSSES[cfg.loss]
    device = setup(cfg.seed, cfg.device)
    meta = read_meta(cfg.data_dir)
    all_prompts, all_responses = read_groups(cfg.data_dir, "train", cfg.loss in RANKED, cfg.train_rows)
    valid_prompts, valid_responses = read_groups(cfg.data_dir, "validation", False, cfg.eval_rows)
    valid_posts = read_table(cfg.data_dir, "sft_validation", ["query_token"], cfg.eval_rows)["query_token"]
    total = int(len(all_prompts) * cfg.epochs / cfg.batch_size)  # the last incomplete batch is dropped
    if total < 1:
        raise UserError(f"--batch_size={cfg.batch_size} is more than {len(all_prompts)} rows x {cfg.epochs} epochs: "
                        "no update to make")
    out = Run(cfg, total)
    if out.finished:
        return out.earlier_result()

    load = partial(from_pretrained, revision=cfg.revision, device=device, dtype=cfg.dtype)
    models = {cfg.model: load(cfg.model)}
    policy, reference = models[cfg.model], None
    if needs_reference(loss_fn):
        reference = frozen(load(cfg.ref_model or cfg.model))
        models[cfg.ref_model or cfg.model] = reference
    for name, model in models.items():
        check_tokenizer(cfg.data_dir, load_tokenizer(name, cfg.revision), model.config.vocab_size, name)
    tokenizer = load_tokenizer(cfg.model, cfg.revision)
    context = policy.config.max_position_embeddings
    check_tables(
        cfg.data_dir, list(models.values()), ("rankings_train" if cfg.loss in RANKED else "pairs_train", cfg.train_rows, 0),
        ("pairs_validation", cfg.eval_rows, 0), ("sft_validation", cfg.eval_rows, meta["response_tokens"]),
    )
    policy.gpt_neox.gradient_checkpointing = cfg.gradient_checkpointing
    if cfg.compile:
        compile_kernels()
        for model in filter(None, (policy, reference)):
            compile_layers(model)
    optimizer = adamw(policy, cfg.lr, eps=cfg.adam_eps, weight_decay=cfg.weight_decay)
    parameters = sum(p.numel() for p in policy.parameters())
    print(f"{len(all_prompts)} rows, {total} updates of {cfg.batch_size}; {cfg.loss} {options} lr {cfg.lr}; "
          f"{parameters / 1e6:.2f}M parameters on {device}")

    def batch_loss(prompts: list, responses: list) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Losses (n,) of these groups, and what is logged of each, (n,)."""
        groups = pack(prompts, responses, max_positions=context, device=device)
        mask = groups.response_mask  # (n, K, R)
        stats = token_stats(policy, groups, mean_logits=True)  # (n, K, R) each
        ref_logprobs = token_stats(reference, groups).logprobs if reference else None  # (n, K, R)
        losses, rewards = loss_fn(stats.logprobs, ref_logprobs, mask, **options)  # (n,), (n, K)
        logprobs = stats.logprobs.detach()
        columns = {
            "rewards": rewards,
            "logps": seq_logprobs(logprobs, mask),
            "mean_logps": mean_logprobs(logprobs, mask),
            "logits": mean_logprobs(stats.mean_logits, mask),
        }  # (n, K) each
        best, worst = 0, -1  # the pair, or the two ends of a ranking
        logged = {"loss": losses.detach(), "margins": rewards[:, best] - rewards[:, worst]}
        logged["accuracies"] = (rewards[:, best] > rewards[:, worst]).float()
        for name, values in columns.items():
            logged |= {f"{name}/chosen": values[:, best], f"{name}/rejected": values[:, worst]}
        if reference:
            ref_sums = seq_logprobs(ref_logprobs, mask)  # (n, K)
            ref_means = mean_logprobs(ref_logprobs, mask)  # (n, K)
            logged["ref_margin"] = ref_sums[:, best] - ref_sums[:, worst]
            logged["ref_margin_mean"] = ref_means[:, best] - ref_means[:, worst]
        return losses, logged

    def means(parts: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        return {key: torch.cat([part[key] for part in parts]).mean().item() for key in parts[0]}

    @torch.no_grad()
    def evaluate() -> dict:
        slices = micro_batches(valid_prompts, valid_responses, cfg.micro_batch_tokens)
        found = means([batch_loss(valid_prompts[s], valid_responses[s])[1] for s in slices])
        return {f"eval/{key}": value for key, value in found.items()}

    for step in range(out.begin(policy, optimizer), total):
        began = time.time()
        rows = batch_indices(len(all_prompts), cfg.batch_size, step, cfg.seed)
        prompts = [all_prompts[i] for i in rows]
        responses = [all_responses[i] for i in rows]
        parts = []
        for s in micro_batches(prompts, responses, cfg.micro_batch_tokens):
            losses, logged = batch_loss(prompts[s], responses[s])
            (losses.sum() / cfg.batch_size).backward()
            parts.append(logged)
        metrics = means(parts)
        lr = learning_rate(step, total, cfg.lr, cfg.schedule, cfg.warmup)
        set_lr(optimizer, lr)
        metrics["grad_norm"] = optimizer_step(policy, optimizer, metrics["loss"], cfg.max_grad_norm, step)
        metrics |= {"lr": lr, "seconds": time.time() - began}
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0:
            metrics |= evaluate()
        out.log(step + 1, metrics, show=("loss", "accuracies", "logps/chosen"))
        out.checkpoint(step + 1, policy, tokenizer, optimizer)

    samples, ended = generate_all(policy, valid_posts, 1, meta["response_tokens"], batch=64, progress="greedy samples")
    quality = summary_metrics(cfg.data_dir, "sft_validation", tokenizer, samples, ended, gold(cfg.data_dir))
    return out.finish(policy, tokenizer, {**evaluate(), **quality})


if __name__ == "__main__":
    command_line(main, Config, epilog=describe(PREFERENCE_LOSSES))
