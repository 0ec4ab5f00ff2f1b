"""What a preference loss reads beside log-probs: from tables, from further forwards, from the best tokens;
and every loss through train_simpo.py, on a small toy world."""

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from util import WIDE, error, logits_of, pair, random_groups, raw_config

import train_sft
import train_simpo
from data import toy
from rlhf.config import UserError
from rlhf.forward import token_stats
from rlhf.groups import pack
from rlhf.logprobs import top_logprobs
from rlhf.losses import PREFERENCE_LOSSES, RANKED
from rlhf.preferences import competitors, model_extras, shown_logprobs, slices_of, top_tokens

M, C, V = 23, 20, 301


# --- the best tokens of a position, in chunks


def head_inputs():
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, C, generator=g).mul_(0.5).requires_grad_() for n in (M, V))
    return hidden, weight, torch.randint(V, (M,), generator=g)


@pytest.mark.parametrize("chunk", [1, 7, None])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_top_logprobs_and_their_gradient(temperature, chunk):
    """Against the (M, V) matrix in float64, with the target's log-prob and the entropy in the same loss."""
    hidden, weight, targets = head_inputs()
    logprobs, entropy, top, which = top_logprobs(hidden, weight, targets, 4, temperature, chunk)
    logp = (hidden.double() @ weight.double().T / temperature).log_softmax(-1)  # (M, V)
    plain, plain_which = logp.topk(4)
    assert torch.equal(which, plain_which)
    assert error(top.double(), plain) < 1e-5
    upstream = torch.randn(M, 4, generator=torch.Generator().manual_seed(1))
    entropies = -(logp.exp() * logp).sum(-1)
    expected = (plain * upstream).sum() + logp.gather(1, targets[:, None]).sum() - 0.3 * entropies.sum()
    actual = (top * upstream).sum() + logprobs.sum() - 0.3 * entropy.sum()
    twin = (top * upstream.flip(1)).sum() + logprobs.sum() - 0.3 * entropy.sum()
    for inputs in (hidden, weight):
        found, right, wrong = (
            torch.autograd.grad(x, inputs, retain_graph=True)[0] for x in (actual, expected, twin))
        assert error(found, right) < 1e-5 and error(wrong, right) > WIDE


def test_mass_and_entropy_of_the_best_tokens():
    """A uniform distribution over 50 tokens: the best 10 have mass 0.2 and entropy log 10."""
    mask = torch.tensor([[[True, True], [True, False]]])
    top = torch.full((1, 2, 2, 10), 1 / 50).log()
    top[0, 1, 1] = math.nan
    found = top_tokens(top, mask)
    assert found["top_mass"].tolist() == [pytest.approx([0.2, 0.2])]
    assert found["top_entropy"].tolist() == [pytest.approx([2.302585, 2.302585], abs=1e-6)]
    sharper = top_tokens(top + torch.arange(10) / 10, mask)
    assert (sharper["top_entropy"] < 2.3).all() and (sharper["top_mass"] > 0.2).all()


# --- further forwards, against one sequence at a time


@pytest.fixture(scope="module")
def models():
    """Policy and reference, random and different."""
    return pair(raw_config())[0], pair(raw_config(), seed=1)[0].requires_grad_(False)


def sequence_logp(model, prompt, response):
    """log-probs of all next tokens at the positions of a response, (R, V), by a forward of its own."""
    return logits_of(model, prompt + response)[len(prompt) - 1 : -1].log_softmax(-1)


def sequence_logprob(model, prompt, response):
    return sequence_logp(model, prompt, response).gather(1, torch.tensor(response)[:, None]).sum()


def pack_rows(prompts, responses):
    return pack(prompts, responses, max_positions=128)


def test_extras_that_models_compute(models):
    policy, reference = models
    prompts, responses = random_groups([[3, 6], [5, 1], [4, 7]], ended=True)
    sft_prompts, sft_responses = random_groups([[5], [3], [8]], seed=3)
    again = [7, 9]
    batch = {"prompts": prompts, "responses": responses, "other_prompts": sft_prompts,
             "other_responses": [row[0] for row in sft_responses]}
    stats = token_stats(policy, pack_rows(prompts, responses), top_k=3)
    reads = {"competitors", "target", "calibration", "improved"}
    out = model_extras(reads, batch, stats, policy, reference, pack_rows, again=again, top_k=2)
    for n, (prompt, answers) in enumerate(zip(prompts, responses)):
        sft = sft_prompts[n], sft_responses[n][0]
        target = sequence_logprob(policy, *sft)
        torch.testing.assert_close(out["target"][n], target, rtol=1e-4, atol=1e-4)
        calibration = target - sequence_logprob(reference, *sft)
        torch.testing.assert_close(out["calibration"][n], calibration, rtol=1e-4, atol=1e-4)
        for i, shown in enumerate(answers):
            assert shown[-1] == 0  # its EOS is not shown
            given = [prompt + shown[:-1] + again, answers[1 - i]]
            ratio = sequence_logprob(policy, *given) - sequence_logprob(reference, *given)
            torch.testing.assert_close(out["improved"][n, i, 1 - i], ratio, rtol=1e-4, atol=1e-4)
            assert (out["improved"][n, 1 - i, i] - ratio).abs() > WIDE
        logp = sequence_logp(policy, prompt, answers[1])  # (R, V)
        others = logp.scatter(1, torch.tensor(answers[1])[:, None], -math.inf).topk(2).values
        torch.testing.assert_close(out["competitors"][n, : len(answers[1])], others, rtol=1e-4, atol=1e-4)
    assert all(tensor.requires_grad for tensor in out.values())
    assert model_extras(set(), batch, stats, policy, reference, pack_rows, again=again, top_k=2) == {}
    assert not shown_logprobs(reference, batch, again, pack_rows).requires_grad


def test_a_competitor_is_never_the_token_itself(models):
    """Where the response is the model's own best token, the competitor is the second best."""
    policy = models[0]
    prompt = random_groups([[1]])[0][0]
    logp = logits_of(policy, prompt)[-1].log_softmax(-1)
    best, second = logp.topk(2).indices.tolist()
    for token, other in ((best, second), (second, best)):
        stats = token_stats(policy, pack_rows([prompt], [[[token], [token]]]), top_k=2)
        torch.testing.assert_close(competitors(stats, 1)[0, 0, 0, 0], logp[other], rtol=1e-4, atol=1e-4)


# --- train_simpo.py


def change(path: Path, **columns) -> None:
    """Adds or replaces columns of a table."""
    table = pq.read_table(path)
    for name, values in columns.items():
        if name in table.column_names:
            table = table.drop([name])
        table = table.append_column(name, pa.array(values))
    pq.write_table(table, path)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A toy world with every column that a loss reads, at random, and an SFT model."""
    out = tmp_path_factory.mktemp("preferences")
    sizes = dict(posts=32, pairs=24, rankings=16, validation=6, test=1, size="small")
    toy.main(toy.Config(out_dir=str(out / "data"), **sizes))
    rng = random.Random(0)
    for name, rows in (("pairs_train", 24), ("pairs_validation", 6)):
        labels = [rng.random() for _ in range(rows)]
        chosen, rejected = (
            [{part: rng.choice([0.0, 0.2, 0.5]) for part in "abc"} for _ in range(rows)] for _ in range(2))
        path = out / f"data/{name}.parquet"
        change(path, preference=labels, chosen_parts=chosen, rejected_parts=rejected)
    change(out / "data/rankings_train.parquet", rewards=[[rng.random() for _ in range(4)] for _ in range(16)])
    train_sft.main(train_sft.Config(
        data_dir=str(out / "data"), device="cpu", model=str(out / "data/base"), init="scratch",
        out_dir=str(out / "sft"), lr=3e-3, batch_size=16, eval_rows=2, save_every=0))
    return out


def config(world: Path, out: Path, **changes) -> train_simpo.Config:
    cfg = train_simpo.Config(
        data_dir=str(world / "data"), model=str(world / "sft"), out_dir=str(out), device="cpu", lr=1e-3,
        batch_size=8, train_rows=16, eval_rows=4, save_every=0, adam_eps=1.0)
    return replace(cfg, **changes)


def train(world: Path, out: Path, **changes) -> tuple[list[dict], dict, dict]:
    """(lines of metrics.jsonl, the result, the weights)"""
    result = train_simpo.main(config(world, out, **changes))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return lines, result, load_file(out / "model.safetensors")


def distance(a: dict, b: dict) -> float:
    return max((a[k] - b[k]).abs().max().item() for k in a)


# the loss of a policy that still is its reference
AT_THE_START = dict.fromkeys(("dpo", "dpo_length", "osp", "vpo", "chipo", "gammapo_dpo"), math.log(2))
AT_THE_START |= {"hinge": 1.0, "ipo": 100.0, "ipo_length": 25.0, "srpo": 0.5 * 1 + 0.5 * 0.25}
MADE_BY_THE_SCRIPT = {"slic", "gammapo", "gammapo_dpo", "amopo", "cringe", "osp", "vpo", "srpo", "rrhf"}


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_every_loss_trains(world, tmp_path, name):
    """What it should log, the value where that is known, and the same in micro-batches of a group each."""
    lines, result, weights = train(world, tmp_path / "run", loss=name)
    assert len(lines) == 2
    assert all(math.isfinite(value) for value in [*lines[0].values(), result["eval/loss"]])
    if name in AT_THE_START:
        assert lines[0]["loss"] == pytest.approx(AT_THE_START[name], rel=1e-4)
    assert {"accuracies", "accuracies/logps", "accuracies/mean_logps", "margins", "rewards/chosen",
            "logps/chosen", "mean_logps/rejected"} <= lines[0].keys()
    assert 0 < result["eval/top_mass/chosen"] <= 1
    assert 0 < result["eval/top_entropy/rejected"] <= math.log(10)
    if name in MADE_BY_THE_SCRIPT:
        small, small_result, small_weights = train(world, tmp_path / "small", loss=name, micro_batch_tokens=1)
        for a, b in zip(lines, small):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert result["eval/loss"] == pytest.approx(small_result["eval/loss"], rel=1e-4)
        assert distance(weights, small_weights) < 1e-5


def test_columns_and_options_reach_the_loss(world, tmp_path):
    """Soft labels of 1 are DPO, the order as the ranking is what rewards say; others are another loss."""
    data = tmp_path / "data"
    shutil.copytree(world / "data", data)
    runs = iter(range(100))

    def weights(**changes):
        return train(world, tmp_path / str(next(runs)), data_dir=str(data), **changes)[2]

    dpo, osp = (weights(loss=name, beta=0.1) for name in ("dpo", "osp"))
    assert distance(dpo, osp) > 1e-5
    change(data / "pairs_train.parquet", preference=[1.0] * 24)
    assert distance(dpo, weights(loss="osp", beta=0.1)) < 1e-7
    rrhf = weights(loss="rrhf")
    change(data / "rankings_train.parquet", rewards=[[3.0, 2.0, 1.0, 0.0]] * 16)
    assert distance(rrhf, weights(loss="rrhf")) > 1e-5
    amopo = weights(loss="amopo")
    change(data / "pairs_train.parquet", chosen_parts=[{"a": 1.0}] * 24, rejected_parts=[{"a": 0.5}] * 24)
    assert distance(amopo, weights(loss="amopo")) > 1e-5
    assert distance(weights(loss="simpo", beta=0.8, gamma=2.0), weights(loss="amopo")) < 1e-7
    vpo = [weights(loss="vpo", calibration=name) for name in ("chosen", "reference", "sample", "sample")]
    assert distance(vpo[0], vpo[1]) > 1e-6 and distance(vpo[1], vpo[2]) > 1e-6
    assert distance(vpo[2], vpo[3]) == 0  # the samples follow the step and the seed
    assert distance(weights(loss="cringe"), weights(loss="cringe", top_k=3)) > 1e-6
    assert distance(weights(loss="slic"), weights(loss="slic", sft_coef=0.0)) > 1e-5
    assert distance(weights(loss="gammapo", gamma_beta_ratio=0.2), weights(loss="gammapo", gamma=2.0)) == 0


def test_noise_follows_the_step_and_the_seed(world, tmp_path):
    """So that a run that was killed goes on as if it had not been. All seeds have the one batch."""
    first, second, other = (
        train(world, tmp_path / str(i), loss="amopo", seed=seed, batch_size=16)[0][0]["loss"]
        for i, seed in enumerate((1, 1, 2)))
    assert first == second and abs(first - other) > 1e-5  # rounding alone: equal to the last bit


def test_micro_batches_count_the_further_groups():
    """A pair of SRPO holds both answers again behind two longer prompts; VPO's one response more."""
    prompts, responses = random_groups([[3, 6], [5, 1], [4, 7], [2, 2]], ended=True)
    batch = {"prompts": prompts, "responses": responses}
    again = [7, 9]
    other = {"other_prompts": prompts[::-1], "other_responses": [row[0] for row in responses]}

    def rows_of_pairs(pairs, reads):
        """Tokens that `pack` puts into rows for these pairs."""
        tokens = 0
        for n in pairs:
            tokens += len(prompts[n]) + sum(map(len, responses[n]))
            for shown in responses[n] if "improved" in reads else []:
                tokens += len(prompts[n]) + len(shown) - 1 + len(again) + sum(map(len, responses[n]))
            if "calibration" in reads:
                tokens += len(other["other_prompts"][n]) + len(responses[n][0])
        return tokens

    for reads in (set(), {"improved"}, {"calibration"}):
        given = batch | (other if "calibration" in reads else {})
        two = max(rows_of_pairs(pair, reads) for pair in ((0, 1), (2, 3)))
        parts = slices_of(given, two, reads, again)
        assert parts == [slice(0, 2), slice(2, 4)]
        assert len(slices_of(given, rows_of_pairs((0, 1), reads) - 1, reads, again)) > 2


def test_a_sample_of_the_policy_calibrates_nothing_in_the_mean(models):
    """E[grad log pi(y)] = 0 for y from pi: over all responses of one token, weighed by their probability."""
    policy = models[0]
    prompt = random_groups([[1]])[0][0]
    logp = logits_of(policy, prompt)[-1].log_softmax(-1)  # (V,)
    weight = policy.embed_out.weight
    mean = torch.autograd.grad((logp.detach().exp() * logp).sum(), weight, retain_graph=True)[0]
    uniform = torch.autograd.grad(logp.mean(), weight)[0]
    assert mean.abs().max() < 1e-5 and uniform.abs().max() > 1e-3


# --- bad input


@pytest.mark.parametrize("name, table, column", [
    ("osp", "pairs_train", "preference"), ("osp", "pairs_validation", "preference"),
    ("rrhf", "rankings_train", "rewards"), ("amopo", "pairs_train", "rejected_parts")])
def test_a_missing_column_is_named(world, tmp_path, name, table, column):
    shutil.copytree(world / "data", tmp_path / "data")
    path = tmp_path / f"data/{table}.parquet"
    pq.write_table(pq.read_table(path).drop([column]), path)
    said = f"{table}.parquet has no column {column}, which --loss={name} reads: .*toy.py"
    with pytest.raises(UserError, match=said):
        train(world, tmp_path / "run", data_dir=str(tmp_path / "data"), loss=name)
    assert not (tmp_path / "run").exists()


def test_bad_values_are_named(world, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(world / "data", data)
    change(data / "pairs_train.parquet", preference=[0.5, 1.2] + [0.5] * 22)
    with pytest.raises(UserError, match="the preference of row 1 is 1.2; it is a probability, from 0 to 1"):
        train(world, tmp_path / "run", data_dir=str(data), loss="osp")
    (data / "pairs_train.parquet").unlink()
    said = "--loss=dpo compares two responses; rankings are for --loss=rrhf and --loss=simpo_pl"
    with pytest.raises(UserError, match=said):
        train(world, tmp_path / "run", data_dir=str(data), loss="dpo")
    rankings = data / "rankings_train.parquet"
    change(rankings, rewards=[[1.0, 2.0]] * 16)
    with pytest.raises(UserError, match="the rewards of row 0 are \\[1.0, 2.0\\]; expected 4 numbers"):
        train(world, tmp_path / "run", data_dir=str(data), loss="rrhf")
    responses = pq.read_table(rankings)["responses_token"].to_pylist()
    change(rankings, rewards=[[0.0] * 4, [0.0] * 3, *[[0.0] * 4] * 14],
           responses_token=[responses[0], responses[1][:3], *responses[2:]])
    for name in RANKED:
        with pytest.raises(UserError, match="row 1 has 3 responses, the first row 4; every row"):
            train(world, tmp_path / "run", data_dir=str(data), loss=name)


@pytest.mark.parametrize("changes, message", [
    (dict(loss="dpo", delta=1.0), "--delta: the loss dpo has none; these have it: slic"),
    (dict(loss="simpo", top_k=2), "--top_k: the loss simpo has none; these have it: cringe"),
    (dict(loss="simpo", calibration="reference"), "--calibration: the loss simpo has none; vpo has it"),
    (dict(loss="cringe", gamma_beta_ratio=0.5), "--gamma_beta_ratio: the loss cringe has no beta"),
    (dict(loss="ipo", gamma_beta_ratio=0.5), "--gamma: the loss ipo has none"),
])
def test_options_of_other_losses_are_named(world, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(world, tmp_path / "run", **changes)
