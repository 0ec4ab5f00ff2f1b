"""Malformed rows by kind for the scripts that prepare data: the row is named, nothing is written."""

import json
import shutil
from pathlib import Path

import faults
import pytest
from faults import call, config

from data import jsonl, tldr


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    faults.stop_the_clock(monkeypatch)


DEEP = "[" * 100_000
LINES = ["{", "[]", "null", "3", '"text"', DEEP, "{}", '{"prompt": "a"', "\udcff\udcfe", "\x00", "nan"]
VALUES = [None, 3, -1.5, True, [], {}, ["a"], "\ud800", float("nan")]  # of a text; DEEP is in LINES
NO_NUMBERS = [None, "0", 0.5, [], 2, -1]  # of `choice`


def str_only(value) -> str:
    return value if isinstance(value, str) else ""


def change(row: dict, column: str, value) -> dict:
    """A copy with another value at "a.0.b"; ... drops it."""
    row = json.loads(json.dumps(row))
    *folders, last = column.split(".")
    place = row
    for folder in folders:
        place = place[int(folder)] if isinstance(place, list) else place[folder]
    last = int(last) if isinstance(place, list) else last
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return row


def written(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def named(script, cfg, file: Path, text: str, row: int, out: Path, capsys, monkeypatch) -> None:
    whole = file.read_bytes()
    file.write_bytes(text.encode(errors="surrogateescape"))
    code, line = call(script, cfg, capsys, monkeypatch)
    file.write_bytes(whole)
    assert code == 2 and line.startswith("error: ") and file.name in line, (text[:200], code, line)
    assert f"row {row}" in line or not row, (text[:200], line)
    assert not out.exists(), text[:200]


@pytest.fixture
def copy(world, tmp_path) -> Path:
    return Path(shutil.copytree(world, tmp_path / "world", ignore=shutil.ignore_patterns("run", "data")))


SUMMARIES, PAIRS = "source/tldr_3_filtered/train.jsonl", "source/comparisons/validation.jsonl"
COLUMNS = [(SUMMARIES, name, [..., *VALUES]) for name in ("subreddit", "title", "post", "summary")]
COLUMNS += [(PAIRS, f"info.{name}", [..., *VALUES]) for name in ("subreddit", "title", "post")]
COLUMNS += [(PAIRS, f"summaries.{i}.text", [..., *VALUES]) for i in (0, 1)]
COLUMNS += [
    (PAIRS, "summaries", [..., None, "ab", [], [{"text": "a"}], [{"text": "a"}] * 3, [1, 2], {"text": "a"}]),
    (PAIRS, "choice", [..., *NO_NUMBERS]),
    (PAIRS, "batch", [..., *VALUES[:-2]]),
    (PAIRS, "info", [..., None, 3, [], "a", {}]),
    (PAIRS, "extra.confidence", ["9", [], 0.5, {}]),
    (PAIRS, "split", [3, [], {}]),
    (SUMMARIES, "id", [3, [], {}]),
]


@pytest.mark.parametrize("file, column, values", COLUMNS, ids=str_only)
def test_rows_of_the_tldr_data(copy, tmp_path, capsys, monkeypatch, file, column, values):
    cfg = config(copy, tldr, tmp_path / "run")
    rows = [json.loads(line) for line in (copy / file).read_text().splitlines()]
    for value in values:
        text = written([*rows[:-1], change(rows[-1], column, value)])
        named(tldr, cfg, copy / file, text, len(rows), tmp_path / "run", capsys, monkeypatch)


@pytest.mark.parametrize("script, file", [(tldr, SUMMARIES), (tldr, PAIRS), (jsonl, "own.jsonl")])
def test_lines_that_are_no_rows(copy, tmp_path, capsys, monkeypatch, script, file):
    cfg = config(copy, script, tmp_path / "run")
    lines = (copy / file).read_text().splitlines(keepends=True)
    for line in LINES:
        text = "".join([lines[0], line + "\n", *lines[1:]])
        named(script, cfg, copy / file, text, 2, tmp_path / "run", capsys, monkeypatch)
    named(script, cfg, copy / file, "", 0, tmp_path / "run", capsys, monkeypatch)


KINDS = {
    "response": {"prompt": "a", "response": " b"},
    "chosen": {"prompt": "a", "chosen": " b", "rejected": " c"},
    "responses": {"prompt": "a", "responses": [" b", " c"]},
}
OWN = [(kind, column, [..., "", " \n", *VALUES]) for kind, column in [
    ("response", "prompt"), ("response", "response"), ("chosen", "chosen"), ("chosen", "rejected"),
]]
RANKINGS = [..., None, 3, "ab", [], [" b"], [" b", " c", " d"], {"0": " a", "1": " b"}]
OWN += [("responses", "responses.1", ["", *VALUES]), ("responses", "responses", RANKINGS)]
OWN += [("chosen", name, [[], {}, 3.5]) for name in ("batch", "split", "confidence")]


@pytest.mark.parametrize("kind, column, values", OWN, ids=str_only)
def test_rows_of_ones_own(copy, tmp_path, capsys, monkeypatch, kind, column, values):
    cfg = config(copy, jsonl, tmp_path / "run")
    row = KINDS[kind] | ({column: {"confidence": 3}.get(column, "b")} if column not in KINDS[kind] else {})
    row = KINDS[kind] if "." in column else row
    for value in values:
        text = written([row, row, change(row, column, value)])
        named(jsonl, cfg, copy / "own.jsonl", text, 3, tmp_path / "run", capsys, monkeypatch)
