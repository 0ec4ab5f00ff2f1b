"""What RLOO maximises: score -> missing-EOS rule -> KL or entropy terms -> advantages -> clipped policy loss; and the KL estimators.

A reward term is `f(logprobs, ref_logprobs, mask, fill=None) -> (N, K)`: one number per sequence, without coefficient and without gradient.
To add one, write the function and put it in REWARDS; an advantage goes into ADVANTAGES the same way.
Log-probs are per token (N, K, R), in nats, at the sampling temperature; |y| counts the response tokens up to and including the first EOS.
The equation numbers are those of "Failure Modes of Maximum Entropy RLHF" (arXiv 2509.20265), called "the paper".
"""

import torch
from torch import Tensor

from rlhf.config import UserError
from rlhf.masked import lengths, masked_sum, seq_logprobs

# --- reward terms


def summed(logprobs: Tensor, mask: Tensor, fill: float | None) -> Tensor:
    """(N, K, R) -> (N, K): log pi(y|x) without gradient. With `fill`, the sum runs over the padding too, as if it held that number.

    fill=1.0 is TRL's INVALID_LOGPROB, and exists for an ablation only. Dividing that sum by |y| adds (R - |y|)/|y| to the mean log-prob:
    under the entropy reward of eq. 7 a hidden penalty of beta (R - |y|)/|y| on short answers. The KL term is immune, the fill cancels.
    """
    logprobs = logprobs.detach()
    return seq_logprobs(logprobs, mask) if fill is None else torch.where(mask, logprobs, fill).sum(-1)


def kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, fill: float | None = None) -> Tensor:
    """-(log pi(y|x) - log pi_ref(y|x)): minus the k1 estimate of KL(pi || pi_ref) per sequence (the paper's 2.1 and 4.1)."""
    return -k1(summed(logprobs, mask, fill), summed(ref_logprobs, mask, fill))


def maxent(logprobs: Tensor, ref_logprobs: Tensor | None, mask: Tensor, fill: float | None = None) -> Tensor:
    """-log pi(y|x): the entropy bonus of eq. 6, per sequence. Longer answers collect more of it."""
    return -summed(logprobs, mask, fill)


def maxent_length(logprobs: Tensor, ref_logprobs: Tensor | None, mask: Tensor, fill: float | None = None) -> Tensor:
    """-(1/|y|) log pi(y|x): the length-normalised entropy bonus of eq. 7, per token; the one in the paper's experiments."""
    return -summed(logprobs, mask, fill) / lengths(mask)


def minent_length(logprobs: Tensor, ref_logprobs: Tensor | None, mask: Tensor, fill: float | None = None) -> Tensor:
    """+(1/|y|) log pi(y|x): minimum entropy (the paper's 4.2.1, which states no formula: eq. 7 with the sign turned)."""
    return summed(logprobs, mask, fill) / lengths(mask)


REWARDS = {"kl": kl, "maxent": maxent, "maxent_length": maxent_length, "minent_length": minent_length}


def parse_reward(name: str) -> list[str]:
    """"kl+minent_length" -> ["kl", "minent_length"]; UserError for a term that REWARDS does not know or that is named twice."""
    terms = name.split("+")
    for term in terms:
        if term not in REWARDS:
            raise UserError(f"unknown reward term {term!r} in {name!r}; known: {', '.join(REWARDS)}, joined by '+'")
        if terms.count(term) > 1:
            raise UserError(f"the reward {name!r} names {term!r} twice; change its coefficient instead")
    return terms


def rlhf_reward(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor | None, mask: Tensor, *, terms: list[str],
                kl_coef: float, entropy_coef: float, fill: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """scores (N, K) -> rewards (N, K) and the terms {name: (N, K)} without coefficient, so that a run with coefficient 0 has curves too.

    reward = score + kl_coef * kl + entropy_coef * (any other term): eq. 6 for ["maxent"], eq. 7 for ["maxent_length"], the KL-constrained
    reward of 4.1 for ["kl"]. No gradient: the log-probs are part of the reward, as in TRL. `ref_logprobs` is read by "kl" only.
    """
    bonuses = {term: REWARDS[term](logprobs, ref_logprobs, mask, fill) for term in terms}
    rewards = scores.detach()
    for term, bonus in bonuses.items():
        rewards = rewards + (kl_coef if term == "kl" else entropy_coef) * bonus  # (N, K)
    return rewards, bonuses


def missing_eos(scores: Tensor, ended: Tensor, *, rule: str, penalty: float) -> Tensor:
    """Scores (N, K) of the responses that have no EOS (ended (N, K) bool is False), after the rule:

    "replace": the score becomes -penalty (N+ and TRL up to 0.10, penalty 1); "subtract": the score is lowered by penalty (TRL from 0.11,
    penalty 1); "none": the score stays.
    """
    if rule == "replace":
        return torch.where(ended, scores, -penalty)
    if rule == "subtract":
        return torch.where(ended, scores, scores - penalty)
    if rule == "none":
        return scores
    raise UserError(f"unknown missing-EOS rule {rule!r}; known: replace, subtract, none")


# --- advantages


def leave_one_out(rewards: Tensor) -> Tensor:
    """RLOO: (N, K) -> (N, K), each reward minus the mean of the others in its group; equals K/(K-1) (r - group mean), and sums to zero."""
    K = rewards.shape[1]
    if K < 2:
        raise UserError(f"the leave-one-out baseline needs at least 2 responses per prompt, got {K}")
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (K - 1)


def group_normalized(rewards: Tensor) -> Tensor:
    """GRPO: (N, K) -> (N, K), (r - group mean) / (group std + 1e-4), std with K - 1 in the denominator as in TRL."""
    if rewards.shape[1] < 2:
        raise UserError(f"the group-normalised advantage needs at least 2 responses per prompt, got {rewards.shape[1]}")
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


ADVANTAGES = {"rloo": leave_one_out, "grpo": group_normalized}


# --- policy loss


def clipped_policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
                        clip: float) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped loss with one ratio per SEQUENCE, as in TRL's RLOOTrainer: losses (N, K); {"ratio", "clipped"} (N, K) for the log.

    rho = exp(log pi(y) - log pi_old(y)), loss = max(-A rho, -A clip(rho, 1 - clip, 1 + clip)). `clipped` is True where the clipped branch
    is the larger one, i.e. where the sequence gives no gradient. At pi = pi_old the gradient is that of -A log pi(y).
    The logged ratio is in float64: a far update makes one of 1e23, and its square is beyond float32.
    """
    ratio = masked_sum(logprobs - old_logprobs.detach(), mask).exp()  # (N, K)
    unclipped = -advantages * ratio
    limited = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(unclipped, limited), {"ratio": ratio.detach().double(), "clipped": limited.detach() > unclipped.detach()}


# --- KL estimators (Schulman, "Approximating KL divergence")
# Each estimates KL(p || q), in nats, from what was sampled from p: first argument log p, second log q. Elementwise, so per-token log-probs
# give per-token and sequence sums per-sequence estimates. KL(pi || pi_ref) is k1(logprobs, ref_logprobs); KL(pi_old || pi) after an
# update, on the rollouts of pi_old, is k1(old_logprobs, logprobs).


def k1(logp: Tensor, logq: Tensor) -> Tensor:
    """log p - log q: unbiased, of either sign, noisy."""
    return logp - logq


def k2(logp: Tensor, logq: Tensor) -> Tensor:
    """(log p - log q)^2 / 2: never negative, biased; symmetric in p and q. Over sequence sums it is TRL's policy/approxkl_avg."""
    return (logp - logq) ** 2 / 2


def k3(logp: Tensor, logq: Tensor) -> Tensor:
    """(q/p - 1) - log(q/p): unbiased and never negative. Over sequence sums the exponential has a heavy tail."""
    d = logq - logp
    return torch.expm1(d) - d
