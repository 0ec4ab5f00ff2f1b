"""The paper's claims as functions of the runs of runs/study.sh (study.py). results.py writes what they return into RESULTS.md.

Each claim is a function: its rule stands in its text, and `decide` turns the rule into a verdict.
"""

import math
from dataclasses import dataclass

import numpy as np

from study.arms import rate
from study.logs import RunLog, by_setting, select
from evaluation.statistics import t_interval
from study.standing import (
    HIGH,
    OFFLINE_HIGH,
    OFFLINE_LOW,
    SIZES,
    TENTH,
    TWENTIETH,
    WINDOW,
    Study,
    arms_text,
    best,
    change,
    golds,
    kl_arms,
    last,
    maxent,
    minent,
    percent,
    pm,
    rates,
    standing,
    win_rates,
)

COMPARABLE = 0.03  # win rates closer than this are called equal
HOLDS, FAILS, OPEN = "holds", "does not hold", "not decided here"


def decide(holds: bool, fails: bool) -> str:
    return HOLDS if holds else FAILS if fails else OPEN


@dataclass(frozen=True)
class Claim:
    title: str  # what the paper says
    paper: str  # where, and on what evidence
    rule: str  # when it holds, when it does not
    verdict: str
    ours: str  # numbers
    figures: str = ""  # names of the pictures that show it, separated by spaces
    reason: str = ""  # if it does not hold: what may explain it


# --- the claims, in the paper's order


def kl_works(study: Study) -> Claim:
    arms = {size: kl_arms(study, size) for size in SIZES}
    good = {size: any(standing(study, size, arm).over is False for arm in arms[size].values()) for size in SIZES}
    bad = {size: all(standing(study, size, arm).over is True for arm in arms[size].values()) for size in SIZES}
    return Claim(
        "KL-constrained RLHF is stable and effective at the high learning rate, at every scale",
        "4.2, Figures 3, 5, 12: 1e-6 is \"a regime where KL-constrained RLHF performs well\"; for 2.8B it \"remains stable and effective\" there, for "
        "6.9B it \"remains stable ... while consuming only a small KL budget\".",
        "Holds if at every size some β gives a better gold reward than SFT without a fall; does not hold if at some size every β is over-optimised.",
        decide(all(good.values()), any(bad.values())),
        ". ".join(arms_text(study, size, arms[size], "β") for size in SIZES), "reward_gold")


def high_rate(study: Study) -> Claim:
    arms = {size: maxent(study, size, HIGH) for size in SIZES}
    over = [standing(study, size, arm).over for size in SIZES for arm in arms[size].values()]
    return Claim(
        "At the high learning rate MaxEnt over-optimises at every scale, whatever the entropy coefficient",
        "4.2, Figures 1 and 10: at 1e-6 \"all models rapidly enter overoptimized regimes regardless of the entropy coefficient\".",
        "Holds if every coefficient at every size is over-optimised; does not hold if one is better than SFT without a fall.",
        decide(all(o is True for o in over), any(o is False for o in over)),
        ". ".join(arms_text(study, size, arms[size], "α") for size in SIZES), "1")


def lower_rate(study: Study) -> Claim:
    gains = {}
    for size in SIZES:
        low, high = maxent(study, size, TENTH), maxent(study, size, HIGH)
        gains[size] = t_interval(np.mean([golds(low[coef]) - golds(high[coef]) for coef in low], axis=0))
    return Claim(
        "A lower learning rate makes MaxEnt more stable",
        "4.2: \"Lower learning rates improve stability\".",
        "Gold reward at a tenth of the learning rate minus that at the full one, mean over the coefficients. Holds if the interval is above 0 at every "
        "size; does not hold if it is below 0 at one.",
        decide(all(g[1] > 0 for g in gains.values()), any(g[2] < 0 for g in gains.values())),
        "; ".join(f"{size} {pm(g)}" for size, g in gains.items()), "gold_kl")


def not_eliminated(study: Study) -> Claim:
    found, clean, tested = [], True, 0
    for size in SIZES:
        for lr, arms in rates(study, size).items():
            for coef, arm in arms.items() if lr < HIGH else ():
                s, tested = standing(study, size, arm), tested + 1
                clean = clean and s.over is False
                if s.over:
                    found.append(f"{size} lr {rate(lr)} α = {coef:g} ({s}: gold {pm(s.gain)}, fall {pm(s.drop)})")
    return Claim(
        "A lower learning rate does not fully eliminate over-optimisation",
        "4.2: lower learning rates \"do not fully eliminate this behavior\".",
        "Holds if some MaxEnt arm at a tenth or a twentieth of the learning rate is over-optimised; does not hold if all are better than SFT without a fall.",
        decide(bool(found), clean), f"over-optimised {len(found)} of {tested} arms (chance alone would show a fall in about one of 30): "
        + ("; ".join(found) or "none"), "2")


def small_stable(study: Study) -> Claim:
    arms = maxent(study, "small", TENTH)
    over = [standing(study, "small", arm).over for coef, arm in arms.items() if coef > 0]
    return Claim(
        "1B: at a tenth of the learning rate MaxEnt is stable and better than SFT",
        "4.2, Figure 1: at 1e-7 \"stable training and improved win rates relative to the SFT baseline\".",
        "Holds if some α > 0 is better than SFT without a fall; does not hold if every α > 0 is over-optimised. (The paper's coefficients are not in its "
        "text.)",
        decide(any(o is False for o in over), all(o is True for o in over)), arms_text(study, "small", arms, "α"), "1")


def coefficient_zero(study: Study) -> Claim:
    arms = maxent(study, "small", TENTH)
    gains = {coef: t_interval(win_rates(arm) - win_rates(arms[0.0])) for coef, arm in arms.items() if coef > 0}
    return Claim(
        "1B: a coefficient of 0 does as well, so the gain is not the entropy's",
        "4.2, Figure 1: \"similar performance is achieved even when the entropy coefficient is set to zero\".",
        f"Win rate at α > 0 minus that at α = 0. Holds if no α > 0 can be better by more than {100 * COMPARABLE:.0f} points (upper end of the interval); "
        "does not hold if some α > 0 is better (lower end above 0).",
        decide(all(g[2] < COMPARABLE for g in gains.values()), any(g[1] > 0 for g in gains.values())),
        f"α = 0: win rate {percent(win_rates(arms[0.0]))}; difference in points: "
        + "; ".join(f"α = {coef:g} {pm(tuple(100 * x for x in g), 1)}" for coef, g in gains.items()), "1")


def entropy_bonus_tells(study: Study) -> Claim:
    rows = []  # (coefficient, over-optimised, change of the bonus)
    for size in SIZES:
        for arms in rates(study, size).values():
            for coef, arm in arms.items():
                if (over := standing(study, size, arm).over) is not None:
                    rows.append((coef, over, np.mean([change(r, "length_normalized_surprisal") for r in arm])))
    agree = [(moved > 0) == over for _, over, moved in rows]
    share, zero = np.mean(agree), [a for a, (coef, *_) in zip(agree, rows) if coef == 0]
    groups = {name: [m for c, o, m in rows if o == flag] for name, flag in (("over-optimised", True), ("stable", False))}
    described = "; ".join(f"{name}: {sum(m > 0 for m in g)} of {len(g)} arms grow, mean change {np.mean(g) if g else math.nan:+.2f} nats per token"
                          for name, g in groups.items())
    return Claim(
        "The entropy bonus decays in stable runs and grows in over-optimised ones",
        "4.2, Figures 1, 2, 10, 11: \"stable runs exhibit decaying entropy bonuses, while overoptimized runs show increasing entropy bonuses\".",
        "Over all MaxEnt arms that are clearly one or the other: does the bonus without its coefficient grow exactly when the arm is over-optimised? "
        "Holds from 80 % of the arms on; does not hold below 60 %.",
        decide(share >= 0.8, share < 0.6),
        f"true of {100 * share:.0f} % of {len(rows)} arms. {described}. Among the arms with α = 0: true of {sum(zero)} of {len(zero)}", "1",
        "With α = 0 nothing pays for entropy; with a large α it is paid for, over-optimised or not. The bonus tells what the reward pays, not whether it "
        "is hacked.")


def medium_fails(study: Study) -> Claim:
    arms = {lr: maxent(study, "medium", lr) for lr in (TENTH, TWENTIETH)}
    found = [standing(study, "medium", arm) for group in arms.values() for arm in group.values()]
    over = [s.over for s in found]
    return Claim(
        "2.8B: even at low learning rates every MaxEnt variant over-optimises and fails to beat SFT",
        "4.2, Figure 2: at 1e-7 and 5e-8 \"all Maximum Entropy variants overoptimize and fail to outperform the SFT baseline\".",
        "Holds if every arm of the medium size at a tenth and a twentieth is over-optimised; does not hold if one is better than SFT without a fall.",
        decide(all(o is True for o in over), any(o is False for o in over)),
        f"of {len(found)} arms {sum(s.gain[2] < 0 for s in found)} ended below SFT and {sum(s.gain[1] > 0 for s in found)} above; {sum(s.fell for s in found)} "
        "fell from their peak. " + ". ".join(f"lr {rate(lr)}, " + arms_text(study, "medium", group, "α") for lr, group in arms.items()), "2",
        "Nothing in this world makes the middle size special. In the paper 2.8B stands between two sizes that behave otherwise; a reward model that "
        "happens to be easier to exploit would explain that as well as scale, and the paper's text does not say that there was more than one.")


def large_like_small(study: Study) -> Claim:
    low, high = maxent(study, "large", TENTH), maxent(study, "large", HIGH)
    stable = [standing(study, "large", arm).over for coef, arm in low.items() if coef > 0]
    broken = [standing(study, "large", arm).over for arm in high.values()]
    return Claim(
        "6.9B: stable at a tenth of the learning rate, over-optimised at the full one, like 1B",
        "4.2, Figures 10 and 11.",
        "Holds if at the large size some α > 0 at a tenth is better than SFT without a fall and all at the full rate are over-optimised; does not hold "
        "if all α > 0 at a tenth are over-optimised or one at the full rate is better without a fall.",
        decide(any(o is False for o in stable) and all(o is True for o in broken), all(o is True for o in stable) or any(o is False for o in broken)),
        f"lr {TENTH:g}, " + arms_text(study, "large", low, "α") + f". lr {rate(HIGH)}, " + arms_text(study, "large", high, "α"), "11")


def kl_plateaus(study: Study) -> Claim:
    shares, text = [], []
    for size in SIZES:
        arms = kl_arms(study, size)
        coef = best(arms)
        half = len(arms[coef][0].metrics["kl_full"]) // 2
        ends = np.array([[run.metrics["kl_full"][half - WINDOW : half].mean(), last(run, "kl_full")] for run in arms[coef]])  # (seeds, 2)
        shares.append(t_interval((ends[:, 1] - ends[:, 0]) / ends[:, 1]))
        text.append(f"{size} β = {coef:g}: KL {ends[:, 0].mean():.2f} at half time, {ends[:, 1].mean():.2f} at the end (share {pm(shares[-1])})")
    return Claim(
        "Well-tuned KL-constrained runs: the KL to the reference grows at first, then slowly",
        "4.2 and Figures 3, 5: \"an initial growth phase followed by slow KL increase\".",
        "At the β with the best gold reward, the share of the final KL (in full, nats per sequence) that is gained in the second half of the updates: "
        "0.5 would be a straight line. Holds if the mean is below 0.25 at every size, does not hold if it is above 0.4 at one.",
        decide(all(s[0] < 0.25 for s in shares), any(s[0] > 0.4 for s in shares)), "; ".join(text), "3 12")


def maxent_kl_linear(study: Study) -> Claim:
    fits, text = [], []
    for size in ("small", "large"):
        for coef, arm in maxent(study, size, TENTH).items():
            curve = np.mean([run.metrics["kl_full"] for run in arm], axis=0)
            step = np.arange(len(curve))
            r2 = np.corrcoef(step, curve)[0, 1] ** 2
            fits.append(r2)
            text.append(f"{size} α = {coef:g}: R² {r2:.3f}, KL {curve[:WINDOW].mean():.2f} to {curve[-WINDOW:].mean():.2f}")
    return Claim(
        "MaxEnt at a tenth of the learning rate: the KL grows about linearly",
        "4.2, Figures 3, 5, 11: \"For Pythia 1B and 6.9B, KL divergence grows approximately linearly without immediate collapse\".",
        "R² of a straight line through the seeds' mean KL over updates. Holds if at least 0.95 for every arm; does not hold if below 0.9 for most. (The "
        "learning rate falls linearly to 0 here, and by TRL's default presumably there, which bends every curve towards the end.)",
        decide(all(f >= 0.95 for f in fits), np.mean([f < 0.9 for f in fits]) > 0.5), "; ".join(text), "5 11",
        "The learning rate decays to 0, and a curve that is linear at a constant rate bends under it.")


def drift_growth(arm: list[RunLog]) -> tuple[float, float, float]:
    """KL between updates (TRL's approxkl_avg): third quarter of the updates over the second, log of the ratio. Not the first, where
    Adam's steps are the largest."""
    quarter = len(arm[0].metrics["step"]) // 4
    ratio = [np.log(run.metrics["kl_prev/approxkl_avg"][2 * quarter : 3 * quarter].mean() / run.metrics["kl_prev/approxkl_avg"][quarter : 2 * quarter].mean())
             for run in arm]
    return t_interval(ratio)


def ratio_text(intervals: dict[str, tuple[float, float, float]]) -> str:
    return "; ".join(f"{name} x {math.exp(m):.2f} ({math.exp(low):.2f} to {math.exp(high):.2f})" for name, (m, low, high) in intervals.items())


DRIFT = ("KL between updates (k2 over sequences, averaged over the passes): mean of the third quarter of the updates over that of the second. "
         "The learning rate falls linearly, which by itself would give about (3/8 / 5/8)² = 0.36. ")


def kl_drift_bounded(study: Study) -> Claim:
    found = {f"{size} β = {coef:g}": drift_growth(arm) for size in SIZES for coef, arm in kl_arms(study, size).items()}
    return Claim(
        "KL-constrained runs keep the KL between updates bounded, even with a weak constraint",
        "4.2, Figures 3 and 12: \"PPO reliably maintains bounded KL updates between successive policies, even in regimes that eventually overoptimize\".",
        DRIFT + "Holds if no β grows (no interval above 1) and the means are below 1; does not hold if some β grows.",
        decide(all(f[0] < 0 for f in found.values()), any(f[1] > 0 for f in found.values())), ratio_text(found), "3")


def maxent_drift_grows(study: Study) -> Claim:
    found = {f"{size} lr {rate(lr)} α = {coef:g}": drift_growth(arm)
             for size in SIZES for lr, arms in rates(study, size).items() for coef, arm in arms.items()}
    return Claim(
        "MaxEnt runs show a growing KL between updates, even those that behave well at first",
        "4.2, Figures 3, 10, 11: \"Maximum Entropy runs consistently exhibit increasing KL drift between updates\".",
        DRIFT + "Holds if the mean grows in at least 80 % of the MaxEnt arms, does not hold if in less than 20 %.",
        decide(np.mean([f[0] > 0 for f in found.values()]) >= 0.8, np.mean([f[0] > 0 for f in found.values()]) < 0.2), ratio_text(found), "10",
        "Adam's steps do not grow with the gradient, and the learning rate decays to 0. What could remain of the claim is relative: compare the ratios with "
        "those of the KL-constrained arms above.")


def clipping(study: Study) -> Claim:
    over, text = [], []
    for lr, clip in ((lr, clip) for lr in (HIGH, TENTH) for clip in (0.2, 1e-2, 1e-4)):
        arm = study.ablation("medium", 0.1, lr, clip)
        s = standing(study, "medium", arm)
        over += [s.over] if clip < 0.2 and lr == HIGH else []
        text.append(f"lr {rate(lr)}, clip {clip:g}: gold {pm(s.gain)}, fall {pm(s.drop)} ({s}), KL {np.mean([last(r, 'kl_full') for r in arm]):.2f}, "
                    f"clipped {np.mean([r.metrics['clipfrac'].mean() for r in arm]) * 100:.0f} %, drift x {math.exp(drift_growth(arm)[0]):.2f}")
    return Claim(
        "A tighter clip range does not prevent over-optimisation",
        "4.2: \"for Pythia 2.8B, we experimented with clipping ranges as small as 1e-4, yet still observed increasing KL drift and eventual "
        "overoptimization\".",
        "At the medium size, α = 0.1, high learning rate (the paper does not say which of its rates): holds if it is over-optimised at both tighter clip "
        "ranges; does not hold if at one of them it is better than SFT without a fall.",
        decide(all(o is True for o in over), any(o is False for o in over)), "; ".join(text), "",
        "Clipping zeroes the gradient of a sequence once its ratio has left the range, so with several passes a tight range leaves little of them but "
        "the first: it acts like a lower learning rate.")


def minent_small(study: Study) -> Claim:
    arms = minent(study, "small")
    kl = kl_arms(study, "small")[best(kl_arms(study, "small"))]
    rows = {coef: (standing(study, "small", arm).over, t_interval(win_rates(arm) - win_rates(kl))) for coef, arm in arms.items()}
    return Claim(
        "1B: MinEnt prevents over-optimisation at the high learning rate and is competitive with KL",
        "4.2.1: it \"prevents overoptimization and achieves competitive performance with Pythia-1B even at the same learning rate used by KL-constrained RL\".",
        f"Holds if some coefficient is better than SFT without a fall and its win rate is at most {100 * COMPARABLE:.0f} points below that of the best β "
        "(mean); does not hold if every coefficient is over-optimised.",
        decide(any(o is False and d[0] > -COMPARABLE for o, d in rows.values()), all(o is True for o, _ in rows.values())),
        arms_text(study, "small", arms, "coefficient") + ". Win rate minus that of the best β, in points: "
        + "; ".join(f"{coef:g} {pm(tuple(100 * x for x in d), 1)}" for coef, (_, d) in rows.items()), "reward_gold")


def minent_medium(study: Study) -> Claim:
    arms = minent(study, "medium")
    over = [standing(study, "medium", arm).over for arm in arms.values()]
    return Claim(
        "2.8B: MinEnt is either too conservative or over-optimises",
        "4.2.1: \"either too conservative, stalling learning, or too loose, leading to overoptimization\".",
        "Holds if no coefficient at the medium size is better than SFT without a fall; does not hold if one is.",
        decide(all(o is not False for o in over), any(o is False for o in over)),
        f"{sum(o is True for o in over)} over-optimised, {sum(o is None for o in over)} not distinguishable from SFT. "
        f"" + arms_text(study, "medium", arms, "coefficient"),
        "reward_gold")


def reference_margins(study: Study) -> Claim:
    arm = study.offline("dpo", OFFLINE_HIGH)
    margins, per_token = (np.concatenate([run.metrics[key] for run in arm]) for key in ("ref_margin", "ref_margin_mean"))
    mean = t_interval(arm[0].metrics["ref_margin"])  # over the batches of one pass: the seeds differ in their order only
    low, high = np.quantile(2 * per_token, [0.05, 0.95])
    pairs = arm[0].config["batch_size"]
    return Claim(
        "The reference's margins over a DPO batch are narrow and slightly negative, like a fixed margin",
        "4.3, Figure 4: the reference's term \"is typically negative but small\", and the margins \"lie within a relatively narrow range, consistent "
        "with the fixed margins commonly used\". (The term stands in DPO's reward with a minus sign; the text leaves open whether it is the ratio that "
        "Figure 4 plots or its negative.)",
        "Negative: the mean of log π_ref(y_w) - log π_ref(y_l), as plotted in Figure 4, over batches has an interval below 0. Narrow: 5 % to 95 % of the "
        "batch averages per token, times SimPO's β = 2, span less than the paper's own range of margins, 2. Holds if both, does not hold if one is "
        "clearly not so.",
        decide(mean[2] < 0 and high - low < 2, mean[1] > 0 or high - low > 2),
        f"mean {pm(mean)} nats per sequence, so the ratio is {'positive' if mean[1] > 0 else 'negative' if mean[2] < 0 else 'near 0'}, and its negative "
        f"the opposite; batch averages {np.quantile(margins, 0.05):+.1f} to {np.quantile(margins, 0.95):+.1f} (5 % to 95 %); per token times 2: "
        f"{low:+.2f} to {high:+.2f}, a width of {high - low:.2f}. The standard deviation of an average of {pairs} pairs is {margins.std():.1f} nats, of a "
        "single pair therefore about "
        f"{margins.std() * math.sqrt(pairs):.0f}: what Figure 4 shows to be narrow is an average", "4",
        "In this world chosen and rejected are written by fallible people and not sampled from the reference, which has learnt from the better kind of "
        "summary.")


def simpo_arms(study: Study, lr: float, beta: float = 2.0) -> dict[float, list[RunLog]]:
    return by_setting(study.offline("simpo", lr, beta=beta), "gamma")


def simpo_high(study: Study) -> Claim:
    arms = simpo_arms(study, OFFLINE_HIGH)
    gains = [standing(study, "small", arm).gain for arm in arms.values()]
    dpo = standing(study, "small", study.offline("dpo", OFFLINE_HIGH))
    return Claim(
        "At a learning rate that suits DPO, SimPO over-optimises for every margin",
        "Appendix B, Figure 8: at 1e-6 \"all SimPO models exhibit overoptimization regardless of the γ hyperparameter\".",
        "Holds if SimPO (β = 2) ends below SFT for every γ; does not hold if it ends above for one.",
        decide(all(g[2] < 0 for g in gains), any(g[1] > 0 for g in gains)),
        arms_text(study, "small", arms, "γ") + f". DPO: gold {pm(dpo.gain)}", "8")


def margin_worsens(study: Study) -> Claim:
    arms = simpo_arms(study, OFFLINE_HIGH)
    slopes = {name: t_interval([np.polyfit(list(arms), [values(arm)[s] for arm in arms.values()], 1)[0] for s in range(len(arms[0.0]))])
              for name, values in (("gold", golds), ("log π(chosen)", lambda arm: np.array([last(r, "logps/chosen") for r in arm])))}
    return Claim(
        "At the high learning rate a larger margin makes it worse",
        "Appendix B: \"Increasing the margin exacerbates this issue\".",
        "Slope of the gold reward on γ over the five margins. Holds if the interval is below 0, does not hold if it is above.",
        decide(slopes["gold"][2] < 0, slopes["gold"][1] > 0),
        "; ".join(f"slope of {name} {pm(s, 3)} per unit of γ" for name, s in slopes.items()), "8")


def simpo_low(study: Study) -> Claim:
    low, high = simpo_arms(study, OFFLINE_LOW), simpo_arms(study, OFFLINE_HIGH)
    gain = t_interval(np.mean([golds(a) - golds(b) for a, b in zip(low.values(), high.values())], axis=0))
    above = [standing(study, "small", arm).gain for arm in low.values()]
    return Claim(
        "At a low learning rate SimPO is a strong method",
        "Appendix B, Figures 6 and 7: \"when using a relatively low learning rate that allows for gradual updates, SimPO performs significantly better\".",
        "Holds if the gold reward (mean over γ) is higher than at the high rate and some γ ends above SFT; does not hold if it is lower, or every γ ends "
        "below SFT.",
        decide(gain[1] > 0 and any(g[1] > 0 for g in above), gain[2] < 0 or all(g[2] < 0 for g in above)),
        f"low minus high: {pm(gain)}. " + arms_text(study, "small", low, "γ"), "6")


def likelihoods_fall(study: Study) -> Claim:
    runs = select(study.folders["small"], "train_simpo", loss="simpo")
    fall, gold = np.array([change(run, "logps/chosen") for run in runs]), np.array([run.evaluation["gold"] for run in runs])
    r = np.corrcoef(fall, gold)[0, 1]
    return Claim(
        "Extreme falls of the likelihoods go with over-optimisation",
        "4.3 and appendix B: \"We observe the characteristic extreme likelihood decreases, which correlate with overoptimization\".",
        "Correlation, over all SimPO runs, of the change of log π(chosen) with the final gold reward. Holds from 0.5 on, does not hold below 0.2.",
        decide(r >= 0.5, r < 0.2), f"r = {r:.2f} over {len(runs)} runs; the change runs from {fall.min():.0f} to {fall.max():+.0f} nats per sequence", "8")


def zero_margin(study: Study) -> Claim:
    dpo = max((study.offline("dpo", lr) for lr in (OFFLINE_HIGH, OFFLINE_LOW)), key=lambda arm: golds(arm).mean())
    gap = t_interval(win_rates(simpo_arms(study, OFFLINE_LOW)[0.0]) - win_rates(dpo))
    return Claim(
        "SimPO without a margin can do as well as DPO",
        "Appendix B, citing the SimPO paper: \"methods such as SimPO can achieve performance comparable to DPO even with a target margin of γ = 0\".",
        f"Win rate of SimPO (γ = 0, low rate) minus that of DPO at its better rate. Holds if the mean is above -{100 * COMPARABLE:.0f} points; does not "
        "hold if the interval is below that.",
        decide(gap[0] > -COMPARABLE, gap[2] < -COMPARABLE), f"difference {pm(tuple(100 * x for x in gap), 1)} points; DPO at {rate(dpo[0].config['lr'])} wins "
        f"{percent(win_rates(dpo))}", "6")


CLAIMS = (kl_works, high_rate, lower_rate, not_eliminated, small_stable, coefficient_zero, entropy_bonus_tells, medium_fails, large_like_small, kl_plateaus,
          maxent_kl_linear, kl_drift_bounded, maxent_drift_grows, clipping, minent_small, minent_medium, reference_margins, simpo_high, margin_worsens,
          simpo_low, likelihoods_fall, zero_margin)
