"""Numbers per token and per response from a packed row, against transformers run on one response at a
time."""

from copy import deepcopy
from dataclasses import fields

import pytest
import torch
from util import GRADIENT_TOLERANCE, TOLERANCE, WIDE, error, pair, random_groups, raw_config, worst_gradient

import rlhf.groups
from rlhf.common import frozen
from rlhf.forward import response_scores, summed_nll, token_stats
from rlhf.groups import micro_batches, pack

VARIANTS = ["parallel residual", "all at once"]
LENGTHS = [[5, 3, 1], [1, 7, 2], [4, 4, 4]]  # K = 3 responses to each of N = 3 prompts
WIDEST = max(map(max, LENGTHS))
PROMPTS, RESPONSES = random_groups(LENGTHS)
COLUMNS = ("logprobs", "entropy", "ref_logprobs", "kl", "mean_logits")


def packed(prompts=PROMPTS, responses=RESPONSES, **options):
    return pack(prompts, responses, max_positions=128, **options)


def padded(rows: list[torch.Tensor]) -> torch.Tensor:
    """N K rows of numbers per token -> (N, K, R), 0 after the end."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).unflatten(0, (len(LENGTHS), -1))


def their_stats(theirs, reference=None, temperature: float = 1.0) -> dict[str, torch.Tensor]:
    """The five columns from whole logits, by their definitions."""
    rows = {name: [] for name in COLUMNS}
    for prompt, answers in zip(PROMPTS, RESPONSES):
        for answer in answers:
            row, targets = torch.tensor([prompt + answer]), torch.tensor(answer)[:, None]
            logits = theirs(row).logits[0, len(prompt) - 1 : -1]  # (R, V)
            logp = (logits / temperature).log_softmax(-1)
            rows["logprobs"].append(logp.gather(1, targets)[:, 0])
            rows["entropy"].append(-(logp.exp() * logp).sum(-1))
            rows["mean_logits"].append(logits.detach().mean(-1))
            if reference is not None:
                with torch.no_grad():
                    logq = (reference(row).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
                rows["ref_logprobs"].append(logq.gather(1, targets)[:, 0])
                rows["kl"].append((logp.detach().exp() * (logp.detach() - logq)).sum(-1))
    return {name: padded(found) for name, found in rows.items() if found}


def their_scores(theirs) -> torch.Tensor:
    """The reward after the last token of every response, (N, K)."""
    return torch.stack(
        [
            torch.stack([theirs(torch.tensor([prompt + answer])).logits[0, 0] for answer in answers])
            for prompt, answers in zip(PROMPTS, RESPONSES)
        ]
    )


@pytest.fixture(scope="module")
def models():
    return {(v, head): pair(raw_config(v), head) for v in VARIANTS for head in ("embed_out", "score")}


@pytest.fixture(scope="module")
def references():
    """Of the same shape with other weights; and of another width, depth and number of heads."""
    small = raw_config(hidden_size=36, num_hidden_layers=1, num_attention_heads=2, intermediate_size=50)
    return {"another": pair(raw_config(), seed=5), "narrower": pair(small, seed=6)}


def backward(found: dict, weights: torch.Tensor) -> None:
    """From what is differentiable: a random direction in the log-probs, another in the entropies."""
    (found["logprobs"] * weights[0] + found["entropy"] * weights[1]).sum().backward()


# --- token_stats


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("reference", [None, "another", "narrower"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_token_stats(variant, reference, temperature, models, references):
    """Values, and the gradient of every parameter."""
    ours, theirs = models[variant, "embed_out"]
    our_ref, their_ref = references[reference] if reference else (None, None)
    ours.zero_grad(), theirs.zero_grad()
    groups = packed()
    stats = vars(token_stats(ours, groups, temperature, our_ref, mean_logits=True))
    expected = their_stats(theirs, their_ref, temperature)
    assert {name for name, value in stats.items() if value is not None} == expected.keys()
    for name, value in expected.items():
        assert stats[name].shape == groups.response_mask.shape and stats[name].dtype == torch.float32
        assert error(stats[name], value) < TOLERANCE, name
        assert (stats[name][~groups.response_mask] == 0).all(), name
    assert {name for name in expected if stats[name].requires_grad} == {"logprobs", "entropy"}
    weights = torch.randn(2, *groups.response_mask.shape)
    backward(stats, weights)
    backward(expected, weights)
    assert worst_gradient(ours, theirs) < GRADIENT_TOLERANCE
    assert reference is None or all(p.grad is None for p in our_ref.parameters())


def test_columns_that_nobody_asked_for_are_none(models, references):
    ours, _ = models["parallel residual", "embed_out"]
    with torch.no_grad():
        alone = token_stats(ours, packed())
        beside = token_stats(ours, packed(), reference=references["another"][0])
    rest = {field.name for field in fields(alone)} - {"logprobs", "entropy"}
    assert {name for name in rest if getattr(alone, name) is not None} == set()
    assert {name for name in rest if getattr(beside, name) is not None} == {"ref_logprobs", "kl"}
    assert torch.equal(alone.logprobs, beside.logprobs) and torch.equal(alone.entropy, beside.entropy)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_best_tokens(temperature, models):
    """Their log-probs, with gradients, and which of them is the response's own."""
    ours, theirs = models["all at once", "embed_out"]
    ours.zero_grad(), theirs.zero_grad()
    stats = token_stats(ours, packed(), temperature, top_k=3)
    best = []
    own = []
    for prompt, answers in zip(PROMPTS, RESPONSES):
        for answer in answers:
            logits = theirs(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]  # (R, V)
            top = (logits / temperature).log_softmax(-1).topk(3)  # (R, 3)
            best.append(top.values)
            own.append(top.indices == torch.tensor(answer)[:, None])
    assert torch.equal(stats.top_is_token, padded(own)) and stats.top_is_token.any()
    assert error(stats.top_logprobs, padded(best)) < TOLERANCE
    assert torch.equal(stats.logprobs, token_stats(ours, packed(), temperature).logprobs)
    weights = torch.randn(stats.top_logprobs.shape)
    (stats.top_logprobs * weights).sum().backward()
    (padded(best) * weights).sum().backward()
    assert worst_gradient(ours, theirs) < GRADIENT_TOLERANCE


def test_policy_as_its_own_reference(models):
    ours, _ = models["parallel residual", "embed_out"]
    with torch.no_grad():
        stats = token_stats(ours, packed(), 0.7, frozen(deepcopy(ours)))
    assert torch.equal(stats.logprobs, stats.ref_logprobs) and stats.kl.abs().max() < 2e-5


def test_one_by_one_equals_packed(models, references):
    """Every response in a row of its own, and in micro-batches widened to a common length."""
    ours, reference = models["all at once", "embed_out"][0], references["narrower"][0]
    with torch.no_grad():
        together = token_stats(ours, packed(max_response=WIDEST), 0.7, reference, mean_logits=True)
        alone = [
            [
                token_stats(ours, packed([p], [[answer]]), 0.7, reference, mean_logits=True)
                for answer in answers
            ]
            for p, answers in zip(PROMPTS, RESPONSES)
        ]
        slices = [
            token_stats(
                ours, packed(PROMPTS[s], RESPONSES[s], max_response=WIDEST), 0.7, reference, mean_logits=True
            )
            for s in micro_batches(PROMPTS, RESPONSES, 20)
        ]
    assert len(slices) > 1
    for name in COLUMNS:
        whole = getattr(together, name)
        assert error(padded([getattr(s, name)[0, 0] for row in alone for s in row]), whole) < TOLERANCE, name
        assert error(torch.cat([getattr(s, name) for s in slices]), whole) < TOLERANCE, name


# --- response_scores and summed_nll


@pytest.mark.parametrize("variant", VARIANTS)
def test_response_scores(variant, models):
    ours, theirs = models[variant, "score"]
    ours.zero_grad(), theirs.zero_grad()
    scores, expected = response_scores(ours, packed()), their_scores(theirs)
    assert scores.shape == (3, 3) and error(scores, expected) < TOLERANCE
    weights = torch.randn(3, 3)
    (scores * weights).sum().backward()
    (expected * weights).sum().backward()
    assert worst_gradient(ours, theirs) < GRADIENT_TOLERANCE
    with torch.no_grad():
        alone = [
            response_scores(ours, packed([p], [[answer]]))
            for p, row in zip(PROMPTS, RESPONSES)
            for answer in row
        ]
    assert error(torch.cat(alone).view(3, 3), scores) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_summed_nll(variant, models):
    ours, theirs = models[variant, "embed_out"]
    ours.zero_grad(), theirs.zero_grad()
    loss, expected = summed_nll(ours, packed()), -their_stats(theirs)["logprobs"].sum()
    assert error(loss, expected) < TOLERANCE
    loss.backward()
    expected.backward()
    assert worst_gradient(ours, theirs) < GRADIENT_TOLERANCE
    with torch.no_grad():
        assert error(summed_nll(ours, packed()), -token_stats(ours, packed()).logprobs.sum()) < TOLERANCE


# --- bfloat16: the model's own matmul_dtype, and nobody else's business


def in_bfloat16(model):
    cast = deepcopy(model)
    cast.matmul_dtype = torch.bfloat16
    return cast


def test_bfloat16_products(models, references):
    """As autocast by hand gives them; float32 out; off by what bfloat16 rounds and not by more."""
    ours, reference = models["parallel residual", "embed_out"][0], references["narrower"][0]
    cast, cast_reference = in_bfloat16(ours), in_bfloat16(reference)
    with torch.no_grad():
        exact = token_stats(ours, packed(), 0.7, reference, mean_logits=True)
        rounded = token_stats(cast, packed(), 0.7, cast_reference, mean_logits=True)
        kept = token_stats(cast, packed(), 0.7, frozen(deepcopy(cast_reference)), mean_logits=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            by_hand = token_stats(ours, packed(), 0.7, reference, mean_logits=True)
    for name in COLUMNS:
        value = getattr(rounded, name)
        assert value.dtype == torch.float32 and torch.equal(value, getattr(kept, name)), name
        if name != "mean_logits":  # that product is taken after the autocast, in float32
            assert torch.equal(value, getattr(by_hand, name)), name
        assert 20 * TOLERANCE < error(value, getattr(exact, name)) < 0.3, name


def test_bfloat16_gradients_are_float32(models):
    ours, _ = models["parallel residual", "embed_out"]
    gradients = []
    for model in (deepcopy(ours), in_bfloat16(ours)):
        model.zero_grad()
        token_stats(model, packed()).logprobs.mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[1].dtype == torch.float32
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98 and error(*gradients) > 10 * GRADIENT_TOLERANCE


def test_bfloat16_scores_and_nll(models):
    scorer, model = (models["parallel residual", head][0] for head in ("score", "embed_out"))
    with torch.no_grad():
        for f, exact in ((response_scores, scorer), (summed_nll, model)):
            rounded = f(in_bfloat16(exact), packed())
            assert rounded.dtype == torch.float32
            assert TOLERANCE < error(rounded, f(exact, packed())) < 0.1, f.__name__
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(f(exact, packed()), rounded)


# --- twins that must fail


def neighbours_visible(P, lengths, dtype):
    """Every response sees those before it in the row."""
    total = sum(lengths)
    may = torch.cat([torch.ones(total, P), torch.ones(total, total).tril()], dim=1).bool()
    return torch.zeros(may.shape, dtype=dtype).masked_fill(~may, float("-inf"))


@torch.no_grad()
def test_the_comparison_sees_another_temperature_reference_and_direction(models, references):
    ours, theirs = models["parallel residual", "embed_out"]
    expected = their_stats(theirs, references["another"][1], 0.7)
    warmer = token_stats(ours, packed(), 0.75, references["another"][0])
    other = token_stats(ours, packed(), 0.7, references["narrower"][0])
    for name in ("logprobs", "entropy", "ref_logprobs", "kl"):
        assert error(getattr(warmer, name), expected[name]) > WIDE, name
    for name in ("ref_logprobs", "kl"):
        assert error(getattr(other, name), expected[name]) > WIDE, name
    reverse = token_stats(references["another"][0], packed(), 0.7, ours).kl  # KL(reference || model)
    assert error(reverse, expected["kl"]) > WIDE


@pytest.mark.parametrize("head", ["embed_out", "score"])
@torch.no_grad()
def test_the_comparison_sees_a_neighbour_and_an_index_off_by_one(head, models, monkeypatch):
    ours, theirs = models["parallel residual", head]
    read = response_scores if head == "score" else lambda model, groups: token_stats(model, groups).logprobs
    expected = their_scores(theirs) if head == "score" else their_stats(theirs)["logprobs"]
    assert error(read(ours, packed()), expected) < TOLERANCE
    for by in (-1, 1):
        groups = packed(multiple=40)
        groups.last, groups.predicts = groups.last + by, groups.predicts + by
        assert error(read(ours, groups), expected) > WIDE
    monkeypatch.setattr(rlhf.groups, "response_bias", neighbours_visible)
    assert error(read(ours, packed()), expected) > WIDE
