"""Finished runs as data: what plot.py draws and results.py judges, found by their settings (run.json) and not by their names.

A folder of runs (out/study/small, out/1b) holds one directory per run, and the tables that evaluate.py's sweeps wrote over them, `eval*`.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rlhf.config import UserError
from rlhf.pretrained import read_json


@dataclass(frozen=True)
class RunLog:
    path: Path
    script: str  # train_rloo, train_simpo, ...
    config: dict  # its settings
    metrics: dict[str, np.ndarray]  # {column of metrics.jsonl: (lines,)}, nan where a line lacks it
    result: dict  # result.json; empty if the run is not finished
    evaluation: dict  # the sweep's line about the final model; empty if there is none
    checkpoints: dict[int, dict] = field(default_factory=dict)  # {step: the sweep's line about that checkpoint}

    @property
    def win_rate(self) -> float | None:
        """Share of posts won against the human reference, of the final model, by the first judge of the sweep."""
        return self.evaluation.get("win_rate")


def read_columns(path: str | Path) -> dict[str, np.ndarray]:
    """A metrics.jsonl as columns (lines,); a line that lacks a column has nan there."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file (is {path.parent} a run?)")
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]  # the last one may be half written
    keys = dict.fromkeys(k for line in lines for k, v in line.items() if isinstance(v, int | float) or v is None)
    return {key: np.array([math.nan if line.get(key) is None else line[key] for line in lines], dtype=float) for key in keys}


def find_runs(folder: str | Path) -> list[RunLog]:
    """All runs right under `folder` that have a log, by name; with what the sweeps `folder`/eval* say of them. UserError if there is none."""
    folder = Path(folder)
    lines = [json.loads(line) for sweep in sorted(folder.glob("eval*/metrics.jsonl")) for line in sweep.read_text().splitlines()]
    final: dict[str, dict] = {}  # {name of the run: its line}
    checkpoints: dict[str, dict[int, dict]] = {}
    for line in lines:
        *_, run, _, step = ("", "", *Path(line["model"]).parts)
        if step.startswith("step_"):
            checkpoints.setdefault(run, {})[int(step.split("_")[1])] = line
        else:
            final[step] = line
    runs = []
    for described in sorted(folder.glob("*/run.json")):
        path, about = described.parent, read_json(described)
        script = Path(about["command"].split()[0]).stem
        if script in ("evaluate", "best_of_n") or not (path / "metrics.jsonl").exists() or not (metrics := read_columns(path / "metrics.jsonl")):
            continue
        result = read_json(path / "result.json") if (path / "result.json").exists() else {}
        runs.append(RunLog(path, script, about["config"], metrics, result, final.get(path.name, {}), checkpoints.get(path.name, {})))
    if not runs:
        raise UserError(f"{folder}: no run in it (a directory with run.json and metrics.jsonl)")
    return runs


def select(runs: list[RunLog], script: str, **settings) -> list[RunLog]:
    """The runs of a script whose configuration has these values."""
    return [run for run in runs if run.script == script and all(run.config.get(key) == wanted for key, wanted in settings.items())]


def by_setting(runs: list[RunLog], name: str) -> dict:
    """{value of that setting: its runs}, in the order of the values."""
    return {value: [run for run in runs if run.config[name] == value] for value in sorted({run.config[name] for run in runs})}
