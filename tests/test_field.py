"""The whole field: its plan, what is read off the courses of its runs, its table and its picture."""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from test_online_study import configured

from evaluation.statistics import holm, t_interval, t_test
from rlhf.config import UserError, parser
from rlhf.losses import PREFERENCE_LOSSES
from study import field, online
from study.claims_field import RULES
from study.field import ARMS, EVERYTHING, FACTORS, FAMILIES, METHODS, Config, chain
from study.field_table import compared, field_section, row
from study.figures_field import figure_field, spread_out
from study.frontier import Course, behind_best, chosen, course, equal_kl, falls, gold_at, peaks
from study.logs import RunLog
from study.pipeline import sweep
from study.plot import save

SEEDS = 4
SFT = 0.5  # gold


def made(kl, gold, seed: int, noise: float = 0.004, length: float = 10.0) -> Course:
    """A course through these points, SFT's first; each seed has its own noise."""
    random = np.random.default_rng([seed, len(kl), int(1e6 * gold[-1]) % 10**6])
    noisy = np.array(gold, dtype=float) + noise * random.normal(size=len(gold))
    tokens = length + 0.05 * random.normal(size=len(gold))
    return Course(np.array(kl, dtype=float), np.concatenate([[SFT], noisy[1:]]), tokens)


def arm(end: float, peak: float | None = None, kl: float = 4.0, at: float = 0.5, **options) -> list[Course]:
    """Gold from SFT's to `end`, over `peak` at a share `at` of the way; sqrt(KL) rises evenly to sqrt(kl)."""
    t = np.linspace(0, 1, 9)
    middle = SFT + at * (end - SFT) if peak is None else peak
    gold = np.interp(t, [0, at, 1], [SFT, middle, end])
    return [made(kl * t**2, gold, seed, **options) for seed in range(SEEDS)]


# --- the plan


def test_every_method_is_in_one_family():
    members = " ".join(FAMILIES.values()).split()
    assert sorted(members) == sorted([*PREFERENCE_LOSSES, *online.METHODS])
    assert not set(METHODS) & set(ARMS)


def test_every_method_has_the_same_number_of_runs():
    cfg = Config(out_dir="o")
    rates = {name: set() for name in METHODS}
    for name in METHODS:
        folders = {chain(name, factor, seed, cfg)[-1].out for factor in METHODS[name].factors
                   for seed in (1, 2, 3, 4)}
        assert len(folders) == 12
        for factor in METHODS[name].factors:
            rates[name].add(configured(chain(name, factor, 1, cfg)[-1])[1].lr)
    for name, found in rates.items():
        low, own, high = sorted(found)
        assert own / low == pytest.approx(3, rel=0.02) and high / own == pytest.approx(3), name


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_command_is_valid(name):
    """Every option is known and the script's own check passes; about eight checkpoints of a usual run, and
    all are kept; a seed has its own reward models."""
    cfg = Config(out_dir="o", episodes=2560)
    for factor in EVERYTHING[name].factors:
        for task in chain(name, factor, 3, cfg):
            module, given = configured(task)
            if hasattr(module, "with_options"):
                given = module.with_options(given)
                given = given[0] if isinstance(given, tuple) else given
            if hasattr(module, "check"):
                module.check(given)
            assert given.seed == 3 and task.may_diverge and "{" not in task.command
            models = [m for m in getattr(given, "reward_model", "").split(",") if m]
            assert all(model.startswith("o/models_s3/rm") for model in models)
            if hasattr(given, "keep"):
                assert given.keep == 0 and given.save_every in (4, 5, 7, 20)
        assert given.out_dir == f"o/{name}_{factor}_s3"
    if "sampl" in module.__name__ or hasattr(given, "episodes"):
        long = 3 if name.startswith(("free", "weak", "rloo_long")) else 1
        assert given.episodes == long * 2560


def test_sweeps_are_valid_commands():
    import evaluate

    task = sweep(Path("o"), "eval_dpo_s1", ["o/sft", "o/dpo_x1_s1/ckpt/step_00000020"], 200)
    parsed = parser(evaluate.Config, None).parse_args(task.words[1:])
    given = evaluate.Config(**{f.name: getattr(parsed, f.name) for f in fields(evaluate.Config)})
    evaluate.check(given)
    assert given.temperature == given.sample_temperature == 0.7 and given.n == 200


def write_log(task, last: int) -> None:
    task.out.mkdir(parents=True)
    (task.out / "metrics.jsonl").write_text("".join(f'{{"step": {i}}}\n' for i in range(1, last + 1)))


def test_what_is_scored(tmp_path):
    """Every checkpoint, the final model only where it is none of them, of a run that diverged what it has;
    and the same when the checkpoints are gone."""
    cfg = Config(out_dir=str(tmp_path))
    tasks = {factor: chain("simpo", factor, 1, cfg)[0] for factor in FACTORS}
    for factor, last in {"x0.33": 156, "x1": 140, "x3": 19}.items():
        write_log(tasks[factor], last)
    (tasks["x3"].out / "diverged.txt").write_text("not finite")
    (scoring,) = field.scoring("simpo", 1, cfg)
    models = scoring.command.split("--model=")[1].split()[0].replace(f"{tmp_path}/", "").split(",")
    steps = [f"simpo_x0.33_s1/ckpt/step_{20 * i:08d}" for i in range(1, 8)]
    assert models[:9] == ["sft", *steps, "simpo_x0.33_s1"]  # 156 updates
    assert models[9:] == [step.replace("x0.33", "x1") for step in steps]  # 140; none of 19 that diverged
    assert field.scoring("dpo", 1, cfg) == []


def test_names_that_are_unknown():
    with pytest.raises(UserError, match="--only=dpoo: unknown: dpoo; known: dpo"):
        field.main(Config(out_dir="o", only="dpoo"))


# --- courses


def test_course_of_a_run_of_two_steps():
    def line(kl, gold):
        return {"kl_full": kl, "gold": gold, "response_length": 10.0}

    first = RunLog(Path("m_dpo"), "", {}, {}, {}, line(1.5, 0.62), {5: line(1.0, 0.6)})
    second = RunLog(Path("m"), "", {}, {}, {}, {}, {10: line(3.0, 0.8), 5: line(2.0, 0.7)})
    found = course(line(0.001, 0.5), [first, second])
    assert found.kl.tolist() == [0, 1.0, 1.5, 2.0, 3.0]
    assert found.gold.tolist() == [0.5, 0.6, 0.62, 0.7, 0.8]


def test_gold_at_a_kl_by_hand():
    """sqrt(KL) 0, 1, 2, 1.5, 3: KL 2.25 lies half way between the second and the third point, though the run
    comes there again."""
    run = Course(np.array([0, 1, 4, 2.25, 9.0]), np.array([0.5, 0.7, 0.9, 0.1, 0.2]), np.zeros(5))
    assert gold_at(run, 2.25) == pytest.approx(0.8)
    assert gold_at(run, 1.0) == pytest.approx(0.7)
    assert gold_at(run, 0.25) == pytest.approx(0.6)
    assert gold_at(run, 6.25) == pytest.approx(0.1 + 0.1 * (2.5 - 1.5) / 1.5)
    assert np.isnan(gold_at(run, 10.0))


def test_equal_kl_takes_what_every_run_reaches():
    low, high = arm(0.7, kl=1.2, noise=0), arm(0.9, kl=9, noise=0)
    levels, gain = equal_kl(low, high)
    assert levels == [0.25, 0.5, 1.0]
    # straight lines over sqrt(KL): 0.2 per 1.2**0.5, 0.4 per 3
    d = np.sqrt(levels)
    assert gain == pytest.approx(np.full(4, (d * (0.2 / 1.2**0.5 - 0.4 / 3)).mean()), abs=1e-9)
    assert equal_kl(arm(0.7, kl=0.1), high) == ([], pytest.approx([]))


def test_peaks_are_chosen_by_the_other_seeds():
    gold = [[0.5, 0.6, 0.9, 0.4], [0.5, 0.7, 0.6, 0.4], [0.5, 0.7, 0.6, 0.4]]
    runs = [Course(np.arange(4.0), np.array(values), np.zeros(4)) for values in gold]
    assert peaks(runs) == [1, 2, 2]  # 0.9 is the luck of the first seed, which it is not asked about
    assert falls(runs) == pytest.approx([0.2, 0.2, 0.2])
    assert chosen({"low": runs, "high": [runs[0]] * 3}) == [("high", 2), ("high", 2), ("high", 2)]


def test_the_luck_of_many_is_not_taken_for_a_peak():
    random = np.random.default_rng(0)
    flat = [Course(np.arange(9.0), 0.5 + 0.1 * random.normal(size=9), np.zeros(9)) for _ in range(400)]
    found = row({f"x{i}": flat[i : i + 4] for i in range(0, 400, 4)})
    assert found.highest.mean() == pytest.approx(0.5, abs=0.15)
    assert np.mean([run.gold.max() for run in flat]) > 0.62  # what each seed's own highest would say
    means = [row({f"x{j}": flat[i + j : i + j + 4] for j in (0, 4, 8)}).highest.mean()
             for i in range(0, 396, 12)]
    assert np.mean(means) == pytest.approx(0.5, abs=0.03)


def test_a_run_that_ended_early_stays_at_its_end():
    short = Course(np.arange(3.0), np.array([0.5, 0.6, 0.7]), np.zeros(3), diverged=True)
    long = Course(np.arange(4.0), np.array([0.5, 0.6, 0.7, 0.8]), np.zeros(4))
    assert peaks([short, long]) == [3, 2] and falls([short, long]) == pytest.approx([0, -0.1])
    found = row({"x1": [short, long]})
    assert found.highest.tolist() == [0.7, 0.7] and found.rates["x1"][1] == 1


# --- how sure


def test_holm_by_hand():
    """Of four: 0.01 x 4, 0.02 x 3, 0.025 x 2 is below the one before, 0.5."""
    assert holm([0.02, 0.5, 0.01, 0.025]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([0.4, 0.6]) == pytest.approx([0.8, 0.8]) and holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_t_test_goes_with_the_interval():
    values = [0.1, 0.3, 0.2, 0.5]
    assert t_test(values) == pytest.approx(0.0486, abs=1e-4)  # by hand: t = 3.2205, 3 degrees
    shift = t_interval(values)[1]  # the lower end of the 95 % interval
    assert t_test([v - shift for v in values]) == pytest.approx(0.05, abs=1e-6)
    assert (t_test([1.0]), t_test([0, 0]), t_test([1, 1])) == (1.0, 1.0, 0.0)


def test_behind_the_best_of_the_other_seeds():
    highest = np.array([[0.9, 0.5, 0.5], [0.6, 0.7, 0.7]])  # the first is ahead in the mean by one seed
    assert behind_best(highest) == pytest.approx(np.array([[-0.3, 0, 0], [0, -0.2, -0.2]]))


# --- table and picture


def made_up_field() -> dict[str, dict[str, list[Course]]]:
    """Each method has its own peak; chipo's is the highest, at the largest rate; cringe collapses."""
    found = {}
    for i, name in enumerate(METHODS):
        peak = 0.60 + 0.0025 * i
        end, kl = peak - 0.05 * (i % 3), 1.5 + 0.2 * (i % 20)
        rates = {"x0.33": arm(peak - 0.05, kl=kl / 3), "x1": arm(end, peak=peak, kl=kl),
                 "x3": arm(end - 0.1, peak=peak - 0.03, kl=3 * kl, at=0.3)}
        if name == "chipo":
            rates["x3"] = arm(0.8, kl=12)
        if name == "cringe":
            rates = dict.fromkeys(FACTORS, arm(-1, peak=0.52, kl=34, at=0.25))
        found[name] = rates
    return found


def test_the_table():
    made_field = made_up_field()
    made_field["dpo"]["x3"][2] = Course(**{**vars(made_field["dpo"]["x3"][2]), "diverged": True})
    spent = {name: [10.0, 20.0] for name in METHODS} | {"ipo": []}
    text = field_section(made_field, METHODS, [1, 2, 3, 4], spent)
    assert "56 methods" in text and "4\nseeds at each: 12 runs" in text and "55 comparisons" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()
            if line.startswith("|")]
    header, _, *rows = rows
    cells = {line[0]: dict(zip(header, line)) for line in rows}
    assert len(cells) == 56 and rows[0][0] == "`chipo`"
    best = cells["`chipo`"]
    assert best["highest gold"].startswith("0.80 ±") and best["p"] == "" and best["rate"] == "x3"
    assert best[""] == "the best" and best["gold at KL 10"].startswith("0.7")
    dpo = cells["`dpo`"]
    assert dpo["behind"].startswith("0.20 ±") and dpo[""] == "below the best" and float(dpo["p"][2:]) < 0.05
    assert dpo["gold at KL 10"] == "" and dpo["rate"] == "x1" and "†" in dpo["the rates"].split("/")[2]
    assert dpo["s"] == "15" and cells["`ipo`"]["s"] == "" and dpo["seeds"] == "4"
    assert dpo["settings"] == "`--loss=dpo --beta=0.05 --label_smoothing=0`"
    assert cells["RLOO (`rloo`)"]["settings"] == "`train_rloo.py --reward=kl:0.1`"
    assert float(cells["`cringe`"]["fall"].split()[0]) == pytest.approx(1.5, abs=0.05)


def test_only_what_is_beyond_the_spread_is_below_the_best():
    noisy = {"a": {"x1": arm(0.8)}, "b": {"x1": arm(0.79, noise=0.03)}, "c": {"x1": arm(0.6)}}
    found = compared({name: row(arms) for name, arms in noisy.items()})
    assert found["b"][1] > 0.05 > found["c"][1] and found["a"][1] == 1
    assert found["c"][0].mean() == pytest.approx(0.2, abs=0.01)


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    made_field = made_up_field()
    figure = figure_field(made_field, METHODS)
    panels = [axis for axis in figure.axes if axis.get_visible()]
    assert [panel.get_title(loc="left") for panel in panels] == list(dict.fromkeys(
        METHODS[name].family for name in METHODS))
    named = [text.get_text() for panel in panels for text in panel.texts]
    assert len(named) == 56 and "online dpo" in named
    assert "cringe → -1.0 (KL 34)" in named  # it leaves the panel
    for panel in panels:
        assert len(panel.get_lines()) > 56  # its own, the others in grey, the SFT model's gold
        heights = sorted(text.xyann[1] for text in panel.texts)
        assert min(np.diff(heights), default=1) > 0.1 and 0 <= heights[0]
    save(figure, str(tmp_path / "field.png"))
    assert (tmp_path / "field.png").stat().st_size > 50_000


def test_labels_are_spread_out():
    assert spread_out([0.5, 0.5, 0.9], 0.1) == pytest.approx([0.45, 0.55, 0.9])
    assert spread_out([0.9, 0.02, 0.0], 0.1) == pytest.approx([0.96 - 0.02, 0.1, 0.0], abs=0.05)


# --- from the runs to the page


def write_field(out: Path, names: list[str], cfg: Config) -> None:
    """What finished runs leave, checkpoints deleted: logs, sweeps, seconds."""
    def about(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        told = {"command": "x.py", "config": {}, "started": "2026-11-21 12:00:00", "torch": "2.13"}
        (folder / "run.json").write_text(json.dumps(told))

    def scored(model: Path, kl: float, gold: float) -> str:
        return json.dumps({"model": str(model), "kl_full": kl, "gold": gold, "response_length": 9}) + "\n"

    about(out / "sft")
    (out / "sft/metrics.jsonl").write_text('{"step": 1}\n')
    for i, name in enumerate(names):
        for seed in (1, 2):
            lines = [scored(out / "sft", 0, SFT)]
            for factor, height in zip(FACTORS, (0.6, 0.7, 0.65)):
                (task,) = chain(name, factor, seed, cfg)
                about(task.out)
                (task.out / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
                gold = height + 0.1 * i + 0.002 * seed
                lines.append(scored(task.out / "ckpt/step_00000001", 1.0, gold))
                lines.append(scored(task.out, 4.0, gold - 0.1))
                with (out / "seconds.txt").open("a") as file:
                    file.write(f"{task.out.name} 12\n")
            (out / f"eval_{name}_s{seed}").mkdir()
            (out / f"eval_{name}_s{seed}/metrics.jsonl").write_text("".join(lines))


def test_the_page_from_finished_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    cfg = Config(out_dir=str(tmp_path), seeds="1,2", only="dpo,rloo")
    write_field(tmp_path, ["dpo", "rloo"], cfg)
    monkeypatch.setattr(field, "run_all", lambda *args: None)
    assert field.main(cfg)["methods"] == 2
    text = (tmp_path / "field.md").read_text()
    (rloo,) = [line for line in text.splitlines() if line.startswith("| RLOO (`rloo`)")]
    cells = [cell.strip() for cell in rloo.split("|")[1:-1]]
    assert cells[1].startswith("0.80 ± 0.01") and cells[4] == "the best"
    assert cells[5].startswith("0.80 ±") and cells[6].startswith("0.73 ±") and cells[7] == ""
    assert cells[8:13] == ["1.0 ± 0.0", "0.10 ± 0.00", "x1", "0.70 / 0.80 / 0.75", "12"]
    assert text.count("**not decided here**") == 2 * len(RULES) and "begun 2026-11-21" in text
    assert (tmp_path / "figure_field.png").exists()


def test_stages_of_a_seed(tmp_path, monkeypatch):
    """Reward models before the runs that ask them, and none for offline methods; checkpoints are deleted when
    they have been scored."""
    done = []

    def finish(task) -> None:
        done.append(task.out.name)
        if "_x" in task.out.name:
            write_log(task, 5)
            (task.out / "ckpt").mkdir()
        if task.out.name.startswith("eval"):
            assert (tmp_path / "dpo_x1_s2/ckpt").exists()

    monkeypatch.setattr(field, "start_all", lambda tasks, logs: [finish(task) for task in tasks])
    monkeypatch.setattr(field, "start_chains", lambda chains, logs: [finish(t) for c in chains for t in c])
    cfg = Config(out_dir=str(tmp_path))
    field.run_all(["dpo", "rloo"], [2], cfg)
    models = ["rm", "rm_2", "rm_3", "rm_on_1", "rm_on_2", "rm_on_3", "rm_average"]
    runs = [f"{name}_{factor}_s2" for name in ("dpo", "rloo") for factor in FACTORS]
    assert done == ["data", "sft", *models, *runs, "eval_dpo_s2", "eval_rloo_s2"]
    assert not list(tmp_path.glob("*/ckpt"))
    assert field.preparation(["dpo"], 2, tmp_path) == []
    made_of = [field.preparation(["rloo"], seed, tmp_path)[0] for seed in (1, 2, 3)]
    assert len({task.command.split("--seed=")[1] for tasks in made_of for task in tasks}) == 9
