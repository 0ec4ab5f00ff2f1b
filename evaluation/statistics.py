"""How sure a win rate is: intervals, a paired comparison of two checkpoints, and the win rate at equal length.

A preference is a number in [0, 1]: 1 = the summary wins, 0 = the reference wins, 0.5 = a tie; nan = no verdict, and is counted nowhere.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Z = 1.959963984540054  # 95 % of a normal distribution lie within this many standard deviations
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # the same of Student's t, by degrees of freedom
BUCKETS = ((0, 0.5), (0.5, 0.8), (0.8, 1.25), (1.25, 2), (2, math.inf))  # summary length / reference length


def judged(preferences: list[float]) -> Tensor:
    values = torch.tensor(preferences, dtype=torch.float64)
    return values[~values.isnan()]


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share of n. Ties as half wins make it a little wide, not too narrow: they vary less than wins do."""
    if n == 0:
        return 0.0, 1.0
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return 0.0 if share == 0 else middle - half, 1.0 if share == 1 else middle + half  # exact where rounding would leave 1e-18


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of a few independent numbers (seeds) and its 95 % interval of Student's t; of one number the interval is endless."""
    n = len(values)
    middle = math.fsum(values) / n
    if n == 1:
        return middle, -math.inf, math.inf
    deviation = math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (n - 1))
    d = n - 1  # beyond the table: Cornish and Fisher's series in 1/d, right to 0.003
    series = Z + (Z**3 + Z) / (4 * d) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * d**2) + (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / (384 * d**3)
    quantile = T95.get(d, series)
    half = quantile * deviation / math.sqrt(n)
    return middle, middle - half, middle + half


def win_rate(preferences: list[float]) -> dict[str, float | int | None]:
    """Share won with ties as half, its 95 % interval, the share of ties, and how many had no verdict."""
    values = judged(preferences)
    rate = values.mean().item() if len(values) else None
    low, high = wilson(rate, len(values)) if len(values) else (None, None)
    ties = (values == 0.5).double().mean().item() if len(values) else None
    return {"win_rate": rate, "win_rate_low": low, "win_rate_high": high, "ties": ties, "judged": len(values),
            "unjudged": len(preferences) - len(values)}


def paired_bootstrap(a: list[float], b: list[float], resamples: int = 2000, seed: int = 0) -> dict[str, float | int | None]:
    """Is B better than A? Mean of b - a over the posts where both have a value, its 95 % percentile interval, share of resamples above 0.

    Posts are resampled, and a post keeps both of its values: what is hard for both cancels, which makes the interval narrow.
    """
    difference = judged((torch.tensor(b, dtype=torch.float64) - torch.tensor(a, dtype=torch.float64)).tolist())
    n = len(difference)
    if n == 0:
        return {"difference": None, "difference_low": None, "difference_high": None, "p_better": None, "paired": 0}
    generator = torch.Generator().manual_seed(seed)
    means = torch.cat([difference[torch.randint(n, (100, n), generator=generator)].mean(1) for _ in range(max(1, resamples // 100))])
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    better = ((means > 0).double() + 0.5 * (means == 0).double()).mean().item()
    return {"difference": difference.mean().item(), "difference_low": low, "difference_high": high, "p_better": better, "paired": n}


def by_length(preferences: list[float], lengths: list[int], reference_lengths: list[int]) -> list[dict]:
    """Win rate per bucket of length / reference length, from far shorter to far longer; a bucket holds its lower bound."""
    ratios = [own / other for own, other in zip(lengths, reference_lengths, strict=True)]
    return [{"from": low, "to": None if high == math.inf else high, **win_rate([p for p, r in zip(preferences, ratios) if low <= r < high])}
            for low, high in BUCKETS]


def length_controlled(preferences: list[float], lengths: list[int], reference_lengths: list[int]) -> dict[str, float | bool | None]:
    """The win rate that would be left if summary and reference were equally long, with its 95 % interval; and what length does.

    logit P(win) = a + b tanh(d / sd(d)),  d = length - reference length;   win rate at equal length = sigmoid(a)

    AlpacaEval 2's fit (arXiv 2404.04475) without its term for the difficulty of an instruction, which takes many models to estimate.
    `length_effect` is b: above 0, being longer helps. A weak ridge (0.01 on a, 1 on b) keeps the fit finite where length, or everything,
    separates wins from losses. `lc_extrapolated`: one side is, in the mean, longer by half or more. Then few pairs if any are equally
    long, and the number comes from the shape of the formula more than from what was judged.
    """
    kept = [(p, own - other) for p, own, other in zip(preferences, lengths, reference_lengths, strict=True) if p == p]
    if not kept:
        return {"lc_win_rate": None, "lc_win_rate_low": None, "lc_win_rate_high": None, "length_effect": None,
                "lc_extrapolated": None}
    own, other = (math.fsum(side[i] for i, p in enumerate(preferences) if p == p) for side in (lengths, reference_lengths))
    y, d = torch.tensor(kept, dtype=torch.float64).unbind(1)  # (n,)
    spread = d.std(correction=0)
    x = torch.tanh(d / spread) if spread > 0 else torch.zeros_like(d)
    features = torch.stack([torch.ones_like(x), x], dim=1)  # (n, 2)
    ridge = torch.tensor([0.01, 1.0], dtype=torch.float64)
    weights, curvature = torch.zeros(2, dtype=torch.float64), None  # a, b
    for _ in range(50):  # Newton's method
        p = (features @ weights).sigmoid()
        curvature = (features.T * (p * (1 - p))) @ features + ridge.diag()  # (2, 2)
        step = torch.linalg.solve(curvature, features.T @ (y - p) - ridge * weights)
        weights = weights + step.clamp(-2, 2)  # a far step overshoots where the curve is flat
        if step.abs().max() < 1e-10:
            break
    half = Z * torch.linalg.inv(curvature)[0, 0].sqrt()
    middle, low, high = (weights[0] + half * k for k in (0, -1, 1))
    return {"lc_win_rate": middle.sigmoid().item(), "lc_win_rate_low": low.sigmoid().item(), "lc_win_rate_high": high.sigmoid().item(),
            "length_effect": weights[1].item(), "lc_extrapolated": max(own, other) >= 1.5 * min(own, other)}


def position_bias(verdicts: list[list[str]]) -> dict[str, float | int | None]:
    """Of a judge that sees two summaries in an order: per pair what it answered, "A" (the first shown), "B", "tie" or "unread".

    first_share   of the answers A or B, how many chose what was shown first, with a 95 % interval; 0.5 without bias, as orders are balanced
    consistent    of the pairs asked in both orders and read twice, how many got the same verdict both times
    """
    answers = [v for pair in verdicts for v in pair]
    chosen = [v for v in answers if v in ("A", "B")]
    share = chosen.count("A") / len(chosen) if chosen else None
    low, high = wilson(share, len(chosen)) if chosen else (None, None)
    twice = [pair for pair in verdicts if len(pair) == 2 and "unread" not in pair]
    same = sum(sorted(pair) in (["A", "B"], ["tie", "tie"]) for pair in twice)
    return {"answers": len(answers), "unread": answers.count("unread"), "first_share": share, "first_share_low": low,
            "first_share_high": high, "consistent": same / len(twice) if twice else None}
