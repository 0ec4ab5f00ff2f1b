r"""REINFORCE leave-one-out with a KL, maximum-entropy or minimum-entropy reward: stage 3, and the experiment
of "Failure Modes of Maximum Entropy RLHF" (arXiv 2509.20265, 4.1 and 4.2).

    r(x, y) = r_phi(x, y) + sum of coefficient x term             --reward=kl:0.05+maxent_length:0.1
        kl       -(log pi(y|x) - log pi_ref(y|x))   4.1     maxent_length  -(1/|y|) log pi(y|x)   eq. 7
        maxent   -log pi(y|x)                       eq. 6   minent_length  +(1/|y|) log pi(y|x)   4.2.1
    A_i  = r_i - mean of the other K-1 rewards of the same prompt              RLOO, arXiv 2402.14740
    loss = mean of max(-A rho, -A clip(rho, 1-eps, 1+eps)), rho = pi(y|x) / pi_old(y|x) per sequence (TRL)

Leaves out: a value function. To read beside it: rlhf/forward.py, rlhf/rewards.py, rlhf/policy.py.
CPU, toy world (a minute; gold 0.56 to 0.89, kl about 2):
    python train_rloo.py --data_dir=out/toy/data --model=out/toy/sft --reward_model=out/toy/rm \
        --out_dir=out/toy/rloo --reward=kl:0.1 --lr=1.1e-4 --schedule=constant --k=4 --batch_size=64 \
        --episodes=23040 --ppo_epochs=1
GPU, Pythia 1B (published win rate about 51 %): bash runs/paper_1b.sh
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from data.gold import gold
from rlhf.common import Timer, adamw, learning_rate, load_models, optimizer_step, set_lr, setup
from rlhf.config import UserError, check_ranges, command_line
from rlhf.data import batch_indices, check_tables, has_column, read_meta, read_table
from rlhf.dist import deal, gather
from rlhf.forward import token_stats
from rlhf.generate import generate_all
from rlhf.groups import Groups, micro_batches, pack
from rlhf.masked import masked_sum, seq_logprobs
from rlhf.memory import dry_run
from rlhf.metrics import reward_metrics, sample_metrics, sequence_means, update_metrics
from rlhf.policy import ADVANTAGES, POLICY_LOSSES, k1, k2, k3, minus_all_drawn
from rlhf.pretrained import load_tokenizer
from rlhf.reward_fn import load_reward_fn
from rlhf.rewards import coefficients_now, entropy_bonus, own_terms, rlhf_reward
from rlhf.rollout import ROLLOUTS, forced_tokens, take, watched
from rlhf.run import Run
from rlhf.scores import Scorer, parse_mix
from rlhf.summaries import log_samples, summary_metrics


@dataclass(frozen=True, kw_only=True)
class Config:
    # I/O
    data_dir: str  # prepared data (data/tldr.py or data/toy.py)
    model: str  # the SFT model the policy starts from: Hugging Face directory, run directory or hub id
    reward_model: str = ""  # the reward model, of any size with the same tokenizer, or several joined by ','
    reward_fn: str = ""  # file.py:name, a function of prompts and texts in its place (rlhf/reward_fn.py)
    ref_model: str = ""  # what the KL is measured to (default: --model as it was at the start)
    revision: str = "main"  # revision of hub ids
    out_dir: str  # the run: model, metrics.jsonl, checkpoints
    resume: bool = False  # continue the newest checkpoint of out_dir
    overwrite: bool = False  # replace an existing run in out_dir
    # reward
    reward: str = "kl"  # terms with coefficients, joined by '+': kl, maxent (eq. 6), maxent_length (eq. 7),
    #   minent_length, chi2 (chi^2-RLHF), ref_logprob (sharpening); a term without a coefficient has 0.05;
    #   the score is always there, with 1 (or score:0)
    missing_eos: Literal["replace", "subtract", "none"] = "replace"
    #   the score of a response without EOS becomes -penalty, or loses penalty, or stays
    missing_eos_penalty: float = 1.0  # size of that penalty
    reward_mix: str = "mean"  # of several: mean, min, uwo:0.1 (mean - 0.1 variance), softmin:1, first
    score_after: str = ""  # only what follows this text in a response is scored (policies that think first)
    entropy_target: float | None = None  # nats per token: after each update the coefficient of maxent or
    #   maxent_length rises by --entropy_rate x (target - entropy), AER
    entropy_rate: float = 0.01  # of --entropy_target
    attached: bool = False  # the terms keep their own gradient too: the objective's whole gradient (README)
    invalid_logprob_fill: float | None = None
    #   ablation: sum padded log-probs as if they held this number (TRL: 1.0) instead of masking them
    # algorithm
    k: int = 2  # responses per prompt, at least 2
    rollout: str = "plain"  # k responses to each prompt; reset: after a part of the human one (DR-PO);
    #   adaptive: k of up to 4 k, above and below the human one (Reinforce-Ada); budget: half the prompts, and
    #   more responses where scores differ more (GVM)
    reset_share: float = 1.0  # of reset: share of prompts that begin with a part of the human response
    advantage: str = "rloo"  # rloo (leave-one-out) or grpo (divided by the group's standard deviation)
    episodes: int = 1_000_000  # responses sampled in the whole run
    batch_size: int = 512  # responses per update (prompts = batch_size / k)
    ppo_epochs: int = 4  # passes over each batch of responses, one optimizer step each
    policy_loss: str = "sequence"  # ratio of the policies: of the sequence, of each token (GRPO) or gspo
    clip: float = 0.2  # clip range of the ratio
    clip_high: float | None = None  # upper clip range (default: as --clip; DAPO 0.28)
    temperature: float = 0.7  # sampling temperature; all log-probs are taken at it
    top_p: float = 1.0  # nucleus of the sampling (1 = off; log-probs are those of the full distribution)
    response_tokens: int = 0  # longest response (0 = what the data says; 53 for TL;DR)
    # optimization
    lr: float = 1e-6  # peak learning rate
    schedule: Literal["cosine", "linear", "constant"] = "linear"  # after warm-up; would be 0 one update later
    warmup: float = 0.0  # share of the updates with a rising learning rate
    weight_decay: float = 0.0  # AdamW, on all parameters
    adam_eps: float = 1e-5  # AdamW epsilon
    max_grad_norm: float = 0.0  # clip the gradient to this norm (0 = no clipping, as TRL's RLOO)
    # eval and logging
    eval_rows: int = 256  # validation prompts sampled after the last update
    samples_every: int = 20  # updates between two looks at the same few prompts, in samples.jsonl (0 = none)
    save_every: int = 100  # updates between two checkpoints (0 = none)
    keep: int = 2  # checkpoints kept, of which two can be resumed (0 = all)
    wandb: str = ""  # Weights & Biases project that gets the log too (pip install wandb)
    tensorboard: bool = False  # the log also as out_dir/tensorboard (pip install tensorboard)
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


def check(cfg: Config) -> None:
    check_ranges(cfg)
    for option, known in (("advantage", ADVANTAGES), ("policy_loss", POLICY_LOSSES), ("rollout", ROLLOUTS)):
        if (value := getattr(cfg, option)) not in known:
            raise UserError(f"--{option}={value}: known are {', '.join(known)}")
    parse_mix(cfg.reward_mix)
    if bool(cfg.reward_model) == bool(cfg.reward_fn):
        raise UserError("what is the reward? give --reward_model or --reward_fn, one of the two")
    if cfg.k < 2:
        raise UserError(f"--k={cfg.k} must be at least 2: the others of a prompt are the baseline")
    if cfg.temperature <= 0:
        raise UserError(f"--temperature={cfg.temperature} must be above 0")
    if cfg.batch_size % (cfg.k * (1 + (cfg.rollout == "budget"))):
        raise UserError(f"--batch_size={cfg.batch_size} is not divisible by --k={cfg.k}, or with "
                        "--rollout=budget by twice that")
    if cfg.entropy_target is not None and entropy_bonus(cfg.reward) is None:
        raise UserError("--entropy_target changes the coefficient of maxent or maxent_length: --reward must "
                        "have one of the two, as in maxent_length:0.1")
    if cfg.attached and (cfg.ppo_epochs > 1 or cfg.invalid_logprob_fill is not None):
        raise UserError("--attached is the gradient at the policy that sampled: it takes --ppo_epochs=1, and "
                        "no --invalid_logprob_fill")
    if cfg.top_p < 1:
        print(f"warning: --top_p={cfg.top_p}: samples of the nucleus, log-probs and gradient of the full "
              "distribution: the gradient is biased", file=sys.stderr)


def memory(cfg: Config) -> dict[str, float]:
    """--dry_run"""
    held = {"reference": cfg.ref_model or cfg.model}
    held |= {"reward model": cfg.reward_model} if cfg.reward_model else {}
    at_once = min(cfg.rollout_prompts, cfg.batch_size // cfg.k)
    return dry_run(cfg, {"policy": cfg.model}, held, table="sft_train", prompts=at_once, k=cfg.k)


def read_prompts(cfg: Config, true_reward: bool) -> dict[str, list]:
    """The prompts; `references`: for a reward model the human response to each, in a list of one or none."""
    columns = ["query_token", "facts"] if true_reward else ["query_token"]
    data = read_table(cfg.data_dir, "sft_train", columns)
    human = "reference_response_token"
    needed = cfg.rollout in ("reset", "adaptive")
    if needed or cfg.reward_model and has_column(cfg.data_dir, "sft_train", human):
        references = [[r] for r in read_table(cfg.data_dir, "sft_train", [human])[human]]
    else:
        references = [[]] * len(data["query_token"])
    return data | {"references": references}


@torch.no_grad()
def look(
    cfg: Config, scored: dict[str, Tensor], groups: Groups, models: list, coefficients: dict[str, float],
) -> dict[str, Tensor]:
    """Numbers of the responses that samples.jsonl shows, (n, K) each: scores, and rewards as in training."""
    stats = token_stats(models[0], groups, cfg.temperature, models[1])
    known = scored["scores"], stats.logprobs, stats.ref_logprobs, groups.response_mask
    rewards, _ = rlhf_reward(*known, coefficients, cfg.invalid_logprob_fill)  # (n, K)
    return scored | {"rewards": rewards}


def policy_gradient(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, bonus: Tensor | float = 0.0, *,
    loss_fn: Callable, sequences: int,
) -> dict[str, Tensor]:
    """Backward of the mean loss over `sequences`; what is logged of each of these, (n, K)."""
    losses, stats = loss_fn(logprobs, old_logprobs, advantages, mask)  # (n, K)
    ((losses - bonus).sum() / sequences).backward()
    approxkl = k2(seq_logprobs(old_logprobs, mask), seq_logprobs(logprobs.detach(), mask))  # (n, K)
    squares = stats["ratio"] ** 2  # (n, K)
    return {**stats, "loss": losses.detach(), "approxkl": approxkl, "ratio_square": squares}


def main(cfg: Config) -> dict:
    check(cfg)
    if cfg.dry_run:
        return memory(cfg)
    device = setup(cfg.seed, cfg.device, cfg.plain, cfg.rank_timeout)
    N = cfg.batch_size // cfg.k  # rows of K responses per update
    asked = N // 2 if cfg.rollout == "budget" else N  # prompts per update
    meta = read_meta(cfg.data_dir)
    R = cfg.response_tokens or meta["response_tokens"]  # longest response
    total = ceil(cfg.episodes / cfg.batch_size)
    true_reward = gold(cfg.data_dir)  # known in the toy world only
    data = read_prompts(cfg, bool(true_reward))
    columns = ["query_token", "facts"] if true_reward else ["query_token"]
    valid = read_table(cfg.data_dir, "sft_validation", columns, cfg.eval_rows)
    out = Run(cfg, total)
    if out.finished:
        return out.earlier_result()

    models = load_models(cfg, device, reward_models=cfg.reward_model)
    policy, reference, *reward_models = models
    tokenizer = load_tokenizer(cfg.model, cfg.revision)
    context = policy.config.max_position_embeddings
    uses = [("sft_train", 0, R), ("sft_validation", cfg.eval_rows, R)]
    uses += [("sft_train", 0, 0)] if any(data["references"]) else []
    uses += [("sft_train", 0, 2 * R)] if cfg.rollout == "reset" else []  # R new ones after the forced ones
    check_tables(cfg.data_dir, models, *uses)
    policy.gpt_neox.gradient_checkpointing = cfg.gradient_checkpointing
    optimizer = adamw(policy, cfg.lr, eps=cfg.adam_eps, weight_decay=cfg.weight_decay)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    pack_rows = partial(pack, max_positions=context, device=device, max_response=R)
    score = Scorer(
        device=device, tokenizer=tokenizer, pack_rows=pack_rows, max_tokens=cfg.micro_batch_tokens,
        models=reward_models, mix=parse_mix(cfg.reward_mix), truth=true_reward,
        reward_fn=load_reward_fn(cfg.reward_fn),
        rule=cfg.missing_eos, penalty=cfg.missing_eos_penalty, marker=cfg.score_after,
    )
    sample = partial(
        generate_all, policy, max_new_tokens=R, batch=cfg.rollout_prompts, temperature=cfg.temperature,
        top_p=cfg.top_p, generator=generator,
    )
    loss_fn = partial(POLICY_LOSSES[cfg.policy_loss], clip=cfg.clip, clip_high=cfg.clip_high)
    learn = partial(policy_gradient, loss_fn=loss_fn, sequences=cfg.batch_size)
    parameters = sum(p.numel() for p in policy.parameters())
    print(f"{total} updates of {asked} prompts x {cfg.k} responses of at most {R} tokens; "
          f"reward: {cfg.reward}; {len(data['query_token'])} prompts; {parameters / 1e6:.2f}M parameters on "
          f"{device}")

    samples_file = out.out / "samples.jsonl"
    for step in range(out.begin(policy, optimizer, generator), total):
        timer = Timer(device)
        lr = learning_rate(step, total, cfg.lr, cfg.schedule, cfg.warmup)
        set_lr(optimizer, lr)
        coefficients = coefficients_now(cfg.reward, out.last, cfg.entropy_target, cfg.entropy_rate)

        # 1. rollout: K responses to each prompt from the current policy, and their scores
        rows = batch_indices(len(data["query_token"]), asked, step, cfg.seed)
        drawn = take(data, rows)
        if cfg.rollout == "reset":
            seed = cfg.seed * 1_000_003 + step
            drawn["forced"] = forced_tokens(drawn["references"], cfg.reset_share, R, seed)
        rollout = ROLLOUTS[cfg.rollout](sample, score, drawn, cfg.k, R, timer.lap)
        prompts = rollout.prompts
        responses = rollout.responses
        slices = deal(micro_batches(prompts, responses, cfg.micro_batch_tokens))
        timer.lap("scoring")
        if cfg.samples_every and step % cfg.samples_every == 0:
            shown = watched(sample, score, valid, cfg.k, cfg.seed)
            groups = pack_rows(shown.prompts, shown.responses)
            numbers = look(cfg, shown.scored, groups, models, coefficients)
            log_samples(samples_file, step + 1, tokenizer, shown.prompts, shown.responses, numbers)
            timer.lap("samples")

        # The policy that scores is the one that sampled: its scoring forward is the first learning forward.
        parts, learnt = [], []
        for s in slices:
            # 2. log-probs under policy and reference by a forward, not from sampling
            groups = pack_rows(prompts[s], responses[s])
            mask = groups.response_mask  # (n, K, R)
            stats = token_stats(policy, groups, cfg.temperature, reference)  # (n, K, R) each
            old_logprobs = stats.logprobs.detach()

            # 3. reward and advantage: constants, the KL and entropy terms included
            found = {name: values[s] for name, values in rollout.scored.items()}  # (n, K) each
            rewards, terms = rlhf_reward(
                found["scores"], old_logprobs, stats.ref_logprobs, mask, coefficients,
                cfg.invalid_logprob_fill,
            )  # (n, K) each
            advantages = ADVANTAGES[cfg.advantage](rewards)  # (n, K)
            if cfg.rollout == "adaptive":  # its baseline knows the samples that were not kept
                left_out = coefficients["score"] * rollout.left_out[s]  # (n, 1)
                advantages = minus_all_drawn(rewards, left_out)
            weights = rollout.weights[s]  # (n, 1)
            advantages = weights * advantages
            parts.append({
                **found, "mask": mask, "old_logprobs": old_logprobs, "ref_logprobs": stats.ref_logprobs,
                "entropy": stats.entropy.detach(), "kl_full": stats.kl, "rewards": rewards,
                "advantages": advantages, **terms,
            })
            bonus = 0.0
            if cfg.attached:
                bonus = weights * own_terms(stats.logprobs, stats.ref_logprobs, mask, coefficients)  # (n, K)
            timer.lap("scoring")
            learnt.append(learn(stats.logprobs, old_logprobs, advantages, mask, bonus))
            timer.lap("update")
        parts = gather(parts, slices)
        batch = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}  # (N, K, ...)
        old_logprobs, mask = batch["old_logprobs"], batch["mask"]

        # 4. update: one optimizer step per pass; the later passes run the new policy on the same responses
        passes = []
        for epoch in range(cfg.ppo_epochs):
            if epoch > 0:
                learnt = []
                for s in slices:
                    groups = pack_rows(prompts[s], responses[s])
                    logprobs = token_stats(policy, groups, cfg.temperature).logprobs  # (n, K, R)
                    learnt.append(learn(logprobs, old_logprobs[s], batch["advantages"][s], mask[s]))
            means = sequence_means(gather(learnt, slices))
            means["grad_norm"] = optimizer_step(policy, optimizer, means["loss"], cfg.max_grad_norm, step)
            passes.append(means)
        timer.lap("update")

        # 5. how far did the update go? log-probs of a quarter of the rollout under the new weights
        quarter = slice(max(1, N // 4))
        some_prompts, some_responses = prompts[quarter], responses[quarter]
        some = deal(micro_batches(some_prompts, some_responses, cfg.micro_batch_tokens))
        with torch.no_grad():
            moved = [
                token_stats(policy, pack_rows(some_prompts[s], some_responses[s]), cfg.temperature).logprobs
                for s in some
            ]
        moved = torch.cat(gather(moved, some))  # (N / 4, K, R)
        timer.lap("drift")

        metrics = {
            "episode": (step + 1) * cfg.batch_size,
            **sample_metrics(batch),
            **reward_metrics(batch, coefficients),
            **rollout.log,
            **update_metrics(passes),
            "kl_prev/k1": masked_sum(k1(old_logprobs[quarter], moved), mask[quarter]).mean().item(),
            "kl_prev/k3": masked_sum(k3(old_logprobs[quarter], moved), mask[quarter]).mean().item(),
            "lr": lr,
        }
        metrics |= timer.metrics(tokens=mask.sum().item(), rollout=1, scoring=1, update=cfg.ppo_epochs)
        out.log(step + 1, metrics, show=("scores", "gold", "kl", "entropy", "response_length"))
        out.checkpoint(step + 1, policy, tokenizer, optimizer, generator)

    greedy, ended = generate_all(
        policy, valid["query_token"], 1, R, batch=cfg.rollout_prompts, progress="greedy samples"
    )
    result = summary_metrics(cfg.data_dir, "sft_validation", tokenizer, greedy, ended, true_reward)
    result |= {key: out.last.get(key) for key in ("scores", "rlhf_reward", "kl", "entropy")}
    return out.finish(policy, tokenizer, result)


if __name__ == "__main__":
    command_line(main, Config)
