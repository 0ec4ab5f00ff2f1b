"""The command line: what a user types, what --help tells, what is said when it cannot be done; every script
and every preset."""

import importlib
import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from rlhf.config import RunError, UserError, command_line, field_help
from rlhf.rewards import parse_reward

ROOT = Path(__file__).parents[1]


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
        "The command line: what a user", "I/O:", "optimization:", "where to write; 100% of it (required)",
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


# --- every script, and the presets


FILES = [path for folder in ("", "data/", "study/", "bench/") for path in sorted(ROOT.glob(f"{folder}*.py"))]
SCRIPTS = [str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") for path in FILES
           if re.search("^class Config:", path.read_text(), re.M)]


OF_OTHERS = {"nproc_per_node", "format"}  # torchrun, nvidia-smi


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
    assert not (unknown := set(re.findall(r"--([a-z]\w+)=", code)) - known - OF_OTHERS), unknown
    scripts = re.findall(r"python ([\w/]+)\.py", code) + re.findall(r"python -m ([\w.]+)", code)
    for script in set(scripts) - {"pip", "pytest", "venv"}:
        assert (ROOT / f"{script.replace('.', '/')}.py").exists(), script
    for reward in re.findall(r"--reward=([^\s\"']+)", code):
        parse_reward(re.sub(r"\$\w+|\$\{\w+\}", "0.1", reward))
