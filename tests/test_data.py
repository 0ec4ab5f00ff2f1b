"""Prepared tables and the batches that are made of them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from util import tiny_tokenizer

from rlhf.config import UserError
from rlhf.data import (
    batch_indices,
    check_distinct,
    check_tokenizer,
    has_column,
    read_meta,
    read_table,
    tables,
)

TOKENIZER = tiny_tokenizer()


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
