r"""Online preference learning: the policy samples, something compares, a pair loss learns.

    y_1 .. y_K ~ softmax((1-c) logits_pi + c logits_ref)     c: --mixture; of the last K/2: --opponent
    P(y > y') = sigmoid(s(y) - s(y'))     s: reward models, gold or a function; or a function that compares.
                                          The label is hard, sampled or soft
    loss      = pair loss(best of K, worst of K) + explore x log(pi/pi_ref)(y_K)
Every method is these options, and its row at the end of --help. Leaves out: a policy of its own per opponent.
To read beside it: rlhf/compare.py (pairs, labels, Nash-MD), rlhf/losses.py (pair losses).
CPU, toy world:
    python train_online.py --data_dir=out/toy/data --model=out/toy/sft --reward_model=out/toy/rm \
        --out_dir=out/toy/online_dpo --loss=dpo --beta=0.1 --lr=1e-4 --batch_size=64 --episodes=6400
GPU, Pythia 1B: the same with out/tldr, out/1b/sft, out/1b/rm and the defaults
"""

from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from data.gold import gold
from rlhf.common import Timer, adamw, learning_rate, load_models, optimizer_step, set_lr, setup
from rlhf.compare import (
    METHODS,
    ONLINE_LOSSES,
    Comparison,
    add_data_pair,
    compare,
    equal_scores,
    pair_losses,
)
from rlhf.config import UserError, check_ranges, command_line
from rlhf.data import batch_indices, check_tables, read_meta, read_table
from rlhf.dist import deal, gather
from rlhf.forward import TokenStats, token_stats
from rlhf.generate import check_vocabularies, generate_all
from rlhf.groups import micro_batches, pack
from rlhf.losses import RANKED, describe, extras, loss_options
from rlhf.masked import seq_logprobs
from rlhf.memory import dry_run
from rlhf.metrics import sample_metrics
from rlhf.pair_losses import seq_log_ratios
from rlhf.pretrained import load_tokenizer
from rlhf.reward_fn import load_reward_fn
from rlhf.rollout import round_model, take, two_samplers, watched
from rlhf.run import Run
from rlhf.scores import Scorer, parse_mix
from rlhf.summaries import log_samples, mean, summary_metrics

OPTIONS = ("beta", "gamma", "label_smoothing")  # of losses; each loss names those that it has


@dataclass(frozen=True, kw_only=True)
class Config:
    # I/O
    data_dir: str  # prepared data (data/tldr.py or data/toy.py)
    model: str  # the SFT model the policy starts from: Hugging Face directory, run directory or hub id
    reward_model: str = ""  # what compares; several joined by ','; or one of the next two, or --scorer=gold
    reward_fn: str = ""  # file.py:name, a function of prompts and texts that scores (rlhf/reward_fn.py)
    compare_fn: str = ""  # file.py:name, a function of prompts, texts and other texts: P(the first is better)
    ref_model: str = ""  # the reference (default: --model as it was at the start)
    revision: str = "main"  # revision of hub ids
    out_dir: str  # the run: model, metrics.jsonl, checkpoints
    resume: bool = False  # continue the newest checkpoint of out_dir
    overwrite: bool = False  # replace an existing run in out_dir
    # samples
    k: int = 2  # responses per prompt; of more than two the best and the worst are the pair
    mixture: float = 0.0  # c of the sampler softmax((1-c) logits_pi + c logits_ref): 0 the policy, 1 the
    #   reference, between them the geometric mixture
    opponent: float | None = None  # c of the sampler of the last k/2 responses (default: as --mixture)
    data_pair: bool = False  # the data's chosen and rejected response are compared too (reads pairs_train)
    round_updates: int = 0  # updates of a round, in which the sampler stays as the policy was at its start
    #   (0 = the sampler is always the policy)
    move_reference: bool = False  # the reference too becomes the policy at the start of a round
    temperature: float = 0.7  # sampling temperature; all log-probs are taken at it
    top_p: float = 1.0  # nucleus of the sampling (1 = off; log-probs are those of the full distribution)
    response_tokens: int = 0  # longest response (0 = what the data says; 53 for TL;DR)
    # comparison
    scorer: Literal["rm", "gold"] = "rm"  # whose scores: those of the model or function that is given, or the
    #   toy world's true ones
    reward_mix: str = "mean"  # of several: mean, min, uwo:0.1 (mean - 0.1 variance), softmin:1, first
    label: Literal["hard", "sampled", "soft"] = "hard"  # the higher score wins and ties are dropped; it wins
    #   with probability sigmoid(difference); or that probability itself, for the losses that read one
    missing_eos: Literal["replace", "subtract", "none"] = "replace"
    #   the reward model's score of a response without EOS becomes -penalty, or loses penalty, or stays
    missing_eos_penalty: float = 1.0  # size of that penalty
    # loss (its options and their defaults: at the end of this help)
    loss: str = "dpo"  # name of a loss in rlhf/losses.py, or nash_md
    beta: float | None = None  # scale of the implicit reward
    gamma: float | None = None  # target margin, absolute
    label_smoothing: float | None = None  # share of labels taken to be flipped
    explore: float = 0.0  # weight of + log(pi/pi_ref) of the last sampled response (the opponent's)
    # algorithm
    episodes: int = 1_000_000  # responses sampled in the whole run
    batch_size: int = 512  # responses sampled per update (prompts = batch_size / k)
    epochs: int = 1  # passes over each batch of pairs, one optimizer step each
    # optimization
    lr: float = 5e-7  # peak learning rate
    schedule: Literal["cosine", "linear", "constant"] = "linear"  # after warm-up; would be 0 one update later
    warmup: float = 0.0  # share of the updates with a rising learning rate
    weight_decay: float = 0.0  # AdamW, on all parameters
    adam_eps: float = 1e-5  # AdamW epsilon
    max_grad_norm: float = 0.0  # clip the gradient to this norm (0 = no clipping)
    # eval and logging
    eval_rows: int = 256  # validation prompts sampled after the last update
    samples_every: int = 20  # updates between two looks at the same few prompts, in samples.jsonl (0 = none)
    save_every: int = 100  # updates between two checkpoints (0 = none)
    keep: int = 2  # checkpoints kept, of which two can be resumed (0 = all)
    # system
    seed: int = 1  # prompts and samples
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    #   of matrix products; auto: bfloat16 on CUDA, float32 on CPU
    compile: bool = False  # torch.compile the models
    plain: bool = False  # no flex_attention, no CUDA graph, no torch.compile: slower, needs no compiler
    micro_batch_tokens: int = 8192  # tokens in one forward and backward: memory and speed, not the result
    rollout_prompts: int = 64  # prompts in one generation call: memory and speed, not the result
    gradient_checkpointing: bool = False  # recompute activations in the backward: less memory, more time
    rank_timeout: float = 600.0  # seconds that a rank (torchrun) waits for another one
    dry_run: bool = False  # print the memory that each stage takes, by arithmetic, and end


def with_options(cfg: Config) -> tuple[Config, dict[str, float]]:
    """The configuration with every option of the loss filled in, so that run.json tells what was used."""
    options = loss_options(cfg.loss, {name: getattr(cfg, name) for name in OPTIONS}, ONLINE_LOSSES)
    known = {name: value for name, value in options.items() if name in OPTIONS}
    return replace(cfg, **known), options


def check(cfg: Config) -> None:
    check_ranges(cfg)
    if cfg.k < 1 or cfg.k + 2 * cfg.data_pair < 2:
        raise UserError(f"--k={cfg.k}: a comparison needs 2 responses; at least 2, or 1 with --data_pair")
    if cfg.batch_size % cfg.k:
        raise UserError(f"--batch_size={cfg.batch_size} is not divisible by --k={cfg.k}")
    if cfg.opponent is not None and cfg.k % 2:
        raise UserError(f"--k={cfg.k}: half of the responses are the opponent's, so it must be even")
    if cfg.temperature <= 0:
        raise UserError(f"--temperature={cfg.temperature} must be above 0")
    if cfg.move_reference and not cfg.round_updates:
        raise UserError("--move_reference: at the start of which round? give --round_updates")
    functions = [name for name in (cfg.reward_fn, cfg.compare_fn) if name]
    given = functions + [cfg.reward_model] * bool(cfg.reward_model and cfg.scorer == "rm")
    if len(given) != (cfg.scorer == "rm"):
        raise UserError("what compares? give one of --reward_model, --reward_fn and --compare_fn, or "
                        "--scorer=gold in the toy world")
    if cfg.compare_fn and (cfg.k + 2 * cfg.data_pair != 2 or cfg.loss in RANKED):
        raise UserError("--compare_fn compares two responses: it takes --k=2, and no --data_pair")
    parse_mix(cfg.reward_mix)
    if cfg.loss in RANKED and cfg.label != "hard":
        raise UserError(f"--loss={cfg.loss} learns from a ranking, which has no label: --label=hard")
    if cfg.label == "soft" and "labels" not in extras(ONLINE_LOSSES[cfg.loss]):
        having = [name for name, loss in ONLINE_LOSSES.items() if "labels" in extras(loss)]
        raise UserError(f"--label=soft: the loss {cfg.loss} reads no probability; these do: "
                        f"{', '.join(having)}")
    if cfg.loss == "nash_md" and (cfg.label != "soft" or cfg.k != 2 or cfg.data_pair):
        raise UserError("--loss=nash_md compares a response with one of the opponent: it takes --label=soft "
                        "and --k=2, and no --data_pair")


def memory(cfg: Config) -> dict[str, float]:
    """--dry_run"""
    held = {"reference": cfg.ref_model or cfg.model}
    held |= {"reward model": cfg.reward_model} if cfg.scorer == "rm" else {}
    held |= {"sampler": cfg.model} if cfg.round_updates else {}
    sampled = {"table": "sft_train", "prompts": cfg.rollout_prompts, "k": cfg.k}
    return dry_run(cfg, {"policy": cfg.model}, held, **sampled)


def read_prompts(cfg: Config, true_reward: bool) -> dict[str, list]:
    """Prompts; with --data_pair their chosen and rejected responses; the facts where the truth is known."""
    pair = ["chosen_token", "rejected_token"] if cfg.data_pair else []
    facts = ["facts"] if true_reward else []
    table = "pairs_train" if cfg.data_pair else "sft_train"
    return read_table(cfg.data_dir, table, ["query_token", *pair, *facts])


def learn(
    cfg: Config, options: dict[str, float], stats: TokenStats, mask: Tensor, scores: Tensor,
    compared: Comparison, pairs: int,
) -> dict[str, Tensor]:
    """Backward of the mean loss over the `pairs` of the whole batch; what is logged of each, (n,)."""
    losses, rewards = pair_losses(ONLINE_LOSSES[cfg.loss], options, stats, mask, compared)  # (n,), (n, m)
    log_ratios = seq_log_ratios(stats.logprobs, stats.ref_logprobs, mask)  # (n, K)
    losses = losses + cfg.explore * log_ratios[:, cfg.k - 1]
    (torch.where(compared.kept, losses, 0).sum() / max(pairs, 1)).backward()
    best_worst = compared.order[:, [0, -1]]  # (n, 2)
    logps = seq_logprobs(stats.logprobs.detach(), mask).gather(1, best_worst)  # (n, 2)
    scores = scores.gather(1, best_worst)  # (n, 2)
    return {
        "loss": losses.detach(), "margins": rewards[:, 0] - rewards[:, -1],
        "accuracies": rewards[:, 0] > rewards[:, -1], "score_gap": scores[:, 0] - scores[:, 1],
        "logps/chosen": logps[:, 0], "logps/rejected": logps[:, 1],
    }


def samples_only(stats: TokenStats, mask: Tensor, own: int, R: int) -> dict[str, Tensor]:
    """For the log: what is known of the first `own` responses, (n, own, R) each."""
    known = {
        "mask": mask, "old_logprobs": stats.logprobs.detach(), "ref_logprobs": stats.ref_logprobs,
        "kl_full": stats.kl, "entropy": stats.entropy.detach(),
    }
    return {key: values[:, :own, :R] for key, values in known.items()}


def comparison_metrics(parts: list[dict[str, Tensor]], kept: Tensor) -> dict[str, float]:
    """Means over the kept pairs of a pass, from its micro-batches."""
    return {key: torch.cat([part[key] for part in parts])[kept].double().mean().item() for key in parts[0]}


def main(cfg: Config) -> dict:
    meta = read_meta(cfg.data_dir)
    cfg, options = with_options(cfg)
    check(cfg)
    if cfg.dry_run:
        return memory(cfg)
    device = setup(cfg.seed, cfg.device, cfg.plain, cfg.rank_timeout)
    N = cfg.batch_size // cfg.k  # prompts per update
    own = cfg.k if cfg.opponent is None else cfg.k // 2  # responses per prompt that are not the opponent's
    R = cfg.response_tokens or meta["response_tokens"]  # longest sample
    total = ceil(cfg.episodes / cfg.batch_size)
    true_reward = gold(cfg.data_dir)  # known in the toy world only
    if cfg.scorer == "gold" and not true_reward:
        raise UserError(f"--scorer=gold: nobody knows the true reward of {cfg.data_dir}: "
                        "give --reward_model")
    data = read_prompts(cfg, bool(true_reward))
    columns = ["query_token", "facts"] if true_reward else ["query_token"]
    valid = read_table(cfg.data_dir, "sft_validation", columns, cfg.eval_rows)
    out = Run(cfg, total)
    if out.finished:
        return out.earlier_result()

    scoring = cfg.reward_model if cfg.scorer == "rm" else ""
    models = load_models(cfg, device, reward_models=scoring)
    policy, reference, *reward_models = models
    if cfg.mixture or cfg.opponent:
        check_vocabularies([policy, reference])
    tokenizer = load_tokenizer(cfg.model, cfg.revision)
    context = min(model.config.max_position_embeddings for model in models)
    uses = [("pairs_train", 0, 0), ("pairs_train", 0, R)] if cfg.data_pair else [("sft_train", 0, R)]
    uses += [("sft_validation", cfg.eval_rows, R)]
    check_tables(cfg.data_dir, models, *uses)
    policy.gpt_neox.gradient_checkpointing = cfg.gradient_checkpointing
    optimizer = adamw(policy, cfg.lr, eps=cfg.adam_eps, weight_decay=cfg.weight_decay)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    pack_rows = partial(pack, max_positions=context, device=device, max_response=R)
    score = Scorer(
        device=device, tokenizer=tokenizer, pack_rows=pack_rows, max_tokens=cfg.micro_batch_tokens,
        models=reward_models, mix=parse_mix(cfg.reward_mix), truth=true_reward,
        reward_fn=load_reward_fn(cfg.reward_fn), compare_fn=load_reward_fn(cfg.compare_fn, "compare_fn"),
        rule="none" if cfg.scorer == "gold" else cfg.missing_eos, penalty=cfg.missing_eos_penalty,
    )
    sample = partial(
        generate_all, max_new_tokens=R, batch=cfg.rollout_prompts, temperature=cfg.temperature,
        top_p=cfg.top_p, generator=generator,
    )
    parameters = sum(p.numel() for p in policy.parameters())
    print(f"{total} updates of {N} prompts x {cfg.k} responses of at most {R} tokens; {cfg.loss} {options}; "
          f"{len(data['query_token'])} prompts; {parameters / 1e6:.2f}M parameters on {device}")

    sampler = policy
    for step in range(out.begin(policy, optimizer, generator), total):
        into_round = step % cfg.round_updates if cfg.round_updates else None  # updates since it began
        if into_round == 0 or cfg.round_updates and step == out.start:
            folder = out.out / f"rounds/step_{step - into_round:08d}"
            sampler = round_model(folder, into_round == 0, policy, tokenizer, cfg.dtype, cfg.compile)
            reference = sampler if cfg.move_reference else reference
        timer = Timer(device)
        lr = learning_rate(step, total, cfg.lr, cfg.schedule, cfg.warmup)
        set_lr(optimizer, lr)

        # 1. rollout: K responses to each prompt
        rows = batch_indices(len(data["query_token"]), N, step, cfg.seed)
        drawn = take(data, rows)
        prompts = drawn["query_token"]
        mixed = partial(sample, sampler, reference=reference)
        responses, ended = two_samplers(mixed, prompts, cfg.k, cfg.mixture, cfg.opponent)
        if cfg.data_pair:
            responses, ended = add_data_pair(responses, ended, drawn["chosen_token"], drawn["rejected_token"])
        slices = deal(micro_batches(prompts, responses, cfg.micro_batch_tokens))
        groups = [pack_rows(prompts[s], responses[s]) for s in slices]
        timer.lap("rollout")

        # 2. comparison: scores (N, K), and by them which responses are learnt from
        scored = score(drawn, responses, ended)
        scores = equal_scores(scored["scores"], responses)
        coins = torch.rand(N, generator=generator, device=device)  # (N,)
        compared = compare(scores, cfg.label, coins, scored.get("wins"), ranked=cfg.loss in RANKED)
        pairs = compared.kept.sum().item()
        timer.lap("scoring")
        if cfg.samples_every and step % cfg.samples_every == 0:
            shown = watched(partial(sample, policy), score, valid, 2, cfg.seed)
            file = out.out / "samples.jsonl"
            log_samples(file, step + 1, tokenizer, shown.prompts, shown.responses, shown.scored)
            timer.lap("samples")

        # 3. update: one optimizer step per pass; the log is of the samples as the first pass sees them
        seen = []
        passes = []
        for epoch in range(cfg.epochs):
            learnt = []
            for g, s in zip(groups, slices):
                stats = token_stats(policy, g, cfg.temperature, reference)  # (n, K, R) each
                learnt.append(learn(cfg, options, stats, g.response_mask, scores[s], compared[s], pairs))
                if epoch == 0:
                    seen.append(samples_only(stats, g.response_mask, own, R))
            if pairs:
                means = comparison_metrics(gather(learnt, slices), compared.kept)
                means["grad_norm"] = optimizer_step(policy, optimizer, means["loss"], cfg.max_grad_norm, step)
                passes.append(means)
        timer.lap("update")

        seen = gather(seen, slices)
        batch = {key: torch.cat([part[key] for part in seen]) for key in seen[0]}  # (N, own, R)
        batch |= {name: values[:, :own] for name, values in scored.items() if values.dim() == 2}  # (N, own)
        metrics = {
            "episode": (step + 1) * cfg.batch_size,
            **sample_metrics(batch),
            "tie_share": 1 - pairs / N,
            **{key: mean([p[key] for p in passes]) for key in (passes[0] if passes else [])},
            "lr": lr,
        }
        if cfg.opponent is not None:
            metrics["opponent_scores"] = scores[:, own : cfg.k].mean().item()
        tokens = sum(len(y) for group in responses for y in group)
        metrics |= timer.metrics(tokens=tokens, rollout=1, scoring=1, update=cfg.epochs)
        out.log(step + 1, metrics, show=("scores", "gold", "kl", "accuracies", "response_length"))
        out.checkpoint(step + 1, policy, tokenizer, optimizer, generator)

    greedy, ended = generate_all(
        policy, valid["query_token"], 1, R, batch=cfg.rollout_prompts, progress="greedy samples"
    )
    result = summary_metrics(cfg.data_dir, "sft_validation", tokenizer, greedy, ended, true_reward)
    result |= {key: out.last.get(key) for key in ("scores", "kl", "entropy")}
    return out.finish(policy, tokenizer, result)


if __name__ == "__main__":
    command_line(main, Config, epilog=METHODS + describe(ONLINE_LOSSES))
