"""Every preference loss, one test for all: check values, a loop over tokens, padding, gradients, extremes.

Where a formula could be mistaken (sums for means, another sign), the mistake is off by more than WRONG.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from rlhf.config import UserError
from rlhf.losses import PREFERENCE_LOSSES as LOSSES
from rlhf.losses import RANKED, defaults, extras
from tests.loss_batches import A_REF, WRONG, A, batch, call, close, gradient, padded, ragged

torch.set_num_threads(1)
NAMES = list(LOSSES)
PAIRS = [name for name in NAMES if name not in RANKED]
each_loss = pytest.mark.parametrize("name", NAMES)


# --- check values, to the digits that they are given with


@pytest.mark.parametrize("name, options, first, second", [
    ("dpo", {"beta": 0.1}, 0.634946, 0.733947),
    ("hinge", {"beta": 0.1}, 0.88, 1.08),
    ("ipo", {"beta": 0.1}, 14.44, 33.64),
    ("ipo_length", {"beta": 0.1}, 21.313611, 27.5625),
    ("dpo_length", {"beta": 2.0}, 0.381554, 0.974077),
    ("dpo_free", {"beta": 0.1}, 0.668460, 0.611755),
    ("simpo", {"beta": 2.0, "gamma": 0.5}, 0.474077, 1.463282),
    ("alphapo", {"alpha": 0.25, "beta": 2.5, "gamma": 0.25}, 0.208895, 1.593935),
    ("orpo", {"alpha": 1.0, "sft_coef": 0.0}, 0.401136, 1.015597),
    ("orpo", {"alpha": 0.1}, 1.040114, 1.251560),
    ("slic", {"delta": 1.0}, 0.5, 0.0),
    ("rrhf", {"sft_coef": 0.0}, 0.0, 0.35),
    ("chipo", {"beta": 0.05}, 0.643126, 0.736756),
    ("chipo", {"beta": 0.1}, 0.595733, 0.782184),
    ("confpo", {"beta": 1.5, "gamma": 1.6}, 0.513015, 3.191959),
    ("osp", {"beta": 0.1, "labels": 0.8}, 0.658946, 0.717947),
    ("osp", {"beta": 0.1, "label_smoothing": 0.2}, 0.658946, 0.717947),
    ("vpo", {"alpha": 0.1, "beta": 0.1}, 0.632946, 0.736947),
    ("cpo", {"beta": 0.1, "sft_coef": 0.0}, 0.668460, 0.611755),
    ("cpo", {"beta": 0.1, "sft_coef": 1.0}, 4.668460, 2.911755),
    ("cpo_mean", {"beta": 0.1, "sft_coef": 1.0}, 1.668460, 1.761755),
    ("gammapo", {"tau": 1e12, "beta": 2.0, "gamma": 0.5}, 0.474077, 1.463282),
    ("gammapo_dpo", {"tau": 1e12, "beta": 0.1}, 0.634946, 0.733947),
    ("amopo", {"beta": 2.0, "gamma": 0.5}, 0.474077, 1.463282),
])
def test_check_values(name, options, first, second):
    assert call(name, A, A_REF, **options) == pytest.approx([first, second], abs=6e-7)


def test_the_check_values_are_not_those_of_the_usual_mistakes():
    swapped = [[row[::-1] for row in rows] for rows in (A, A_REF)]
    for name in PAIRS:
        assert call(name, A, A_REF) != pytest.approx(call(name, *swapped), abs=WRONG), name
    odds_on_sums = call("orpo", [[[-4.0], [-4.5]], [[-2.3], [-4.0]]], A_REF, alpha=1.0, sft_coef=0.0)
    assert odds_on_sums == pytest.approx([0.471322, 0.154809], abs=6e-7)  # and not 0.401136, 1.015597


# --- a loop over tokens


def log_sigmoid(x: float) -> float:
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def total(logprobs: list[float]) -> float:
    out = 0.0
    for x in logprobs:
        out += x
    return out


def mean(logprobs: list[float]) -> float:
    return total(logprobs) / len(logprobs)


def unsure_mean(logprobs: list[float]) -> float:
    average = mean([math.exp(x) for x in logprobs])
    kept = [x for x in logprobs if math.exp(x) < average]
    return mean(kept) if kept else math.nan


def odds(m: float) -> float:
    return math.log(math.exp(m) / (1 - math.exp(m)))


def phi(d: float) -> float:
    return math.exp(d) + d


def smoothed(x: float, e: float) -> float:
    return -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x)


def loop_simpo_pl(rows, _, beta, gamma):
    s = [beta * mean(r) for r in rows]
    loss = 0.0
    for k in range(len(s)):
        own = math.exp(s[k] - gamma)
        loss += math.log(own + sum(math.exp(x) for x in s[k + 1:])) - math.log(own)
    return loss


def loop_rrhf(rows, _, sft_coef, scores):
    s = [mean(r) for r in rows]
    loss = -sft_coef * s[scores.index(max(scores))]
    for i, better in enumerate(scores):
        for j, worse in enumerate(scores):
            if better > worse:
                loss += max(0.0, s[j] - s[i])
    return loss


def loop_cringe(rows, _, gamma, alpha, tau, top_k, competitors=None):
    chosen, rejected = rows
    contrast = 0.0
    for t, x in enumerate(rejected):
        if competitors is None:
            contrast += -math.log(1 - math.exp(x))
        else:
            p = [math.exp(c) for c in competitors[t][:top_k]]
            contrast += sum(q * math.log1p(math.exp(x) / q) for q in p) / sum(p)
    gate = 1 / (1 + math.exp((total(chosen) - total(rejected) - gamma) / tau))
    return gate * (-mean(chosen) + alpha * contrast / len(rejected))


def loop_srpo(rows, ref, beta, alpha, improved):
    D = [total(r) - total(q) for r, q in zip(rows, ref)]
    robust = (beta * (improved[1][0] - improved[0][1] + D[0] - D[1]) - 1) ** 2
    up = (beta * (improved[1][0] - improved[1][1]) - 0.5) ** 2
    down = (beta * (improved[0][1] - improved[0][0]) + 0.5) ** 2
    return (1 - alpha) * robust + alpha * (up + down) / 2


def loop_amopo(rows, _, beta, gamma, objectives, noise):
    stats = []
    for r in rows:
        p = [math.exp(x) for x in r]
        m = mean(p)
        stats.append((m, math.sqrt(sum((x - m) ** 2 for x in p) / max(len(p) - 1, 1))))
    said = [j for j, o in enumerate(objectives) if o != 0]
    draws = [math.exp(sum(m + s * z for (m, s), z in zip(stats, noise[j]))) for j in said]
    loss = 0.0
    for j, weight in zip(said, draws):
        sign = 1 if objectives[j] > 0 else -1
        loss += -weight / sum(draws) * log_sigmoid(sign * beta * (mean(rows[0]) - mean(rows[1])) - gamma)
    return loss


def sums(rows):
    return total(rows[0]) - total(rows[1])


def means(rows):
    return mean(rows[0]) - mean(rows[1])


LOOPS = {
    "dpo": lambda y, r, beta, label_smoothing: smoothed(beta * (sums(y) - sums(r)), label_smoothing),
    "simpo": lambda y, _, beta, gamma, label_smoothing: smoothed(beta * means(y) - gamma, label_smoothing),
    "simpo_pl": loop_simpo_pl,
    "ipo": lambda y, r, beta: (sums(y) - sums(r) - 1 / (2 * beta)) ** 2,
    "dpo_length": lambda y, r, beta, gamma, label_smoothing:
        smoothed(beta * (means(y) - means(r)) - gamma, label_smoothing),
    "ipo_length": lambda y, r, beta: (means(y) - means(r) - 1 / (2 * beta)) ** 2,
    "dpo_free": lambda y, _, beta, label_smoothing: smoothed(beta * sums(y), label_smoothing),
    "cpo": lambda y, _, beta, sft_coef, label_smoothing:
        smoothed(beta * sums(y), label_smoothing) - sft_coef * total(y[0]),
    "cpo_mean": lambda y, _, beta, sft_coef, label_smoothing:
        smoothed(beta * sums(y), label_smoothing) - sft_coef * mean(y[0]),
    "orpo": lambda y, _, alpha, sft_coef:
        -sft_coef * mean(y[0]) - alpha * log_sigmoid(odds(mean(y[0])) - odds(mean(y[1]))),
    "slic": lambda y, _, delta, sft_coef, target: max(0.0, delta - sums(y)) - sft_coef * target,
    "hinge": lambda y, r, beta: max(0.0, 1 - beta * (sums(y) - sums(r))),
    "rrhf": loop_rrhf,
    "chipo": lambda y, r, beta, r_max: -log_sigmoid(max(-2 * r_max, min(2 * r_max, beta * (
        phi(total(y[0]) - total(r[0])) - phi(total(y[1]) - total(r[1])))))),
    "alphapo": lambda y, _, beta, alpha, gamma: -log_sigmoid(
        beta * (math.exp(-alpha * mean(y[1])) - math.exp(-alpha * mean(y[0]))) / alpha - gamma),
    "gammapo": lambda y, _, beta, gamma, tau, target_margins: -log_sigmoid(beta * means(y) - target_margins),
    "gammapo_dpo": lambda y, r, beta, gamma, tau, target_margins:
        -log_sigmoid(beta * (sums(y) - sums(r)) - target_margins + gamma),
    "confpo": lambda y, _, beta, gamma: 0.0 if min(map(len, y)) == 1 else -log_sigmoid(
        beta * (unsure_mean(y[0]) - unsure_mean(y[1])) - gamma),
    "amopo": loop_amopo,
    "cringe": loop_cringe,
    "osp": lambda y, r, beta, label_smoothing, labels: smoothed(
        beta * (sums(y) - sums(r)), label_smoothing + (1 - labels) * (1 - 2 * label_smoothing)),
    "vpo": lambda y, r, beta, alpha, calibration:
        -log_sigmoid(beta * (sums(y) - sums(r))) - alpha * beta * calibration,
    "srpo": loop_srpo,
}
OPTIONS = {"beta": 0.3, "gamma": 0.7, "alpha": 0.4, "delta": 1.5, "tau": 2.0, "sft_coef": 0.6,
           "label_smoothing": 0.15, "r_max": 0.2, "top_k": 2}


def random_extras(name: str, N=7, K=2, R=9) -> dict[str, torch.Tensor]:
    """What a loss reads beside log-probs, at random."""
    g = torch.Generator().manual_seed(5)
    shapes = {"target": (N,), "scores": (N, K), "target_margins": (N,), "labels": (N,), "calibration": (N,),
              "objectives": (N, 3), "noise": (N, 3, 2), "competitors": (N, R, 3), "improved": (N, 2, 2)}
    drawn = {key: torch.randn(shape, generator=g, dtype=torch.float64) for key, shape in shapes.items()}
    drawn["labels"] = drawn["labels"].sigmoid()
    drawn["competitors"] = -drawn["competitors"].abs() - 0.1
    drawn["objectives"][0] = torch.tensor([1.0, 0.0, -1.0])
    drawn["scores"][1] = 1.0  # a tie
    return {key: drawn[key] for key in extras(LOSSES[name])}


def options_of(name: str) -> dict[str, float]:
    return {key: OPTIONS[key] for key in defaults(LOSSES[name])}


@each_loss
def test_every_loss_equals_a_loop_over_tokens(name):
    K = 4 if name in RANKED else 2
    policy, reference = ragged(K=K)
    logprobs, ref_logprobs, mask = batch(K=K)
    more, options = random_extras(name, K=K), options_of(name)
    ours = LOSSES[name](logprobs, ref_logprobs, mask, **options, **more)[0].tolist()
    for n, value in enumerate(ours):
        row = {key: tensor[n].tolist() for key, tensor in more.items()}
        assert value == close(LOOPS[name](policy[n], reference[n], **options, **row)), n
    swapped = [[row[1], row[0], *row[2:]] for row in policy]
    row = {key: tensor[3].tolist() for key, tensor in more.items()}
    assert abs(ours[3] - LOOPS[name](swapped[3], reference[3], **options, **row)) > WRONG


@each_loss
def test_a_loss_is_called_with_log_probs_alone(name):
    """Defaults everywhere: finite losses (N,), detached rewards (N, K), no gradient in the padding."""
    K = 3 if name in RANKED else 2
    logprobs, ref_logprobs, mask = batch(K=K)
    losses, rewards = LOSSES[name](logprobs, ref_logprobs, mask)
    assert losses.shape == (7,) and rewards.shape == (7, K) and not rewards.requires_grad
    assert losses.isfinite().all() and rewards.isfinite().all()
    found = gradient(losses.sum(), logprobs)
    assert found.isfinite().all() and (found[~mask] == 0).all() and (found[mask] != 0).any()


@each_loss
def test_padding_changes_nothing(name):
    K = 3 if name in RANKED else 2
    logprobs, ref_logprobs, mask = batch(K=K)
    wide = F.pad(logprobs.detach(), (0, 3), value=math.inf).requires_grad_()
    more = random_extras(name, K=K)
    wide_more = dict(more)
    if name == "cringe":
        wide_more["competitors"] = F.pad(more["competitors"], (0, 0, 0, 3), value=math.nan)
    loss = LOSSES[name]
    short = loss(logprobs, ref_logprobs, mask, **more)[0]
    long = loss(wide, F.pad(ref_logprobs, (0, 3), value=math.nan), F.pad(mask, (0, 3)), **wide_more)[0]
    torch.testing.assert_close(short, long, rtol=1e-14, atol=1e-14)
    found = gradient(long.sum(), wide)
    torch.testing.assert_close(gradient(short.sum(), logprobs), found[..., :-3], rtol=1e-14, atol=1e-14)
    assert (found[..., -3:] == 0).all()


@each_loss
def test_every_option_matters_and_its_default_is_what_leaving_it_out_means(name):
    K = 3 if name in RANKED else 2
    logprobs, ref_logprobs, mask = batch(K=K)
    more, options = random_extras(name, K=K), options_of(name)
    if name == "gammapo_dpo":
        options = {"beta": 2.0, "gamma": 4.0, "tau": 0.5}  # so that the margins differ

    def loss(**options):
        return LOSSES[name](logprobs, ref_logprobs, mask, **options, **more)[0]

    assert torch.equal(loss(), loss(**defaults(LOSSES[name])))
    if "target_margins" in more:  # given, gamma and tau have decided them
        more.clear()
    for option, value in options.items():
        changed = {option: 1 if option == "top_k" else value / 2}
        assert (loss(**options) - loss(**options | changed)).abs().max() > WRONG, option


# --- gradients

@each_loss
def test_gradcheck(name):
    """Of what is stopped by definition, gamma-PO's margins are given, AMoPO has one weight, 1, the gate of
    CRINGE is divided out; ConfPO's choice of tokens does not change within a small step."""
    K = 3 if name in RANKED else 2
    policy, reference = ragged(N=3, K=K, R=5)
    logprobs, mask = padded(policy, -1.0)
    ref_logprobs = padded(reference, -1.0)[0]
    more = random_extras(name, N=3, K=K, R=logprobs.shape[2])
    if name == "amopo":
        more = {key: tensor[:, :1] for key, tensor in more.items()}
    options = options_of(name) | ({"r_max": 9.0} if name == "chipo" else {})
    differentiable = [key for key in ("target", "calibration", "improved") if key in more]

    def function(logprobs, *tensors):
        losses, rewards = LOSSES[name](
            logprobs, ref_logprobs, mask, **options, **more | dict(zip(differentiable, tensors)))
        if name == "cringe":
            gaps = rewards[:, 0] - rewards[:, 1]
            losses = losses / torch.sigmoid((OPTIONS["gamma"] - gaps) / OPTIONS["tau"])
        return losses

    inputs = [logprobs, *(more[key] for key in differentiable)]
    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs])


# --- extremes


def ratio(D_w: float, D_l: float, n: int = 1) -> tuple[list, list]:
    """One pair with these summed log-ratios: policy and reference, n tokens each."""
    policy = [[[min(D, 0.0) / n - 1.0] * n for D in (D_w, D_l)]]
    reference = [[[-max(D, 0.0) / n - 1.0] * n for D in (D_w, D_l)]]
    return policy, reference


@each_loss
@pytest.mark.parametrize("case", ["+500", "-500", "one token", "all equal", "a certain token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_are_finite(name, case, dtype):
    policy, reference = {
        "+500": ratio(500.0, -500.0, 4), "-500": ratio(-500.0, 500.0, 4),
        "one token": ([[[-1.0], [-2.0]]], [[[-1.5], [-0.5]]]),
        "all equal": ([[[-1.0] * 5, [-1.0] * 3]], [[[-1.0] * 5, [-1.0] * 3]]),
        "a certain token": ([[[0.0, -1.0], [-1.0, -0.5]]], [[[-1.0, 0.0], [-0.5, 0.0]]]),
    }[case]
    logprobs, mask = padded(policy)
    logprobs = logprobs.to(dtype).requires_grad_()
    losses, rewards = LOSSES[name](logprobs, padded(reference)[0].to(dtype), mask)
    assert losses.isfinite().all() and rewards.isfinite().all() and losses.dtype is dtype
    assert gradient(losses.sum(), logprobs).isfinite().all()


# --- bad input


@each_loss
def test_the_number_of_responses_is_checked(name):
    logprobs, ref_logprobs, mask = batch(K=3)
    if name not in RANKED:
        with pytest.raises(UserError, match="compares 2 responses per prompt, got 3"):
            LOSSES[name](logprobs, ref_logprobs, mask)
    with pytest.raises(UserError, match="2 responses per prompt, got 1"):
        LOSSES[name](logprobs[:, :1], ref_logprobs[:, :1], mask[:, :1])
