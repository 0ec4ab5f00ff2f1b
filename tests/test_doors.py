"""Models that people have: other vocabularies and paddings, directories that are no model; and scores
beside those of the references."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from own import LINES, lines_of, rloo
from tokenizers import Tokenizer
from util import TOLERANCE, WIDE, error, hidden_of, logits_of, pair, random_groups, raw_config, tiny_tokenizer

from rlhf.config import UserError
from rlhf.data import batch_indices, check_tokenizer, read_table
from rlhf.forward import response_scores, token_stats
from rlhf.groups import pack
from rlhf.model import NeoX, NeoXConfig
from rlhf.pretrained import from_pretrained, load_tokenizer, save_pretrained
from rlhf.scores import Scorer

TOKENIZER = tiny_tokenizer()


# --- models that people have: vocabularies


def test_a_tokenizer_may_know_more_than_the_data(tmp_path):
    """The published SFT and reward models differ by an added [PAD]."""
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    size = TOKENIZER.get_vocab_size()
    larger = tiny_tokenizer()
    larger.add_special_tokens(["[PAD]"])
    check_tokenizer(str(tmp_path), larger, vocab_size=size + 1, model="m")
    check_tokenizer(str(tmp_path), larger, vocab_size=size, model="m")  # neither data nor embedding has it
    with pytest.raises(UserError, match=f"m: the data has tokens up to {size - 1}, .* only {size - 1} rows"):
        check_tokenizer(str(tmp_path), larger, vocab_size=size - 1, model="m")
    larger.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=rf"1 tokens differ, .*'\[PAD\]', {size} in the data and unknown"):
        check_tokenizer(str(tmp_path), TOKENIZER, vocab_size=size + 1, model="m")
    moved = json.loads(TOKENIZER.to_str())
    vocabulary = moved["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    with pytest.raises(UserError, match="tokens differ.*prepare the data again with --tokenizer=m"):
        check_tokenizer(str(tmp_path), Tokenizer.from_str(json.dumps(moved)), vocab_size=size + 1, model="m")


def models_of(rows: int, ref_rows: int) -> tuple[NeoX, NeoX]:
    reference = pair(raw_config(vocab_size=ref_rows, hidden_size=36), seed=1)[0]
    return pair(raw_config(vocab_size=rows))[0], reference


@pytest.mark.parametrize("rows, ref_rows", [(61, 53), (53, 61), (61, 61)])
def test_a_reference_with_another_padded_vocabulary(rows, ref_rows):
    """Log-probs and entropy are of each model's own whole distribution; kl is over the common columns."""
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
        with pytest.raises(UserError, match="ends a text with 'the' .*only models whose EOS is token 0"):
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
    assert "rm: its padding token is the EOS" in said and "read its score at the token before" in said
    theirs.config.pad_token_id = 0
    with torch.no_grad():
        here, before = (model.scores(hidden_of(model, [5, 6, 7, 9, 0]))[at] for at in (-1, -2))
        there = theirs(torch.tensor([[5, 6, 7, 9, 0]])).logits[0, 0]
    assert error(there, before) < TOLERANCE and error(there, here) > WIDE


# --- scores over the references


def test_the_reference_rides_along_and_changes_no_score():
    reward_model = pair(raw_config(), head="score")[0]
    prompts, responses = random_groups([[4, 2], [3, 5], [1, 6]])
    references = [[[9, 8, 7, 0]], [[5, 0]], [[4, 4, 4, 4, 4, 4, 4, 0]]]
    pack_rows = partial(pack, max_positions=128, max_response=6)
    score = Scorer(device=torch.device("cpu"), tokenizer=None, pack_rows=pack_rows, max_tokens=20,
                   models=[reward_model])
    ended = torch.ones(3, 2, dtype=torch.bool)
    found = [
        score({"query_token": prompts, "references": human}, responses, ended)
        for human in (references, [[]] * 3)
    ]
    (scores, human), (alone, none) = [(f["scores"], f["reference_scores"]) for f in found]
    assert (scores.shape, human.shape, none.shape) == ((3, 2), (3, 1), (3, 0))
    assert error(scores, alone) < TOLERANCE
    expected = response_scores(reward_model, pack(prompts, references, max_positions=128))  # (3, 1)
    assert error(human, expected) < TOLERANCE
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
