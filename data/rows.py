"""Rows of a source file, each with where it stands, and the tokenizer of the prepared data: what
data/tldr.py and data/jsonl.py begin with."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import hf_hub_download
from tokenizers import Tokenizer
from tqdm import tqdm

from rlhf.config import UserError

EOS, PAD = "<|endoftext|>", "<|padding|>"  # ids 0 and 1 in every prepared data directory
KINDS = {str: "a text", int: "a whole number", list: "a list"}
CHUNK = 1024  # rows that are read, tokenised and written as a row group at a time


def read_rows(files: list[Path], title: str) -> Iterator[dict]:
    """Rows as dicts; `where` names the file and the row. `title` stands before the progress bar."""
    for file in files:
        number = 0
        try:
            with file.open("rb") as data:
                rows, total = open_rows(file, data)
                bar = tqdm(rows, title, total, unit=" rows", mininterval=1)
                for number, row in enumerate(bar, 1):
                    yield {**row, "where": f"{file}, row {number}"}
        except (pa.ArrowException, OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{file}, row {number + 1}: cannot be read: {error}") from error
        if not number:
            raise UserError(f"{file}: the file is empty")


def open_rows(file: Path, data) -> tuple[Iterator[dict], int | None]:
    """The rows of an open file, and how many there are if it says so."""
    if file.suffix == ".parquet":
        table = pq.ParquetFile(data)
        rows = (row for batch in table.iter_batches(CHUNK) for row in batch.to_pylist())
        return rows, table.metadata.num_rows
    return map(read_line, data), None


def read_line(line: bytes) -> dict:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise TypeError("expected one JSON object, {...}, per line")
    return row


def value(row: dict, column: str, kind: type, default: str | int | None = None):
    """row["a"][0]["b"] for the column "a.0.b". With a default it may be missing or null."""
    item = row
    for key in column.split("."):
        if isinstance(item, list):
            item = {str(i): x for i, x in enumerate(item)}
        if not isinstance(item, dict) or key not in item:
            if default is not None:
                return default
            there = ", ".join(key for key in row if key != "where") or "none"
            raise UserError(f"{row['where']}: no column {column!r} (columns there: {there})")
        item = item[key]
    if item is None and default is not None:
        return default
    if not isinstance(item, kind):
        shown = "null" if item is None else repr(str(item)[:40])
        raise UserError(f"{row['where']}: column {column!r} is {shown}, expected {KINDS[kind]}: mend the "
                        "row, or take it out")
    if kind is str:
        try:
            item.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{row['where']}: column {column!r} is no valid text ({error}): mend the "
                            "row, or take it out") from error
    return item


def load_tokenizer(name: str) -> tuple[Tokenizer, bytes]:
    """The tokenizer, and its file."""
    path = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    try:
        file = path if path.is_file() else Path(hf_hub_download(name, "tokenizer.json"))
        data = file.read_bytes()
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        message = f"--tokenizer {name}: not a file, and no tokenizer.json on the hub: {reason}"
        raise UserError(message) from error
    try:
        tokenizer = Tokenizer.from_str(data.decode())
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"--tokenizer {name}: not a tokenizer.json ({error})") from error
    for token, index in ((EOS, 0), (PAD, 1)):
        found = tokenizer.token_to_id(token)
        if found != index:
            raise UserError(f"--tokenizer {name}: {token} must have id {index}, it has {found}: only "
                            "tokenizers of Pythia and GPT-NeoX are supported")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # what people wrote is text
    return tokenizer, data


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
