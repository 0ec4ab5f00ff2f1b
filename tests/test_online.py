"""train_online.py: one update beside the same update of train_simpo.py, who samples and who compares, rounds,
and every method as documented. Its losses and expected gradients: test_online_theory.py."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import train_online
import train_simpo
from data import toy
from rlhf.config import RunError, UserError
from rlhf.forward import response_scores
from rlhf.groups import pack
from rlhf.model import NeoX, NeoXConfig
from rlhf.pretrained import from_pretrained, load_tokenizer, read_json, save_pretrained

torch.set_num_threads(1)

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

# --- what compares


COMPARE = """
import torch
from pathlib import Path
from rlhf.forward import response_scores
from rlhf.groups import pack
from rlhf.pretrained import from_pretrained, load_tokenizer

model = from_pretrained("RM", head="score")
tokenizer = load_tokenizer("RM")

def tokens(text):
    return tokenizer.encode(text).ids

@torch.no_grad()
def score(prompts, texts):
    responses = [[tokens(text)] for text in texts]
    groups = pack([tokens(prompt) for prompt in prompts], responses, max_positions=256)
    return response_scores(model, groups)[:, 0].tolist()

def prefer(prompts, texts, others):
    a, b = (torch.tensor(score(prompts, side)) for side in (texts, others))
    return (a - b).sigmoid().tolist()

def surer(prompts, texts, others):
    return [float(p > 0.5) for p in prefer(prompts, texts, others)]

def sure(prompts, texts, others):
    return [1.2] * len(texts)

def broken(prompts, texts, others):
    raise KeyError(others[0])
"""


@pytest.fixture
def functions(world, tmp_path) -> Path:
    file = tmp_path / "compare.py"
    file.write_text(COMPARE.replace("RM", str(world / "rm")))
    return file


@pytest.mark.parametrize("loss, label", [("dpo", "hard"), ("dpo", "sampled"), ("ipo", "soft")])
def test_a_function_that_compares_is_the_scores_that_it_compares(world, functions, tmp_path, loss, label):
    """P = sigmoid(difference of the scores), from a function of two texts and from one of one text: the same
    update. P of 0 and 1 is another one where the loss reads P, and where P draws the winner."""
    options = dict(loss=loss, label=label, reward_model="", missing_eos="none")
    train_online.main(config_of(world, tmp_path / "score", **options, reward_fn=f"{functions}:score"))
    train_online.main(config_of(world, tmp_path / "prefer", **options, compare_fn=f"{functions}:prefer"))
    train_online.main(config_of(world, tmp_path / "surer", **options, compare_fn=f"{functions}:surer"))
    moved = distance(tmp_path / "score", world / "sft")
    assert moved > 1e-4 and distance(tmp_path / "score", tmp_path / "prefer") < 0.01 * moved
    other = distance(tmp_path / "surer", tmp_path / "prefer")
    assert other == 0 if label == "hard" else other > 0.1 * moved


@pytest.mark.parametrize("name, said", [
    ("sure", "--compare_fn: sure returned 1.2.* for the text .*: a probability is needed"),
    ("broken", "--compare_fn: broken raised KeyError in line 31"),
])
def test_a_comparison_that_fails_is_named_and_the_run_goes_on(world, functions, tmp_path, name, said):
    cfg = config_of(
        world, tmp_path / "run", reward_model="", compare_fn=f"{functions}:{name}", episodes=64, save_every=1,
    )
    with pytest.raises(RunError, match=f"{said}.*--resume"):
        train_online.main(cfg)
    text = functions.read_text().replace("[1.2]", "[0.8]")
    functions.write_text(text.replace("raise KeyError(others[0])", "return [0.8] * len(texts)"))
    train_online.main(replace(cfg, resume=True))
    assert len(lines(tmp_path / "run")) == 2


def test_several_reward_models_compare(world, tmp_path):
    both = f"{world}/rm,{world}/rm"
    for name, reward_model in (("one", f"{world}/rm"), ("two", both)):
        train_online.main(config_of(world, tmp_path / name, reward_model=reward_model, reward_mix="min"))
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-6
    assert lines(tmp_path / "two")[0]["rm_std"] == 0


@pytest.mark.parametrize("options", [
    dict(round_updates=2, move_reference=True), dict(opponent=0.5, label="sampled"),
], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(world, tmp_path, monkeypatch, options):
    options = dict(options, episodes=160, save_every=3, samples_every=2)
    train_online.main(config_of(world, tmp_path / "whole", **options))
    log = train_online.Run.log

    def dies(self, step, metrics, show=()):
        if step == 5:
            raise KeyboardInterrupt
        log(self, step, metrics, show)

    with monkeypatch.context() as patch:
        patch.setattr(train_online.Run, "log", dies)
        with pytest.raises(KeyboardInterrupt):
            train_online.main(config_of(world, tmp_path / "cut", **options))
    train_online.main(config_of(world, tmp_path / "cut", resume=True, **options))
    assert distance(tmp_path / "whole", tmp_path / "cut") == 0
    seen = [(tmp_path / run / "samples.jsonl").read_text() for run in ("whole", "cut")]
    assert seen[0] == seen[1] and seen[0].count("\n") == 6  # two prompts at three updates


def test_a_mixture_needs_one_vocabulary(world, tmp_path):
    raw = read_json(world / "sft/config.json")
    wider = NeoX(NeoXConfig.from_dict(raw | {"vocab_size": raw["vocab_size"] + 64})).init_weights(0)
    save_pretrained(wider, load_tokenizer(str(world / "sft")), tmp_path / "wider")
    options = dict(ref_model=str(tmp_path / "wider"))
    for sampler in (dict(mixture=0.5), dict(opponent=1.0)):
        with pytest.raises(UserError, match="a mixture of models needs one vocabulary"):
            train_online.main(config_of(world, tmp_path / "run", **options, **sampler))
    assert not (tmp_path / "run").exists()
    train_online.main(config_of(world, tmp_path / "run", **options))  # a reference alone may have another


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
        ({"reward_fn": "x.py:f"}, "give one of --reward_model, --reward_fn and --compare_fn"),
        ({"compare_fn": "x.py:f", "scorer": "gold"}, "give one of"),
        ({"compare_fn": "x.py:f", "reward_model": "", "k": 4}, "compares two responses"),
        ({"compare_fn": "x.py:f", "reward_model": ""}, "--compare_fn=x.py:f: no such file"),
        ({"reward_mix": "median"}, "--reward_mix=median: known are mean, min, uwo, softmin, first"),
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
