"""How sure a win rate is, by hand and in simulations; ROUGE against its package; n-grams by hand."""

import math
import random
import sys

import pytest
import torch

from evaluation.statistics import (
    by_length,
    length_controlled,
    paired_bootstrap,
    position_bias,
    wilson,
    win_rate,
)
from rlhf.summaries import distinct, novelty, repetition, rouge_rows, text_means, text_rows

torch.set_num_threads(1)


# --- how sure


def test_wilson_by_hand_and_its_coverage():
    low, high = wilson(0.3, 10)  # (0.3 + 1.92 / 10 +- 1.96 sqrt(0.021 + 0.0096)) / (1 + 3.84 / 10)
    z = 1.959963984540054
    half = z * math.sqrt(0.3 * 0.7 / 10 + z * z / 400)
    assert low == pytest.approx((0.3 + z * z / 20 - half) / (1 + z * z / 10))
    assert high == pytest.approx((0.3 + z * z / 20 + half) / (1 + z * z / 10))
    assert wilson(0.0, 50)[0] == 0
    assert wilson(1.0, 50)[1] == 1
    wins = torch.distributions.Binomial(200, torch.tensor(0.35)).sample((4000,)) / 200
    intervals = [wilson(w, 200) for w in wins.tolist()]
    inside = sum(low <= 0.35 <= high for low, high in intervals)
    assert 0.94 < inside / 4000 < 0.965


def test_paired_bootstrap_covers_and_sees_what_two_intervals_do_not():
    hits = narrower = 0
    truth = true_difference()
    for trial in range(300):
        hard = torch.rand(150)  # what is hard for one is hard for the other
        a = (hard + 0.3 * torch.randn(150) > 0.6).double()
        b = (hard + 0.3 * torch.randn(150) > 0.5).double()
        found = paired_bootstrap(a.tolist(), b.tolist(), resamples=400, seed=trial)
        hits += found["difference_low"] <= truth <= found["difference_high"]
        alone = [wilson(x.mean().item(), 150) for x in (a, b)]
        independent = math.hypot(*(high - low for low, high in alone))
        narrower += found["difference_high"] - found["difference_low"] < independent
    assert 0.91 < hits / 300 < 0.985
    assert narrower > 290
    assert paired_bootstrap([0.0, 1.0], [0.0, 1.0])["p_better"] == 0.5
    assert paired_bootstrap([0.0, math.nan, 1.0], [1.0, 1.0, math.nan])["paired"] == 1
    assert paired_bootstrap([math.nan], [1.0])["difference"] is None


def true_difference() -> float:
    g = torch.Generator().manual_seed(5)
    hard = torch.rand(2_000_000, generator=g)
    noise = 0.3 * torch.randn(2_000_000, generator=g)
    return ((hard + noise > 0.5).double().mean() - (hard + noise > 0.6).double().mean()).item()


def simulated(
    n: int, skill: float, effect: float, mean_difference: float,
) -> tuple[list[float], list[int], list[int]]:
    """Preferences of a judge that likes length: logit P(win) = skill + effect tanh((own - human) / 10)."""
    human = torch.randint(20, 40, (n,))
    own = (human + mean_difference + 10 * torch.randn(n)).round().clamp(min=1).long()
    p = (skill + effect * torch.tanh((own - human) / 10)).sigmoid()
    return (torch.rand(n) < p).double().tolist(), own.tolist(), human.tolist()


def test_length_control_takes_the_advantage_of_length_away():
    preferences, own, human = simulated(4000, skill=-0.5, effect=2.0, mean_difference=10)
    controlled = length_controlled(preferences, own, human)
    fair = 1 / (1 + math.exp(0.5))
    assert win_rate(preferences)["win_rate"] > 0.55
    assert controlled["lc_win_rate"] == pytest.approx(fair, abs=0.04)
    assert controlled["length_effect"] > 1
    swapped = length_controlled([1 - p for p in preferences], human, own)
    assert swapped["lc_win_rate"] == pytest.approx(1 - controlled["lc_win_rate"], abs=1e-9)
    assert swapped["lc_win_rate_low"] == pytest.approx(1 - controlled["lc_win_rate_high"], abs=1e-9)
    assert swapped["length_effect"] == pytest.approx(controlled["length_effect"], abs=1e-9)
    hits = 0
    for _ in range(400):
        found = length_controlled(*simulated(200, skill=-0.5, effect=1.0, mean_difference=0))
        hits += found["lc_win_rate_low"] <= fair <= found["lc_win_rate_high"]
    assert 0.92 < hits / 400 < 0.98
    same = length_controlled([1.0, 0.0, 0.0, 0.0] * 25, [9] * 100, [9] * 100)  # nothing to control for
    assert same["lc_win_rate"] == pytest.approx(0.25, abs=1e-3)
    assert same["length_effect"] == 0
    won = length_controlled([1.0] * 50, list(range(50)), [9] * 50)
    assert won["lc_win_rate"] > 0.98 > won["lc_win_rate_low"]
    assert length_controlled([math.nan], [1], [2])["lc_win_rate"] is None


def test_length_control_says_where_it_extrapolates():
    def extrapolated(own: list[int], human: list[int], preferences: tuple = (1.0, 0.0)) -> bool | None:
        return length_controlled(list(preferences), own, human)["lc_extrapolated"]

    for own, human in (([15, 15], [10, 10]), ([10, 10], [15, 15]), ([5, 25], [10, 10])):
        assert extrapolated(own, human) is True
    for own, human in (([14, 14], [10, 10]), ([10, 10], [14, 14]), ([5, 15], [10, 10])):
        assert extrapolated(own, human) is False
    assert extrapolated([10, 99], [10, 10], (1.0, math.nan)) is False  # what was not judged is not fitted
    assert extrapolated([10], [10], (math.nan,)) is None


def test_win_rate_buckets_and_position():
    rate = win_rate([1.0, 0.0, 0.5, math.nan])
    assert rate["win_rate"] == 0.5
    assert rate["ties"] == pytest.approx(1 / 3)
    assert (rate["judged"], rate["unjudged"]) == (3, 1)
    assert win_rate([math.nan])["win_rate"] is None
    buckets = by_length([1.0, 1.0, 0.0, 0.5, 0.0], [4, 5, 10, 20, 30], [10] * 5)
    assert [b["judged"] for b in buckets] == [1, 1, 1, 0, 2]
    assert buckets[4]["win_rate"] == 0.25
    assert buckets[3]["win_rate"] is None
    bias = position_bias([["A", "A"], ["A", "B"], ["unread", "A"], ["tie", "tie"], []])
    assert bias["first_share"] == 0.8
    assert bias["consistent"] == pytest.approx(2 / 3)
    assert (bias["unread"], bias["answers"]) == (1, 8)


# --- text


def test_rouge_is_the_packages_on_1000_pairs():
    reason = "rouge_score is not installed: ROUGE is not tested"
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason=reason)
    rng = random.Random(0)
    words = "the a dog Dog's ran, running home. 3 times; don't é über".split()
    texts = [" ".join(rng.choices(words, k=rng.randint(0, 25))) for _ in range(2000)]
    first = texts[:1000]
    second = texts[1000:]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    ours = rouge_rows(first, second)
    for row, a, b in zip(ours, first, second, strict=True):
        scores = scorer.score(target=a, prediction=b)
        assert row == {name: score.fmeasure for name, score in scores.items()}
    means = text_means(text_rows(first, first, second), second)
    assert means["rougeL"] == pytest.approx(sum(row["rougeL"] for row in ours) / 1000)


def test_counts_of_ngrams_by_hand(monkeypatch):
    assert repetition("a b c a b c") == pytest.approx(1 - 3 / 4)  # abc bca cab abc
    assert repetition("a b") == 0
    assert repetition("A a a a") == 0.5
    assert novelty("the dog ran home", "The dog ran away") == pytest.approx(1 / 3)
    assert distinct(["a b", "a c"], 1) == 3 / 4
    assert distinct(["a b", "a b"], 2) == 0.5
    assert distinct([""], 1) == 0
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    assert "rougeL" not in text_means(text_rows(["p"], ["r"], ["s"]), ["s"])
