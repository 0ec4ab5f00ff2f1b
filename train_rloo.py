r"""REINFORCE leave-one-out with a KL, maximum-entropy or minimum-entropy reward: stage 3, and the experiment
of "Failure Modes of Maximum Entropy RLHF" (arXiv 2509.20265, 4.1 and 4.2).

    r(x, y) = r_phi(x, y) + sum of coefficient x term             --reward=kl:0.05+maxent_length:0.1
        kl       -(log pi(y|x) - log pi_ref(y|x))   4.1     maxent_length  -(1/|y|) log pi(y|x)   eq. 7
        maxent   -log pi(y|x)                       eq. 6   minent_length  +(1/|y|) log pi(y|x)   4.2.1
    A_i  = r_i - mean of the other K-1 rewards of the same prompt              RLOO, arXiv 2402.14740
    loss = mean of max(-A rho, -A clip(rho, 1-eps, 1+eps)), rho = pi(y|x) / pi_old(y|x) per sequence (TRL)

Leaves out: a value function. To read beside it: rlhf/forward.py, rlhf/rewards.py, rlhf/policy.py.
CPU, toy world (half a minute; gold 0.47 to 0.67, kl about 1.5):
    python train_rloo.py --data_dir=out/toy/data --model=out/toy/sft --reward_model=out/toy/rm \
        --out_dir=out/toy/rloo --reward=kl:0.1 --lr=1e-4 --schedule=constant --k=4 --batch_size=64 \
        --episodes=6400 --ppo_epochs=1
GPU, Pythia 1B (published win rate about 51 %): bash runs/paper_1b.sh
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from data.gold import gold
from rlhf.common import Timer, adamw, frozen, learning_rate, load_model, optimizer_step, set_lr, setup
from rlhf.config import UserError, check_ranges, command_line
from rlhf.data import batch_indices, check_tables, has_column, read_meta, read_table
from rlhf.dist import deal, gather, whole
from rlhf.forward import response_scores, token_stats
from rlhf.generate import generate_all
from rlhf.groups import micro_batches, pack
from rlhf.masked import masked_mean, masked_sum, seq_logprobs
from rlhf.model import NeoX
from rlhf.policy import ADVANTAGES, POLICY_LOSSES, k1, k2, k3
from rlhf.pretrained import load_tokenizer
from rlhf.reward_fn import function_scores, load_reward_fn
from rlhf.rewards import missing_eos, parse_reward, rlhf_reward
from rlhf.run import Run
from rlhf.summaries import log_samples, mean, summary_metrics, texts_of


@dataclass(frozen=True, kw_only=True)
class Config:
    # I/O
    data_dir: str  # prepared data (data/tldr.py or data/toy.py)
    model: str  # the SFT model the policy starts from: Hugging Face directory, run directory or hub id
    reward_model: str = ""  # the reward model, of any size with the same tokenizer; or give --reward_fn
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
    invalid_logprob_fill: float | None = None
    #   ablation: sum padded log-probs as if they held this number (TRL: 1.0) instead of masking them
    # algorithm
    k: int = 2  # responses per prompt, at least 2
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
    samples_every: int = 20  # updates between two looks at a few prompts, in samples.jsonl (0 = none)
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
    micro_batch_tokens: int = 8192  # tokens in one forward and backward: memory and speed, not the result
    rollout_prompts: int = 64  # prompts in one generation call
    gradient_checkpointing: bool = False  # recompute activations in the backward: less memory, more time
    rank_timeout: float = 600.0  # seconds that a rank (torchrun) waits for another one


def check(cfg: Config) -> None:
    check_ranges(cfg)
    if cfg.advantage not in ADVANTAGES:
        raise UserError(f"--advantage={cfg.advantage}: known are {', '.join(ADVANTAGES)}")
    if cfg.policy_loss not in POLICY_LOSSES:
        raise UserError(f"--policy_loss={cfg.policy_loss}: known are {', '.join(POLICY_LOSSES)}")
    if bool(cfg.reward_model) == bool(cfg.reward_fn):
        raise UserError("what is the reward? give --reward_model or --reward_fn, one of the two")
    if cfg.k < 2:
        raise UserError(f"--k={cfg.k} must be at least 2: the others of a prompt are the baseline")
    if cfg.temperature <= 0:
        raise UserError(f"--temperature={cfg.temperature} must be above 0")
    if cfg.batch_size % cfg.k:
        raise UserError(f"--batch_size={cfg.batch_size} is not divisible by --k={cfg.k}")
    if cfg.top_p < 1:
        print(f"warning: --top_p={cfg.top_p}: samples of the nucleus, log-probs and gradient of the full "
              "distribution: the gradient is biased", file=sys.stderr)


def load_models(cfg: Config, device: torch.device) -> list[NeoX]:
    """Policy, reference and, unless there is a --reward_fn, the reward model."""
    load = partial(
        load_model, data_dir=cfg.data_dir, revision=cfg.revision, device=device, dtype=cfg.dtype,
        compiled=cfg.compile, sharded=True,
    )
    models = [load(cfg.model), frozen(load(cfg.ref_model or cfg.model))]
    if cfg.reward_model:
        models.append(frozen(load(cfg.reward_model, head="score")))
    return models


def read_prompts(cfg: Config, true_reward: bool) -> dict[str, list]:
    """The prompts; `references`: for a reward model the human response to each, in a list of one or none."""
    columns = ["query_token", "facts"] if true_reward else ["query_token"]
    data = read_table(cfg.data_dir, "sft_train", columns)
    human = "reference_response_token"
    if cfg.reward_model and has_column(cfg.data_dir, "sft_train", human):
        references = [[r] for r in read_table(cfg.data_dir, "sft_train", [human])[human]]
    else:
        references = [[]] * len(data["query_token"])
    return data | {"references": references}


def model_scores(
    reward_model: NeoX, pack_rows: Callable, prompts: list, responses: list, references: list,
) -> tuple[Tensor, Tensor]:
    """Scores of the responses (n, K) and, as response K + 1 of their row, of the references (n, 0 or 1)."""
    groups = pack_rows(prompts, [own + human for own, human in zip(responses, references)])
    scores = response_scores(reward_model, groups)  # (n, K or K + 1)
    K = len(responses[0])
    return scores[:, :K], scores[:, K:]


def make_score(cfg: Config, models: list, tokenizer: Tokenizer, pack_rows: Callable) -> Callable:
    """score(prompts, responses, references) -> scores (n, K), scores of the references (n, 0 or 1)."""
    if cfg.reward_fn:
        return partial(function_scores, load_reward_fn(cfg.reward_fn), tokenizer, models[0].device)
    return partial(model_scores, models[2], pack_rows)


def policy_gradient(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
    loss_fn: Callable, sequences: int,
) -> dict[str, Tensor]:
    """Backward of the mean loss over `sequences`; what is logged of each of these, (n, K)."""
    losses, stats = loss_fn(logprobs, old_logprobs, advantages, mask)  # (n, K)
    (losses.sum() / sequences).backward()
    approxkl = k2(seq_logprobs(old_logprobs, mask), seq_logprobs(logprobs.detach(), mask))  # (n, K)
    squares = stats["ratio"] ** 2  # (n, K)
    return {**stats, "loss": losses.detach(), "approxkl": approxkl, "ratio_square": squares}


def rollout_metrics(batch: dict[str, Tensor], coefficients: dict[str, float]) -> dict[str, float]:
    """What is logged of a scored rollout, (N, K, R) or (N, K) each; README, "Every metric of RLOO"."""
    mask, logprobs, ref_logprobs = batch["mask"], batch["old_logprobs"], batch["ref_logprobs"]
    terms = {name: batch[name].mean().item() for name in coefficients if name != "score"}
    over = batch["scores"].mean() - batch["reference_scores"].mean()  # nan without references
    return {
        "scores": batch["scores"].mean().item(),
        **({"scores_over_reference": over.item()} if batch["reference_scores"].numel() else {}),
        "scores_std": batch["scores"].std().item(),
        "raw_scores": batch["raw_scores"].mean().item(),
        "rlhf_reward": batch["rewards"].mean().item(),
        "group_std": batch["rewards"].std(1).mean().item(),
        **{f"bonus/{name}": value for name, value in terms.items()},
        **{f"reward/{name}": coefficients[name] * value for name, value in terms.items()},
        "kl": masked_sum(k1(logprobs, ref_logprobs), mask).mean().item(),
        "kl_k3": masked_sum(k3(logprobs, ref_logprobs), mask).mean().item(),
        "kl_full": masked_sum(batch["kl_full"], mask).mean().item(),
        "entropy": masked_mean(batch["entropy"].flatten(), mask.flatten()).item(),
        "surprisal": -masked_mean(logprobs.flatten(), mask.flatten()).item(),
        "length_normalized_surprisal": -masked_mean(logprobs, mask).mean().item(),
        "response_length": mask.sum(-1).double().mean().item(),
        "eos_share": batch["ended"].double().mean().item(),
    }


def sequence_means(parts: list[dict[str, Tensor]]) -> dict[str, float]:
    """Means over all sequences of a pass, from its micro-batches."""
    return {key: torch.cat([part[key] for part in parts]).double().mean().item() for key in parts[0]}


def update_metrics(passes: list[dict[str, float]]) -> dict[str, float]:
    """What is logged of the passes of one update: means over them."""
    average = {key: mean([p[key] for p in passes]) for key in passes[0]}
    return {
        "kl_prev/approxkl_avg": average["approxkl"],
        "kl_prev/approxkl_last": passes[-1]["approxkl"],
        "ratio_var": average["ratio_square"] - average["ratio"] ** 2,
        **{key: average[key] for key in ("loss", "clipfrac", "ratio", "grad_norm")},
    }


def main(cfg: Config) -> dict:
    check(cfg)
    device = setup(cfg.seed, cfg.device, cfg.rank_timeout)
    coefficients = parse_reward(cfg.reward)
    N = cfg.batch_size // cfg.k  # prompts per update
    meta = read_meta(cfg.data_dir)
    R = cfg.response_tokens or meta["response_tokens"]  # longest response
    total = ceil(cfg.episodes / cfg.batch_size)
    true_reward = gold(cfg.data_dir)  # known in the toy world only
    data = read_prompts(cfg, bool(true_reward))
    valid = read_table(cfg.data_dir, "sft_validation", ["query_token"], cfg.eval_rows)
    out = Run(cfg, total)
    if out.finished:
        return out.earlier_result()

    models = load_models(cfg, device)
    policy, reference = models[:2]
    tokenizer = load_tokenizer(cfg.model, cfg.revision)
    context = policy.config.max_position_embeddings
    uses = [("sft_train", 0, R), ("sft_validation", cfg.eval_rows, R)]
    uses += [("sft_train", 0, 0)] if any(data["references"]) else []
    check_tables(cfg.data_dir, models, *uses)
    policy.gpt_neox.gradient_checkpointing = cfg.gradient_checkpointing
    optimizer = adamw(policy, cfg.lr, eps=cfg.adam_eps, weight_decay=cfg.weight_decay)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    pack_rows = partial(pack, max_positions=context, device=device, max_response=R)
    score = make_score(cfg, models, tokenizer, pack_rows)
    loss_fn = partial(POLICY_LOSSES[cfg.policy_loss], clip=cfg.clip, clip_high=cfg.clip_high)
    learn = partial(policy_gradient, loss_fn=loss_fn, sequences=cfg.batch_size)
    objective = " + ".join(f"{coefficient:g} {name}" for name, coefficient in coefficients.items())
    parameters = sum(p.numel() for p in policy.parameters())
    print(f"{total} updates of {N} prompts x {cfg.k} responses of at most {R} tokens; reward: {objective}; "
          f"{len(data['query_token'])} prompts; {parameters / 1e6:.2f}M parameters on {device}")

    for step in range(out.begin(policy, optimizer, generator), total):
        timer = Timer(device)
        lr = learning_rate(step, total, cfg.lr, cfg.schedule, cfg.warmup)
        set_lr(optimizer, lr)

        # 1. rollout: K responses to each prompt from the current policy
        rows = batch_indices(len(data["query_token"]), N, step, cfg.seed)
        prompts = [data["query_token"][i] for i in rows]
        responses, ended = generate_all(
            policy, prompts, cfg.k, R, batch=cfg.rollout_prompts, temperature=cfg.temperature,
            top_p=cfg.top_p, generator=generator,
        )
        ended = ended.to(device)  # (N, K)
        references = [data["references"][i] for i in rows]
        slices = deal(micro_batches(prompts, responses, cfg.micro_batch_tokens))
        timer.lap("rollout")

        # The policy that scores is the one that sampled: its scoring forward is the first learning forward.
        scored, learnt = [], []
        for s in slices:
            # 2. scoring: reward, and log-probs under policy and reference by a forward, not from sampling
            groups = pack_rows(prompts[s], responses[s])
            mask = groups.response_mask  # (n, K, R)
            raw_scores, reference_scores = score(prompts[s], responses[s], references[s])
            stats = token_stats(policy, groups, cfg.temperature, reference)  # (n, K, R) each
            old_logprobs = stats.logprobs.detach()

            # 3. reward and advantage: constants, the KL and entropy terms included
            scores = missing_eos(raw_scores, ended[s], rule=cfg.missing_eos, penalty=cfg.missing_eos_penalty)
            rewards, terms = rlhf_reward(
                scores, old_logprobs, stats.ref_logprobs, mask, coefficients, cfg.invalid_logprob_fill
            )  # (n, K) each
            advantages = ADVANTAGES[cfg.advantage](rewards)  # (n, K)
            scored.append({
                "ended": ended[s], "mask": mask, "old_logprobs": old_logprobs,
                "ref_logprobs": stats.ref_logprobs, "entropy": stats.entropy.detach(), "kl_full": stats.kl,
                "raw_scores": raw_scores, "scores": scores, "reference_scores": reference_scores,
                "rewards": rewards, "advantages": advantages, **terms,
            })
            timer.lap("scoring")
            learnt.append(learn(stats.logprobs, old_logprobs, advantages, mask))
            timer.lap("update")
        scored = gather(scored, slices)
        batch = {key: torch.cat([part[key] for part in scored]) for key in scored[0]}  # (N, K, ...)
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
        own = deal(micro_batches(some_prompts, some_responses, cfg.micro_batch_tokens))
        updated = whole(policy)
        with torch.no_grad():
            moved = [
                token_stats(updated, pack_rows(some_prompts[s], some_responses[s]), cfg.temperature).logprobs
                for s in own
            ]
        moved = torch.cat(gather(moved, own))  # (N / 4, K, R)
        timer.lap("drift")

        metrics = {
            "episode": (step + 1) * cfg.batch_size,
            **rollout_metrics(batch, coefficients),
            **update_metrics(passes),
            "kl_prev/k1": masked_sum(k1(old_logprobs[quarter], moved), mask[quarter]).mean().item(),
            "kl_prev/k3": masked_sum(k3(old_logprobs[quarter], moved), mask[quarter]).mean().item(),
            "lr": lr,
        }
        if true_reward:
            facts = [data["facts"][i] for i in rows for _ in range(cfg.k)]
            texts = texts_of(tokenizer, responses)
            metrics["gold"] = mean(true_reward(facts, texts, ended.flatten().tolist()))
        if cfg.samples_every and step % cfg.samples_every == 0:
            log_samples(out.out / "samples.jsonl", step + 1, tokenizer, prompts, responses, batch)
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
