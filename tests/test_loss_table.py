"""The table of study/losses.py from logs made up here, and docs/losses.md against the signatures."""

import json
import re
from pathlib import Path

import pytest

from rlhf.config import UserError
from rlhf.losses import PREFERENCE_LOSSES, defaults, extras, needs_reference
from study import losses
from study.logs import find_runs

ROOT = Path(__file__).parents[1]


def write_run(folder: Path, name: str, script: str, logps: list[float], **config) -> None:
    run = folder / name
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"command": f"{script}.py", "config": config}))
    logged = [{"step": i + 1, "logps/chosen": value, "seconds": 0.5} for i, value in enumerate(logps)]
    lines = map(json.dumps, logged)
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def write_sweep(folder: Path, **measured: tuple[float, float, float]) -> None:
    (folder / "eval").mkdir()
    lines = [json.dumps({"model": f"{folder}/{name}", "gold": gold, "kl_full": kl, "response_length": tokens})
             for name, (gold, kl, tokens) in measured.items()]
    (folder / "eval/metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_table_of_losses(tmp_path, capsys):
    write_run(tmp_path, "sft", "train_sft", [0.0], lr=1.0)
    write_run(tmp_path, "simpo_s1", "train_simpo", [-10.0] * 8 + [-30.0] * 8, loss="simpo")
    write_run(tmp_path, "simpo_s2", "train_simpo", [-10.0] * 8 + [-20.0] * 8, loss="simpo")
    write_run(tmp_path, "dpo_s1", "train_simpo", [-10.0] * 16, loss="dpo")
    evaluated = dict(sft=(0.5, 0.0, 20), simpo_s1=(0.7, 8, 20), simpo_s2=(0.8, 12, 30), dpo_s1=(0.9, 3, 25))
    write_sweep(tmp_path, **evaluated)
    losses.main(losses.Config(out_dir=str(tmp_path), table=True))
    assert capsys.readouterr().out.splitlines() == [
        "| loss | seeds | gold | KL | tokens | change of log π(chosen) | seconds |",
        "|---|---|---|---|---|---|---|",
        "| (SFT) | | 0.50 | 0.00 | 20.00 | | |",
        "| `dpo` | 1 | 0.90 | 3.00 | 25.00 | 0.00 | 8.00 |",
        "| `simpo` | 2 | 0.75 ± 0.07 | 10.00 ± 2.83 | 25.00 ± 7.07 | -15.00 ± 7.07 | 8.00 ± 0.00 |",
    ]
    write_run(tmp_path, "ipo_s1", "train_simpo", [-10.0] * 8, loss="ipo")
    with pytest.raises(UserError, match="ipo_s1: no eval"):
        losses.table(find_runs(tmp_path))


def test_docs_tell_every_loss_with_its_defaults():
    """docs/losses.md: a row per loss, in the order of --help, with what it reads and its defaults."""
    formulas, results = (ROOT / "docs/losses.md").read_text().split("## In the toy world")
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", formulas, re.M)
    assert [name for name, _ in rows] == list(PREFERENCE_LOSSES)
    assert re.findall(r"^\| `(\w+)` \| 3 \|", results, re.M) == list(PREFERENCE_LOSSES)
    for name, row in rows:
        loss = PREFERENCE_LOSSES[name]
        _, reads, options, _, _ = (cell.strip() for cell in row.split("|"))
        assert options == ", ".join(f"{key} {value:g}" for key, value in defaults(loss).items()), name
        needed = ({"reference"} if needs_reference(loss) else set()) | extras(loss)
        assert set(filter(None, reads.split(", "))) == needed, name
