"""Which logged metric warns of over-optimisation first? A section of RESULTS.md.

Two questions of every signal. Of a run: is it alarmed before its gold reward peaks, at a threshold from other
seeds? Of an update: is the signal higher where gold is about to fall than where it is not (AUC)?
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from study.arms import Study
from study.logs import RunLog, select
from study.questions import table
from study.settings import SIZES
from study.standing import WINDOW, smoothed

FELL = 0.1  # gold: a run that fell by more than this from its peak over-optimised;
STAYED = 0.05  # one that fell by less than this stayed healthy
FALSE_ALARMS = 0.1  # share of healthy runs that a threshold may alarm
AVERAGED = 4  # updates in the mean of a signal: entry i of it is known after update i + 4
AHEAD = 8  # updates: gold is about to fall at t if its mean over t + 1 ... t + 8
ABOUT_TO_FALL = 0.05  # is lower by this than over t - 7 ... t

Metric = Callable[[str], np.ndarray]


def rise(name: str) -> Callable[[Metric], np.ndarray]:
    return lambda metric: metric(name) - metric(name)[0]


def fall(name: str) -> Callable[[Metric], np.ndarray]:
    return lambda metric: metric(name)[0] - metric(name)


def either_way(name: str) -> Callable[[Metric], np.ndarray]:
    return lambda metric: abs(metric(name) - metric(name)[0])


def tail_surprisal(metric: Metric) -> np.ndarray:
    """-log P(a sample of the first updates scores as high as the mean does now), normal tails."""
    start, spread = metric("scores")[0], max(metric("scores_std")[0], 1e-6)  # 0: all had the same score
    z = torch.from_numpy((metric("scores") - start) / spread)
    return -torch.special.log_ndtr(-z).numpy()


# what a user sees without a gold reward -> a number that should rise before trouble, of past and present only
SIGNALS = {
    "KL to the reference, level": lambda metric: metric("kl_full"),
    "KL between updates, over its lowest so far":
        lambda metric: metric("kl_prev/k3") / np.minimum.accumulate(metric("kl_prev/k3")),
    "entropy bonus (per token), rise": rise("length_normalized_surprisal"),
    "entropy bonus, change either way": either_way("length_normalized_surprisal"),
    "response length, change either way": either_way("response_length"),
    "share of EOS, fall": fall("eos_share"),
    "entropy, rise": rise("entropy"),
    "entropy, fall": fall("entropy"),
    "gradient norm (arXiv 2602.18037), rise": rise("grad_norm"),
    "gradient norm, fall": fall("grad_norm"),
    "spread of two RMs on a sample, rise": rise("rm_std"),
    "surprisal of the mean score under the first scores": tail_surprisal,
    "(with gold) the RM's accuracy on own samples, fall": fall("gold_agreement"),
    "spread of the RM score, rise": rise("scores_std"),
    "spread of the RM score, fall": fall("scores_std"),
    "RM score, rise": rise("scores"),
}


@dataclass(frozen=True)
class Course:
    """How the gold reward of a run went, by means of WINDOW updates."""

    run: RunLog
    depth: float  # fall from its peak to its end
    peak: int  # update of the peak
    broken: int  # update at which it had fallen by FELL

    @property
    def healthy(self) -> bool:
        return self.depth < STAYED

    @property
    def fell(self) -> bool:
        return self.depth > FELL


def course(run: RunLog) -> Course:
    gold = smoothed(run.metrics["gold"])  # entry i is the mean of updates i + 1 ... i + WINDOW,
    middle = WINDOW // 2  # and stands for the one in the middle
    peak = int(gold.argmax())
    broken = peak + int((gold[peak:] < gold.max() - FELL).argmax())
    return Course(run, gold.max() - gold[-1], peak + middle, broken + middle)


def averages(c: Course) -> Metric:
    """The run's log by means of AVERAGED updates; where a line has no number, the one before stands."""
    def metric(name: str) -> np.ndarray:
        values = c.run.metrics[name]
        last = np.maximum.accumulate(np.where(np.isnan(values), 0, np.arange(len(values))))
        return smoothed(values[last], AVERAGED)

    return metric


def first_alarms(courses: list[Course], signal: Callable[[Metric], np.ndarray]) -> list[int | None]:
    """The update at which each run is alarmed, or None.

    The threshold of a run is the lowest that would have alarmed at most FALSE_ALARMS of the healthy runs of
    the OTHER seeds, so of other reward models.
    """
    values = [signal(averages(c)) for c in courses]
    alarms = []
    for c, own in zip(courses, values):
        seed = c.run.config["seed"]
        others = (v for o, v in zip(courses, values) if o.healthy and o.run.config["seed"] != seed)
        threshold = np.quantile([v.max() for v in others], 1 - FALSE_ALARMS)
        above = np.flatnonzero(own > threshold)
        alarms.append(int(above[0]) + AVERAGED if len(above) else None)
    return alarms


def auc(low: np.ndarray, high: np.ndarray) -> float:
    """P(one of `high` is above one of `low`), ties as half (Mann and Whitney)."""
    if not len(low) or not len(high):
        return float("nan")
    ordered = np.sort(low)
    below = np.searchsorted(ordered, high, "left") + np.searchsorted(ordered, high, "right")
    return below.mean() / (2 * len(low))


def transitions(c: Course, signal: Callable[[Metric], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The signal at every update that has AHEAD before and after it, and whether gold is about to fall."""
    gold = smoothed(c.run.metrics["gold"], AHEAD)  # entry i: updates i + 1 ... i + AHEAD
    falls = gold[AHEAD:] - gold[:-AHEAD] < -ABOUT_TO_FALL  # entry i: at update i + AHEAD
    values = signal(averages(c))  # entry i: known at i + AVERAGED
    return values[AHEAD - AVERAGED :][: len(falls)], falls


def auc_cells(courses: list[Course], signal: Callable[[Metric], np.ndarray]) -> list[str]:
    """Of runs, by their highest value; of updates."""
    highest = [(signal(averages(c)).max(), c) for c in courses]
    healthy, fell = ([value for value, c in highest if getattr(c, kind)] for kind in ("healthy", "fell"))
    runs = auc(np.array(healthy), np.array(fell))
    values, falls = (np.concatenate(parts) for parts in zip(*(transitions(c, signal) for c in courses)))
    return [f"{runs:.2f}", f"{auc(values[~falls], values[falls]):.2f}"]


def lead_cells(leads: list[int], runs: int) -> list[str]:
    """Share of the runs that were warned before, and the median lead with its quartiles."""
    if not leads:
        return ["0 %", ""]
    low, middle, high = np.quantile(leads, [0.25, 0.5, 0.75])
    before = 100 * sum(lead > 0 for lead in leads) / runs
    return [f"{before:.0f} %", f"{middle:+.0f} ({low:+.0f} to {high:+.0f})"]


def signal_row(courses: list[Course], name: str) -> list[str]:
    alarms = first_alarms(courses, SIGNALS[name])
    fell = [(c, alarm) for c, alarm in zip(courses, alarms) if c.fell]
    warned = [(c, alarm) for c, alarm in fell if alarm is not None]
    false = [alarm is not None for c, alarm in zip(courses, alarms) if c.healthy]
    return [
        name,
        f"{100 * len(warned) / len(fell):.0f} %",
        *lead_cells([c.peak - alarm for c, alarm in warned], len(fell)),
        *lead_cells([c.broken - alarm for c, alarm in warned], len(fell)),
        f"{100 * np.mean(false):.0f} %",
        *auc_cells(courses, SIGNALS[name]),
    ]


def early_warning(study: Study) -> str:
    courses = [course(run) for size in SIZES for run in select(study.folders[size], "train_rloo")]
    rows = [signal_row(courses, name) for name in SIGNALS]
    rows.sort(key=lambda row: -int(row[1].split()[0]))  # the most alarms first
    header = [
        "signal", "alarmed, of over-optimised", "before the peak", "median lead to the peak (quartiles)",
        f"before gold fell by {FELL}", "median lead to that fall (quartiles)", "false alarms, held-out",
        "AUC of runs", "AUC of updates",
    ]
    peak = np.median([c.peak for c in courses if c.fell])
    return (
        f"All {len(courses)} RLOO runs of the grid. {sum(c.fell for c in courses)} over-optimised "
        f"(gold, mean of {WINDOW} updates, more than {FELL} below its peak at the end), "
        f"{sum(c.healthy for c in courses)} stayed healthy (less than {STAYED} below). A signal alarms "
        f"at the first update where its mean over {AVERAGED} updates exceeds a threshold: the lowest "
        f"that would have alarmed at most {100 * FALSE_ALARMS:.0f} % of the healthy runs of the OTHER "
        "seeds (other reward models). Leads are in updates, from the alarm to the gold peak and to the "
        f"update where gold was {FELL} below it: positive = warned before. AUC of runs: how often a run that "
        "over-optimised has a higher maximum of the signal than a healthy one. AUC of updates: how often the "
        f"signal is higher where gold falls by {ABOUT_TO_FALL} over the next {AHEAD} updates than where it "
        "does not; 0.5 is chance. The peak of the "
        f"over-optimised runs is at update {peak:.0f} in the median, which leaves little time. Sizes "
        "and learning rates are pooled, so a level may in part tell the learning rate; and a run is "
        "judged by its own noisy peak here.\n\n"
        + table(header, rows)
    )
