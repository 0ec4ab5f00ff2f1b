"""How an arm stands: what is computed of a run's log and of an arm's seeds, and the words for it.

Intervals are Student's t over the seeds (`Study.interval`); seed s of every arm has the same reward model and
prompts, so two arms are compared seed by seed. Which runs are an arm: arms.py.
"""

import math
from dataclasses import dataclass

import numpy as np

from study.arms import Interval, Study
from study.logs import RunLog

WINDOW = 8  # updates in a mean of the log: 512 summaries


# --- one run


def smoothed(values: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Means of `window` neighbours, (n - window + 1,)."""
    return np.convolve(values, np.ones(window) / window, mode="valid")


def first(run: RunLog, metric: str) -> float:
    return run.metrics[metric][:WINDOW].mean()


def last(run: RunLog, metric: str) -> float:
    return run.metrics[metric][-WINDOW:].mean()


def change(run: RunLog, metric: str) -> float:
    return last(run, metric) - first(run, metric)


# --- the seeds of an arm


def golds(arm: list[RunLog]) -> np.ndarray:
    """Gold reward of the final model per seed: 500 validation posts, sampled at the training
    temperature."""
    return np.array([run.evaluation["gold"] for run in arm])


def win_rates(arm: list[RunLog]) -> np.ndarray:
    return np.array([run.win_rate for run in arm])


def mean_win_rate(arm: list[RunLog]) -> float | None:
    """Over the seeds whose win rate is known."""
    known = [run.win_rate for run in arm if run.win_rate is not None]
    return sum(known) / len(known) if known else None


def mean_change(arm: list[RunLog], metric: str) -> float:
    return np.mean([change(run, metric) for run in arm])


def mean_last(arm: list[RunLog], metric: str) -> float:
    return np.mean([last(run, metric) for run in arm])


def drops(arm: list[RunLog]) -> np.ndarray:
    """How far the gold reward of the samples fell from its peak to the end, per seed.

    The peak is where the mean of the OTHER seeds is highest, so that the highest of many noisy numbers is
    not taken for a peak.
    """
    curves = np.stack([smoothed(run.metrics["gold"]) for run in arm])  # (seeds, n)
    found = []
    for s, curve in enumerate(curves):
        others = np.delete(curves, s, axis=0).mean(0) if len(arm) > 1 else curve  # (n,)
        found.append(curve[others.argmax()] - curve[-1])
    return np.array(found)


@dataclass(frozen=True)
class Standing:
    gain: Interval  # gold reward above the SFT model's
    drop: Interval  # fall of gold from its peak; nan for the offline methods

    @property
    def fell(self) -> bool:
        return self.drop[1] > 0

    @property
    def over(self) -> bool | None:
        """Over-optimised: the gold reward ended below the SFT model's, or fell from its peak.

        False only if it ended above and no fall was seen.
        """
        if self.gain[2] < 0 or self.fell:
            return True
        return False if self.gain[1] > 0 else None

    def __str__(self) -> str:
        if self.over:
            return "over-optimised: below SFT" if self.gain[2] < 0 else "over-optimised: past its peak"
        return "not distinguishable from SFT" if self.over is None else "better than SFT, no fall seen"


def standing(study: Study, size: str, arm: list[RunLog]) -> Standing:
    drop = study.interval(drops(arm)) if "gold" in arm[0].metrics else (math.nan,) * 3
    return Standing(study.interval(golds(arm) - study.sft(size)["gold"]), drop)


def standings(study: Study, size: str, arms: dict[float, list[RunLog]]) -> list[Standing]:
    return [standing(study, size, arm) for arm in arms.values()]


def some_better(found: list[Standing]) -> bool:
    return any(s.over is False for s in found)


def every_over(found: list[Standing]) -> bool:
    return all(s.over is True for s in found)


def best(arms: dict[float, list[RunLog]]) -> float:
    """The coefficient whose arm has the highest gold reward."""
    return max(arms, key=lambda coef: golds(arms[coef]).mean())


# --- words


def mark(won: float | None, sft: float | None) -> str:
    """✓ above the SFT model's win rate, × below it, = the same or unknown."""
    if won is None or sft is None or won == sft:
        return "="
    return "✓" if won > sft else "×"


def pm(interval: Interval, digits: int = 2) -> str:
    mean, _, high = interval
    return f"{mean:+.{digits}f} ± {high - mean:.{digits}f}"


def points(interval: Interval) -> str:
    """Of a difference of two shares: in percentage points."""
    return pm(tuple(100 * x for x in interval), 1)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def arms_text(study: Study, size: str, arms: dict[float, list[RunLog]], symbol: str) -> str:
    """`α = 0.1: gold +0.10 ± 0.02, fall +0.01 ± 0.02, win rate 40 % (better than SFT, no fall seen)` for
    each arm."""
    parts = []
    for coef, arm in arms.items():
        s = standing(study, size, arm)
        fall = "" if math.isnan(s.drop[0]) else f", fall {pm(s.drop)}"
        won = percent(win_rates(arm).mean())
        parts.append(f"{symbol} = {coef:g}: gold {pm(s.gain)}{fall}, win rate {won} ({s})")
    sft = study.sft(size)
    return f"{size} (SFT gold {sft['gold']:.2f}, win rate {percent(sft['win_rate'])}): " + "; ".join(parts)
