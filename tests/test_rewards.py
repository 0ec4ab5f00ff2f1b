"""Reward terms, their coefficients and the missing-EOS rule: by hand."""

import pytest
import torch
import torch.nn.functional as F

from rlhf.config import UserError
from rlhf.masked import lengths, masked_mean, masked_sum, mean_logprobs, seq_logprobs
from rlhf.rewards import COEFFICIENT, REWARDS, missing_eos, parse_reward, rlhf_reward, summed

torch.set_num_threads(1)
PAD = 99.0  # what the padding holds; no number below may depend on it

# One prompt, two responses, R = 4: lengths 2 and 4.
LOGPROBS = torch.tensor([[[-1.0, -2.0, PAD, PAD], [-0.5, -1.0, -1.5, -3.0]]])
REF = torch.tensor([[[-1.5, -2.5, PAD, -PAD], [-0.5, -0.5, -0.5, -0.5]]])
MASK = torch.tensor([[[True, True, False, False], [True, True, True, True]]])


def close(actual, expected):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype))


# --- masked sums and means


def test_masked_by_hand():
    close(seq_logprobs(LOGPROBS, MASK), [[-3.0, -6.0]])
    close(mean_logprobs(LOGPROBS, MASK), [[-1.5, -1.5]])
    assert lengths(MASK).tolist() == [[2, 4]]
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    assert masked_mean(torch.full((1, 3), PAD), nothing).tolist() == [0.0]


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1.0])
def test_padding_reaches_neither_value_nor_gradient(garbage):
    x = torch.where(MASK, LOGPROBS, garbage).requires_grad_()
    for f, value, slope in [
        (masked_sum, [[-3.0, -6.0]], [[1.0], [1.0]]),
        (masked_mean, [[-1.5, -1.5]], [[0.5], [0.25]]),
    ]:
        close(f(x, MASK), value)
        close(torch.autograd.grad(f(x, MASK).sum(), x)[0], torch.tensor(slope) * MASK)


# --- reward terms

# three numbers per response: log pi(y|x), log pi_ref(y|x), |y|
NUMBERS = torch.tensor([[-3.0, -6.0]]), torch.tensor([[-4.0, -2.0]]), torch.tensor([[2, 4]])


@pytest.mark.parametrize("name, expected", [
    ("kl", [[-(-3.0 + 4.0), -(-6.0 + 2.0)]]),
    ("maxent", [[3.0, 6.0]]),
    ("maxent_length", [[1.5, 1.5]]),
    ("minent_length", [[-1.5, -1.5]]),
])
def test_terms_by_hand(name, expected):
    close(REWARDS[name](*NUMBERS), expected)


def test_every_term_is_tested_by_hand():
    assert set(REWARDS) == {"kl", "maxent", "maxent_length", "minent_length"}


def test_a_term_gets_the_sums_of_the_kept_tokens_and_their_number(monkeypatch):
    """What rlhf_reward hands to a term: NUMBERS, of these log-probs; without gradient, whatever the padding
    holds."""
    seen = []
    monkeypatch.setitem(REWARDS, "seen", lambda *numbers: seen.append(numbers) or numbers[0] * 0)
    rlhf_reward(torch.zeros(1, 2), LOGPROBS.clone().requires_grad_(), REF, MASK, {"score": 1.0, "seen": 1.0})
    for actual, expected in zip(seen[0], NUMBERS, strict=True):
        close(actual, expected)
        assert not actual.requires_grad


@pytest.mark.parametrize("coefficients, expected", [
    ({"kl": 0.1}, [[1.0 - 0.1 * 1.0, 2.0 + 0.1 * 4.0]]),  # r - beta (log pi - log pi_ref)
    ({"maxent": 0.5}, [[1.0 + 0.5 * 3.0, 2.0 + 0.5 * 6.0]]),  # eq. 6
    ({"maxent_length": 0.5}, [[1.0 + 0.5 * 1.5, 2.0 + 0.5 * 1.5]]),  # eq. 7
    ({"kl": 0.1, "minent_length": 0.5}, [[1.0 - 0.1 * 1.0 - 0.5 * 1.5, 2.0 + 0.1 * 4.0 - 0.5 * 1.5]]),
    ({"maxent": 0.5, "maxent_length": -0.2}, [[1.0 + 0.5 * 3.0 - 0.2 * 1.5, 2.0 + 0.5 * 6.0 - 0.2 * 1.5]]),
    ({}, [[1.0, 2.0]]),
])
def test_rlhf_reward_by_hand(coefficients, expected):
    logprobs, scores = LOGPROBS.clone().requires_grad_(), torch.tensor([[1.0, 2.0]], requires_grad=True)
    rewards, terms = rlhf_reward(scores, logprobs, REF, MASK, {"score": 1.0, **coefficients})
    close(rewards, expected)
    assert list(terms) == list(coefficients)
    assert not rewards.requires_grad and not any(term.requires_grad for term in terms.values())
    without, same = rlhf_reward(
        scores, logprobs, REF, MASK, {"score": 1.0, **dict.fromkeys(coefficients, 0.0)}
    )
    close(without, [[1.0, 2.0]])
    # free of the coefficients: a run with 0 has curves too
    assert all(torch.equal(terms[t], same[t]) for t in terms)


@pytest.mark.parametrize("coefficient", [0.0, 1.0, -2.5])
def test_the_score_has_a_coefficient_too(coefficient):
    scores = torch.tensor([[1.0, 2.0]])
    rewards, terms = rlhf_reward(scores, LOGPROBS, REF, MASK, {"score": coefficient, "maxent": 0.5})
    close(rewards, [[coefficient + 1.5, 2 * coefficient + 3.0]])
    assert list(terms) == ["maxent"]


def test_kl_of_policy_equal_to_reference_is_zero():
    rewards, terms = rlhf_reward(torch.zeros(1, 2), LOGPROBS, LOGPROBS, MASK, {"score": 1.0, "kl": 0.7})
    assert rewards.tolist() == terms["kl"].tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("garbage", [0.0, 1.0, -50.0, float("nan")])
def test_terms_do_not_depend_on_padding(name, garbage):
    coefficients, scores = {"score": 1.0, name: 1.0}, torch.zeros(1, 2)
    longer = [F.pad(torch.where(MASK, x, garbage), (0, 5), value=garbage) for x in (LOGPROBS, REF)]
    padded, _ = rlhf_reward(scores, *longer, F.pad(MASK, (0, 5)), coefficients)
    close(padded, rlhf_reward(scores, LOGPROBS, REF, MASK, coefficients)[0])


def test_fill_is_a_hidden_penalty_on_short_answers():
    """TRL's INVALID_LOGPROB = 1.0 under eq. 7 takes beta (R - |y|) / |y| from the reward: at beta = 0.1 and R
    = 53, an answer of 20 tokens loses 0.165, one of 10 tokens 0.43, one without EOS nothing. KL is immune."""
    beta, R = 0.1, 53
    mask = torch.arange(R) < torch.tensor([[20, 10, 53]])[..., None]  # (1, 3, R)
    g = torch.Generator().manual_seed(0)
    logprobs, ref = (-torch.rand(1, 3, R, generator=g, dtype=torch.float64) for _ in range(2))
    scores = torch.zeros(1, 3, dtype=torch.float64)

    def rewards(term, fill):
        return rlhf_reward(scores, logprobs, ref, mask, {"score": 1.0, term: beta}, fill)[0]

    close(
        rewards("maxent_length", None) - rewards("maxent_length", 1.0), [[0.1 * 33 / 20, 0.1 * 43 / 10, 0.0]]
    )
    close(
        rewards("minent_length", 1.0) - rewards("minent_length", None), [[0.1 * 33 / 20, 0.1 * 43 / 10, 0.0]]
    )
    close(rewards("maxent", None) - rewards("maxent", 1.0), [[0.1 * 33, 0.1 * 43, 0.0]])
    close(rewards("kl", 1.0), rewards("kl", None))
    close(rewards("maxent_length", 0.0), rewards("maxent_length", None))
    # The twin: the masked reward stays when padding is added, the filled one drifts with it, by beta * 7 /
    # |y| for 7 more positions.
    wide = [F.pad(x, (0, 7)) for x in (logprobs, ref, mask)]
    drifts = [(None, [[0.0, 0.0, 0.0]]), (1.0, [[-0.1 * 7 / 20, -0.1 * 7 / 10, -0.1 * 7 / 53]])]
    for fill, drift in drifts:
        wider = rlhf_reward(scores, *wide, {"score": 1.0, "maxent_length": beta}, fill)[0]
        close(wider - rewards("maxent_length", fill), drift)


@pytest.mark.parametrize("fill", [None, 1.0])
def test_summed_has_no_gradient(fill):
    logprobs = LOGPROBS.clone().requires_grad_()
    assert not summed(logprobs, MASK, fill).requires_grad
    close(summed(logprobs, MASK, fill), [[-3.0, -6.0]] if fill is None else [[-1.0, -6.0]])


# --- the reward as it is written


@pytest.mark.parametrize("text, expected", [
    ("kl", {"score": 1.0, "kl": COEFFICIENT}),
    ("kl:0.05+maxent_length:0.1", {"score": 1.0, "kl": 0.05, "maxent_length": 0.1}),
    ("maxent_length:0.1+kl", {"score": 1.0, "maxent_length": 0.1, "kl": 0.05}),
    ("maxent:1e-2", {"score": 1.0, "maxent": 0.01}),
    ("kl:0", {"score": 1.0, "kl": 0.0}),
    ("kl:-0.5", {"score": 1.0, "kl": -0.5}),
    ("score:0", {"score": 0.0}),
    ("score", {"score": 1.0}),
    ("minent_length:2+score:0.5", {"score": 0.5, "minent_length": 2.0}),
    (" kl: 0.1 + maxent:0.2 ", {"score": 1.0, "kl": 0.1, "maxent": 0.2}),
])
def test_parse_reward(text, expected):
    assert parse_reward(text) == expected


def test_the_coefficient_of_a_term_without_one():
    assert COEFFICIENT == 0.05


@pytest.mark.parametrize("text, message", [
    ("kl+entropy", "no term 'entropy'; known: score, kl, maxent, maxent_length, minent_length, as in"),
    ("kl+", "no term ''"),
    ("", "no term ''"),
    (" ", "no term ''"),
    (":0.1", "no term ''"),
    ("kl : 0.1", "no term 'kl '"),
    ("KL", "no term 'KL'"),
    ("kl+kl", "names 'kl' twice"),
    ("kl:0.05+maxent+kl:0.1", "names 'kl' twice"),
    ("score:0+score:1", "names 'score' twice"),
    ("kl:much", "'much' is no coefficient; it takes a number, as in kl:0.1"),
    ("kl:0.1:0.2", "'0.1:0.2' is no coefficient"),
    ("kl:nan", "'nan' is no coefficient"),
    ("maxent:inf", "'inf' is no coefficient"),
    ("score:-inf", "'-inf' is no coefficient"),
])
def test_a_reward_that_cannot_be_read_is_named(text, message):
    """One line, with the text as it was given."""
    with pytest.raises(UserError) as error:
        parse_reward(text)
    assert str(error.value).startswith(f"--reward={text}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


# --- missing EOS


@pytest.mark.parametrize(
    "rule, penalty, expected",
    [
        ("replace", 1.0, [[3.0, -1.0]]),
        ("subtract", 1.0, [[3.0, 4.0]]),
        ("subtract", 2.5, [[3.0, 2.5]]),
        ("none", 1.0, [[3.0, 5.0]]),
    ],
)
def test_missing_eos(rule, penalty, expected):
    close(
        missing_eos(torch.tensor([[3.0, 5.0]]), torch.tensor([[True, False]]), rule=rule, penalty=penalty),
        expected,
    )


def test_unknown_missing_eos_rule():
    with pytest.raises(UserError, match="unknown missing-EOS rule 'clip'; known: replace, subtract, none"):
        missing_eos(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), rule="clip", penalty=1.0)
