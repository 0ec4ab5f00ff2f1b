"""Offline preference optimisation, SimPO and DPO: the closed form of maximum-entropy RL beside that of KL-constrained RL (sections 2.2, 2.3, 3.2).

    simpo        -log sigmoid(beta (m_w - m_l) - gamma)                                m = (1/|y|) log pi(y|x), no reference
    dpo          -log sigmoid(beta [(s_w - s_l) - (s_ref,w - s_ref,l)])                s = log pi(y|x)
    simpo_pl     SimPO on K ranked responses (Plackett-Luce, eq. 12)                   reads rankings_train instead of pairs_train
    dpo_length   SimPO with the reference's margin added; ipo                          all in rlhf/losses.py: a new loss is one function there

There is no hidden NLL term (TRL's CPO adds one by default, recipe 9.2). Leaves out: dropout.

    CPU, toy world:  python train_simpo.py --data_dir=out/toy/data --model=out/toy/sft --loss=simpo --out_dir=out/toy/simpo --lr=1e-4
                         --train_rows=5000 --batch_size=32      (20 s; eval/accuracies 0.78)
    GPU, Pythia 1B:  python train_simpo.py --data_dir=out/tldr --model=out/1b/sft --loss=simpo --out_dir=out/1b/simpo
                     (--loss=dpo: published implicit accuracy 0.621, recipe section 3)
"""

import time
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch

from rlhf.common import Run, adamw, autocast, frozen, learning_rate, optimizer_step, set_lr, setup
from rlhf.config import UserError, run
from rlhf.data import batch_indices, check_context, check_distinct, check_tokenizer, read_meta, read_table
from rlhf.generate import generate_all
from rlhf.groups import micro_batches, pack
from rlhf.judge import summary_metrics
from rlhf.logprobs import compile_kernels, token_logprobs
from rlhf.losses import NEEDS_REFERENCE, PREFERENCE_LOSSES
from rlhf.masked import mean_logprobs, seq_logprobs
from rlhf.model import compile_layers
from rlhf.pretrained import from_pretrained, load_tokenizer

# (beta, gamma, lr) where the command line names none: the paper's learning rates, N+'s beta for DPO, the SimPO README's for SimPO (recipe 7)
DEFAULTS = {"simpo": (2.0, 0.5, 2e-7), "simpo_pl": (2.0, 0.5, 2e-7), "dpo_length": (2.0, 0.0, 2e-7), "dpo": (0.05, 0.0, 1e-6), "ipo": (0.05, 0.0, 1e-6)}


@dataclass(frozen=True, kw_only=True)
class Config:
    # I/O
    data_dir: str  # prepared data (data/tldr.py or data/toy.py)
    model: str  # the SFT model the policy starts from: Hugging Face directory, run directory or hub id
    ref_model: str = ""  # reference of dpo, ipo and dpo_length (default: --model as it was at the start)
    revision: str = "main"  # revision of hub ids
    out_dir: str  # the run: model, metrics.jsonl, checkpoints
    resume: bool = False  # continue the newest checkpoint of out_dir
    overwrite: bool = False  # replace an existing run in out_dir
    # data
    train_rows: int = 0  # rows of the training table used (0 = all)
    # loss
    loss: str = "simpo"  # simpo, dpo, simpo_pl, dpo_length, ipo
    beta: float | None = None  # scale of the implicit reward (default: 2.0 for simpo, simpo_pl and dpo_length, 0.05 for dpo and ipo)
    gamma: float | None = None  # target margin, absolute (default: 0.5 for simpo and simpo_pl, 0 elsewhere)
    gamma_beta_ratio: float | None = None  # target margin as gamma / beta, as in the SimPO repository; one of the two
    label_smoothing: float = 0.0  # share of labels taken to be flipped
    # optimization
    lr: float | None = None  # peak learning rate (default: 2e-7 for simpo, simpo_pl and dpo_length, 1e-6 for dpo and ipo)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after warm-up, down to 0 at the last update
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
    keep: int = 1  # checkpoints kept (0 = all, for curves over training)
    # system
    seed: int = 1  # data order
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: bfloat16 on CUDA, float32 on CPU
    compile: bool = False  # torch.compile the models
    micro_batch_tokens: int = 8192  # tokens in one forward and backward; changes memory and speed, not the result
    gradient_checkpointing: bool = False  # recompute activations in the backward: less memory, a third more time


def read_groups(data_dir: str, split: str, ranked: bool, limit: int) -> tuple[list, list]:
    """Prompts and their responses, best first: K ranked ones, or chosen and rejected."""
    if ranked:
        table = read_table(data_dir, f"rankings_{split}", ["query_token", "responses_token"], limit)
        return table["query_token"], table["responses_token"]
    table = read_table(data_dir, f"pairs_{split}", ["query_token", "chosen_token", "rejected_token"], limit)
    check_distinct(data_dir, f"pairs_{split}", table)
    return table["query_token"], [list(pair) for pair in zip(table["chosen_token"], table["rejected_token"])]


def main(cfg: Config) -> dict:
    device = setup(cfg.seed, cfg.device)
    if cfg.loss not in PREFERENCE_LOSSES:
        raise UserError(f"--loss={cfg.loss}: known are {', '.join(PREFERENCE_LOSSES)}")
    if cfg.gamma is not None and cfg.gamma_beta_ratio is not None:
        raise UserError("--gamma and --gamma_beta_ratio are two spellings of one number: give one of them")
    given, defaults = asdict(cfg), dict(zip(("beta", "gamma", "lr"), DEFAULTS.get(cfg.loss, DEFAULTS["simpo"])))
    cfg = replace(cfg, **{key: value for key, value in defaults.items() if given[key] is None})  # so that run.json tells what was used
    if cfg.gamma_beta_ratio is not None:
        cfg = replace(cfg, gamma=cfg.gamma_beta_ratio * cfg.beta, gamma_beta_ratio=None)
    loss_fn, needs_reference = PREFERENCE_LOSSES[cfg.loss], cfg.loss in NEEDS_REFERENCE

    meta = read_meta(cfg.data_dir)
    all_prompts, all_responses = read_groups(cfg.data_dir, "train", cfg.loss == "simpo_pl", cfg.train_rows)
    valid_prompts, valid_responses = read_groups(cfg.data_dir, "validation", False, cfg.eval_rows)
    valid_posts = read_table(cfg.data_dir, "sft_validation", ["query_token"], cfg.eval_rows)["query_token"]
    total = int(len(all_prompts) * cfg.epochs / cfg.batch_size)  # the last incomplete batch is dropped, as N+ does
    if total < 1:
        raise UserError(f"--batch_size={cfg.batch_size} is more than {len(all_prompts)} rows x {cfg.epochs} epochs: no update to make")
    out = Run(cfg, total)
    if out.finished:
        return out.earlier_result()

    policy = from_pretrained(cfg.model, revision=cfg.revision, device=device)
    reference = frozen(from_pretrained(cfg.ref_model or cfg.model, revision=cfg.revision, device=device), device, cfg.dtype) if needs_reference else None
    tokenizer = load_tokenizer(cfg.model, cfg.revision)
    check_tokenizer(cfg.data_dir, tokenizer, policy.config.vocab_size, cfg.model)
    train = "rankings_train" if cfg.loss == "simpo_pl" else "pairs_train"
    check_context(cfg.data_dir, policy.config.max_position_embeddings, (train, cfg.train_rows, 0),
                  ("pairs_validation", cfg.eval_rows, 0), ("sft_validation", cfg.eval_rows, meta["response_tokens"]))
    if cfg.ref_model:
        check_tokenizer(cfg.data_dir, load_tokenizer(cfg.ref_model, cfg.revision), reference.config.vocab_size, cfg.ref_model)
    policy.gpt_neox.gradient_checkpointing = cfg.gradient_checkpointing
    if cfg.compile:
        compile_kernels()
        for model in filter(None, (policy, reference)):
            compile_layers(model)
    optimizer = adamw(policy, cfg.lr, eps=cfg.adam_eps, weight_decay=cfg.weight_decay)
    print(f"{len(all_prompts)} rows, {total} updates of {cfg.batch_size}; {cfg.loss} beta {cfg.beta} gamma {cfg.gamma} lr {cfg.lr}; "
          f"{sum(p.numel() for p in policy.parameters()) / 1e6:.2f}M parameters on {device}")

    def logprobs_of(model, groups):
        """Log-prob of each response token (N, K, R), and the hidden state that predicted it (M, C)."""
        with autocast(device, cfg.dtype):
            hidden = model(groups.ids, groups.positions, groups.attend)[groups.predicts]  # (M, C)
            return groups.unpack(token_logprobs(hidden, model.embed_out.weight, groups.targets)[0]), hidden.detach().float()

    def batch_loss(prompts: list, responses: list) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Losses (n,) of these groups, and what is logged of each, (n,)."""
        groups = pack(prompts, responses, max_positions=policy.config.max_position_embeddings, device=device)
        mask = groups.response_mask  # (n, K, R)
        logprobs, hidden = logprobs_of(policy, groups)
        logits = groups.unpack(hidden @ policy.embed_out.weight.detach().mean(0))  # mean over the vocabulary, for the log: mean_v h . w_v = h . mean_v w_v
        ref_logprobs = None
        if needs_reference:
            with torch.no_grad():
                ref_logprobs, _ = logprobs_of(reference, groups)
        losses, rewards = loss_fn(logprobs, ref_logprobs, mask, beta=cfg.beta, gamma=cfg.gamma, label_smoothing=cfg.label_smoothing)
        sums, means, logits = seq_logprobs(logprobs.detach(), mask), mean_logprobs(logprobs.detach(), mask), mean_logprobs(logits, mask)  # (n, K)
        best, worst = 0, -1  # the pair, or the two ends of a ranking
        stats = {"loss": losses.detach(), "accuracies": (rewards[:, best] > rewards[:, worst]).float(), "margins": rewards[:, best] - rewards[:, worst]}
        for name, values in (("rewards", rewards), ("logps", sums), ("mean_logps", means), ("logits", logits)):
            stats |= {f"{name}/chosen": values[:, best], f"{name}/rejected": values[:, worst]}
        if needs_reference:
            ref_sums, ref_means = seq_logprobs(ref_logprobs, mask), mean_logprobs(ref_logprobs, mask)
            stats |= {"ref_margin": ref_sums[:, best] - ref_sums[:, worst], "ref_margin_mean": ref_means[:, best] - ref_means[:, worst]}
        return losses, stats

    @torch.no_grad()
    def evaluate() -> dict:
        parts = [batch_loss(valid_prompts[s], valid_responses[s])[1] for s in micro_batches(valid_prompts, valid_responses, cfg.micro_batch_tokens)]
        return {f"eval/{key}": torch.cat([part[key] for part in parts]).mean().item() for key in parts[0]}

    for step in range(out.begin(policy, optimizer), total):
        began = time.time()
        rows = batch_indices(len(all_prompts), cfg.batch_size, step, cfg.seed)
        prompts, responses = [all_prompts[i] for i in rows], [all_responses[i] for i in rows]
        parts = []
        for s in micro_batches(prompts, responses, cfg.micro_batch_tokens):
            losses, stats = batch_loss(prompts[s], responses[s])
            (losses.sum() / cfg.batch_size).backward()
            parts.append(stats)
        metrics = {key: torch.cat([part[key] for part in parts]).mean().item() for key in parts[0]}
        set_lr(optimizer, lr := learning_rate(step, total, cfg.lr, cfg.schedule, cfg.warmup))
        metrics["grad_norm"] = optimizer_step(policy, optimizer, metrics["loss"], cfg.max_grad_norm, step)
        metrics |= {"lr": lr, "seconds": time.time() - began}
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0:
            metrics |= evaluate()
        out.log(step + 1, metrics, show=("loss", "accuracies", "logps/chosen"))
        out.checkpoint(step + 1, policy, tokenizer, optimizer)

    with autocast(device, cfg.dtype):
        samples, ended = generate_all(policy, valid_posts, 1, meta["response_tokens"], batch=64, progress="greedy samples")
    return out.finish(policy, tokenizer, {**evaluate(), **summary_metrics(cfg.data_dir, "sft_validation", tokenizer, samples, ended)})


if __name__ == "__main__":
    run(main, Config)
