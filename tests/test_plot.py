"""Figures from a synthetic study: the right runs, labels with win rates, bands over seeds, and one line of
advice where runs are missing."""

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from rlhf.config import UserError
from study import figures, plot
from study.arms import by_lr, kl_constrained
from study.figures import FIGURES
from study.fits import best_of_n_fit, gao_fit
from study.logs import find_runs, read_reward
from study.panels import band, pyplot
from study.standing import mark

UPDATES = 40
SEEDS = (1, 2, 3)
TOP_LR = 1e-3
BETAS = (0.5, 0.2, 0.05, 0.02)
ALPHAS = (0.0, 0.1, 0.3, 1.0)
RLOO = {"reward": "kl:0.05", "lr": TOP_LR, "clip": 0.2, "invalid_logprob_fill": None, "k": 4, "resume": True}
PAIR = {"loss": "simpo", "gamma": 0.5, "beta": 2.0, "lr": 1e-4, "gamma_beta_ratio": None}


def write_lines(path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write(
    folder, name: str, script: str, config: dict, columns: dict,
    win_rate: float | None = None, checkpoints: dict | None = None,
) -> None:
    """A run as the scripts leave it, and its lines in the sweep's table."""
    run = folder / name
    run.mkdir(parents=True)
    about = {"command": f"{script}.py --out_dir={run}", "config": {**config, "out_dir": str(run)}}
    (run / "run.json").write_text(json.dumps(about))
    length = len(next(iter(columns.values())))
    rows = [{"step": i + 1} | {key: float(v[i]) for key, v in columns.items()} for i in range(length)]
    write_lines(run / "metrics.jsonl", rows)
    (folder / "eval").mkdir(exist_ok=True)
    models = {run: win_rate}
    models |= {run / "ckpt" / f"step_{step:08d}": won for step, won in (checkpoints or {}).items()}
    with (folder / "eval" / "metrics.jsonl").open("a") as table:
        for model, won in models.items():
            if won is not None:
                table.write(json.dumps({"model": str(model), "name": name, "win_rate": won}) + "\n")


def name_of(settings: dict, seed: int) -> str:
    return "_".join(f"{key}{value}" for key, value in {**settings, "seed": seed}.items())


def rloo(
    folder, seed: int, win_rate: float | None, gold: bool = True, updates: int = UPDATES, **settings,
) -> None:
    """KL has a plateau or grows with the learning rate; gold follows d (a - b log d); the proxy rises."""
    config = {**RLOO, "seed": seed, **settings}
    random = np.random.default_rng(seed)
    t = np.arange(1, updates + 1) / updates
    reward, coefficient = read_reward(config["reward"]).values()
    speed = {"kl": 0, "minent_length": 0.3, "maxent_length": 1}[reward]
    alpha = coefficient if speed else 0.1
    if speed:
        kl = 60 * speed * (config["lr"] / TOP_LR) ** 0.5 * t * (1 + alpha)
    else:
        kl = 0.8 / (coefficient + 0.02) * (1 - np.exp(-5 * t))
    kl = kl * (1 + 0.1 * random.normal()) + random.normal(size=updates) * 0.1 * t
    d = np.sqrt(np.maximum(kl, 1e-6))
    drift = (1e-3 + speed * 0.02 * t) * (config["lr"] / TOP_LR) ** 2
    columns = {
        "scores": 0.45 * (1 - np.exp(-0.4 * d)) + random.normal(size=updates) * 0.02,
        "kl_full": kl,
        "kl": kl,
        "length_normalized_surprisal": 1.3 - 0.4 * t + alpha * t + random.normal(size=updates) * 0.02,
        "kl_prev/approxkl_avg": drift * np.exp(0.3 * random.normal(size=updates)),
    }
    bonus = columns["length_normalized_surprisal"] if speed else -kl
    columns["rlhf_reward"] = columns["scores"] + coefficient * bonus
    if gold:
        gain = d * (0.15 - 0.08 * np.log(d) - 0.02 * speed)
        columns["gold"] = 0.1 + gain + random.normal(size=updates) * 0.01
    write(folder, name_of(settings, seed), "train_rloo", config, columns, win_rate)


def pair(folder, seed: int, updates: int = UPDATES, **settings) -> None:
    config = {**PAIR, "seed": seed, **settings}
    random = np.random.default_rng(seed)
    t = np.arange(1, updates + 1) / updates
    gamma = config["gamma"] or 0
    columns = {
        key: gamma * 0.2 + 0.5 * t * (i + 1) + random.normal(size=updates) * 0.1
        for i, key in enumerate(figures.PAIR_METRICS)
    }
    if config["loss"] == "dpo":
        columns["ref_margin"] = random.normal(size=updates) * 3 - 1
    won = 0.2 + 0.3 * gamma * (1 - gamma / 2)
    steps = range(updates // 8, updates, updates // 8)
    checkpoints = {step: 0.2 + (won - 0.2) * step / updates + 0.01 * seed for step in steps}
    write(folder, name_of(settings, seed), "train_simpo", config, columns, won + 0.01 * seed, checkpoints)


def best_of_n(folder, seed: int) -> None:
    n = 2.0 ** np.arange(9)
    kl = np.log(n) - (n - 1) / n
    d = np.sqrt(kl)
    scores = 0.3 * d + 0.01 * seed
    gold = 0.1 + d * (0.2 - 0.03 * d) + 0.01 * seed
    (folder / f"best_of_n_{seed}").mkdir()
    rows = [dict(zip(("n", "kl", "scores", "gold"), row)) for row in zip(n, kl, scores, gold)]
    write_lines(folder / f"best_of_n_{seed}" / "metrics.jsonl", rows)


def study(folder, gold: bool = True, updates: int = UPDATES):
    """One model size: the study's grid, ablations that no figure may draw, best-of-n tables."""
    write(folder, "sft", "train_sft", {"seed": 1}, {"loss": [1.0, 0.5]}, 0.2)
    for seed in SEEDS:
        for i, beta in enumerate(BETAS):
            rloo(folder, seed, 0.25 + 0.1 * i + 0.01 * seed, gold, updates, reward=f"kl:{beta}")
        for i, lr in enumerate((TOP_LR, TOP_LR / 10, TOP_LR / 20)):
            for j, alpha in enumerate(ALPHAS):
                won = 0.1 + 0.15 * i - 0.02 * j + 0.01 * seed
                rloo(folder, seed, won, gold, updates, reward=f"maxent_length:{alpha}", lr=lr)
        rloo(folder, seed, 0.3, gold, updates, reward="minent_length:0.1")
        rloo(folder, seed, 0.9, gold, updates, reward="maxent_length:0.1", invalid_logprob_fill=1.0)
        rloo(folder, seed, 0.9, gold, updates, reward="maxent_length:0.1", clip=1e-4)
        for lr in (1e-4, 1e-5):
            for gamma in (0.0, 0.25, 0.5, 1.0, 2.0):
                pair(folder, seed, updates, gamma=gamma, lr=lr)
        pair(folder, seed, updates, beta=0.1, gamma=0.5)
        pair(folder, seed, updates, loss="dpo", beta=0.05, gamma=None)
        best_of_n(folder, seed)
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


def with_rates(symbol: str, rates: dict) -> list[str]:
    return [f"{symbol} = {value:g} (win rate {won} %)" for value, won in rates.items()]


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_draws(folders, name):
    figure = FIGURES[name](folders)
    figure.draw_without_rendering()
    panels = {
        "1": 4, "2": 4, "3": 4, "4": 1, "5": 2, "6": 1, "7": 10, "8": 10, "9": 10, "10": 4, "11": 4, "12": 3,
    }.get(name, 3)
    assert len(figure.axes) == panels and all(axis.get_lines() for axis in figure.axes)
    assert min(text.get_fontsize() for text in figure.findobj(pyplot().Text) if text.get_text()) >= 10


def test_rloo_lines_are_the_runs_of_the_paper_with_win_rates(folders):
    one = figures.figure_1(folders)
    two = figures.figure_2(folders)
    eleven = figures.figure_11(folders)
    assert [axis.get_title() for axis in one.axes[:2]] == ["small, lr 1e-3", "small, lr 1e-4"]
    assert [axis.get_title() for axis in two.axes[:2]] == ["medium, lr 1e-4", "medium, lr 5e-5"]
    assert texts(one.axes[2].get_legend()) == with_rates("α", dict(zip(ALPHAS, (12, 10, 8, 6))))
    assert texts(two.axes[3].get_legend()) == with_rates("α", dict(zip(ALPHAS, (42, 40, 38, 36))))
    assert texts(eleven.legends[0])[0] == "α = 0 (win rate 27 %)"
    assert eleven.get_suptitle() == "large, lr 1e-4"
    kl_arms = [f"KL, β = {beta}" for beta in BETAS]
    maxent_arms = [f"MaxEnt, α = 0.1, lr {lr}" for lr in ("1e-3", "1e-4", "5e-5")]
    assert texts(figures.figure_3(folders).legends[0]) == [*kl_arms, *maxent_arms]
    twelve = figures.figure_12(folders)
    assert texts(twelve.legends[0]) == with_rates("β", dict(zip(BETAS, (27, 37, 47, 57))))


def test_offline_lines_are_the_runs_of_the_paper(folders):
    seven = figures.figure_7(folders)
    eight = figures.figure_8(folders)
    assert seven.get_suptitle() == "small: SimPO, β = 2, lr 1e-5"
    assert eight.get_suptitle() == "small: SimPO, β = 2, lr 1e-4"
    margins = [text.split(" (")[0] for text in texts(eight.legends[0])]
    assert margins == ["γ = 0", "γ = 0.25", "γ = 0.5", "γ = 1", "γ = 2"]
    assert len(texts(seven.legends[0])) == 4
    assert figures.figure_9(folders).get_suptitle() == "small: DPO, β = 0.05, lr 1e-4 (win rate 22 %)"


def test_band_is_the_range_over_seeds(folders):
    axis = figures.figure_12(folders, smooth=1).axes[1]
    arm = kl_constrained(folders["large"])[0.5]
    values = np.stack([run.metrics["rlhf_reward"] for run in arm])  # (seeds, updates)
    assert len(values) == 3 and np.array_equal(axis.get_lines()[0].get_ydata(), values.mean(0))
    corners = axis.collections[0].get_paths()[0].vertices
    for i in range(UPDATES):
        here = corners[corners[:, 0] == i + 1, 1]
        assert here.min() == values.min(0)[i] and here.max() == values.max(0)[i]


def test_band_ends_with_the_shortest_seed():
    long = {"step": np.arange(3), "a": np.array([0.0, 2.0, 4.0])}
    short = {"step": np.arange(2), "a": np.array([2.0, 2.0])}
    assert [list(part) for part in band([long, short], "a", smooth=2)] == [[0, 1], [1, 1.5], [0, 1], [2, 2]]


def test_checkpoints_start_at_the_sft_model_and_end_at_the_run(folders):
    lines = figures.figure_6(folders).axes[0].get_lines()
    assert list(lines[0].get_xdata()) == [0, *range(5, UPDATES + 1, 5)]
    assert lines[0].get_ydata()[0] == pytest.approx(20)
    assert lines[3].get_ydata()[-1] == pytest.approx(37) and lines[-1].get_label() == "SFT (20 %)"


def test_marks_compare_with_the_sft_model(folders):
    pairs = {(0.3, 0.2): "✓", (0.1, 0.2): "×", (0.2, 0.2): "=", (None, 0.2): "=", (0.3, None): "="}
    assert all(mark(*pair) == expected for pair, expected in pairs.items())
    marks = [text.get_text() for text in figures.figure_5(folders).axes[0].texts]
    kl_marks = [f"✓ β {beta}" for beta in BETAS]
    maxent_marks = [f"{m} α {alpha:g}" for alpha in ALPHAS for m in "×✓✓"]
    assert sorted(marks) == sorted([*kl_marks, *maxent_marks])


def test_fits_recover_their_coefficients(folders):
    kl = np.linspace(0, 30, 50)
    d = np.sqrt(kl)
    log = np.log(np.where(d > 0, d, 1))
    assert gao_fit(kl, d * (0.7 - 0.2 * log)) == pytest.approx((0.7, 0.2, 1), abs=1e-12)
    assert best_of_n_fit(kl, d * (0.5 - 0.03 * d)) == pytest.approx((0.5, 0.03, 1), abs=1e-12)
    legend = FIGURES["gold_kl"](folders).axes[0].get_legend()
    assert texts(legend)[-1] == "best of n: d (0.20 − 0.03 d), R² 1.00"


def test_rewards_are_read_as_term_and_coefficient():
    assert read_reward("kl") == read_reward("kl:0.05") == {"reward": "kl", "coefficient": 0.05}
    assert read_reward("maxent_length:0.1+score") == {"reward": "maxent_length", "coefficient": 0.1}
    both = {"reward": "kl:0.05+maxent_length:0.1", "coefficient": 1.0}
    assert read_reward("kl:5e-2+maxent_length:0.1") == both
    assert read_reward("score:0+kl:1") == {"reward": "score:0+kl:1", "coefficient": 1.0}


def test_runs_are_found_by_what_they_did(tmp_path):
    """A KL coefficient of 0 is an entropy coefficient of 0; another k is another arm."""
    rloo(tmp_path, 1, 0.5, reward="kl:0")
    rloo(tmp_path, 1, None, reward="maxent_length:0.1")
    rloo(tmp_path, 2, None, reward="maxent_length:1e-1")
    rloo(tmp_path, 1, None, reward="maxent_length:0.1", k=8)
    runs = find_runs(tmp_path)
    arms = by_lr(runs)[TOP_LR]
    assert list(arms) == [0.0, 0.1] and {run.config["k"] for run in arms[0.1]} == {4} and len(arms[0.1]) == 2
    assert list(figures.columns_of(arms, "α")) == ["α = 0 (win rate 50 %)", "α = 0.1"]
    assert figures.drift(list(arms.values())) == "kl_prev/approxkl_avg"
    zeros = {"kl_prev/approxkl_avg": np.zeros(UPDATES)}
    still = [replace(run, metrics={**run.metrics, **zeros}) for run in runs]
    assert figures.drift([still]) == "kl_prev/k3"


def test_old_runs_are_refused(tmp_path):
    columns = {"scores": [0.0, 0.1]}
    write(tmp_path, "old", "train_rloo", {"reward": "kl", "kl_coef": 0.1, "entropy_coef": 0.1}, columns)
    with pytest.raises(UserError, match="run it again"):
        find_runs(tmp_path)


def test_missing_runs_are_named(tmp_path, folders):
    rloo(tmp_path / "a", 1, None, gold=False)
    lonely = {"a": find_runs(tmp_path / "a")}
    advice = {
        "1": "2 learning rate", "3": "a: .*maxent_length", "4": "loss=dpo", "7": "loss=simpo",
        "best_of_n": "best_of_n", "gold_kl": "maxent_length",
    }
    for name, said in advice.items():
        with pytest.raises(UserError, match=said):
            FIGURES[name](lonely)
    rloo(tmp_path / "a", 1, None, gold=False, reward="maxent_length:0.1")
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
    caption = "toy world, 3 seeds: mean and range"
    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    for picture in pictures:
        plot.main(plot.Config(runs=f"1B={root}/small", figure="3", out=str(picture), caption=caption))
    a, b = (picture.read_bytes() for picture in pictures)
    assert a == b and len(a) < 150_000
    assert list(json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]) == ["1B"]


def test_curves_of_runs(root, tmp_path, capsys):
    one = f"{root}/small/rewardkl:0.2_seed1"
    cfg = plot.Config(
        runs=f"KL={root}/small/rewardkl:0.5_seed*,{one}", metrics="scores,gold", out=f"{tmp_path}/new/c.png",
        title="t",
    )
    plot.main(cfg)
    said = json.loads(capsys.readouterr().out)
    assert said == {"out": cfg.out, "runs": {"KL": 3, "rewardkl:0.2_seed1": 1}}
    assert (tmp_path / "new/c.png").exists()
    with pytest.raises(UserError, match="none of the runs has nothing; they have: gold"):
        plot.main(plot.Config(runs=one, metrics="nothing"))
    with pytest.raises(UserError, match="matches no run"):
        plot.main(plot.Config(runs=f"{root}/nowhere"))
