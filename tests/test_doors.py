"""How others come in: models that people have, own data, own rewards, from README commands to a trained policy."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tokenizers import Tokenizer
from util import TOLERANCE, WIDE, error, hidden_of, logits_of, pair, random_groups, raw_config, tiny_tokenizer

from data import jsonl
from rlhf.config import UserError
from rlhf.data import check_tokenizer
from rlhf.forward import response_scores, token_stats
from rlhf.groups import pack
from rlhf.model import NeoX, NeoXConfig
from rlhf.pretrained import from_pretrained, load_tokenizer, save_pretrained

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
        ({"validation_share": 1.0}, "--validation_share between 0 and 1"),
        ({"response_tokens": 1}, "--response_tokens at least 2"),
        ({"out_dir": "."}, "is not empty"),
    ):
        with pytest.raises(UserError, match=said):
            prepare({"a.jsonl": LINES}, **options)
    with pytest.raises(UserError, match="prompts alone beside rows with responses"):
        prepare({"a.jsonl": LINES, "b.jsonl": ALONE})
    Path("c.parquet").write_text("no")
    with pytest.raises(UserError, match="c.parquet, row 1: cannot be read"):
        prepare({}, train="c.parquet")
