"""Offline preference optimisation: RL with maximum entropy (SimPO) and with a KL term (DPO) in closed form;
2.2, 2.3 and 3.2 of "Failure Modes of Maximum Entropy RLHF" (arXiv 2509.20265). And the losses around them.

    simpo       -log sigmoid(beta (m_w - m_l) - gamma)                   m = (1/|y|) log pi(y|x), no reference
    dpo         -log sigmoid(beta [(s_w - s_l) - (s_ref,w - s_ref,l)])   s = log pi(y|x)
    simpo_pl    SimPO on K ranked responses (Plackett-Luce, eq. 12): reads rankings_train, not pairs_train
    and twenty more, at the end of this help: each is one function in rlhf/losses.py or beside it

There is no hidden NLL term (TRL's CPO adds one by default). Leaves out: dropout.
    CPU, toy world:  python train_simpo.py --data_dir=out/toy/data --model=out/toy/sft --loss=simpo
                         --out_dir=out/toy/simpo --lr=1e-4 --train_rows=1500 --batch_size=32
                         (ten seconds; gold 0.56 to 0.72)
    GPU, Pythia 1B:  python train_simpo.py --data_dir=out/tldr --model=out/1b/sft --loss=dpo
                         --out_dir=out/1b/dpo
                         (published implicit accuracy 0.621: vwxyzjn/summarize_from_feedback_details, DPO)
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from data.gold import gold
from rlhf.common import adamw, frozen, learning_rate, load_model, optimizer_step, set_lr, setup
from rlhf.config import UserError, check_ranges, command_line
from rlhf.data import batch_indices, check_tables, read_meta, read_table
from rlhf.dist import gather
from rlhf.forward import TokenStats, token_stats
from rlhf.generate import generate_all
from rlhf.groups import pack
from rlhf.losses import PREFERENCE_LOSSES, RANKED, describe, extras, loss_options, needs_reference
from rlhf.masked import mean_logprobs, seq_logprobs
from rlhf.memory import dry_run
from rlhf.pair_losses import dynamic_margins
from rlhf.preferences import (
    AGAIN,
    Batch,
    given_extras,
    model_extras,
    read_preferences,
    read_sft,
    rows_of,
    slices_of,
    top_tokens,
)
from rlhf.pretrained import load_tokenizer
from rlhf.run import Run, finite
from rlhf.summaries import summary_metrics

# of losses; each loss names those that it has
OPTIONS = ("beta", "gamma", "alpha", "delta", "tau", "sft_coef", "label_smoothing", "r_max", "top_k")
TOP_K = 10  # tokens whose mass and entropy are logged of validation pairs


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
    alpha: float | None = None  # weight of a loss's second term, or its exponent (alphapo)
    delta: float | None = None  # hinge of slic, in nats
    tau: float | None = None  # temperature of gammapo's margins, of cringe's gate
    sft_coef: float | None = None  # weight of the NLL in cpo, orpo, slic and rrhf
    label_smoothing: float | None = None  # share of labels taken to be flipped
    r_max: float | None = None  # chipo clips its margin at twice this
    top_k: int | None = None  # competitors of each rejected token in cringe
    calibration: Literal["chosen", "reference", "sample"] = "chosen"  # vpo's calibration response: the chosen
    #                     one, an SFT summary, or one drawn from the policy at each update
    # optimization
    lr: float = 1e-6  # peak learning rate (the paper: 1e-6 for DPO, 1e-6 and 2e-7 for SimPO)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after warm-up; would be 0 one update later
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
    plain: bool = False  # no flex_attention, no CUDA graph, no torch.compile: slower, needs no compiler
    micro_batch_tokens: int = 8192  # tokens in one forward and backward: memory and speed, not the result
    gradient_checkpointing: bool = False  # recompute activations in the backward: less memory, more time
    rank_timeout: float = 600.0  # seconds that a rank (torchrun) waits for another one
    dry_run: bool = False  # print the memory that each stage takes, by arithmetic, and end


def with_options(cfg: Config) -> tuple[Config, dict[str, float]]:
    """The configuration with every option of the loss filled in, so that run.json tells what was used."""
    given = {name: getattr(cfg, name) for name in OPTIONS}
    if cfg.gamma_beta_ratio is not None:
        if cfg.gamma is not None:
            raise UserError("--gamma and --gamma_beta_ratio spell one number: give one of them")
        options = loss_options(cfg.loss, {"beta": cfg.beta})
        if "beta" not in options:
            raise UserError(f"--gamma_beta_ratio: the loss {cfg.loss} has no beta")
        given["gamma"] = cfg.gamma_beta_ratio * options["beta"]
    options = loss_options(cfg.loss, given)
    if cfg.calibration != "chosen" and "calibration" not in extras(PREFERENCE_LOSSES[cfg.loss]):
        raise UserError(f"--calibration: the loss {cfg.loss} has none; vpo has it")
    return replace(cfg, gamma_beta_ratio=None, **finite(options)), options


def pair_metrics(
    losses: Tensor, rewards: Tensor, stats: TokenStats, ref_logprobs: Tensor | None, mask: Tensor
) -> dict[str, Tensor]:
    """What is logged of each group, (n,), without gradient: of the pair, or of the two ends of a ranking."""
    logprobs = stats.logprobs.detach()
    columns = {
        "rewards": rewards,
        "logps": seq_logprobs(logprobs, mask),
        "mean_logps": mean_logprobs(logprobs, mask),
        "logits": mean_logprobs(stats.mean_logits, mask),
    }  # (n, K) each
    if stats.top_logprobs is not None:
        columns |= top_tokens(stats.top_logprobs.detach()[..., :TOP_K], mask)
    best, worst = 0, -1
    logged = {"loss": losses.detach(), "margins": rewards[:, best] - rewards[:, worst]}
    for name in ("rewards", "logps", "mean_logps"):
        right = columns[name][:, best] > columns[name][:, worst]
        logged["accuracies" if name == "rewards" else f"accuracies/{name}"] = right.float()
    for name, values in columns.items():
        logged |= {f"{name}/chosen": values[:, best], f"{name}/rejected": values[:, worst]}
    if ref_logprobs is not None:
        ref_sums = seq_logprobs(ref_logprobs, mask)  # (n, K)
        ref_means = mean_logprobs(ref_logprobs, mask)  # (n, K)
        logged["ref_margin"] = ref_sums[:, best] - ref_sums[:, worst]
        logged["ref_margin_mean"] = ref_means[:, best] - ref_means[:, worst]
    return logged


def main(cfg: Config) -> dict:
    check_ranges(cfg)
    cfg, options = with_options(cfg)
    loss_fn = PREFERENCE_LOSSES[cfg.loss]
    reads = extras(loss_fn)  # what it reads beside log-probs
    if cfg.dry_run:
        held = {"reference": cfg.ref_model or cfg.model} if needs_reference(loss_fn) else {}
        return dry_run(cfg, {"policy": cfg.model}, held, table="sft_validation", prompts=64)
    table = "rankings_train" if cfg.loss in RANKED else "pairs_train"
    device = setup(cfg.seed, cfg.device, cfg.plain, cfg.rank_timeout)
    R = read_meta(cfg.data_dir)["response_tokens"]
    train = read_preferences(cfg.data_dir, table, cfg.loss, reads, cfg.train_rows)
    valid = read_preferences(cfg.data_dir, "pairs_validation", cfg.loss, reads, cfg.eval_rows)
    valid_posts = read_table(cfg.data_dir, "sft_validation", ["query_token"], cfg.eval_rows)["query_token"]
    sft = None  # rows that SFT learned from, for the losses that read their log-probs
    if "target" in reads or cfg.calibration == "reference":
        sft = {split: read_sft(cfg.data_dir, f"sft_{split}") for split in ("train", "validation")}
    rows = len(train["prompts"])
    total = int(rows * cfg.epochs / cfg.batch_size)  # the last incomplete batch is dropped
    if total < 1:
        raise UserError(f"--batch_size={cfg.batch_size} is more than {rows} rows x {cfg.epochs} epochs: "
                        "no update to make; lower --batch_size or raise --epochs")
    out = Run(cfg, total)
    if out.finished:
        return out.earlier_result()

    load = partial(
        load_model, data_dir=cfg.data_dir, revision=cfg.revision, device=device, dtype=cfg.dtype,
        compiled=cfg.compile, sharded=True,
    )
    policy = load(cfg.model)
    reference = frozen(load(cfg.ref_model or cfg.model)) if needs_reference(loss_fn) else None
    tokenizer = load_tokenizer(cfg.model, cfg.revision)
    context = policy.config.max_position_embeddings
    check_tables(
        cfg.data_dir, [policy, reference] if reference else [policy], (table, cfg.train_rows, 0),
        *([(table, cfg.train_rows, R)] if cfg.calibration == "sample" else []),
        ("pairs_validation", cfg.eval_rows, 0), ("sft_validation", cfg.eval_rows, R),
        *([("sft_train", 0, 0), ("sft_validation", 0, 0)] if sft else []),
    )
    policy.gpt_neox.gradient_checkpointing = cfg.gradient_checkpointing
    optimizer = adamw(policy, cfg.lr, eps=cfg.adam_eps, weight_decay=cfg.weight_decay)
    pack_rows = partial(pack, max_positions=context, device=device)
    again = tokenizer.encode(AGAIN).ids
    parameters = sum(p.numel() for p in policy.parameters())
    print(f"{rows} rows, {total} updates of {cfg.batch_size}; {cfg.loss} {options} lr {cfg.lr}; "
          f"{parameters / 1e6:.2f}M parameters on {device}")

    def batch_loss(batch: Batch, top_k: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses (n,) of a micro-batch, and what is logged of each, (n,)."""
        groups = pack_rows(batch["prompts"], batch["responses"])
        mask = groups.response_mask  # (n, K, R)
        stats = token_stats(policy, groups, mean_logits=True, top_k=top_k)  # (n, K, R) each
        ref_logprobs = token_stats(reference, groups).logprobs if reference else None  # (n, K, R)
        extra = given_extras(batch, device) | model_extras(
            reads, batch, stats, policy, reference, pack_rows, again=again, top_k=options.get("top_k", 0)
        )
        losses, rewards = loss_fn(stats.logprobs, ref_logprobs, mask, **options, **extra)  # (n,), (n, K)
        return losses, pair_metrics(losses, rewards, stats, ref_logprobs, mask)

    def batch_extras(batch: Batch, split: str, step: int) -> Batch:
        """A whole batch with what the loss reads that is no column of its table."""
        batch = dict(batch)
        n = len(batch["prompts"])
        if sft:
            chosen = batch_indices(len(sft[split]["other_prompts"]), n, step, cfg.seed)
            batch |= rows_of(sft[split], chosen)
        if cfg.calibration == "sample":
            generator = torch.Generator(device).manual_seed(cfg.seed * 1_000_003 + step)
            drawn = generate_all(policy, batch["prompts"], 1, R, batch=64, temperature=1, generator=generator)
            batch |= {"other_prompts": batch["prompts"], "other_responses": [row for row, in drawn[0]]}
        if "noise" in reads and split == "train":
            generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
            batch["noise"] = torch.randn(n, len(batch["objectives"][0]), 2, generator=generator)
        if "target_margins" in reads:  # the margin of a pair depends on the whole batch: one more forward
            slices = slices_of(batch, cfg.micro_batch_tokens, reads, again)
            with torch.no_grad():
                parts = [batch_loss(rows_of(batch, s), 0)[1]["margins"] for s in slices]
            gaps = torch.cat(gather(parts, slices))  # (N,)
            batch["target_margins"] = dynamic_margins(gaps, options["gamma"], options["tau"])
        return batch

    def means(parts: list[dict[str, Tensor]], slices: list[slice]) -> dict[str, float]:
        parts = gather(parts, slices)
        return {key: torch.cat([part[key] for part in parts]).mean().item() for key in parts[0]}

    # CRINGE reads the best tokens of every position; of validation pairs their mass and entropy are logged
    top_k = options["top_k"] + 1 if "competitors" in reads else 0

    @torch.no_grad()
    def evaluate() -> dict:
        batch = batch_extras(valid, "validation", 0)
        slices = slices_of(batch, cfg.micro_batch_tokens, reads, again)
        parts = [batch_loss(rows_of(batch, s), max(TOP_K, top_k))[1] for s in slices]
        found = means(parts, slices)
        return {f"eval/{key}": value for key, value in found.items()}

    for step in range(out.begin(policy, optimizer), total):
        began = time.time()
        batch = rows_of(train, batch_indices(rows, cfg.batch_size, step, cfg.seed))
        batch = batch_extras(batch, "train", step)
        slices = slices_of(batch, cfg.micro_batch_tokens, reads, again)
        parts = []
        for s in slices:
            losses, logged = batch_loss(rows_of(batch, s), top_k)
            (losses.sum() / cfg.batch_size).backward()
            parts.append(logged)
        metrics = means(parts, slices)
        lr = learning_rate(step, total, cfg.lr, cfg.schedule, cfg.warmup)
        set_lr(optimizer, lr)
        metrics["grad_norm"] = optimizer_step(policy, optimizer, metrics["loss"], cfg.max_grad_norm, step)
        metrics |= {"lr": lr, "seconds": time.time() - began}
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0:
            metrics |= evaluate()
        out.log(step + 1, metrics, show=("loss", "accuracies", "logps/chosen"))
        out.checkpoint(step + 1, policy, tokenizer, optimizer)

    greedy, ended = generate_all(policy, valid_posts, 1, R, batch=64, progress="greedy samples")
    quality = summary_metrics(cfg.data_dir, "sft_validation", tokenizer, greedy, ended, gold(cfg.data_dir))
    return out.finish(policy, tokenizer, {**evaluate(), **quality})


if __name__ == "__main__":
    command_line(main, Config, epilog=describe(PREFERENCE_LOSSES))
