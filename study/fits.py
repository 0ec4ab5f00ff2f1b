"""Curves of the gold reward over the KL divergence: the two shapes of Gao et al. 2022 (arXiv 2210.10760)."""

import numpy as np


def least_squares(features: list[np.ndarray], target: np.ndarray) -> tuple[float, float, float]:
    """The two coefficients, and the share of the variance they explain."""
    features = np.stack(features, 1)
    coefs = np.linalg.lstsq(features, target, rcond=None)[0]
    return *map(float, coefs), float(1 - ((features @ coefs - target) ** 2).sum() / ((target - target.mean()) ** 2).sum())


def gao_fit(kl, gain) -> tuple[float, float, float]:
    """a, b and R² of gain = d (a - b log d), d = sqrt(kl): the gold reward under RL of Gao et al. 2022 (arXiv 2210.10760). Points without KL say nothing."""
    kl, gain = np.asarray(kl, dtype=float), np.asarray(gain, dtype=float)
    d = np.sqrt(kl[kl > 0])
    return least_squares([d, -d * np.log(d)], gain[kl > 0])


def best_of_n_fit(kl, gain) -> tuple[float, float, float]:
    """a, b and R² of gain = d (a - b d), d = sqrt(kl): the gold reward of best-of-n of Gao et al. 2022."""
    d = np.sqrt(np.asarray(kl, dtype=float))
    return least_squares([d, -d * d], np.asarray(gain, dtype=float))
