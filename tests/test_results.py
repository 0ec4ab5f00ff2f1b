"""Verdicts follow from the runs: two made-up studies, one in which everything is as the paper says and one in which nothing is, judged by the same rules."""

import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from study import best_of_n
from study import claims
from study import results
from study.claims import CLAIMS
from data import toy
from rlhf.config import UserError
from rlhf.model import NeoX, NeoXConfig
from rlhf.pretrained import load_tokenizer, save_pretrained
from study.logs import RunLog, find_runs, select
from evaluation.statistics import t_interval
from study.standing import HIGH, OFFLINE_HIGH, OFFLINE_LOW, SIZES, TENTH, TWENTIETH, Standing, Study, drops, smoothed

UPDATES, SEEDS, SFT = 64, (1, 2, 3), 0.3


def noise(*key) -> np.random.Generator:
    return np.random.default_rng(list(repr(key).encode()))


def rloo(size: str, seed: int, *, end: float, peak: float | None = None, bonus: float = 0.0, linear: bool = True, drift: float = 0.5, **config) -> RunLog:
    """Gold from SFT's to `end` by way of `peak`; the entropy bonus changes by `bonus`; KL linear or flat after a quarter; drift: third quarter over second."""
    config = {"reward": "maxent_length", "kl_coef": 0.05, "entropy_coef": 0.1, "lr": HIGH, "clip": 0.2, "invalid_logprob_fill": None, "seed": seed, **config}
    random, t = noise(size, seed, config), np.arange(UPDATES) / (UPDATES - 1)
    gold = np.interp(t, [0, 0.5, 1], [SFT, (SFT + end) / 2 if peak is None else peak, end])
    quarters = np.repeat([1.0, 1.0, drift, drift / 2], UPDATES // 4)
    metrics = {"step": np.arange(1, UPDATES + 1), "gold": gold + 0.005 * random.normal(size=UPDATES), "scores": 0.4 * t, "clipfrac": 0.1 + 0 * t,
               "scores_std": 0.3 + 0.01 * random.normal(size=UPDATES), "kl_full": 3 * (t if linear else np.minimum(t, 0.25)),
               "kl_prev/approxkl_avg": quarters * 0.01 * np.exp(0.02 * random.normal(size=UPDATES)), "kl_prev/k3": quarters * 0.01,
               "length_normalized_surprisal": 1 + bonus * t, "response_length": 10 + 5 * t * (end < SFT), "eos_share": 1 - 0.2 * t * (end < SFT)}
    evaluation = {"gold": end + 0.005 * random.normal(), "win_rate": 0.3 + end / 3 + 0.001 * random.normal(), "kl_full": 3.0, "entropy": 1.0}
    return RunLog(Path(size), "train_rloo", config, metrics, {"greedy/gold": 0.5}, evaluation)


def offline(seed: int, end: float, fall: float, margin: float = -0.1, **config) -> RunLog:
    random, t = noise(seed, config), np.linspace(0, 1, 40)
    metrics = {"logps/chosen": -18 + fall * t, "ref_margin": 5 * margin + 0.1 * random.normal(size=40),
               "ref_margin_mean": margin + 0.05 * random.normal(size=40)}
    evaluation = {"gold": end + 0.005 * random.normal(), "win_rate": 0.3 + end / 3, "kl_full": 2.0, "entropy": 0.9}
    return RunLog(Path("small"), "train_simpo", {"seed": seed, "batch_size": 32, **config}, metrics, {"greedy/gold": 0.5}, evaluation)


GOOD, BAD = {"end": 0.45, "bonus": -0.2}, {"end": -0.2, "peak": 0.35, "bonus": 0.5}


def study(paper: bool) -> Study:
    """paper: all as the paper says; otherwise the opposite throughout."""
    sft = {"gold": SFT, "win_rate": 0.4, "gold_reference": 0.57}
    folders = {size: [RunLog(Path(size), "train_sft", {"seed": 1}, {}, {"greedy/gold": 0.5}, sft)] for size in SIZES}

    def add(shape: dict, **settings):
        folders[size].append(rloo(size, seed, **{"drift": 1.5 if paper else 0.3, "linear": True, **shape}, **settings))

    for size, seed in ((size, seed) for size in SIZES for seed in SEEDS):
        for beta in (0.5, 0.2, 0.05):
            add({**(GOOD if paper else BAD), "linear": not paper, "drift": 0.4 if paper else 1.5}, reward="kl", kl_coef=beta, entropy_coef=0.1)
        for coef in (0.0, 0.1, 1.0):
            better = 0.0 if paper else 0.3 * coef - 0.3 * (coef == 0)  # in the other world entropy is what brings the gain
            add(BAD if paper else {**GOOD, "bonus": 0.5}, entropy_coef=coef, lr=HIGH)
            low = ({**BAD, "end": 0.1} if size == "medium" else GOOD) if paper else (GOOD if size == "medium" else {**BAD, "bonus": -0.2, "end": -0.5 + better})
            for lr in (TENTH, TWENTIETH) if size != "large" else (TENTH,):
                add({**low, "linear": paper}, entropy_coef=coef, lr=lr)
        for clip, lr in ((clip, lr) for clip in (1e-2, 1e-4) for lr in (HIGH, TENTH)):
            add(BAD if paper else GOOD, clip=clip, lr=lr)
        for coef in (0.1, 1.0):
            add((GOOD if size == "small" else BAD) if paper else (BAD if size == "small" else GOOD), reward="minent_length", entropy_coef=coef)
            for lr in (HIGH, TENTH):
                add(BAD, entropy_coef=coef, lr=lr, invalid_logprob_fill=1.0)
        if size == "small":
            for lr in (OFFLINE_HIGH, OFFLINE_LOW):
                bad = (lr == OFFLINE_HIGH) == paper
                for gamma in (0.0, 0.25, 0.5, 1.0, 2.0):
                    end = (0.1 if bad else 0.45) + gamma * (0.05 if not paper else -0.1 if bad else 0.0)
                    for beta in (2.0, 0.1):
                        folders[size].append(offline(seed, end, (-20 if bad else -3) * (1 if paper else -1), loss="simpo", lr=lr, gamma=gamma, beta=beta))
                folders[size].append(offline(seed, 0.45, -5, -0.1 if paper else 0.5, loss="dpo", lr=lr, gamma=0.0, beta=0.05))
                folders[size].append(offline(seed, 0.4, -5, loss="dpo_length", lr=lr, gamma=0.0, beta=2.0))
    return Study(folders)


def calm() -> Study:
    """Every RLOO run gets better and stays so: what the opposite world cannot be, where the paper's stable runs break."""
    return Study({size: [rloo(size, seed, **GOOD, **{k: r.config[k] for k in ("reward", "entropy_coef", "kl_coef", "lr", "clip", "invalid_logprob_fill")})
                         for r in runs if r.script == "train_rloo" for seed in [r.config["seed"]]] + select(runs, "train_sft")
                  for size, runs in study(True).folders.items()})


@pytest.fixture(scope="module")
def worlds() -> dict[bool, Study]:
    return {paper: study(paper) for paper in (True, False)}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.__name__)
def test_a_claim_holds_where_it_is_so_and_fails_where_it_is_not(worlds, claim):
    assert claim(worlds[True]).verdict == "holds"
    assert claim(calm() if claim is claims.not_eliminated else worlds[False]).verdict == "does not hold"


def test_one_seed_decides_nothing_about_better_or_worse(worlds):
    alone = Study({size: [r for r in runs if r.config["seed"] == 1] for size, runs in worlds[True].folders.items()})
    assert claims.lower_rate(alone).verdict == claims.kl_works(alone).verdict == claims.high_rate(alone).verdict == "not decided here"


def test_incomplete_studies_are_named(worlds):
    results.check_complete(worlds[True])
    first = next(r for r in worlds[True].folders["small"] if r.script == "train_rloo" and r.config["seed"] == 2)
    short = {key: values[:9] for key, values in first.metrics.items()}
    for instead, said in (([], "seeds"), ([replace(first, evaluation={})], "no win rate"), ([replace(first, result={})], "not finished"),
                          ([replace(first, metrics=short)], "of 9 and 64 updates")):
        runs = [r for r in worlds[True].folders["small"] if r is not first] + instead
        with pytest.raises(UserError, match=said):
            results.check_complete(Study({**worlds[True].folders, "small": runs}))
    with pytest.raises(UserError, match="reward=kl"):
        claims.kl_works(Study({size: [r for r in runs if r.config.get("reward") != "kl"] for size, runs in worlds[True].folders.items()}))


def test_standing_by_hand():
    assert Standing((0.1, 0.05, 0.15), (0.0, -0.1, 0.1)).over is False
    assert Standing((0.1, -0.05, 0.25), (0.0, -0.1, 0.1)).over is None
    assert Standing((-0.2, -0.3, -0.1), (0.0, -0.1, 0.1)).over is True
    assert Standing((0.1, 0.05, 0.15), (0.2, 0.1, 0.3)).over is True  # still above SFT, but it fell
    assert str(Standing((0.1, 0.05, 0.15), (math.nan,) * 3)) == "better than SFT, no fall seen"


def test_the_peak_of_noise_is_not_a_fall():
    """A flat noisy curve: the drop from its own highest point is always positive, that from the other seeds' highest point has mean 0."""
    random = np.random.default_rng(0)
    arms = [[RunLog(Path("x"), "train_rloo", {}, {"gold": random.normal(size=64)}, {}, {}) for _ in SEEDS] for _ in range(400)]
    found = np.array([drops(arm) for arm in arms])
    naive = np.array([[(c := smoothed(r.metrics["gold"])).max() - c[-1] for r in arm] for arm in arms])
    assert abs(found.mean()) < 4 * found.std() / math.sqrt(found.size) and naive.mean() > 0.5


def test_t_interval():
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)))
    assert t_interval([5.0]) == (5.0, -math.inf, math.inf)
    for n, quantile in ((6, 2.5706), (11, 2.2281), (31, 2.0423)):
        values = [float(i * i) for i in range(n)]
        mean, low, high = t_interval(values)
        assert (high - low) / 2 == pytest.approx(quantile * np.std(values, ddof=1) / math.sqrt(n), rel=5e-3) and mean == np.mean(values)


def test_early_warning_finds_the_signal_that_warns(worlds):
    """Only over-optimised runs lose their EOS here, and all of them do; the spread of the RM score is noise and says nothing."""
    cells = [[cell.strip() for cell in line.split("|")] for line in results.early_warning(worlds[True]).splitlines() if line.startswith("|")]
    lines = {name: values for _, name, *values in cells}
    assert lines["share of EOS, fall"][0] == "100 %" and float(lines["share of EOS, fall"][2].split()[0]) > 0
    assert int(lines["spread of the RM score, rise"][0].split()[0]) < 40


def test_every_section_is_written(worlds, tmp_path):
    for size in SIZES:
        (tmp_path / size / "best_of_n_s1").mkdir(parents=True)
        lines = [{"step": n, "n": n, "kl": math.log(n) - (n - 1) / n, "scores": 0.1 * n, "gold": 0.3 + 0.1 * (n == 4)} for n in (1, 2, 4, 8)]
        (tmp_path / size / "best_of_n_s1/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "highest 0.40 at n = 4" in results.fits(worlds[True], tmp_path)
    assert "worse in 2 of 4 settings" in results.fill(worlds[True])  # at the low rate only: at the high one masked runs are as bad
    assert "worse than the fixed" in results.adaptive_margin(worlds[True])
    assert results.small_beta(worlds[True]).count("\n| 3e-4") == 5
    arms = results.all_arms(worlds[True])
    assert "| small | RLOO maxent_length | fill 1.0 | 3e-4 | 1 | 3 |" in arms and "| medium | RLOO maxent_length | clip 0.0001 | 3e-4 | 0.1 | 3 |" in arms


def test_runs_are_found_by_their_settings(tmp_path):
    for name, script, config in (("a", "train_rloo", {"lr": 1e-3}), ("b", "train_rloo", {"lr": 1e-4}), ("eval", "evaluate", {"judge": "gold"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"command": f"/x/{script}.py --lr=1", "config": config}))
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "gold": 0.5}\n{"step": 2, "gold": null, "extra": 1}\n')
    sweep = [{"model": str(tmp_path / model), "win_rate": rate} for model, rate in (("a", 0.25), ("a/ckpt/step_00000003", 0.5))]
    (tmp_path / "eval/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sweep))
    a, b = find_runs(tmp_path)
    assert (a.win_rate, b.win_rate, a.script) == (0.25, None, "train_rloo") and a.checkpoints[3]["win_rate"] == 0.5
    assert a.metrics["gold"][0] == 0.5 and np.isnan(a.metrics["gold"][1]) and np.isnan(a.metrics["extra"][0])
    assert select([a, b], "train_rloo", lr=1e-4) == [b] and not select([a, b], "train_simpo")
    with pytest.raises(UserError, match="no run in it"):
        find_runs(tmp_path / "a")


# --- best of n


def test_best_of_n_equals_all_subsets():
    scores, values = torch.rand(2, 6), torch.rand(2, 6)
    for n in range(1, 7):
        brute = [np.mean([values[i, max(some, key=lambda j: scores[i, j])].item() for some in combinations(range(6), n)]) for i in range(2)]
        assert best_of_n.best_of_n(scores, values, n) == pytest.approx(np.mean(brute))
        assert best_of_n.best_of_n_weights(6, n).sum().item() == pytest.approx(1)


def test_best_of_n_script(tmp_path):
    toy.main(toy.Config(out_dir=str(tmp_path / "data"), posts=8, pairs=8, rankings=8, validation=6, test=8, size="small"))
    config = NeoXConfig.from_dict(json.loads((tmp_path / "data/base/config.json").read_text()))
    for name, head in (("sft", "embed_out"), ("rm", "score")):
        save_pretrained(NeoX(config, head).init_weights(0), load_tokenizer(str(tmp_path / "data/base")), tmp_path / name)
    cfg = best_of_n.Config(data_dir=str(tmp_path / "data"), model=str(tmp_path / "sft"), reward_model=str(tmp_path / "rm"), out_dir=str(tmp_path / "bon"),
                           samples=6, device="cpu")
    best_of_n.main(cfg)
    lines = [json.loads(line) for line in (tmp_path / "bon/metrics.jsonl").read_text().splitlines()]
    assert [line["n"] for line in lines] == [1, 2, 4, 6]
    assert all(a["scores"] <= b["scores"] and a["kl"] < b["kl"] for a, b in zip(lines, lines[1:])) and "gold" in lines[0]
    with pytest.raises(UserError, match="--overwrite"):
        best_of_n.main(cfg)
