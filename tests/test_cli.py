"""The command line, the tables and batches, and a run's directory: what a user types, and what is said when
it cannot be done."""

import importlib
import inspect
import json
import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer
from util import raw_config, tiny_tokenizer

from rlhf.common import adamw, learning_rate, optimizer_step, set_lr, setup
from rlhf.config import RunError, UserError, command_line, field_help
from rlhf.data import (
    batch_indices,
    check_distinct,
    check_tokenizer,
    has_column,
    read_meta,
    read_table,
    tables,
)
from rlhf.model import NeoX, NeoXConfig
from rlhf.pretrained import from_pretrained
from rlhf.rewards import parse_reward
from rlhf.run import Run

ROOT = Path(__file__).parents[1]
TOKENIZER = tiny_tokenizer()


@dataclass(frozen=True, kw_only=True)
class Config:
    # I/O
    out_dir: str                     # where to write; 100% of it
    resume: bool = False             # continue
    overwrite: bool = False          # replace
    # optimization
    lr: float = 3e-6                 # peak learning rate
    steps: int = 8                   # number of updates
    loss: Literal["dpo", "simpo"] = "dpo"  # which loss
    k: Literal[2, 4] = 2             # samples
    clip: float | None = None        # unset: no clipping
    share: str = "50%"               # share of it
    save_every: int = 2              # steps between checkpoints
    keep: int = 0                    # newest checkpoints that stay; 0 = all


def parse(monkeypatch, *arguments, main=None) -> Config | None:
    """What main receives."""
    received = []

    def keep(cfg):
        received.append(cfg)

    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    command_line(main or keep, Config)
    return received[0] if received else None


def fails(monkeypatch, capsys, *arguments, main=None) -> tuple[int, str]:
    """(exit code, last line on stderr)"""
    with pytest.raises(SystemExit) as stop:
        parse(monkeypatch, *arguments, main=main)
    return stop.value.code, capsys.readouterr().err.strip().splitlines()[-1]


# --- config.py


def test_defaults_and_overrides(monkeypatch):
    assert parse(monkeypatch, "--out_dir=x") == Config(out_dir="x")
    cfg = parse(
        monkeypatch, "--out_dir=a b", "--lr=1e-4", "--steps", "3", "--loss=simpo", "--k=4", "--clip=0.5",
        "--keep=3",
    )
    assert cfg == Config(out_dir="a b", lr=1e-4, steps=3, loss="simpo", k=4, clip=0.5, keep=3)


@pytest.mark.parametrize(
    "text, value",
    [
        ("--resume", True),
        ("--resume=true", True),
        ("--resume=True", True),
        ("--resume=1", True),
        ("--resume=yes", True),
        ("--resume=false", False),
        ("--resume=0", False),
        ("--resume=no", False),
    ],
)
def test_booleans(text, value, monkeypatch):
    assert parse(monkeypatch, "--out_dir=x", text).resume is value


@pytest.mark.parametrize(
    "argument, named",
    [
        ("--lrr=1", "--lrr=1"),
        ("--step=1", "--step=1"),
        ("lr=1", "lr=1"),
        ("--lr=fast", "--lr"),
        ("--steps=1.5", "--steps"),
        ("--loss=kto", "--loss"),
        ("--k=3", "--k"),
        ("--resume=maybe", "expected true or false, got 'maybe'"),
        ("--clip=none", "--clip"),
    ],
)
def test_bad_options_end_with_code_2(argument, named, monkeypatch, capsys):
    code, line = fails(monkeypatch, capsys, "--out_dir=x", argument)
    assert code == 2 and named in line


def test_required_option(monkeypatch, capsys):
    code, line = fails(monkeypatch, capsys)
    assert code == 2 and "--out_dir" in line


def test_help_is_the_comments(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(monkeypatch, "--help")
    out = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for text in (
        "The command line, the tables", "I/O:", "optimization:", "where to write; 100% of it (required)",
        "peak learning rate [3e-06]", "{dpo,simpo} which loss [dpo]", "{2,4} samples [2]",
        "unset: no clipping [None]", "share of it [50%]", "[true|false] continue [False]",
    ):
        assert text in out, text
    io, optimization = out.split("I/O:")[1].split("optimization:")  # each title once, its options under it
    assert "--resume" in io and "--lr" in optimization


@dataclass
class Explained:
    first: int = 1  # one line
    second: str = "x"  # a line that goes on
    #                    and on,
    #  to the end
    # title (of the block below)
    third: Literal["a", "b"] = "a"  # after a title
    long: Literal["a fairly long default"] = "a fairly long default"
    #   and its help below it
        # both ways
    # another title
    other: float = 0.0  # the last


def test_a_comment_line_that_is_indented_further_continues_the_help():
    assert field_help(Explained) == {
        "first": ("options", "one line"), "second": ("options", "a line that goes on and on, to the end"),
        "third": ("title (of the block below)", "after a title"),
        "long": ("title (of the block below)", "and its help below it both ways"),
        "other": ("another title", "the last"),
    }


def test_the_epilog_is_the_end_of_the_help(monkeypatch, capsys):
    def main(cfg):
        pass

    monkeypatch.setattr(sys, "argv", ["script.py", "--help"])
    with pytest.raises(SystemExit):
        command_line(main, Config, epilog="the last\n   words, 100% as they are")
    assert capsys.readouterr().out.endswith("\n\nthe last\n   words, 100% as they are\n")


@pytest.mark.parametrize("error, code", [(UserError("no such thing"), 2), (RunError("not finite"), 1)])
def test_errors_are_one_line(error, code, monkeypatch, capsys):
    def main(cfg):
        raise error

    assert fails(monkeypatch, capsys, "--out_dir=x", main=main) == (code, f"error: {error}")


# --- data.py


@pytest.mark.parametrize("n, batch_size", [(10, 4), (7, 7), (12, 3), (5, 13), (1, 3)])
def test_every_row_once_per_epoch(n, batch_size):
    """The concatenated batches are one permutation after another, also where a batch spans epochs."""
    stream = [row for step in range(3 * n) for row in batch_indices(n, batch_size, step, seed=4)]
    epochs = [stream[i : i + n] for i in range(0, len(stream) - n + 1, n)]
    assert len(epochs) >= 3 and all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n > 4:
        assert epochs[0] != epochs[1] and epochs[0] != list(range(n))


def test_batches_are_a_function_of_the_step():
    assert [batch_indices(50, 8, step, 1) for step in (9, 3, 9)] == [
        batch_indices(50, 8, step, 1) for step in (9, 3, 9)
    ]
    state = torch.get_rng_state()
    one, other = (batch_indices(50, 8, 3, seed) for seed in (1, 2))
    assert one != other and torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def data_dir(tmp_path):
    pq.write_table(
        pa.table({"id": ["a", "b", "c"], "query_token": [[3, 4], [5], [6, 7, 8]]}),
        tmp_path / "sft_train.parquet",
    )
    pq.write_table(pa.table({"id": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    (tmp_path / "broken.parquet").write_bytes((tmp_path / "sft_train.parquet").read_bytes()[:-20])
    (tmp_path / "meta.json").write_text(json.dumps({"world": "toy", "response_tokens": 9}))
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path)


def test_tables(data_dir, tmp_path):
    assert read_table(data_dir, "sft_train", ["query_token", "id"]) == {
        "query_token": [[3, 4], [5], [6, 7, 8]], "id": ["a", "b", "c"],
    }
    assert read_table(data_dir, "sft_train", ["id"], limit=2) == {"id": ["a", "b"]}
    assert read_table(data_dir, "sft_train", ["id"], limit=9) == {"id": ["a", "b", "c"]}
    assert read_meta(data_dir) == {"world": "toy", "response_tokens": 9}
    assert has_column(data_dir, "sft_train", "id") and not has_column(data_dir, "sft_train", "facts")
    assert tables(data_dir, "sft_") == ["sft_train"] and tables(data_dir, "pairs_") == []


@pytest.mark.parametrize(
    "name, columns, named",
    [
        ("sft_test", ["id"], r"sft_test.parquet: no such table \(tables there: broken, empty, sft_train\)"),
        (
            "sft_train",
            ["id", "facts", "batch"],
            r"sft_train.parquet: no column facts, batch \(columns there: id, query_token\)",
        ),
        ("empty", ["id"], "empty.parquet: the table is empty"),
        ("broken", ["id"], "broken.parquet: not a readable parquet file"),
    ],
)
def test_bad_tables(data_dir, name, columns, named):
    with pytest.raises(UserError, match=named):
        read_table(data_dir, name, columns)


def test_no_prepared_data(tmp_path):
    with pytest.raises(UserError, match="no meta.json"):
        read_meta(str(tmp_path))


def test_tokenizer_must_be_the_data_s_own(data_dir, tmp_path):
    check_tokenizer(data_dir, tiny_tokenizer(), vocab_size=TOKENIZER.get_vocab_size(), model="m")
    said = "m: the data has tokens up to 275, the model's embedding only 50 rows"
    with pytest.raises(UserError, match=said):
        check_tokenizer(data_dir, TOKENIZER, vocab_size=50, model="m")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json"):
        check_tokenizer(data_dir, TOKENIZER, vocab_size=1000, model="m")


def test_pairs_that_teach_nothing():
    check_distinct("pairs", pa.array([[1], [2]]), pa.array([[2], [1]]))
    with pytest.raises(UserError, match="chosen equals rejected in 2 rows, the first is row 1"):
        check_distinct("pairs", pa.array([[1], [2], [3]]), pa.array([[2], [2], [3]]))


# --- common.py: schedule and step


def rates(schedule, warmup, total=10):
    return [learning_rate(step, total, 2.0, schedule, warmup) for step in range(total)]


def test_learning_rates():
    assert rates("constant", 0.0) == [2.0] * 10
    assert rates("linear", 0.0) == pytest.approx([2.0 * (1 - t / 10) for t in range(10)])
    assert rates("cosine", 0.0) == pytest.approx([1 + math.cos(math.pi * t / 10) for t in range(10)])
    assert rates("linear", 0.2) == pytest.approx([1.0, 2.0] + [2.0 * (1 - t / 8) for t in range(8)])
    assert rates("constant", 0.4) == pytest.approx([0.5, 1.0, 1.5, 2.0] + [2.0] * 6)
    assert rates("cosine", 1.0) == pytest.approx([0.2 * t for t in range(1, 11)])
    assert learning_rate(0, 1, 2.0, "cosine", 0.1) == 2.0


def small_model(seed=0):
    return NeoX(
        NeoXConfig.from_dict(raw_config(vocab_size=300, hidden_size=24, num_hidden_layers=1))
    ).init_weights(seed)


def test_optimizer_step():
    model = small_model()
    optimizer = adamw(model, 0.0, eps=1e-8, weight_decay=0.0)
    set_lr(optimizer, 0.1)
    before = [p.detach().clone() for p in model.parameters()]
    sum((3 * p).sum() for p in model.parameters()).backward()
    count = sum(p.numel() for p in model.parameters())
    assert optimizer_step(model, optimizer, 1.0, 1.0, 0) == pytest.approx(3 * count**0.5, rel=1e-5)
    for p, q in zip(model.parameters(), before):
        # Adam's first step is the learning rate in the gradient's sign
        torch.testing.assert_close(p, q - 0.1, rtol=0, atol=1e-5)
        assert p.grad is None


@pytest.mark.parametrize("loss, gradient", [(math.nan, 1.0), (1.0, math.inf), (1.0, math.nan)])
def test_a_step_that_is_not_finite_ends_the_run_and_moves_nothing(loss, gradient):
    model = small_model()
    optimizer = adamw(model, 0.1, eps=1e-8, weight_decay=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, gradient)
    with pytest.raises(RunError, match="step 7: .*not finite"):
        optimizer_step(model, optimizer, loss, 0.0, 7)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_unknown_device():
    with pytest.raises(UserError, match="--device=abacus"):
        setup(0, "abacus")


# --- common.py: the directory of a run


def test_what_is_not_finite_is_null_in_every_file(tmp_path, capsys):
    """Infinity and NaN are words of Python: no other reader of JSON knows them."""
    run, model = train(Config(out_dir=str(tmp_path / "run")), 1)
    run.log(
        2,
        {"loss": math.inf, "kl": -math.inf, "gold": math.nan, "lr": 0.5, "eos": None, "rows": 3},
        show=("loss", "gold"),
    )
    result = run.finish(model, TOKENIZER, {"gold": math.nan, "kl": 1.5})
    printed = capsys.readouterr().out.splitlines()[-1]
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    last, written, said = (
        json.loads(text, parse_constant=pytest.fail)
        for text in (lines[-1], (tmp_path / "run/result.json").read_text(), printed)
    )
    assert last == {"step": 2, "loss": None, "kl": None, "gold": None, "lr": 0.5, "eos": None, "rows": 3}
    assert written == said == result and (result["gold"], result["kl"]) == (None, 1.5)


@pytest.fixture
def cfg(tmp_path):
    return Config(out_dir=str(tmp_path / "run"))


def train(cfg, last: int, start_model=0):
    """A run of 8 updates stopped after `last`; every step's metric is its number."""
    run, model = Run(cfg, 8), small_model(start_model)
    optimizer, generator = adamw(model, 0.01, eps=1e-8, weight_decay=0.0), torch.Generator().manual_seed(1)
    for step in range(run.begin(model, optimizer, generator), last):
        noise = torch.randn(24, generator=generator) + torch.randn(24)
        (model.gpt_neox.final_layer_norm.weight * noise).sum().backward()
        optimizer.step(), optimizer.zero_grad()
        run.log(step + 1, {"loss": step + 1.5})
        run.checkpoint(step + 1, model, TOKENIZER, optimizer, generator)
    return run, model


def out(cfg) -> Path:
    return Path(cfg.out_dir)


def folders(cfg) -> list[str]:
    return sorted(p.name for p in (out(cfg) / "ckpt").iterdir())


def test_an_existing_run_is_refused(cfg):
    train(cfg, 2)
    with pytest.raises(UserError, match="exists: continue it with --resume, replace it with --overwrite"):
        Run(cfg, 8)
    with pytest.raises(UserError, match="--lr was 3e-06, is 0.5"):
        Run(replace(cfg, resume=True, lr=0.5), 8)
    Run(replace(cfg, resume=True, keep=3), 8)  # settings that change no number may differ
    run = Run(replace(cfg, overwrite=True, lr=0.5), 8)
    assert (out(cfg) / "ckpt").exists(), "nothing is removed before data and models are known to be good"
    model = small_model(0)
    assert run.begin(model, adamw(model, 0.5, eps=1e-5, weight_decay=0.0)) == 0
    assert (
        not (out(cfg) / "ckpt").exists()
        and json.loads((out(cfg) / "run.json").read_text())["config"]["lr"] == 0.5
    )


def test_overwrite_removes_only_runs(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mother.txt").write_text("dear")
    with pytest.raises(UserError, match="holds no run.json"):
        Run(Config(out_dir=str(tmp_path / "letters"), overwrite=True), 8)
    assert (tmp_path / "letters" / "mother.txt").exists()


@pytest.mark.parametrize("keep, expected", [(0, [2, 4, 6]), (1, [6]), (2, [4, 6]), (9, [2, 4, 6])])
def test_checkpoints_that_stay(keep, expected, cfg):
    cfg = replace(cfg, keep=keep)
    train(cfg, 7)
    assert folders(cfg) == [f"step_{step:08d}" for step in expected]  # and no folder half-written
    for step in expected:
        folder = out(cfg) / "ckpt" / f"step_{step:08d}"
        assert (folder / "optimizer.safetensors").exists() == (step >= 4)  # the newest two can be resumed
        from_pretrained(str(folder))


def test_resumed_equals_uninterrupted(cfg, tmp_path):
    torch.manual_seed(3)
    _, expected = train(replace(cfg, out_dir=str(tmp_path / "whole")), 8)
    torch.manual_seed(3)
    train(cfg, 5)  # step 5 is lost: the newest checkpoint is step 4
    torch.manual_seed(99)
    (out(cfg) / "ckpt" / "writing").mkdir()  # a checkpoint that was being written
    _, model = train(replace(cfg, resume=True), 8, start_model=1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters()))
    lines = [json.loads(line) for line in (out(cfg) / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "loss": step + 0.5} for step in range(1, 9)]
    assert folders(cfg)[-1] == "step_00000008" and "writing" not in folders(cfg)


def test_unreadable_optimizer_state(cfg):
    train(cfg, 4)
    state = out(cfg) / "ckpt" / "step_00000004" / "optimizer.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(UserError, match="4/optimizer.safetensors: damaged .* to go on from step_00000002"):
        train(replace(cfg, resume=True), 8)


def test_a_checkpoint_of_an_earlier_version_is_told_in_one_line(cfg):
    train(cfg, 4)
    folder = out(cfg) / "ckpt" / "step_00000004"
    (folder / "optimizer.safetensors").rename(folder / "trainer.pt")
    with pytest.raises(UserError, match="trainer.pt.* begin a new run with --model=.*step_00000004"):
        train(replace(cfg, resume=True), 8)


def test_finished_run(cfg, capsys):
    run, model = train(cfg, 8)
    result = run.finish(model, TOKENIZER, {"gold": 1.5})
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result and result["gold"] == 1.5
    final = from_pretrained(cfg.out_dir)
    assert all(torch.equal(p, q) for p, q in zip(final.parameters(), model.parameters()))
    assert Tokenizer.from_file(cfg.out_dir + "/tokenizer.json").get_vocab() == TOKENIZER.get_vocab()
    assert not (out(cfg) / "writing").exists()
    again = Run(replace(cfg, resume=True), 8)
    assert again.finished and again.earlier_result() == result
    assert not Run(replace(cfg, overwrite=True), 8).finished


# --- every script, and the presets


FILES = [path for folder in ("", "data/", "study/") for path in sorted(ROOT.glob(f"{folder}*.py"))]
SCRIPTS = [str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") for path in FILES
           if re.search("^class Config:", path.read_text(), re.M)]


def test_scripts_are_found():
    some = {"train_sft", "train_rm", "train_rloo", "train_simpo", "evaluate", "data.toy", "data.tldr"}
    assert some | {"study.plot", "study.best_of_n", "study.results"} <= set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_option_without_help_and_no_title_without_options(name):
    """A continued line is no title; and the docstring, the head of --help, has the lines that it shows in the
    source."""
    script = importlib.import_module(name)
    config = script.Config
    source = Path(script.__file__).read_text().removeprefix("r")
    assert source.startswith(f'"""{script.__doc__}"""'), (
        "a backslash in a docstring that is not raw joins lines"
    )
    helps = field_help(config)
    assert list(helps) == list(config.__dataclass_fields__)
    titles = {title for title, _ in helps.values()}
    assert titles - {"options"} == set(re.findall(r"^    # ?(\S.*)$", inspect.getsource(config), re.M))
    for field, (_, text) in helps.items():
        assert len(text.split()) > 1 and "#" not in text and "  " not in text, (field, text)


@pytest.mark.parametrize("path", sorted(ROOT.glob("runs/*.sh")), ids=lambda path: path.name)
def test_run_scripts_name_what_exists(path):
    """The presets are too long to be run here; a renamed script, option or reward must not be left behind in
    one."""
    known = {field for name in SCRIPTS for field in importlib.import_module(name).Config.__dataclass_fields__}
    lines = [line.split(" #")[0] for line in path.read_text().splitlines()]
    code = "\n".join(line for line in lines if not line.startswith("#") and "pip install" not in line)
    assert not (unknown := set(re.findall(r"--([a-z]\w+)=", code)) - known), unknown
    scripts = re.findall(r"python ([\w/]+)\.py", code) + re.findall(r"python -m ([\w.]+)", code)
    for script in set(scripts) - {"pip", "pytest", "venv"}:
        assert (ROOT / f"{script.replace('.', '/')}.py").exists(), script
    for reward in re.findall(r"--reward=([^\s\"']+)", code):
        parse_reward(re.sub(r"\$\w+|\$\{\w+\}", "0.1", reward))
