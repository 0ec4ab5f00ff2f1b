"""sample.py: its selections against closed forms, its directories against what the training scripts read."""

import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from enumeration import Responses

import sample
import train_sft
import train_simpo
from data import toy
from rlhf.config import UserError
from rlhf.forward import response_scores, token_stats
from rlhf.groups import pack
from rlhf.masked import mean_logprobs, seq_logprobs
from rlhf.model import EOS, NeoX, NeoXConfig
from rlhf.pretrained import from_pretrained, load_tokenizer, read_json, save_pretrained
from rlhf.rewards import rlhf_reward

torch.set_num_threads(1)
Y = Responses(vocab=3, length=2)  # 7 responses
INF = float("inf")


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_pi(logits):
    return seq_logprobs(Y.logprobs(logits), Y.mask)[0]


# --- selections


@pytest.mark.parametrize("k, zero", [(1, True), (2, False)])
def test_raft_with_one_sample_has_no_expected_gradient(k, zero):
    """NLL of the best of k samples, every group of k with its probability. One sample: nothing was chosen."""
    logits = normal(Y.prefixes, Y.vocab, seed=1).requires_grad_()
    scores = normal(Y.count, seed=2)
    logp = log_pi(logits)
    groups = torch.tensor(list(itertools.product(range(Y.count), repeat=k)))  # (N, k)
    weight = logp.detach()[groups].sum(1).exp()
    best = groups.gather(1, scores[groups].argmax(1, keepdim=True))[:, 0]
    gradient = torch.autograd.grad((weight * -logp[best]).sum(), logits)[0]
    assert (gradient.abs().max() < 1e-12) == zero


def rates(beta, draws=6000, K=32):
    """How often each response is the first accepted one of K samples of pi."""
    g = torch.Generator().manual_seed(3)
    probs = log_pi(normal(Y.prefixes, Y.vocab, seed=1)).exp()
    scores = normal(Y.count, seed=2)
    counts = torch.zeros(Y.count)
    for group in probs.multinomial(draws * K, replacement=True, generator=g).view(draws, K):
        counts[group[sample.accepted(scores[group], beta, 1, g)[0]]] += 1
    return counts / draws, (probs * (scores / beta).exp()), (probs * (scores / (2 * beta)).exp())


def test_the_first_accepted_sample_of_rso_follows_the_tilted_policy():
    """pi exp(r / beta) / Z; another beta is seen."""
    found, tilted, wrong = rates(beta=0.7)
    expected = tilted / tilted.sum()
    error = 4 * (expected * (1 - expected) / 6000).sqrt()
    assert ((found - expected).abs() < error).all()
    assert ((found - wrong / wrong.sum()).abs() > error).any()


def test_rso_between_its_ends():
    """beta -> 0 takes the highest scores in their order, beta -> infinity the first ones; none takes -inf."""
    scores = torch.tensor([0.1, 3.0, -1.0, -INF, 2.0, 0.5])
    g = torch.Generator().manual_seed(0)
    assert sample.accepted(scores, 1e-6, 3, g) == [1, 4, 5]
    assert sample.accepted(scores, 1e9, 4, g) == [0, 1, 2, 4]
    assert sorted(sample.accepted(scores, 1.0, 6, g)) == [0, 1, 2, 4, 5]
    assert sample.accepted(scores[3:4], 1.0, 2, g) == []


def config(**changes):
    io = dict(data_dir="d", model="m", reward_model="r", out_dir="o")
    return sample.Config(**io, **changes)


FOUR = [[5, 0], [6, 0], [5, 0], [7]]


@pytest.mark.parametrize("options, scores, found", [
    (dict(select="best"), [1.0, 2.0, 0.0, -INF], ([], [1], "selected")),
    (dict(select="own"), [-3.0, -INF, -2.0, -INF], ([], [2], "selected")),
    (dict(select="best"), [-INF] * 4, ([], [], "no response with EOS")),
    (dict(select="gap", gap=1.5), [1.0, 2.0, 0.0, -INF], ([(1, 2)], [], "wide")),
    (dict(select="gap", gap=2.5), [1.0, 2.0, 0.0, -INF], ([], [None], "narrow")),
    (dict(select="gap", gap=0.0), [1.0, -INF, 0.5, -INF], ([], [None], "narrow")),  # the same text twice
    (dict(select="rso", beta=1e-6, accept=2), [1.0, 2.0, 0.0, -INF], ([(1, 0)], [], "with pairs")),
    (dict(select="rso", beta=1e9, accept=2), [1.0, 2.0, 0.0, -INF], ([(1, 0)], [], "with pairs")),
    (dict(select="rso", beta=1e-6, accept=2), [2.0, -INF, 1.0, -INF],
     ([], [], "without two different responses")),
], ids=str)
def test_selections_by_hand(options, scores, found):
    generator = torch.Generator().manual_seed(0)
    assert sample.select(config(**options), torch.tensor(scores), FOUR, generator) == found


def test_sharpening_by_rl_ends_at_a_power_of_the_policy():
    """R = log pi_ref and KL coefficient beta: the gradient vanishes at pi ~ pi_ref^(1 + 1/beta), and not at
    pi_ref itself."""
    beta = 0.8
    ref = Y.logprobs(normal(Y.prefixes, Y.vocab, seed=4))
    log_ref = seq_logprobs(ref, Y.mask)[0]

    def followed(logits):
        logprobs = Y.logprobs(logits)
        terms = {"score": 0.0, "ref_logprob": 1.0, "kl": beta}
        rewards, _ = rlhf_reward(torch.zeros(1, Y.count), logprobs, ref, Y.mask, terms)
        return torch.autograd.grad((log_pi(logits).exp() * rewards[0]).sum(), logits)[0]

    sharp = Y.logits_of(((1 + 1 / beta) * log_ref).softmax(0))
    assert followed(sharp.requires_grad_()).abs().max() < 1e-12
    assert followed(Y.logits_of(log_ref.exp()).requires_grad_()).abs().max() > 0.01


# --- directories


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sample")
    sizes = dict(posts=20, pairs=6, rankings=2, validation=3, test=1)
    toy.main(toy.Config(out_dir=str(out / "data"), **sizes, size="small"))
    config = NeoXConfig.from_dict(read_json(out / "data/base/config.json"))
    tokenizer = load_tokenizer(str(out / "data/base"))
    for seed, (name, head) in enumerate((("sft", "embed_out"), ("rm", "score"))):
        model = NeoX(config, head).init_weights(seed)
        with torch.no_grad():
            if head == "embed_out":  # EOS often enough, but not always
                model.gpt_neox.final_layer_norm.bias += 6 * model.embed_out.weight[EOS]
        save_pretrained(model, tokenizer, out / name)
    return out


def config_of(world, out_dir, **changes):
    io = dict(data_dir=str(world / "data"), model=str(world / "sft"), reward_model=str(world / "rm"))
    sizes = dict(k=6, accept=4, temperature=1.0, response_tokens=8, rollout_prompts=6, device="cpu", gap=0.05)
    return sample.Config(**{**io, **sizes, "out_dir": str(out_dir), **changes})


def rows_of(data: Path, table: str) -> dict[str, list]:
    return pq.read_table(data / f"{table}.parquet").to_pydict()


def recorded(monkeypatch):
    calls = []
    generate = sample.generate_all

    def spy(model, prompts, *args, **options):
        responses, ended = generate(model, prompts, *args, **options)
        calls.extend(zip(prompts, responses, ended))
        return responses, ended

    monkeypatch.setattr(sample, "generate_all", spy)
    return calls


@cache
def loaded(path, head):
    return from_pretrained(str(path), head=head)


def numbers(world, prompt, group, kind):
    groups = pack([prompt], [group], max_positions=256)
    with torch.no_grad():
        if kind == "rm":
            return response_scores(loaded(world / "rm", "score"), groups)[0]
        logprobs = token_stats(loaded(world / "sft", "embed_out"), groups).logprobs
        per = {"own": seq_logprobs, "mean": mean_logprobs}[kind]
        return per(logprobs, groups.response_mask)[0]


@pytest.mark.parametrize("select, kind, other", [("best", "rm", "own"), ("own", "own", "mean")])
def test_the_best_finished_response_becomes_the_reference(world, tmp_path, monkeypatch, select, kind, other):
    calls = recorded(monkeypatch)
    result = sample.main(config_of(world, tmp_path / "out", select=select, k=24))
    table = rows_of(tmp_path / "out", "sft_train")
    finished = [(p, [r for r, e in zip(g, ended) if e]) for p, g, ended in calls]
    finished = [(p, g) for p, g in finished if g]

    def picked(by):
        return [g[numbers(world, p, g, by).argmax()] for p, g in finished]

    assert table["reference_response_token"] == picked(kind) != picked(other)
    assert all(tokens[-1] == EOS for tokens in table["reference_response_token"])
    tokenizer = load_tokenizer(str(world / "sft"))
    texts = [tokenizer.decode(tokens[:-1]) for tokens in table["reference_response_token"]]
    assert table["reference_response"] == texts
    before = rows_of(world / "data", "sft_train")
    assert table["facts"] == [before["facts"][before["query_token"].index(q)] for q in table["query_token"]]
    assert result["prompts"]["selected"] == len(finished) == result["rows"]["sft_train"]
    assert any(not e for *_, ended in calls for e in ended)


def test_pairs_of_rso_and_the_split_by_gap(world, tmp_path):
    for select in ("rso", "gap"):
        result = sample.main(config_of(world, tmp_path / select, select=select))
        table = rows_of(tmp_path / select, "pairs_train")
        gaps = []
        for prompt, *pair in zip(table["query_token"], table["chosen_token"], table["rejected_token"]):
            better, worse = numbers(world, prompt, pair, "rm").tolist()
            gaps.append(better - worse)
        assert min(gaps) > (0.05 if select == "gap" else 0) - 1e-5
        assert result["rows"]["pairs_train"] == len(gaps)
    wide, narrow = set(map(tuple, table["query_token"])), rows_of(tmp_path / "gap", "sft_train")
    assert not wide & set(map(tuple, narrow["query_token"]))
    assert len(wide) + len(narrow["query_token"]) + result["prompts"].get("no response with EOS", 0) == 20
    before = rows_of(world / "data", "sft_train")
    human = dict(zip(before["query"], before["reference_response"]))
    assert all(human[q] == r for q, r in zip(narrow["query"], narrow["reference_response"]))


def test_the_training_scripts_read_what_was_written(world, tmp_path):
    sample.main(config_of(world, tmp_path / "best"))
    io = dict(model=str(world / "sft"), device="cpu", save_every=0, eval_rows=2)
    result = train_sft.main(train_sft.Config(
        **io, data_dir=str(tmp_path / "best"), out_dir=str(tmp_path / "sft"), batch_size=8
    ))
    assert math.isfinite(result["eval/loss"]) and "greedy/gold" in result
    sample.main(config_of(world, tmp_path / "rso", select="rso", scorer="gold"))
    result = train_simpo.main(train_simpo.Config(
        **io, data_dir=str(tmp_path / "rso"), out_dir=str(tmp_path / "hinge"), loss="hinge", batch_size=4
    ))
    assert math.isfinite(result["eval/loss"]) and "greedy/gold" in result
    for table in ("sft_validation", "pairs_validation", "rankings_train"):
        assert rows_of(tmp_path / "rso", table) == rows_of(world / "data", table)


@pytest.mark.parametrize("select", ["best", "rso"])
def test_killed_and_resumed_equals_uninterrupted(world, tmp_path, monkeypatch, select):
    class Killed(BaseException):
        pass

    cfg = config_of(world, tmp_path / "out", select=select)
    generate = sample.generate_all
    calls = Counter()

    def dies(*args, **options):
        calls["n"] += 1
        if calls["n"] == 3:
            raise Killed
        return generate(*args, **options)

    monkeypatch.setattr(sample, "generate_all", dies)
    with pytest.raises(Killed):
        sample.main(cfg)
    assert not (tmp_path / "out/meta.json").exists()
    with open(tmp_path / "out/parts.jsonl", "a") as file:
        file.write('{"sft": [], "counts": {}')  # what a kill in the middle of a line leaves
    with pytest.raises(UserError, match="exists: continue it with --resume"):
        sample.main(cfg)
    with pytest.raises(UserError, match="--k was 6, is 5"):
        sample.main(replace(cfg, resume=True, k=5))
    resumed = sample.main(replace(cfg, resume=True))
    assert calls["n"] == 3 + 2  # four calls in all: two were kept
    sample.main(replace(cfg, out_dir=str(tmp_path / "whole")))
    for table in ("sft_train", "pairs_train"):
        assert rows_of(tmp_path / "out", table) == rows_of(tmp_path / "whole", table)
    assert sample.main(replace(cfg, resume=True)) == json.loads(json.dumps(resumed))
    other = sample.main(replace(cfg, out_dir=str(tmp_path / "other"), seed=2))
    assert other["prompts"] and any(
        rows_of(tmp_path / "other", t) != rows_of(tmp_path / "whole", t) for t in ("sft_train", "pairs_train")
    )


@pytest.mark.parametrize("changes, message", [
    ({"k": 1, "select": "gap"}, "at least 2 responses"),
    ({"select": "rso", "accept": 7}, "--accept=7"),
    ({"reward_model": ""}, "what scores"),
    ({"beta": 0.0}, "--beta=0.0"),
    ({"select": "gap", "gap": 1e9}, "nothing was selected for pairs_train .*: change --gap"),
], ids=str)
def test_bad_options_are_named(world, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        sample.main(config_of(world, tmp_path / "out", **changes))


@pytest.mark.parametrize("name", ["data", "sft", "."])
def test_inputs_are_not_overwritten(world, name):
    before = sorted(world.rglob("*"))
    with pytest.raises(UserError, match="which is read"):
        sample.main(config_of(world, world / name, overwrite=True))
    assert sorted(world.rglob("*")) == before
