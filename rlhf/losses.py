"""Losses on given responses, as pure functions of per-token log-probs: Bradley-Terry, DPO, SimPO, others.

The preference losses share one signature, so that a script (and an ablation) can swap them:

    loss(logprobs, ref_logprobs, mask, *, options, extras) -> losses (N,), rewards (N, K)

logprobs, ref_logprobs, mask are (N, K, R); response 0 is the chosen one, response 1 the rejected one; of a
ranking the responses come best first. `losses` is not reduced: the caller means over prompts. `rewards` are
the loss's own implicit rewards, detached: margins and accuracies are differences and comparisons of these.

The signature is the whole truth about a loss, and the scripts read it:
- A loss that reads no reference calls its second argument `_`, and gets None for it.
- Its options are keyword-only, each a number with its paper's default.
- What else it reads of a pair is an extra: keyword-only, with None for its default.
To add a loss, write such a function here and put it in PREFERENCE_LOSSES (RANKED too if it takes more than
two). Here are the losses that the paper is about; those beside it are in pair_losses.py and extra_losses.py.
The equation numbers are those of "Failure Modes of Maximum Entropy RLHF" (arXiv 2509.20265), called "the
paper".
"""

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.config import UserError
from rlhf.extra_losses import amopo, cringe, osp, rrhf, srpo, vpo
from rlhf.masked import mean_logprobs, seq_logprobs
from rlhf.pair_losses import (
    alphapo,
    chipo,
    confpo,
    cpo,
    cpo_mean,
    dpo_free,
    gammapo,
    gammapo_dpo,
    hinge,
    ipo_length,
    margin,
    orpo,
    slic,
    smoothed,
)


def bradley_terry_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Reward model: (N,), (N,) -> (N,), -log p(chosen > rejected) = -log sigmoid(r_w - r_l) (eq. 1)."""
    return -F.logsigmoid(chosen_scores - rejected_scores)


def dpo(logprobs, ref_logprobs, mask, *, beta=0.05, label_smoothing=0.0):
    """-log sigmoid(beta h), h = log(pi/pi_ref)(y_w) - log(pi/pi_ref)(y_l), sums over tokens (2.2).

    As in the DPO repository (trainers.py). With ref_logprobs = 0 it is the paper's C.2, SimPO without length
    normalisation and margin. beta: vwxyzjn/summarize_from_feedback_details, dpo.py.
    """
    rewards = beta * (seq_logprobs(logprobs, mask) - seq_logprobs(ref_logprobs, mask))  # (N, 2)
    return smoothed(margin(rewards), label_smoothing), rewards.detach()


def simpo(logprobs, _, mask, *, beta=2.0, gamma=0.5, label_smoothing=0.0):
    """-log sigmoid(beta (m_w - m_l) - gamma), m = (1/|y|) log pi(y): the paper's loss at the end of 3.2.

    Its alpha is beta here. gamma is absolute, in nats of reward, as in the paper and in TRL (simpo_gamma);
    the SimPO repository's gamma_beta_ratio is gamma / beta.
    """
    rewards = beta * mean_logprobs(logprobs, mask)  # (N, 2)
    return smoothed(margin(rewards) - gamma, label_smoothing), rewards.detach()


def simpo_pl(logprobs, _, mask, *, beta=2.0, gamma=0.5):
    """SimPO on K >= 2 ranked responses, best first: -log p(ranking) under Plackett-Luce, with s = beta m.

        sum_k  log( exp(s_k - gamma) + sum_{j>k} exp(s_j) ) - (s_k - gamma)    eq. 12 and the loss after it

    The paper gives no margin for rankings. A ranking is K - 1 choices, each of one winner among the
    competitors that are left; here the winner's term is lowered by gamma in its own choice, and nowhere else,
    so it has to beat every later competitor by gamma. At K = 2 this is -log sigmoid(s_1 - s_2 - gamma), which
    is `simpo`. With gamma = 0 the probabilities of all K! rankings sum to one.
    """
    K = logprobs.shape[1]
    if K < 2:
        raise UserError(f"the loss simpo_pl ranks at least 2 responses per prompt, got {K}")
    rewards = beta * mean_logprobs(logprobs, mask)  # (N, K)
    own = torch.eye(K, dtype=rewards.dtype, device=rewards.device)  # (choice k, response j)
    competitors = rewards[:, None, :] - gamma * own  # (N, choice k, response j)
    already_ranked = torch.ones(K, K, dtype=torch.bool, device=rewards.device).tril(-1)  # (K, K): j < k
    log_normalizers = competitors.masked_fill(already_ranked, float("-inf")).logsumexp(-1)  # (N, K)
    return (log_normalizers - competitors.diagonal(dim1=1, dim2=2)).sum(-1), rewards.detach()


def ipo(logprobs, ref_logprobs, mask, *, beta=0.05):
    """(h - 1/(2 beta))^2, h as in `dpo`, sums over tokens: eq. 17 of IPO (arXiv 2310.12036), beta its tau.

    As in the DPO repository and in TRL's online trainers. TRL's DPOTrainer divides both log-ratios by their
    lengths first: `ipo_length`.
    """
    log_ratios = seq_logprobs(logprobs, mask) - seq_logprobs(ref_logprobs, mask)  # (N, 2)
    return (margin(log_ratios) - 1 / (2 * beta)) ** 2, (beta * log_ratios).detach()


def dpo_length(logprobs, ref_logprobs, mask, *, beta=2.0, gamma=0.0, label_smoothing=0.0):
    """Length-normalised DPO: -log sigmoid(beta [(m_w - m_l) - (m_ref,w - m_ref,l)] - gamma), m as in `simpo`.

    It is SimPO with the reference's own margin beta (m_ref,w - m_ref,l), different for every pair, added to
    the fixed gamma: the step between SimPO and DPO that the paper's 4.3 is about. With gamma = 0 it is eq. 6
    of Tulu 3 (arXiv 2411.15124), TRL's sigmoid_norm.
    """
    rewards = beta * (mean_logprobs(logprobs, mask) - mean_logprobs(ref_logprobs, mask))  # (N, 2)
    return smoothed(margin(rewards) - gamma, label_smoothing), rewards.detach()


PREFERENCE_LOSSES = {
    "dpo": dpo,
    "simpo": simpo,
    "simpo_pl": simpo_pl,
    "ipo": ipo,
    "dpo_length": dpo_length,
    "ipo_length": ipo_length,
    "dpo_free": dpo_free,
    "cpo": cpo,
    "cpo_mean": cpo_mean,
    "orpo": orpo,
    "slic": slic,
    "hinge": hinge,
    "rrhf": rrhf,
    "chipo": chipo,
    "alphapo": alphapo,
    "gammapo": gammapo,
    "gammapo_dpo": gammapo_dpo,
    "confpo": confpo,
    "amopo": amopo,
    "cringe": cringe,
    "osp": osp,
    "vpo": vpo,
    "srpo": srpo,
}
RANKED = {"simpo_pl", "rrhf"}  # take K >= 2 ranked responses instead of a pair


# --- what a signature says


def needs_reference(loss: Callable) -> bool:
    return "ref_logprobs" in inspect.signature(loss).parameters


def defaults(loss: Callable) -> dict[str, float]:
    """{option: its default} of a loss."""
    parameters = inspect.signature(loss).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not None}


def extras(loss: Callable) -> set[str]:
    """What a loss reads beside log-probs: the keywords without a number for their default."""
    parameters = inspect.signature(loss).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is None}


def loss_options(name: str, given: dict[str, float | None]) -> dict[str, float]:
    """All options of the loss called `name`: its defaults, and what is given (not None) instead.

    UserError for an unknown loss, and for a given option that it does not have: a run must not record
    gamma=0.5 when its loss has no margin.
    """
    if name not in PREFERENCE_LOSSES:
        raise UserError(f"--loss={name}: known are {', '.join(PREFERENCE_LOSSES)}")
    options = defaults(PREFERENCE_LOSSES[name])
    given = {key: value for key, value in given.items() if value is not None}
    for option in given:
        if option not in options:
            having = [other for other, loss in PREFERENCE_LOSSES.items() if option in defaults(loss)]
            raise UserError(f"--{option}: the loss {name} has none; these have it: {', '.join(having)}")
    return options | given


def describe(losses: dict[str, Callable]) -> str:
    """For --help: one line per loss, with its options and their defaults."""
    width = max(map(len, losses))
    lines = []
    for name, loss in losses.items():
        options = ", ".join(f"{option} {default:g}" for option, default in defaults(loss).items())
        reads = (["a reference"] if needs_reference(loss) else []) + sorted(extras(loss))
        lines.append(f"  {name:{width}}  {options}" + (f"; reads {', '.join(reads)}" if reads else ""))
    return "losses and the defaults of their options:\n" + "\n".join(lines)
