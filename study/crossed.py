"""Is the spread over seeds that of the reward model or of the policy? Every reward model with every seed of
the policy; a section of RESULTS.md."""

from pathlib import Path

import numpy as np

from study.logs import find_runs
from study.plan import CROSSED, CROSSED_SEEDS
from study.questions import table


def variance_parts(values: np.ndarray) -> tuple[float, float, float]:  # (reward models, policy seeds)
    """Variances of the reward model, the policy's seed, and the rest (what the two do together, and noise).

    Two random factors, one value per cell: the usual estimates from mean squares (Searle et al. 1992,
    Variance Components, ch. 4), not below 0.
    """
    m, n = values.shape
    rows, columns = values.mean(1), values.mean(0)
    rest = values - rows[:, None] - columns + values.mean()  # (m, n)
    square = (rest**2).sum() / ((m - 1) * (n - 1))
    of_rows, of_columns = rows.var(ddof=1) - square / n, columns.var(ddof=1) - square / m
    return max(of_rows, 0.0), max(of_columns, 0.0), square


def crossed_section(root: Path) -> str:
    runs = {run.path.name: run for run in find_runs(root / "small" / "crossed")}
    rows = []
    for name in CROSSED:
        cells = [[runs[f"{name}_rm{rm}_s{seed}"].evaluation["gold"] for seed in CROSSED_SEEDS]
                 for rm in CROSSED_SEEDS]
        parts = np.array(variance_parts(np.array(cells)))
        shares = [f"{100 * part / parts.sum():.0f} %" for part in parts]
        rows.append([name, f"{np.mean(cells):.2f}", f"{parts.sum() ** 0.5:.3f}", *shares])
    header = ["arm", "gold", "standard deviation", "reward model", "seed of the policy", "rest"]
    seeds = len(CROSSED_SEEDS)
    return (
        f"The small model, the high learning rate, {seeds} reward models x {seeds} seeds of the policy "
        "(prompts and samples): shares of the variance of the final gold reward.\n\n" + table(header, rows)
    )
