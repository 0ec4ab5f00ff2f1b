"""The field as a table: what each method came to, at a learning rate chosen by the other seeds."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from evaluation.statistics import holm, t_interval, t_test
from study.frontier import Arm, at_points, behind_best, chosen, gold_at, peaks, stacked
from study.questions import table

SHOWN = (1.0, 3.0, 10.0)  # KLs whose gold the table tells
SURE = 0.05  # a corrected p below this is beyond the spread

TEXT = """## The whole field

{methods} methods, each with three learning rates (a third of its own, its own, three times that) and {seeds}
seeds at each: {runs} runs for every method. Gold is the mean gold reward of 200 validation summaries sampled
at 0.7, KL that to the SFT model (gold {sft:.2f}) over whole distributions, nats per summary, of the same
samples. The points of a run are the SFT model, about eight checkpoints and its end.

**What is chosen, and by whom.** For each seed the learning rate and the checkpoint of the highest gold are
those with the highest mean over the other seeds (leave one out); the seed itself only says what its gold is
there. So no number here is the highest of several by its own luck. The method that the others are compared
with is chosen in the same way. The grid is coarse, and the settings beside the learning rate are those of the
papers or of trial runs in another world: a row says what a method does at these, not what it can do.

**±** is the half width of a 95 % interval of Student's t over the seeds. *behind*: how far below the best
method, seed by seed; *p* is two-sided and corrected for {others} comparisons (Holm). Without "below the best"
a difference is within the spread. *gold at KL*: where a run first comes to that KL, on straight lines over
sqrt(KL); (2 of 4): so many seeds come there; blank: none. *fall*: gold at the peak minus gold at the end.
*the rates*: highest gold at a third, once and three times the learning rate; † : a run whose loss was no
longer finite, which stays at its last checkpoint. *s*: seconds of a run on one core, checkpoints included.

![gold against the square root of the KL](figure_field.png)
"""


@dataclass(frozen=True)
class Row:
    """One method; arrays are (seeds,)."""

    choices: list[str]  # the factor of the learning rate, chosen by the other seeds
    highest: np.ndarray  # gold
    at: dict[float, np.ndarray]  # gold at a KL; nan where it is not reached
    peak: np.ndarray  # KL of the highest gold
    fall: np.ndarray
    rates: dict[str, tuple[float, int]]  # of each factor: mean highest gold, runs that diverged


def row(arms: dict[str, Arm]) -> Row:
    picks = chosen(arms)
    runs = [arms[factor][s] for s, (factor, _) in enumerate(picks)]
    gold = [stacked(arms[factor], "gold")[s] for s, (factor, _) in enumerate(picks)]
    kl = [stacked(arms[factor], "kl")[s] for s, (factor, _) in enumerate(picks)]
    points = [point for _, point in picks]
    highest = np.array([values[point] for values, point in zip(gold, points)])
    return Row(
        [factor for factor, _ in picks],
        highest,
        {level: np.array([gold_at(run, level) for run in runs]) for level in SHOWN},
        np.array([values[point] for values, point in zip(kl, points)]),
        highest - [values[-1] for values in gold],
        {factor: (at_points(arm, "gold", peaks(arm)).mean(), sum(run.diverged for run in arm))
         for factor, arm in arms.items()},
    )


def spread(values: np.ndarray, digits: int = 2) -> str:
    """0.71 ± 0.02; without ± for one seed."""
    mean, _, high = t_interval(values)
    return f"{mean:.{digits}f}" + (f" ± {high - mean:.{digits}f}" if len(values) > 1 else "")


def reached(values: np.ndarray) -> str:
    there = values[~np.isnan(values)]
    if len(there) == len(values):
        return spread(values)
    return f"{there.mean():.2f} ({len(there)} of {len(values)})" if len(there) else ""


def rate_cell(choices: list[str]) -> str:
    """x1, or where the seeds' choices differ x1 (3), x3 (1)."""
    count = Counter(choices).most_common()
    return count[0][0] if len(count) == 1 else ", ".join(f"{name} ({n})" for name, n in count)


def rates_cell(rates: dict[str, tuple[float, int]]) -> str:
    return " / ".join(f"{gold:.2f}" + "†" * (diverged > 0) for gold, diverged in rates.values())


def title(text: str, name: str) -> str:
    """With the name that the picture and --only have."""
    return f"`{name}`" if text == name else f"{text} (`{name}`)"


def statement(behind: np.ndarray, p: float, best: bool) -> str:
    if best:
        return "the best"
    return "below the best" if p < SURE and behind.mean() > 0 else ""


def compared(rows: dict[str, Row]) -> dict[str, tuple[np.ndarray, float]]:
    """{method: by how much it is behind the best per seed, and its p, corrected}; the highest mean is not
    compared with itself."""
    behind = behind_best(np.stack([found.highest for found in rows.values()]))  # (methods, seeds)
    best = int(np.argmax([found.highest.mean() for found in rows.values()]))
    others = [i for i in range(len(rows)) if i != best]
    p = np.ones(len(rows))
    p[others] = holm([t_test(behind[i]) for i in others])
    return {name: (behind[i], float(p[i])) for i, name in enumerate(rows)}


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.1f}"


def field_section(
    field: dict[str, dict[str, Arm]], methods: dict, seeds: list[int], spent: dict[str, list[float]],
) -> str:
    """Markdown. methods: {name: title, settings, ...} (field.py); spent: seconds of each method's runs."""
    rows = {name: row(arms) for name, arms in field.items()}
    against = compared(rows)
    order = sorted(rows, key=lambda name: -rows[name].highest.mean())
    cells = []
    for name in order:
        found, (behind, p) = rows[name], against[name]
        best = name == order[0]
        cells.append([
            title(methods[name].title, name), spread(found.highest), "" if best else spread(behind),
            "" if best else p_text(p), statement(behind, p, best),
            *(reached(found.at[level]) for level in SHOWN),
            spread(found.peak, 1), spread(found.fall), rate_cell(found.choices), rates_cell(found.rates),
            f"{np.mean(spent[name]):.0f}" if spent[name] else "", len(seeds), methods[name].settings,
        ])
    header = [
        "method", "highest gold", "behind", "p", "", *(f"gold at KL {level:g}" for level in SHOWN),
        "KL of the peak", "fall", "rate", "the rates", "s", "seeds", "settings",
    ]
    first = next(iter(field.values()))
    text = TEXT.format(
        methods=len(rows), seeds=len(seeds), runs=len(first) * len(seeds), others=len(rows) - 1,
        sft=next(iter(first.values()))[0].gold[0],
    )
    alone = "" if len(seeds) > 1 else "**One seed**: everything is chosen by the seed itself.\n\n"
    return f"{text}\n{alone}{table(header, cells)}"
