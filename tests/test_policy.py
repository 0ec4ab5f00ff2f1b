"""Advantages, the clipped loss and the KL estimators: by hand, by enumeration, and against TRL 1.16."""

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from enumeration import Responses

from rlhf.config import UserError
from rlhf.masked import seq_logprobs
from rlhf.policy import ADVANTAGES, clipped_policy_loss, group_normalized, k1, k2, k3, leave_one_out
from rlhf.rewards import REWARDS, rlhf_reward

torch.set_num_threads(1)
PAD = 99.0  # what the padding holds; no number below may depend on it

# One prompt, two responses, R = 4: lengths 2 and 4.
LOGPROBS = torch.tensor([[[-1.0, -2.0, PAD, PAD], [-0.5, -1.0, -1.5, -3.0]]])
REF = torch.tensor([[[-1.5, -2.5, PAD, -PAD], [-0.5, -0.5, -0.5, -0.5]]])
MASK = torch.tensor([[[True, True, False, False], [True, True, True, True]]])


def close(actual, expected):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype))


# --- advantages


def test_leave_one_out_by_hand():
    close(leave_one_out(torch.tensor([[1.0, 2.0, 6.0]])), [[1 - 4, 2 - 3.5, 6 - 1.5]])
    close(leave_one_out(torch.tensor([[1.0, 4.0], [5.0, 5.0]])), [[-3.0, 3.0], [0.0, 0.0]])


@pytest.mark.parametrize("K", [2, 3, 8])
def test_leave_one_out_identities(K):
    rewards = torch.randn(5, K, dtype=torch.float64, generator=torch.Generator().manual_seed(K))
    advantages = leave_one_out(rewards)
    close(advantages.sum(1), torch.zeros(5))
    close((K - 1) / K * advantages, rewards - rewards.mean(1, keepdim=True))
    # a constant per prompt is no advantage
    close(leave_one_out(rewards + torch.arange(5.0)[:, None]), advantages)


def test_group_normalized_by_hand():
    """Mean 3, deviations (-2, -1, 3), variance 14/2."""
    close(
        group_normalized(torch.tensor([[1.0, 2.0, 6.0]])),
        torch.tensor([[-2.0, -1.0, 3.0]]) / (math.sqrt(7) + 1e-4),
    )
    close(group_normalized(torch.tensor([[5.0, 5.0]])), [[0.0, 0.0]])


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_need_a_group(name):
    with pytest.raises(UserError, match="at least 2 responses per prompt, got 1"):
        ADVANTAGES[name](torch.zeros(4, 1))


def policy_gradient(responses, logits, rewards):
    """Exact: gradient of sum_y pi(y) R(y) in the logits, R (Y,) a constant."""
    value = (seq_logprobs(responses.logprobs(logits), responses.mask)[0].exp() * rewards).sum()
    return torch.autograd.grad(value, logits)[0]


def expected_rloo_gradient(responses, logits, scores, k, advantage, coefficients):
    """Minus the expected gradient of the mean loss over a group, summed over all Y^k groups (N of them), each
    with its probability."""
    groups = torch.tensor(list(itertools.product(range(responses.count), repeat=k)))  # (N, k)
    mask = responses.mask[0][groups]  # (N, k, R)
    logprobs = responses.logprobs(logits)[0][groups]  # (N, k, R)
    probability = seq_logprobs(logprobs, mask).detach().sum(1).exp()  # (N,)
    rewards, _ = rlhf_reward(scores[groups], logprobs, logprobs * 0.5, mask, coefficients)
    losses, _ = clipped_policy_loss(logprobs, logprobs.detach(), advantage(rewards), mask, clip=0.2)
    return -torch.autograd.grad((probability * losses.mean(1)).sum(), logits)[0]


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("term, coefficient", [("kl", 0.3), ("maxent", 0.7), ("maxent_length", 0.7)])
def test_expected_rloo_gradient_is_the_policy_gradient(k, term, coefficient):
    """By enumeration of every group of k responses: RLOO is unbiased for sum_y grad pi(y) R(y), the bonus
    being part of the reward R. With the baseline that includes the own sample, the gradient is (k-1)/k of
    it."""
    responses, coefficients = Responses(vocab=3, length=2), {"score": 1.0, term: coefficient}
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(responses.prefixes, 3, generator=g, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(responses.count, generator=g, dtype=torch.float64)
    logprobs = responses.logprobs(logits)
    rewards, _ = rlhf_reward(scores[None], logprobs, logprobs * 0.5, responses.mask, coefficients)
    exact = policy_gradient(responses, logits, rewards[0])
    close(expected_rloo_gradient(responses, logits, scores, k, leave_one_out, coefficients), exact)
    own = expected_rloo_gradient(
        responses, logits, scores, k, lambda r: r - r.mean(1, keepdim=True), coefficients
    )
    close(own, (k - 1) / k * exact)
    assert (own - exact).abs().max() > 0.01


def test_expected_rloo_gradient_of_eq_6_is_that_of_the_entropy_objective():
    """Eq. 6 in the reward, detached, follows the exact gradient of E[r] + alpha H(pi), eq. 2: the rest, alpha
    E[grad log pi], is 0."""
    responses = Responses(vocab=3, length=2)
    g = torch.Generator().manual_seed(4)
    logits = torch.randn(responses.prefixes, 3, generator=g, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(responses.count, generator=g, dtype=torch.float64)
    log_pi = seq_logprobs(responses.logprobs(logits), responses.mask)[0]
    objective = (log_pi.exp() * (scores - 0.7 * log_pi)).sum()
    found = expected_rloo_gradient(responses, logits, scores, 2, leave_one_out, {"score": 1.0, "maxent": 0.7})
    close(found, torch.autograd.grad(objective, logits)[0])


# --- clipped policy loss


def test_clip_by_hand():
    """Ratios 1.5 and 0.5 (one token moved by ln 1.5, the other response by ln 0.5 over two tokens), clip 0.2,
    advantages of both signs. The loss is the larger of -A rho and -A clip(rho); where the clipped branch is
    larger the gradient is zero."""
    old = torch.zeros(2, 2, 3)
    mask = torch.tensor([[True, False, False], [True, True, False]]).expand(2, 2, 3)
    one = torch.tensor([[math.log(1.5), PAD, PAD], [math.log(0.5) / 2, math.log(0.5) / 2, PAD]])
    logprobs = one.repeat(2, 1, 1).requires_grad_()  # (2, 2, 3)
    advantages = torch.tensor([[2.0, 2.0], [-2.0, -2.0]])
    losses, stats = clipped_policy_loss(logprobs, old, advantages, mask, clip=0.2)
    close(losses, [[-2.4, -1.0], [3.0, 1.6]])
    close(stats["ratio"], [[1.5, 0.5], [1.5, 0.5]])
    assert stats["clipfrac"].tolist() == [[True, False], [False, True]]
    losses.sum().backward()
    # -A rho per kept token, or nothing
    close(logprobs.grad, torch.tensor([[[0.0] * 3, [-1.0, -1.0, 0.0]], [[3.0, 0.0, 0.0], [0.0] * 3]]))


def test_the_square_of_a_far_ratio_is_finite():
    """Sequence ratios of e^53, about 1e23, as a diverging run makes them: their mean square, about 1e46, is
    beyond float32."""
    moved = torch.tensor([[53.0, 0.0]])[..., None]  # (1, 2, 1)
    mask = torch.ones(1, 2, 1, dtype=torch.bool)
    _, stats = clipped_policy_loss(moved, torch.zeros(1, 2, 1), torch.ones(1, 2), mask, clip=0.2)
    ratio = stats["ratio"]
    assert (ratio.square().mean() - ratio.mean() ** 2).item() == pytest.approx(math.exp(106) / 4, rel=1e-4)


def test_before_the_first_step_nothing_is_clipped():
    """pi = pi_old: ratio 1, loss -A, gradient -A for every token of the sequence."""
    logprobs = LOGPROBS.clone().requires_grad_()
    losses, stats = clipped_policy_loss(logprobs, logprobs, torch.tensor([[0.5, -2.0]]), MASK, clip=0.2)
    close(losses, [[-0.5, 2.0]])
    assert (
        (stats["ratio"] == 1).all() and not stats["clipfrac"].any() and stats["clipfrac"].dtype == torch.bool
    )
    losses.sum().backward()
    close(logprobs.grad, torch.tensor([[-0.5], [2.0]]) * MASK)


def test_clipped_policy_loss_equals_trl():
    """Values and gradients of RLOOTrainer's own loss on moved log-probs, clip 0.2; a token-level ratio would
    be another loss."""
    pytest.importorskip("trl", reason="trl is not installed: the policy loss is not compared with TRL")
    from trl import RLOOTrainer
    N, K, R = 5, 3, 7
    g = torch.Generator().manual_seed(5)
    mask = torch.arange(R) < torch.randint(1, R + 1, (N, K, 1), generator=g)
    old = -torch.rand(N, K, R, generator=g, dtype=torch.float64)
    logprobs = (old + 0.15 * torch.randn(N, K, R, generator=g, dtype=torch.float64)).requires_grad_()
    advantages = leave_one_out(torch.randn(N, K, generator=g, dtype=torch.float64))
    metrics = defaultdict(list)
    accelerator = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x)
    flat = logprobs.flatten(0, 1)
    self = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (flat, torch.zeros_like(flat), None),
        epsilon_low=0.2, epsilon_high=0.2, aux_loss_enabled=False, accelerator=accelerator,
        model=SimpleNamespace(training=True), _metrics={"train": metrics},
    )
    keep = mask.flatten(0, 1)
    prompt = torch.ones(N * K, 1, dtype=torch.long)
    theirs = RLOOTrainer._compute_loss(self, None, {
        "prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": keep.long(), "completion_mask": keep,
        "old_logps": seq_logprobs(old, mask).flatten(), "advantages": advantages.flatten()})
    losses, stats = clipped_policy_loss(logprobs, old, advantages, mask, clip=0.2)
    close(losses.mean(), theirs.detach())
    close(*(torch.autograd.grad(loss, logprobs)[0] for loss in (losses.mean(), theirs)))
    assert 0 < stats["clipfrac"].double().mean().item() == pytest.approx(metrics["clip_ratio/region_mean"][0])
    token_ratio = (-advantages[..., None] * (logprobs - old).exp() * mask).sum(-1) / mask.sum(-1)
    assert (token_ratio.mean() - theirs).abs() > 1e-3


# --- KL estimators


def test_kl_estimators_by_hand():
    """p = 0.5, q = 0.25 for the sampled token: q/p = 1/2."""
    logp, logq = torch.tensor(0.5).log(), torch.tensor(0.25).log()
    close(k1(logp, logq), math.log(2))
    close(k2(logp, logq), math.log(2) ** 2 / 2)
    close(k3(logp, logq), math.log(2) - 0.5)
    sums = seq_logprobs(LOGPROBS, MASK), seq_logprobs(REF, MASK)
    close(-k1(*sums), REWARDS["kl"](*sums, None))


def test_k1_and_k3_estimate_the_kl_of_their_first_argument():
    """Expectation over p, by enumeration, per sequence: KL(p || q), not KL(q || p); k2 is biased. Each k2 and
    k3 is never negative."""
    responses = Responses(vocab=3, length=3)
    g = torch.Generator().manual_seed(6)
    logp, logq = (
        seq_logprobs(
            responses.logprobs(torch.randn(responses.prefixes, 3, generator=g, dtype=torch.float64)),
            responses.mask,
        )[0]
        for _ in range(2)
    )
    forward, backward = (logp.exp() * (logp - logq)).sum(), (logq.exp() * (logq - logp)).sum()
    assert (forward - backward).abs() > 0.05
    for estimator in (k1, k3):
        close((logp.exp() * estimator(logp, logq)).sum(), forward)
    assert ((logp.exp() * k2(logp, logq)).sum() - forward).abs() > 0.01
    assert (k3(logp, logq) >= 0).all() and (k2(logp, logq) >= 0).all() and (k1(logp, logq) < 0).any()
    close(k2(logp, logq), k2(logq, logp))
