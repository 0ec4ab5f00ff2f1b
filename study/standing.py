"""The arms of the study and how they stand: what claims.py judges and results.py writes down.

An ARM is one setting; its runs differ in the seed, and seed s has its own reward model, prompts and samples. `t_interval` is the 95 % interval of Student's
t over the seeds; two arms are compared seed by seed.
"""

import math
from dataclasses import dataclass

import numpy as np

from study.arms import by_rate, constrained, need, rate
from rlhf.config import UserError
from study.logs import RunLog, select
from evaluation.statistics import t_interval

SIZES = {"small": "1B", "medium": "2.8B", "large": "6.9B"}  # what each stands for
HIGH, TENTH, TWENTIETH = 3e-4, 3e-5, 1.5e-5  # learning rates of RLOO: for the paper's 1e-6, 1e-7, 5e-8
OFFLINE_HIGH, OFFLINE_LOW = 3e-4, 6e-5  # of SimPO and DPO: for the paper's 1e-6, 2e-7
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


# --- arms


@dataclass(frozen=True)
class Study:
    folders: dict[str, list[RunLog]]  # {size: its runs}

    def ablation(self, size: str, coef: float, lr: float, clip: float = 0.2, fill: float | None = None) -> list[RunLog]:
        """A MaxEnt arm (eq. 7) at a clip range, with or without filled padding."""
        return self.arm(size, "train_rloo", reward="maxent_length", entropy_coef=coef, lr=lr, clip=clip, invalid_logprob_fill=fill)

    def offline(self, loss: str, lr: float, **settings) -> list[RunLog]:
        return self.arm("small", "train_simpo", loss=loss, lr=lr, **settings)

    def arm(self, size: str, script: str, **settings) -> list[RunLog]:
        runs = sorted(select(self.folders[size], script, **settings), key=lambda run: run.config["seed"])
        if not runs:
            raise UserError(f"the study has no run of {script} with {settings} in {size}: finish it with runs/study.sh")
        return runs

    def sft(self, size: str) -> dict:
        return self.arm(size, "train_sft")[0].evaluation


def golds(arm: list[RunLog]) -> np.ndarray:
    """Gold reward of the final model per seed: 500 validation posts, sampled at the training temperature."""
    return np.array([run.evaluation["gold"] for run in arm])


def win_rates(arm: list[RunLog]) -> np.ndarray:
    return np.array([run.win_rate for run in arm])


def drops(arm: list[RunLog]) -> np.ndarray:
    """How far the gold reward of the samples fell from its peak to the end, per seed. The peak is where the mean of the OTHER seeds is highest, so that the
    highest of many noisy numbers is not taken for a peak."""
    curves = np.stack([smoothed(run.metrics["gold"]) for run in arm])  # (seeds, n)
    peaks = [np.delete(curves, s, axis=0).mean(0).argmax() if len(arm) > 1 else curves[s].argmax() for s in range(len(arm))]
    return np.array([curve[peak] - curve[-1] for curve, peak in zip(curves, peaks)])


@dataclass(frozen=True)
class Standing:
    gain: tuple[float, float, float]  # gold reward above the SFT model's: mean, interval
    drop: tuple[float, float, float]  # fall of gold from its peak, same; nan for the offline methods

    @property
    def fell(self) -> bool:
        return self.drop[1] > 0

    @property
    def over(self) -> bool | None:
        """Over-optimised: the gold reward ended below the SFT model's, or fell from its peak. False only if it ended above and no fall was seen."""
        if self.gain[2] < 0 or self.fell:
            return True
        return False if self.gain[1] > 0 else None

    def __str__(self) -> str:
        if self.over:
            return "over-optimised: below SFT" if self.gain[2] < 0 else "over-optimised: past its peak"
        return "not distinguishable from SFT" if self.over is None else "better than SFT, no fall seen"


def standing(study: Study, size: str, arm: list[RunLog]) -> Standing:
    drop = t_interval(drops(arm)) if "gold" in arm[0].metrics else (math.nan,) * 3
    return Standing(t_interval(golds(arm) - study.sft(size)["gold"]), drop)


def rates(study: Study, size: str) -> dict[float, dict[float, list[RunLog]]]:
    """{learning rate, from high to low: {entropy coefficient: arm}}, MaxEnt (eq. 7)."""
    return by_rate(study.folders[size])


def maxent(study: Study, size: str, lr: float) -> dict[float, list[RunLog]]:
    """The MaxEnt arms of a learning rate, by coefficient."""
    return need(rates(study, size).get(lr), size, f"train_rloo with reward=maxent_length, lr={rate(lr)}")


def minent(study: Study, size: str) -> dict[float, list[RunLog]]:
    return need(by_rate(study.folders[size], "minent_length").get(HIGH), size, f"train_rloo with reward=minent_length, lr={rate(HIGH)}")


def kl_arms(study: Study, size: str) -> dict[float, list[RunLog]]:
    """The KL-constrained arms, by coefficient; all at the high learning rate."""
    return need(constrained(study.folders[size]), size, "train_rloo with reward=kl")


def best(arms: dict[float, list[RunLog]]) -> float:
    """The coefficient whose arm has the highest gold reward."""
    return max(arms, key=lambda coef: golds(arms[coef]).mean())


# --- words


def pm(interval: tuple[float, float, float], digits: int = 2) -> str:
    mean, _, high = interval
    return f"{mean:+.{digits}f} ± {high - mean:.{digits}f}"


def percent(values: np.ndarray) -> str:
    return f"{100 * values.mean():.0f} %"


def arms_text(study: Study, size: str, arms: dict[float, list[RunLog]], symbol: str) -> str:
    """`α = 0.1: gold +0.10 ± 0.02, fall +0.01 ± 0.02, win rate 40 % (better than SFT, no fall seen)` for each arm."""
    parts = []
    for coef, arm in arms.items():
        s = standing(study, size, arm)
        fall = f", fall {pm(s.drop)}" if not math.isnan(s.drop[0]) else ""
        parts.append(f"{symbol} = {coef:g}: gold {pm(s.gain)}{fall}, win rate {percent(win_rates(arm))} ({s})")
    return f"{size} (SFT gold {study.sft(size)['gold']:.2f}, win rate {study.sft(size)['win_rate'] * 100:.0f} %): " + "; ".join(parts)
