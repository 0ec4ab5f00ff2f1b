"""Claims of the paper's 4.2 about the KL divergence: to the reference and between updates, and the clip
range."""

import math

import numpy as np

from study.arms import HIGH, TENTH, Interval, Study, lr_text
from study.logs import RunLog
from study.settings import SIZES
from study.standing import (
    WINDOW,
    best,
    every_over,
    last,
    mean_last,
    percent,
    pm,
    some_better,
    standing,
)
from study.verdict import Claim, decide

PLATEAU = 0.25  # share of the final KL gained in the second half: below this it grows slowly at the end,
STRAIGHT = 0.4  # above this it does not
LINEAR = 0.95  # R² of a straight line: from here on a curve is linear,
BENT = 0.9  # below this it is not
GROWS = 0.8  # share of the MaxEnt arms whose drift grows: from here on the claim holds,
GROWS_NOT = 0.2  # below this it does not
USUAL_CLIP = 0.2
TIGHT_CLIPS = (1e-2, 1e-4)
CLIP_ALPHA = 0.1  # entropy coefficient of the arms with a tight clip range


def kl_plateaus(study: Study) -> Claim:
    shares = []
    described = []
    for size in SIZES:
        arms = study.kl_arms(size)
        coef = best(arms)
        curves = [run.metrics["kl_full"] for run in arms[coef]]
        half = len(curves[0]) // 2
        middle = np.array([curve[half - WINDOW : half].mean() for curve in curves])  # (seeds,)
        end = np.array([last(run, "kl_full") for run in arms[coef]])  # (seeds,)
        shares.append(study.interval((end - middle) / end, "of the final KL"))
        described.append(f"{size} β = {coef:g}: KL {middle.mean():.2f} at half time, "
                         f"{end.mean():.2f} at the end (share {pm(shares[-1])})")
    return Claim(
        "Well-tuned KL-constrained runs: the KL to the reference grows at first, then slowly",
        "4.2 and Figures 3, 5: \"an initial growth phase followed by slow KL increase\".",
        "At the β with the best gold reward, the share of the final KL (in full, nats per sequence) "
        "that is gained in the second half of the updates: 0.5 would be a straight line. Holds if the "
        f"mean is below {PLATEAU:g} at every size, does not hold if it is above {STRAIGHT:g} at one.",
        decide(all(s[0] < PLATEAU for s in shares), any(s[0] > STRAIGHT for s in shares)),
        "; ".join(described),
        "3 12",
    )


def maxent_kl_linear(study: Study) -> Claim:
    fits = []
    described = []
    for size in ("small", "large"):
        for coef, arm in study.maxent_arms(size, TENTH).items():
            curve = np.mean([run.metrics["kl_full"] for run in arm], axis=0)
            r2 = np.corrcoef(np.arange(len(curve)), curve)[0, 1] ** 2
            fits.append(r2)
            begin = curve[:WINDOW].mean()
            end = curve[-WINDOW:].mean()
            described.append(f"{size} α = {coef:g}: R² {r2:.3f}, KL {begin:.2f} to {end:.2f}")
    return Claim(
        "MaxEnt at a tenth of the learning rate: the KL grows about linearly",
        "4.2, Figures 3, 5, 11: \"For Pythia 1B and 6.9B, KL divergence grows approximately linearly without "
        "immediate collapse\".",
        f"R² of a straight line through the seeds' mean KL over updates. Holds if at least {LINEAR:g} "
        f"for every arm; does not hold if below {BENT:g} for most. (The learning rate falls linearly to "
        "0 here, and by TRL's default presumably there, which bends every curve towards the end.)",
        decide(all(r2 >= LINEAR for r2 in fits), np.mean([r2 < BENT for r2 in fits]) > 0.5),
        "; ".join(described),
        "5 11",
        "The learning rate decays to 0, and a curve that is linear at a constant rate bends under it.",
    )


# --- between updates


def drift_growth(study: Study, arm: list[RunLog]) -> Interval:
    """KL between updates (TRL's approxkl_avg): third quarter of the updates over the second, log of the
    ratio.

    Not the first, where Adam's steps are the largest.
    """
    quarter = len(arm[0].metrics["step"]) // 4
    ratios = []
    for run in arm:
        drift = run.metrics["kl_prev/approxkl_avg"]
        third = drift[2 * quarter : 3 * quarter].mean()
        ratios.append(np.log(third / drift[quarter : 2 * quarter].mean()))
    return study.interval(ratios, "log ratio of the KL between updates")


def ratio_text(intervals: dict[str, Interval]) -> str:
    parts = []
    for name, interval in intervals.items():
        mean, low, high = map(math.exp, interval)
        parts.append(f"{name} x {mean:.2f} ({low:.2f} to {high:.2f})")
    return "; ".join(parts)


DRIFT = (
    "KL between updates (k2 over sequences, averaged over the passes): mean of the third quarter of "
    "the updates over that of the second. The learning rate falls linearly, which by itself would give "
    "about (3/8 / 5/8)² = 0.36. "
)


def kl_drift_bounded(study: Study) -> Claim:
    found = {}
    for size in SIZES:
        for coef, arm in study.kl_arms(size).items():
            found[f"{size} β = {coef:g}"] = drift_growth(study, arm)
    return Claim(
        "KL-constrained runs keep the KL between updates bounded, even with a weak constraint",
        "4.2, Figures 3 and 12: \"PPO reliably maintains bounded KL updates between successive "
        "policies, even in regimes that eventually overoptimize\".",
        f"{DRIFT}Holds if no β grows (no interval above 1) and the means are below 1; does not hold if "
        "some β grows.",
        decide(all(log[0] < 0 for log in found.values()), any(log[1] > 0 for log in found.values())),
        ratio_text(found),
        "3",
    )


def maxent_drift_grows(study: Study) -> Claim:
    found = {}
    for size in SIZES:
        for lr, arms in study.maxent_by_lr(size).items():
            for coef, arm in arms.items():
                found[f"{size} lr {lr_text(lr)} α = {coef:g}"] = drift_growth(study, arm)
    growing = np.mean([log[0] > 0 for log in found.values()])
    return Claim(
        "MaxEnt runs show a growing KL between updates, even those that behave well at first",
        "4.2, Figures 3, 10, 11: \"Maximum Entropy runs consistently exhibit increasing KL drift "
        "between updates\".",
        f"{DRIFT}Holds if the mean grows in at least {percent(GROWS)} of the MaxEnt arms, does not hold "
        f"if in less than {percent(GROWS_NOT)}.",
        decide(growing >= GROWS, growing < GROWS_NOT),
        ratio_text(found),
        "10",
        "Adam's steps do not grow with the gradient, and the learning rate decays to 0. What could "
        "remain of the claim is relative: compare the ratios with those of the KL-constrained arms "
        "above.",
    )


def clipping(study: Study) -> Claim:
    tight = []
    described = []
    for lr in (HIGH, TENTH):
        for clip in (USUAL_CLIP, *TIGHT_CLIPS):
            arm = study.ablation("medium", CLIP_ALPHA, lr, clip)
            s = standing(study, "medium", arm)
            if clip in TIGHT_CLIPS and lr == HIGH:
                tight.append(s)
            clipped = np.mean([run.metrics["clipfrac"].mean() for run in arm])
            described.append(
                f"lr {lr_text(lr)}, clip {clip:g}: gold {pm(s.gain)}, fall {pm(s.drop)} ({s}), "
                f"KL {mean_last(arm, 'kl_full'):.2f}, clipped {percent(clipped)}, "
                f"drift x {math.exp(drift_growth(study, arm)[0]):.2f}"
            )
    return Claim(
        "A tighter clip range does not prevent over-optimisation",
        "4.2: \"for Pythia 2.8B, we experimented with clipping ranges as small as 1e-4, yet still "
        "observed increasing KL drift and eventual overoptimization\".",
        f"At the medium size, α = {CLIP_ALPHA:g}, high learning rate (the paper does not say which of "
        "its rates): holds if it is over-optimised at both tighter clip ranges; does not hold if at "
        "one of them it is better than SFT without a fall.",
        decide(every_over(tight), some_better(tight)),
        "; ".join(described),
        "",
        "Clipping zeroes the gradient of a sequence once its ratio has left the range, so with several "
        "passes a tight range leaves little of them but the first: it acts like a lower learning rate.",
    )
