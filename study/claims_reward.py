"""Claims of the paper's 4.2 and 4.2.1: which reward over-optimises at which learning rate and size."""

import math

import numpy as np

from study.arms import HIGH, TENTH, TWENTIETH, Study, lr_text
from study.settings import SIZES
from study.standing import (
    arms_text,
    best,
    every_over,
    golds,
    mean_change,
    percent,
    pm,
    points,
    some_better,
    standing,
    standings,
    win_rates,
)
from study.verdict import COMPARABLE, Claim, decide

# share of the arms where the entropy bonus tells whether they over-optimised
TELLS = 0.8  # from here on the claim holds,
TELLS_NOT = 0.6  # below this it does not


def kl_works(study: Study) -> Claim:
    arms = {size: study.kl_arms(size) for size in SIZES}
    found = [standings(study, size, arms[size]) for size in SIZES]
    return Claim(
        "KL-constrained RLHF is stable and effective at the high learning rate, at every scale",
        "4.2, Figures 3, 5, 12: 1e-6 is \"a regime where KL-constrained RLHF performs well\"; for 2.8B "
        "it \"remains stable and effective\" there, for 6.9B it \"remains stable ... while consuming "
        "only a small KL budget\".",
        "Holds if at every size some β gives a better gold reward than SFT without a fall; does not "
        "hold if at some size every β is over-optimised.",
        decide(all(map(some_better, found)), any(map(every_over, found))),
        ". ".join(arms_text(study, size, arms[size], "β") for size in SIZES),
        "reward_gold",
    )


def high_rate(study: Study) -> Claim:
    arms = {size: study.maxent_arms(size, HIGH) for size in SIZES}
    found = [s for size in SIZES for s in standings(study, size, arms[size])]
    return Claim(
        "At the high learning rate MaxEnt over-optimises at every scale, whatever the entropy coefficient",
        "4.2, Figures 1 and 10: at 1e-6 \"all models rapidly enter overoptimized regimes regardless of "
        "the entropy coefficient\".",
        "Holds if every coefficient at every size is over-optimised; does not hold if one is better "
        "than SFT without a fall.",
        decide(every_over(found), some_better(found)),
        ". ".join(arms_text(study, size, arms[size], "α") for size in SIZES),
        "1",
    )


def lower_rate(study: Study) -> Claim:
    gains = {}
    for size in SIZES:
        low = study.maxent_arms(size, TENTH)
        high = study.maxent_arms(size, HIGH)
        gains[size] = study.interval(np.mean([golds(low[coef]) - golds(high[coef]) for coef in low], axis=0))
    return Claim(
        "A lower learning rate makes MaxEnt more stable",
        "4.2: \"Lower learning rates improve stability\".",
        "Gold reward at a tenth of the learning rate minus that at the full one, mean over the "
        "coefficients. Holds if the interval is above 0 at every size; does not hold if it is below 0 "
        "at one.",
        decide(all(g[1] > 0 for g in gains.values()), any(g[2] < 0 for g in gains.values())),
        "; ".join(f"{size} {pm(g)}" for size, g in gains.items()),
        "gold_kl",
    )


def not_eliminated(study: Study) -> Claim:
    found = {}
    for size in SIZES:
        for lr, arms in study.maxent_by_lr(size).items():
            for coef, arm in arms.items() if lr < HIGH else ():
                found[f"{size} lr {lr_text(lr)} α = {coef:g}"] = standing(study, size, arm)
    over = [f"{name} ({s}: gold {pm(s.gain)}, fall {pm(s.drop)})" for name, s in found.items() if s.over]
    return Claim(
        "A lower learning rate does not fully eliminate over-optimisation",
        "4.2: lower learning rates \"do not fully eliminate this behavior\".",
        "Holds if some MaxEnt arm at a tenth or a twentieth of the learning rate is over-optimised; "
        "does not hold if all are better than SFT without a fall.",
        decide(bool(over), all(s.over is False for s in found.values())),
        f"over-optimised {len(over)} of {len(found)} arms (chance alone would show a fall in about one "
        "of 30): "
        + ("; ".join(over) or "none"),
        "2",
    )


def small_stable(study: Study) -> Claim:
    arms = study.maxent_arms("small", TENTH)
    found = [standing(study, "small", arm) for coef, arm in arms.items() if coef > 0]
    return Claim(
        "1B: at a tenth of the learning rate MaxEnt is stable and better than SFT",
        "4.2, Figure 1: at 1e-7 \"stable training and improved win rates relative to the SFT baseline\".",
        "Holds if some α > 0 is better than SFT without a fall; does not hold if every α > 0 is "
        "over-optimised. (The paper's coefficients are not in its text.)",
        decide(some_better(found), every_over(found)),
        arms_text(study, "small", arms, "α"),
        "1",
    )


def coefficient_zero(study: Study) -> Claim:
    arms = study.maxent_arms("small", TENTH)
    without = win_rates(arms[0.0])
    gains = {coef: study.interval(win_rates(arm) - without, "of the win rate")
             for coef, arm in arms.items() if coef > 0}
    return Claim(
        "1B: a coefficient of 0 does as well, so the gain is not the entropy's",
        "4.2, Figure 1: \"similar performance is achieved even when the entropy coefficient is set to "
        "zero\".",
        "Win rate at α > 0 minus that at α = 0. Holds if no α > 0 can be better by more than "
        f"{100 * COMPARABLE:.0f} points (upper end of the interval); does not hold if some α > 0 is "
        "better (lower end above 0).",
        decide(all(g[2] < COMPARABLE for g in gains.values()), any(g[1] > 0 for g in gains.values())),
        f"α = 0: win rate {percent(without.mean())}; difference in points: "
        + "; ".join(f"α = {coef:g} {points(g)}" for coef, g in gains.items()),
        "1",
    )


def bonus_text(name: str, changes: list[float]) -> str:
    mean = np.mean(changes) if changes else math.nan
    growing = sum(change > 0 for change in changes)
    return f"{name}: {growing} of {len(changes)} arms grow, mean change {mean:+.2f} nats per token"


def entropy_bonus_tells(study: Study) -> Claim:
    changes = {True: [], False: []}  # {over-optimised: change of the bonus of each arm}
    agree = []  # (coefficient, bonus grows exactly when over-optimised)
    for size in SIZES:
        for arms in study.maxent_by_lr(size).values():
            for coef, arm in arms.items():
                over = standing(study, size, arm).over
                if over is not None:
                    change = mean_change(arm, "length_normalized_surprisal")
                    changes[over].append(change)
                    agree.append((coef, (change > 0) == over))
    share = np.mean([right for _, right in agree])
    unpaid = [right for coef, right in agree if coef == 0]
    described = "; ".join([bonus_text("over-optimised", changes[True]), bonus_text("stable", changes[False])])
    return Claim(
        "The entropy bonus decays in stable runs and grows in over-optimised ones",
        "4.2, Figures 1, 2, 10, 11: \"stable runs exhibit decaying entropy bonuses, while "
        "overoptimized runs show increasing entropy bonuses\".",
        "Over all MaxEnt arms that are clearly one or the other: does the bonus without its "
        f"coefficient grow exactly when the arm is over-optimised? Holds from {percent(TELLS)} of the "
        f"arms on; does not hold below {percent(TELLS_NOT)}.",
        decide(share >= TELLS, share < TELLS_NOT),
        f"true of {percent(share)} of {len(agree)} arms. {described}. Among the arms with α = 0: true "
        f"of {sum(unpaid)} of {len(unpaid)}",
        "1",
        "With α = 0 nothing pays for entropy; with a large α it is paid for, over-optimised or not. "
        "The bonus tells what the reward pays, not whether it is hacked.",
    )


def medium_fails(study: Study) -> Claim:
    arms = {lr: study.maxent_arms("medium", lr) for lr in (TENTH, TWENTIETH)}
    found = [s for at_lr in arms.values() for s in standings(study, "medium", at_lr)]
    below = sum(s.gain[2] < 0 for s in found)
    above = sum(s.gain[1] > 0 for s in found)
    fell = sum(s.fell for s in found)
    described = [f"lr {lr_text(lr)}, {arms_text(study, 'medium', at_lr, 'α')}" for lr, at_lr in arms.items()]
    return Claim(
        "2.8B: even at low learning rates every MaxEnt variant over-optimises and fails to beat SFT",
        "4.2, Figure 2: at 1e-7 and 5e-8 \"all Maximum Entropy variants overoptimize and fail to "
        "outperform the SFT baseline\".",
        "Holds if every arm of the medium size at a tenth and a twentieth is over-optimised; does not "
        "hold if one is better than SFT without a fall.",
        decide(every_over(found), some_better(found)),
        f"of {len(found)} arms {below} ended below SFT and {above} above; {fell} fell from their peak. "
        + ". ".join(described),
        "2",
        "Nothing in this world makes the middle size special. In the paper 2.8B stands between two "
        "sizes that behave otherwise; a reward model that happens to be easier to exploit would "
        "explain that as well as scale, and the paper's text does not say that there was more than one.",
    )


def large_like_small(study: Study) -> Claim:
    low = study.maxent_arms("large", TENTH)
    high = study.maxent_arms("large", HIGH)
    at_tenth = [standing(study, "large", arm) for coef, arm in low.items() if coef > 0]
    at_full = standings(study, "large", high)
    holds = some_better(at_tenth) and every_over(at_full)
    fails = every_over(at_tenth) or some_better(at_full)
    return Claim(
        "6.9B: stable at a tenth of the learning rate, over-optimised at the full one, like 1B",
        "4.2, Figures 10 and 11.",
        "Holds if at the large size some α > 0 at a tenth is better than SFT without a fall and all at "
        "the full rate are over-optimised; does not hold if all α > 0 at a tenth are over-optimised or "
        "one at the full rate is better without a fall.",
        decide(holds, fails),
        f"lr {TENTH:g}, {arms_text(study, 'large', low, 'α')}. "
        f"lr {lr_text(HIGH)}, {arms_text(study, 'large', high, 'α')}",
        "11",
    )


def minent_small(study: Study) -> Claim:
    arms = study.minent_arms("small")
    kl_arms = study.kl_arms("small")
    kl = win_rates(kl_arms[best(kl_arms)])
    found = {coef: standing(study, "small", arm) for coef, arm in arms.items()}
    gaps = {coef: study.interval(win_rates(arm) - kl, "of the win rate") for coef, arm in arms.items()}
    competitive = any(found[coef].over is False and gaps[coef][0] > -COMPARABLE for coef in arms)
    return Claim(
        "1B: MinEnt prevents over-optimisation at the high learning rate and is competitive with KL",
        "4.2.1: it \"prevents overoptimization and achieves competitive performance with Pythia-1B "
        "even at the same learning rate used by KL-constrained RL\".",
        "Holds if some coefficient is better than SFT without a fall and its win rate is at most "
        f"{100 * COMPARABLE:.0f} points below that of the best β (mean); does not hold if every "
        "coefficient is over-optimised.",
        decide(competitive, every_over(list(found.values()))),
        f"{arms_text(study, 'small', arms, 'coefficient')}. Win rate minus that of the best β, in points: "
        + "; ".join(f"{coef:g} {points(gap)}" for coef, gap in gaps.items()),
        "reward_gold",
    )


def minent_medium(study: Study) -> Claim:
    arms = study.minent_arms("medium")
    found = standings(study, "medium", arms)
    over = sum(s.over is True for s in found)
    unclear = sum(s.over is None for s in found)
    return Claim(
        "2.8B: MinEnt is either too conservative or over-optimises",
        "4.2.1: \"either too conservative, stalling learning, or too loose, leading to overoptimization\".",
        "Holds if no coefficient at the medium size is better than SFT without a fall; does not hold "
        "if one is.",
        decide(not some_better(found), some_better(found)),
        f"{over} over-optimised, {unclear} not distinguishable from SFT. "
        + arms_text(study, "medium", arms, "coefficient"),
        "reward_gold",
    )
