"""Gold reward against KL along training: the course of a run, where it peaks, what it has at a given KL.

What is chosen for a seed (a learning rate, a checkpoint, the best method) is chosen by the OTHER seeds:
leave one out. The highest of many noisy numbers would be too high by its own luck.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from study.logs import RunLog

LEVELS = (0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0)  # KLs, nats per summary, at which two arms are compared


@dataclass(frozen=True)
class Course:
    """One run from the SFT model on, a point per checkpoint; all (points,)."""

    kl: np.ndarray  # to the SFT model, over whole distributions, nats per summary; 0 at first
    gold: np.ndarray  # mean gold reward of the posts that are judged
    length: np.ndarray  # response tokens
    diverged: bool = False  # its loss was no longer finite: the last checkpoint before is its end


Arm = list[Course]  # the seeds of one setting, in order


def course(sft: dict, logs: list[RunLog], diverged: bool = False) -> Course:
    """From what evaluate.py says of the SFT model and of the checkpoints of one run (of several steps: of its
    training runs, in order)."""
    lines = [sft | {"kl_full": 0.0}]
    for log in logs:
        lines += [line for _, line in sorted(log.checkpoints.items())]
        lines += [log.evaluation] if log.evaluation else []
    columns = [np.array([line[key] for line in lines]) for key in ("kl_full", "gold", "response_length")]
    return Course(*columns, diverged)


def gold_at(run: Course, kl: float) -> float:
    """Gold where the course first comes to this KL, on straight lines between the points of gold over
    sqrt(KL); nan where it never does."""
    d = np.sqrt(run.kl)
    to = int(np.argmax(d >= kl**0.5))  # the first point there; 0 if there is none
    if to == 0:
        return float("nan")
    share = (kl**0.5 - d[to - 1]) / (d[to] - d[to - 1])
    return float(run.gold[to - 1] + share * (run.gold[to] - run.gold[to - 1]))


def equal_kl(arm: Arm, other: Arm) -> tuple[list[float], np.ndarray]:
    """The LEVELS that every seed of both arms reaches; gold of `arm` minus that of `other` there, mean over
    them, (seeds,); empty where there is no such level."""
    values = np.array([[gold_at(a, kl) - gold_at(b, kl) for kl in LEVELS] for a, b in zip(arm, other)])
    reached = ~np.isnan(values).any(0)  # (levels,)
    if not reached.any():
        return [], np.array([])
    return [kl for kl, there in zip(LEVELS, reached) if there], values[:, reached].mean(1)


# --- chosen by the other seeds


def stacked(arm: Arm, name: str) -> np.ndarray:
    """A column of all seeds, (seeds, points); a run that ended earlier stays at its end."""
    points = max(len(run.kl) for run in arm)
    columns = [getattr(run, name) for run in arm]
    return np.stack([np.pad(column, (0, points - len(column)), mode="edge") for column in columns])


def of_others(values: np.ndarray, seed: int) -> np.ndarray:
    """Mean over the other seeds, (seeds, ...) -> (...); of a single seed its own."""
    return np.delete(values, seed, axis=0).mean(0) if len(values) > 1 else values[0]


def peaks(arm: Arm) -> list[int]:
    """Per seed the point where the others' mean gold is highest."""
    gold = stacked(arm, "gold")
    return [int(of_others(gold, s).argmax()) for s in range(len(arm))]


def at_points(arm: Arm, name: str, points: Sequence[int]) -> np.ndarray:
    """A column at one point per seed, (seeds,)."""
    return stacked(arm, name)[np.arange(len(arm)), list(points)]


def falls(arm: Arm) -> np.ndarray:
    """Gold at the peak minus gold at the end, (seeds,)."""
    return at_points(arm, "gold", peaks(arm)) - stacked(arm, "gold")[:, -1]


def chosen(arms: dict[str, Arm]) -> list[tuple[str, int]]:
    """Per seed the arm (a learning rate) and the point where the others' mean gold is highest."""
    found = []
    for s in range(len(next(iter(arms.values())))):
        means = {name: of_others(stacked(arm, "gold"), s) for name, arm in arms.items()}
        best = max(means, key=lambda name: means[name].max())
        found.append((best, int(means[best].argmax())))
    return found


def behind_best(highest: np.ndarray) -> np.ndarray:
    """By how much each method is behind the best one: (methods, seeds) -> the same; the best for a seed is
    the one with the highest mean over the other seeds."""
    behind = np.empty_like(highest)
    for s in range(highest.shape[1]):
        best = int(of_others(highest.T, s).argmax())
        behind[:, s] = highest[best, s] - highest[:, s]
    return behind
