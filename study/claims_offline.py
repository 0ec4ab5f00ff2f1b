"""Claims of the paper's 4.3 and appendix B: SimPO and DPO."""

import math

import numpy as np

from study.arms import OFFLINE_HIGH, OFFLINE_LOW, Interval, Study, lr_text
from study.standing import (
    arms_text,
    change,
    golds,
    last,
    percent,
    pm,
    points,
    standing,
    standings,
    win_rates,
)
from study.verdict import COMPARABLE, Claim, decide

SIMPO_BETA = 2  # with which the reference's margins are compared with SimPO's
NARROW = 2  # width of the paper's own range of margins
TAIL = 0.05  # share of the batches left out on either side of that width
GO_TOGETHER = 0.5  # correlation: from here on the claim holds,
APART = 0.2  # below this it does not


def mean_text(mean: Interval) -> str:
    if mean[1] > 0:
        return "positive"
    return "negative" if mean[2] < 0 else "near 0"


def reference_margins(study: Study) -> Claim:
    arm = study.offline("dpo", OFFLINE_HIGH)
    sums = np.concatenate([run.metrics["ref_margin"] for run in arm])
    per_token = np.concatenate([run.metrics["ref_margin_mean"] for run in arm])
    batches = arm[0].metrics["ref_margin"]  # of one pass: the seeds differ in their order only
    mean = study.interval(batches, "nats per sequence")
    low, high = np.quantile(SIMPO_BETA * per_token, [TAIL, 1 - TAIL])
    width = high - low
    sum_low, sum_high = np.quantile(sums, [TAIL, 1 - TAIL])
    pairs = arm[0].config["batch_size"]
    tails = f"{100 * TAIL:.0f} % to {100 * (1 - TAIL):.0f} %"
    return Claim(
        "The reference's margins over a DPO batch are narrow and slightly negative, like a fixed margin",
        "4.3, Figure 4: the reference's term \"is typically negative but small\", and the margins "
        "\"lie within a relatively narrow range, consistent with the fixed margins commonly used\". "
        "(The term stands in DPO's reward with a minus sign; the text leaves open whether it is the "
        "ratio that Figure 4 plots or its negative.)",
        "Negative: the mean of log π_ref(y_w) - log π_ref(y_l), as plotted in Figure 4, over batches "
        f"has an interval below 0. Narrow: {tails} of the batch averages per token, times SimPO's β = "
        f"{SIMPO_BETA}, span less than the paper's own range of margins, {NARROW}. Holds if both, does "
        "not hold if one is clearly not so.",
        decide(mean[2] < 0 and width < NARROW, mean[1] > 0 or width > NARROW),
        f"mean {pm(mean)} nats per sequence, so the ratio is {mean_text(mean)}, and its negative the "
        f"opposite; batch averages {sum_low:+.1f} to {sum_high:+.1f} ({tails}); per token times "
        f"{SIMPO_BETA}: {low:+.2f} to {high:+.2f}, a width of {width:.2f}. The standard deviation of an "
        f"average of {pairs} pairs is {sums.std():.1f} nats, of a single pair therefore about "
        f"{sums.std() * math.sqrt(pairs):.0f}: what Figure 4 shows to be narrow is an average",
        "4",
        "In this world chosen and rejected are written by fallible people and not sampled from the "
        "reference, which has learnt from the better kind of summary.",
    )


def simpo_high(study: Study) -> Claim:
    arms = study.simpo_arms(OFFLINE_HIGH)
    found = standings(study, "small", arms)
    dpo = standing(study, "small", study.offline("dpo", OFFLINE_HIGH))
    return Claim(
        "At a learning rate that suits DPO, SimPO over-optimises for every margin",
        "Appendix B, Figure 8: at 1e-6 \"all SimPO models exhibit overoptimization regardless of the γ "
        "hyperparameter\".",
        "Holds if SimPO (β = 2) ends below SFT for every γ; does not hold if it ends above for one.",
        decide(all(s.gain[2] < 0 for s in found), any(s.gain[1] > 0 for s in found)),
        f"{arms_text(study, 'small', arms, 'γ')}. DPO: gold {pm(dpo.gain)}",
        "8",
    )


def slope(study: Study, gammas: list[float], values: np.ndarray, unit: str) -> Interval:
    """Slope on gamma of values (gammas, seeds): the interval over the seeds."""
    slopes = [np.polyfit(gammas, of_seed, 1)[0] for of_seed in values.T]
    return study.interval(slopes, f"{unit} per unit of γ")


def margin_worsens(study: Study) -> Claim:
    arms = study.simpo_arms(OFFLINE_HIGH)
    gold = np.array([golds(arm) for arm in arms.values()])  # (gammas, seeds)
    chosen = np.array([[last(run, "logps/chosen") for run in arm] for arm in arms.values()])
    slopes = {
        "gold": slope(study, list(arms), gold, "gold"),
        "log π(chosen)": slope(study, list(arms), chosen, "nats per sequence"),
    }
    return Claim(
        "At the high learning rate a larger margin makes it worse",
        "Appendix B: \"Increasing the margin exacerbates this issue\".",
        "Slope of the gold reward on γ over the five margins. Holds if the interval is below 0, does "
        "not hold if it is above.",
        decide(slopes["gold"][2] < 0, slopes["gold"][1] > 0),
        "; ".join(f"slope of {name} {pm(s, 3)} per unit of γ" for name, s in slopes.items()),
        "8",
    )


def simpo_low(study: Study) -> Claim:
    low = study.simpo_arms(OFFLINE_LOW)
    high = study.simpo_arms(OFFLINE_HIGH)
    gain = study.interval(np.mean([golds(low[gamma]) - golds(high[gamma]) for gamma in low], axis=0))
    found = standings(study, "small", low)
    holds = gain[1] > 0 and any(s.gain[1] > 0 for s in found)
    fails = gain[2] < 0 or all(s.gain[2] < 0 for s in found)
    return Claim(
        "At a low learning rate SimPO is a strong method",
        "Appendix B, Figures 6 and 7: \"when using a relatively low learning rate that allows for "
        "gradual updates, SimPO performs significantly better\".",
        "Holds if the gold reward (mean over γ) is higher than at the high rate and some γ ends above "
        "SFT; does not hold if it is lower, or every γ ends below SFT.",
        decide(holds, fails),
        f"low minus high: {pm(gain)}. {arms_text(study, 'small', low, 'γ')}",
        "6",
    )


def likelihoods_fall(study: Study) -> Claim:
    runs = study.arm("small", "train_simpo", loss="simpo")
    moved = np.array([change(run, "logps/chosen") for run in runs])
    r = np.corrcoef(moved, golds(runs))[0, 1]
    return Claim(
        "Extreme falls of the likelihoods go with over-optimisation",
        "4.3 and appendix B: \"We observe the characteristic extreme likelihood decreases, which "
        "correlate with overoptimization\".",
        "Correlation, over all SimPO runs, of the change of log π(chosen) with the final gold reward. "
        f"Holds from {GO_TOGETHER:g} on, does not hold below {APART:g}.",
        decide(r >= GO_TOGETHER, r < APART),
        f"r = {r:.2f} over {len(runs)} runs; the change runs from {moved.min():.0f} to "
        f"{moved.max():+.0f} nats per sequence",
        "8",
    )


def zero_margin(study: Study) -> Claim:
    dpo_arms = [study.offline("dpo", lr) for lr in (OFFLINE_HIGH, OFFLINE_LOW)]
    dpo = max(dpo_arms, key=lambda arm: golds(arm).mean())
    gap = study.interval(win_rates(study.simpo_arms(OFFLINE_LOW)[0.0]) - win_rates(dpo), "of the win rate")
    return Claim(
        "SimPO without a margin can do as well as DPO",
        "Appendix B, citing the SimPO paper: \"methods such as SimPO can achieve performance "
        "comparable to DPO even with a target margin of γ = 0\".",
        "Win rate of SimPO (γ = 0, low rate) minus that of DPO at its better rate. Holds if the mean "
        f"is above -{100 * COMPARABLE:.0f} points; does not hold if the interval is below that.",
        decide(gap[0] > -COMPARABLE, gap[2] < -COMPARABLE),
        f"difference {points(gap)} points; DPO at {lr_text(dpo[0].config['lr'])} wins "
        f"{percent(win_rates(dpo).mean())}",
        "6",
    )
