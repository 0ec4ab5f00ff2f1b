"""Figures from a synthetic study: the right runs, labels with win rates, bands over seeds, and one line of advice where runs are missing."""

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from study import figures
from study import plot
from study.figures import FIGURES
from study.arms import by_rate, constrained, mark
from rlhf.config import UserError
from study.panels import band, pyplot
from study.logs import find_runs
from study.fits import best_of_n_fit, gao_fit

UPDATES, SEEDS, HI = 40, (1, 2, 3), 1e-3
RLOO = {"reward": "kl", "kl_coef": 0.05, "entropy_coef": 0.1, "lr": HI, "clip": 0.2, "invalid_logprob_fill": None, "k": 4, "resume": True}
PAIR = {"loss": "simpo", "gamma": 0.5, "beta": 2.0, "lr": 1e-4, "gamma_beta_ratio": None}


def write(folder, name: str, script: str, config: dict, columns: dict, win_rate: float | None = None, checkpoints: dict | None = None) -> None:
    """A run as the scripts leave it, and its lines in the sweep's table."""
    run = folder / name
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"command": f"{script}.py --out_dir={run}", "config": {**config, "out_dir": str(run)}}))
    length = len(next(iter(columns.values())))
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": i + 1} | {k: float(v[i]) for k, v in columns.items()}) + "\n" for i in range(length)))
    (folder / "eval").mkdir(exist_ok=True)
    with (folder / "eval" / "metrics.jsonl").open("a") as table:
        for model, won in [(run, win_rate), *((run / "ckpt" / f"step_{step:08d}", won) for step, won in (checkpoints or {}).items())]:
            if won is not None:
                table.write(json.dumps({"model": str(model), "name": name, "win_rate": won}) + "\n")


def rloo(folder, seed: int, win_rate: float | None, gold: bool = True, updates: int = UPDATES, **settings) -> None:
    """KL grows to a plateau or with the learning rate; gold follows d (0.3 - 0.1 log d) or turns; proxy only rises."""
    config, random = {**RLOO, "seed": seed, **settings}, np.random.default_rng(seed)
    t, maxent = np.arange(1, updates + 1) / updates, {"kl": 0, "minent_length": 0.3, "maxent_length": 1}[config["reward"]]
    kl = (60 * maxent * (config["lr"] / HI) ** 0.5 * t * (1 + config["entropy_coef"]) if maxent else 0.8 / (config["kl_coef"] + 0.02) * (1 - np.exp(-5 * t)))
    kl = kl * (1 + 0.1 * random.normal()) + random.normal(size=updates) * 0.1 * t
    d = np.sqrt(np.maximum(kl, 1e-6))
    columns = {"scores": 0.45 * (1 - np.exp(-0.4 * d)) + random.normal(size=updates) * 0.02, "kl_full": kl, "kl": kl,
               "length_normalized_surprisal": 1.3 - 0.4 * t + config["entropy_coef"] * t + random.normal(size=updates) * 0.02,
               "kl_prev/approxkl_avg": (1e-3 + maxent * 0.02 * t) * (config["lr"] / HI) ** 2 * np.exp(0.3 * random.normal(size=updates))}
    columns["rlhf_reward"] = columns["scores"] + (config["entropy_coef"] * columns["length_normalized_surprisal"] if maxent else -config["kl_coef"] * kl)
    if gold:
        columns["gold"] = 0.1 + d * (0.15 - 0.08 * np.log(d) - 0.02 * maxent) + random.normal(size=updates) * 0.01
    name = "_".join(f"{k}{v}" for k, v in {**settings, "seed": seed}.items())
    write(folder, name, "train_rloo", config, columns, win_rate)


def pair(folder, seed: int, updates: int = UPDATES, **settings) -> None:
    config, random = {**PAIR, "seed": seed, **settings}, np.random.default_rng(seed)
    t = np.arange(1, updates + 1) / updates
    columns = {key: (config["gamma"] or 0) * 0.2 + 0.5 * t * (i + 1) + random.normal(size=updates) * 0.1 for i, key in enumerate(figures.PAIR_METRICS)}
    if config["loss"] == "dpo":
        columns["ref_margin"] = random.normal(size=updates) * 3 - 1
    won = 0.2 + 0.3 * (config["gamma"] or 0) * (1 - (config["gamma"] or 0) / 2)
    checkpoints = {step: 0.2 + (won - 0.2) * step / updates + 0.01 * seed for step in range(updates // 8, updates, updates // 8)}
    name = "_".join(f"{k}{v}" for k, v in {**settings, "seed": seed}.items())
    write(folder, name, "train_simpo", config, columns, won + 0.01 * seed, checkpoints)


def study(folder, gold: bool = True, updates: int = UPDATES):
    """One model size: the grid of the study with win rates, ablations that no figure may draw, best-of-n tables."""
    write(folder, "sft", "train_sft", {"seed": 1}, {"loss": [1.0, 0.5]}, 0.2)
    for seed in SEEDS:
        for i, coef in enumerate((0.5, 0.2, 0.05, 0.02)):
            rloo(folder, seed, 0.25 + 0.1 * i + 0.01 * seed, gold, updates, kl_coef=coef)
        for i, lr in enumerate((HI, HI / 10, HI / 20)):
            for j, coef in enumerate((0.0, 0.1, 0.3, 1.0)):
                rloo(folder, seed, 0.1 + 0.15 * i - 0.02 * j + 0.01 * seed, gold, updates, reward="maxent_length", entropy_coef=coef, lr=lr)
        rloo(folder, seed, 0.3, gold, updates, reward="minent_length", entropy_coef=0.1)
        rloo(folder, seed, 0.9, gold, updates, reward="maxent_length", lr=HI, invalid_logprob_fill=1.0)
        rloo(folder, seed, 0.9, gold, updates, reward="maxent_length", lr=HI, clip=1e-4)
        for lr in (1e-4, 1e-5):
            for gamma in (0.0, 0.25, 0.5, 1.0, 2.0):
                pair(folder, seed, updates, gamma=gamma, lr=lr)
        pair(folder, seed, updates, beta=0.1, gamma=0.5)
        pair(folder, seed, updates, loss="dpo", beta=0.05, gamma=None)
        n = 2.0 ** np.arange(9)
        kl = np.log(n) - (n - 1) / n
        d, table = np.sqrt(kl), folder / f"best_of_n_{seed}"
        table.mkdir()
        rows = zip(n, kl, 0.3 * d + 0.01 * seed, 0.1 + d * (0.2 - 0.03 * d) + 0.01 * seed)
        (table / "metrics.jsonl").write_text("".join(json.dumps(dict(zip(("n", "kl", "scores", "gold"), row))) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    for name in ("small", "medium", "large"):
        study(root / name)
    return root


@pytest.fixture(scope="module")
def folders(root):
    return {name: find_runs(root / name) for name in ("small", "medium", "large")}


@pytest.fixture(autouse=True)
def close():
    yield
    pyplot().close("all")


def texts(legend) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_draws(folders, name):
    figure = FIGURES[name](folders)
    figure.draw_without_rendering()
    panels = {"1": 4, "2": 4, "3": 4, "4": 1, "5": 2, "6": 1, "7": 10, "8": 10, "9": 10, "10": 4, "11": 4, "12": 3}.get(name, 3)
    assert len(figure.axes) == panels and all(axis.get_lines() for axis in figure.axes)
    assert min(text.get_fontsize() for text in figure.findobj(pyplot().Text) if text.get_text()) >= 10


def test_series_are_the_runs_of_the_paper_with_win_rates(folders):
    first, second, tenth = figures.figure_1(folders), figures.figure_2(folders), figures.figure_11(folders)
    assert [axis.get_title() for axis in first.axes[:2]] == ["small, lr 1e-3", "small, lr 1e-4"]
    assert [axis.get_title() for axis in second.axes[:2]] == ["medium, lr 1e-4", "medium, lr 5e-5"]
    assert texts(first.axes[2].get_legend()) == [f"α = {a} (win rate {w} %)" for a, w in (("0", 12), ("0.1", 10), ("0.3", 8), ("1", 6))]
    assert texts(second.axes[3].get_legend()) == [f"α = {a} (win rate {w} %)" for a, w in (("0", 42), ("0.1", 40), ("0.3", 38), ("1", 36))]
    assert texts(tenth.legends[0])[0] == "α = 0 (win rate 27 %)" and tenth.get_suptitle() == "large, lr 1e-4"
    assert texts(figures.figure_3(folders).legends[0]) == [*(f"KL, β = {b}" for b in (0.5, 0.2, 0.05, 0.02)),
                                                          *(f"MaxEnt, α = 0.1, lr {lr}" for lr in ("1e-3", "1e-4", "5e-5"))]
    assert texts(figures.figure_12(folders).legends[0]) == [f"β = {b} (win rate {w} %)" for b, w in ((0.5, 27), (0.2, 37), (0.05, 47), (0.02, 57))]
    seven, eight = figures.figure_7(folders), figures.figure_8(folders)
    assert seven.get_suptitle() == "small: SimPO, β = 2, lr 1e-5" and eight.get_suptitle() == "small: SimPO, β = 2, lr 1e-4"
    assert [text[:8].strip() for text in texts(eight.legends[0])] == ["γ = 0 (w", "γ = 0.25", "γ = 0.5", "γ = 1 (w", "γ = 2 (w"]
    assert len(texts(seven.legends[0])) == 4 and figures.figure_9(folders).get_suptitle() == "small: DPO, β = 0.05, lr 1e-4 (win rate 22 %)"


def test_band_is_the_range_over_seeds(folders):
    axis = figures.figure_12(folders, smooth=1).axes[1]
    values = np.stack([run.metrics["rlhf_reward"] for run in constrained(folders["large"])[0.5]])  # (seeds, updates)
    assert len(values) == 3 and np.array_equal(axis.get_lines()[0].get_ydata(), values.mean(0))
    corners = axis.collections[0].get_paths()[0].vertices
    for i in range(UPDATES):
        here = corners[corners[:, 0] == i + 1, 1]
        assert here.min() == values.min(0)[i] and here.max() == values.max(0)[i]
    columns = [{"step": np.arange(3), "a": np.array([0.0, 2.0, 4.0])}, {"step": np.arange(2), "a": np.array([2.0, 2.0])}]
    assert [list(part) for part in band(columns, "a", smooth=2)] == [[0, 1], [1, 1.5], [0, 1], [2, 2]]


def test_checkpoints_start_at_the_sft_model_and_end_at_the_run(folders):
    lines = figures.figure_6(folders).axes[0].get_lines()
    assert list(lines[0].get_xdata()) == [0, *range(5, UPDATES + 1, 5)] and lines[0].get_ydata()[0] == pytest.approx(20)
    assert lines[3].get_ydata()[-1] == pytest.approx(37) and lines[-1].get_label() == "SFT (20 %)"


def test_marks_compare_with_the_sft_model(folders):
    assert [mark(*pair) for pair in ((0.3, 0.2), (0.1, 0.2), (0.2, 0.2), (None, 0.2), (0.3, None))] == ["✓", "×", "=", "=", "="]
    marks = [text.get_text() for text in figures.figure_5(folders).axes[0].texts]
    assert sorted(marks) == sorted([*(f"✓ β {b}" for b in (0.5, 0.2, 0.05, 0.02)), *(f"{m} α {a}" for a in ("0", "0.1", "0.3", "1") for m in "×✓✓")])


def test_fits_recover_their_coefficients(folders):
    kl = np.linspace(0, 30, 50)
    d = np.sqrt(kl)
    log = np.log(np.where(d > 0, d, 1))
    assert gao_fit(kl, d * (0.7 - 0.2 * log)) == pytest.approx((0.7, 0.2, 1), abs=1e-12)
    assert best_of_n_fit(kl, d * (0.5 - 0.03 * d)) == pytest.approx((0.5, 0.03, 1), abs=1e-12)
    assert texts(figures.gold_kl(folders).axes[0].get_legend())[-1] == "best of n: d (0.20 − 0.03 d), R² 1.00"


def test_runs_are_found_by_what_they_did(tmp_path):
    """A KL coefficient of 0 is an entropy coefficient of 0; another k is another arm."""
    rloo(tmp_path, 1, 0.5, kl_coef=0.0)
    for seed, k in ((1, 4), (2, 4), (1, 8)):
        rloo(tmp_path, seed, None, reward="maxent_length", k=k)
    runs = find_runs(tmp_path)
    arms = by_rate(runs)[HI]
    assert list(arms) == [0.0, 0.1] and {run.config["k"] for run in arms[0.1]} == {4} and list(figures.logs(arms, "α")) == ["α = 0 (win rate 50 %)", "α = 0.1"]
    assert figures.drift(list(arms.values())) == "kl_prev/approxkl_avg"
    still = [replace(run, metrics={**run.metrics, "kl_prev/approxkl_avg": np.zeros(UPDATES)}) for run in runs]
    assert figures.drift([still]) == "kl_prev/k3"


def test_missing_runs_are_named(tmp_path, folders):
    rloo(tmp_path / "a", 1, None, gold=False)
    lonely = {"a": find_runs(tmp_path / "a")}
    for name, said in (("1", "2 learning rate"), ("3", "a: .*maxent_length"), ("4", "loss=dpo"), ("7", "loss=simpo"), ("best_of_n", "best_of_n"),
                       ("gold_kl", "maxent_length")):
        with pytest.raises(UserError, match=said):
            FIGURES[name](lonely)
    rloo(tmp_path / "a", 1, None, gold=False, reward="maxent_length")
    with pytest.raises(UserError, match="true reward"):
        FIGURES["proxy_gold"]({"a": find_runs(tmp_path / "a")})
    pair(tmp_path / "a", 1, gamma=0.25)
    with pytest.raises(UserError, match="gamma=0, 0.5, 1$"):
        FIGURES["7"]({"a": find_runs(tmp_path / "a")})
    with pytest.raises(UserError, match="folder 3"):
        FIGURES["12"]({name: folders[name] for name in ("small", "medium")})
    with pytest.raises(UserError, match="known are 1, 2"):
        plot.main(plot.Config(runs=str(tmp_path), figure="13"))


def test_command_writes_the_same_bytes(root, tmp_path, capsys):
    for name in "ab":
        plot.main(plot.Config(runs=f"1B={root}/small", figure="3", out=f"{tmp_path}/{name}.png", caption="toy world, 3 seeds: mean and range"))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes() and (tmp_path / "a.png").stat().st_size < 150_000
    assert list(json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]) == ["1B"]


def test_curves_of_runs(root, tmp_path, capsys):
    cfg = plot.Config(runs=f"KL={root}/small/kl_coef0.5_seed*,{root}/small/kl_coef0.2_seed1", metrics="scores,gold", out=f"{tmp_path}/new/c.png", title="t")
    plot.main(cfg)
    assert json.loads(capsys.readouterr().out) == {"out": cfg.out, "runs": {"KL": 3, "kl_coef0.2_seed1": 1}} and (tmp_path / "new/c.png").exists()
    with pytest.raises(UserError, match="none of the runs has nothing; they have: gold"):
        plot.main(plot.Config(runs=f"{root}/small/kl_coef0.2_seed1", metrics="nothing"))
    with pytest.raises(UserError, match="matches no run"):
        plot.main(plot.Config(runs=f"{root}/nowhere"))
