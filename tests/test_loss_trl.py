"""Losses against TRL 1.16: its DPO, CPO, ORPO and reward trainers' own loss functions on the same log-probs,
values and gradients; each with a twin that must fail."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from rlhf.losses import PREFERENCE_LOSSES as LOSSES
from rlhf.losses import bradley_terry_loss, dpo, dpo_length, ipo, simpo
from tests.loss_batches import WRONG, batch, gradient

torch.set_num_threads(1)


def assert_same(ours, theirs, x):
    """Equal values and equal gradients in `x`."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(ours, x), gradient(theirs, x), rtol=1e-12, atol=1e-12)


def assert_differ(ours, theirs):
    """The twin that must fail: a wrong formula is off by far more than rounding."""
    assert (ours - theirs).abs().max() > WRONG


@pytest.fixture(scope="module")
def trl():
    pytest.importorskip("trl", reason="trl is not installed: the losses are not compared with TRL")
    from trl import DPOTrainer, RewardTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    return SimpleNamespace(dpo=DPOTrainer._compute_loss, reward=RewardTrainer.compute_loss,
                           cpo=CPOTrainer.cpo_loss, logps=CPOTrainer.get_batch_logps,
                           odds=ORPOTrainer.odds_ratio_loss)


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
    g = torch.Generator().manual_seed(3)
    x, ref = (-3 * torch.rand(7, 2, 9, generator=g, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
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
    logits = torch.randn(7, 2, 1 + 9, 11, generator=g, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 11, (7, 2, 9), generator=g)
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


@pytest.mark.parametrize("name, loss_type, twin", [
    ("hinge", "hinge", "slic"), ("ipo_length", "ipo", "ipo")])
def test_losses_of_dpo_trainer(trl, name, loss_type, twin):
    logprobs, ref_logprobs, mask = batch()
    theirs = trl_dpo(trl, loss_type, logprobs, ref_logprobs, mask, 0.3)[0]
    options = {"beta": 0.3}
    ours = LOSSES[name](logprobs, ref_logprobs, mask, **options)[0].mean()
    assert_same(ours, theirs, logprobs)
    other = LOSSES[twin](logprobs, ref_logprobs, mask, **(options if twin != "slic" else {}))[0].mean()
    assert (other - theirs).abs() > WRONG


def cpo_trainer(**fields) -> SimpleNamespace:
    defaults = dict(alpha=0.0, loss_type="sigmoid", beta=0.3, simpo_gamma=0.0, label_smoothing=0.0)
    return SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cpu")), **{**defaults, **fields})


def test_losses_of_cpo_trainer(trl):
    """AlphaPO there is loss_type="simpo" with alpha; the NLL of CPO is a token mean that its trainer adds."""
    logprobs, _, mask = batch()
    sums = torch.where(mask, logprobs, 0).sum(-1)
    means = sums / mask.sum(-1)

    def ours(name, **options):
        return LOSSES[name](logprobs, None, mask, **options)[0]

    theirs = trl.cpo(cpo_trainer(label_smoothing=0.1), *sums.unbind(1))[0]
    torch.testing.assert_close(ours("dpo_free", beta=0.3, label_smoothing=0.1), theirs)
    cpo_mean = ours("cpo_mean", beta=0.3, sft_coef=0.5, label_smoothing=0.1)
    torch.testing.assert_close(cpo_mean, theirs - 0.5 * means[:, 0])
    assert (ours("dpo_free", beta=0.3) - theirs).abs().max() > WRONG
    theirs, chosen, rejected = trl.cpo(
        cpo_trainer(loss_type="simpo", alpha=0.4, beta=2.0, simpo_gamma=0.3), *means.unbind(1))
    torch.testing.assert_close(ours("alphapo", alpha=0.4, beta=2.0, gamma=0.3), theirs)
    rewards = LOSSES["alphapo"](logprobs, None, mask, alpha=0.4, beta=2.0)[1]
    torch.testing.assert_close(rewards, torch.stack([chosen, rejected], 1))
    assert (ours("alphapo", alpha=0.4, beta=2.0, gamma=0.6) - theirs).abs().max() > WRONG


def test_odds_of_orpo_trainer(trl):
    """Theirs is in float32, and the term's sign is that of the reward: the trainer subtracts it."""
    logprobs, _, mask = batch()
    sums = torch.where(mask, logprobs, 0).sum(-1)
    self = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device=torch.device("cpu")))
    ours = LOSSES["orpo"](logprobs, None, mask, alpha=0.1, sft_coef=0.0)[0].float()
    theirs = -trl.odds(self, *(sums / mask.sum(-1)).unbind(1))[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert (ours + trl.odds(self, *sums.unbind(1))[0]).abs().max() > WRONG
