"""K scored responses to a prompt -> what a pair loss learns from: which ones, in what order, with what label.

A difference of scores d says that the first response is the better one with probability sigmoid(d): the
Bradley-Terry model that the reward model was trained under.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.forward import TokenStats
from rlhf.losses import PREFERENCE_LOSSES
from rlhf.masked import seq_logprobs
from rlhf.model import EOS
from rlhf.pair_losses import margin, seq_log_ratios

METHODS = """methods (each with --k=2 unless it says another):
  online DPO     --loss=dpo --beta=0.1                                            arXiv 2402.04792
  online IPO     --loss=ipo --beta=0.1 --label=soft                               2312.00886, 2403.08635
  IPO-MD         --loss=ipo --beta=0.1 --label=soft --mixture=0.125               2403.08635
  Nash-MD        --loss=nash_md --beta=0.1 --label=soft --opponent=0.5            2312.00886
  XPO            --loss=dpo --beta=0.1 --opponent=1 --explore=1e-5                2405.21046
  optimistic VPO --loss=dpo --beta=0.1 --opponent=1 --explore=0.01                2405.19320
                 (explore = its alpha x beta; its alpha and calibration distribution are open, here pi_ref)
  SELM           --loss=dpo --beta=0.01 --k=1 --data_pair --explore=1e-5 --round_updates=N --move_reference
                 2405.19332 (explore = its alpha x beta; its y is greedy, ours is sampled)
  iterative DPO  --loss=dpo --beta=0.1 --k=8 --epochs=2 --round_updates=N --move_reference    2405.07863

"""


@dataclass
class Comparison:
    """What is learnt from each of N prompts.

    order   (N, m)  numbers of the responses, best first: two of them, or all K as a ranking
    labels  (N,)    probability that the first of a pair is the better one; None: it is taken to be
    kept    (N,)    False where nothing can be learnt: equal scores
    """

    order: Tensor
    labels: Tensor | None
    kept: Tensor

    def __getitem__(self, rows: slice) -> "Comparison":
        labels = None if self.labels is None else self.labels[rows]
        return Comparison(self.order[rows], labels, self.kept[rows])


def equal_scores(scores: Tensor, responses: list[list[list[int]]]) -> Tensor:
    """Scores (N, K), equal ones for equal responses: rounding must not prefer one of the two."""
    first = [[group.index(response) for response in group] for group in responses]
    return scores.gather(1, torch.tensor(first, device=scores.device))


def add_data_pair(responses: list, ended: Tensor, chosen: list, rejected: list) -> tuple[list, Tensor]:
    """Two more responses of each prompt: (N, K) -> (N, K + 2)."""
    pairs = list(zip(chosen, rejected))
    has_eos = torch.tensor([[response[-1:] == [EOS] for response in pair] for pair in pairs])  # (N, 2)
    return [own + list(pair) for own, pair in zip(responses, pairs)], torch.cat([ended, has_eos], 1)


def compare(
    scores: Tensor, label: str, coins: Tensor, wins: Tensor | None = None, *, ranked: bool = False,
) -> Comparison:
    """Scores (N, K) -> the pair of each prompt: its two responses, or the best and the worst of more.

    wins     (N,) probability that the first of two is the better one; None: sigmoid(d) of their scores

    hard     the higher score is the better response; ties are not kept
    sampled  the first is the better one if its coin, uniform in [0, 1), is below sigmoid(d)
    soft     nobody is: the pair stays as it is, with sigmoid(d) for its label
    ranked   all K responses by falling score (hard)
    """
    K = scores.shape[1]
    if ranked:
        order = scores.argsort(dim=1, descending=True, stable=True)  # (N, K)
        ordered = scores.gather(1, order)
        return Comparison(order, None, (ordered[:, :-1] != ordered[:, 1:]).all(1))
    first = scores.argmax(1) if K > 2 else torch.zeros_like(coins, dtype=torch.long)  # (N,)
    second = scores.argmin(1) if K > 2 else torch.ones_like(coins, dtype=torch.long)  # (N,)
    order = torch.stack([first, second], 1)  # (N, 2)
    pair = scores.gather(1, order)
    wins = torch.sigmoid(pair[:, 0] - pair[:, 1]) if wins is None else wins  # (N,)
    everyone = torch.ones_like(coins, dtype=torch.bool)
    if label == "soft":
        return Comparison(order, wins, everyone)
    swap = coins >= wins if label == "sampled" else pair[:, 0] < pair[:, 1]
    kept = everyone if label == "sampled" else pair[:, 0] != pair[:, 1]
    return Comparison(torch.where(swap[:, None], order.flip(1), order), None, kept)


def pair_losses(
    loss_fn: Callable, options: dict[str, float], stats: TokenStats, mask: Tensor, chosen: Comparison,
) -> tuple[Tensor, Tensor]:
    """Losses (N,) and rewards (N, m) on those of the responses (N, K, R) that the comparison chose."""
    index = chosen.order[..., None].expand(-1, -1, mask.shape[-1])  # (N, m, R)
    logprobs = stats.logprobs.gather(1, index)
    ref_logprobs = stats.ref_logprobs.gather(1, index)
    labels = {} if chosen.labels is None else {"labels": chosen.labels}
    return loss_fn(logprobs, ref_logprobs, mask.gather(1, index), **options, **labels)


def nash_md(logprobs, ref_logprobs, mask, *, beta=0.1, labels=None):
    """Nash-MD's policy gradient (arXiv 2312.00886): -(P(y > y') - 1/2 - beta log(pi/pi_ref)(y)) log pi(y).

    Response 0 is the policy's y, response 1 the opponent's y', which gets no gradient.
    labels  (N,) P(y > y'); None: 1.
    The weight is constant, and the log-ratio in it is that of the whole response: so the expected gradient is
    exactly that of -P(pi > pi') + beta KL(pi || pi_ref). TRL (up to 0.29, experimental/nash_md) weights each
    token's log-prob by that token's log-ratio alone, which is biased.
    """
    log_ratios = seq_log_ratios(logprobs, ref_logprobs, mask)  # (N, 2)
    wins = 1.0 if labels is None else labels
    weight = wins - 0.5 - beta * log_ratios[:, 0].detach()  # (N,)
    return -weight * seq_logprobs(logprobs, mask)[:, 0], (beta * log_ratios).detach()


def soft_ipo(logprobs, ref_logprobs, mask, *, beta=0.05, labels=None):
    """(h - (P - 1/2) / beta)^2: `ipo` of losses.py (arXiv 2310.12036, beta its tau) before P became 1.

    labels  probability P that the first response is the better one, a number or (N,); None: 1.
    """
    log_ratios = seq_log_ratios(logprobs, ref_logprobs, mask)  # (N, 2)
    target = 0.5 / beta if labels is None else (labels - 0.5) / beta
    return (margin(log_ratios) - target) ** 2, (beta * log_ratios).detach()


ONLINE_LOSSES = {**PREFERENCE_LOSSES, "ipo": soft_ipo, "nash_md": nash_md}
