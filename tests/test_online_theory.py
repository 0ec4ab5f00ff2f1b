"""Online preference learning by theory: expected gradients, every pair of responses being listed, losses by
hand, and TRL's trainer on given samples. The script itself: test_online.py."""

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from enumeration import Responses
from loss_batches import A_REF, A, padded

import train_online
from rlhf.compare import ONLINE_LOSSES, compare, equal_scores, nash_md, pair_losses
from rlhf.compare import soft_ipo as ipo
from rlhf.forward import TokenStats
from rlhf.masked import seq_logprobs

torch.set_num_threads(1)
Y = Responses(vocab=3, length=3)  # 15 responses of 1 to 3 tokens
PAIRS = torch.tensor(list(itertools.product(range(Y.count), repeat=2)))  # all ordered pairs, (Y^2, 2)
TAU = 0.3


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SCORES = 2 * normal(Y.count, seed=0)
POLICY = normal(Y.prefixes, Y.vocab, seed=1)
REF = normal(Y.prefixes, Y.vocab, seed=2)
WINS = torch.sigmoid(SCORES[:, None] - SCORES)  # (Y, Y): P(row > column)


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=atol)


def log_pi(logits):
    """log pi of all responses, (Y,)."""
    return seq_logprobs(Y.logprobs(logits), Y.mask)[0]


def mixture(c):
    """Logits of the geometric mixture of policy and reference."""
    return (1 - c) * POLICY + c * REF


def gradient(value, logits):
    return torch.autograd.grad(value, logits)[0]


def expected(loss_fn, options, label, first, second):
    """Expected gradient of the loss in the policy's logits, over y ~ first and y' ~ second (logits each)."""
    logits = POLICY.clone().requires_grad_()
    logprobs = Y.logprobs(logits)[0][PAIRS]  # (Y^2, 2, R)
    stats = TokenStats(logprobs, logprobs, Y.logprobs(REF)[0][PAIRS])
    weight = (log_pi(first)[PAIRS[:, 0]] + log_pi(second)[PAIRS[:, 1]]).exp()
    compared = compare(SCORES[PAIRS], label, torch.zeros(len(PAIRS)))
    losses, _ = pair_losses(loss_fn, options, stats, Y.mask[0][PAIRS], compared)
    return gradient((weight * torch.where(compared.kept, losses, 0)).sum(), logits)


def game(beta, opponent):
    """Exact gradient of P(pi > opponent) - beta KL(pi || pi_ref), the opponent being a constant."""
    logits = POLICY.clone().requires_grad_()
    logp = log_pi(logits)
    value = logp.exp() @ WINS @ log_pi(opponent).exp()
    return gradient(value - beta * (logp.exp() * (logp - log_pi(REF))).sum(), logits)


# --- expected gradients


def test_online_ipo_climbs_the_game_against_itself():
    """-(4 / tau) x the gradient of E[P(y > y')] - tau KL, y' from a frozen copy of the policy. With the
    higher score winning for sure it is another game; with a winner drawn by P it is the same one."""
    options = {"beta": TAU}
    exact = -4 / TAU * game(TAU, POLICY)
    found = expected(ipo, options, "soft", POLICY, POLICY)
    close(found, exact)
    assert (expected(ipo, options, "hard", POLICY, POLICY) - exact).abs().max() > 0.01
    logits = POLICY.clone().requires_grad_()
    won = expected_over_coins(logits, options)
    close(won, exact)


def expected_over_coins(logits, options):
    """Label "sampled": the two outcomes of every coin, each with its probability."""
    total = torch.zeros_like(POLICY)
    logprobs = Y.logprobs(logits)[0][PAIRS]
    stats = TokenStats(logprobs, logprobs, Y.logprobs(REF)[0][PAIRS])
    weight = log_pi(POLICY)[PAIRS].sum(1).exp()
    wins = WINS[PAIRS[:, 0], PAIRS[:, 1]]
    for coin, chance in ((0.0, wins), (1.0, 1 - wins)):
        compared = compare(SCORES[PAIRS], "sampled", torch.full((len(PAIRS),), coin))
        losses, _ = pair_losses(ipo, options, stats, Y.mask[0][PAIRS], compared)
        total += torch.autograd.grad((weight * chance * losses).sum(), logits, retain_graph=True)[0]
    return total


def test_ipo_md_between_its_ends():
    """Both samples from the mixture: c = 0 is online IPO, c = 1 samples the reference, and between is
    neither."""
    options = {"beta": TAU}
    ends = [expected(ipo, options, "soft", x, x) for x in (POLICY, REF)]
    for c, end in zip((0.0, 1.0), ends):
        close(expected(ipo, options, "soft", mixture(c), mixture(c)), end)
    between = expected(ipo, options, "soft", mixture(0.125), mixture(0.125))
    assert all((between - end).abs().max() > 0.01 for end in ends)


def test_nash_md_climbs_the_game_against_the_mixture_with_the_exact_kl():
    """TRL's weight, each token's own log-ratio in place of the response's, is off."""
    beta = 0.4
    opponent = mixture(0.5)
    exact = -game(beta, opponent)
    close(expected(nash_md, {"beta": beta}, "soft", POLICY, opponent), exact)

    def token_by_token(logprobs, ref_logprobs, mask, *, beta, labels):
        own = torch.where(mask, logprobs, 0)[:, 0]
        ratios = torch.where(mask, logprobs - ref_logprobs, 0)[:, 0]
        return -(labels - 0.5) * own.sum(-1) + beta * (ratios.detach() * own).sum(-1), None

    biased = expected(token_by_token, {"beta": beta}, "soft", POLICY, opponent)
    assert (biased - exact).abs().max() > 0.01


def test_the_fixed_point_of_online_dpo_is_the_kl_constrained_optimum():
    """pi = pi_ref exp(r / beta) / Z has no expected gradient under sampled labels, whoever samples."""
    beta = 0.7
    optimum = Y.logits_of((log_pi(REF) + SCORES / beta).softmax(0))

    def at(logits):
        logprobs = Y.logprobs(logits)[0][PAIRS]
        stats = TokenStats(logprobs, logprobs, Y.logprobs(REF)[0][PAIRS])
        weight = log_pi(mixture(0.3))[PAIRS].sum(1).exp()
        total = 0.0
        for coin in (0.0, 1.0):
            compared = compare(SCORES[PAIRS], "sampled", torch.full((len(PAIRS),), coin))
            chance = WINS[PAIRS[:, 0], PAIRS[:, 1]] if coin == 0 else WINS[PAIRS[:, 1], PAIRS[:, 0]]
            losses, _ = pair_losses(ONLINE_LOSSES["dpo"], {"beta": beta}, stats, Y.mask[0][PAIRS], compared)
            total = total + (weight * chance * losses).sum()
        return gradient(total, logits)

    close(at(optimum.clone().requires_grad_()), torch.zeros_like(POLICY))
    assert at(POLICY.clone().requires_grad_()).abs().max() > 0.01


# --- by hand


def test_comparisons_by_hand():
    coins = torch.tensor([0.5, 0.5, 0.5])
    pairs = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    hard = compare(pairs, "hard", coins)
    assert hard.order.tolist() == [[0, 1], [1, 0], [0, 1]] and hard.kept.tolist() == [True, True, False]
    assert hard.labels is None
    soft = compare(pairs, "soft", coins)
    assert soft.order.tolist() == [[0, 1]] * 3 and soft.kept.all()
    close(soft.labels, [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2)), 0.5], atol=1e-6)
    upset = compare(pairs, "sampled", torch.tensor([0.9, 0.1, 0.5]))  # sigmoid(2) = 0.88
    assert upset.order.tolist() == [[1, 0], [0, 1], [1, 0]] and upset.kept.all() and upset.labels is None
    many = torch.tensor([[1.0, 3.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    assert compare(many, "hard", coins[:2]).order[0].tolist() == [1, 2]
    assert compare(many, "hard", coins[:2]).kept.tolist() == [True, False]
    ranked = compare(many, "hard", coins[:2], ranked=True)
    assert ranked.order[0].tolist() == [1, 3, 0, 2] and ranked.kept.tolist() == [True, False]


def test_equal_responses_have_equal_scores():
    scores = torch.tensor([[0.1, 0.3, 0.1000001]])
    assert equal_scores(scores, [[[5, 0], [6, 0], [5, 0]]]).equal(scores[:, [0, 1, 0]])
    assert equal_scores(scores, [[[5, 0], [6, 0], [7, 0]]]).equal(scores)


def learnt(columns, reference, scores, k, **options):
    """Losses (N,) of `learn` on given log-probs, ragged (N, K)."""
    cfg = train_online.Config(data_dir="", model="", reward_model="rm", out_dir="", k=k, **options)
    cfg, options = train_online.with_options(cfg)
    logprobs, mask = padded(columns)
    stats = TokenStats(logprobs.requires_grad_(), logprobs, padded(reference)[0])
    scores = torch.tensor(scores)
    compared = compare(scores, cfg.label, torch.zeros(len(scores)))
    return train_online.learn(cfg, options, stats, mask, scores, compared, len(scores))["loss"]


def test_xpo_by_hand():
    """Reference's sample: the rejected one of pair 0, the chosen one of pair 1. The loss has the log-ratio
    where XPO's text has log pi: they differ by a constant."""
    columns = [A[0], A[1][::-1]]
    reference = [A_REF[0], A_REF[1][::-1]]
    losses = learnt(columns, reference, [[1.0, 0.0], [0.0, 1.0]], 2, beta=0.1, explore=1e-5)
    ref_sample = torch.tensor([-3.5, -2.0])
    assert (losses + 1e-5 * ref_sample).mean().item() == pytest.approx(0.684413, abs=1e-6)
    without = learnt(columns, reference, [[1.0, 0.0], [0.0, 1.0]], 2, beta=0.1)
    assert without.mean().item() == pytest.approx(0.684447, abs=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_xpo_has_the_loss_and_the_gradient_of_its_formula(sign):
    """mean over pairs of -log sigmoid(beta D) + alpha log pi(y of the reference), on random log-probs: what
    TRL up to 0.29 has (XPOTrainer), but for ties and for the constant log pi_ref. Minus is not it."""
    alpha, beta = 0.3, 0.1
    g = torch.Generator().manual_seed(5)
    mask = torch.arange(6) < torch.randint(1, 7, (4, 2, 1), generator=g)
    logprobs = (-torch.rand(4, 2, 6, generator=g, dtype=torch.float64)).requires_grad_()
    ref = -torch.rand(4, 2, 6, generator=g, dtype=torch.float64)
    scores = torch.randn(4, 2, generator=g)
    sums, ref_sums = (torch.where(mask, x, 0).sum(-1) for x in (logprobs, ref))  # (4, 2)
    first = scores[:, 0] > scores[:, 1]
    ratio = (sums - ref_sums)[:, 0] - (sums - ref_sums)[:, 1]
    margin = torch.where(first, ratio, -ratio)
    expected = (-(beta * margin).sigmoid().log() + sign * alpha * sums[:, 1]).mean()
    cfg = train_online.Config(data_dir="", model="", reward_model="rm", out_dir="", beta=beta, explore=alpha)
    cfg, options = train_online.with_options(cfg)
    stats = TokenStats(logprobs, logprobs, ref)
    compared = compare(scores, "hard", torch.zeros(4))
    losses = train_online.learn(cfg, options, stats, mask, scores, compared, 4)["loss"]
    there = gradient(expected, logprobs)
    if sign == 1:
        close(logprobs.grad, there)
        close(losses.mean(), expected.detach() - alpha * ref_sums[:, 1].mean())
    else:
        assert (logprobs.grad - there).abs().max() > 0.01


def test_selm_by_hand():
    """k = 1 and the data's pair: the sample, with a log-ratio of +0.5 and -0.5, is neither best nor worst."""
    columns = [[[-1.0, -0.5], *A[0]], [[-1.0, -1.5], *A[1]]]
    reference = [[[-1.0, -1.0], *A_REF[0]], [[-1.0, -1.0], *A_REF[1]]]
    scores = [[0.0, 1.0, -1.0]] * 2
    losses = learnt(columns, reference, scores, 1, data_pair=True, beta=0.01, explore=0.01 * 0.001)
    assert losses.tolist() == pytest.approx([0.687170, 0.697150], abs=1e-6)


def test_soft_labels_of_ipo():
    """(h - (P - 1/2) / tau)^2; P = 1 and no label are the offline loss; P = 1/2 aims at no margin."""
    logprobs, mask = padded(A)
    ref = padded(A_REF)[0]
    offline = ipo(logprobs, ref, mask, beta=0.1)[0]
    close(ipo(logprobs, ref, mask, beta=0.1, labels=torch.ones(2))[0], offline)
    close(ipo(logprobs, ref, mask, beta=0.1, labels=0.5)[0], [1.2**2, 0.8**2], atol=1e-9)
    close(ipo(logprobs, ref, mask, beta=0.1, labels=torch.tensor([0.8, 0.2]))[0], [1.8**2, 2.2**2], atol=1e-6)


# --- beside TRL


@pytest.mark.parametrize("loss, theirs", [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_online_dpo_of_trl_has_the_same_loss_and_gradient(loss, theirs):
    """TRL 1.16, experimental OnlineDPOTrainer.training_step on given samples, log-probs and rewards. It
    learns from ties, the first response being chosen; here they are dropped, so this batch has none. (XPO and
    Nash-MD are no longer part of TRL.)"""
    trl = pytest.importorskip("trl.experimental.online_dpo", reason="trl is not installed")
    N, R = 5, 6
    g = torch.Generator().manual_seed(3)
    mask = torch.arange(R) < torch.randint(1, R + 1, (N, 2, 1), generator=g)
    logprobs = (-torch.rand(N, 2, R, generator=g, dtype=torch.float64)).requires_grad_()
    ref = -torch.rand(N, 2, R, generator=g, dtype=torch.float64)
    scores = torch.randn(N, 2, generator=g)
    # theirs: all first responses, then all second ones
    halves = [x.transpose(0, 1).flatten(0, 1) for x in (mask, logprobs, ref, scores)]
    keep, policy, reference, rewards = halves
    ids = keep.long() + 1
    backward = []
    accelerator = SimpleNamespace(gather_for_metrics=lambda x: x, backward=lambda x, **_: backward.append(x))
    own = SimpleNamespace(
        args=SimpleNamespace(
            use_vllm=False,
            missing_eos_penalty=None,
            loss_type=theirs,
            n_gpu=1,
            optim="adamw",
            torch_empty_cache_steps=None,
            gradient_accumulation_steps=1,
        ),
        _generate=lambda *a: (ids, ids, ids, keep.long(), None),
        eos_token_ids=[0],
        ref_model="reference",
        _forward=lambda model, *a: reference if model == "reference" else policy,
        processing_class=SimpleNamespace(batch_decode=lambda x, **_: ["text"] * len(x)),
        _calculate_rewards_from_functions=lambda **_: rewards,
        reward_funcs=[1],
        beta=0.1,
        accelerator=accelerator,
        stats=defaultdict(list),
        state=SimpleNamespace(global_step=1),
    )
    model = SimpleNamespace(train=lambda: None)
    trl.OnlineDPOTrainer.training_step(own, model, {"prompt": ["post"] * N})

    def ours(scores):
        compared = compare(scores, "hard", torch.zeros(N))
        stats = TokenStats(logprobs, logprobs, ref)
        return pair_losses(ONLINE_LOSSES[loss], {"beta": 0.1}, stats, mask, compared)[0].mean()

    close(ours(scores), backward[0].detach())
    close(gradient(ours(scores), logprobs), gradient(backward[0], logprobs))
    assert (ours(-scores) - backward[0]).abs() > 0.01
