"""Online preference learning: expected gradients, every pair of responses being listed, and one update of the
script beside the same update of train_simpo.py and of TRL's trainer."""

import itertools
import json
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from enumeration import Responses
from loss_batches import A_REF, A, padded
from safetensors.torch import load_file

import train_online
import train_simpo
from data import toy
from rlhf.compare import ONLINE_LOSSES, compare, equal_scores, nash_md, pair_losses
from rlhf.compare import soft_ipo as ipo
from rlhf.config import UserError
from rlhf.forward import TokenStats, response_scores
from rlhf.groups import pack
from rlhf.masked import seq_logprobs
from rlhf.model import NeoX, NeoXConfig
from rlhf.pretrained import from_pretrained, load_tokenizer, read_json, save_pretrained

torch.set_num_threads(1)
Y = Responses(vocab=3, length=3)  # 15 responses of 1 to 3 tokens
PAIRS = torch.tensor(list(itertools.product(range(Y.count), repeat=2)))  # all ordered pairs, (Y^2, 2)
TAU = 0.3


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SCORES = 2 * normal(Y.count, seed=0)
POLICY = normal(Y.prefixes, Y.vocab, seed=1)
REF = normal(Y.prefixes, Y.vocab, seed=2)
WINS = torch.sigmoid(SCORES[:, None] - SCORES)  # (Y, Y): P(row > column)


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=atol)


def log_pi(logits):
    """log pi of all responses, (Y,)."""
    return seq_logprobs(Y.logprobs(logits), Y.mask)[0]


def mixture(c):
    """Logits of the geometric mixture of policy and reference."""
    return (1 - c) * POLICY + c * REF


def gradient(value, logits):
    return torch.autograd.grad(value, logits)[0]


def expected(loss_fn, options, label, first, second):
    """Expected gradient of the loss in the policy's logits, over y ~ first and y' ~ second (logits each)."""
    logits = POLICY.clone().requires_grad_()
    logprobs = Y.logprobs(logits)[0][PAIRS]  # (Y^2, 2, R)
    stats = TokenStats(logprobs, logprobs, Y.logprobs(REF)[0][PAIRS])
    weight = (log_pi(first)[PAIRS[:, 0]] + log_pi(second)[PAIRS[:, 1]]).exp()
    compared = compare(SCORES[PAIRS], label, torch.zeros(len(PAIRS)))
    losses, _ = pair_losses(loss_fn, options, stats, Y.mask[0][PAIRS], compared)
    return gradient((weight * torch.where(compared.kept, losses, 0)).sum(), logits)


def game(beta, opponent):
    """Exact gradient of P(pi > opponent) - beta KL(pi || pi_ref), the opponent being a constant."""
    logits = POLICY.clone().requires_grad_()
    logp = log_pi(logits)
    value = logp.exp() @ WINS @ log_pi(opponent).exp()
    return gradient(value - beta * (logp.exp() * (logp - log_pi(REF))).sum(), logits)


# --- expected gradients


def test_online_ipo_climbs_the_game_against_itself():
    """-(4 / tau) x the gradient of E[P(y > y')] - tau KL, y' from a frozen copy of the policy. With the
    higher score winning for sure it is another game; with a winner drawn by P it is the same one."""
    options = {"beta": TAU}
    exact = -4 / TAU * game(TAU, POLICY)
    found = expected(ipo, options, "soft", POLICY, POLICY)
    close(found, exact)
    assert (expected(ipo, options, "hard", POLICY, POLICY) - exact).abs().max() > 0.01
    logits = POLICY.clone().requires_grad_()
    won = expected_over_coins(logits, options)
    close(won, exact)


def expected_over_coins(logits, options):
    """Label "sampled": the two outcomes of every coin, each with its probability."""
    total = torch.zeros_like(POLICY)
    logprobs = Y.logprobs(logits)[0][PAIRS]
    stats = TokenStats(logprobs, logprobs, Y.logprobs(REF)[0][PAIRS])
    weight = log_pi(POLICY)[PAIRS].sum(1).exp()
    wins = WINS[PAIRS[:, 0], PAIRS[:, 1]]
    for coin, chance in ((0.0, wins), (1.0, 1 - wins)):
        compared = compare(SCORES[PAIRS], "sampled", torch.full((len(PAIRS),), coin))
        losses, _ = pair_losses(ipo, options, stats, Y.mask[0][PAIRS], compared)
        total += torch.autograd.grad((weight * chance * losses).sum(), logits, retain_graph=True)[0]
    return total


def test_ipo_md_between_its_ends():
    """Both samples from the mixture: c = 0 is online IPO, c = 1 samples the reference, and between is
    neither."""
    options = {"beta": TAU}
    ends = [expected(ipo, options, "soft", x, x) for x in (POLICY, REF)]
    for c, end in zip((0.0, 1.0), ends):
        close(expected(ipo, options, "soft", mixture(c), mixture(c)), end)
    between = expected(ipo, options, "soft", mixture(0.125), mixture(0.125))
    assert all((between - end).abs().max() > 0.01 for end in ends)


def test_nash_md_climbs_the_game_against_the_mixture_with_the_exact_kl():
    """TRL's weight, each token's own log-ratio in place of the response's, is off."""
    beta = 0.4
    opponent = mixture(0.5)
    exact = -game(beta, opponent)
    close(expected(nash_md, {"beta": beta}, "soft", POLICY, opponent), exact)

    def token_by_token(logprobs, ref_logprobs, mask, *, beta, labels):
        own = torch.where(mask, logprobs, 0)[:, 0]
        ratios = torch.where(mask, logprobs - ref_logprobs, 0)[:, 0]
        return -(labels - 0.5) * own.sum(-1) + beta * (ratios.detach() * own).sum(-1), None

    biased = expected(token_by_token, {"beta": beta}, "soft", POLICY, opponent)
    assert (biased - exact).abs().max() > 0.01


def test_the_fixed_point_of_online_dpo_is_the_kl_constrained_optimum():
    """pi = pi_ref exp(r / beta) / Z has no expected gradient under sampled labels, whoever samples."""
    beta = 0.7
    optimum = Y.logits_of((log_pi(REF) + SCORES / beta).softmax(0))

    def at(logits):
        logprobs = Y.logprobs(logits)[0][PAIRS]
        stats = TokenStats(logprobs, logprobs, Y.logprobs(REF)[0][PAIRS])
        weight = log_pi(mixture(0.3))[PAIRS].sum(1).exp()
        total = 0.0
        for coin in (0.0, 1.0):
            compared = compare(SCORES[PAIRS], "sampled", torch.full((len(PAIRS),), coin))
            chance = WINS[PAIRS[:, 0], PAIRS[:, 1]] if coin == 0 else WINS[PAIRS[:, 1], PAIRS[:, 0]]
            losses, _ = pair_losses(ONLINE_LOSSES["dpo"], {"beta": beta}, stats, Y.mask[0][PAIRS], compared)
            total = total + (weight * chance * losses).sum()
        return gradient(total, logits)

    close(at(optimum.clone().requires_grad_()), torch.zeros_like(POLICY))
    assert at(POLICY.clone().requires_grad_()).abs().max() > 0.01


# --- by hand


def test_comparisons_by_hand():
    coins = torch.tensor([0.5, 0.5, 0.5])
    pairs = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    hard = compare(pairs, "hard", coins)
    assert hard.order.tolist() == [[0, 1], [1, 0], [0, 1]] and hard.kept.tolist() == [True, True, False]
    assert hard.labels is None
    soft = compare(pairs, "soft", coins)
    assert soft.order.tolist() == [[0, 1]] * 3 and soft.kept.all()
    close(soft.labels, [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2)), 0.5], atol=1e-6)
    upset = compare(pairs, "sampled", torch.tensor([0.9, 0.1, 0.5]))  # sigmoid(2) = 0.88
    assert upset.order.tolist() == [[1, 0], [0, 1], [1, 0]] and upset.kept.all() and upset.labels is None
    many = torch.tensor([[1.0, 3.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    assert compare(many, "hard", coins[:2]).order[0].tolist() == [1, 2]
    assert compare(many, "hard", coins[:2]).kept.tolist() == [True, False]
    ranked = compare(many, "hard", coins[:2], ranked=True)
    assert ranked.order[0].tolist() == [1, 3, 0, 2] and ranked.kept.tolist() == [True, False]


def test_equal_responses_have_equal_scores():
    scores = torch.tensor([[0.1, 0.3, 0.1000001]])
    assert equal_scores(scores, [[[5, 0], [6, 0], [5, 0]]]).equal(scores[:, [0, 1, 0]])
    assert equal_scores(scores, [[[5, 0], [6, 0], [7, 0]]]).equal(scores)


def learnt(columns, reference, scores, k, **options):
    """Losses (N,) of `learn` on given log-probs, ragged (N, K)."""
    cfg = train_online.Config(data_dir="", model="", reward_model="rm", out_dir="", k=k, **options)
    cfg, options = train_online.with_options(cfg)
    logprobs, mask = padded(columns)
    stats = TokenStats(logprobs.requires_grad_(), logprobs, padded(reference)[0])
    scores = torch.tensor(scores)
    compared = compare(scores, cfg.label, torch.zeros(len(scores)))
    return train_online.learn(cfg, options, stats, mask, scores, compared, len(scores))["loss"]


def test_xpo_by_hand():
    """Reference's sample: the rejected one of pair 0, the chosen one of pair 1. The loss has the log-ratio
    where XPO's text has log pi: they differ by a constant."""
    columns = [A[0], A[1][::-1]]
    reference = [A_REF[0], A_REF[1][::-1]]
    losses = learnt(columns, reference, [[1.0, 0.0], [0.0, 1.0]], 2, beta=0.1, explore=1e-5)
    ref_sample = torch.tensor([-3.5, -2.0])
    assert (losses + 1e-5 * ref_sample).mean().item() == pytest.approx(0.684413, abs=1e-6)
    without = learnt(columns, reference, [[1.0, 0.0], [0.0, 1.0]], 2, beta=0.1)
    assert without.mean().item() == pytest.approx(0.684447, abs=1e-6)


def test_selm_by_hand():
    """k = 1 and the data's pair: the sample, with a log-ratio of +0.5 and -0.5, is neither best nor worst."""
    columns = [[[-1.0, -0.5], *A[0]], [[-1.0, -1.5], *A[1]]]
    reference = [[[-1.0, -1.0], *A_REF[0]], [[-1.0, -1.0], *A_REF[1]]]
    scores = [[0.0, 1.0, -1.0]] * 2
    losses = learnt(columns, reference, scores, 1, data_pair=True, beta=0.01, explore=0.01 * 0.001)
    assert losses.tolist() == pytest.approx([0.687170, 0.697150], abs=1e-6)


def test_soft_labels_of_ipo():
    """(h - (P - 1/2) / tau)^2; P = 1 and no label are the offline loss; P = 1/2 aims at no margin."""
    logprobs, mask = padded(A)
    ref = padded(A_REF)[0]
    offline = ipo(logprobs, ref, mask, beta=0.1)[0]
    close(ipo(logprobs, ref, mask, beta=0.1, labels=torch.ones(2))[0], offline)
    close(ipo(logprobs, ref, mask, beta=0.1, labels=0.5)[0], [1.2**2, 0.8**2], atol=1e-9)
    close(ipo(logprobs, ref, mask, beta=0.1, labels=torch.tensor([0.8, 0.2]))[0], [1.8**2, 2.2**2], atol=1e-6)


# --- beside TRL


@pytest.mark.parametrize("loss, theirs", [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_online_dpo_of_trl_has_the_same_loss_and_gradient(loss, theirs):
    """TRL 1.16, experimental OnlineDPOTrainer.training_step on given samples, log-probs and rewards. It
    learns from ties, the first response being chosen; here they are dropped, so this batch has none. (XPO and
    Nash-MD are no longer part of TRL.)"""
    trl = pytest.importorskip("trl.experimental.online_dpo", reason="trl is not installed")
    N, R = 5, 6
    g = torch.Generator().manual_seed(3)
    mask = torch.arange(R) < torch.randint(1, R + 1, (N, 2, 1), generator=g)
    logprobs = (-torch.rand(N, 2, R, generator=g, dtype=torch.float64)).requires_grad_()
    ref = -torch.rand(N, 2, R, generator=g, dtype=torch.float64)
    scores = torch.randn(N, 2, generator=g)
    # theirs: all first responses, then all second ones
    halves = [x.transpose(0, 1).flatten(0, 1) for x in (mask, logprobs, ref, scores)]
    keep, policy, reference, rewards = halves
    ids = keep.long() + 1
    backward = []
    accelerator = SimpleNamespace(gather_for_metrics=lambda x: x, backward=lambda x, **_: backward.append(x))
    own = SimpleNamespace(
        args=SimpleNamespace(
            use_vllm=False,
            missing_eos_penalty=None,
            loss_type=theirs,
            n_gpu=1,
            optim="adamw",
            torch_empty_cache_steps=None,
            gradient_accumulation_steps=1,
        ),
        _generate=lambda *a: (ids, ids, ids, keep.long(), None),
        eos_token_ids=[0],
        ref_model="reference",
        _forward=lambda model, *a: reference if model == "reference" else policy,
        processing_class=SimpleNamespace(batch_decode=lambda x, **_: ["text"] * len(x)),
        _calculate_rewards_from_functions=lambda **_: rewards,
        reward_funcs=[1],
        beta=0.1,
        accelerator=accelerator,
        stats=defaultdict(list),
        state=SimpleNamespace(global_step=1),
    )
    model = SimpleNamespace(train=lambda: None)
    trl.OnlineDPOTrainer.training_step(own, model, {"prompt": ["post"] * N})

    def ours(scores):
        compared = compare(scores, "hard", torch.zeros(N))
        stats = TokenStats(logprobs, logprobs, ref)
        return pair_losses(ONLINE_LOSSES[loss], {"beta": 0.1}, stats, mask, compared)[0].mean()

    close(ours(scores), backward[0].detach())
    close(gradient(ours(scores), logprobs), gradient(backward[0], logprobs))
    assert (ours(-scores) - backward[0]).abs() > 0.01


# --- the script


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A toy world with random models: the policy, a reward model."""
    out = tmp_path_factory.mktemp("online")
    sizes = dict(posts=16, pairs=16, rankings=1, validation=2, test=1)
    toy.main(toy.Config(out_dir=str(out / "data"), **sizes, size="small"))
    config = NeoXConfig.from_dict(read_json(out / "data/base/config.json"))
    tokenizer = load_tokenizer(str(out / "data/base"))
    for seed, (name, head) in enumerate((("sft", "embed_out"), ("rm", "score"))):
        model = NeoX(config, head).init_weights(seed)
        save_pretrained(model, tokenizer, out / name)
    return out


def config_of(world, out_dir, **changes):
    io = dict(data_dir=str(world / "data"), model=str(world / "sft"), reward_model=str(world / "rm"))
    sizes = dict(device="cpu", batch_size=32, episodes=32, response_tokens=6, eval_rows=2, save_every=0,
                 samples_every=0)
    algorithm = dict(lr=0.1, adam_eps=1.0, temperature=1.0, missing_eos="none")
    return train_online.Config(**{**io, **sizes, **algorithm, "out_dir": str(out_dir), **changes})


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def distance(a, b) -> float:
    x, y = (load_file(Path(run) / "model.safetensors") for run in (a, b))
    return max((x[k] - y[k]).abs().max().item() for k in x)


def spied(monkeypatch):
    """What every call of the sampler in a training loop was given and returned."""
    calls = []
    generate_all = train_online.generate_all

    def spy(model, prompts, K, max_new_tokens, **options):
        weights = model.gpt_neox.final_layer_norm.weight.detach().clone()
        responses, ended = generate_all(model, prompts, K, max_new_tokens, **options)
        calls.append({"weights": weights, "prompts": prompts, "responses": responses, "K": K, **options})
        return responses, ended

    monkeypatch.setattr(train_online, "generate_all", spy)
    return calls


def scored(world, prompts, responses):
    model = from_pretrained(str(world / "rm"), head="score")
    with torch.no_grad():
        return response_scores(model, pack(prompts, responses, max_positions=256))


@pytest.mark.parametrize("loss, k", [("dpo", 2), ("dpo", 4), ("simpo", 2)])
def test_one_online_update_is_one_offline_update_on_the_same_strings(world, tmp_path, monkeypatch, loss, k):
    """The samples, written down as pairs by the reward model's scores (best and worst of k), and
    train_simpo.py on them. Turned around, another update."""
    calls = spied(monkeypatch)
    size = 16 * k
    train_online.main(config_of(world, tmp_path / "online", loss=loss, k=k, batch_size=size, episodes=size))
    prompts, responses = calls[0]["prompts"], calls[0]["responses"]
    scores = scored(world, prompts, responses)
    rows = [
        {"query_token": p, "chosen_token": r[s.argmax()], "rejected_token": r[s.argmin()]}
        for p, r, s in zip(prompts, responses, scores)
        if r[s.argmax()] != r[s.argmin()]
    ]
    assert lines(tmp_path / "online")[0]["tie_share"] == pytest.approx(1 - len(rows) / 16)
    for name, sides in (("same", ("chosen", "rejected")), ("turned", ("rejected", "chosen"))):
        data = tmp_path / f"data_{name}"
        data.mkdir()
        for file in (world / "data").iterdir():
            if file.is_file() and file.name != "pairs_train.parquet":
                (data / file.name).write_bytes(file.read_bytes())
        table = {"query_token": [row["query_token"] for row in rows]}
        for column, side in zip(("chosen", "rejected"), sides):
            table[f"{column}_token"] = [row[f"{side}_token"] for row in rows]
        pq.write_table(pa.table(table), data / "pairs_train.parquet")
        train_simpo.main(
            train_simpo.Config(
                data_dir=str(data),
                model=str(world / "sft"),
                out_dir=str(tmp_path / name),
                loss=loss,
                device="cpu",
                batch_size=len(rows),
                lr=0.1,
                adam_eps=1.0,
                eval_rows=2,
                save_every=0,
            )
        )
    assert distance(tmp_path / "online", tmp_path / "same") < 2e-6
    moved = distance(tmp_path / "online", world / "sft")
    assert moved > 1e-4 and distance(tmp_path / "online", tmp_path / "turned") > moved


def test_who_samples(world, tmp_path, monkeypatch):
    """The opponent draws the last half from its own mixture; nothing else asks for a second sampler."""
    calls = spied(monkeypatch)
    options = dict(k=4, mixture=0.25, opponent=1.0, episodes=64)
    train_online.main(config_of(world, tmp_path / "run", **options))
    assert [(c["K"], c["mixture"]) for c in calls[:2]] == [(2, 0.25), (2, 1.0)]
    calls.clear()
    train_online.main(config_of(world, tmp_path / "plain", k=4, mixture=0.25, episodes=32))
    drawn = [(c["K"], c.get("mixture")) for c in calls]
    assert drawn == [(4, 0.25), (1, None)]  # the last are the greedy ones at the end


@pytest.mark.parametrize("rounds, moved", [(0, [False, True, True, True]), (2, [False, False, True, False])])
def test_the_sampler_of_a_round_stays_as_it_was_at_its_start(world, tmp_path, monkeypatch, rounds, moved):
    """moved: does update n sample from other weights than update n - 1?"""
    calls = spied(monkeypatch)
    train_online.main(config_of(world, tmp_path / "run", round_updates=rounds, episodes=128))
    weights = [call["weights"] for call in calls[:4]]
    assert [not a.equal(b) for a, b in zip([weights[0], *weights], weights)] == moved
    assert (tmp_path / "run/rounds").exists() == bool(rounds)


@pytest.mark.parametrize("move", [True, False])
def test_the_reference_moves_with_the_round_or_stays(world, tmp_path, move):
    train_online.main(config_of(world, tmp_path / "run", round_updates=2, move_reference=move, episodes=128))
    assert [line["kl_full"] < 1e-6 for line in lines(tmp_path / "run")] == [True, False, move, False]


def test_only_ties_is_no_update_and_is_said(world, tmp_path):
    """One token of response at nearly no temperature: all samples of a prompt are equal."""
    options = dict(response_tokens=1, temperature=1e-4)
    train_online.main(config_of(world, tmp_path / "run", **options))
    (line,) = lines(tmp_path / "run")
    assert line["tie_share"] == 1 and "loss" not in line and distance(tmp_path / "run", world / "sft") == 0


METHODS = [line for line in train_online.METHODS.splitlines() if "--loss=" in line]


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.split("--")[0].strip())
def test_every_named_method_runs_as_documented(world, tmp_path, row):
    options = dict(part[2:].partition("=")[::2] for part in row.split() if part.startswith("--"))
    kinds = {
        "loss": str,
        "label": str,
        "k": int,
        "epochs": int,
        "data_pair": bool,
        "move_reference": bool,
        "round_updates": lambda _: 1,
    }
    changes = {name: kinds.get(name, float)(value or 1) for name, value in options.items()}
    k = changes.get("k", 2)
    train_online.main(config_of(world, tmp_path / "run", **changes, batch_size=8 * k, episodes=16 * k))
    assert all(math.isfinite(value) for line in lines(tmp_path / "run") for value in line.values())
    assert ["loss" in line for line in lines(tmp_path / "run")] == [True, True]


@pytest.mark.parametrize("scorer", ["rm", "gold"])
@pytest.mark.parametrize("loss", ["simpo_pl", "rrhf"])
def test_the_true_reward_compares_and_rankings_are_learnt_from(world, tmp_path, loss, scorer):
    train_online.main(config_of(world, tmp_path / "run", loss=loss, k=4, scorer=scorer))
    (line,) = lines(tmp_path / "run")
    assert (line["gold"] == pytest.approx(line["scores"], abs=1e-6)) == (scorer == "gold")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"k": 1}, "a comparison needs 2 responses"),
        ({"k": 3, "opponent": 0.5, "batch_size": 30}, "must be even"),
        ({"mixture": 1.5}, "--mixture=1.5"),
        ({"opponent": -0.1}, "--opponent=-0.1"),
        ({"label": "soft"}, "reads no probability; these do: ipo, osp, nash_md"),
        ({"loss": "nash_md"}, "it takes --label=soft"),
        ({"loss": "nash_md", "label": "soft", "k": 4}, "--k=2"),
        ({"loss": "simpo_pl", "label": "sampled"}, "--label=hard"),
        ({"loss": "dpp"}, "--loss=dpp: known are dpo, .*nash_md"),
        ({"gamma": 1.0}, "--gamma: the loss dpo has none"),
        ({"reward_model": ""}, "what compares"),
        ({"move_reference": True}, "--round_updates"),
        ({"temperature": 0.0}, "--temperature=0.0"),
        ({"batch_size": 33}, "not divisible"),
    ],
    ids=str,
)
def test_bad_options_are_named(world, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train_online.main(config_of(world, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
