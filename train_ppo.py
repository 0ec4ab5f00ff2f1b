r"""PPO with a critic: the algorithm that RLOO does without, for the same budget.

    reward_t = -kl_coef (log pi(y_t) - log pi_ref(y_t)), and the reward model's score at the last token
    A_t      = GAE(reward, V; gamma, lam), whitened over the batch              arXiv 1506.02438
    loss     = mean over tokens of max(-A rho, -A clip(rho, 1-eps, 1+eps)) + vf_coef x value loss
               rho = pi(y_t) / pi_old(y_t) per token; value loss clipped to V_old +- value_clip

The recipe is summarize_from_feedback_details/ppo.py (github vwxyzjn; arXiv 2403.17031): the critic is a model
of the reward model's size and starts from it; four passes; the score of a response without EOS is -1. There
the score arrives one position after the EOS, here at it. The saved model is the policy alone; a checkpoint
holds the critic too.
CPU, toy world:
    python train_ppo.py --data_dir=out/toy/data --model=out/toy/sft --reward_model=out/toy/rm \
        --out_dir=out/toy/ppo --kl_coef=0.1 --lr=1e-4 --schedule=constant --batch_size=64 --episodes=6400 \
        --ppo_epochs=1
GPU, Pythia 1B: the same with out/tldr, out/1b/sft, out/1b/rm and the defaults
"""

from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Literal

import torch
from torch import Tensor, nn

from data.gold import gold
from rlhf.common import Timer, adamw, frozen, learning_rate, load_model, optimizer_step, set_lr, setup
from rlhf.config import UserError, check_ranges, command_line
from rlhf.data import batch_indices, check_tables, read_meta, read_table
from rlhf.dist import deal, gather
from rlhf.forward import response_scores, token_stats, token_values
from rlhf.generate import generate_all
from rlhf.groups import Groups, micro_batches, pack
from rlhf.masked import masked_mean, masked_sum
from rlhf.memory import dry_run
from rlhf.metrics import sample_metrics
from rlhf.model import NeoX
from rlhf.policy import clipped_token_loss, clipped_value_loss, gae, k1, k2, whiten
from rlhf.pretrained import load_tokenizer
from rlhf.rewards import missing_eos
from rlhf.run import Run
from rlhf.summaries import mean, summary_metrics, texts_of


@dataclass(frozen=True, kw_only=True)
class Config:
    # I/O
    data_dir: str  # prepared data (data/tldr.py or data/toy.py)
    model: str  # the SFT model the policy starts from: Hugging Face directory, run directory or hub id
    reward_model: str  # the reward model, and what the critic starts from
    ref_model: str = ""  # what the KL is measured to (default: --model as it was at the start)
    revision: str = "main"  # revision of hub ids
    out_dir: str  # the run: model, metrics.jsonl, checkpoints
    resume: bool = False  # continue the newest checkpoint of out_dir
    overwrite: bool = False  # replace an existing run in out_dir
    # reward
    kl_coef: float = 0.05  # coefficient of the KL, token by token
    missing_eos: Literal["replace", "subtract", "none"] = "replace"
    #   the score of a response without EOS becomes -penalty, or loses penalty, or stays
    missing_eos_penalty: float = 1.0  # size of that penalty
    # algorithm
    k: int = 1  # responses per prompt
    episodes: int = 1_000_000  # responses sampled in the whole run
    batch_size: int = 512  # responses per update (prompts = batch_size / k)
    ppo_epochs: int = 4  # passes over each batch of responses, one optimizer step each
    clip: float = 0.2  # clip range of the token ratio
    value_clip: float = 0.2  # clip range of the values
    vf_coef: float = 0.1  # weight of the value loss
    gamma: float = 1.0  # discount per token
    lam: float = 0.95  # lambda of GAE
    temperature: float = 0.7  # sampling temperature; all log-probs are taken at it
    response_tokens: int = 0  # longest response (0 = what the data says; 53 for TL;DR)
    # optimization
    lr: float = 3e-6  # peak learning rate of policy and critic
    schedule: Literal["cosine", "linear", "constant"] = "linear"  # after warm-up; would be 0 one update later
    warmup: float = 0.0  # share of the updates with a rising learning rate
    weight_decay: float = 0.0  # AdamW, on all parameters
    adam_eps: float = 1e-5  # AdamW epsilon
    max_grad_norm: float = 0.0  # clip the gradient of policy and critic to this norm (0 = no clipping)
    # eval and logging
    eval_rows: int = 256  # validation prompts sampled after the last update
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


def check(cfg: Config) -> None:
    check_ranges(cfg)
    if cfg.temperature <= 0:
        raise UserError(f"--temperature={cfg.temperature} must be above 0")
    if cfg.batch_size % cfg.k:
        raise UserError(f"--batch_size={cfg.batch_size} is not divisible by --k={cfg.k}")


def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float,
) -> Tensor:
    """(N, K, R): minus the KL term at every token, and the score (N, K) at the last one."""
    rewards = torch.where(mask, -kl_coef * k1(logprobs, ref_logprobs), 0.0)  # (N, K, R)
    last = mask.sum(-1, keepdim=True) - 1  # (N, K, 1)
    return rewards.scatter_add(-1, last, scores[..., None])


@torch.no_grad()
def score(
    groups: Groups, ended: Tensor, policy: NeoX, critic: NeoX, reference: NeoX, reward_model: NeoX,
    cfg: Config,
) -> dict[str, Tensor]:
    """What is known of n prompts with K responses before the update: (n, K) or, per token, (n, K, R) each."""
    mask = groups.response_mask  # (n, K, R)
    raw_scores = response_scores(reward_model, groups)  # (n, K)
    scores = missing_eos(raw_scores, ended, rule=cfg.missing_eos, penalty=cfg.missing_eos_penalty)
    values = token_values(critic, groups)  # (n, K, R)
    stats = token_stats(policy, groups, cfg.temperature, reference)  # (n, K, R) each
    rewards = token_rewards(scores, stats.logprobs, stats.ref_logprobs, mask, cfg.kl_coef)  # (n, K, R)
    advantages = gae(rewards, values, mask, cfg.gamma, cfg.lam)  # (n, K, R)
    return {
        "ended": ended, "mask": mask, "raw_scores": raw_scores, "scores": scores, "rewards": rewards,
        "advantages": advantages, "old_values": values, "returns": advantages + values,
        "old_logprobs": stats.logprobs, "ref_logprobs": stats.ref_logprobs, "entropy": stats.entropy,
        "kl_full": stats.kl,
    }


def learn(
    groups: Groups, scored: dict[str, Tensor], policy: NeoX, critic: NeoX, tokens: int, cfg: Config,
) -> dict[str, Tensor]:
    """Backward of the mean loss over the `tokens` of the whole batch; sums over these groups, for the log."""
    mask, old_logprobs = scored["mask"], scored["old_logprobs"]
    logprobs = token_stats(policy, groups, cfg.temperature).logprobs  # (n, K, R)
    values = token_values(critic, groups)  # (n, K, R)
    losses, stats = clipped_token_loss(
        logprobs, old_logprobs, scored["whitened"], mask, cfg.clip
    )  # (n, K, R)
    value_losses = clipped_value_loss(
        values, scored["old_values"], scored["returns"], mask, cfg.value_clip
    )  # (n, K, R)
    ((losses.sum() + cfg.vf_coef * value_losses.sum()) / tokens).backward()
    stats |= {"loss": losses, "value_loss": value_losses, "approxkl": k2(old_logprobs, logprobs)}
    return {key: value.detach()[mask].double().sum() for key, value in stats.items()}


def critic_metrics(batch: dict[str, Tensor]) -> dict[str, float]:
    """What is logged of rewards and values, beside what every script logs of its samples."""
    mask, returns, values = batch["mask"], batch["returns"], batch["old_values"]
    unexplained = (returns - values)[mask].var() / returns[mask].var()
    return {
        "rlhf_reward": masked_sum(batch["rewards"], mask).mean().item(),
        "values": masked_mean(values.flatten(), mask.flatten()).item(),
        "explained_variance": 1 - unexplained.item(),
    }


def load_models(cfg: Config, device: torch.device) -> list[NeoX]:
    """Policy, critic, reference, reward model."""
    load = partial(
        load_model, data_dir=cfg.data_dir, revision=cfg.revision, device=device, dtype=cfg.dtype,
        compiled=cfg.compile, sharded=True,
    )
    policy, critic = load(cfg.model), load(cfg.reward_model, head="score")
    for model in (policy, critic):
        model.gpt_neox.gradient_checkpointing = cfg.gradient_checkpointing
    reference = frozen(load(cfg.ref_model or cfg.model))
    return [policy, critic, reference, frozen(load(cfg.reward_model, head="score"))]


def main(cfg: Config) -> dict:
    check(cfg)
    if cfg.dry_run:
        learning = {"policy": cfg.model, "critic": cfg.reward_model}
        held = {"reference": cfg.ref_model or cfg.model, "reward model": cfg.reward_model}
        return dry_run(cfg, learning, held, table="sft_train", prompts=cfg.rollout_prompts, k=cfg.k)
    device = setup(cfg.seed, cfg.device, cfg.plain, cfg.rank_timeout)
    N = cfg.batch_size // cfg.k  # prompts per update
    meta = read_meta(cfg.data_dir)
    R = cfg.response_tokens or meta["response_tokens"]  # longest response
    total = ceil(cfg.episodes / cfg.batch_size)
    true_reward = gold(cfg.data_dir)  # known in the toy world only
    columns = ["query_token", "facts"] if true_reward else ["query_token"]
    data = read_table(cfg.data_dir, "sft_train", columns)
    valid = read_table(cfg.data_dir, "sft_validation", ["query_token"], cfg.eval_rows)
    out = Run(cfg, total)
    if out.finished:
        return out.earlier_result()

    models = load_models(cfg, device)
    policy, critic, reference, reward_model = models
    learners = nn.ModuleList([policy, critic])
    tokenizer = load_tokenizer(cfg.model, cfg.revision)
    context = min(model.config.max_position_embeddings for model in models)
    check_tables(cfg.data_dir, models, ("sft_train", 0, R), ("sft_validation", cfg.eval_rows, R))
    optimizer = adamw(learners, cfg.lr, eps=cfg.adam_eps, weight_decay=cfg.weight_decay)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    pack_rows = partial(pack, max_positions=context, device=device, max_response=R)
    parameters = sum(p.numel() for p in policy.parameters())
    print(f"{total} updates of {N} prompts x {cfg.k} responses of at most {R} tokens; "
          f"{len(data['query_token'])} prompts; {parameters / 1e6:.2f}M parameters on {device}")

    for step in range(out.begin(policy, optimizer, generator, critic=critic), total):
        timer = Timer(device)
        lr = learning_rate(step, total, cfg.lr, cfg.schedule, cfg.warmup)
        set_lr(optimizer, lr)

        # 1. rollout: K responses to each prompt from the current policy
        rows = batch_indices(len(data["query_token"]), N, step, cfg.seed)
        prompts = [data["query_token"][i] for i in rows]
        responses, ended = generate_all(
            policy, prompts, cfg.k, R, batch=cfg.rollout_prompts, temperature=cfg.temperature,
            generator=generator,
        )
        ended = ended.to(device)  # (N, K)
        slices = deal(micro_batches(prompts, responses, cfg.micro_batch_tokens))
        timer.lap("rollout")

        # 2. scoring: reward, values, log-probs under policy and reference; advantages
        groups = [pack_rows(prompts[s], responses[s]) for s in slices]
        scored = [
            score(g, ended[s], policy, critic, reference, reward_model, cfg) for g, s in zip(groups, slices)
        ]
        scored = gather(scored, slices)
        batch = {key: torch.cat([part[key] for part in scored]) for key in scored[0]}  # (N, K, ...)
        batch["whitened"] = whiten(batch["advantages"], batch["mask"])  # (N, K, R)
        tokens = batch["mask"].sum().item()
        timer.lap("scoring")

        # 3. update: ppo_epochs passes, one optimizer step each
        passes = []
        for _ in range(cfg.ppo_epochs):
            parts = []
            for g, s in zip(groups, slices):
                own = {key: values[s] for key, values in batch.items()}
                parts.append(learn(g, own, policy, critic, tokens, cfg))
            parts = gather(parts, slices)
            means = {key: sum(part[key].item() for part in parts) / tokens for key in parts[0]}
            means["grad_norm"] = optimizer_step(learners, optimizer, means["loss"], cfg.max_grad_norm, step)
            passes.append(means)
        timer.lap("update")

        if true_reward:
            facts = [data["facts"][i] for i in rows for _ in range(cfg.k)]
            truth = true_reward(facts, texts_of(tokenizer, responses), ended.flatten().tolist())
            batch["gold"] = torch.tensor(truth).view(N, cfg.k)
        metrics = {"episode": (step + 1) * cfg.batch_size, **sample_metrics(batch), **critic_metrics(batch)}
        metrics |= {"lr": lr} | {key: mean([p[key] for p in passes]) for key in passes[0]}
        metrics |= timer.metrics(tokens=tokens, rollout=1, scoring=1, update=cfg.ppo_epochs)
        out.log(step + 1, metrics, show=("scores", "gold", "kl", "values", "response_length"))
        out.checkpoint(step + 1, policy, tokenizer, optimizer, generator, critic=critic)

    greedy, ended = generate_all(
        policy, valid["query_token"], 1, R, batch=cfg.rollout_prompts, progress="greedy samples"
    )
    result = summary_metrics(cfg.data_dir, "sft_validation", tokenizer, greedy, ended, true_reward)
    result |= {key: out.last.get(key) for key in ("scores", "rlhf_reward", "kl", "entropy")}
    return out.finish(policy, tokenizer, result)


if __name__ == "__main__":
    command_line(main, Config)
