"""REINFORCE leave-one-out with a KL, maximum-entropy or minimum-entropy reward: stage 3, and the paper's experiment (sections 4.1 and 4.2).

    r(x, y) = r_phi(x, y) + kl_coef * KL term + entropy_coef * entropy term                       --reward, rlhf/rewards.py
        kl              -(log pi(y|x) - log pi_ref(y|x))    section 4.1     maxent_length   -(1/|y|) log pi(y|x)   eq. 7
        maxent          -log pi(y|x)                        eq. 6           minent_length   +(1/|y|) log pi(y|x)   section 4.2.1
    A_i     = r_i - mean of the other K-1 rewards of the same prompt                              RLOO, arXiv 2402.14740
    loss    = mean over sequences of max(-A rho, -A clip(rho, 1-eps, 1+eps)),   rho = pi(y|x) / pi_old(y|x), one ratio per sequence (TRL)

Terms combine: --reward=kl+minent_length. Minibatches are made of whole groups (TRL shuffles single completions). Leaves out: a value function.

    CPU, toy world:  python train_rloo.py --data_dir=out/toy/data --model=out/toy/sft --reward_model=out/toy/rm --reward=kl --out_dir=out/toy/rloo --lr=3e-4
                         --k=4 --batch_size=128 --episodes=12800 --ppo_epochs=1 --temperature=1      (half a minute; kl about 1.6; gold up to 0.2, then 0.1)
    GPU, Pythia 1B:  python train_rloo.py --data_dir=out/tldr --model=out/1b/sft --reward_model=out/1b/rm --reward=kl --out_dir=out/1b/rloo   (runs/paper_1b.sh)
"""

import json
from dataclasses import dataclass
from typing import Literal

import torch

from data.toy_world import gold_rewards
from rlhf.common import Run, Timer, adamw, autocast, frozen, learning_rate, optimizer_step, set_lr, setup
from rlhf.config import UserError, run
from rlhf.data import batch_indices, check_context, check_tokenizer, has_column, read_meta, read_table
from rlhf.generate import generate_all
from rlhf.groups import micro_batches, pack
from rlhf.judge import summary_metrics
from rlhf.logprobs import compare_logprobs, compile_kernels, token_logprobs
from rlhf.masked import masked_mean, masked_sum, seq_logprobs
from rlhf.model import EOS, compile_layers
from rlhf.pretrained import from_pretrained, load_tokenizer
from rlhf.rewards import ADVANTAGES, clipped_policy_loss, k1, k2, k3, missing_eos, parse_reward, rlhf_reward


@dataclass(frozen=True, kw_only=True)
class Config:
    # I/O
    data_dir: str  # prepared data (data/tldr.py or data/toy.py)
    model: str  # the SFT model the policy starts from: Hugging Face directory, run directory or hub id
    reward_model: str  # the reward model, of any size with the same tokenizer
    ref_model: str = ""  # what the KL is measured to (default: --model as it was at the start)
    revision: str = "main"  # revision of hub ids
    out_dir: str  # the run: model, metrics.jsonl, checkpoints
    resume: bool = False  # continue the newest checkpoint of out_dir
    overwrite: bool = False  # replace an existing run in out_dir
    # reward
    reward: str = "kl"  # terms joined by '+': kl, maxent (eq. 6), maxent_length (eq. 7), minent_length
    kl_coef: float = 0.05  # coefficient of the term kl
    entropy_coef: float = 0.1  # coefficient of the entropy terms
    missing_eos: Literal["replace", "subtract", "none"] = "replace"  # a response without EOS: its score becomes -penalty (N+), or loses penalty, or stays
    missing_eos_penalty: float = 1.0  # size of that penalty
    invalid_logprob_fill: float | None = None  # ablation: sum padded log-probs as if they held this number (TRL: 1.0) instead of masking them
    # algorithm
    k: int = 2  # responses per prompt, at least 2
    advantage: str = "rloo"  # rloo (leave-one-out) or grpo (divided by the group's standard deviation)
    episodes: int = 1_000_000  # responses sampled in the whole run
    batch_size: int = 512  # responses per update (prompts = batch_size / k)
    ppo_epochs: int = 4  # passes over each batch of responses
    minibatches: int = 1  # optimizer steps per pass
    clip: float = 0.2  # clip range of the sequence ratio
    temperature: float = 0.7  # sampling temperature; all log-probs are taken at it
    top_p: float = 1.0  # nucleus of the sampling (1 = off; log-probs are those of the full distribution)
    response_tokens: int = 0  # longest response (0 = what the data says; 53 for TL;DR)
    # optimization
    lr: float = 1e-6  # peak learning rate
    schedule: Literal["cosine", "linear", "constant"] = "linear"  # down to 0 at the last update
    warmup: float = 0.0  # share of the updates with a rising learning rate
    weight_decay: float = 0.0  # AdamW, on all parameters
    adam_eps: float = 1e-5  # AdamW epsilon
    max_grad_norm: float = 0.0  # clip the gradient to this norm (0 = no clipping, as TRL's RLOO)
    # eval and logging
    eval_rows: int = 256  # validation prompts sampled after the last update
    save_every: int = 100  # updates between two checkpoints (0 = none)
    keep: int = 1  # checkpoints kept (0 = all, for curves over training)
    # system
    seed: int = 1  # prompts and samples
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: bfloat16 on CUDA, float32 on CPU
    compile: bool = False  # torch.compile the models
    micro_batch_tokens: int = 8192  # tokens in one forward and backward; changes memory and speed, not the result
    rollout_prompts: int = 64  # prompts in one generation call
    gradient_checkpointing: bool = False  # recompute activations in the backward: less memory, a third more time


def main(cfg: Config) -> dict:
    device = setup(cfg.seed, cfg.device)
    terms = parse_reward(cfg.reward)
    if cfg.advantage not in ADVANTAGES:
        raise UserError(f"--advantage={cfg.advantage}: known are {', '.join(ADVANTAGES)}")
    if cfg.k < 2:
        raise UserError(f"--k={cfg.k}: the leave-one-out baseline needs at least 2 responses per prompt")
    if not 0 < cfg.top_p <= 1 or cfg.temperature <= 0:
        raise UserError(f"--top_p={cfg.top_p} must be above 0 and at most 1, --temperature={cfg.temperature} above 0")
    if cfg.batch_size % (cfg.k * cfg.minibatches):
        raise UserError(f"--batch_size={cfg.batch_size} is not divisible by k x minibatches = {cfg.k * cfg.minibatches}")
    N, R = cfg.batch_size // cfg.k, cfg.response_tokens or read_meta(cfg.data_dir)["response_tokens"]  # prompts per update, longest response
    total = -(-cfg.episodes // cfg.batch_size)
    knows_gold = has_column(cfg.data_dir, "sft_train", "facts")  # the toy world tells the true reward
    data = read_table(cfg.data_dir, "sft_train", ["query_token"] + ["facts"] * knows_gold)
    valid = read_table(cfg.data_dir, "sft_validation", ["query_token"], cfg.eval_rows)
    out = Run(cfg, total)
    if out.finished:
        return out.earlier_result()

    policy = from_pretrained(cfg.model, revision=cfg.revision, device=device)
    reference = frozen(from_pretrained(cfg.ref_model or cfg.model, revision=cfg.revision, device=device), device, cfg.dtype)
    reward_model = frozen(from_pretrained(cfg.reward_model, revision=cfg.revision, head="score", device=device), device, cfg.dtype)
    tokenizer = load_tokenizer(cfg.model, cfg.revision)
    for model, name in ((policy, cfg.model), (reference, cfg.ref_model or cfg.model), (reward_model, cfg.reward_model)):
        check_tokenizer(cfg.data_dir, load_tokenizer(name, cfg.revision), model.config.vocab_size, name)
    check_context(cfg.data_dir, policy.config.max_position_embeddings, ("sft_train", 0, R), ("sft_validation", cfg.eval_rows, R))
    policy.gpt_neox.gradient_checkpointing = cfg.gradient_checkpointing
    if cfg.compile:
        compile_kernels()
        for model in (policy, reference, reward_model):
            compile_layers(model)
    optimizer = adamw(policy, cfg.lr, eps=cfg.adam_eps, weight_decay=cfg.weight_decay)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    print(f"{total} updates of {N} prompts x {cfg.k} responses of at most {R} tokens; {len(data['query_token'])} prompts; reward: score"
          + "".join(f" + {cfg.kl_coef if t == 'kl' else cfg.entropy_coef} {t}" for t in terms)
          + f"; {sum(p.numel() for p in policy.parameters()) / 1e6:.2f}M parameters on {device}")

    def forward(model, groups):
        """Hidden states that predict the response tokens (M, C), and those of the last tokens (N, K, C)."""
        with autocast(device, cfg.dtype):
            hidden = model(groups.ids, groups.positions, groups.attend)  # (T, C)
        return hidden[groups.predicts], hidden[groups.last]

    def pack_rows(prompts, responses):
        return pack(prompts, responses, max_positions=policy.config.max_position_embeddings, device=device, max_response=R)

    def logprobs_of(groups):
        """Log-prob of each response token under the policy, (N, K, R), at the sampling temperature."""
        with autocast(device, cfg.dtype):
            return groups.unpack(token_logprobs(forward(policy, groups)[0], policy.embed_out.weight, groups.targets, cfg.temperature)[0])

    def policy_gradient(logprobs, old_logprobs, advantages, mask, sequences):
        """Backward of the mean loss over `sequences`; returns the sums over these: loss, clipped, ratio, ratio^2, k2 to the old policy."""
        losses, stats = clipped_policy_loss(logprobs, old_logprobs, advantages, mask, cfg.clip)  # (n, K)
        (losses.sum() / sequences).backward()
        drift = k2(seq_logprobs(old_logprobs, mask), seq_logprobs(logprobs.detach(), mask))  # (n, K)
        return torch.stack([x.sum() for x in (losses.detach(), stats["clipped"], stats["ratio"], stats["ratio"].square(), drift)])

    def apply_gradient(sums, sequences, step):
        means = (sums / sequences).tolist()
        grad_norm = optimizer_step(policy, optimizer, means[0], cfg.max_grad_norm, step)
        return dict(zip(("loss", "clipfrac", "ratio", "ratio_square", "approxkl"), means), grad_norm=grad_norm)

    # With one optimizer step per rollout the forward that scores is the forward that learns: a group's advantages need nothing from other groups.
    one_step = cfg.ppo_epochs * cfg.minibatches == 1

    for step in range(out.begin(policy, optimizer, generator), total):
        timer = Timer(device)
        set_lr(optimizer, lr := learning_rate(step, total, cfg.lr, cfg.schedule, cfg.warmup))

        # 1. rollout: K responses to each prompt from the current policy
        rows = batch_indices(len(data["query_token"]), N, step, cfg.seed)
        prompts = [data["query_token"][i] for i in rows]
        with autocast(device, cfg.dtype):
            responses, ended = generate_all(policy, prompts, cfg.k, R, batch=cfg.rollout_prompts, temperature=cfg.temperature, top_p=cfg.top_p,
                                            generator=generator)
        ended = ended.to(device)
        timer.lap("rollout")

        parts, updates, sums = [], [], torch.zeros(5, dtype=torch.float64, device=device)
        for s in micro_batches(prompts, responses, cfg.micro_batch_tokens):
            # 2. scoring: reward, and log-probs under policy and reference by a forward (not from sampling), log-softmax in float32
            groups = pack_rows(prompts[s], responses[s])
            with torch.no_grad():
                raw_scores = reward_model.scores(forward(reward_model, groups)[1])  # (n, K)
                ref_hidden, _ = forward(reference, groups)
            with torch.set_grad_enabled(one_step), autocast(device, cfg.dtype):
                hidden, _ = forward(policy, groups)
                logprobs, entropy, ref_logprobs, kl_full = map(groups.unpack, compare_logprobs(
                    hidden, policy.embed_out.weight, ref_hidden, reference.embed_out.weight, groups.targets, cfg.temperature))  # each (n, K, R)
            mask, old_logprobs = groups.response_mask, logprobs.detach()

            # 3. reward and advantage: constants, the KL and entropy terms included
            scores = missing_eos(raw_scores, ended[s], rule=cfg.missing_eos, penalty=cfg.missing_eos_penalty)  # (n, K)
            rewards, bonuses = rlhf_reward(scores, old_logprobs, ref_logprobs, mask, terms=terms, kl_coef=cfg.kl_coef,
                                           entropy_coef=cfg.entropy_coef, fill=cfg.invalid_logprob_fill)  # (n, K)
            advantages = ADVANTAGES[cfg.advantage](rewards)  # (n, K)
            parts.append({"mask": mask, "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "entropy": entropy.detach(), "kl_full": kl_full,
                          "raw_scores": raw_scores, "scores": scores, "rewards": rewards, "advantages": advantages, **bonuses})
            timer.lap("scoring")
            if one_step:
                sums += policy_gradient(logprobs, old_logprobs, advantages, mask, N * cfg.k)
                timer.lap("update")
        batch = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}  # (N, K, R) or (N, K)
        mask, old_logprobs = batch["mask"], batch["old_logprobs"]

        # 4. update: one optimizer step, or ppo_epochs passes of `minibatches` steps
        if one_step:
            updates.append(apply_gradient(sums, N * cfg.k, step))
        else:
            for _ in range(cfg.ppo_epochs):
                order = torch.randperm(N, generator=torch.Generator().manual_seed(cfg.seed * 1_000_003 + step * 101 + len(updates))).tolist()
                for start in range(0, N, N // cfg.minibatches):
                    some, sums = order[start : start + N // cfg.minibatches], torch.zeros(5, dtype=torch.float64, device=device)
                    some_prompts, some_responses = [prompts[i] for i in some], [responses[i] for i in some]
                    for s in micro_batches(some_prompts, some_responses, cfg.micro_batch_tokens):
                        n = some[s]
                        logprobs = logprobs_of(pack_rows(some_prompts[s], some_responses[s]))  # (n, K, R)
                        sums += policy_gradient(logprobs, old_logprobs[n], batch["advantages"][n], mask[n], len(some) * cfg.k)
                    updates.append(apply_gradient(sums, len(some) * cfg.k, step))
        timer.lap("update")

        # 5. how far did the update go? log-probs of a quarter of the rollout under the new weights
        quarter = max(1, N // 4)
        with torch.no_grad():
            moved = torch.cat([logprobs_of(pack_rows(prompts[s], responses[s]))
                               for s in micro_batches(prompts[:quarter], responses[:quarter], cfg.micro_batch_tokens)])  # (quarter, K, R)
        old, kept = old_logprobs[:quarter], mask[:quarter]
        timer.lap("drift")

        average = {key: sum(u[key] for u in updates) / len(updates) for key in updates[0]}
        lengths, ref_logprobs = mask.sum(-1).double(), batch["ref_logprobs"]  # (N, K), (N, K, R)
        bonus = {term: batch[term].mean().item() for term in terms}
        metrics = {
            "episode": (step + 1) * cfg.batch_size,
            "scores": batch["scores"].mean().item(),
            "scores_std": batch["scores"].std().item(),
            "raw_scores": batch["raw_scores"].mean().item(),
            "rlhf_reward": batch["rewards"].mean().item(),
            "group_std": batch["rewards"].std(1).mean().item(),
            **{f"bonus/{term}": value for term, value in bonus.items()},
            "entropy_bonus": cfg.entropy_coef * sum(value for term, value in bonus.items() if term != "kl"),
            "kl": masked_sum(k1(old_logprobs, ref_logprobs), mask).mean().item(),
            "kl_k3": masked_sum(k3(old_logprobs, ref_logprobs), mask).mean().item(),
            "kl_full": masked_sum(batch["kl_full"], mask).mean().item(),
            "entropy": masked_mean(batch["entropy"].flatten(), mask.flatten()).item(),
            "surprisal": -masked_mean(old_logprobs.flatten(), mask.flatten()).item(),
            "length_normalized_surprisal": -masked_mean(old_logprobs, mask).mean().item(),
            "kl_prev/approxkl_avg": average["approxkl"],
            "kl_prev/approxkl_last": updates[-1]["approxkl"],
            "kl_prev/k1": masked_sum(k1(old, moved), kept).mean().item(),
            "kl_prev/k3": masked_sum(k3(old, moved), kept).mean().item(),
            "response_length": lengths.mean().item(),
            "eos_share": ended.double().mean().item(),
            "loss": average["loss"],
            "clipfrac": average["clipfrac"],
            "ratio": average["ratio"],
            "ratio_var": average["ratio_square"] - average["ratio"] ** 2,
            "grad_norm": average["grad_norm"],
            "lr": lr,
        }
        if knows_gold:
            texts = tokenizer.decode_batch([[t for t in y if t != EOS] for group in responses for y in group])
            facts = [json.loads(data["facts"][i]) for i in rows for _ in range(cfg.k)]
            metrics["gold"] = sum(gold_rewards(facts, texts, ended.flatten().tolist())) / len(texts)
        tokens, seconds = lengths.sum().item(), timer.seconds
        metrics |= {f"seconds/{phase}": spent for phase, spent in seconds.items()} | {"seconds": sum(seconds.values())}
        metrics |= {f"tokens_per_second/{phase}": passes * tokens / seconds[phase]
                    for phase, passes in (("rollout", 1), ("scoring", 1), ("update", cfg.ppo_epochs))}
        out.log(step + 1, metrics, show=("scores", "gold", "kl", "entropy", "response_length"))
        out.checkpoint(step + 1, policy, tokenizer, optimizer, generator)

    with autocast(device, cfg.dtype):
        samples, ended = generate_all(policy, valid["query_token"], 1, R, batch=cfg.rollout_prompts, progress="greedy samples")
    quality = summary_metrics(cfg.data_dir, "sft_validation", tokenizer, samples, ended)
    last = {key: metrics[key] for key in ("scores", "rlhf_reward", "kl", "entropy")} if total > out.start else {}
    return out.finish(policy, tokenizer, {**last, **quality})


if __name__ == "__main__":
    run(main, Config)
