"""Claims from the literature, by made-up runs in which each holds and in which each does not."""

import numpy as np
import pytest
from test_field import arm

from evaluation.statistics import t_test
from study import claims_field
from study.claims_field import RULES, judge, p_and_side
from study.field import ARMS, EVERYTHING
from study.frontier import Course

FELL = dict(end=0.45, peak=0.7, kl=9.0)  # past its peak, below the SFT model
CASES = {  # rule: what makes it hold; what makes it not hold; the rest of the field decides nothing
    "A KL penalty": (
        dict(rloo_long=arm(0.7, kl=1.2), free=arm(0.9, kl=5.76), weak=arm(0.8, kl=3)),
        dict(rloo_long=arm(0.9, kl=1.2), free=arm(0.6, kl=9), weak=arm(0.8, kl=3)),
    ),
    "Direct alignment": (
        {name: arm(0.6, peak=0.7 + i / 200) for i, name in enumerate(RULES[1].reads)},
        {name: arm(0.7 + i / 200) for i, name in enumerate(RULES[1].reads)},
    ),
    "chi-PO": (
        dict(chipo_small_beta=arm(0.72), chipo=arm(0.73), dpo_small_beta=arm(0.4), dpo=arm(0.7)),
        dict(chipo_small_beta=arm(0.2), chipo=arm(0.73), dpo_small_beta=arm(0.6), dpo=arm(0.7)),
    ),
    "Online beats": (
        dict(online_dpo=arm(0.9, kl=4), dpo_all=arm(0.7, kl=4), dpo=arm(0.6, kl=4)),
        dict(online_dpo=arm(0.65, kl=4), dpo_all=arm(0.7, kl=4), dpo=arm(0.6, kl=4)),
    ),
    "Ensembles": (
        {"free": arm(**FELL, at=0.25)} | {name: arm(**FELL, at=0.75) for name in RULES[4].reads[1:]},
        {"free": arm(**FELL, at=0.75)} | {name: arm(**FELL, at=0.25) for name in RULES[4].reads[1:]},
    ),
    "Eq. 7": (
        dict(attached_1=arm(0.6, length=12), maxent_1=arm(0.6, length=10)),
        dict(attached_1=arm(0.6, length=9), maxent_1=arm(0.6, length=10)),
    ),
}


def verdicts(arms: dict[str, list[Course]]) -> dict[str, str]:
    claims = judge({name: {"x1": found} for name, found in arms.items()})
    return {claim.title: claim.verdict for claim in claims}


@pytest.mark.parametrize("start", CASES)
def test_each_claim_holds_and_does_not(start):
    """A rule whose arms are not there is not decided, and the others count in the correction."""
    for arms, verdict in zip(CASES[start], ("holds", "does not hold")):
        found = verdicts(arms)
        decided = [title for title, said in found.items() if said != "not decided here"]
        assert [(title[: len(start)], found[title]) for title in decided] == [(start, verdict)], start


def test_all_claims_at_once():
    for side, verdict in enumerate(("holds", "does not hold")):
        arms = {name: found for case in CASES.values() for name, found in case[side].items()}
        arms |= {name: found for name, found in CASES["Direct alignment"][side].items() if name != "dpo"}
        assert list(verdicts(arms).values()).count(verdict) >= 5


def test_what_is_within_the_spread_is_not_decided():
    """Direct alignment falls by as much as counts as none: at less, its claim would not hold."""
    arms = {name: arm(end=0.6 + 1e-4 * i, noise=0.1) for i, name in enumerate(EVERYTHING)}
    margin = claims_field.MARGIN
    arms |= {name: arm(0.6 + 1e-4 * i, 0.6 + margin, noise=0.02) for i, name in enumerate(RULES[1].reads)}
    assert set(verdicts(arms).values()) == {"not decided here"}


def test_premises():
    """DPO that does not fall, one reward model that does not over-optimise, KLs that are not reached, and a
    single seed."""
    stays = dict(chipo_small_beta=arm(0.9), chipo=arm(0.7), dpo_small_beta=arm(0.75), dpo=arm(0.7))
    rises = {"free": arm(0.8)} | {name: arm(0.9, kl=9) for name in RULES[4].reads[1:]}
    short = dict(online_dpo=arm(0.9, kl=0.1), dpo_all=arm(0.7), dpo=arm(0.6))
    one = {name: found[:1] for name, found in CASES["Ensembles"][0].items()}
    for arms in (stays, rises, short, one):
        assert set(verdicts(arms).values()) == {"not decided here"}


def test_the_rules_read_arms_of_the_plan():
    assert {name for rule in RULES for name in rule.reads} <= set(EVERYTHING)
    assert set(ARMS) <= {name for rule in RULES for name in rule.reads}
    for claim in judge({}):
        assert claim.verdict == "not decided here" and claim.ours.startswith("no runs of ")


def test_the_section_of_claims():
    arms = CASES["Ensembles"][0]
    text = claims_field.claims_section({name: {"x1": found} for name, found in arms.items()})
    assert "| 5 | Ensembles and averaged reward models postpone the peak | **holds** |" in text
    assert text.count("**not decided here**") == 2 * 5


def test_p_of_a_claim_with_two_contrasts():
    sure, unsure = np.array([0.1, 0.11, 0.12, 0.1]), np.array([0.1, -0.05, 0.12, 0.1])
    assert p_and_side([sure, unsure]) == (t_test(unsure), True)
    assert p_and_side([sure, -unsure]) == (pytest.approx(2 * t_test(unsure)), False)
    assert p_and_side([-sure, -unsure]) == (pytest.approx(2 * t_test(sure)), False)
    assert p_and_side([]) == (1.0, False)
