"""Prepared data (written by data/tldr.py or data/toy.py) -> tables and batches. A data directory holds parquet tables, meta.json, tokenizer.json."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer

from rlhf.config import UserError
from rlhf.pretrained import read_json, read_tokenizer


def read_meta(data_dir: str) -> dict:
    path = Path(data_dir) / "meta.json"
    if not path.exists():
        raise UserError(f"{data_dir}: no prepared data there (no meta.json). Make it with data/toy.py or data/tldr.py --out_dir={data_dir}")
    return read_json(path)


def read_table(data_dir: str, name: str, columns: list[str], limit: int = 0) -> dict[str, list]:
    """Columns of `<data_dir>/<name>.parquet` as lists; limit 0 = all rows. Raises UserError for a missing file or column and for an empty table."""
    table = open_table(data_dir, name, columns, limit)
    return {c: table[c].to_pylist() for c in columns}


def open_table(data_dir: str, name: str, columns: list[str], limit: int = 0) -> pa.Table:
    """What `read_table` reads, before it becomes lists."""
    path = Path(data_dir) / f"{name}.parquet"
    if not path.exists():
        have = ", ".join(sorted(p.stem for p in Path(data_dir).glob("*.parquet"))) or "none"
        raise UserError(f"{path}: no such table (tables there: {have})")
    try:
        schema = pq.read_schema(path)
        if missing := [c for c in columns if c not in schema.names]:
            raise UserError(f"{path}: no column {', '.join(missing)} (columns there: {', '.join(schema.names)})")
        table = pq.read_table(path, columns=columns)
    except OSError as error:  # pyarrow's ArrowInvalid is a ValueError, a truncated file an OSError
        raise UserError(f"{path}: not a readable parquet file ({error})") from error
    except ValueError as error:
        raise UserError(f"{path}: not a readable parquet file ({error})") from error
    table = table.slice(0, limit) if limit else table
    if not len(table):
        raise UserError(f"{path}: the table is empty")
    return table


def has_column(data_dir: str, name: str, column: str) -> bool:
    path = Path(data_dir) / f"{name}.parquet"
    try:
        return path.exists() and column in pq.read_schema(path).names
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable parquet file ({error})") from error


def check_tokenizer(data_dir: str, tokenizer: Tokenizer, vocab_size: int, model: str) -> None:
    """Raises UserError unless every token of the prepared data has the same id in the model's tokenizer, and a
    row in its embedding. The model may know more tokens: published models differ by an added [PAD]."""
    prepared = read_tokenizer(Path(data_dir) / "tokenizer.json").get_vocab()  # {token: id}
    own = tokenizer.get_vocab()
    if other := sorted((i, token) for token, i in prepared.items() if own.get(token) != i):
        i, token = other[0]
        raise UserError(
            f"the tokenizer of {model} is not the one that {data_dir} was prepared with: "
            f"{len(other)} tokens differ, the first is {token!r}, {i} in the data and "
            f"{own.get(token, 'unknown')} in the model; prepare the data again with --tokenizer={model}"
        )
    if (last := max(prepared.values())) >= vocab_size:
        raise UserError(f"{model}: the data has tokens up to {last}, the model's embedding only {vocab_size} rows")


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Rows of batch number `step`: the stream of seeded permutations of range(n), one per epoch, cut into batches.

    A pure function of `step`: the place in the data needs no state, so a resumed run sees what an uninterrupted one would have seen.
    """
    first, rows = step * batch_size, []
    while len(rows) < batch_size:
        epoch, offset = divmod(first + len(rows), n)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        rows += order[offset : offset + batch_size - len(rows)].tolist()
    return rows


def tables(data_dir: str, prefix: str) -> list[str]:
    """Names of the tables that begin with `prefix`, e.g. pairs_validation and pairs_validation_cnndm."""
    return sorted(p.stem for p in Path(data_dir).glob(f"{prefix}*.parquet"))


def check_distinct(data_dir: str, name: str, table: dict[str, list]) -> None:
    """Raises UserError if a pair's chosen response equals its rejected one: such a pair teaches nothing and hides a fault in the data."""
    equal = [i for i, (c, r) in enumerate(zip(table["chosen_token"], table["rejected_token"])) if c == r]
    if equal:
        raise UserError(f"{data_dir}/{name}.parquet: chosen equals rejected in {len(equal)} rows, the first is row {equal[0]}; drop them")


RESPONSES = ("reference_response_token", "chosen_token", "rejected_token", "responses_token")


def token_counts(column: pa.ChunkedArray) -> np.ndarray:
    """Tokens of each row (rows,); of its longest response where a row has several."""
    if pa.types.is_nested(column.type.value_type):
        return np.array([max(map(len, row), default=0) for row in column.to_pylist()])
    return pc.list_value_length(column).to_numpy()


def check_context(data_dir: str, context: int, *uses: tuple[str, int, int]) -> None:
    """Raises UserError for a row that is longer than the model's context: before the first step, and not at the one that meets it.

    A use is (table, rows, new): of its first `rows` (0 = all) the prompts, with `new` tokens to be sampled or (0) the responses they have.
    """
    for name, rows, new in uses:
        path = Path(data_dir) / f"{name}.parquet"
        prompts = token_counts(open_table(data_dir, name, ["query_token"], rows)["query_token"])
        responses = np.full_like(prompts, new)
        for column in RESPONSES if not new else ():
            if has_column(data_dir, name, column):
                responses = np.maximum(responses, token_counts(open_table(data_dir, name, [column], rows)[column]))
        if len(long := np.flatnonzero(prompts + responses > context)):
            i = long[0]
            raise UserError(f"{path}: row {i} is longer than the model's context ({context}): {prompts[i]} tokens of prompt and "
                            f"{responses[i]} of response; {len(long)} such rows: drop them, or prepare the data with shorter prompts")
