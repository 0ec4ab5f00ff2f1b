"""How a reward is climbed: advantages, the clipped policy loss, and the KL estimators.

To add an advantage, write `f(rewards (N, K)) -> (N, K)` and put it in ADVANTAGES; likewise POLICY_LOSSES.
Log-probs are per token (N, K, R), in nats, at the sampling temperature.
"""

import torch
from torch import Tensor

from rlhf.config import UserError
from rlhf.masked import masked_mean, masked_sum

# --- advantages


def leave_one_out(rewards: Tensor) -> Tensor:
    """RLOO (arXiv 2402.14740): (N, K) -> (N, K), each reward minus the mean of the others in its group.

    Equals K/(K-1) (r - group mean), and sums to zero.
    """
    K = rewards.shape[1]
    if K < 2:
        raise UserError(f"the leave-one-out baseline needs at least 2 responses per prompt, got {K}")
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (K - 1)


def group_normalized(rewards: Tensor) -> Tensor:
    """GRPO: (N, K) -> (N, K), (r - group mean) / (group std + 1e-4), std with K - 1 below as in TRL."""
    K = rewards.shape[1]
    if K < 2:
        raise UserError(f"the group-normalised advantage needs at least 2 responses per prompt, got {K}")
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


def minus_all_drawn(rewards: Tensor, left_out: Tensor) -> Tensor:
    """Reinforce-Ada (arXiv 2510.04996): the baseline is the mean over all samples drawn for the prompt, of
    which these K were kept; nothing is divided by a deviation. (N, K) -> (N, K).

    left_out  (N, 1) how far that mean of the score is above the mean of the K
    """
    return rewards - rewards.mean(1, keepdim=True) - left_out


ADVANTAGES = {"rloo": leave_one_out, "grpo": group_normalized}


# --- policy losses
#
# f(logprobs, old_logprobs, advantages (N, K), mask, clip, clip_high) -> losses (N, K), and for the log
# {"ratio", "clipfrac"} (N, K). rho is a ratio of new to old probabilities, and
#     loss = max(-A rho, -A clip(rho, 1 - clip, 1 + clip_high))    clip_high: as clip if None
# `clipfrac` is 1 where the clipped branch is the larger one, where there is no gradient. The logged ratio is
# in float64: a far update makes one of 1e23, and its square is beyond float32.


def clipped(ratio: Tensor, advantages: Tensor, clip: float, clip_high: float | None) -> tuple[Tensor, Tensor]:
    """Losses, and whether the clipped branch is the larger one; shapes as the ratio."""
    unclipped = -advantages * ratio
    limited = -advantages * ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    return torch.maximum(unclipped, limited), limited.detach() > unclipped.detach()


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float,
    clip_high: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One ratio per SEQUENCE, as in TRL's RLOOTrainer: rho = exp(log pi(y) - log pi_old(y)).

    At pi = pi_old the gradient is that of -A log pi(y).
    """
    ratio = masked_sum(logprobs - old_logprobs.detach(), mask).exp()  # (N, K)
    losses, is_clipped = clipped(ratio, advantages, clip, clip_high)
    return losses, {"ratio": ratio.detach().double(), "clipfrac": is_clipped}


def gspo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float,
    clip_high: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """GSPO (arXiv 2507.18071): the sequence's ratio to the power of 1/|y|, exp(mean log-ratio of a token).

    Its clip is small: 3e-4 and 4e-4 in the paper. At pi = pi_old the gradient is that of -A log pi(y) / |y|.
    """
    ratio = masked_mean(logprobs - old_logprobs.detach(), mask).exp()  # (N, K)
    losses, is_clipped = clipped(ratio, advantages, clip, clip_high)
    return losses, {"ratio": ratio.detach().double(), "clipfrac": is_clipped}


def clipped_token_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float,
    clip_high: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's loss, one ratio per TOKEN and not summed: losses and what is logged, (N, K, R) each.

    Positions where mask is False hold 0 (a ratio of 1).
    """
    ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0.0).exp()  # (N, K, R)
    losses, is_clipped = clipped(ratio, advantages, clip, clip_high)
    stats = {"ratio": ratio.detach().double(), "clipfrac": is_clipped}
    return torch.where(mask, losses, 0.0), stats


def token_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float,
    clip_high: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One ratio per TOKEN; loss, ratio and clipfrac are means over the response: GRPO (arXiv 2402.03300).

    At pi = pi_old the gradient is that of -A log pi(y) / |y|.
    """
    per_token = advantages[..., None]  # (N, K, 1)
    losses, stats = clipped_token_loss(logprobs, old_logprobs, per_token, mask, clip, clip_high)  # (N, K, R)
    stats = {key: masked_mean(values.double(), mask) for key, values in stats.items()}
    return masked_mean(losses, mask), stats


POLICY_LOSSES = {"sequence": clipped_policy_loss, "token": token_loss, "gspo": gspo_loss}


# --- with a critic (PPO)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation (arXiv 1506.02438), per token: (..., R) -> (..., R), 0 in the padding.

    A_t = sum_{s>=t} (gamma lam)^(s-t) delta_s,  delta_t = reward_t + gamma V_{t+1} - V_t, with V = 0 after
    the last token. lam = 1 and V = 0 give the sum of the rewards to come.
    """
    rewards = torch.where(mask, rewards, 0.0)
    values = torch.where(mask, values, 0.0)
    following = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], dim=-1)  # (..., R)
    deltas = rewards + gamma * following - values  # (..., R), 0 in the padding
    advantages = torch.zeros_like(values)
    last = torch.zeros_like(values[..., 0])
    for t in reversed(range(values.shape[-1])):
        last = deltas[..., t] + gamma * lam * last
        advantages[..., t] = last
    return torch.where(mask, advantages, 0.0)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over all kept positions, (...) -> (...), 0 elsewhere (with 1e-8 under the root,
    as in summarize_from_feedback_details/ppo.py)."""
    kept = values[mask]
    return torch.where(mask, (values - kept.mean()) / (kept.var() + 1e-8).sqrt(), 0.0)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float,
) -> Tensor:
    """Half the squared error of the critic per token, (N, K, R), 0 in the padding: the larger one of V and of
    V clipped to old V +- clip (summarize_from_feedback_details/ppo.py).
    """
    limited = old_values + (values - old_values).clamp(-clip, clip)
    error = torch.maximum((values - returns) ** 2, (limited - returns) ** 2)
    return torch.where(mask, error / 2, 0.0)


# --- KL estimators (Schulman, "Approximating KL divergence")
# Each estimates KL(p || q), in nats, from what was sampled from p: first argument log p, second log q.
# Elementwise: per-token log-probs give per-token estimates, sequence sums per-sequence ones.
# KL(pi || pi_ref) is k1(logprobs, ref_logprobs); KL(pi_old || pi) after an update, on the rollouts of pi_old,
# is k1(old_logprobs, logprobs).


def k1(logp: Tensor, logq: Tensor) -> Tensor:
    """log p - log q: unbiased, of either sign, noisy."""
    return logp - logq


def k2(logp: Tensor, logq: Tensor) -> Tensor:
    """(log p - log q)^2 / 2: never negative, biased; symmetric in p and q.

    Over sequence sums it is TRL's policy/approxkl_avg.
    """
    return (logp - logq) ** 2 / 2


def k3(logp: Tensor, logq: Tensor) -> Tensor:
    """(q/p - 1) - log(q/p): unbiased, never negative. Over sequence sums its exponential has a heavy tail."""
    d = logq - logp
    return torch.expm1(d) - d
