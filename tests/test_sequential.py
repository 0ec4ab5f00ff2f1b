"""The looks of the study: what they may err in sum, when they stop, whose arms get more seeds."""

import re
from dataclasses import fields
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

import train_rloo
import train_simpo
from evaluation.statistics import t_interval, t_quantile
from rlhf.config import RunError, parser
from study import sequential
from study.arms import Study
from study.claims import CLAIMS
from study.crossed import variance_parts
from study.logs import RunLog, read_reward
from study.plan import ARMS, Arm
from study.sequential import LOOKS, SPENT, conclude, look, wanted
from study.settings import SIZES
from study.tasks import Task, start_all, start_chains
from study.verdict import Claim, decide

PUBLISHED = [  # degrees of freedom, level, quantile: tables of Student's t
    (1, 0.95, 12.7062), (2, 0.95, 4.30265), (3, 0.95, 3.18245), (3, 0.99, 5.84091), (3, 0.995, 7.45332),
    (7, 0.99, 3.49948), (15, 0.9, 1.75305), (23, 0.98, 2.49987), (30, 0.95, 2.04227),
]


@pytest.mark.parametrize("degrees,level,quantile", PUBLISHED)
def test_t_quantile(degrees, level, quantile):
    assert t_quantile(degrees, level) == pytest.approx(quantile, rel=1e-5)


def test_t_quantile_becomes_the_normal_one():
    assert t_quantile(10**6, 0.98) == pytest.approx(NormalDist().inv_cdf(0.99), rel=1e-5)


def erring(levels: tuple, trials: int = 4000) -> float:
    """Share of studies of pure noise in which some look finds a difference."""
    noise = np.random.default_rng(0).normal(size=(trials, LOOKS[-1]))
    found = np.zeros(trials, bool)
    for seeds, spent in zip(LOOKS, levels):
        values = noise[:, :seeds]
        half = t_quantile(seeds - 1, 1 - spent) * values.std(1, ddof=1) / seeds**0.5
        found |= abs(values.mean(1)) > half
    return found.mean()


def test_looking_again_does_not_find_more_in_noise():
    assert sum(SPENT) == pytest.approx(0.05)
    assert erring(SPENT) < 0.05
    assert erring((0.05,) * len(LOOKS)) > 0.1  # what an uncorrected study would do


# --- which arms get more seeds


def run(size: str, name: str, seed: int, gold: float) -> RunLog:
    config = {"seed": seed, "lr": name}
    return RunLog(Path(size, f"{name}_s{seed}"), "train_simpo", config, {}, {"ok": 1}, {"gold": gold})


def arm(name: str, seeds: int, gold: float, spread: float = 0.1) -> list[RunLog]:
    noise = np.random.default_rng(list(name.encode())).permutation(np.linspace(-spread, spread, seeds))
    return [run("small", name, seed + 1, gold + noise[seed]) for seed in range(seeds)]


def above_zero(name: str):
    def claim(study: Study) -> Claim:
        golds = [run.evaluation["gold"] for run in study.arm("small", "train_simpo", lr=name)]
        interval = study.interval(golds)
        verdict = decide(interval[1] > 0, interval[2] < 0)
        return Claim(name, "", "", verdict, f"{len(golds)} seeds")
    return claim


def test_a_decided_claim_stays_an_open_one_goes_on():
    folders = {"small": arm("sure", 24, gold=5) + arm("open", 24, gold=0) + arm("short", 11, gold=0)}
    sure = conclude(above_zero("sure"), folders)
    assert (sure.claim.verdict, sure.seeds, sure.claim.ours) == ("holds", 4, "4 seeds")
    opened = conclude(above_zero("open"), folders)
    assert (opened.claim.verdict, opened.seeds, opened.level) == ("not decided here", 24, 0.98)
    assert conclude(above_zero("short"), folders).seeds == 8  # seeds 9 to 12 are not all there
    assert opened.arms == {("small", "open")}


def test_the_arms_of_open_claims_are_wanted(monkeypatch):
    folders = {"small": arm("sure", 4, gold=5) + arm("open", 4, gold=0)}
    monkeypatch.setattr(sequential, "CLAIMS", [above_zero("sure"), above_zero("open")])
    assert wanted(folders, 1) == {("small", "open")}
    folders["small"] += [one for one in arm("open", 24, gold=0) if one.config["seed"] > 4]
    assert wanted(folders, 4) == set()  # the last look was had


def test_the_power_is_that_of_a_simulation():
    """A difference as large as said is found in 80 % of studies."""
    random = np.random.default_rng(1)
    study = Study({}, level=0.99)
    study.interval(np.array([-1, 1, -1, 1, -1, 1, -1, 1]) * (7 / 8) ** 0.5)  # standard deviation 1
    (difference,) = study.seen["gold"]
    found = [t_interval(random.normal(difference, 1, size=8), 0.99)[1] > 0 for _ in range(4000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)
    assert study.power() == f"{difference:.2g} gold"


# --- the plan


def planned(a: Arm, seed: int) -> RunLog:
    """A run as the plan's command would leave it."""
    module = {"train_rloo.py": train_rloo, "train_simpo.py": train_simpo}[a.script]
    task = a.task(Path("study"), seed)
    parsed = parser(module.Config, None).parse_args(task.words[1:])
    config = {field.name: getattr(parsed, field.name) for field in fields(module.Config)}
    config |= read_reward(config["reward"]) if "reward" in config else {}
    t = np.arange(64) / 63
    noise = np.random.default_rng(seed).normal(size=64) / 100
    names = ("gold", "scores", "clipfrac", "kl_full", "kl_prev/approxkl_avg", "response_length", "ref_margin",
             "length_normalized_surprisal", "logps/chosen", "ref_margin_mean", "eos_share")
    metrics = {name: 1 + t + noise for name in names} | {"step": np.arange(1, 65)}
    evaluation = {"gold": 0.5 + noise[0], "win_rate": 0.5 + noise[1], "kl_full": 1.0, "entropy": 1.0}
    return RunLog(task.out, Path(a.script).stem, config, metrics, {"greedy/gold": 0.5}, evaluation)


def test_every_claim_finds_its_arms_in_the_plan():
    assert len({(a.size, a.name) for a in ARMS}) == len(ARMS)
    folders = {size: [RunLog(Path(size), "train_sft", {"seed": 1}, {}, {}, {"gold": 0.4, "win_rate": 0.5})]
               for size in SIZES}
    for a in ARMS:
        folders[a.size] += [planned(a, seed) for seed in range(1, LOOKS[0] + 1)]
    names = {(a.size, a.name) for a in ARMS}
    for claim in CLAIMS:
        found = look(claim, folders, 0)
        assert found.arms and found.arms <= names, claim.__name__
    assert wanted({}, 0) == names


# --- running


def script(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


WRITES = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[-1].partition("=")[2])
out.mkdir()
(out / "run.json").write_text(json.dumps({"command": " ".join(sys.argv), "config": {}}))
(out / "result.json").write_text("{}")
"""


def test_what_is_finished_by_the_same_options_is_not_run_again(tmp_path):
    command = script(tmp_path / "writes.py", WRITES)
    tasks = [Task(tmp_path / name, f"{command} --lr=1") for name in "ab"]
    assert not tasks[0].finished()
    start_all(tasks, tmp_path / "logs")
    assert all(task.finished() for task in tasks)
    start_all(tasks, tmp_path / "logs")  # the script would fail at mkdir
    assert not Task(tmp_path / "a", f"{command} --lr=2").finished()


def test_a_failure_is_told_and_ends_the_rest(tmp_path):
    fails = script(tmp_path / "fails.py", "raise SystemExit('no such world')")
    works = script(tmp_path / "writes.py", WRITES)
    tasks = [Task(tmp_path / "a", fails)] + [Task(tmp_path / f"b{i}", works) for i in range(20)]
    with pytest.raises(RunError, match=re.compile("fails.py .*code 1: no such world", re.S)):
        start_all(tasks, tmp_path / "logs", jobs=1)
    assert not (tmp_path / "b19").exists()


DIVERGES = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[-1].partition("=")[2])
out.mkdir()
(out / "run.json").write_text(json.dumps({"command": " ".join(sys.argv), "config": {}}))
raise SystemExit("error: step 3: loss nan, gradient norm nan: not finite. The weights were not updated")
"""


def test_a_run_that_diverges_is_a_result_and_ends_its_chain(tmp_path):
    diverges = script(tmp_path / "diverges.py", DIVERGES)
    writes = script(tmp_path / "writes.py", WRITES)
    chains = [[Task(tmp_path / f"{name}1", script, may_diverge=True), Task(tmp_path / f"{name}2", writes)]
              for name, script in (("a", diverges), ("b", writes))]
    start_chains(chains, tmp_path / "logs")
    first, second = chains
    assert first[0].finished() and first[0].diverged() and not first[1].out.exists()
    assert all(task.finished() and not task.diverged() for task in second)
    begun = (tmp_path / "seconds.txt").read_text().splitlines()
    assert sorted(line.split()[0] for line in begun) == ["a1", "b1", "b2"]
    start_chains(chains, tmp_path / "logs")  # both scripts would fail at mkdir
    with pytest.raises(RunError, match="code 1: error: step 3: loss nan"):
        start_all([Task(tmp_path / "c", diverges)], tmp_path / "logs")


def test_variance_parts():
    random = np.random.default_rng(0)
    parts = []
    for _ in range(400):
        rows, columns = random.normal(0, 3, size=(4, 1)), random.normal(0, 2, size=(1, 4))
        parts.append(variance_parts(rows + columns + random.normal(size=(4, 4))))
    assert np.mean(parts, axis=0) == pytest.approx([9, 4, 1], rel=0.15)
    assert variance_parts(np.arange(4.0)[:, None] * np.ones((4, 4))) == pytest.approx((5 / 3, 0, 0))


