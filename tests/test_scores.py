"""Where scores come from: several reward models and their mixes, averaged weights, what follows a marker,
a function that compares."""

import json
import math
from pathlib import Path

import pytest
import torch
from own import LINES, rloo, small
from own import TOKENIZER as WORDS
from safetensors.torch import load_file
from tiny import distance, log

import average
import train_rloo
from rlhf.config import UserError
from rlhf.metrics import gold_agreement
from rlhf.model import EOS
from rlhf.pretrained import from_pretrained, save_pretrained
from rlhf.scores import MIXES, Scorer, after_marker, parse_mix

torch.set_num_threads(1)


def close(actual, expected, atol=1e-6):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# --- several reward models


def test_mixes_by_hand():
    scores = torch.tensor([[[1.0, 5.0]], [[3.0, 5.0]]], dtype=torch.float64)  # two models, two responses
    close(parse_mix("mean")(scores), [[2.0, 5.0]])
    close(parse_mix("min")(scores), [[1.0, 5.0]])
    close(parse_mix("first")(scores), [[1.0, 5.0]])
    close(parse_mix("uwo:0.5")(scores), [[1.5, 5.0]])  # variance 1
    close(parse_mix("uwo")(scores), [[1.9, 5.0]])
    # -log((e^-1 + e^-3) / 2)
    close(parse_mix("softmin")(scores), [[1.566219, 5.0]])
    close(parse_mix("softmin:0.001")(scores), [[1.0007, 5.0]], atol=1e-4)
    close(parse_mix("softmin:1000")(scores), [[2.0, 5.0]], atol=1e-3)


NO_MIX = ["median", "mean:1", "first:1", "uwo:x", "uwo:-1", "softmin:0", "softmin:inf", ""]


@pytest.mark.parametrize("text", NO_MIX)
def test_a_mix_that_is_none(text):
    with pytest.raises(UserError, match=f"--reward_mix={text}: "):
        parse_mix(text)


@pytest.mark.parametrize("mix", MIXES)
def test_copies_of_one_reward_model_are_that_model(tiny, mix):
    usual = tiny.run(train_rloo)
    copies = tiny.run(train_rloo, reward_model="{world}/rm,{world}/rm", reward_mix=mix)
    assert distance(copies, usual) < 2e-5
    assert log(copies)[0]["rm_std"] < 1e-6 and "rm_std" not in log(usual)[0]


def test_the_spread_of_several_is_logged(tiny):
    run = tiny.run(train_rloo, reward_model="{world}/rm,{world}/other_rm")
    alone = [tiny.run(train_rloo, reward_model=f"{{world}}/{rm}") for rm in ("rm", "other_rm")]
    both = [log(one)[0]["raw_scores"] for one in alone]
    (first, *_) = log(run)
    assert first["raw_scores"] == pytest.approx(sum(both) / 2, abs=1e-5)  # before the first update
    assert first["rm_std"] > 0.01
    assert set(json.loads((run / "run.json").read_text())["inputs"]["reward_model"]) >= {
        f"{tiny.root}/{rm}/model.safetensors" for rm in ("rm", "other_rm")
    }


def test_a_model_that_watches_changes_nothing_but_the_log(tiny):
    alone = tiny.run(train_rloo)
    watched = tiny.run(train_rloo, reward_model="{world}/rm,{world}/other_rm", reward_mix="first")
    assert distance(watched, alone) == 0
    assert log(watched)[-1]["rm_std"] > 0.01


def test_gold_agreement_by_hand():
    """Pairs of responses of a prompt; those with equal gold are left out."""
    gold = torch.tensor([[0.1, 0.5, 0.5], [1.0, 0.0, -1.0]])
    scores = torch.tensor([[0.0, 2.0, 1.0], [5.0, 3.0, 4.0]])
    assert gold_agreement(scores, gold) == pytest.approx((2 + 2) / (2 + 3))
    assert gold_agreement(-scores, gold) == pytest.approx(1 / 5)
    assert math.isnan(gold_agreement(scores, torch.zeros(2, 3)))


def test_gold_agreement_is_logged_where_gold_is_known(tiny):
    assert 0 <= log(tiny.run(train_rloo))[0]["gold_agreement"] <= 1


def test_reward_models_of_another_tokenizer_are_one_line(prepare, models):
    prepare({"a.jsonl": LINES})
    other = json.loads(WORDS.to_str())
    vocab = other["model"]["vocab"]
    a, b = list(vocab)[5:7]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    save_pretrained(small("score", seed=1), type(WORDS).from_str(json.dumps(other)), Path("odd"))
    with pytest.raises(UserError, match="the tokenizer of odd is not the one that data was prepared with"):
        rloo(reward_model="rm,odd")
    assert not Path("rloo").exists()


# --- averaged weights


def test_averaged_weights(models, capsys):
    save_pretrained(small("score", seed=2), WORDS, Path("rm_2"))
    average.main(average.Config(models="rm,rm_2", out_dir="mean"))
    one, two, found = (load_file(f"{name}/model.safetensors") for name in ("rm", "rm_2", "mean"))
    assert all(torch.equal(found[key], (one[key] + two[key]) / 2) for key in one)
    assert from_pretrained("mean", head="score").score.weight.abs().max() > 0
    with pytest.raises(UserError, match="not empty: .*--overwrite"):
        average.main(average.Config(models="rm,rm_2", out_dir="mean"))
    average.main(average.Config(models="rm_2,rm_2", out_dir="mean", overwrite=True))
    again = load_file("mean/model.safetensors")
    assert all(torch.equal(again[key], two[key]) for key in two)


@pytest.mark.parametrize("named, out, message", [
    ("rm", "mean", "at least two"),
    ("rm,model", "mean", "not a reward model"),
    ("rm,rm", "rm", "is rm, which"),
    ("rm,wide", "mean", "wide has another architecture"),
])
def test_no_average(models, named, out, message):
    from util import raw_config

    from rlhf.model import NeoX, NeoXConfig
    raw = raw_config(vocab_size=WORDS.get_vocab_size()) | {"intermediate_size": 8}
    save_pretrained(NeoX(NeoXConfig.from_dict(raw), "score").init_weights(0), WORDS, Path("wide"))
    with pytest.raises(UserError, match=message):
        average.main(average.Config(models=named, out_dir=out))
    assert not Path("mean").exists()


# --- what is read of a response


def test_what_follows_the_marker():
    texts = ["the cat sat on the dog", "the cat", " on"]
    ids = [WORDS.encode(text).ids + [EOS] for text in texts]
    group, ended = after_marker([ids], torch.ones(1, 3).bool(), "sat", WORDS)
    assert WORDS.decode(group[0][0]).strip() == "on the dog" and group[0][0][-1] == EOS
    assert group[0][1:] == ids[1:] and ended.tolist() == [[True, False, False]]


def test_the_answer_alone_is_scored():
    """reward(thoughts + marker + answer) = reward(answer); without a marker the rule for no EOS."""
    def length(prompts, texts):
        return [float(len(text.split())) for text in texts]

    score = Scorer(device=torch.device("cpu"), tokenizer=WORDS, pack_rows=None, max_tokens=99, models=[],
                   reward_fn=length, rule="replace", penalty=7.0, marker="sat")
    texts = ["the cat sat on the dog", "on the dog", "sat on sat on the dog"]
    ids = [WORDS.encode(text).ids + [EOS] for text in texts]
    found = score({"query_token": [[5, 6]]}, [ids], torch.ones(1, 3).bool())
    assert found["raw_scores"].tolist() == [[3.0, 3.0, 3.0]]
    assert found["scores"].tolist() == [[3.0, -7.0, 3.0]]
    assert found["ended"].tolist() == [[True, True, True]]  # the log's share of EOS is of the whole response


def test_a_response_without_eos_loses_the_comparison():
    def never(prompts, texts, others):
        return [0.25] * len(texts)

    ended = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    for rule, wins in (("none", [0.25] * 4), ("replace", [0.25, 1.0, 0.0, 0.25])):
        score = Scorer(device=torch.device("cpu"), tokenizer=WORDS, pack_rows=None, max_tokens=99, models=[],
                       compare_fn=never, rule=rule)
        found = score({"query_token": [[5, 6]] * 4}, [[[7], [8]]] * 4, ended)
        assert found["wins"].tolist() == wins
        assert found["raw_scores"].tolist() == [[p, 1 - p] for p in wins]
