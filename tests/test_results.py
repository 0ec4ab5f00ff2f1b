"""Verdicts follow from the runs: two made-up studies, one in which everything is as the paper says and one
in which nothing is, judged by the same rules."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evaluation.statistics import t_interval
from rlhf.config import UserError
from study import claims, early_warning, questions, results
from study.arms import GAMMAS, HIGH, OFFLINE_HIGH, OFFLINE_LOW, TENTH, TWENTIETH, Study
from study.claims import CLAIMS
from study.logs import RunLog, find_runs, select
from study.settings import SIZES
from study.standing import Standing, drops, smoothed

UPDATES = 64
SEEDS = (1, 2, 3)
SFT = 0.3  # gold reward of the SFT model
MAXENT = {"reward": "maxent_length", "coefficient": 0.1}
USUAL = {"lr": HIGH, "clip": 0.2, "invalid_logprob_fill": None}


def noise(*key) -> np.random.Generator:
    return np.random.default_rng(list(repr(key).encode()))


def rloo(
    size: str, seed: int, *, end: float, peak: float | None = None, bonus: float = 0.0, linear: bool = True,
    drift: float = 0.5, **config,
) -> RunLog:
    """Gold from SFT's to `end` by way of `peak`; the entropy bonus changes by `bonus`; KL linear or flat
    after a quarter; drift: third quarter over second."""
    config = {**MAXENT, **USUAL, "seed": seed, **config}
    random = noise(size, seed, config)
    t = np.arange(UPDATES) / (UPDATES - 1)
    middle = (SFT + end) / 2 if peak is None else peak
    gold = np.interp(t, [0, 0.5, 1], [SFT, middle, end])
    quarters = np.repeat([1.0, 1.0, drift, drift / 2], UPDATES // 4)
    broken = end < SFT
    metrics = {
        "step": np.arange(1, UPDATES + 1),
        "gold": gold + 0.005 * random.normal(size=UPDATES),
        "scores": 0.4 * t,
        "clipfrac": 0.1 + 0 * t,
        "scores_std": 0.3 + 0.01 * random.normal(size=UPDATES),
        "kl_full": 3 * (t if linear else np.minimum(t, 0.25)),
        "kl_prev/approxkl_avg": quarters * 0.01 * np.exp(0.02 * random.normal(size=UPDATES)),
        "kl_prev/k3": quarters * 0.01,
        "length_normalized_surprisal": 1 + bonus * t,
        "response_length": 10 + 5 * t * broken,
        "eos_share": 1 - 0.2 * t * broken,
        "entropy": 0.3 - 0.1 * t,
        "grad_norm": 1 + 0.1 * random.normal(size=UPDATES),
        "rm_std": 0.2 + 0.3 * t * broken,
        "gold_agreement": 0.7 - 0.3 * t * broken,
    }
    evaluation = {
        "gold": end + 0.005 * random.normal(),
        "win_rate": 0.3 + end / 3 + 0.001 * random.normal(),
        "kl_full": 3.0,
        "entropy": 1.0,
    }
    return RunLog(Path(size), "train_rloo", config, metrics, {"greedy/gold": 0.5}, evaluation)


def offline(seed: int, end: float, fall: float, margin: float = -0.1, **config) -> RunLog:
    random = noise(seed, config)
    t = np.linspace(0, 1, 40)
    metrics = {
        "logps/chosen": -18 + fall * t,
        "ref_margin": 5 * margin + 0.1 * random.normal(size=40),
        "ref_margin_mean": margin + 0.05 * random.normal(size=40),
    }
    gold = end + 0.005 * random.normal()
    evaluation = {"gold": gold, "win_rate": 0.3 + end / 3, "kl_full": 2.0, "entropy": 0.9}
    config = {"seed": seed, "batch_size": 32, **config}
    return RunLog(Path("small"), "train_simpo", config, metrics, {"greedy/gold": 0.5}, evaluation)


GOOD = {"end": 0.45, "bonus": -0.2}
BAD = {"end": -0.2, "peak": 0.35, "bonus": 0.5}


def rloo_runs(paper: bool, size: str, seed: int) -> list[RunLog]:
    """All RLOO runs of a size and seed; paper: as the paper says, otherwise the opposite."""
    runs = []

    def add(shape: dict, **settings):
        runs.append(rloo(size, seed, **{"drift": 1.5 if paper else 0.3, "linear": True, **shape}, **settings))

    medium = size == "medium"
    for beta in (0.5, 0.2, 0.05):
        shape = {**(GOOD if paper else BAD), "linear": not paper, "drift": 0.4 if paper else 1.5}
        add(shape, reward="kl", coefficient=beta)
    for coef in (0.0, 0.1, 1.0):
        add(BAD if paper else {**GOOD, "bonus": 0.5}, coefficient=coef, lr=HIGH)
        if paper:
            low = {**BAD, "end": 0.1} if medium else GOOD
        else:  # entropy is what brings the gain
            better = 0.3 * coef - 0.3 * (coef == 0)
            low = GOOD if medium else {**BAD, "bonus": -0.2, "end": -0.5 + better}
        for lr in (TENTH,) if size == "large" else (TENTH, TWENTIETH):
            add({**low, "linear": paper}, coefficient=coef, lr=lr)
    for clip in (1e-2, 1e-4):
        for lr in (HIGH, TENTH):
            add(BAD if paper else GOOD, clip=clip, lr=lr)
    for coef in (0.1, 1.0):
        add(GOOD if paper == (size == "small") else BAD, reward="minent_length", coefficient=coef)
        for lr in (HIGH, TENTH):
            add(BAD, coefficient=coef, lr=lr, invalid_logprob_fill=1.0)
    return runs


def offline_runs(paper: bool, seed: int) -> list[RunLog]:
    runs = []
    for lr in (OFFLINE_HIGH, OFFLINE_LOW):
        bad = (lr == OFFLINE_HIGH) == paper
        fall = (-20 if bad else -3) * (1 if paper else -1)
        slope = (-0.1 if bad else 0.0) if paper else 0.05
        for gamma in GAMMAS:
            end = (0.1 if bad else 0.45) + gamma * slope
            for beta in (2.0, 0.1):
                runs.append(offline(seed, end, fall, loss="simpo", lr=lr, gamma=gamma, beta=beta))
        margin = -0.1 if paper else 0.5
        runs.append(offline(seed, 0.45, -5, margin, loss="dpo", lr=lr, gamma=None, beta=0.05))
        runs.append(offline(seed, 0.4, -5, loss="dpo_length", lr=lr, gamma=0.0, beta=2.0))
    return runs


def study(paper: bool) -> Study:
    """paper: all as the paper says; otherwise the opposite throughout."""
    sft = {"gold": SFT, "win_rate": 0.4, "gold_reference": 0.57}
    folders = {}
    for size in SIZES:
        folders[size] = [RunLog(Path(size), "train_sft", {"seed": 1}, {}, {"greedy/gold": 0.5}, sft)]
        for seed in SEEDS:
            folders[size] += rloo_runs(paper, size, seed)
            folders[size] += offline_runs(paper, seed) if size == "small" else []
    return Study(folders)


def calm() -> Study:
    """Every RLOO run gets better and stays so: what the opposite world cannot be, where the paper's stable
    runs break."""
    folders = {}
    for size, runs in study(True).folders.items():
        better = [rloo(size, **GOOD, **run.config) for run in select_rloo(runs)]
        folders[size] = better + select(runs, "train_sft")
    return Study(folders)


def select_rloo(runs: list[RunLog]) -> list[RunLog]:
    return select(runs, "train_rloo")


@pytest.fixture(scope="module")
def worlds() -> dict[bool, Study]:
    return {paper: study(paper) for paper in (True, False)}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.__name__)
def test_a_claim_holds_where_it_is_so_and_fails_where_it_is_not(worlds, claim):
    assert claim(worlds[True]).verdict == "holds"
    opposite = calm() if claim is claims.not_eliminated else worlds[False]
    assert claim(opposite).verdict == "does not hold"


RULES = [  # claim, the constant that it compares with, another value, how the rule names it
    ("entropy_bonus_tells", "claims_reward.TELLS", 1.5, "150 %"),
    ("kl_plateaus", "claims_kl.PLATEAU", -9.0, "below -9 "),
    ("maxent_kl_linear", "claims_kl.LINEAR", 1.5, "least 1.5 "),
    ("maxent_drift_grows", "claims_kl.GROWS", 1.5, "150 %"),
    ("reference_margins", "claims_offline.NARROW", 0.01, "margins, 0.01"),
    ("likelihoods_fall", "claims_offline.GO_TOGETHER", 1.5, "from 1.5 "),
    ("minent_small", "claims_reward.COMPARABLE", -0.9, "-90 points"),
    ("zero_margin", "claims_offline.COMPARABLE", -0.9, "-90 points"),
]


@pytest.mark.parametrize("name,constant,value,said", RULES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_rule_says_the_threshold_that_decides(worlds, monkeypatch, name, constant, value, said):
    """With another threshold both the verdict and the text change."""
    claim = getattr(claims, name)
    before = claim(worlds[True])
    monkeypatch.setattr(f"study.{constant}", value)
    after = claim(worlds[True])
    assert before.verdict == "holds" != after.verdict
    assert said in after.rule and said not in before.rule


def test_one_seed_decides_nothing_about_better_or_worse(worlds):
    folders = worlds[True].folders
    alone = Study({size: [run for run in runs if run.config["seed"] == 1] for size, runs in folders.items()})
    for claim in (claims.lower_rate, claims.kl_works, claims.high_rate):
        assert claim(alone).verdict == "not decided here"


def test_incomplete_studies_are_named(worlds):
    folders = worlds[True].folders
    results.check_complete(worlds[True])
    first = next(run for run in select_rloo(folders["small"]) if run.config["seed"] == 2)
    short = {key: values[:9] for key, values in first.metrics.items()}
    others = [run for run in folders["small"] if run is not first]
    instead = {
        "seeds": [],
        "no win rate": [replace(first, evaluation={})],
        "not finished": [replace(first, result={})],
        "of 9 and 64 updates": [replace(first, metrics=short)],
    }
    for said, runs in instead.items():
        with pytest.raises(UserError, match=said):
            results.check_complete(Study({**folders, "small": others + runs}))
    without = {
        size: [run for run in runs if run.config.get("reward") != "kl"]
        for size, runs in folders.items()
    }
    with pytest.raises(UserError, match="reward=kl"):
        claims.kl_works(Study(without))


def test_standing_by_hand():
    flat = (0.0, -0.1, 0.1)
    assert Standing((0.1, 0.05, 0.15), flat).over is False
    assert Standing((0.1, -0.05, 0.25), flat).over is None
    assert Standing((-0.2, -0.3, -0.1), flat).over is True
    assert Standing((0.1, 0.05, 0.15), (0.2, 0.1, 0.3)).over is True  # still above SFT, but it fell
    assert str(Standing((0.1, 0.05, 0.15), (math.nan,) * 3)) == "better than SFT, no fall seen"


def test_the_peak_of_noise_is_not_a_fall():
    """A flat noisy curve: the drop from its own highest point is always positive, that from the other
    seeds' highest point has mean 0."""
    random = np.random.default_rng(0)

    def flat() -> RunLog:
        return RunLog(Path("x"), "train_rloo", {}, {"gold": random.normal(size=64)}, {}, {})

    arms = [[flat() for _ in SEEDS] for _ in range(400)]
    found = np.array([drops(arm) for arm in arms])
    curves = [smoothed(run.metrics["gold"]) for arm in arms for run in arm]
    naive = np.array([curve.max() - curve[-1] for curve in curves])
    assert abs(found.mean()) < 4 * found.std() / math.sqrt(found.size) and naive.mean() > 0.5


def test_t_interval():
    half = 4.302653 / math.sqrt(3)
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - half, 2 + half))
    assert t_interval([5.0]) == (5.0, -math.inf, math.inf)
    for n, quantile in ((6, 2.5706), (11, 2.2281), (31, 2.0423)):
        values = [float(i * i) for i in range(n)]
        mean, low, high = t_interval(values)
        expected = quantile * np.std(values, ddof=1) / math.sqrt(n)
        assert (high - low) / 2 == pytest.approx(expected, rel=5e-3) and mean == np.mean(values)


def cells(table: str) -> dict[str, list[str]]:
    """{first cell: the others} of the Markdown tables in a text."""
    rows = [re.split(r" *\| *", line)[1:-1] for line in table.splitlines() if line.startswith("|")]
    return {name: others for name, *others in rows}


def test_early_warning_finds_the_signal_that_warns(worlds):
    """Only over-optimised runs lose their EOS here, and all of them do; the spread of the RM score is noise
    and says nothing."""
    lines = cells(early_warning.early_warning(worlds[True]))
    assert lines["share of EOS, fall"][0] == "100 %" and float(lines["share of EOS, fall"][2].split()[0]) > 0
    assert int(lines["spread of the RM score, rise"][0].split()[0]) < 40


def test_auc_by_hand():
    low, high = np.array([0.0, 1.0, 2.0]), np.array([1.0, 3.0])
    assert early_warning.auc(low, high) == pytest.approx((1 + 0.5 + 3) / 6)
    assert early_warning.auc(high, high) == 0.5 and math.isnan(early_warning.auc(low, low[:0]))


def test_transitions_are_aligned():
    """A signal that is 1 exactly at the updates after which gold falls has AUC 1; one update late, less."""
    gold = np.where(np.arange(64) < 30, 0.5, 0.0)  # update 31 is the first low one
    at = np.arange(1, 65)
    falling = [(gold[t : t + 8].mean() - gold[t - 8 : t].mean()) < -0.05 for t in range(8, 57)]
    signals = np.zeros(64)
    signals[7:56] = falling  # entry t - 1 is update t
    run = RunLog(Path("x"), "train_rloo", {}, {"gold": gold, "signal": signals, "step": at}, {}, {})
    c = early_warning.course(run)

    def exact(metric):
        return signals[early_warning.AVERAGED - 1 :]

    values, falls = early_warning.transitions(c, exact)
    assert early_warning.auc(values[~falls], values[falls]) == 1 and falls.sum() == sum(falling)
    values, falls = early_warning.transitions(c, lambda metric: np.roll(exact(metric), 2))
    assert early_warning.auc(values[~falls], values[falls]) < 1


def test_a_missing_number_is_the_one_before():
    metrics = {"gold": np.ones(64), "rm": np.array([3.0, np.nan, np.nan, 5.0] * 16)}
    c = early_warning.course(RunLog(Path("x"), "train_rloo", {}, metrics, {}, {}))
    assert early_warning.averages(c)("rm")[0] == pytest.approx((3 + 3 + 3 + 5) / 4)


def test_open_questions_are_answered(worlds, tmp_path):
    for size in SIZES:
        (tmp_path / size / "best_of_n_s1").mkdir(parents=True)
        lines = []
        for n in (1, 2, 4, 8):
            kl = math.log(n) - (n - 1) / n
            lines.append({"step": n, "n": n, "kl": kl, "scores": 0.1 * n, "gold": 0.3 + 0.1 * (n == 4)})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / size / "best_of_n_s1/metrics.jsonl").write_text(text)
    assert "highest 0.40 at n = 4" in questions.gold_over_kl(worlds[True], tmp_path)
    # at the low rate only: at the high one masked runs are as bad
    assert "worse in 2 of 4 settings" in questions.padding_fill(worlds[True])
    assert "worse than the fixed" in questions.adaptive_margin(worlds[True])
    assert questions.small_beta(worlds[True]).count("\n| 2e-4") == 5


def test_sections_of_other_studies(tmp_path):
    (tmp_path / "field.md").write_text("## The field\n\n![gold](figure_field.png)\n")
    assert results.section_of(str(tmp_path), "field.md") == [
        "## The field\n\n![gold](docs/figures/figure_field.png)\n"
    ]
    assert results.section_of(str(tmp_path), "instrument.md") == []


def test_all_arms_are_listed(worlds):
    arms = results.all_arms(worlds[True])
    assert "| small | RLOO maxent_length | fill 1.0 | 2e-4 | 1 | 3 |" in arms
    assert "| medium | RLOO maxent_length | clip 0.0001 | 2e-4 | 0.1 | 3 |" in arms
    assert "| small | dpo | β 0.05 | 2e-4 | 0 | 3 |" in arms


def test_runs_are_found_by_their_settings(tmp_path):
    runs = {
        "a": ("/x/train_rloo.py", {"lr": 1e-3, "reward": "kl:0.2"}),
        "b": ("/x/train_rloo.py", {"lr": 1e-4, "reward": "kl:0.2"}),
        "c": ("/a clone/study/best_of_n.py", {}),
        "eval": ("/x/evaluate.py", {"judge": "gold"}),
    }
    for name, (script, config) in runs.items():
        (tmp_path / name).mkdir()
        about = {"command": f"{script} --lr=1", "config": config}
        (tmp_path / name / "run.json").write_text(json.dumps(about))
        lines = '{"step": 1, "gold": 0.5}\n{"step": 2, "gold": null, "extra": 1}\n'
        (tmp_path / name / "metrics.jsonl").write_text(lines)
    won = {"a": 0.25, "a/ckpt/step_00000003": 0.5}
    sweep = [{"model": str(tmp_path / model), "win_rate": share} for model, share in won.items()]
    (tmp_path / "eval/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sweep))
    a, b = find_runs(tmp_path)
    assert (a.win_rate, b.win_rate, a.script) == (0.25, None, "train_rloo")
    assert a.checkpoints[3]["win_rate"] == 0.5
    assert a.metrics["gold"][0] == 0.5 and np.isnan(a.metrics["gold"][1]) and np.isnan(a.metrics["extra"][0])
    assert select([a, b], "train_rloo", lr=1e-4) == [b] and not select([a, b], "train_simpo")
    assert select([a, b], "train_rloo", reward="kl", coefficient=0.2) == [a, b]
    with pytest.raises(UserError, match="no run in it"):
        find_runs(tmp_path / "a")
