"""Curves of the gold reward over the KL divergence: the two shapes of Gao et al. 2022 (arXiv
2210.10760)."""

import numpy as np


def least_squares(features: list[np.ndarray], target: np.ndarray) -> tuple[float, float, float]:
    """The two coefficients, and the share of the variance they explain."""
    columns = np.stack(features, 1)  # (points, 2)
    a, b = np.linalg.lstsq(columns, target, rcond=None)[0]
    residual = columns @ np.array([a, b]) - target
    explained = 1 - (residual**2).sum() / ((target - target.mean()) ** 2).sum()
    return float(a), float(b), float(explained)


def gao_fit(kl, gain) -> tuple[float, float, float]:
    """a, b and R² of gain = d (a - b log d), d = sqrt(kl): the gold reward under RL. Points without KL say
    nothing."""
    kl = np.asarray(kl, dtype=float)
    seen = kl > 0
    d = np.sqrt(kl[seen])
    return least_squares([d, -d * np.log(d)], np.asarray(gain, dtype=float)[seen])


def best_of_n_fit(kl, gain) -> tuple[float, float, float]:
    """a, b and R² of gain = d (a - b d), d = sqrt(kl): the gold reward of best-of-n."""
    d = np.sqrt(np.asarray(kl, dtype=float))
    return least_squares([d, -d * d], np.asarray(gain, dtype=float))
