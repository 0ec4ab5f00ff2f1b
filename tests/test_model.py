"""GPT-NeoX against transformers: logits, gradients of every parameter, greedy tokens; and the same
comparisons must fail when something is broken."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from transformers import GPTNeoXConfig
from util import (
    GRADIENT_TOLERANCE,
    RAW,
    TOLERANCE,
    VARIANTS,
    WIDE,
    causal,
    error,
    hidden_of,
    logits_of,
    our_name,
    pair,
    raw_config,
    worst_gradient,
)

import rlhf.model
from rlhf.common import frozen
from rlhf.config import UserError
from rlhf.generate import generate
from rlhf.logprobs import token_logprobs
from rlhf.model import ACTIVATIONS, NeoX, NeoXConfig, compile_layers

IDS = torch.randint(2, 61, (37,), generator=torch.Generator().manual_seed(5)).tolist()


def logit_error(ours: NeoX, theirs, attend=causal) -> float:
    with torch.no_grad():
        return error(logits_of(ours, IDS, attend), theirs(torch.tensor([IDS])).logits[0])


# --- the same numbers


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients(variant):
    ours, theirs = pair(raw_config(variant))
    mine, expected = logits_of(ours, IDS), theirs(torch.tensor([IDS])).logits[0]
    assert error(mine, expected) < TOLERANCE
    direction = torch.randn(expected.shape)
    (mine * direction).sum().backward()
    (expected * direction).sum().backward()
    assert worst_gradient(ours, theirs) < GRADIENT_TOLERANCE


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    assert logit_error(*pair(raw_config(hidden_act=activation))) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_with_the_cache(variant):
    """Three prompts of uneven length at once here, padded on the left there."""
    ours, theirs = pair(raw_config(variant), seed=1)
    prompts = [IDS[:4], IDS[4:20], IDS[20:29]]
    longest = max(map(len, prompts))
    padded = torch.tensor([[1] * (longest - len(p)) + p for p in prompts])
    expected = theirs.generate(
        padded, attention_mask=padded != 1, max_new_tokens=24, do_sample=False, pad_token_id=1, eos_token_id=0
    )[:, longest:]
    responses, ended = generate(ours, prompts, 1, 24, temperature=0)
    for response, row, end in zip(responses, expected.tolist(), ended):
        assert response[0] == (row[: row.index(0) + 1] if end else row)


@pytest.mark.parametrize("variant", ["parallel residual", "all at once"])
def test_reward_scores(variant):
    ours, theirs = pair(raw_config(variant), head="score")
    with torch.no_grad():
        mine = ours.scores(hidden_of(ours, IDS)[-20:])  # after each of the last 20 tokens
        expected = torch.stack([theirs(torch.tensor([IDS[:t]])).logits[0, 0] for t in range(18, 38)])
    assert error(mine, expected) < TOLERANCE


def test_gradient_checkpointing_changes_nothing():
    model, _ = pair(raw_config())
    gradients = []
    for model.gpt_neox.gradient_checkpointing in (False, True):
        model.zero_grad()
        logits_of(model, IDS).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("variant", ["parallel residual", "all at once"])
def test_compiled_layers_change_nothing(variant, monkeypatch):
    """With the tracer of torch.compile, not its code generator, which would need a C++ compiler and a
    minute."""
    compile, ours = torch.compile, pair(raw_config(variant))[0]
    expected, names = logits_of(ours, IDS), set(ours.state_dict())
    expected.square().mean().backward()
    gradients = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    monkeypatch.setattr(
        torch, "compile", lambda half, dynamic: compile(half, dynamic=dynamic, backend="eager")
    )
    compile_layers(ours, least=0)
    actual = logits_of(ours, IDS)
    actual.square().mean().backward()
    assert error(actual, expected) < TOLERANCE and set(ours.state_dict()) == names
    assert max(error(p.grad, g) for p, g in zip(ours.parameters(), gradients)) < GRADIENT_TOLERANCE


@pytest.mark.parametrize(
    "variant, head",
    [("parallel residual", "embed_out"), ("all at once", "embed_out"), ("parallel residual", "score")],
)
def test_frozen_in_bfloat16_changes_nothing(variant, head):
    """A frozen model keeps its matrices in the type of the products: what autocast would cast at every
    forward anyway."""
    model, _ = pair(raw_config(variant), head=head)
    assert {p.dtype for p in frozen(deepcopy(model)).parameters()} == {torch.float32}
    plain = deepcopy(model)
    plain.matmul_dtype = torch.bfloat16
    kept = frozen(deepcopy(plain))
    assert {p.dtype for p in kept.parameters()} == {torch.float32, torch.bfloat16}
    assert not any(p.requires_grad for p in kept.parameters())
    with plain.autocast(), torch.no_grad():
        hidden = [hidden_of(m, IDS) for m in (plain, kept)]
        assert torch.equal(*hidden)
        if head == "score":
            assert torch.equal(*(m.scores(h) for m, h in zip((plain, kept), hidden)))
        else:
            targets = torch.tensor(IDS)
            read = [token_logprobs(h, m.embed_out.weight, targets) for m, h in zip((plain, kept), hidden)]
            assert all(map(torch.equal, *read))
    if head == "embed_out":
        assert (
            generate(plain, [IDS[:9]], 2, 8, temperature=0)[0]
            == generate(kept, [IDS[:9]], 2, 8, temperature=0)[0]
        )
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters()))


def test_autocast_is_the_type_of_the_products():
    """float32: no autocast; bfloat16: the products of a forward are in it, the hidden states after the last
    norm are not."""
    model, _ = pair(raw_config())
    with torch.no_grad():
        exact = hidden_of(model, IDS)
        with model.autocast():
            assert not torch.is_autocast_enabled("cpu") and torch.equal(hidden_of(model, IDS), exact)
        model.matmul_dtype = torch.bfloat16
        with model.autocast():
            assert torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.is_autocast_enabled("cpu")
            rounded = hidden_of(model, IDS)
    assert rounded.dtype == torch.float32 and 10 * TOLERANCE < error(rounded, exact)
    assert model.device == torch.device("cpu")


# --- twins that must fail: were these comparisons blind, the ones above would prove nothing


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_comparison_sees_a_missing_rotary(variant, monkeypatch):
    ours, theirs = pair(raw_config(variant))
    rotary = rlhf.model.rotary
    monkeypatch.setattr(
        rlhf.model, "rotary", lambda positions, config: rotary(torch.zeros_like(positions), config)
    )
    assert logit_error(ours, theirs) > WIDE


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_comparison_sees_a_missing_mask(variant):
    def everywhere(layer, q, k, v):
        weights = (torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        return torch.einsum("hij,jhd->ihd", weights, v)

    ours, theirs = pair(raw_config(variant))
    assert logit_error(ours, theirs, everywhere) > WIDE


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_comparison_sees_the_other_residual_form(variant):
    ours, theirs = pair(raw_config(variant))
    swapped = NeoX(replace(ours.config, use_parallel_residual=not ours.config.use_parallel_residual))
    swapped.load_state_dict(ours.state_dict())
    assert logit_error(swapped, theirs) > WIDE


@pytest.mark.parametrize(
    "field, value",
    [("rotary_emb_base", 9000.0), ("rotary_pct", 0.5), ("hidden_act", "gelu_new"), ("layer_norm_eps", 1e-3)],
)
def test_the_comparison_sees_another_config(field, value):
    """Even the two gelus, which differ by 5e-4 at most, near 2."""
    ours, theirs = pair(raw_config())
    other = NeoX(replace(ours.config, **{field: value}))
    other.load_state_dict(ours.state_dict())
    assert logit_error(other, theirs) > 5 * TOLERANCE


# --- config.json


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_reads_our_config_as_the_same_model(variant):
    raw = raw_config(variant)
    expected = GPTNeoXConfig.from_dict(raw)
    actual = GPTNeoXConfig.from_dict(NeoXConfig.from_dict(raw).to_dict())
    assert actual.rope_parameters == expected.rope_parameters
    for field in set(NeoXConfig.__dataclass_fields__) - {"rotary_pct", "rotary_emb_base"}:
        assert getattr(actual, field) == getattr(expected, field), field


def test_defaults_are_those_of_transformers():
    required = {
        k: RAW[k]
        for k in (
            "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "intermediate_size",
        )
    }
    config, theirs = NeoXConfig.from_dict(required), GPTNeoXConfig.from_dict(required)
    assert (config.rotary_pct, config.rotary_emb_base) == (
        theirs.rope_parameters["partial_rotary_factor"], theirs.rope_parameters["rope_theta"],
    )
    for field in set(NeoXConfig.__dataclass_fields__) - {"rotary_pct", "rotary_emb_base"}:
        assert getattr(config, field) == getattr(theirs, field), field
    assert NeoXConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("changes, named", [
    ({"model_type": "llama"}, "'llama'"),
    ({"model_type": None}, "model_type"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope type 'yarn'"),
    ({"hidden_act": "mish"}, "hidden_act 'mish'"),
    ({"num_attention_heads": 5}, "num_attention_heads 5"),
    ({"intermediate_size": None}, "lacks intermediate_size"),
])
def test_refused_configs(changes, named):
    with pytest.raises(UserError, match=named):
        NeoXConfig.from_dict(raw_config(**changes))


# --- fresh weights


def test_init_weights():
    config = NeoXConfig.from_dict(raw_config(hidden_size=96, vocab_size=200))
    model, again, other = (NeoX(config).init_weights(seed) for seed in (3, 3, 4))
    for (name, p), q, r in zip(model.named_parameters(), again.parameters(), other.parameters()):
        assert torch.equal(p, q)
        if p.dim() == 2:
            assert (
                abs(p.std().item() / 0.02 - 1) < 0.05
                and abs(p.mean().item()) < 2e-3
                and not torch.equal(p, r)
            ), name
        else:
            assert (p == (1 if name.endswith("norm.weight") else 0)).all(), name
    head = torch.cat(
        [NeoX(config, "score").init_weights(seed).score.weight[0].detach() for seed in range(50)]
    )
    assert abs(head.std().item() * 97**0.5 - 1) < 0.05  # std 1 / sqrt(C + 1)


def test_parameter_names_are_those_of_transformers():
    for head in ("embed_out", "score"):
        ours, theirs = pair(raw_config(), head)
        assert {n: p.shape for n, p in ours.named_parameters()} == {
            our_name(n): p.shape for n, p in theirs.named_parameters()
        }
