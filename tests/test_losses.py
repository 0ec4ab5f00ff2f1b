"""Preference losses against TRL 1.16 (values and gradients), against the papers' formulas, and against their
own identities."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from rlhf.config import UserError
from rlhf.losses import (
    PREFERENCE_LOSSES,
    RANKED,
    bradley_terry_loss,
    defaults,
    describe,
    dpo,
    dpo_length,
    ipo,
    loss_options,
    needs_reference,
    simpo,
    simpo_pl,
)

torch.set_num_threads(1)
PAPER = ["dpo", "simpo", "simpo_pl", "ipo", "dpo_length"]  # the others: test_loss_family.py


def batch(N=6, K=2, R=9, seed=0):
    """Per-token log-probs of policy and reference and a mask with uneven lengths, float64; the padding holds
    garbage."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, R + 1, (N, K), generator=g)
    lengths[0] = torch.arange(K) % R + 1  # at least one group is uneven
    mask = torch.arange(R) < lengths[..., None]  # (N, K, R)
    logprobs, ref_logprobs = (-3 * torch.rand(N, K, R, generator=g, dtype=torch.float64) for _ in range(2))
    return torch.where(mask, logprobs, 5.0).requires_grad_(), torch.where(mask, ref_logprobs, -9.0), mask


def gradient(loss, x):
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


def assert_same(ours, theirs, x):
    """Equal values and equal gradients in `x`."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(ours, x), gradient(theirs, x), rtol=1e-12, atol=1e-12)


def assert_differ(ours, theirs):
    """The twin that must fail: a wrong formula is off by far more than rounding."""
    assert (ours - theirs).abs().max() > 1e-3


# --- TRL


@pytest.fixture(scope="module")
def trl():
    pytest.importorskip("trl", reason="trl is not installed: the losses are not compared with TRL")
    from trl import DPOTrainer, RewardTrainer
    from trl.experimental.cpo import CPOTrainer
    return SimpleNamespace(dpo=DPOTrainer._compute_loss, reward=RewardTrainer.compute_loss,
                           cpo=CPOTrainer.cpo_loss, logps=CPOTrainer.get_batch_logps)


def trainer(model, **fields):
    """The part of a TRL trainer that its loss functions read."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    metrics = {"train": defaultdict(list)}
    return SimpleNamespace(
        model=model, accelerator=accelerator, _metrics=metrics, _total_train_tokens=0, _tp_size=1, **fields
    )


class Model:
    """Stands for a model: returns the given outputs whatever it is asked."""

    training, is_gradient_checkpointing = True, False

    def __init__(self, **outputs):
        self.outputs = SimpleNamespace(**outputs)

    def __call__(self, **inputs):
        return self.outputs


def trl_dpo(trl, loss_type, logprobs, ref_logprobs, mask, beta, label_smoothing=0.0):
    """DPOTrainer's loss and the metrics that it logs; its rows are [chosen; rejected], each with one prompt
    token before the response."""
    def rows(x):  # (N, 2, R) -> (2N, R)
        return torch.cat([x[:, 0], x[:, 1]])

    def model(values):
        zero = torch.zeros_like(rows(values))
        return Model(
            log_probs=torch.where(rows(mask), rows(values), 0), entropy=zero, mean_logits=zero,
            is_top1=zero.bool(),
        )

    completion_mask = F.pad(rows(mask), (1, 0)).long()  # (2N, 1 + R)
    inputs = {
        "input_ids": completion_mask, "attention_mask": completion_mask, "completion_mask": completion_mask,
    }
    self = trainer(
        model(logprobs), ref_model=model(ref_logprobs), precompute_ref_logps=False, aux_loss_enabled=False,
        ld_alpha=None, use_weighting=False, f_divergence_type="reverse_kl", loss_types=[loss_type],
        loss_weights=[1.0], beta=beta, label_smoothing=label_smoothing,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )
    return trl.dpo(self, self.model, inputs, False), {
        key: value[0] for key, value in self._metrics["train"].items()
    }


def trl_simpo(trl, mean_logprobs, beta, gamma, label_smoothing=0.0):
    """CPOTrainer's losses (N,) and rewards (N, 2) with loss_type="simpo" from (N, 2) means; its NLL term,
    cpo_alpha, is added elsewhere."""
    self = trainer(
        None, alpha=0.0, loss_type="simpo", beta=beta, simpo_gamma=gamma, label_smoothing=label_smoothing
    )
    losses, chosen, rejected = trl.cpo(self, mean_logprobs[:, 0], mean_logprobs[:, 1])
    return losses, torch.stack([chosen, rejected], 1)


def test_dpo_equals_trl(trl):
    x, ref, mask = batch()
    losses, rewards = dpo(x, ref, mask, beta=0.3)
    theirs, metrics = trl_dpo(trl, "sigmoid", x, ref, mask, beta=0.3)
    assert_same(losses.mean(), theirs, x)
    assert metrics["rewards/chosen"] == pytest.approx(rewards[:, 0].mean().item(), abs=1e-12)
    assert metrics["rewards/margins"] == pytest.approx(
        (rewards[:, 0] - rewards[:, 1]).mean().item(), abs=1e-12
    )
    assert not rewards.requires_grad
    assert_differ(dpo_length(x, ref, mask, beta=0.3)[0].mean(), theirs)  # means in the place of sums


@pytest.mark.parametrize("label_smoothing", [0.1, 0.5])
def test_dpo_label_smoothing_equals_trl(trl, label_smoothing):
    """TRL 1.16 ignores label_smoothing under loss_type="sigmoid". The same conservative formula is in its
    "aot", which sorts the batch first: one pair at a time, the sort does nothing."""
    x, ref, mask = batch()
    ours = dpo(x, ref, mask, beta=0.3, label_smoothing=label_smoothing)[0]
    for i in range(len(x)):
        pair = x[i:i + 1], ref[i:i + 1], mask[i:i + 1]
        assert_same(ours[i], trl_dpo(trl, "aot", *pair, 0.3, label_smoothing)[0], x)
    ignored = trl_dpo(trl, "sigmoid", x, ref, mask, 0.3, label_smoothing)[0]
    assert_same(dpo(x, ref, mask, beta=0.3)[0].mean(), ignored, x)
    assert_differ(ours.mean(), ignored)


def test_dpo_length_equals_trl_sigmoid_norm(trl):
    x, ref, mask = batch()
    theirs, metrics = trl_dpo(trl, "sigmoid_norm", x, ref, mask, beta=5.0)
    losses, rewards = dpo_length(x, ref, mask, beta=5.0)
    assert_same(losses.mean(), theirs, x)
    assert_differ(dpo(x, ref, mask, beta=5.0)[0].mean(), theirs)  # sums in the place of means
    # The rewards that TRL logs for this loss are those of DPO, sums; ours are those that are in the loss.
    margins = [r[:, 0].sub(r[:, 1]).mean().item() for r in (dpo(x, ref, mask, beta=5.0)[1], rewards)]
    assert metrics["rewards/margins"] == pytest.approx(margins[0], abs=1e-12)
    assert abs(margins[0] - margins[1]) > 0.1


def test_ipo_differs_from_trl_on_purpose(trl):
    """Eq. 17 of the IPO paper is about log-probs of whole responses: sums, as here and in the DPO repository.
    TRL takes token means (confirmed there with the authors as what their experiments used). One pair, 4
    tokens against 2, log-ratios 2.0 and 0.4, tau = 0.5: sums (2.0 - 0.4 - 1)^2 = 0.36, means (0.5 - 0.2 -
    1)^2 = 0.49."""
    mask = torch.tensor([[[True] * 4, [True] * 2 + [False] * 2]])
    x = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.0, 0.0]]], dtype=torch.float64) - 1
    ref = torch.full_like(x, -1.0)
    losses, rewards = ipo(x, ref, mask, beta=0.5)
    assert losses.item() == pytest.approx(0.36)
    assert rewards.tolist() == [pytest.approx([1.0, 0.2])]
    assert trl_dpo(trl, "ipo", x, ref, mask, beta=0.5)[0].item() == pytest.approx(0.49)
    x, ref, _ = batch()
    # all of 4 tokens: the means with tau are the sums with tau/4, up to the factor 4^2
    even = torch.arange(9).lt(4).expand(x.shape)
    assert_same(ipo(x, ref, even, beta=0.3)[0].mean() / 16, trl_dpo(trl, "ipo", x, ref, even, beta=1.2)[0], x)


@pytest.mark.parametrize("gamma, label_smoothing", [(0.0, 0.0), (0.7, 0.0), (0.7, 0.1)])
def test_simpo_equals_trl_from_logits(trl, gamma, label_smoothing):
    """From random logits: TRL's own averaging (get_batch_logps) and its CPOTrainer loss, against ours on the
    gathered log-probs."""
    g = torch.Generator().manual_seed(1)
    mask = batch()[2]
    # a prompt token, then R; V = 11
    logits = torch.randn(6, 2, 1 + 9, 11, generator=g, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 11, (6, 2, 9), generator=g)
    labels = F.pad(torch.where(mask, ids, -100), (1, 0), value=-100)
    means = torch.stack(
        [trl.logps(logits[:, k], labels[:, k].clone(), average_log_prob=True) for k in range(2)], 1
    )
    theirs, their_rewards = trl_simpo(trl, means, 2.0, gamma, label_smoothing)
    logprobs = logits[:, :, :-1].log_softmax(-1).gather(-1, ids[..., None])[..., 0]  # (N, 2, R)
    ours, our_rewards = simpo(logprobs, None, mask, beta=2.0, gamma=gamma, label_smoothing=label_smoothing)
    assert_same(ours.mean(), theirs.mean(), logits)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_rewards, their_rewards)
    sums = torch.stack([trl.logps(logits[:, k], labels[:, k].clone()) for k in range(2)], 1)
    assert_differ(ours.mean(), trl_simpo(trl, sums, 2.0, gamma, label_smoothing)[0].mean())
    if gamma:
        # gamma scaled by beta
        assert_differ(ours.mean(), trl_simpo(trl, means, 2.0, 2.0 * gamma, label_smoothing)[0].mean())


def test_gamma_beta_ratio_of_the_simpo_repository():
    """-log sigmoid(beta (m_w - m_l - ratio)) there is gamma = ratio * beta here."""
    x, _, mask = batch()
    means = torch.where(mask, x, 0).sum(-1) / mask.sum(-1)
    repository = -F.logsigmoid(2.5 * (means[:, 0] - means[:, 1] - 0.3))
    assert_same(simpo(x, None, mask, beta=2.5, gamma=0.3 * 2.5)[0].mean(), repository.mean(), x)
    assert_differ(simpo(x, None, mask, beta=2.5, gamma=0.3)[0].mean(), repository.mean())


def test_bradley_terry_equals_trl(trl):
    g = torch.Generator().manual_seed(2)
    scores = torch.randn(10, 1, generator=g, dtype=torch.float64, requires_grad=True)  # [chosen; rejected]
    self = trainer(Model(logits=scores), args=SimpleNamespace(center_rewards_coefficient=None))
    theirs = trl.reward(self, self.model, {"attention_mask": torch.ones(10, 3)})
    chosen, rejected = scores[:5, 0], scores[5:, 0]
    assert_same(bradley_terry_loss(chosen, rejected).mean(), theirs, scores)
    assert_differ(bradley_terry_loss(rejected, chosen).mean(), theirs)
    # p = 3/4
    assert bradley_terry_loss(torch.tensor([math.log(3.0)]), torch.tensor([0.0])).item() == pytest.approx(
        math.log(4 / 3)
    )


# --- identities


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
        ipo(x, x.detach(), mask, beta=0.25)[0], torch.full((6,), 4.0, dtype=torch.float64)
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
def test_padding_changes_nothing(name):
    """More padding, filled with nan: same losses, same gradients, none in the padding."""
    x, ref, mask = batch()
    padded = F.pad(x.detach(), (0, 3), value=float("nan")).requires_grad_()
    short, long = (PREFERENCE_LOSSES[name](a, b, m, beta=0.7)[0] for a, b, m in
                   [(x, ref, mask), (padded, F.pad(ref, (0, 3), value=float("nan")), F.pad(mask, (0, 3)))])
    torch.testing.assert_close(short, long, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(
        gradient(short.sum(), x), gradient(long.sum(), padded)[..., :-3], rtol=1e-14, atol=1e-14
    )
    assert (gradient(long.sum(), padded)[~F.pad(mask, (0, 3))] == 0).all()


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


@pytest.mark.parametrize("name", PAPER)
def test_a_loss_reads_the_reference_that_its_signature_names_and_no_other(name):
    """Without one, it is called with None; with one, another reference is another loss."""
    loss = PREFERENCE_LOSSES[name]
    x, ref, mask = batch()
    if needs_reference(loss):
        assert_differ(loss(x, ref, mask)[0], loss(x, ref.flip(1), mask)[0])
    else:
        assert torch.equal(loss(x, None, mask)[0], loss(x, ref, mask)[0])


@pytest.mark.parametrize("name", PAPER)
def test_every_option_matters_and_its_default_is_what_leaving_it_out_means(name):
    loss = PREFERENCE_LOSSES[name]
    x, ref, mask = batch()
    expected = loss(x, ref, mask)[0]
    assert torch.equal(loss(x, ref, mask, **defaults(loss))[0], expected)
    for option, default in defaults(loss).items():
        assert_differ(loss(x, ref, mask, **{option: default + 0.3})[0], expected)


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


# --- errors


@pytest.mark.parametrize("name", PAPER)
def test_group_size_is_checked(name):
    x, ref, mask = batch(K=3)
    if name not in RANKED:
        with pytest.raises(
            UserError, match="compares 2 responses per prompt, got 3; use simpo_pl for rankings"
        ):
            PREFERENCE_LOSSES[name](x, ref, mask, beta=1.0)
    with pytest.raises(UserError, match="2 responses per prompt, got 1"):
        PREFERENCE_LOSSES[name](x[:, :1], ref[:, :1], mask[:, :1], beta=1.0)
