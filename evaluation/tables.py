"""The tables that evaluate.py leaves: written whole or not at all; a sweep's in one line per checkpoint."""

import csv
import io
import json
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from evaluation.statistics import paired_bootstrap
from rlhf.dist import on_first
from rlhf.files import write_file

SHOWN = (
    "win_rate", "win_rate_low", "win_rate_high", "lc_win_rate", "gold", "scores", "kl", "entropy", "rougeL",
    "response_length", "eos_share", "train_seconds",
)


def write(path: Path, content: str | pa.Table) -> None:
    written = content if isinstance(content, str) else partial(pq.write_table, content)
    on_first(lambda: write_file(path, written))


def write_sweep(out: Path, results: list[dict], rows: dict[str, list[dict]], judges: list[str]) -> list[dict]:
    """metrics.jsonl (for study/plot.py) and sweep.csv, one line per checkpoint.

    Its numbers, every judge's win rate ("gold/win_rate"), and `difference`: by how much the first judge's win
    rate is above that of the first checkpoint, on the same posts.
    """
    lines = []
    for result in results:
        line = {key: value for key, value in result.items() if key != "judges"}
        for judge, verdict in result["judges"].items():
            line |= {f"{judge}/{key}": value for key, value in verdict.items() if key != "by_length"}
        if judges:
            column = f"preference/{judges[0]}"
            before = [row[column] for row in rows[results[0]["name"]]]
            after = [row[column] for row in rows[result["name"]]]
            line |= paired_bootstrap(before, after)
        lines.append(line)
    write(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    columns = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write(out / "sweep.csv", text.getvalue())
    return lines


def show(lines: list[dict]) -> None:
    """The table on the screen: what was measured of the columns SHOWN."""
    columns = [c for c in SHOWN if any(line.get(c) is not None for line in lines)]
    width = max(len(line["name"]) for line in lines)
    short = [c.replace("win_rate", "win").replace("response_", "").replace("train_", "") for c in columns]
    print(" " * width, *(f"{title:>8}" for title in short))
    for line in lines:
        cells = [f"{line[c]:8.3f}" if line.get(c) is not None else " " * 8 for c in columns]
        print(f"{line['name']:{width}}", *cells)
    if far := [line["name"] for line in lines if line.get("lc_extrapolated")]:
        print(f"lc_win of {', '.join(far)} is extrapolated: summary and reference differ in length by half "
              "or more, few pairs are equally long")
