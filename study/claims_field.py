"""Claims from the literature beside the paper's, judged by runs of the field (field.py): rules fixed
beforehand, with numbers.

Each rule comes to contrasts: one number per seed that is above 0 where the claim is right and below 0 where
it is wrong. The claim holds if every contrast is above 0 and does not hold if one is below 0, each beyond its
spread over the seeds (Student's t, two-sided 5 %), corrected for the number of claims (Holm) and of contrasts
that could have gone wrong (Bonferroni); otherwise, or where its premise is not met, it is not decided here.
All arms have their own learning rate (x1 of the grid): none was chosen by its results.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from evaluation.statistics import holm, t_interval, t_test
from study.frontier import Arm, at_points, equal_kl, falls, peaks, stacked
from study.questions import table
from study.standing import pm
from study.verdict import Claim, decide

MARGIN = 0.03  # gold: a smaller difference counts as none
SURE = 0.05  # corrected p from which on nothing is decided
LOSSES = ("dpo", "ipo", "hinge")  # direct alignment, as in Rafailov et al.
NO_LEVEL = "no KL of the list is reached by every run"


@dataclass(frozen=True)
class Found:
    contrasts: list[np.ndarray]  # (seeds,) each; empty: nothing can be said
    ours: str  # numbers


@dataclass(frozen=True)
class Rule:
    title: str
    source: str
    text: str
    reads: tuple[str, ...]  # the arms, in the order in which `measure` takes them
    measure: Callable[..., Found]


def end(arm: Arm, name: str) -> np.ndarray:
    """A column at the end of the runs, (seeds,)."""
    return stacked(arm, name)[:, -1]


def shown(values: np.ndarray, digits: int = 2) -> str:
    return pm(t_interval(values), digits)


def levels_text(levels: list[float]) -> str:
    return "KL " + ", ".join(f"{kl:g}" for kl in levels)


# --- what the rules measure


def kl_penalty(penalised: Arm, weak: Arm, free: Arm) -> Found:
    levels, gain = equal_kl(penalised, free)
    stopped = end(free, "kl") - end(penalised, "kl")
    if not levels:
        return Found([], NO_LEVEL)
    weak_levels, weak_gain = equal_kl(weak, free)
    also = f"; with 0.02 {shown(weak_gain)} at {levels_text(weak_levels)}" if weak_levels else ""
    return Found(
        [MARGIN - gain, stopped],
        f"gold with the penalty 0.1 minus without, at {levels_text(levels)}: {shown(gain)}{also}; KL at the "
        f"end, with it minus without: {shown(-stopped)}",
    )


def direct_alignment(*arms: Arm) -> Found:
    """arms: of each loss the small beta, its own, the large one."""
    each = np.stack([falls(arm) for arm in arms])  # (arms, seeds)
    names = [f"{loss} {beta}" for loss in LOSSES for beta in ("β/5", "β", "5 β")]
    parts = "; ".join(f"{name} {shown(fall)}" for name, fall in zip(names, each))
    middle = np.median(each, axis=0)
    return Found([middle - MARGIN], f"fall of gold from its peak: median {shown(middle)}; {parts}")


def chi_po(small_chi: Arm, chi: Arm, small_dpo: Arm, dpo: Arm) -> Found:
    of_chi = end(small_chi, "gold") - end(chi, "gold")
    of_dpo = end(small_dpo, "gold") - end(dpo, "gold")
    text = f"gold at β/5 minus gold at β: chi-PO {shown(of_chi)}, DPO {shown(of_dpo)}"
    if t_interval(of_dpo)[2] >= 0:
        return Found([], f"{text}: DPO does not fall beyond its spread, so there is nothing to hold against")
    return Found([of_chi - of_dpo], f"{text}; difference {shown(of_chi - of_dpo)}")


def online_offline(online: Arm, same_pairs: Arm, usual: Arm) -> Found:
    levels, gain = equal_kl(online, same_pairs)
    if not levels:
        return Found([], NO_LEVEL)
    usual_levels, other = equal_kl(online, usual)
    also = f"; minus DPO on 5,000 pairs {shown(other)} at {levels_text(usual_levels)}" if usual_levels else ""
    return Found([gain], f"gold of online DPO minus DPO at {levels_text(levels)}: {shown(gain)}{also}")


def ensembles(single: Arm, *combined: Arm) -> Found:
    fall = falls(single)
    if t_interval(fall)[1] <= 0:
        return Found([], f"with one reward model gold falls by {shown(fall)}: no peak to postpone")
    before = np.sqrt(at_points(single, "kl", peaks(single)))
    later = np.stack([np.sqrt(at_points(arm, "kl", peaks(arm))) - before for arm in combined])
    names = ("mean", "worst", "uncertainty-weighted", "averaged weights")
    parts = "; ".join(f"{name} {shown(value)}" for name, value in zip(names, later))
    return Found(
        [later.mean(0)],
        f"√KL of the peak with one {before.mean():.2f} (fall {shown(fall)}); minus that: {parts}; "
        f"mean {shown(later.mean(0))}",
    )


def whole_gradient(attached: Arm, detached: Arm) -> Found:
    longer = end(attached, "length") - end(detached, "length")
    parts = [f"{name} {shown(end(attached, key) - end(detached, key))}"
             for name, key in (("gold", "gold"), ("KL", "kl"))]
    return Found([longer], f"attached minus detached at the end: {shown(longer)} tokens, {', '.join(parts)}")


RULES = (
    Rule(
        "A KL penalty does not improve gold at equal KL, it only stops earlier",
        "Gao, Schulman and Hilton 2022 (arXiv 2210.10760): a penalty raised the proxy at a given KL, not the "
        "gold reward, and acted like stopping early; they say that it may depend on settings.",
        f"RLOO with the penalty 0.1 against none, three times the usual length. Contrasts: {MARGIN} minus "
        "the gain in gold at equal KL (mean over the KLs 0.25, 0.5, 1, 2, 3, 5, 10 that every run of both "
        "reaches); KL at the end without the penalty minus with it.",
        ("rloo_long", "weak", "free"), kl_penalty,
    ),
    Rule(
        "Direct alignment over-optimises before the end of one epoch",
        "Rafailov et al. 2024 (arXiv 2406.02900): DPO, IPO and SLiC deteriorate over a wide range of KL, "
        "often before one epoch is over.",
        "DPO, IPO and hinge, β times 1/5, 1 and 5, one epoch of 5,000 pairs: fall of gold from its peak "
        "(chosen by the other seeds) to the end of the epoch, median over the nine arms. Contrast: that "
        f"minus {MARGIN}.",
        tuple(f"{loss}{suffix}" for loss in LOSSES for suffix in ("_small_beta", "", "_large_beta")),
        direct_alignment,
    ),
    Rule(
        "chi-PO holds at a small β where DPO falls",
        "Huang et al. 2024 (arXiv 2407.13399), experiments on TL;DR over β and epochs.",
        "Gold at the end with β/5 minus with β (0.01 and 0.05). Premise: DPO falls (95 % interval below 0). "
        "Contrast: that change of chi-PO minus that of DPO.",
        ("chipo_small_beta", "chipo", "dpo_small_beta", "dpo"), chi_po,
    ),
    Rule(
        "Online beats offline at equal KL",
        "Tang et al. 2024 (arXiv 2405.08448): online methods are above offline ones over KL.",
        "Online DPO against DPO on the 20,000 pairs that the reward model has learnt from. Contrast: gold "
        "at equal KL, mean over the same list of KLs.",
        ("online_dpo", "dpo_all", "dpo"), online_offline,
    ),
    Rule(
        "Ensembles and averaged reward models postpone the peak",
        "Coste et al. 2023 (arXiv 2310.02743), Eisenstein et al. 2023 (2312.09244), WARM (2401.12187).",
        "RLOO without a KL term, three times the usual length, with one reward model or with three: mean, "
        "worst, uncertainty-weighted, averaged weights. Premise: with one, gold falls from its peak (95 % "
        "interval above 0). Contrast: √KL of the peak with three minus with one, mean over the four ways "
        "(a run that has not yet peaked counts with its end).",
        ("free", "free_mean", "free_min", "free_uwo", "free_warm"), ensembles,
    ),
    Rule(
        "Eq. 7 with its whole gradient learns longer responses than as a reward",
        "What eq. 7 drops when it is a reward is the gradient of -β E[1/|y|] (tests/test_rollout.py).",
        "MaxEnt with coefficient 1, `--attached` against not. Contrast: response tokens at the end, attached "
        "minus detached.",
        ("attached_1", "maxent_1"), whole_gradient,
    ),
)


# --- verdicts


def p_and_side(contrasts: list[np.ndarray]) -> tuple[float, bool]:
    """p of the claim's verdict, not yet corrected for the number of claims, and whether it would hold.

    To hold, all contrasts must be above 0: the largest p. Not to hold, any one below 0 is enough: the
    smallest p of those times the number of contrasts.
    """
    if not contrasts:
        return 1.0, False
    wrong = [t_test(values) for values in contrasts if values.mean() <= 0]
    if wrong:
        return min(1.0, min(wrong) * len(contrasts)), False
    return max(t_test(values) for values in contrasts), True


def measured(rule: Rule, field: dict[str, dict[str, Arm]]) -> Found:
    missing = [name for name in rule.reads if name not in field]
    if missing:
        return Found([], f"no runs of {', '.join(missing)}")
    return rule.measure(*(field[name]["x1"] for name in rule.reads))


def judge(field: dict[str, dict[str, Arm]]) -> list[Claim]:
    """field: {arm: {factor of its learning rate: its seeds}}"""
    found = [measured(rule, field) for rule in RULES]
    sides = [p_and_side(one.contrasts) for one in found]
    corrected = holm([p for p, _ in sides])
    claims = []
    for rule, one, p, (_, right) in zip(RULES, found, corrected, sides):
        verdict = decide(p < SURE and right, p < SURE and not right)
        ours = f"{one.ours}. Corrected p = {p:.2g}"
        claims.append(Claim(rule.title, rule.source, rule.text, verdict, ours))
    return claims


def claims_section(field: dict[str, dict[str, Arm]]) -> str:
    """Markdown."""
    claims = judge(field)
    rows = [[i, claim.title, f"**{claim.verdict}**"] for i, claim in enumerate(claims, 1)]
    parts = [
        "## Claims from the literature\n\n± is the half width of a 95 % interval over the seeds; a verdict "
        f"asks for p < {SURE:g} after Holm's correction for {len(claims)} claims. \"Equal KL\": gold where a "
        "run first comes to that KL. The rules: study/claims_field.py.\n",
        table(["", "claim", "verdict here"], rows),
    ]
    for i, claim in enumerate(claims, 1):
        parts.append(f"### {i}. {claim.title}\n\n*Source:* {claim.paper}\n\n*Rule:* {claim.rule}\n\n"
                     f"*Here:* {claim.ours}.\n\n**{claim.verdict}**\n")
    return "\n".join(parts)
