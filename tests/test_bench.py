"""The bench: what it counts as the least work, what it refuses, and that every script can be held."""

import json
import math

import pytest
import torch

import train_rloo
import train_rm
import train_sft
import train_simpo
from bench import ours, ranks, work
from bench.bench import Config, checked, compare
from bench.floor import VOCABULARY, costs, floor
from bench.sides import Stopped
from rlhf.config import RunError, UserError, check_ranges
from rlhf.forward import token_stats
from rlhf.groups import pack
from rlhf.pretrained import from_pretrained

TINY = (32, 1, 2)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(work.SHAPES, "tiny", TINY)
    monkeypatch.setattr(work, "VOCABULARY", 97)
    for script in (train_rloo, train_rm, train_sft, train_simpo):
        monkeypatch.setattr(script, "Run", script.Run)  # what a side puts there ends with the test
    monkeypatch.setattr(train_rloo, "generate_all", train_rloo.generate_all)


def make(kind: str, folder="/nowhere/x", **options) -> work.Work:
    cfg = Config(model="tiny", prompts=2, prompt_tokens=6, response_tokens=4, **options)
    return work.make_work(cfg, kind, None, str(folder))


def test_the_floor_of_an_update_is_three_forwards():
    """Of SFT on everything: 6 FLOPs per weight and token, and the attention's, counted token by token."""
    C, L, _ = TINY
    sft = make("sft")
    tokens = sft.P + sft.R
    attended = sum(range(1, tokens + 1))
    head = VOCABULARY * C * (tokens - 1)  # the last token predicts nothing
    forward = sft.N * (2 * 12 * C * C * L * tokens + 4 * C * L * attended + 2 * head)
    assert costs(sft)["update"][0] == 3 * forward


def test_every_further_pass_of_rloo_is_a_whole_update():
    one = costs(make("rloo"))
    four = costs(make("rloo", ppo_epochs=4))
    dpo = costs(make("dpo"))
    for i in range(2):  # FLOPs, bytes
        added = four["update"][i] - one["update"][i]
        assert added > 0
        assert math.isclose(four["update/adamw"][i], 4 * dpo["update/adamw"][i])
        assert math.isclose(added, 3 * update_of(make("rloo"))[i])
    assert four["scoring"] == one["scoring"] and four["rollout"] == one["rollout"]


def update_of(rloo: work.Work) -> tuple[float, float]:
    """The update of a pair loss on as many responses as RLOO's."""
    same_rows = work.Work(**{**vars(rloo), "kind": "simpo"})
    return costs(same_rows)["update"]


def test_a_part_takes_the_longer_of_arithmetic_and_bytes():
    generate = make("generate")
    flops, bytes_ = costs(generate)["prefill"]
    assert floor(generate, {"flops": 1.0, "bytes": 1e30})["prefill"] == pytest.approx(flops)
    assert floor(generate, {"flops": 1e30, "bytes": 1.0})["prefill"] == pytest.approx(bytes_)


def test_other_work_is_refused():
    ours_first = {"loss": 1.0, "grad_norm": 2.0}
    assert compare(make("dpo"), "trl", ours_first, ours_first) == {"loss": 0.0, "grad_norm": 0.0}
    for wrong in ({"loss": 1.01, "grad_norm": 2.0}, {"loss": math.nan, "grad_norm": 2.0}):
        with pytest.raises(RunError, match="did not compute the same: loss 1 and"):
            compare(make("dpo"), "trl", ours_first, wrong)


def test_bad_options_are_named():
    bad = {
        "known are rloo, dpo": Config(work="ppo"),
        "known are trl, trl-patched, transformers": Config(peer="ours"),
        "known are pythia-14m": Config(model="gpt2"),
        "only rloo and generate": Config(work="dpo", sweep="k"),
        "at least 2 responses": Config(work="rloo", k=1),
        "at least 1": Config(ppo_epochs=0),
        "numbers of ranks joined by commas": Config(ranks="1,two"),
        "give one of them": Config(ranks="1,2", sweep="prompt"),
        "dpo has 4 prompts for 5 ranks": Config(ranks="1,5", work="dpo"),
    }
    for said, cfg in bad.items():
        with pytest.raises(UserError, match=said):
            checked(cfg)
    with pytest.raises(UserError, match="does not divide"):
        make("rloo", peer_rows=3)


def test_the_defaults_are_in_their_ranges():
    check_ranges(Config())


def test_what_a_rank_receives():
    """Of the paper's update at 6.9B on 8 ranks: 5 micro-batches each, in 4 epochs."""
    assert [ranks.passes(n) for n in (1, 8, 64)] == [39, 5, 1]
    body = 12 * 4096**2 * 32
    root = 2 * VOCABULARY * 4096
    learnt = 4 * 5 * (8 * body + 8 * root)
    scored = (5 + 5 + 2 + 1) * (2 * body + 4 * root)  # reference, reward model, drift, copy for the rollout
    assert ranks.received("pythia-6.9b", 8) == pytest.approx((learnt + scored) * 7 / 8)
    assert ranks.received("pythia-6.9b", 1) == 0


class TwoSteps:
    """A gate that lets two steps through."""

    device = torch.device("cpu")

    def __init__(self):
        self.facts = []

    def now(self) -> float:
        return 0.0

    def ready(self) -> None:
        pass

    def done(self, facts: dict) -> None:
        self.facts.append(facts)
        if len(self.facts) == 2:
            raise Stopped


def two_steps(kind: str, folder, **options) -> list[dict]:
    mine = make(kind, folder / kind, device="cpu", **options)
    work.write_models(mine)
    work.write_data(mine)
    gate = TwoSteps()
    with pytest.raises(Stopped):
        (ours.generation if kind == "generate" else ours.training)(mine, gate)
    return gate.facts


@pytest.mark.parametrize("kind", [kind for kind in work.SIZES if kind not in work.SAMPLED])
def test_a_script_is_held_before_every_update(tmp_path, kind):
    first, second = (facts["check"] for facts in two_steps(kind, tmp_path))
    assert first.keys() == ours.LOGGED[kind].keys()
    assert 0 < second["loss"] < first["loss"]  # the same batch again


def surprisal(mine: work.Work, prompts: list, responses: list) -> float:
    """Nats per token of given responses, all of one length, at the sampling temperature."""
    model = from_pretrained(mine.model_dir)
    groups = pack(prompts, responses, max_positions=model.config.max_position_embeddings)
    return -token_stats(model, groups, 0.7).logprobs.mean().item()


def test_rloo_learns_from_the_shared_responses(tmp_path):
    first, second = two_steps("rloo", tmp_path, ppo_epochs=2)
    assert first["parts"].keys() >= {"rollout", "scoring", "update"}
    lines = (tmp_path / "rloo/ours/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["response_length"] == 4  # none ends early
    mine = make("rloo", tmp_path / "rloo")
    prompts, responses = mine.rows()
    assert first["check"]["surprisal"] == pytest.approx(surprisal(mine, prompts, responses), rel=1e-5)
    assert first["check"]["surprisal"] != pytest.approx(surprisal(mine, prompts[::-1], responses), rel=1e-3)
    assert second["check"]["surprisal"] != first["check"]["surprisal"]  # the policy has moved


def test_generation_is_greedy_first(tmp_path):
    first, second = two_steps("generate", tmp_path)
    assert len(first["check"]["greedy"]) == 8 and second["parts"].keys() == {"prefill", "decode"}
