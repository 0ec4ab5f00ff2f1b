"""What is special about each preference loss: limits, special cases, zero gradients; and TRL's numbers."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from rlhf.losses import PREFERENCE_LOSSES as LOSSES
from rlhf.pair_losses import dynamic_margins, log1mexp
from tests.loss_batches import A_REF, WRONG, A, batch, call, close, gradient, padded

torch.set_num_threads(1)


def test_dpo_free_is_dpo_with_a_constant_reference():
    logprobs, _, mask = batch()
    free = LOSSES["dpo_free"](logprobs, None, mask, beta=0.3)[0]
    against_zero = LOSSES["dpo"](logprobs, torch.zeros_like(logprobs), mask, beta=0.3)[0]
    torch.testing.assert_close(free, against_zero)
    torch.testing.assert_close(gradient(free.sum(), logprobs), gradient(against_zero.sum(), logprobs))
    reference = LOSSES["dpo"](logprobs, batch(seed=1)[0].detach().nan_to_num(-1), mask, beta=0.3)[0]
    assert (free - reference).abs().max() > WRONG


@pytest.mark.parametrize("name, power", [("cpo", 0), ("cpo_mean", 1)])
def test_cpo_is_sft_where_its_weight_is_large(name, power):
    """The gradient is parallel to that of the NLL, of sums or of means."""
    logprobs, _, mask = batch()
    found = gradient(LOSSES[name](logprobs, None, mask, sft_coef=1e9)[0].sum(), logprobs)[:, 0] / 1e9
    sft = -mask[:, 0].double() / mask[:, 0].sum(-1, keepdim=True) ** power
    torch.testing.assert_close(found, sft, rtol=1e-6, atol=1e-8)
    assert (found + mask[:, 0].double() / mask[:, 0].sum(-1, keepdim=True) ** (1 - power)).abs().max() > WRONG


def test_slope_of_the_odds_and_of_alphapo():
    """d log-odds / dm is 1 / (1 - e^m), dr / dm is beta e^(-alpha m), on the chosen responses."""
    m = torch.tensor([[-1.0, -1.5], [-1.15, -0.8]], dtype=torch.float64, requires_grad=True)
    slope = gradient((m - log1mexp(m)).sum(), m)[:, 0]
    assert slope.tolist() == [pytest.approx(1.581977, abs=6e-7), pytest.approx(1.463351, abs=6e-7)]
    x = m[..., None]
    losses, rewards = LOSSES["alphapo"](x, None, torch.ones(2, 2, 1, dtype=torch.bool))
    chosen = gradient(losses.sum(), m)[:, 0] / -torch.sigmoid(0.25 - rewards[:, 0] + rewards[:, 1])
    assert chosen.tolist() == [pytest.approx(3.210064, abs=6e-7), pytest.approx(3.332726, abs=6e-7)]


def test_alphapo_without_alpha_is_simpo():
    logprobs, _, mask = batch()
    options = {"beta": 2.5, "gamma": 0.25}
    simpo = LOSSES["simpo"](logprobs, None, mask, **options)[0]
    for alpha, tolerance in ((0.0, 1e-12), (1e-7, 1e-6)):
        ours = LOSSES["alphapo"](logprobs, None, mask, alpha=alpha, **options)[0]
        torch.testing.assert_close(ours, simpo, rtol=0, atol=tolerance)
    assert (LOSSES["alphapo"](logprobs, None, mask, **options)[0] - simpo).abs().max() > WRONG


def test_slic_and_hinge_have_no_gradient_beyond_the_margin():
    logprobs, mask = padded([[[-1.0], [-3.0]], [[-1.0], [-1.5]]])
    logprobs.requires_grad_()
    zero = torch.zeros_like(logprobs)
    for name, options in (("slic", {"delta": 1.0}), ("hinge", {"beta": 1.0})):
        found = gradient(LOSSES[name](logprobs, zero, mask, **options)[0].sum(), logprobs)
        assert found[:, :, 0].tolist() == [[0, 0], [-1, 1]], name


def test_slic_is_the_hinge_at_one_over_its_scale():
    """max(0, 1 - beta (w - l)) = beta max(0, 1/beta - (w - l))"""
    logprobs, _, mask = batch()
    hinge = LOSSES["hinge"](logprobs, torch.zeros_like(logprobs), mask, beta=0.2)[0]
    torch.testing.assert_close(hinge, 0.2 * LOSSES["slic"](logprobs, None, mask, delta=5.0)[0])
    assert (hinge - LOSSES["slic"](logprobs, None, mask, delta=5.0)[0]).abs().max() > WRONG


def test_rrhf_of_three_by_hand_and_of_two():
    s = torch.tensor([[[-1.0], [-1.4], [-0.9]]], dtype=torch.float64)
    ones = torch.ones(1, 3, 1, dtype=torch.bool)
    rrhf = LOSSES["rrhf"]
    assert rrhf(s, None, ones, sft_coef=0.0, scores=torch.tensor([[2, 1, 0]]))[0].item() == close(0.6)
    assert rrhf(s, None, ones, sft_coef=0.0)[0].item() == close(0.6)  # the order is the ranking
    assert rrhf(s, None, ones, scores=torch.tensor([[0, 2, 1]]))[0].item() == close(0.4 + 0.5 + 1.4)
    assert rrhf(s, None, ones, sft_coef=0.0, scores=torch.tensor([[1, 1, 1]]))[0].item() == 0
    logprobs, _, mask = batch()
    mean_logprobs = torch.where(mask, logprobs, 0).sum(-1) / mask.sum(-1)
    ones = torch.ones(7, 2, 1, dtype=torch.bool)
    slic = LOSSES["slic"](mean_logprobs[..., None], None, ones, delta=0.0)[0]
    torch.testing.assert_close(rrhf(logprobs, None, mask, sft_coef=0.0)[0], slic)
    assert (slic - LOSSES["slic"](logprobs, None, mask, delta=0.0)[0]).abs().max() > WRONG  # sums


def test_chipo_near_the_reference_is_dpo_at_twice_beta():
    logprobs, _, mask = batch()
    near = logprobs.detach() + 1e-4 * torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(0))
    chipo = LOSSES["chipo"](logprobs, near, mask, beta=0.3)[0]
    torch.testing.assert_close(chipo, LOSSES["dpo"](logprobs, near, mask, beta=0.6)[0], rtol=0, atol=1e-6)
    twin = LOSSES["dpo"](logprobs, near, mask, beta=0.3)[0]  # without the log term
    assert (gradient(chipo.sum(), logprobs) - gradient(twin.sum(), logprobs)).nan_to_num().abs().max() > WRONG


def test_chipo_clips_the_margin():
    logprobs, mask = padded([[[-1.0], [-9.0]]])
    logprobs.requires_grad_()
    reference = torch.full_like(logprobs, -5.0)
    losses = LOSSES["chipo"](logprobs, reference, mask, beta=1.0, r_max=0.5)[0]
    assert losses.item() == close(math.log1p(math.exp(-1.0)))
    assert (gradient(losses.sum(), logprobs) == 0).all()
    assert LOSSES["chipo"](logprobs, reference, mask, beta=1.0)[0].item() < 1e-6


def test_margins_of_gammapo():
    r = torch.tensor([-1.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    margins = dynamic_margins(r, 4.0, 10.0)
    assert margins.tolist() == [pytest.approx(x, abs=6e-6) for x in (3.89079, 3.90981, 3.95665, 4.24275)]
    assert margins.mean().item() == close(4.0)
    p = margins / 16  # the fixed point
    torch.testing.assert_close(p, (-4.0 * torch.sigmoid(margins - r) / 10.0).softmax(0), rtol=1e-5, atol=0)
    assert (p - (4.0 * torch.sigmoid(margins - r) / 10.0).softmax(0)).abs().max() > WRONG  # the other sign
    torch.testing.assert_close(dynamic_margins(r, 4.0, 1e12), torch.full_like(r, 4.0))


def test_gammapo_of_dpo_has_centred_margins():
    logprobs, ref_logprobs, mask = batch()
    losses, rewards = LOSSES["gammapo_dpo"](logprobs, ref_logprobs, mask, beta=0.3, gamma=4.0, tau=1.0)
    gaps = rewards[:, 0] - rewards[:, 1]
    used = gaps + (losses.expm1()).log()  # loss = log(1 + exp(margin - gap))
    assert used.mean().item() == close(0.0, 1e-7) and used.std() > 0.1
    torch.testing.assert_close(used + 4.0, dynamic_margins(gaps, 4.0, 1.0), rtol=1e-6, atol=1e-6)


def test_confpo_trains_only_what_the_policy_is_unsure_of():
    logprobs, mask = padded(A)
    logprobs.requires_grad_()
    found = gradient(LOSSES["confpo"](logprobs, None, mask)[0].sum(), logprobs) != 0
    assert found.tolist() == [
        [[False, True, True, True, False], [False, False, True, False, False]],
        [[True, False, False, False, False], [False, True, True, False, True]]]
    for equal in ([-1.0], [-0.3] * 7, [-2.7] * 3):
        assert call("confpo", [[equal, [-1.0, -2.0]]], A_REF) == [0.0]


def test_amopo_weighs_objectives():
    logprobs, _, mask = batch()
    amopo, simpo = (partial(LOSSES[name], logprobs, None, mask) for name in ("amopo", "simpo"))
    torch.testing.assert_close(amopo()[0], simpo(beta=0.8, gamma=2.0)[0])
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(7, 2, 2, generator=g, dtype=torch.float64)
    both = torch.tensor([1.0, -0.5], dtype=torch.float64).expand(7, 2)
    losses = amopo(objectives=both, noise=noise)[0]
    forth, back = (amopo(objectives=both[:, j:j + 1])[0] for j in range(2))
    weight = ((losses - back) / (forth - back)).detach()
    assert ((0 < weight) & (weight < 1)).all() and weight.std() > WRONG
    torch.testing.assert_close(amopo(objectives=both)[0], (forth + back) / 2)  # no noise: equal weights
    undecided = amopo(objectives=torch.zeros(7, 3, dtype=torch.float64))[0]
    assert (undecided == 0).all()


def test_contrast_of_cringe():
    """Logits 2, 1, 0, -1 and the first as the rejected token: softplus(1). A wide margin closes the gate."""
    logp = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64).log_softmax(0)
    mask = torch.ones(1, 2, 1, dtype=torch.bool)
    cringe = LOSSES["cringe"]
    x = torch.stack([torch.zeros_like(logp[:1]), logp[:1]])[None]  # (1, 2, 1): a certain chosen token
    competitors = logp[1:].view(1, 1, 3)
    gate = torch.sigmoid(logp[0]).item()
    assert cringe(x, None, mask, competitors=competitors)[0].item() == close(gate * 1.313262, 1e-6)
    softplus, weights = F.softplus(logp[0] - logp[1:3]), logp[1:3].softmax(0)
    two = cringe(x, None, mask, competitors=competitors, top_k=2)[0].item()
    assert two == close(gate * (softplus @ weights).item())
    assert abs(two - gate * 1.313262) > WRONG
    for gamma, share in ((-1e4, 0.0), (1e4, 1.0)):
        loss = cringe(x, None, mask, competitors=competitors, gamma=gamma)[0].item()
        assert loss == close(share * 1.313262, 1e-6)
    unlikelihood = cringe(x, None, mask, gamma=1e4)[0].item()
    assert unlikelihood == close(-math.log(1 - logp[0].exp().item()))


def test_soft_labels():
    logprobs, ref_logprobs, mask = batch()
    osp, dpo = (partial(LOSSES[n], logprobs, ref_logprobs, mask, beta=0.1) for n in ("osp", "dpo"))
    torch.testing.assert_close(osp()[0], dpo()[0])
    torch.testing.assert_close(osp(labels=1.0)[0], dpo()[0])
    torch.testing.assert_close(osp(labels=0.8)[0], dpo(label_smoothing=0.2)[0])
    assert (osp(labels=0.8)[0] - dpo()[0]).abs().max() > WRONG
    logit = math.log(4.0)  # of 0.8
    x = torch.tensor([[[logit], [0.0]]], dtype=torch.float64, requires_grad=True)
    ones = torch.ones(1, 2, 1, dtype=torch.bool)
    for label, at_the_minimum in ((0.8, True), (0.7, False)):
        labels = torch.tensor([label], dtype=torch.float64)
        losses = LOSSES["osp"](x, torch.zeros_like(x), ones, beta=1.0, labels=labels)[0]
        assert (gradient(losses.sum(), x).abs().max() < 1e-8) == at_the_minimum


def test_vpo_offline_on_the_chosen_response_is_dpo_with_sft():
    logprobs, ref_logprobs, mask = batch()
    vpo = LOSSES["vpo"](logprobs, ref_logprobs, mask, beta=0.1, alpha=0.5)[0]
    dpo = LOSSES["dpo"](logprobs, ref_logprobs, mask, beta=0.1)[0]
    sft = -0.05 * torch.where(mask, logprobs - ref_logprobs, 0).sum(-1)[:, 0]
    torch.testing.assert_close(vpo, dpo + sft)
    assert (vpo - (dpo - sft)).abs().max() > WRONG  # the online, optimistic sign
    calibration = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    other = LOSSES["vpo"](logprobs, ref_logprobs, mask, beta=0.1, alpha=0.5, calibration=calibration)[0]
    torch.testing.assert_close(other, dpo - 0.05 * calibration)


def test_srpo():
    """The check value; a blind improver is IPO at twice beta; both residuals vanish at the optimum."""
    srpo, ones = LOSSES["srpo"], torch.ones(1, 2, 1, dtype=torch.bool)
    x = torch.tensor([[[0.2], [-1.0]]], dtype=torch.float64)
    zero = torch.zeros_like(x)
    improved = torch.tensor([[[0.0, -0.2], [0.3, 0.0]]], dtype=torch.float64)  # [shown, given]
    assert srpo(x, zero, ones, beta=0.1, alpha=0.0, improved=improved)[0].item() == close(0.6889)
    assert abs(srpo(x, zero, ones, beta=0.1, alpha=0.0, improved=improved.mT)[0].item() - 0.6889) > WRONG
    logprobs, ref_logprobs, mask = batch()
    blind = srpo(logprobs, ref_logprobs, mask, beta=0.1, alpha=0.0)[0]
    torch.testing.assert_close(blind, 0.04 * LOSSES["ipo"](logprobs, ref_logprobs, mask, beta=0.1)[0])
    best = torch.tensor([[[0.0, -5.0], [5.0, 0.0]]], dtype=torch.float64)  # at beta 0.1
    flat = torch.zeros(1, 2, 1, dtype=torch.float64)
    for alpha in (0.0, 0.5, 1.0):
        assert srpo(flat, zero, ones, beta=0.1, alpha=alpha, improved=best)[0].item() == close(0.0)
        assert srpo(flat, zero, ones, beta=0.2, alpha=alpha, improved=best)[0].item() > WRONG


def test_confpo_selects_by_the_mean_probability():
    x, mask = padded(A)
    assert (LOSSES["confpo"](x, None, mask, beta=1.0)[1]).tolist() == [
        close([-3.5 / 3, -2.5], 1e-6), close([-2.0, -2.9 / 3], 1e-6)]
    # -1.0 is below the log of the mean probability, -0.944, and not below the mean log-prob, -1.0


def test_what_a_loss_stops_has_no_gradient():
    """Each with the twin that lets it through."""
    logprobs, ref_logprobs, mask = batch()
    for name in ("gammapo", "gammapo_dpo"):
        loss, options = LOSSES[name], {"beta": 2.0, "gamma": 4.0, "tau": 1.0}
        losses, rewards = loss(logprobs, ref_logprobs, mask, **options)
        fixed = dynamic_margins(rewards[:, 0] - rewards[:, 1], 4.0, 1.0)
        given = loss(logprobs, ref_logprobs, mask, **options, target_margins=fixed)[0]
        torch.testing.assert_close(gradient(losses.sum(), logprobs), gradient(given.sum(), logprobs))
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    assert not dynamic_margins(x, 4.0, 1.0).requires_grad

    cringe = LOSSES["cringe"]
    losses, rewards = cringe(logprobs, None, mask)
    gate = torch.sigmoid(rewards[:, 1] - rewards[:, 0])
    sums = torch.where(mask, logprobs, 0).sum(-1)
    through = losses / gate * torch.sigmoid(sums[:, 1] - sums[:, 0])  # the gate with its gradient
    torch.testing.assert_close(losses, through)
    assert (gradient(losses.sum(), logprobs) - gradient(through.sum(), logprobs)).abs().max() > WRONG


def test_the_odds_of_a_certain_response_and_the_contrast_of_a_certain_token():
    """Where the formula is infinite: orpo is kept finite by a hair, and says so; unlikelihood is not."""
    assert log1mexp(torch.tensor([0.0])).item() == -math.inf
    x = torch.tensor([-1e-9, -0.1, -0.69, -0.7, -3.0, -60.0], dtype=torch.float64, requires_grad=True)
    exact = [math.log1p(-math.exp(v)) if v < -0.69 else math.log(-math.expm1(v)) for v in x.tolist()]
    exact = torch.tensor(exact, dtype=torch.float64)
    torch.testing.assert_close(log1mexp(x), exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(log1mexp(x).sum(), x), -1 / torch.expm1(-x))
    certain = [[[0.0], [-1.0]]]
    assert all(map(math.isfinite, call("orpo", certain, certain)))
    odds = math.log(1e-7) - 0.54  # of exp(-1) against a response that is certain
    assert call("orpo", [[[-1.0], [0.0]]], certain)[0] == pytest.approx(1 - 0.1 * odds, abs=0.01)
    assert call("cringe", [[[-1.0], [0.0]]], certain) == [math.inf]
