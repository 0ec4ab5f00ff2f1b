"""How others come in: models that people have, own data, own rewards, from README commands to a trained
policy."""

import json
import re
import runpy
import shlex
import sys
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer
from util import TOLERANCE, WIDE, error, hidden_of, logits_of, pair, random_groups, raw_config, tiny_tokenizer

import train_rloo
import train_rm
import train_sft
from data import jsonl
from rlhf.config import RunError, UserError
from rlhf.data import batch_indices, check_tokenizer, read_table
from rlhf.forward import response_scores, token_stats
from rlhf.groups import pack
from rlhf.model import NeoX, NeoXConfig
from rlhf.pretrained import from_pretrained, load_tokenizer, save_pretrained
from rlhf.summaries import read_posts

TOKENIZER = tiny_tokenizer()
ROOT = Path(__file__).resolve().parents[1]

# --- models that people have: vocabularies


def test_a_tokenizer_may_know_more_than_the_data(tmp_path):
    """The published SFT and reward models differ by an added [PAD]."""
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    size = TOKENIZER.get_vocab_size()
    larger = tiny_tokenizer()
    larger.add_special_tokens(["[PAD]"])
    check_tokenizer(str(tmp_path), larger, vocab_size=size + 1, model="m")
    check_tokenizer(str(tmp_path), larger, vocab_size=size, model="m")  # [PAD] has no row, and the data has no [PAD]
    with pytest.raises(UserError, match=f"m: the data has tokens up to {size - 1}, .* only {size - 1} rows"):
        check_tokenizer(str(tmp_path), larger, vocab_size=size - 1, model="m")
    larger.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=rf"1 tokens differ, .*'\[PAD\]', {size} in the data and unknown in the model"):
        check_tokenizer(str(tmp_path), TOKENIZER, vocab_size=size + 1, model="m")
    moved = json.loads(TOKENIZER.to_str())
    vocabulary = moved["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    with pytest.raises(UserError, match="tokens differ.*prepare the data again with --tokenizer=m"):
        check_tokenizer(str(tmp_path), Tokenizer.from_str(json.dumps(moved)), vocab_size=size + 1, model="m")


def models_of(rows: int, ref_rows: int) -> tuple[NeoX, NeoX]:
    return pair(raw_config(vocab_size=rows))[0], pair(raw_config(vocab_size=ref_rows, hidden_size=36), seed=1)[0]


@pytest.mark.parametrize("rows, ref_rows", [(61, 53), (53, 61), (61, 61)])
def test_a_reference_with_another_padded_vocabulary(rows, ref_rows):
    """Log-probs and entropy are those of each model's own whole distribution; kl compares the common columns."""
    policy, reference = models_of(rows, ref_rows)
    prompts, responses = random_groups([[4, 2], [3, 5]], vocab=53)
    groups = pack(prompts, responses, max_positions=128)
    both = token_stats(policy, groups, 0.7, reference)
    alone, other = token_stats(policy, groups, 0.7), token_stats(reference, groups, 0.7)
    mask = groups.response_mask
    assert error(both.logprobs[mask], alone.logprobs[mask]) < TOLERANCE
    assert error(both.entropy[mask], alone.entropy[mask]) < TOLERANCE
    assert error(both.ref_logprobs[mask], other.logprobs[mask]) < TOLERANCE
    common = min(rows, ref_rows)
    answer, P = responses[0][0], len(prompts[0])
    with torch.no_grad():
        logits = [logits_of(m, prompts[0] + answer)[P - 1 : -1, :common] for m in (policy, reference)]
    p, q = (z.div(0.7).log_softmax(-1) for z in logits)
    assert error(both.kl[0, 0, : len(answer)], (p.exp() * (p - q)).sum(-1)) < TOLERANCE
    both.logprobs.sum().backward()
    expected, policy.embed_out.weight.grad = policy.embed_out.weight.grad, None
    token_stats(policy, groups, 0.7).logprobs.sum().backward()
    assert error(policy.embed_out.weight.grad, expected) < TOLERANCE


def test_a_token_beyond_the_other_vocabulary_is_padding_there():
    policy, reference = models_of(61, 53)
    reward_model = pair(raw_config(vocab_size=53), head="score")[0]

    @torch.no_grad()
    def numbers(token: int):
        groups = pack([[5, 6, 7]], [[[9, token, 0]]], max_positions=128)
        stats = token_stats(policy, groups, 1.0, reference)
        return stats.logprobs, stats.ref_logprobs, response_scores(reward_model, groups)

    strange, padding, other = numbers(57), numbers(1), numbers(2)
    for a, b, c in zip(strange[1:], padding[1:], other[1:]):
        assert torch.equal(a, b) and error(a, c) > WIDE
    own = logits_of(policy, [5, 6, 7, 9])[-1].log_softmax(-1)[57]  # the policy's own is not touched
    assert error(strange[0][0, 0, 1], own.detach()) < TOLERANCE


# --- models that people have: directories


@pytest.fixture
def model_dir(tmp_path) -> Path:
    save_pretrained(NeoX(NeoXConfig.from_dict(raw_config())).init_weights(0), TOKENIZER, tmp_path / "model")
    return tmp_path / "model"


def only_pickle(d: Path):
    (d / "model.safetensors").rename(d / "pytorch_model.bin")


def only_adapter(d: Path):
    (d / "model.safetensors").rename(d / "adapter_model.safetensors")
    (d / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize("change, said", [
    (only_pickle, "model: only pytorch_model.bin, .*save_pretrained"),
    (only_adapter, "model: a LoRA adapter, .*merge_and_unload"),
    (lambda d: (only_adapter(d), (d / "config.json").unlink()), "model: a LoRA adapter"),
    (lambda d: (d / "model.safetensors").unlink(), "model: a config.json without weights .*--init=scratch"),
    (lambda d: (d / "config.json").unlink(), "model: no config.json there"),
])
def test_a_directory_that_is_no_model_says_what_to_do(model_dir, change, said):
    from_pretrained(str(model_dir))
    change(model_dir)
    with pytest.raises(UserError, match=said):
        from_pretrained(str(model_dir))


def test_an_adapter_beside_whole_weights_is_no_fault(model_dir):
    (model_dir / "adapter_config.json").write_text("{}")
    from_pretrained(str(model_dir))


def test_an_eos_that_is_not_token_0_is_refused(model_dir):
    load_tokenizer(str(model_dir))
    file = model_dir / "tokenizer_config.json"
    config = json.loads(file.read_text())
    for eos in ("the", {"content": "the"}):
        file.write_text(json.dumps(config | {"eos_token": eos}))
        with pytest.raises(UserError, match="its tokenizer ends a text with 'the' .*only models whose EOS is token 0"):
            load_tokenizer(str(model_dir))
    file.write_text(json.dumps({}))
    load_tokenizer(str(model_dir))


def test_a_reward_model_whose_padding_is_its_eos_is_told(tmp_path, capsys):
    """What the warning says is so: transformers reads such a model at the token before the EOS."""
    ours, theirs = pair(raw_config(), head="score")
    save_pretrained(ours, TOKENIZER, tmp_path / "rm")
    from_pretrained(str(tmp_path / "rm"), head="score")
    assert capsys.readouterr().err == ""
    file = tmp_path / "rm/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": 0}))
    model = from_pretrained(str(tmp_path / "rm"), head="score")
    said = capsys.readouterr().err
    assert "rm: its padding token is the EOS, so TRL and transformers read its score at the token before" in said
    theirs.config.pad_token_id = 0
    with torch.no_grad():
        here, before = (model.scores(hidden_of(model, [5, 6, 7, 9, 0]))[at] for at in (-1, -2))
        there = theirs(torch.tensor([[5, 6, 7, 9, 0]])).logits[0, 0]
    assert error(there, before) < TOLERANCE and error(there, here) > WIDE


# --- own data


LINES = [{"prompt": f"the cat {i} sat on the mat", "response": f" and the dog {i}"} for i in range(20)]
PAIRS = [{"prompt": r["prompt"], "chosen": r["response"], "rejected": " the mat"} for r in LINES]
RANKED = [{"prompt": r["prompt"], "responses": [r["response"], " the cat", " the mat"]} for r in LINES]
ALONE = [{"prompt": r["prompt"]} for r in LINES]


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """prepare(files, ...) -> the tables that data/jsonl.py writes of them; a file is a list of rows, or of lines."""
    monkeypatch.chdir(tmp_path)
    TOKENIZER.save("tokenizer.json")

    def run(files: dict[str, list], out_dir: str = "data", **options) -> dict[str, list[dict]]:
        for name, rows in files.items():
            if name.endswith(".parquet"):
                pq.write_table(pa.Table.from_pylist(rows), name)
            else:
                lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
                Path(name).write_text("".join(line + "\n" for line in lines))
        train = options.pop("train", ",".join(name for name in files if not name.startswith("valid")))
        jsonl.main(jsonl.Config(train=train, tokenizer="tokenizer.json", out_dir=out_dir, **options))
        return {path.stem: pq.read_table(path).to_pylist() for path in Path(out_dir).glob("*.parquet")}

    return run


def test_rows_of_each_kind_become_the_tables_that_the_scripts_read(prepare):
    sft = prepare({"a.jsonl": LINES}, "a", validation_share=0.2)
    assert sft.keys() == {"sft_train", "sft_validation"} and [len(rows) for rows in sft.values()].count(16) == 1
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
    assert pairs["sft_validation"][0]["reference_response"] == row["chosen"] and "batch" not in pairs["sft_validation"][0]

    ranked = prepare({"c.jsonl": RANKED}, "c")
    assert ranked.keys() == pairs.keys() | {"rankings_train"}
    row, pair = ranked["rankings_train"][0], ranked["pairs_train"][0]
    assert row["responses"][1:] == [" the cat", " the mat"] and [t[-1] for t in row["responses_token"]] == [0, 0, 0]
    assert [pair["chosen"], pair["rejected"]] == [row["responses"][0], " the mat"]

    alone = prepare({"d.jsonl": ALONE}, "d")
    assert alone["sft_train"][0].keys() == {"id", "query", "query_token"} and len(alone["sft_validation"]) == 1
    meta = json.loads(Path("d/meta.json").read_text())
    assert meta["response_tokens"] == 128 and meta["splits"] == {"sft_train": 19, "sft_validation": 1}


def test_rows_of_several_kinds_share_the_split(prepare):
    """What is held out is held out in every table; rows that say less are not made up where a file has them."""
    tables = prepare({"sft.jsonl": LINES, "pairs.jsonl": PAIRS}, validation_share=0.3)
    held = {row["query"] for row in tables["sft_validation"]}
    assert len(held) == 6 and held == {row["query"] for row in tables["pairs_validation"]}
    assert not held & {row["query"] for name in ("sft_train", "pairs_train") for row in tables[name]}
    assert len(tables["sft_train"]) == 14
    again = prepare({}, train="sft.jsonl,pairs.jsonl", overwrite=True, validation_share=0.3)
    assert again == tables
    assert prepare({}, train="sft.jsonl,pairs.jsonl", overwrite=True, validation_share=0.3, seed=1) != tables


def test_validation_of_its_own(prepare, capsys):
    tables = prepare({"a.jsonl": LINES[:10], "valid.jsonl": LINES[9:]}, validation="valid.jsonl")
    assert [len(tables[name]) for name in ("sft_train", "sft_validation")] == [10, 11]
    assert "1 prompts are in training and in validation" in capsys.readouterr().out
    for valid, said in ((ALONE, "either both have responses, or neither"), (LINES, "pairs to train on and none to validate")):
        with pytest.raises(UserError, match=said):
            prepare({"a.jsonl": PAIRS, "valid.jsonl": valid}, validation="valid.jsonl", overwrite=True)


def test_what_is_too_long_or_teaches_nothing_is_dropped_and_counted(prepare, capsys):
    length = len(TOKENIZER.encode(PAIRS[0]["prompt"]).ids)
    more = [PAIRS[0] | {"prompt": "the cat " * 20}, PAIRS[1] | {"rejected": " the mat" * 20}, PAIRS[2] | {"rejected": PAIRS[2]["chosen"]}]
    tables = prepare({"a.jsonl": PAIRS[3:] + more, "valid.jsonl": PAIRS[:3]}, validation="valid.jsonl", prompt_tokens=length + 2, response_tokens=15)
    assert len(tables["pairs_train"]) == 17 and len(tables["sft_train"]) == 19
    said = capsys.readouterr().out
    assert "rows 17, long_prompts 1, long_responses 1, ties 1" in said and "rows 19, long_prompts 1, long_responses 0, ties 0" in said
    assert json.loads(Path("data/meta.json").read_text())["tables"]["pairs_train"]["ties"] == 1
    with pytest.raises(UserError, match=r"sft_train: none of 19 rows is left \(rows 0, long_prompts 19"):
        prepare({"a.jsonl": LINES}, prompt_tokens=2, out_dir="none")
    assert not Path("none").exists()


@pytest.mark.parametrize("rows, said", [
    (['{"prompt": "a", "response": "b"}', "{"], "a.jsonl, row 2: cannot be read"),
    (["[1]"], "a.jsonl, row 1: cannot be read"),
    ([], "a.jsonl: no rows"),
    ([{"text": "a"}], "a.jsonl, row 1: no column 'prompt'"),
    ([{"prompt": None}], "a.jsonl, row 1: column 'prompt' is null, which is no str"),
    ([{"prompt": 3}], "column 'prompt' is '3', which is no str"),
    ([{"prompt": " "}], "a.jsonl, row 1: column 'prompt' is empty"),
    ([LINES[0], {"prompt": "a", "response": ""}], "a.jsonl, row 2: column 'response' is empty"),
    (['{"prompt": "\\ud800"}'], "column 'prompt' is no valid text"),
    ([{"prompt": "a", "chosen": "b"}], "no column 'rejected'"),
    ([{"prompt": "a", "chosen": "b", "rejected": ["c"]}], "column 'rejected' is .* which is no str"),
    ([{"prompt": "a", "responses": "b"}], "column 'responses' is 'b', which is no list"),
    ([{"prompt": "a", "responses": ["b"]}], "'responses' has 1 texts, a ranking needs at least 2"),
    ([{"prompt": "a", "responses": ["b", None]}], "column 'responses.1' is null"),
    ([RANKED[0], {"prompt": "a", "responses": ["b", "c"]}], "row 2: 2 responses, the rows before have 3"),
    ([PAIRS[0] | {"response": "x"}], "has the columns response, chosen, rejected: a file has rows of one kind"),
    ([LINES[0], PAIRS[0]], "row 2: a row of the kind 'pairs' in a file that began with 'responses'"),
    ([PAIRS[0] | {"batch": "x"}, PAIRS[1]], "row 2: column batch is in some rows of the file only"),
    ([PAIRS[0] | {"confidence": "high"}], "column 'confidence' is 'high', which is no int"),
    ([LINES[0], LINES[0]], "1 different prompts: too few to hold out 1"),
])
def test_a_bad_row_is_named(prepare, rows, said):
    with pytest.raises(UserError, match=said):
        prepare({"a.jsonl": rows})
    assert not Path("data").exists()


def test_bad_options_of_own_data(prepare, tmp_path):
    for options, said in (
        ({"train": "b.jsonl"}, "b.jsonl: no .jsonl or .parquet file"),
        ({"train": "a.jsonl,tokenizer.json"}, "tokenizer.json: no .jsonl or .parquet file"),
        ({"validation_share": 1.0}, "--validation_share=1.0 must be above 0 and below 1"),
        ({"response_tokens": 1}, "--response_tokens=1 must be at least 2"),
        ({"out_dir": "."}, "is not empty"),
    ):
        with pytest.raises(UserError, match=said):
            prepare({"a.jsonl": LINES}, **options)
    with pytest.raises(UserError, match="prompts alone beside rows with responses"):
        prepare({"a.jsonl": LINES, "b.jsonl": ALONE})
    Path("c.parquet").write_text("no")
    with pytest.raises(UserError, match="c.parquet, row 1: cannot be read"):
        prepare({}, train="c.parquet")


# --- columns that may be missing


def small(head: str = "embed_out", seed: int = 0, **changes) -> NeoX:
    return NeoX(NeoXConfig.from_dict(raw_config(vocab_size=TOKENIZER.get_vocab_size(), **changes)), head).init_weights(seed)


@pytest.fixture
def models(prepare):
    """A policy `model` and a reward model `rm` beside the data that `prepare` writes."""
    save_pretrained(small(), TOKENIZER, Path("model"))
    save_pretrained(small("score", seed=1), TOKENIZER, Path("rm"))


QUICK = dict(data_dir="data", model="model", device="cpu", save_every=2)
RLOO = dict(**QUICK, out_dir="rloo", lr=1e-3, k=2, batch_size=8, episodes=32, ppo_epochs=1, response_tokens=6, eval_rows=4)


def rloo(**changes) -> dict:
    return train_rloo.main(train_rloo.Config(**{**RLOO, **changes}))


def lines_of(file: str) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def drop_columns(*names: str) -> None:
    for file in Path("data").glob("*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.drop_columns([name for name in names if name in table.column_names]), file)


def test_tables_of_tokens_alone_are_enough(prepare, models):
    """What says something about a row, and texts that their tokens tell, may be missing in every table."""
    prepare({"a.jsonl": [row | {"batch": "xy"[i % 2], "confidence": i % 3} for i, row in enumerate(PAIRS)]}, validation_share=0.4, response_tokens=16)
    posts, rows = read_posts("data", "sft_validation", ["reference_response"], 3)
    sft = train_sft.main(train_sft.Config(**QUICK, out_dir="sft", batch_size=8, eval_rows=4))
    rm = train_rm.main(train_rm.Config(**QUICK, out_dir="own_rm", batch_size=8))
    assert {"accuracy/batch=x", "accuracy/batch=y", "accuracy/confidence=0"} <= rm.keys() and "greedy/rougeL" in sft
    drop_columns("id", "query", "reference_response", "chosen", "rejected", "batch", "split", "confidence")
    assert set(pq.read_schema("data/pairs_train.parquet").names) == {"query_token", "chosen_token", "rejected_token"}
    bare, bare_rows = read_posts("data", "sft_validation", ["reference_response"], 3)
    assert [p.query for p in bare] == [p.query for p in posts] and bare_rows["reference_response"] == rows["reference_response"]
    assert [p.id for p in bare] == ["0", "1", "2"]
    again = train_sft.main(train_sft.Config(**QUICK, out_dir="sft2", batch_size=8, eval_rows=4))
    times = {"seconds", "out_dir"}
    assert {k: v for k, v in again.items() if k not in times} == {k: v for k, v in sft.items() if k not in times}
    bare_rm = train_rm.main(train_rm.Config(**QUICK, out_dir="own_rm2", batch_size=8))
    assert bare_rm["accuracy"] == rm["accuracy"] and not any(key.startswith("accuracy/") for key in bare_rm)


def test_prompts_alone(prepare, models):
    """Enough for RLOO, its last samples too; the others say in one line, before the first step, what they need."""
    prepare({"a.jsonl": ALONE})
    result = rloo(reward_model="rm")
    assert result["greedy/tokens"] > 0 and "greedy/rougeL" not in result
    assert all("scores" in line and "scores_over_reference" not in line for line in lines_of("rloo/metrics.jsonl"))
    with pytest.raises(UserError, match="its prompts have no responses, so there is nothing to learn"):
        train_sft.main(train_sft.Config(**QUICK, out_dir="sft", batch_size=8))
    table = {"query_token": [[5, 6]] * 8, "chosen_token": [[7, 0]] * 8, "rejected_token": [[8, 0]] * 8}
    for split in ("train", "validation"):
        pq.write_table(pa.table(table), f"data/pairs_{split}.parquet")
    with pytest.raises(UserError, match="no table sft_train with responses.*--center=false"):
        train_rm.main(train_rm.Config(**QUICK, out_dir="own_rm", batch_size=8))
    assert train_rm.main(train_rm.Config(**QUICK, out_dir="own_rm", batch_size=8, center=False))["pairs"] == 8
    assert not Path("sft").exists()


# --- scores over the references


def test_the_reference_rides_along_and_changes_no_score():
    reward_model = pair(raw_config(), head="score")[0]
    prompts, responses = random_groups([[4, 2], [3, 5], [1, 6]])
    references = [[[9, 8, 7, 0]], [[5, 0]], [[4, 4, 4, 4, 4, 4, 4, 0]]]
    pack_rows = partial(pack, max_positions=128, max_response=6)
    scores, human = train_rloo.model_scores(reward_model, pack_rows, prompts, responses, references)
    alone, none = train_rloo.model_scores(reward_model, pack_rows, prompts, responses, [[]] * 3)
    assert (scores.shape, human.shape, none.shape) == ((3, 2), (3, 1), (3, 0))
    assert error(scores, alone) < TOLERANCE
    assert error(human, response_scores(reward_model, pack(prompts, references, max_positions=128))) < TOLERANCE
    assert error(human.roll(1, 0), human) > WIDE


def test_scores_over_reference_is_logged(prepare, models):
    prepare({"a.jsonl": LINES})
    rloo(reward_model="rm")
    table = read_table("data", "sft_train", ["query_token", "reference_response_token"])
    reward_model = from_pretrained("rm", head="score")
    for step, line in enumerate(lines_of("rloo/metrics.jsonl")):
        rows = batch_indices(len(table["query_token"]), 4, step, seed=1)
        columns = [[table[name][i] for i in rows] for name in table]
        groups = pack(columns[0], [[r] for r in columns[1]], max_positions=128)
        human = response_scores(reward_model, groups).mean().item()
        assert line["scores_over_reference"] == pytest.approx(line["scores"] - human, abs=1e-5)
        assert abs(human) > 1e-2


# --- own rewards


REWARD = """
import math

def brief(prompts, texts):
    return [-len(text) / 10 + ("cat" in prompt) for prompt, text in zip(prompts, texts)]

def broken(prompts, texts):
    raise KeyError("no such\\nword")

def short(prompts, texts):
    return [1.0] * (len(texts) - 1)

def words(prompts, texts):
    return "good"

def holes(prompts, texts):
    return [1.0] * (len(texts) - 1) + [math.nan]

calls = 0
def stops(prompts, texts):
    global calls
    calls += 1
    return [math.inf if calls == 4 else 1.0 * len(text) for text in texts]

number = 3
"""


@pytest.fixture
def reward_file(prepare, models):
    prepare({"a.jsonl": LINES})
    Path("reward.py").write_text(REWARD)


@pytest.mark.parametrize("name, said", [
    ("reward.py", "expected file.py:function"),
    ("reward.txt:brief", "expected file.py:function"),
    ("nowhere.py:brief", "no such file: nowhere.py"),
    ("reward.py:missing", r"no function missing in .*reward.py \(functions there: brief, broken,"),
    ("reward.py:number", "no function number"),
    ("syntax.py:f", "syntax.py cannot be imported: SyntaxError"),
    ("imports.py:f", "imports.py cannot be imported: ModuleNotFoundError in line 2: No module named 'nowhere_to_be_found'"),
])
def test_a_reward_function_that_cannot_be_had(reward_file, name, said):
    Path("syntax.py").write_text("def f(:")
    Path("imports.py").write_text("\nimport nowhere_to_be_found")
    with pytest.raises(UserError, match=f"--reward_fn={name.split(':')[0]}.*{said}"):
        rloo(reward_fn=name)
    assert not Path("rloo").exists()


@pytest.mark.parametrize("name, said", [
    ("broken", r"broken raised KeyError in line 8: 'no such\\nword', for 8 texts, the first of them a response to 'the cat"),
    ("short", r"short returned the shape \(7,\) for 8 texts, .* answers 'the cat"),
    ("words", "words returned 'good', no list of 8 numbers, .* answers 'the cat"),
    ("holes", "holes returned nan for the text '.*, a response to 'the cat"),
])
def test_a_reward_function_that_fails_is_named_with_the_prompt(reward_file, name, said):
    with pytest.raises(RunError, match=f"{said}.*mend it and continue with --resume"):
        rloo(reward_fn=f"reward.py:{name}")


def test_one_reward(reward_file):
    for rewards in ({}, {"reward_model": "rm", "reward_fn": "reward.py:brief"}):
        with pytest.raises(UserError, match="give --reward_model or --reward_fn, one of the two"):
            rloo(**rewards)


def test_a_run_with_a_function_is_resumed_where_it_failed(reward_file):
    """The same numbers as without the failure, and no line of samples twice."""
    options = dict(reward_fn="reward.py:stops", save_every=2, samples_every=1)
    Path("reward.py").write_text(REWARD.replace("calls == 4", "False"))
    rloo(**options, out_dir="whole")
    Path("reward.py").write_text(REWARD)
    with pytest.raises(RunError, match="stops returned inf"):
        rloo(**options)
    assert [line["step"] for line in lines_of("rloo/samples.jsonl")] == [1] * 3 + [2] * 3 + [3] * 3
    rloo(**options, resume=True)
    assert lines_of("rloo/samples.jsonl") == lines_of("whole/samples.jsonl")
    scores = [[line["scores"] for line in lines_of(f"{run}/metrics.jsonl")] for run in ("rloo", "whole")]
    assert scores[0] == scores[1] and len(scores[0]) == 4


def test_samples_show_what_was_scored(reward_file):
    rloo(reward_fn="reward.py:brief", samples_every=3, missing_eos="none", reward="kl:0.5")
    lines = lines_of("rloo/samples.jsonl")
    assert [line["step"] for line in lines] == [1] * 3 + [4] * 3
    prompts = {row["prompt"] for row in LINES}
    for line in lines:
        assert line["prompt"] in prompts and len(line["responses"]) == 2
        for response in line["responses"]:
            assert response["score"] == pytest.approx(-len(response["text"]) / 10 + 1, rel=1e-6)
            assert response.keys() == {"text", "score", "reward", "ended"} and response["ended"] in (True, False)
    assert any(r["reward"] != r["score"] for line in lines[3:] for r in line["responses"])  # the KL term, once moved
    assert all(r["reward"] == r["score"] for line in lines[:3] for r in line["responses"])  # 0 before the first update


# --- from the README


def readme_block(language: str, holds: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return next(block for block in blocks if holds in block)


def run_script(command: str, more: str, monkeypatch) -> None:
    """A command of the README in this process, as `python` would run it, with some options after its own."""
    python, script, *options = shlex.split(command)
    assert python == "python"
    monkeypatch.setattr(sys, "argv", [script, *options, *more.split()])
    runpy.run_path(str(ROOT / script), run_name="__main__")


def test_own_data_and_own_reward_by_the_commands_of_the_readme(prepare, models, monkeypatch, capsys):
    shown = readme_block("jsonl", "prompt")
    others = [{"prompt": f"Q: Which animal is number {i}?\nA:", "response": " A dog is."} for i in range(40)]
    Path("answers.jsonl").write_text(shown + "".join(json.dumps(row) + "\n" for row in others))
    Path("reward.py").write_text(readme_block("python", "def brief"))
    commands = readme_block("bash", "--reward_fn=").replace("EleutherAI/pythia-160m", "model").splitlines()
    assert [shlex.split(command)[1] for command in commands] == ["data/jsonl.py", "train_sft.py", "train_rloo.py"]
    more = ["", "--batch_size=8 --eval_rows=2", "--batch_size=8 --episodes=16 --eval_rows=2"]
    for command, options in zip(commands, more):
        run_script(command, options, monkeypatch)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["out_dir"] == "out/own/rloo" and result["scores"] < 1
    (first, *_), (sampled, *_) = lines_of("out/own/rloo/metrics.jsonl"), lines_of("out/own/rloo/samples.jsonl")
    namespace = {}
    exec(Path("reward.py").read_text(), namespace)
    texts = [response["text"] for response in sampled["responses"]]
    expected = namespace["brief"]([sampled["prompt"]] * len(texts), texts)
    given = [r["score"] if r["ended"] else e for r, e in zip(sampled["responses"], expected)]
    assert given == pytest.approx(expected) and len(texts) == 4
    assert "scores_over_reference" not in first and first["raw_scores"] < 1
    from_pretrained("out/own/rloo")
