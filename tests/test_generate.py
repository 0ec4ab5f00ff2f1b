"""Generation with the cache against full forwards and transformers, and the sampler against the probabilities
it should draw with."""

import math
from copy import deepcopy

import pytest
import torch
from util import TOLERANCE, WIDE, error, logits_of, pair, raw_config

import rlhf.generate
from rlhf.common import frozen
from rlhf.config import UserError
from rlhf.generate import Cache, generate, generate_all, sample
from rlhf.model import EOS, NeoX

G = torch.Generator().manual_seed(7)
PROMPTS = [torch.randint(2, 61, (P,), generator=G).tolist() for P in (5, 17, 1, 9, 40)]
R = 12


@pytest.fixture(scope="module", params=["parallel residual", "all at once"])
def models(request):
    return pair(raw_config(request.param), seed=2)


@pytest.fixture(scope="module")
def chatty():
    """A model over 9 tokens, flat enough that sampled responses end anywhere, EOS being one of them."""
    model, _ = pair(raw_config(vocab_size=9), seed=3)
    model.embed_out.weight.data *= 0.15
    return model


def small(prompts):
    return [[2 + t % 7 for t in p] for p in prompts]


def greedy_by_full_forwards(model: NeoX, prompt: list[int], R: int) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + R and (len(ids) == len(prompt) or ids[-1] != EOS):
        ids.append(int(logits_of(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


# --- the cache


@torch.no_grad()
def test_greedy_equals_full_forwards_and_transformers(models):
    ours, theirs = models
    responses, _ = generate(ours, PROMPTS, 1, R, temperature=0)
    for prompt, (response,) in zip(PROMPTS, responses):
        assert response == greedy_by_full_forwards(ours, prompt, R)
        row = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=R,
            do_sample=False,
            pad_token_id=1,
            eos_token_id=EOS,
        )
        assert response == row[0, len(prompt) :].tolist()


class Spy:
    """Records the logits of every step on their way into `sample`."""

    def __init__(self, monkeypatch):
        self.steps = []
        monkeypatch.setattr(rlhf.generate, "sample", self)

    def __call__(self, logits, *args):
        self.steps.append(logits.clone())
        return sample(logits, *args)

    def error(self, model, prompts, responses) -> float:
        """Largest error of any step of any sequence before its end, against a full forward of that
        sequence."""
        K, worst = len(responses[0]), 0.0
        for n, (prompt, answers) in enumerate(zip(prompts, responses)):
            for k, answer in enumerate(answers):
                full = logits_of(model, prompt + answer)[len(prompt) - 1 : -1]  # (length, V)
                worst = max(
                    worst, error(torch.stack([step[n * K + k] for step in self.steps[: len(answer)]]), full)
                )
        return worst


@torch.no_grad()
def test_every_step_of_k_samples_sees_the_logits_of_a_full_forward(models, chatty, monkeypatch):
    """Prompts and responses of uneven length, sequences that go on beside others that have ended."""
    for model, prompts in ((models[0], PROMPTS), (chatty, small(PROMPTS))):
        spy = Spy(monkeypatch)
        responses, _ = generate(model, prompts, 3, R)
        assert len({tuple(answer) for answers in responses for answer in answers}) > 6
        assert spy.error(model, prompts, responses) < TOLERANCE


def shifted_positions(monkeypatch):
    forward = NeoX.forward

    def late(self, ids, positions, attend):
        return forward(self, ids, positions + attend.__qualname__.startswith("Cache.decode"), attend)

    monkeypatch.setattr(NeoX, "forward", late)


def shifted_time(monkeypatch):
    decode = Cache.decode
    monkeypatch.setattr(Cache, "decode", lambda self, time: decode(self, (time + 1).clamp(max=R - 1)))


@pytest.mark.parametrize("breakage", [shifted_positions, shifted_time])
@torch.no_grad()
def test_the_comparison_sees_a_cache_off_by_one(breakage, monkeypatch):
    model, _ = pair(raw_config("rotary on the whole head"), seed=2)
    expected = [greedy_by_full_forwards(model, prompt, R) for prompt in PROMPTS]
    breakage(monkeypatch)
    spy = Spy(monkeypatch)
    responses, _ = generate(model, PROMPTS, 1, R, temperature=0)
    assert [answers[0] for answers in responses] != expected
    assert spy.error(model, PROMPTS, responses) > WIDE


def test_bfloat16(chatty):
    """Products in bfloat16, the weights in float32 or, of a frozen model, in bfloat16: near the float32
    distribution of the first and of the last token, and the same tokens from both."""
    prompts = small(PROMPTS)
    expected, _ = generate(chatty, prompts, 1, R, temperature=0)
    cast = deepcopy(chatty)
    cast.matmul_dtype = torch.bfloat16
    assert Cache.allocate(cast, 2, 2, 5, 4).prompt_keys.dtype == torch.bfloat16
    assert Cache.allocate(chatty, 2, 2, 5, 4).prompt_keys.dtype == torch.float32
    responses, _ = generate(cast, prompts, 1, R, temperature=0)
    assert sum(a[0][0] == b[0][0] for a, b in zip(responses, expected)) >= 3
    assert all(1 <= len(answers[0]) <= R for answers in responses)
    assert generate(frozen(deepcopy(cast)), prompts, 1, R, temperature=0)[0] == responses


@torch.no_grad()
def test_the_steps_of_generation_run_in_the_type_of_the_products(models, monkeypatch):
    """The logits of every step are off the float32 ones by what bfloat16 rounds, no less and not much
    more."""
    model = deepcopy(models[0])
    model.matmul_dtype = torch.bfloat16
    spy = Spy(monkeypatch)
    responses, _ = generate(model, PROMPTS, 1, 4, temperature=0)
    assert 50 * TOLERANCE < spy.error(models[0], PROMPTS, responses) < 0.5


# --- where a response ends


def test_every_response_ends_at_its_own_first_eos(chatty):
    responses, ended = generate(chatty, small(PROMPTS), 8, R)
    lengths = set()
    for answers, flags in zip(responses, ended.tolist(), strict=True):
        assert len(answers) == len(flags) == 8
        for answer, flag in zip(answers, flags):
            assert EOS not in answer[:-1]
            assert (answer[-1] == EOS) == flag and (flag or len(answer) == R)
            lengths.add(len(answer))
    assert len(lengths) > 4 and ended.any() and not ended.all()


def test_generation_stops_when_all_have_ended(monkeypatch):
    """A model that only says EOS runs one step, the prefill."""
    model, _ = pair(raw_config())
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.weight.zero_()
        model.embed_out.weight[EOS] = 100 * model.gpt_neox.final_layer_norm.bias
    spy = Spy(monkeypatch)
    responses, ended = generate(model, PROMPTS, 2, R)
    assert responses == [[[EOS], [EOS]]] * len(PROMPTS) and ended.all() and len(spy.steps) == 1


def test_one_new_token(chatty):
    responses, ended = generate(chatty, small(PROMPTS), 2, 1, temperature=0)
    assert all(len(answer) == 1 for answers in responses for answer in answers)
    assert ended.tolist() == [[answer[0] == EOS for answer in answers] for answers in responses]


def test_context_is_not_left():
    model, _ = pair(raw_config(max_position_embeddings=20))
    assert len(generate(model, [[5] * 15], 1, 5)[0]) == 1
    with pytest.raises(
        UserError, match=r"a prompt of 16 tokens and 5 new ones are more than the model's context \(20\)"
    ):
        generate(model, [[5] * 3, [5] * 16], 1, 5)


# --- seeds and batches


def test_same_seed_same_samples(chatty):
    one, same, other = (
        generate(chatty, small(PROMPTS), 4, R, generator=torch.Generator().manual_seed(seed))[0]
        for seed in (1, 1, 2)
    )
    assert one == same != other


def test_generate_all_is_generate_in_batches(models):
    responses, ended = generate(models[0], PROMPTS, 2, R, temperature=0)
    for batch in (1, 3, 100):
        some, some_ended = generate_all(models[0], PROMPTS, 2, R, batch=batch)
        assert some == responses and torch.equal(some_ended, ended)


# --- the sampler

LOGITS = torch.tensor([1.0, -0.5, 2.0, -math.inf, 0.3, -2.0, 1.7, 0.0])
DRAWS = 20_000
# standard deviations of chi square: chance alone makes more once in 1,000 times (of two tokens) to 50,000
# times (of nine)
CHANCE = 7.0


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """In standard deviations above what chance makes: chi square with d degrees of freedom has mean d and
    variance 2 d."""
    possible = probs > 0
    assert counts[~possible].sum() == 0, "a token of probability zero was drawn"
    expected = counts.sum() * probs[possible].double()
    d = possible.sum() - 1
    return (((counts[possible] - expected).square() / expected).sum() - d).item() / math.sqrt(2 * d)


def draw(logits, temperature, top_p=1.0) -> torch.Tensor:
    tokens = sample(logits.expand(DRAWS, -1), temperature, top_p, torch.Generator().manual_seed(11))
    return tokens.bincount(minlength=len(logits))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.8])
def test_sampled_distribution(temperature):
    counts = draw(LOGITS, temperature)
    assert chi_square(counts, (LOGITS / temperature).softmax(-1)) < CHANCE
    # the twin: a fifth more temperature is seen
    assert chi_square(counts, (LOGITS / (temperature * 1.2)).softmax(-1)) > 3 * CHANCE


@torch.no_grad()
def test_first_token_of_k_samples(chatty):
    """All K samples of a prompt start from the model's own distribution."""
    prompts, temperature = small(PROMPTS), 0.8
    responses, _ = generate(chatty, prompts, DRAWS // 4, 1, temperature=temperature)
    for prompt, answers in zip(prompts, responses):
        counts = torch.tensor(answers)[:, 0].bincount(minlength=9)
        assert chi_square(counts, (logits_of(chatty, prompt)[-1] / temperature).softmax(-1)) < CHANCE


@torch.no_grad()
def test_second_token_of_k_samples(chatty):
    """After a first token, the next is drawn from the distribution that follows that token."""
    prompt = small(PROMPTS)[1]
    responses, _ = generate(chatty, [prompt], DRAWS, 2)
    for first in range(2, 9):
        seconds = torch.tensor([answer[1] for answer in responses[0] if answer[0] == first]).bincount(
            minlength=9
        )
        assert chi_square(seconds, logits_of(chatty, [*prompt, first])[-1].softmax(-1)) < CHANCE
        # the twin: another first token
        assert chi_square(seconds, logits_of(chatty, [*prompt, 2 + (first - 1) % 7])[-1].softmax(-1)) > CHANCE


@pytest.mark.parametrize("top_p", [0.05, 0.4, 0.5, 0.8, 0.95, 0.999])
def test_top_p_keeps_the_smallest_set_with_that_mass(top_p):
    probs = LOGITS.softmax(-1)
    kept, mass = [], 0.0
    for token in probs.argsort(descending=True).tolist():
        if mass < top_p:
            kept.append(token)
            mass += probs[token].item()
    truncated = torch.zeros_like(probs).index_copy(0, torch.tensor(kept), probs[kept])
    counts = draw(LOGITS, 1.0, top_p)
    assert counts.nonzero()[:, 0].tolist() == sorted(kept)
    if len(kept) > 1:
        assert chi_square(counts, truncated / truncated.sum()) < CHANCE


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24, 1.0])
def test_no_draw_of_a_token_without_probability(u, top_p, monkeypatch):
    """At the very ends of the random number, and where it falls on the border between two tokens, in a
    distribution with zeros everywhere."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, u))
    logits = torch.tensor(
        [[0.0, 1.0, 0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]]
    ).log()
    tokens = sample(logits, 1.0, top_p)
    assert logits.gather(1, tokens[:, None]).isfinite().all()
    if top_p == 1.0:
        # token i has the half-open interval [cdf(i - 1), cdf(i))
        assert tokens.tolist() == [[1, 0, 2], [3, 5, 2]][u > 0.4]


def test_temperature_zero_is_greedy():
    logits = torch.randn(50, 30)
    assert torch.equal(sample(logits, 0.0), logits.argmax(-1))
    assert torch.equal(sample(logits, 1e-4), logits.argmax(-1))
    assert torch.equal(sample(logits, 1.0, top_p=1e-6), logits.argmax(-1))


def test_a_large_vocabulary():
    """The cumulative sum of 50,304 float32 probabilities: tokens of the far end are drawn as often as those
    of the near one."""
    generator, logits = torch.Generator().manual_seed(1), torch.zeros(1, 50_304).expand(50, -1)
    tokens = torch.cat([sample(logits, 1.0, 1.0, generator) for _ in range(40)])
    counts = (tokens // 3144).bincount(minlength=16)  # in 16 equal parts
    assert chi_square(counts, torch.full((16,), 1 / 16)) < CHANCE


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_two_steps_draw_what_one_does(top_p, monkeypatch):
    """By blocks and by one long cumulative sum: the same tokens, but for rounding at the border of two; and
    none without probability."""
    logits = 3 * torch.randn(1, 8192)
    logits[0, torch.randperm(8192)[:4000]] = -math.inf
    logits[0, 128:640] = -math.inf  # whole blocks too
    rows = logits.expand(4000, -1)
    two = sample(rows, 1.0, top_p, torch.Generator().manual_seed(3))
    monkeypatch.setattr("rlhf.generate.BLOCK", 10**6)
    one = sample(rows, 1.0, top_p, torch.Generator().manual_seed(3))
    assert (one == two).double().mean() > 0.995 and logits[0, two].isfinite().all()


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24, 1.0])
def test_two_steps_at_the_ends(u, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, u))
    logits = torch.full((2, 8192), -math.inf)
    logits[0, [200, 8000]] = 0.0
    logits[1, 5000] = 0.0
    assert sample(logits, 1.0).tolist() == [200 if u < 0.4 else 8000, 5000]


# --- a mixture of two models


@pytest.fixture(scope="module")
def other():
    return pair(raw_config(), seed=7)[0]


def test_the_ends_of_the_mixture_are_the_models_themselves(models, other):
    """The same draws from the same logits; half way they are others."""
    model = models[0]

    def drawn(sampler, **options):
        generator = torch.Generator().manual_seed(2)
        return generate(sampler, PROMPTS, 3, 8, temperature=8, generator=generator, **options)[0]

    assert drawn(model, reference=other, mixture=0.0) == drawn(model)
    assert drawn(model, reference=other, mixture=1.0) == drawn(other)
    half = drawn(model, reference=other, mixture=0.5)
    assert half != drawn(model) and half != drawn(other) and drawn(model) != drawn(other)


@pytest.mark.parametrize("c", [0.125, 0.6])
def test_a_mixture_is_of_logits_at_every_step(models, other, c):
    """Greedy, against full forwards of both models; one of the two alone, or the mean of probabilities,
    says other."""
    model = models[0]
    prompts = PROMPTS[:4]

    def greedy(prompt, mix):
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + 6 and ids[len(prompt) :][-1:] != [EOS]:
                ids.append(mix(logits_of(model, ids)[-1], logits_of(other, ids)[-1]).argmax().item())
        return ids[len(prompt) :]

    found = [r[0] for r in generate(model, prompts, 1, 6, temperature=0, reference=other, mixture=c)[0]]
    assert found == [greedy(p, lambda a, b: (1 - c) * a + c * b) for p in prompts]
    wrong = [
        lambda a, b: a,
        lambda a, b: b,
        lambda a, b: (1 - c) * a.softmax(-1) + c * b.softmax(-1),
        lambda a, b: c * a + (1 - c) * b,
    ]
    for mix in wrong:
        assert found != [greedy(p, mix) for p in prompts]


def test_a_mixture_needs_one_vocabulary(other):
    wider = pair(raw_config(vocab_size=62))[0]
    with pytest.raises(UserError, match="the model has 61 tokens, the reference 62"):
        generate(other, PROMPTS, 2, 4, reference=wider, mixture=0.5)
    generate(other, PROMPTS, 2, 4, reference=wider, mixture=0.0)
