"""How sure a win rate is: intervals, a paired comparison of two checkpoints, the win rate at equal length.

A preference is a number in [0, 1]: 1 = the summary wins, 0 = the reference wins, 0.5 = a tie.
nan = no verdict: it is counted nowhere.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

Z = 1.959963984540054  # 95 % of a normal distribution lie within this many standard deviations
BUCKETS = ((0, 0.5), (0.5, 0.8), (0.8, 1.25), (1.25, 2), (2, math.inf))  # summary length / reference length


def judged(preferences: list[float]) -> Tensor:
    values = torch.tensor(preferences, dtype=torch.float64)
    return values[~values.isnan()]


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share of n.

    Ties, as half wins, vary less than wins do: with them the interval is a little too wide, never too narrow.
    """
    if n == 0:
        return 0.0, 1.0
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    low = 0.0 if share == 0 else middle - half  # exact where rounding would leave 1e-18
    high = 1.0 if share == 1 else middle + half
    return low, high


def t_inside(t: float, d: int) -> float:
    """P(|T| < t) of Student's t with d degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(d))
    odd = d % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(2 + odd, d - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if d > 1 else 0.0))


@lru_cache
def t_quantile(d: int, level: float = 0.95) -> float:
    """Student's t with d degrees of freedom: a share `level` lies within this many standard deviations."""
    low, high = 0.0, 1.0
    while t_inside(high, d) < level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_inside(middle, d) < level else (low, middle)
    return high


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean of a few independent numbers (seeds), and its interval of Student's t; infinite for one."""
    n = len(values)
    middle = math.fsum(values) / n
    if n == 1:
        return middle, -math.inf, math.inf
    deviation = math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (n - 1))
    half = t_quantile(n - 1, level) * deviation / math.sqrt(n)
    return middle, middle - half, middle + half


def t_test(values: Sequence[float]) -> float:
    """Two-sided p that the mean of a few independent numbers (seeds) is 0, by Student's t; 1 for one."""
    n = len(values)
    if n < 2:
        return 1.0
    middle = math.fsum(values) / n
    error = math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (n - 1) / n)
    if error == 0:
        return 1.0 if middle == 0 else 0.0
    return 1.0 - t_inside(abs(middle) / error, n - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of several questions, corrected for their number (Holm 1979): the smallest of m times m,
    the next times m - 1, ..., none below the one before it. Below 0.05 all of them together err in at most
    5 %."""
    m = len(p_values)
    corrected = [1.0] * m
    largest = 0.0
    for rank, i in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (m - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def win_rate(preferences: list[float]) -> dict[str, float | int | None]:
    """Share won with ties as half, its 95 % interval, the share of ties, and how many had no verdict."""
    values = judged(preferences)
    n = len(values)
    rate = values.mean().item() if n else None
    low, high = wilson(rate, n) if n else (None, None)
    return {
        "win_rate": rate,
        "win_rate_low": low,
        "win_rate_high": high,
        "ties": (values == 0.5).double().mean().item() if n else None,
        "judged": n,
        "unjudged": len(preferences) - n,
    }


def paired_bootstrap(
    a: list[float], b: list[float], resamples: int = 2000, seed: int = 0,
) -> dict[str, float | int | None]:
    """Is B better than A? Mean of b - a over the posts where both have a value, its 95 % percentile interval,
    and the share of resamples above 0.

    Posts are resampled, and a post keeps both of its values: what is hard for both cancels, which makes the
    interval narrow. `resamples` is rounded down to hundreds, at least one.
    """
    both = torch.tensor(b, dtype=torch.float64) - torch.tensor(a, dtype=torch.float64)
    difference = both[~both.isnan()]
    n = len(difference)
    if n == 0:
        nothing = dict.fromkeys(("difference", "difference_low", "difference_high", "p_better"))
        return {**nothing, "paired": 0}
    generator = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(max(1, resamples // 100)):
        drawn = torch.randint(n, (100, n), generator=generator)
        means.append(difference[drawn].mean(1))  # (100,)
    means = torch.cat(means)  # (resamples,)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {
        "difference": difference.mean().item(),
        "difference_low": low,
        "difference_high": high,
        "p_better": ((means > 0).double() + 0.5 * (means == 0).double()).mean().item(),
        "paired": n,
    }


def by_length(preferences: list[float], lengths: list[int], reference_lengths: list[int]) -> list[dict]:
    """Win rate per bucket of length / reference length, from far shorter to far longer.

    A bucket holds its lower bound and not its upper one.
    """
    ratios = [own / other for own, other in zip(lengths, reference_lengths, strict=True)]
    buckets = []
    for low, high in BUCKETS:
        inside = [p for p, ratio in zip(preferences, ratios) if low <= ratio < high]
        buckets.append({"from": low, "to": None if high == math.inf else high, **win_rate(inside)})
    return buckets


def fit_logistic(features: Tensor, y: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """Newton's method for y ~ sigmoid(features @ weights), features (n, d), y (n,), ridge (d,), in float64.

    Returns the weights (d,) and their covariance (d, d), the inverse of the curvature at the last step.
    """
    weights = torch.zeros(features.shape[1], dtype=torch.float64)  # (d,)
    for _ in range(50):
        p = (features @ weights).sigmoid()  # (n,)
        curvature = (features.T * (p * (1 - p))) @ features + ridge.diag()  # (d, d)
        step = torch.linalg.solve(curvature, features.T @ (y - p) - ridge * weights)
        weights = weights + step.clamp(-2, 2)  # a far step overshoots where the curve is flat
        if step.abs().max() < 1e-10:
            break
    return weights, torch.linalg.inv(curvature)


def length_controlled(
    preferences: list[float], lengths: list[int], reference_lengths: list[int],
) -> dict[str, float | bool | None]:
    """The win rate that would be left if summary and reference were equally long, with its 95 % interval, and
    what length does.

        logit P(win) = a + b tanh(d / sd(d)),  d = length - reference length
        win rate at equal length = sigmoid(a)

    AlpacaEval 2's fit (arXiv 2404.04475) without its term for the difficulty of an instruction, which takes
    many models to estimate. `length_effect` is b: above 0, being longer helps. A weak ridge (0.01 on a, 1 on
    b) keeps the fit finite where length, or everything, separates wins from losses.

    `lc_extrapolated`: one side is, in the mean, longer by half or more. Then few pairs, if any, are equally
    long, and the number comes from the shape of the formula more than from what was judged.
    """
    rows = zip(preferences, lengths, reference_lengths, strict=True)
    kept = [row for row in rows if not math.isnan(row[0])]
    if not kept:
        rates = ("lc_win_rate", "lc_win_rate_low", "lc_win_rate_high")
        return dict.fromkeys((*rates, "length_effect", "lc_extrapolated"))
    y, own, other = torch.tensor(kept, dtype=torch.float64).unbind(1)  # (n,) each
    d = own - other
    spread = d.std(correction=0)
    x = torch.tanh(d / spread) if spread > 0 else torch.zeros_like(d)  # (n,)
    features = torch.stack([torch.ones_like(x), x], dim=1)  # (n, 2)
    (a, b), covariance = fit_logistic(features, y, ridge=torch.tensor([0.01, 1.0], dtype=torch.float64))
    half = Z * covariance[0, 0].sqrt()
    shorter, longer = sorted([own.sum().item(), other.sum().item()])
    return {
        "lc_win_rate": a.sigmoid().item(),
        "lc_win_rate_low": (a - half).sigmoid().item(),
        "lc_win_rate_high": (a + half).sigmoid().item(),
        "length_effect": b.item(),
        "lc_extrapolated": longer >= 1.5 * shorter,
    }


def position_bias(verdicts: list[list[str]]) -> dict[str, float | int | None]:
    """Of a judge that sees two summaries in an order: does it like the first or the second place better?

    verdicts      per pair what it answered: "A" (the first shown), "B", "tie" or "unread"
    first_share   of the answers A or B, how many chose what was shown first, with a 95 % interval; 0.5 if the
                  judge has no such bias, as each order is asked equally often
    consistent    of the pairs asked in both orders and read twice, how many got the same verdict both times
    """
    answers = [verdict for pair in verdicts for verdict in pair]
    chosen = [verdict for verdict in answers if verdict in ("A", "B")]
    share = chosen.count("A") / len(chosen) if chosen else None
    low, high = wilson(share, len(chosen)) if chosen else (None, None)
    twice = [pair for pair in verdicts if len(pair) == 2 and "unread" not in pair]
    same = sum(sorted(pair) in (["A", "B"], ["tie", "tie"]) for pair in twice)
    return {
        "answers": len(answers),
        "unread": answers.count("unread"),
        "first_share": share,
        "first_share_low": low,
        "first_share_high": high,
        "consistent": same / len(twice) if twice else None,
    }
