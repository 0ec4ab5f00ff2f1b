"""What RLOO maximises: the score, the missing-EOS rule, and terms of KL or entropy beside it.

A reward term is one line on three numbers per response, `f(logprob, ref_logprob, length) -> (N, K)`:
log pi(y|x) and log pi_ref(y|x) in nats per sequence, at the sampling temperature, and |y| in tokens, the
first EOS included. It has no coefficient and no gradient. To add one, write the function and put it in
REWARDS.
"The paper", whose equation numbers these are: "Failure Modes of Maximum Entropy RLHF" (arXiv 2509.20265).
"""

import math

import torch
from torch import Tensor

from rlhf.config import UserError
from rlhf.masked import lengths, seq_logprobs

# --- reward terms


def kl(logprob: Tensor, ref_logprob: Tensor, length: Tensor) -> Tensor:
    """Minus the k1 estimate of KL(pi || pi_ref) per sequence (the paper's 2.1 and 4.1)."""
    return ref_logprob - logprob


def maxent(logprob: Tensor, ref_logprob: Tensor, length: Tensor) -> Tensor:
    """The entropy bonus of eq. 6, per sequence. Longer answers collect more of it."""
    return -logprob


def maxent_length(logprob: Tensor, ref_logprob: Tensor, length: Tensor) -> Tensor:
    """The length-normalised entropy bonus of eq. 7, per token; the one in the paper's experiments."""
    return -logprob / length


def minent_length(logprob: Tensor, ref_logprob: Tensor, length: Tensor) -> Tensor:
    """Minimum entropy (the paper's 4.2.1, which states no formula: eq. 7 with the other sign), per token."""
    return logprob / length


def chi2(logprob: Tensor, ref_logprob: Tensor, length: Tensor) -> Tensor:
    """-(z + log z), z = pi/pi_ref of the sequence: chi^2-RLHF (arXiv 2407.13399), a KL penalty and one on z.

    Its gradient is that of -(E_ref[(z - 1)^2] / 2 + KL(pi || pi_ref)). The exponent is kept within what
    float32 holds.
    """
    log_ratio = logprob - ref_logprob
    return -(log_ratio.clamp(max=20).exp() + log_ratio)


def ref_logprob(logprob: Tensor, ref_logprob: Tensor, length: Tensor) -> Tensor:
    """log pi_ref(y|x): sharpening (arXiv 2412.01951). score:0+ref_logprob:1+kl:b ends at pi_ref^(1 + 1/b)."""
    return ref_logprob


REWARDS = {
    "kl": kl,
    "maxent": maxent,
    "maxent_length": maxent_length,
    "minent_length": minent_length,
    "chi2": chi2,
    "ref_logprob": ref_logprob,
}
ENTROPY_BONUS = ("maxent", "maxent_length")  # terms whose coefficient can follow the entropy: `adapted`
# of a term that is given without one: the KL's in summarize_from_feedback_details (github vwxyzjn), ppo.py
COEFFICIENT = 0.05


def parse_reward(text: str) -> dict[str, float]:
    """"kl:0.05+maxent_length:0.1" -> {"score": 1.0, "kl": 0.05, "maxent_length": 0.1}.

    The score's coefficient is 1 unless "score:0" (or another number) is given; that of a term without a
    number is COEFFICIENT. UserError for an unknown term, one that is named twice, and a bad coefficient.
    """
    coefficients = {"score": 1.0}
    given = set()
    for part in text.split("+"):
        term, colon, number = part.strip().partition(":")
        if term != "score" and term not in REWARDS:
            known = ", ".join(["score", *REWARDS])
            raise UserError(f"--reward={text}: no term {term!r}; known: {known}, "
                            "as in kl:0.05+maxent_length:0.1")
        if term in given:
            raise UserError(f"--reward={text}: names {term!r} twice; change its coefficient instead")
        given.add(term)
        try:
            coefficients[term] = float(number) if colon else 1.0 if term == "score" else COEFFICIENT
        except ValueError:
            coefficients[term] = math.nan
        if not math.isfinite(coefficients[term]):
            raise UserError(f"--reward={text}: {number!r} is no coefficient; it takes a number, "
                            f"as in {term}:0.1")
    return coefficients


def summed(logprobs: Tensor, mask: Tensor, fill: float | None) -> Tensor:
    """(N, K, R) -> (N, K): log pi(y|x) without gradient. `fill`: the sum runs over the padding too, as if it
    held that number.

    fill=1.0 is TRL's INVALID_LOGPROB, and exists for an ablation only. Dividing that sum by |y| adds
    (R - |y|)/|y| to the mean log-prob: under the entropy reward of eq. 7 a hidden penalty of
    beta (R - |y|)/|y| on short answers. The KL term is immune, the fill cancels.
    """
    logprobs = logprobs.detach()
    return seq_logprobs(logprobs, mask) if fill is None else torch.where(mask, logprobs, fill).sum(-1)


def rlhf_reward(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor,
    coefficients: dict[str, float], fill: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """scores (N, K) -> rewards (N, K), and the terms {name: (N, K)} without coefficient, for the log.

    reward = sum over `coefficients` (parse_reward) of coefficient x score or term: the KL-constrained reward
    of 4.1 for "kl", eq. 6 for "maxent", eq. 7 for "maxent_length". No gradient: the log-probs are part of the
    reward, as in TRL. logprobs and ref_logprobs are per token, (N, K, R).
    """
    logprob = summed(logprobs, mask, fill)  # (N, K)
    ref_logprob = summed(ref_logprobs, mask, fill)  # (N, K)
    length = lengths(mask)  # (N, K)
    rewards = coefficients["score"] * scores.detach()  # (N, K)
    terms = {}
    for name, coefficient in coefficients.items():
        if name != "score":
            terms[name] = REWARDS[name](logprob, ref_logprob, length)  # (N, K)
            rewards = rewards + coefficient * terms[name]
    return rewards, terms


def own_terms(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, coefficients: dict[str, float],
) -> Tensor:
    """The terms with their coefficients, (N, K), differentiable: what `rlhf_reward` treats as a constant.

    Climbed beside the reward, their gradient makes that of the objective E[reward] whole. In expectation it
    is 0 for kl and maxent, and for maxent_length that of -coefficient E[1/|y|] (README).
    """
    logprob = seq_logprobs(logprobs, mask)  # (N, K)
    ref_logprob = seq_logprobs(ref_logprobs, mask)  # (N, K)
    terms = [(REWARDS[name], c) for name, c in coefficients.items() if name != "score"]
    return sum(c * term(logprob, ref_logprob, lengths(mask)) for term, c in terms)  # (N, K)


def entropy_bonus(reward: str) -> str | None:
    """The one entropy bonus of --reward; None without one, and with two."""
    found = [name for name in ENTROPY_BONUS if name in parse_reward(reward)]
    return found[0] if len(found) == 1 else None


def adapted(coefficient: float, entropy: float, target: float, rate: float) -> float:
    """The entropy bonus's coefficient at the next update: raised by rate x (target - entropy), at least 0.

    One global coefficient that holds the entropy (nats per token) at a target, as in AER (arXiv 2510.10959);
    without AER's weights by the difficulty of a prompt.
    """
    return max(0.0, coefficient + rate * (target - entropy))


def coefficients_now(reward: str, last: dict, target: float | None, rate: float) -> dict[str, float]:
    """Those of --reward; with a target the entropy bonus's follows from what the last update logged."""
    coefficients = parse_reward(reward)
    if target is not None and last:
        name = entropy_bonus(reward)
        coefficients[name] = adapted(last[f"coefficient/{name}"], last["entropy"], target, rate)
    return coefficients


def missing_eos(scores: Tensor, ended: Tensor, *, rule: str, penalty: float) -> Tensor:
    """Scores (N, K) of the responses that have no EOS (ended (N, K) bool is False), after the rule:

    replace   the score becomes -penalty (summarize_from_feedback_details, and TRL up to 0.10; penalty 1)
    subtract  the score is lowered by penalty (TRL from 0.11; penalty 1)
    none      the score stays
    """
    if rule == "replace":
        return torch.where(ended, scores, -penalty)
    if rule == "subtract":
        return torch.where(ended, scores, scores - penalty)
    if rule == "none":
        return scores
    raise UserError(f"unknown missing-EOS rule {rule!r}; known: replace, subtract, none")
