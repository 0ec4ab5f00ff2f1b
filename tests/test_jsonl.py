"""Own data: what data/jsonl.py makes of rows, which columns the scripts can do without, and prompts alone."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from own import ALONE, LINES, PAIRS, QUICK, RANKED, TOKENIZER, lines_of, rloo

import train_rm
import train_sft
from rlhf.config import UserError
from rlhf.summaries import read_posts


def test_rows_of_each_kind_become_the_tables_that_the_scripts_read(prepare):
    sft = prepare({"a.jsonl": LINES}, "a", validation_share=0.2)
    assert {name: len(rows) for name, rows in sft.items()} == {"sft_train": 16, "sft_validation": 4}
    row = sft["sft_train"][0]
    assert row["id"].startswith("a.jsonl, row ")
    assert TOKENIZER.decode(row["query_token"]) == row["query"]
    assert row["reference_response_token"] == TOKENIZER.encode(row["reference_response"]).ids + [0]
    assert {row["query"] for table in sft.values() for row in table} == {row["prompt"] for row in LINES}

    pairs = prepare({"b.parquet": [row | {"batch": "x", "confidence": 3, "id": 7} for row in PAIRS]}, "b")
    assert pairs.keys() == {"sft_train", "sft_validation", "pairs_train", "pairs_validation"}
    row = pairs["pairs_validation"][0]
    assert (row["rejected"], row["batch"], row["confidence"], row["id"]) == (" the mat", "x", 3, "7")
    assert row["chosen_token"] == TOKENIZER.encode(row["chosen"]).ids + [0]
    learnt = pairs["sft_validation"][0]
    assert learnt["reference_response"] == row["chosen"] and "batch" not in learnt

    ranked = prepare({"c.jsonl": RANKED}, "c")
    assert ranked.keys() == pairs.keys() | {"rankings_train"}
    row, pair = ranked["rankings_train"][0], ranked["pairs_train"][0]
    assert row["responses"][1:] == [" the cat", " the mat"]
    assert [tokens[-1] for tokens in row["responses_token"]] == [0, 0, 0]
    assert [pair["chosen"], pair["rejected"]] == [row["responses"][0], " the mat"]

    alone = prepare({"d.jsonl": ALONE}, "d")
    assert alone["sft_train"][0].keys() == {"id", "query", "query_token"}
    meta = json.loads(Path("d/meta.json").read_text())
    assert meta["response_tokens"] == 128 and meta["splits"] == {"sft_train": 19, "sft_validation": 1}


def test_rows_of_several_kinds_share_the_split(prepare):
    """What is held out is held out in every table; no rows are made up where a file has them."""
    tables = prepare({"sft.jsonl": LINES, "pairs.jsonl": PAIRS}, validation_share=0.3)
    held = {row["query"] for row in tables["sft_validation"]}
    assert len(held) == 6 and held == {row["query"] for row in tables["pairs_validation"]}
    assert not held & {row["query"] for name in ("sft_train", "pairs_train") for row in tables[name]}
    assert len(tables["sft_train"]) == 14
    again = prepare({}, train="sft.jsonl,pairs.jsonl", overwrite=True, validation_share=0.3)
    assert again == tables
    fewer = prepare({}, train="sft.jsonl", overwrite=True)
    assert fewer.keys() == {"sft_train", "sft_validation"}  # no pairs of before
    assert prepare({}, train="sft.jsonl,pairs.jsonl", overwrite=True, validation_share=0.3, seed=1) != tables


def test_validation_of_its_own(prepare, capsys):
    tables = prepare({"a.jsonl": LINES[:10], "valid.jsonl": LINES[9:]}, validation="valid.jsonl")
    assert [len(tables[name]) for name in ("sft_train", "sft_validation")] == [10, 11]
    assert "1 prompts are in training and in validation" in capsys.readouterr().out
    unfit = {"either both have responses, or neither": ALONE, "pairs to train on and none to validate": LINES}
    for said, valid in unfit.items():
        with pytest.raises(UserError, match=said):
            prepare({"a.jsonl": PAIRS, "valid.jsonl": valid}, validation="valid.jsonl", overwrite=True)


def test_what_is_too_long_or_teaches_nothing_is_dropped_and_counted(prepare, capsys):
    length = len(TOKENIZER.encode(PAIRS[0]["prompt"]).ids)
    long_prompt = PAIRS[0] | {"prompt": "the cat " * 20}
    long_response = PAIRS[1] | {"rejected": " the mat" * 20}
    tie = PAIRS[2] | {"rejected": PAIRS[2]["chosen"]}
    files = {"a.jsonl": [*PAIRS[3:], long_prompt, long_response, tie], "valid.jsonl": PAIRS[:3]}
    tables = prepare(files, validation="valid.jsonl", prompt_tokens=length + 2, response_tokens=15)
    assert len(tables["pairs_train"]) == 17 and len(tables["sft_train"]) == 19
    said = capsys.readouterr().out
    assert "rows 17, long_prompts 1, long_responses 1, ties 1" in said
    assert "rows 19, long_prompts 1, long_responses 0, ties 0" in said
    assert json.loads(Path("data/meta.json").read_text())["tables"]["pairs_train"]["ties"] == 1
    with pytest.raises(UserError, match=r"sft_train: none of 19 rows is left \(rows 0, long_prompts 19"):
        prepare({"a.jsonl": LINES}, prompt_tokens=2, out_dir="none")
    assert not Path("none").exists()


@pytest.mark.parametrize("rows, said", [
    (['{"prompt": "a", "response": "b"}', "{"], "a.jsonl, row 2: cannot be read"),
    (["[1]"], "a.jsonl, row 1: cannot be read"),
    ([], "a.jsonl: the file is empty"),
    ([{"text": "a"}], "a.jsonl, row 1: no column 'prompt'"),
    ([{"prompt": None}], "a.jsonl, row 1: column 'prompt' is null, expected a text"),
    ([{"prompt": 3}], "column 'prompt' is '3', expected a text"),
    ([{"prompt": " "}], "a.jsonl, row 1: column 'prompt' is empty"),
    ([LINES[0], {"prompt": "a", "response": ""}], "a.jsonl, row 2: column 'response' is empty"),
    (['{"prompt": "\\ud800"}'], "column 'prompt' is no valid text"),
    ([{"prompt": "a", "chosen": "b"}], "no column 'rejected'"),
    ([{"prompt": "a", "chosen": "b", "rejected": ["c"]}], "column 'rejected' is .* expected a text"),
    ([{"prompt": "a", "responses": "b"}], "column 'responses' is 'b', expected a list"),
    ([{"prompt": "a", "responses": ["b"]}], "'responses' has 1 texts, a ranking needs at least 2"),
    ([{"prompt": "a", "responses": ["b", None]}], "column 'responses.1' is null"),
    ([RANKED[0], {"prompt": "a", "responses": ["b", "c"]}], "row 2: 2 responses, the rows before have 3"),
    ([PAIRS[0] | {"response": "x"}], "columns response, chosen, rejected: a file has rows of one kind"),
    ([LINES[0], PAIRS[0]], "row 2: a row of the kind 'pairs' in a file that began with 'responses'"),
    ([PAIRS[0] | {"batch": "x"}, PAIRS[1]], "row 2: column batch is in some rows of the file only"),
    ([PAIRS[0] | {"confidence": "high"}], "column 'confidence' is 'high', expected a whole number"),
    ([LINES[0], LINES[0]], "1 different prompts: too few to hold out 1"),
])
def test_a_bad_row_is_named(prepare, rows, said):
    with pytest.raises(UserError, match=said):
        prepare({"a.jsonl": rows})
    assert not Path("data").exists()


def test_bad_options_of_own_data(prepare, tmp_path):
    for options, said in (
        ({"train": "b.jsonl"}, "b.jsonl: no such file"),
        ({"train": "a.jsonl,tokenizer.json"}, "tokenizer.json: no such file, or its name ends neither"),
        ({"validation_share": 1.0}, "--validation_share=1.0 must be above 0 and below 1"),
        ({"response_tokens": 1}, "--response_tokens=1 must be at least 2"),
        ({"out_dir": "."}, "holds a.jsonl, which is read: choose another --out_dir"),
    ):
        with pytest.raises(UserError, match=said):
            prepare({"a.jsonl": LINES}, **options)
    with pytest.raises(UserError, match="prompts alone beside rows with responses"):
        prepare({"a.jsonl": LINES, "b.jsonl": ALONE})
    Path("c.parquet").write_text("no")
    with pytest.raises(UserError, match="c.parquet, row 1: cannot be read"):
        prepare({}, train="c.parquet")


# --- columns that may be missing


def drop_columns(*names: str) -> None:
    for file in Path("data").glob("*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.drop_columns([name for name in names if name in table.column_names]), file)


def test_tables_of_tokens_alone_are_enough(prepare, models):
    """What says something about a row, and texts that their tokens tell, may be missing in every table."""
    noted = [row | {"batch": "xy"[i % 2], "confidence": i % 3} for i, row in enumerate(PAIRS)]
    prepare({"a.jsonl": noted}, validation_share=0.4, response_tokens=16)
    posts, rows = read_posts("data", "sft_validation", ["reference_response"], 3)
    sft = train_sft.main(train_sft.Config(**QUICK, out_dir="sft", batch_size=8, eval_rows=4))
    rm = train_rm.main(train_rm.Config(**QUICK, out_dir="own_rm", batch_size=8))
    assert {"accuracy/batch=x", "accuracy/batch=y", "accuracy/confidence=0"} <= rm.keys()
    assert "greedy/rougeL" in sft
    drop_columns("id", "query", "reference_response", "chosen", "rejected", "batch", "split", "confidence")
    left = pq.read_schema("data/pairs_train.parquet").names
    assert left == ["query_token", "chosen_token", "rejected_token"]
    bare, bare_rows = read_posts("data", "sft_validation", ["reference_response"], 3)
    assert bare_rows["reference_response"] == rows["reference_response"]
    assert [(p.id, p.query) for p in bare] == [(str(i), p.query) for i, p in enumerate(posts)]
    again = train_sft.main(train_sft.Config(**QUICK, out_dir="sft2", batch_size=8, eval_rows=4))
    assert again == sft | {key: again[key] for key in ("seconds", "out_dir")}
    bare_rm = train_rm.main(train_rm.Config(**QUICK, out_dir="own_rm2", batch_size=8))
    assert bare_rm["accuracy"] == rm["accuracy"]
    assert not any(key.startswith("accuracy/") for key in bare_rm)


def test_prompts_alone(prepare, models):
    """Enough for RLOO, its last samples too; the others say in one line what they need."""
    prepare({"a.jsonl": ALONE})
    result = rloo(reward_model="rm")
    assert result["greedy/tokens"] > 0 and "greedy/rougeL" not in result
    for line in lines_of("rloo/metrics.jsonl"):
        assert "scores" in line and "scores_over_reference" not in line
    with pytest.raises(UserError, match="its prompts have no responses, so there is nothing to learn"):
        train_sft.main(train_sft.Config(**QUICK, out_dir="sft", batch_size=8))
    table = {"query_token": [[5, 6]] * 8, "chosen_token": [[7, 0]] * 8, "rejected_token": [[8, 0]] * 8}
    for split in ("train", "validation"):
        pq.write_table(pa.table(table), f"data/pairs_{split}.parquet")
    with pytest.raises(UserError, match="no table sft_train with responses.*--center=false"):
        train_rm.main(train_rm.Config(**QUICK, out_dir="own_rm", batch_size=8))
    uncentered = train_rm.Config(**QUICK, out_dir="own_rm", batch_size=8, center=False)
    assert train_rm.main(uncentered)["pairs"] == 8
    assert not Path("sft").exists()
