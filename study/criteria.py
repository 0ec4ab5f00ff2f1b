"""What the toy world is held to (study/instrument.py lists it), as functions of what was measured.

Each returns (passed, the measured numbers as text).

Runs of seed s are called kl_s1, free_s1, ...; rows[name] is evaluate.py's line of such a run, or of "sft".
"""

from pathlib import Path
from statistics import mean

import numpy as np

from evaluation.statistics import t_interval
from rlhf.pretrained import read_json
from study.logs import read_columns
from study.settings import SIZES, TEMPERATURE

WINDOW = 8  # updates in a mean of the log
GROUPS = (("free", "maxent"), ("simpo", "dpo"), ("kl",))  # ascending in gold; no order is claimed within one
METHODS = [name for group in GROUPS for name in group]


def smoothed(values: np.ndarray) -> np.ndarray:
    return np.convolve(values, np.ones(WINDOW) / WINDOW, mode="valid")


def gains(rows: dict[str, dict], name: str, seeds: list[int]) -> list[float]:
    return [rows[f"{name}_s{s}"]["gold"] - rows["sft"]["gold"] for s in seeds]


def spread(values: list[float]) -> str:
    middle, low, high = t_interval(values)
    return f"{middle:+.2f} [{low:+.2f}, {high:+.2f}] ({' '.join(f'{v:+.2f}' for v in values)})"


def works(rows: dict[str, dict], seeds: list[int]) -> tuple[bool, str]:
    kl, dpo = gains(rows, "kl", seeds), gains(rows, "dpo", seeds)
    passed = mean(kl) >= 0.15 and t_interval(kl)[1] > 0.05 and mean(dpo) > 0
    return passed, f"gain over SFT ({rows['sft']['gold']:.2f}): RLOO with KL {spread(kl)}, DPO {spread(dpo)}"


def fails(folder: Path, sft: float, seeds: list[int]) -> tuple[bool, str]:
    passed, parts = True, []
    for s in seeds:
        curve = smoothed(read_columns(folder / f"free_s{s}" / "metrics.jsonl")["gold"])
        peak = int(curve.argmax())
        passed &= bool(peak >= 15 and curve[peak] - sft > 0.1 and curve[peak] - curve[-1] > 0.1)
        parts.append(f"{curve[0]:.2f} -> {curve[peak]:.2f} from update {peak + 1} -> {curve[-1]:.2f}")
    shown = f"gold without a constraint, means of {WINDOW} updates (SFT {sft:.2f}): "
    return passed, shown + "; ".join(parts)


def rm_accuracy(folder: Path, seed: int) -> float:
    return read_json(folder / f"rm_s{seed}" / "result.json")["accuracy"]


def proxy(
    folder: Path, bayes: float, seeds: list[int], on_samples: dict[str, list[float]],
) -> tuple[bool, str]:
    right = [rm_accuracy(folder, s) for s in seeds]
    along = "; ".join(f"seed {s}: {' '.join(f'{v:.2f}' for v in values)}" for s, values in on_samples.items())
    passed = 0.70 <= mean(right) <= 0.78 and 0.80 <= bayes <= 0.88
    shown = " ".join(f"{v:.3f}" for v in right)
    measured = f"right on {mean(right):.3f} ({shown}); Bayes {bayes:.3f}; on the policy's own samples {along}"
    return passed, measured


def larger_error(differences: np.ndarray) -> float:  # (seeds, posts) -> the larger standard error
    """Of a mean difference of two sizes: over posts, or over seeds of SFT."""
    over_posts = differences.mean(0).std(ddof=1) / differences.shape[1] ** 0.5
    over_seeds = differences.mean(1).std(ddof=1) / differences.shape[0] ** 0.5
    return max(over_posts, over_seeds)


def size_helps(golds: dict[str, dict[str, list[list[float]]]]) -> tuple[bool, str]:
    """golds[size][temperature][seed of SFT]: gold of every post, the same posts everywhere."""
    passed, parts = True, []
    for temperature in (str(0.0), str(TEMPERATURE)):
        columns = [np.array(golds[size][temperature]) for size in SIZES]  # (seeds, posts) each
        steps = [more - less for less, more in zip(columns, columns[1:])]
        passed &= all(step.mean() > larger_error(step) for step in steps)
        seeds = [" ".join(f"{gold:.2f}" for gold in column.mean(1)) for column in columns]
        shown = " < ".join(f"{column.mean():.3f} ({each})" for column, each in zip(columns, seeds))
        errors = " and ".join(f"{larger_error(step):.3f}" for step in steps)
        parts.append(f"T = {temperature}: {shown}, standard errors of the steps {errors}")
    return bool(passed), "; ".join(parts)


def not_temperature(
    golds: dict[str, list[float]], rows: dict[str, dict], seeds: list[int],
) -> tuple[bool, str]:
    at = {temperature: mean(values) for temperature, values in golds.items()}
    by_temperature = max(at.values()) - at[str(TEMPERATURE)]
    by_rloo = mean(gains(rows, "kl", seeds))
    table = ", ".join(f"SFT at {temperature}: {value:.2f}" for temperature, value in at.items())
    measured = f"{table}; another temperature gains {by_temperature:+.2f}, RLOO {by_rloo:+.2f}"
    return by_rloo > 2 * by_temperature, measured


def order(rows: dict[str, dict], seed: int) -> tuple:
    """Signs of the gains over SFT, and the group of each method, ascending by gold."""
    gold = {name: rows[f"{name}_s{seed}"]["gold"] for name in METHODS}
    signs = tuple("+" if gold[name] > rows["sft"]["gold"] else "-" for name in METHODS)
    group = {name: index for index, names in enumerate(GROUPS) for name in names}
    return signs, tuple(group[name] for name in sorted(gold, key=gold.get))


def robust(rows: dict[str, dict], other: dict[str, dict], seeds: list[int]) -> tuple[bool, str]:
    sweeps = [(rows, s) for s in seeds] + [(other, seeds[0])]
    orders = {order(sweep, s) for sweep, s in sweeps}
    shown = []
    for sweep, s in sweeps:
        gold = {name: sweep[f"{name}_s{s}"]["gold"] for name in METHODS} | {"SFT": sweep["sft"]["gold"]}
        shown.append(" < ".join(f"{name} {gold[name]:.2f}" for name in sorted(gold, key=gold.get)))
    ascending = all(list(groups) == sorted(groups) for _, groups in orders)
    return len(orders) == 1 and ascending, "by gold, the last with other kernels: " + "; ".join(shown)
