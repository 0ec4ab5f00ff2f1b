"""Prepared data (written by data/tldr.py or data/toy.py) -> tables and batches. A data directory holds
parquet tables, meta.json and tokenizer.json."""

import json
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
        raise UserError(f"{data_dir}: no prepared data there (no meta.json). Make it with data/jsonl.py "
                        f"(your own rows), data/tldr.py or data/toy.py --out_dir={data_dir}")
    meta = read_json(path)
    tokens = meta.get("response_tokens")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise UserError(f"{path}: response_tokens is {tokens!r}, no number of tokens; prepare the data again")
    return meta


def read_table(data_dir: str, name: str, columns: list[str], limit: int = 0) -> dict[str, list]:
    """Columns of `<data_dir>/<name>.parquet` as lists; limit 0 = all rows. Raises UserError for a missing
    file or column and for an empty table."""
    table = open_table(data_dir, name, columns, limit)
    return {c: table[c].to_pylist() for c in columns}


ROWS = {  # what a table is made of
    "sft": "a prompt, and a response where something learns from it",
    "pairs": "prompt, chosen and rejected",
    "rankings": "a prompt and responses, best first",
}


def open_table(data_dir: str, name: str, columns: list[str], limit: int = 0) -> pa.Table:
    """What `read_table` reads, before it becomes lists."""
    path = Path(data_dir) / f"{name}.parquet"
    if not path.exists():
        have = ", ".join(sorted(p.stem for p in Path(data_dir).glob("*.parquet"))) or "none"
        raise UserError(f"{path}: no such table (tables there: {have}). It is made of rows with "
                        f"{ROWS.get(name.split('_')[0], 'a prompt')}: see python data/jsonl.py --help")
    there = column_names(data_dir, name)
    if missing := [c for c in columns if c not in there]:
        raise UserError(f"{path}: no column {', '.join(missing)} (columns there: {', '.join(there)}): "
                        "prepare the data again")
    try:
        table = pq.read_table(path, columns=columns)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise unreadable(path, error) from error
    table = table.slice(0, limit) if limit else table
    if not len(table):
        raise UserError(f"{path}: the table is empty: prepare the data again, with rows for it")
    return table


def unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: not a readable parquet file ({error}): prepare the data again")


def column_names(data_dir: str, name: str) -> list[str]:
    """Of a table; none if there is no such table."""
    path = Path(data_dir) / f"{name}.parquet"
    if not path.exists():
        return []
    try:
        return pq.read_schema(path).names
    except (OSError, ValueError, pa.ArrowException) as error:
        raise unreadable(path, error) from error


def has_column(data_dir: str, name: str, column: str) -> bool:
    return column in column_names(data_dir, name)


def check_tokenizer(data_dir: str, tokenizer: Tokenizer, vocab_size: int, model: str) -> None:
    """Raises UserError unless every token of the prepared data has the same id in the model's tokenizer, and
    a row in its embedding. The model may know more tokens: published models differ by an added [PAD]."""
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
        raise UserError(
            f"{model}: the data has tokens up to {last}, the model's embedding only {vocab_size} rows: "
            f"prepare the data again with --tokenizer={model}"
        )


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Rows of batch number `step`: the stream of seeded permutations of range(n), one per epoch, cut into
    batches.

    A pure function of `step`: the place in the data needs no state, so a resumed run sees what an
    uninterrupted one would have seen.
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


# --- a look at every table that a run will read, before its first step

TOKENS = ("query_token", "reference_response_token", "chosen_token", "rejected_token", "responses_token")
TEXTS = ("id", "query", "reference_response", "chosen", "rejected", "facts", "batch", "split")
RESPONSES = {  # by the first word of a table's name
    "sft": ("reference_response_token",),
    "pairs": ("chosen_token", "rejected_token"),
    "rankings": ("responses_token",),
}


def check_tables(data_dir: str, models: list, *uses: tuple[str, int, int]) -> None:
    """Raises UserError, naming table and row, for what would end a run at the step that meets it: a null,
    another type, an id that a model has no embedding for, a response without tokens, a row beyond the
    context, a pair of two equal responses.

    Without models only the types are known. A use is (table, rows, new): of its first `rows` (0 = all) the
    prompts, with `new` tokens to be sampled or (0) the responses they have.
    """
    vocabulary = min((model.config.vocab_size for model in models), default=2**31)
    context = min((model.config.max_position_embeddings for model in models), default=2**31)
    for name, rows, new in uses:
        path = Path(data_dir) / f"{name}.parquet"
        columns = ("query_token", *(() if new else RESPONSES.get(name.split("_")[0], ())))
        there = column_names(data_dir, name)
        texts = [column for column in TEXTS if column in there]
        table = open_table(data_dir, name, [*columns, *texts], rows)
        for column in texts:
            check_texts(path, column, table[column].combine_chunks())
        if "facts" in there:
            check_facts(path, table["facts"].to_pylist())
        elif name.startswith("sft_") and has_column(data_dir, "sft_train", "facts"):
            raise UserError(f"{path}: no column facts, which sft_train has: the true reward is computed from "
                            "it; it has to be in both, or in neither")
        tokens = {column: table[column].combine_chunks() for column in columns}
        longest = {column: check_ids(path, column, ids, vocabulary) for column, ids in tokens.items()}
        prompts = longest.pop("query_token")
        responses = np.maximum.reduce([*longest.values(), np.full_like(prompts, new)])
        if len(long := np.flatnonzero(prompts + responses > context)):
            i = long[0]
            raise UserError(
                f"{path}: row {i} is longer than the model's context ({context}): {prompts[i]} tokens of "
                f"prompt and {responses[i]} of response; {len(long)} such rows: drop them, or prepare the "
                "data with shorter prompts" + ", or lower --response_tokens" * bool(new)
            )
        if "chosen_token" in tokens:
            check_distinct(path, tokens["chosen_token"], tokens["rejected_token"])


def check_texts(path: Path, column: str, texts: pa.Array) -> None:
    if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
        raise UserError(f"{path}: column {column} is {texts.type}, expected text: drop or mend it")
    if texts.null_count:
        raise UserError(f"{path}: row {first(pc.is_null(texts))}: {column} is null: drop or mend the row")


def check_facts(path: Path, rows: list[str]) -> None:
    """Of the toy world's posts: {"facts": {day: thing, ...}, ...}."""
    for i, row in enumerate(rows):
        try:
            facts = json.loads(row)["facts"]
        except (ValueError, TypeError, KeyError, RecursionError):
            facts = None
        if not isinstance(facts, dict) or not facts:
            raise UserError(f'{path}: row {i}: facts is no JSON object {{"facts": {{day: thing}}}}, from '
                            "which the toy world's true reward is computed: drop the column, or prepare the "
                            "data again with data/toy.py")


def check_ids(path: Path, column: str, ids: pa.Array, vocabulary: int) -> np.ndarray:
    """Tokens of each row (rows,); where a row is a list of responses, of its longest one."""
    rows = np.arange(len(ids))  # which row of the table an entry of `ids` is in
    ranked = column == "responses_token"
    if ranked:
        check_lists(path, column, ids, rows)
        count = pc.list_value_length(ids).to_numpy(zero_copy_only=False)
        if len(other := np.flatnonzero((count != count[0]) | (count < 2))):
            raise UserError(f"{path}: row {other[0]} has {count[other[0]]} responses, the first row "
                            f"{count[0]}; every row needs the same number, at least 2")
        rows = np.repeat(rows, count)
        ids = pc.list_flatten(ids)
    check_lists(path, column, ids, rows)
    if not pa.types.is_integer(ids.type.value_type):
        raise UserError(f"{path}: column {column} holds {ids.type.value_type}, expected token ids "
                        "(integers): prepare the data again")
    length = pc.list_value_length(ids).to_numpy(zero_copy_only=False)
    if len(empty := np.flatnonzero(length == 0)):
        raise UserError(f"{path}: row {rows[empty[0]]}: {column} has no tokens "
                        "(a response has at least its EOS): drop or mend the row")
    flat = pc.list_flatten(ids)
    if flat.null_count:
        bad = first(pc.is_null(flat))
    else:
        bad = first(pc.or_(pc.less(flat, 0), pc.greater_equal(flat, vocabulary)))
    if bad >= 0:
        row = rows[np.searchsorted(length.cumsum(), bad, side="right")]
        raise UserError(f"{path}: row {row}: {column} has the id {flat[bad].as_py()}; "
                        f"the model has embeddings for 0 to {vocabulary - 1}: prepare the data again with "
                        "its --tokenizer")
    return length.reshape(-1, count[0]).max(1) if ranked else length


def check_lists(path: Path, column: str, lists: pa.Array, rows: np.ndarray) -> None:
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(kind(lists.type) for kind in kinds):
        raise UserError(f"{path}: column {column} is {lists.type}, expected lists of token ids: "
                        "prepare the data again")
    if lists.null_count:
        raise UserError(f"{path}: row {rows[first(pc.is_null(lists))]}: {column} is null: "
                        "drop or mend the row")


def first(found: pa.Array) -> int:
    """The first place that is true, or -1."""
    return pc.index(found, True).as_py()


def check_distinct(path: Path, chosen: pa.Array, rejected: pa.Array) -> None:
    """A pair of two equal responses teaches nothing, and hides a fault in the data."""
    lengths = pc.list_value_length(chosen).to_numpy()
    alike = np.flatnonzero(lengths == pc.list_value_length(rejected).to_numpy())
    if not len(alike):
        return
    same = pc.equal(*(pc.list_flatten(side.take(pa.array(alike))) for side in (chosen, rejected)))
    starts = np.cumsum(lengths[alike]) - lengths[alike]
    equal = alike[np.logical_and.reduceat(same.to_numpy(zero_copy_only=False), starts)]
    if len(equal):
        raise UserError(f"{path}: chosen equals rejected in {len(equal)} rows, the first is row {equal[0]}; "
                        "drop them")
