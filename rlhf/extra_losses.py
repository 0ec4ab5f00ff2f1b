"""Losses that read more about the responses than their log-probs.

The signature and its rules are in losses.py, the notation in pair_losses.py. What a loss reads beside
log-probs has None for its default, and may be left out: each loss says what it is then.
"""

import torch
import torch.nn.functional as F

from rlhf.config import UserError
from rlhf.masked import masked_mean, masked_sum, mean_logprobs, seq_logprobs
from rlhf.pair_losses import log1mexp, margin, seq_log_ratios, smoothed


def rrhf(logprobs, _, mask, *, sft_coef=1.0, scores=None):
    """RRHF (arXiv 2304.05302): sum over r_i < r_j of max(0, m_i - m_j), minus sft_coef m_best.

    scores  (N, K) rewards r of the responses; None: their order is the ranking, best first. Equal rewards are
            not compared.
    The NLL is a mean over the response's tokens; the official code divides by the padded length, the text
    sums. At K = 2 the ranking term is the hinge of `slic` with delta 0, on means.
    """
    K = logprobs.shape[1]
    if K < 2:
        raise UserError(f"the loss rrhf ranks at least 2 responses per prompt, got {K}")
    means = mean_logprobs(logprobs, mask)  # (N, K)
    if scores is None:
        scores = -torch.arange(K, device=means.device).expand(means.shape)  # (N, K)
    worse = scores[:, :, None] < scores[:, None, :]  # (N, i, j): i is worse than j
    excess = F.relu(means[:, :, None] - means[:, None, :])  # (N, i, j)
    best = means.gather(1, scores.argmax(1, keepdim=True))[:, 0]  # (N,)
    return torch.where(worse, excess, 0).sum((1, 2)) - sft_coef * best, means.detach()


def osp(logprobs, ref_logprobs, mask, *, beta=0.1, label_smoothing=0.0, labels=None):
    """DPO on soft labels: -s log sigmoid(beta h) - (1 - s) log sigmoid(-beta h).

    Its minimum is beta h = logit(s).
    labels  probability s in [0, 1] that the chosen response is the better one, a number or (N,); None: 1,
            `dpo` with label_smoothing (conservative DPO).
    """
    rewards = beta * seq_log_ratios(logprobs, ref_logprobs, mask)  # (N, 2)
    flipped = 0.0 if labels is None else 1 - labels
    flipped = flipped * (1 - label_smoothing) + (1 - flipped) * label_smoothing
    return smoothed(margin(rewards), flipped), rewards.detach()


def vpo(logprobs, ref_logprobs, mask, *, beta=0.1, alpha=0.1, calibration=None):
    """Offline VPO (arXiv 2405.19320): -log sigmoid(beta h) - alpha beta log(pi/pi_ref)(y_cal).

    calibration  (N,) log(pi/pi_ref) of a calibration response, differentiable; None: the chosen response,
                 which makes it DPO with an SFT term. Offline the sign is pessimistic; online VPO adds the
                 term.
    alpha is [open].
    """
    log_ratios = seq_log_ratios(logprobs, ref_logprobs, mask)  # (N, 2)
    calibration = log_ratios[:, 0] if calibration is None else calibration
    return -F.logsigmoid(beta * margin(log_ratios)) - alpha * beta * calibration, (beta * log_ratios).detach()


def amopo(logprobs, _, mask, *, beta=0.8, gamma=2.0, objectives=None, noise=None):
    """AMoPO (arXiv 2506.07165): `simpo` for each of J objectives, weighted by a softmax over random draws.

    objectives  (N, J) by how much the chosen response is better on each objective: only the sign counts,
                and 0 has no say; None: one objective, which prefers the chosen response. That is `simpo`.
    noise       (N, J, 2) standard normal draws. Per objective and response one draw of a Gaussian with the
                mean and the standard deviation of the response's token probabilities; both draws are added,
                and the softmax is over them. None: no noise, all weights equal.
    No gradient through the weights. The official code takes the softmax over the objectives of the whole
    batch, which divides every gradient by the batch size too, and its loss has no gamma.
    """
    rewards = beta * mean_logprobs(logprobs, mask)  # (N, 2)
    objectives = torch.ones_like(rewards[:, :1]) if objectives is None else objectives
    losses = -F.logsigmoid(objectives.sign() * margin(rewards)[:, None] - gamma)  # (N, J)
    p = torch.where(mask, logprobs.detach(), 0).exp()  # (N, 2, R)
    mean = masked_mean(p, mask)  # (N, 2)
    degrees_of_freedom = (mask.sum(-1) - 1).clamp(min=1)  # (N, 2)
    std = (masked_sum((p - mean[..., None]) ** 2, mask) / degrees_of_freedom).sqrt()  # (N, 2)
    noise = torch.zeros_like(objectives)[..., None].expand(-1, -1, 2) if noise is None else noise
    draws = (mean[:, None] + std[:, None] * noise).sum(-1)  # (N, J)
    has_a_say = objectives != 0  # (N, J)
    weights = draws.masked_fill(~has_a_say, torch.finfo(draws.dtype).min).softmax(-1)  # (N, J)
    return torch.where(has_a_say, weights * losses, 0).sum(-1), rewards.detach()


def cringe(logprobs, _, mask, *, gamma=0.0, alpha=1.0, tau=1.0, top_k=1, competitors=None):
    """Pairwise CRINGE (arXiv 2312.16682): sigmoid((gamma - (w - l)) / tau) (NLL + alpha contrast).

    NLL: of the chosen response, a mean over its tokens.
    contrast: the mean over the rejected tokens of softplus(s_t - s*), s_t the logit of the token and s*
    that of a competitor, one of the top_k predictions other than the token. A difference of logits is one
    of log-probs.

    competitors  (N, R, top_k) log-probs of the top_k predictions other than the token, at every position of
                 the rejected response, differentiable; the softplus is averaged over them with their own
                 probabilities, where the official code draws one: at top_k 1 there is nothing to draw.
                 None: the competitor is everything but the token, s* = log(1 - p_t), and softplus(s_t - s*)
                 = -log(1 - p_t), which is unlikelihood.
    The gate in front opens for pairs whose margin w - l is below gamma (the paper's b), and has no gradient.
    gamma, tau, alpha and whether the gate has a gradient are [open].
    """
    rewards = seq_logprobs(logprobs, mask)  # (N, 2)
    gaps = margin(rewards).detach()  # (N,)
    rejected = torch.where(mask[:, 1], logprobs[:, 1], -1.0)  # (N, R); -1: any number, it is masked below
    if competitors is None:
        contrast = -log1mexp(rejected)  # (N, R)
    else:
        competitors = torch.where(mask[:, 1, :, None], competitors, -1.0)[..., :top_k]  # (N, R, top_k)
        weights = competitors.detach().softmax(-1)  # (N, R, top_k)
        contrast = (weights * F.softplus(rejected[..., None] - competitors)).sum(-1)  # (N, R)
    nll = -mean_logprobs(logprobs[:, 0], mask[:, 0])  # (N,)
    gate = torch.sigmoid((gamma - gaps) / tau)  # (N,)
    return gate * (nll + alpha * masked_mean(contrast, mask[:, 1])), rewards.detach()


def srpo(logprobs, ref_logprobs, mask, *, beta=0.1, alpha=0.5, improved=None):
    """SRPO (arXiv 2406.01660): R = pi/pi_ref, and R' the same of a model that is shown another answer.

        (1 - alpha) (beta [log R'(w|l) - log R'(l|w) + log R(w) - log R(l)] - 1)^2 + alpha times
        the mean over (a, b) = (l, w), (w, l) of (beta [log R'(b|a) - log R'(a|a)] - (P(b > a) - 1/2))^2

    improved  (N, 2, 2) log R'(y_j | x, y_i), answer i shown and answer j given, differentiable; None: the
              shown answer changes nothing, log R'(y_j | x, y_i) = log R(y_j), which leaves `ipo`, scaled.
    P is 1 for the chosen response. alpha, beta and the template that shows the answer are [open].
    """
    log_ratios = seq_log_ratios(logprobs, ref_logprobs, mask)  # (N, 2)
    gaps = margin(log_ratios)
    improved = log_ratios[:, None].expand(-1, 2, -1) if improved is None else improved
    robust = (beta * (improved[:, 1, 0] - improved[:, 0, 1] + gaps) - 1) ** 2  # (N,)
    up = (beta * (improved[:, 1, 0] - improved[:, 1, 1]) - 0.5) ** 2  # the rejected shown, the chosen given
    down = (beta * (improved[:, 0, 1] - improved[:, 0, 0]) + 0.5) ** 2
    return (1 - alpha) * robust + alpha * (up + down) / 2, (beta * log_ratios).detach()
