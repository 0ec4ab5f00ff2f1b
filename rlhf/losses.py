"""Losses on given responses, as pure functions of per-token log-probs: Bradley-Terry, and the family of DPO
and SimPO.

The preference losses share one signature, so that a script (and an ablation) can swap them:

    loss(logprobs, ref_logprobs, mask, *, options, extras) -> losses (N,), rewards (N, K)

logprobs, ref_logprobs, mask are (N, K, R); response 0 is the chosen one, response 1 the rejected one; of a
ranking the responses come best first. `losses` is not reduced: the caller means over prompts. `rewards` are
the loss's own implicit rewards, detached: margins and accuracies are differences and comparisons of these.

The signature is the whole truth about a loss, and the scripts read it:
- A loss that reads no reference calls its second argument `_`, and gets None for it.
- Its options are keyword-only, each a number with its paper's default.
- What else it reads of a pair is an extra: keyword-only, with None for its default.
To add a loss, write such a function here and put it into PREFERENCE_LOSSES (and RANKED, if it takes more
than two responses). The functions are in pair_losses.py and extra_losses.py, so that no file is long.
"""

import inspect
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from rlhf.config import UserError
from rlhf.extra_losses import amopo, cringe, osp, rrhf, simpo_pl, srpo, vpo
from rlhf.pair_losses import (
    alphapo,
    chipo,
    confpo,
    cpo,
    cpo_mean,
    dpo,
    dpo_free,
    dpo_length,
    gammapo,
    gammapo_dpo,
    hinge,
    ipo,
    ipo_length,
    orpo,
    simpo,
    slic,
)


def bradley_terry_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Reward model: (N,), (N,) -> (N,), -log p(chosen > rejected) = -log sigmoid(r_w - r_l).

    Eq. 1 of "Failure Modes of Maximum Entropy RLHF" (arXiv 2509.20265), L_R in 2.1.
    """
    return -F.logsigmoid(chosen_scores - rejected_scores)


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
