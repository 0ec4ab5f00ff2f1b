"""Finished runs as data: what plot.py draws and results.py judges, found by their settings and not by their
names.

A folder of runs (out/study/small, out/1b) holds one directory per run, and the tables that evaluate.py's
sweeps wrote over them, `eval*`.
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rlhf.config import UserError
from rlhf.out_dir import read_about
from rlhf.pretrained import read_json
from rlhf.rewards import parse_reward


@dataclass(frozen=True)
class RunLog:
    path: Path
    script: str  # train_rloo, train_simpo, ...
    config: dict  # its settings; of train_rloo the reward as `read_reward` has it
    metrics: dict[str, np.ndarray]  # {column of metrics.jsonl: (lines,)}, nan where a line lacks it
    result: dict  # result.json; empty if the run is not finished
    evaluation: dict  # the sweep's line about the final model; empty if there is none
    checkpoints: dict[int, dict] = field(default_factory=dict)  # {step: the sweep's line about it}

    @property
    def win_rate(self) -> float | None:
        """Share of posts won against the human reference, of the final model, by the first judge of the
        sweep."""
        return self.evaluation.get("win_rate")


def number(value) -> float:
    return math.nan if value is None else value


def read_lines(path: Path) -> list[dict]:
    """The objects in a metrics.jsonl; the last line may be half written."""
    try:
        text = path.read_text()
        lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error})") from error
    if not all(isinstance(line, dict) for line in lines):
        raise UserError(f"{path}: damaged (a line is no JSON object)")
    return lines


def read_columns(path: str | Path) -> dict[str, np.ndarray]:
    """A metrics.jsonl as columns (lines,); a line that lacks a column has nan there."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file (is {path.parent} a run?)")
    lines = read_lines(path)
    keys = [key for line in lines for key, value in line.items() if isinstance(value, int | float | None)]
    return {
        key: np.array([number(line.get(key)) for line in lines], dtype=float)
        for key in dict.fromkeys(keys)
    }


def read_reward(text: str) -> dict[str, str | float]:
    """How the arms of a study name a reward: its term and its coefficient, which are settings of their own.

    "kl:0.05" -> {"reward": "kl", "coefficient": 0.05}. A sum of several terms, or another coefficient of
    the score, is an objective of its own: {"reward": "kl:0.05+maxent_length:0.1", "coefficient": 1.0}.
    """
    coefficients = parse_reward(text)
    terms = [name for name in coefficients if name != "score"]
    if coefficients["score"] == 1 and len(terms) == 1:
        return {"reward": terms[0], "coefficient": coefficients[terms[0]]}
    named = [name for name in coefficients if name != "score" or coefficients["score"] != 1]
    return {"reward": "+".join(f"{name}:{coefficients[name]:g}" for name in named), "coefficient": 1.0}


def read_config(path: Path, about: dict) -> dict:
    """The settings in a run.json, the reward as its term and coefficient."""
    config = about["config"]
    if {"kl_coef", "reward"} <= config.keys():
        raise UserError(f"{path}: an old run, its --reward has no coefficients (kl:0.05); run it again")
    return config | read_reward(str(config["reward"])) if "reward" in config else config


def read_run(path: Path, final: dict[str, dict], checkpoints: dict[str, dict[int, dict]]) -> RunLog | None:
    """The run in a directory with what the sweeps say of it; None if it is no training run, or has no log."""
    about = read_about(path)
    script = about.get("script") or re.search(r"(\w+)\.py\b|$", str(about.get("command")))[1] or ""
    if script in ("evaluate", "best_of_n") or not (path / "metrics.jsonl").exists():
        return None
    metrics = read_columns(path / "metrics.jsonl")
    if not metrics:
        return None
    config = read_config(path / "run.json", about)
    result = read_json(path / "result.json") if (path / "result.json").exists() else {}
    return RunLog(
        path, script, config, metrics, result,
        evaluation=final.get(path.name, {}), checkpoints=checkpoints.get(path.name, {}),
    )


def read_sweeps(folder: Path) -> tuple[dict[str, dict], dict[str, dict[int, dict]]]:
    """What the sweeps `folder`/eval* say of the runs beside them:

    {name: the line about its final model}, {name: {step: the line about that checkpoint}}.
    """
    final: dict[str, dict] = {}
    checkpoints: dict[str, dict[int, dict]] = {}
    for sweep in sorted(folder.glob("eval*/metrics.jsonl")):
        for line in read_lines(sweep):
            model = Path(str(line.get("model")))  # .../run or .../run/ckpt/step_00000100
            if step := re.search(r"([^/]+)/ckpt/step_(\d+)$", str(model)):
                checkpoints.setdefault(step[1], {})[int(step[2])] = line
            else:
                final[model.name] = line
    return final, checkpoints


def find_runs(folder: str | Path) -> list[RunLog]:
    """All training runs right under `folder` that have a log, by name. UserError if there is none."""
    folder = Path(folder)
    sweeps = read_sweeps(folder)
    found = [read_run(described.parent, *sweeps) for described in sorted(folder.glob("[!.]*/run.json"))]
    runs = [run for run in found if run is not None]
    if not runs:
        raise UserError(f"{folder}: no run in it (a directory with run.json and metrics.jsonl)")
    return runs


def best_of_n_tables(folder: str | Path) -> list[dict[str, np.ndarray]]:
    """The tables best_of_n*/ (n, kl, scores, gold) in a folder of runs: one per seed."""
    return [read_columns(path) for path in sorted(Path(folder).glob("best_of_n*/metrics.jsonl"))]


def select(runs: list[RunLog], script: str, **settings) -> list[RunLog]:
    """The runs of a script whose configuration has these values."""
    def matches(run: RunLog) -> bool:
        return run.script == script and all(run.config.get(key) == value for key, value in settings.items())

    return [run for run in runs if matches(run)]


def by_setting(runs: list[RunLog], name: str) -> dict:
    """{value of that setting: its runs}, in the order of the values."""
    values = sorted({run.config[name] for run in runs})
    return {value: [run for run in runs if run.config[name] == value] for value in values}
