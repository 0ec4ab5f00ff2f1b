"""The losses that the paper is about: identities between them; and what the signature of a loss says."""

import math

import pytest
import torch
import torch.nn.functional as F

import train_simpo
from rlhf.config import UserError
from rlhf.losses import (
    PREFERENCE_LOSSES,
    RANKED,
    defaults,
    describe,
    dpo,
    dpo_length,
    extras,
    ipo,
    loss_options,
    needs_reference,
    simpo,
    simpo_pl,
)
from tests.loss_batches import WRONG, batch, gradient

torch.set_num_threads(1)
PAPER = ["dpo", "simpo", "simpo_pl", "ipo", "dpo_length"]  # of all: test_loss_family.py


def assert_same(ours, theirs, x):
    """Equal values and equal gradients in `x`."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(ours, x), gradient(theirs, x), rtol=1e-12, atol=1e-12)


def assert_differ(ours, theirs):
    """The twin that must fail: a wrong formula is off by far more than rounding."""
    assert (ours - theirs).abs().max() > WRONG


# --- identities


def test_gamma_beta_ratio_of_the_simpo_repository():
    """-log sigmoid(beta (m_w - m_l - ratio)) there is gamma = ratio * beta here."""
    x, _, mask = batch()
    means = torch.where(mask, x, 0).sum(-1) / mask.sum(-1)
    repository = -F.logsigmoid(2.5 * (means[:, 0] - means[:, 1] - 0.3))
    assert_same(simpo(x, None, mask, beta=2.5, gamma=0.3 * 2.5)[0].mean(), repository.mean(), x)
    assert_differ(simpo(x, None, mask, beta=2.5, gamma=0.3)[0].mean(), repository.mean())


@pytest.mark.parametrize("name", ["dpo", "dpo_length"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_policy_equal_to_reference_gives_ln_2(name, label_smoothing):
    x, _, mask = batch()
    losses, rewards = PREFERENCE_LOSSES[name](x, x.detach(), mask, beta=0.3, label_smoothing=label_smoothing)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)))
    assert rewards.abs().max() == 0


def test_ipo_of_policy_equal_to_reference():
    x, _, mask = batch()
    # (1 / 0.5)^2
    torch.testing.assert_close(
        ipo(x, x.detach(), mask, beta=0.25)[0], torch.full((7,), 4.0, dtype=torch.float64)
    )


@pytest.mark.parametrize("gamma", [0.0, 0.6])
def test_simpo_pl_equals_simpo_at_two_responses(gamma):
    x, _, mask = batch()
    pl, pair = (f(x, None, mask, beta=2.0, gamma=gamma) for f in (simpo_pl, simpo))
    assert_same(pl[0].mean(), pair[0].mean(), x)
    torch.testing.assert_close(pl[0], pair[0])
    torch.testing.assert_close(pl[1], pair[1])
    if gamma:
        assert_differ(simpo_pl(x, None, mask, beta=2.0, gamma=2 * gamma)[0].mean(), pair[0].mean())


def test_simpo_pl_of_three_by_hand():
    """s = (ln 4, ln 2, ln 1), margin ln 2: the first choice is 2/(2+2+1), the second 1/(1+1), the last is
    certain."""
    x = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64).log()[None, :, None]
    losses, rewards = simpo_pl(x, None, torch.ones(1, 3, 1, dtype=torch.bool), beta=1.0, gamma=math.log(2))
    assert losses.item() == pytest.approx(-math.log(2 / 5 * 1 / 2))
    torch.testing.assert_close(rewards, x[..., 0])


def test_dpo_length_is_simpo_with_the_margin_of_the_reference():
    x, ref, mask = batch()
    # (N,)
    reference_margins = simpo(ref, None, mask, beta=2.0)[1] @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    ours = dpo_length(x, ref, mask, beta=2.0, gamma=0.4)[0]
    for i, margin in enumerate(reference_margins.tolist()):
        assert_same(ours[i], simpo(x[i:i + 1], None, mask[i:i + 1], beta=2.0, gamma=0.4 + margin)[0][0], x)


@pytest.mark.parametrize("name", PAPER)
def test_gradient_prefers_the_chosen_response(name):
    """Where the policy is still the reference, the step raises the log-probs of the chosen and lowers those
    of the rejected response."""
    x, _, mask = batch()
    g = gradient(PREFERENCE_LOSSES[name](x, x.detach(), mask, beta=0.7)[0].sum(), x)
    assert (g[:, 0][mask[:, 0]] < 0).all() and (g[:, 1][mask[:, 1]] > 0).all()


# --- what a signature says


def new_loss(logprobs, _, mask, *, tau=0.25, gamma=1.5):
    """A fork."""


def new_loss_with_reference(logprobs, ref_logprobs, mask):
    """Another, without options."""


DEFAULTS = {
    "dpo": {"beta": 0.05, "label_smoothing": 0.0},
    "simpo": {"beta": 2.0, "gamma": 0.5, "label_smoothing": 0.0}, "simpo_pl": {"beta": 2.0, "gamma": 0.5},
    "ipo": {"beta": 0.05}, "dpo_length": {"beta": 2.0, "gamma": 0.0, "label_smoothing": 0.0},
    "ipo_length": {"beta": 0.1}, "dpo_free": {"beta": 0.1, "label_smoothing": 0.0},
    "cpo": {"beta": 0.1, "sft_coef": 1.0, "label_smoothing": 0.0},
    "cpo_mean": {"beta": 0.1, "sft_coef": 1.0, "label_smoothing": 0.0},
    "orpo": {"alpha": 0.1, "sft_coef": 1.0}, "slic": {"delta": 1.0, "sft_coef": 0.1}, "hinge": {"beta": 0.05},
    "rrhf": {"sft_coef": 1.0}, "chipo": {"beta": 0.05, "r_max": math.inf},
    "alphapo": {"beta": 2.5, "alpha": 0.25, "gamma": 0.25},
    "gammapo": {"beta": 10.0, "gamma": 4.0, "tau": 10.0},
    "gammapo_dpo": {"beta": 0.1, "gamma": 4.0, "tau": 10.0}, "confpo": {"beta": 1.5, "gamma": 1.6},
    "amopo": {"beta": 0.8, "gamma": 2.0}, "cringe": {"gamma": 0.0, "alpha": 1.0, "tau": 1.0, "top_k": 1},
    "osp": {"beta": 0.1, "label_smoothing": 0.0}, "vpo": {"beta": 0.1, "alpha": 0.1},
    "srpo": {"beta": 0.1, "alpha": 0.5},
}
HAVE_GAMMA = "simpo, simpo_pl, dpo_length, alphapo, gammapo, gammapo_dpo, confpo, amopo, cringe"
HAVE_SMOOTHING = "dpo, simpo, dpo_length, dpo_free, cpo, cpo_mean, osp"


def test_defaults_and_references_are_read_from_the_signature():
    assert {name: defaults(loss) for name, loss in PREFERENCE_LOSSES.items()} == DEFAULTS
    assert {name for name in PAPER if needs_reference(PREFERENCE_LOSSES[name])} == {
        "dpo", "ipo", "dpo_length",
    }
    assert RANKED == {"simpo_pl", "rrhf"}
    assert defaults(new_loss) == {"tau": 0.25, "gamma": 1.5} and not needs_reference(new_loss)
    assert defaults(new_loss_with_reference) == {} and needs_reference(new_loss_with_reference)


def test_signatures_say_what_a_loss_reads():
    reading = {name for name in PREFERENCE_LOSSES if needs_reference(PREFERENCE_LOSSES[name])}
    assert reading == {
        "dpo", "dpo_length", "ipo", "ipo_length", "hinge", "chipo", "gammapo_dpo", "osp", "vpo", "srpo"}
    logprobs, ref_logprobs, mask = batch()
    for name in PREFERENCE_LOSSES:
        losses = PREFERENCE_LOSSES[name](logprobs, ref_logprobs, mask)[0]
        twice = 2 * ref_logprobs if name in reading else None
        other = PREFERENCE_LOSSES[name](logprobs, twice, mask)[0]
        assert torch.equal(losses, other) == (name not in reading)
    assert extras(PREFERENCE_LOSSES["amopo"]) == {"objectives", "noise"}
    assert extras(PREFERENCE_LOSSES["dpo"]) == set()
    for name in PREFERENCE_LOSSES:
        options = defaults(PREFERENCE_LOSSES[name])
        assert options.keys() <= set(train_simpo.OPTIONS)
        assert all(isinstance(value, (int, float)) for value in options.values())
        assert f"  {name} " in describe(PREFERENCE_LOSSES)


def test_loss_options():
    assert {name: loss_options(name, {}) for name in PREFERENCE_LOSSES} == DEFAULTS
    unset = {"beta": None, "gamma": None, "label_smoothing": None}
    assert loss_options("ipo", unset) == {"beta": 0.05}
    assert loss_options("simpo", {**unset, "gamma": 0.0}) == {
        "beta": 2.0, "gamma": 0.0, "label_smoothing": 0.0,
    }
    assert loss_options("dpo", {**unset, "beta": 0.3}) == {"beta": 0.3, "label_smoothing": 0.0}


@pytest.mark.parametrize(
    "name, given, message",
    [
        ("dpo", {"gamma": 0.5}, "--gamma: the loss dpo has none; these have it: " + HAVE_GAMMA),
        ("ipo", {"gamma": 0.5}, "--gamma: the loss ipo has none; these have it: " + HAVE_GAMMA),
        (
            "ipo",
            {"label_smoothing": 0.1},
            "--label_smoothing: the loss ipo has none; these have it: " + HAVE_SMOOTHING,
        ),
        (
            "simpo_pl",
            {"beta": 1.0, "label_smoothing": 0.1},
            "--label_smoothing: the loss simpo_pl has none; these have it: " + HAVE_SMOOTHING,
        ),
        ("dpo", {"gamma": 0.0}, "--gamma: the loss dpo has none; these have it: " + HAVE_GAMMA),
        ("kto", {}, "--loss=kto: known are " + ", ".join(DEFAULTS)),
    ],
)
def test_an_option_the_loss_does_not_have_is_an_error_that_names_those_that_do(name, given, message):
    with pytest.raises(UserError) as error:
        loss_options(name, given)
    assert str(error.value) == message


def test_a_new_loss_is_one_dict_entry(monkeypatch):
    monkeypatch.setitem(PREFERENCE_LOSSES, "new", new_loss)
    assert loss_options("new", {"gamma": 2.0, "beta": None}) == {"tau": 0.25, "gamma": 2.0}
    with pytest.raises(UserError, match=f"these have it: {HAVE_GAMMA}, new"):
        loss_options("ipo", {"gamma": 0.5})
    with pytest.raises(UserError, match="known are dpo, .*, new"):
        loss_options("newer", {})


def test_describe():
    losses = {"dpo": dpo, "simpo_pl": simpo_pl, "new": new_loss}
    assert describe(losses).splitlines() == [
        "losses and the defaults of their options:",
        "  dpo       beta 0.05, label_smoothing 0; reads a reference", "  simpo_pl  beta 2, gamma 0.5",
        "  new       tau 0.25, gamma 1.5",
    ]
