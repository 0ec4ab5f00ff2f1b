"""Losses of a pair that need nothing but log-probs: of the policy and, some of them, of a reference.

The signature and its rules are in losses.py. In the formulas, with sums over the response tokens:

    w, l        log pi of the chosen and of the rejected response     m_w, m_l    the same divided by |y|
    D_w, D_l    w and l minus the reference's                         h           D_w - D_l

The equation numbers are those of "Failure Modes of Maximum Entropy RLHF" (arXiv 2509.20265), called "the
paper", unless another one is named. "[open]" marks a default that the sources do not settle.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.config import UserError
from rlhf.masked import lengths, mean_logprobs, seq_logprobs


def margin(rewards: Tensor) -> Tensor:
    """Chosen minus rejected: (N, 2) -> (N,). UserError for groups that are no pairs."""
    if rewards.shape[1] != 2:
        got = rewards.shape[1]
        raise UserError(f"this loss compares 2 responses per prompt, got {got}; use simpo_pl for rankings")
    return rewards[:, 0] - rewards[:, 1]


def smoothed(margins: Tensor, label_smoothing: float | Tensor) -> Tensor:
    """-log sigmoid of the margins (N,), with a share `label_smoothing` of the labels taken to be flipped.

    That is conservative DPO, as in eric-mitchell/direct-preference-optimization (trainers.py), called the DPO
    repository below.
    """
    return -F.logsigmoid(margins) * (1 - label_smoothing) - F.logsigmoid(-margins) * label_smoothing


def seq_log_ratios(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """log pi(y|x) - log pi_ref(y|x), (N, K)."""
    return seq_logprobs(logprobs, mask) - seq_logprobs(ref_logprobs, mask)


def mean_log_ratios(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """The same per token, (N, K)."""
    return mean_logprobs(logprobs, mask) - mean_logprobs(ref_logprobs, mask)


# --- against a reference


def ipo_length(logprobs, ref_logprobs, mask, *, beta=0.1):
    """`ipo` with both log-ratios divided by their lengths, as in TRL's DPOTrainer, HALOs and oat.

    TRL has it from the authors: the numbers in their paper are of this form. At 30
    tokens the same beta asks for 30 times the margin that `ipo` asks for.
    """
    log_ratios = mean_log_ratios(logprobs, ref_logprobs, mask)  # (N, 2)
    return (margin(log_ratios) - 1 / (2 * beta)) ** 2, (beta * log_ratios).detach()


def hinge(logprobs, ref_logprobs, mask, *, beta=0.05):
    """max(0, 1 - beta h): RSO's hinge-norm (arXiv 2309.06657, its gamma is beta), TRL's hinge."""
    rewards = beta * seq_log_ratios(logprobs, ref_logprobs, mask)  # (N, 2)
    return F.relu(1 - margin(rewards)), rewards.detach()


def chipo(logprobs, ref_logprobs, mask, *, beta=0.05, r_max=math.inf):
    """chi-PO (arXiv 2407.13399): -log sigmoid(clip(beta [phi(D_w) - phi(D_l)], +-2 r_max)).

    phi(d) = exp(d) + d. The clip is on the margin as in its Algorithm 1; r_max and whether the experiments
    clipped are [open], so the default is no clip. Near d = 0 it is `dpo` at 2 beta. TRL's alpha_divergence is
    exp(d) without the log term, another loss. exp is of a sum over tokens: its exponent is kept within what
    float32 holds.
    """
    log_ratios = seq_log_ratios(logprobs, ref_logprobs, mask)  # (N, 2)
    rewards = (math.log(beta) + log_ratios).clamp(-88, 20).exp() + beta * log_ratios  # (N, 2)
    return -F.logsigmoid(margin(rewards).clamp(-2 * r_max, 2 * r_max)), rewards.detach()


# --- without a reference


def dpo_free(logprobs, _, mask, *, beta=0.1, label_smoothing=0.0):
    """-log sigmoid(beta (w - l)): the paper's C.2, the DPO repository's reference_free."""
    rewards = beta * seq_logprobs(logprobs, mask)  # (N, 2)
    return smoothed(margin(rewards), label_smoothing), rewards.detach()


def cpo(logprobs, _, mask, *, beta=0.1, sft_coef=1.0, label_smoothing=0.0):
    """CPO (arXiv 2401.08417) as its text has it: -log sigmoid(beta (w - l)) - sft_coef w."""
    losses, rewards = dpo_free(logprobs, _, mask, beta=beta, label_smoothing=label_smoothing)
    return losses - sft_coef * seq_logprobs(logprobs, mask)[:, 0], rewards


def cpo_mean(logprobs, _, mask, *, beta=0.1, sft_coef=1.0, label_smoothing=0.0):
    """-log sigmoid(beta (w - l)) - sft_coef m_w: the NLL per token, as in the authors' code and TRL.

    Their mean is over all chosen tokens of the batch, here over those of each pair.
    """
    losses, rewards = dpo_free(logprobs, _, mask, beta=beta, label_smoothing=label_smoothing)
    return losses - sft_coef * mean_logprobs(logprobs, mask)[:, 0], rewards


def slic(logprobs, _, mask, *, delta=1.0, sft_coef=0.1, target=None):
    """SLiC-HF (arXiv 2305.10425): max(0, delta - w + l) - sft_coef log pi(y_target).

    target  (N,) log pi of the summary that SFT learned from, differentiable; None: the hinge alone. HALOs
            puts the chosen response there.
    """
    rewards = seq_logprobs(logprobs, mask)  # (N, 2)
    losses = F.relu(delta - margin(rewards))
    return losses if target is None else losses - sft_coef * target, rewards.detach()


def alphapo(logprobs, _, mask, *, beta=2.5, alpha=0.25, gamma=0.25):
    """AlphaPO (arXiv 2501.03884): -log sigmoid(r_w - r_l - gamma), r = beta (1 - exp(-alpha m)) / alpha.

    Means only: with sums exp overflows. alpha = 0 is `simpo`.
    """
    means = mean_logprobs(logprobs, mask)  # (N, 2)
    rewards = beta * (means if alpha == 0 else -torch.expm1(-alpha * means) / alpha)  # (N, 2)
    return -F.logsigmoid(margin(rewards) - gamma), rewards.detach()


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, without cancellation; -inf at 0."""
    near_zero = x > -math.log(2)
    near = torch.where(near_zero, x, -1.0)  # each branch sees only its own numbers: no nan in the gradient
    far = torch.where(near_zero, -1.0, x)
    return torch.where(near_zero, (-torch.expm1(near)).log(), torch.log1p(-far.exp()))


def orpo(logprobs, _, mask, *, alpha=0.1, sft_coef=1.0):
    """ORPO (arXiv 2403.07691): -sft_coef m_w - alpha log sigmoid(odds(m_w) - odds(m_l)).

    odds(m) = m - log(1 - exp m), of averages: of a sum, 1 - p is 1 and the odds are the probability. alpha is
    the repository's --alpha, TRL's beta, the text's lambda. The official NLL includes the prompt's tokens,
    this one does not. Where a mean is exactly 0 its odds are infinite; it is moved to -1e-7.
    """
    means = mean_logprobs(logprobs, mask).clamp(max=-1e-7)  # (N, 2)
    log_odds = means - log1mexp(means)  # (N, 2)
    losses = -sft_coef * means[:, 0] - alpha * F.logsigmoid(margin(log_odds))
    return losses, (alpha * log_odds).detach()


def confpo(logprobs, _, mask, *, beta=1.5, gamma=1.6):
    """ConfPO (arXiv 2506.08712): `simpo` on means over the tokens that the policy is less sure of than usual.

    A token counts if log p < log(mean_t p_t): the arithmetic mean of the response's probabilities, not of its
    log-probs. The choice carries no gradient; a pair of which a side keeps no token has loss 0.
    """
    p = torch.where(mask, logprobs.detach(), -math.inf)  # (N, 2, R)
    average = p.logsumexp(-1) - lengths(mask).log()  # (N, 2)
    # rounding must not choose among tokens of equal probability
    bound = average - 1e-6 * average.abs().clamp(min=1)  # (N, 2)
    unsure = mask & (p < bound[..., None])  # (N, 2, R)
    rewards = beta * mean_logprobs(logprobs, unsure)  # (N, 2)
    losses = -F.logsigmoid(margin(rewards) - gamma)
    return torch.where(unsure.any(-1).all(-1), losses, 0), rewards.detach()


# --- target margins that the batch decides


def dynamic_margins(gaps: Tensor, gamma: float, tau: float) -> Tensor:
    """gamma-PO's target margins (N,) of pairs with these reward gaps r (N,): larger for the larger gaps.

    gamma_i = N gamma p_i, where p minimises mean_i -log sigmoid(r_i - gamma_i) + tau KL(p || uniform), by 20
    steps of mirror descent as in the official code (sunjie279/gammaPO). Their mean is gamma. No gradient.
    """
    gaps = gaps.detach()
    N = len(gaps)
    rate = min(0.5 / tau, 1)
    log_p = torch.full_like(gaps, -math.log(N))  # (N,)
    for _ in range(20):
        margins = N * gamma * log_p.exp()  # (N,)
        gradient = tau * (1 + math.log(N) + log_p) + gamma * torch.sigmoid(margins - gaps)
        log_p = (log_p - rate * gradient).log_softmax(0)
    return margins


def gammapo(logprobs, _, mask, *, beta=10.0, gamma=4.0, tau=10.0, target_margins=None):
    """gamma-PO on SimPO (arXiv 2506.03690): -log sigmoid(beta (m_w - m_l) - gamma_i).

    target_margins  (N,) gamma_i of these pairs; None: decided among the pairs of this call. The official
                    code adds up to 256 earlier reward gaps, drawn from the last 2048.
    beta, gamma and tau: its Llama-3 run. tau -> inf is `simpo`.
    """
    rewards = beta * mean_logprobs(logprobs, mask)  # (N, 2)
    gaps = margin(rewards)
    target_margins = dynamic_margins(gaps, gamma, tau) if target_margins is None else target_margins
    return -F.logsigmoid(gaps - target_margins), rewards.detach()


def gammapo_dpo(logprobs, ref_logprobs, mask, *, beta=0.1, gamma=4.0, tau=10.0, target_margins=None):
    """gamma-PO on DPO: -log sigmoid(beta h - (gamma_i - gamma)): here the margins have mean 0.

    tau -> inf is `dpo`. beta, gamma and tau of this form are [open].
    """
    rewards = beta * seq_log_ratios(logprobs, ref_logprobs, mask)  # (N, 2)
    gaps = margin(rewards)
    target_margins = dynamic_margins(gaps, gamma, tau) if target_margins is None else target_margins
    return -F.logsigmoid(gaps - (target_margins - gamma)), rewards.detach()
