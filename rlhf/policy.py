"""How a reward is climbed: advantages, the clipped policy loss, and the KL estimators.

To add an advantage, write `f(rewards (N, K)) -> (N, K)` and put it in ADVANTAGES.
Log-probs are per token (N, K, R), in nats, at the sampling temperature.
"""

import torch
from torch import Tensor

from rlhf.config import UserError
from rlhf.masked import masked_sum

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


ADVANTAGES = {"rloo": leave_one_out, "grpo": group_normalized}


# --- policy loss


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped loss with one ratio per SEQUENCE, as in TRL's RLOOTrainer: losses (N, K), and for the log
    {"ratio", "clipfrac"} (N, K).

    rho = exp(log pi(y) - log pi_old(y)), loss = max(-A rho, -A clip(rho, 1 - clip, 1 + clip)). `clipfrac` is
    1 where the clipped branch is the larger one, i.e. where the sequence gives no gradient. At pi = pi_old
    the gradient is that of -A log pi(y). The logged ratio is in float64: a far update makes one of 1e23, and
    its square is beyond float32.
    """
    ratio = masked_sum(logprobs - old_logprobs.detach(), mask).exp()  # (N, K)
    unclipped = -advantages * ratio
    limited = -advantages * ratio.clamp(1 - clip, 1 + clip)
    clipped = limited.detach() > unclipped.detach()
    return torch.maximum(unclipped, limited), {"ratio": ratio.detach().double(), "clipfrac": clipped}


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
