"""Per-token log-prob, entropy and KL in chunks against the plain (M, V) formulas, forward and backward, and
without ever holding an (M, V) matrix."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from util import WIDE, error

from rlhf.logprobs import compare_logprobs, compile_kernels, head_nll, kernels, token_logprobs

M, C, V = 23, 20, 301


def inputs(seed=0, scale=0.5, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (
        torch.randn(n, C, generator=g, dtype=torch.float64).mul_(scale).to(dtype).requires_grad_()
        for n in (M, V)
    )
    return hidden, weight, torch.randint(V, (M,), generator=g)


def plain(hidden, weight, targets, temperature=1.0):
    """Log-probs and entropy by the definition, in float64."""
    logp = (hidden.double() @ weight.double().T / temperature).log_softmax(-1)  # (M, V)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def gradients(results, hidden, weight, d_logprobs, d_entropy):
    loss = (results[0] * d_logprobs).sum() + (results[1] * d_entropy).sum()
    return torch.autograd.grad(loss, (hidden, weight))


# what flows back: into the log-probs, into the entropy, into both
FLOWS = {"logprobs": (1.0, 0.0), "entropy": (0.0, 1.0), "both": (1.0, -0.7)}


@pytest.mark.parametrize("chunk", [1, 3, 7, None])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("flow", FLOWS)
def test_values_and_gradients(flow, temperature, chunk):
    hidden, weight, targets = inputs()
    g = torch.Generator().manual_seed(1)
    upstream = [scale * torch.randn(M, generator=g) for scale in FLOWS[flow]]
    actual = token_logprobs(hidden, weight, targets, temperature, chunk)
    expected = plain(hidden, weight, targets, temperature)
    for a, e in zip(actual, expected):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)
    for a, e in zip(
        gradients(actual, hidden, weight, *upstream), gradients(expected, hidden, weight, *upstream)
    ):
        assert error(a, e) < 1e-5


def test_chunk_sizes_are_identical():
    hidden, weight, targets = inputs()
    upstream = torch.randn(2, M)
    runs = []
    for chunk in (M, 1, 3, 7, None):
        out = token_logprobs(hidden, weight, targets, 0.8, chunk)
        runs.append([*out, *gradients(out, hidden, weight, *upstream)])
    for run in runs[1:]:
        for a, b in zip(run, runs[0]):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", ["temperature", "target", "sign of the entropy"])
def test_the_comparison_sees(wrong):
    hidden, weight, targets = inputs()
    actual = token_logprobs(
        hidden, weight, targets.roll(1) if wrong == "target" else targets,
        1.02 if wrong == "temperature" else 1.0,
    )
    upstream = torch.ones(M), torch.full((M,), -1.0 if wrong == "sign of the entropy" else 1.0)
    expected = plain(hidden, weight, targets)
    grads = (
        gradients(actual, hidden, weight, *upstream),
        gradients(expected, hidden, weight, torch.ones(M), torch.ones(M)),
    )
    assert max(error(a, e) for a, e in zip(*grads)) > WIDE


def test_large_logits():
    """Logits of some thousands, where exp would overflow: a distribution with almost no entropy."""
    hidden, weight, targets = inputs(scale=30.0)
    logprobs, entropy = token_logprobs(hidden, weight, targets)
    expected = plain(hidden, weight, targets)
    assert expected[0].min() < -5000
    assert error(logprobs.double(), expected[0]) < 1e-6
    torch.testing.assert_close(entropy.double(), expected[1], rtol=1e-3, atol=1e-3)
    assert all(g.isfinite().all() for g in gradients((logprobs, entropy), hidden, weight, 1.0, 1.0))


def test_uniform_distribution():
    """Zero hidden states: log-prob -ln V, entropy ln V."""
    logprobs, entropy = token_logprobs(torch.zeros(4, C), torch.randn(V, C), torch.arange(4))
    ln_v = torch.tensor(V).log().expand(4)
    torch.testing.assert_close(logprobs, -ln_v)
    torch.testing.assert_close(entropy, ln_v)


def test_gradient_of_one_input_only():
    hidden, weight, targets = inputs()
    full = gradients(token_logprobs(hidden, weight, targets), hidden, weight, 1.0, 1.0)
    for only in (0, 1):
        one = [x.detach() for x in (hidden, weight)]
        one[only].requires_grad_()
        logprobs, entropy = token_logprobs(*one, targets)
        assert torch.equal(torch.autograd.grad((logprobs + entropy).sum(), one[only])[0], full[only])


def test_no_tokens():
    hidden, weight, targets = inputs()
    logprobs, _ = token_logprobs(hidden[:0], weight, targets[:0])
    assert logprobs.shape == (0,) and torch.equal(
        torch.autograd.grad(logprobs.sum(), weight)[0], torch.zeros(V, C)
    )


# --- bfloat16


def test_autocast():
    """Products in bfloat16, everything after them in float32: near the float32 numbers, and gradients of the
    parameters' own type."""
    hidden, weight, targets = inputs()
    upstream = torch.randn(2, M)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = token_logprobs(hidden, weight, targets, 0.9, 5)
    expected = plain(hidden, weight, targets, 0.9)
    for a, e in zip(out, expected):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), e, rtol=0, atol=0.05)
    for a, e in zip(
        gradients(out, hidden, weight, *upstream), gradients(expected, hidden, weight, *upstream)
    ):
        assert a.dtype == torch.float32 and error(a, e) < 0.02
    # what is left when the inputs' rounding is taken out: only the product's
    rounded = [x.bfloat16().float() for x in (hidden, weight)]
    for a, e in zip(out, plain(*rounded, targets, 0.9)):
        torch.testing.assert_close(a.double(), e, rtol=0, atol=0.03)


# --- memory


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def largest(function) -> int:
    with Largest() as mode:
        logprobs, entropy = function()
        (logprobs.sum() + entropy.sum()).backward()
    return mode.elements


def test_no_matrix_of_tokens_by_vocabulary():
    """Forward and backward make nothing larger than a chunk of logits or the weight itself; the plain formula
    does, so the measure works."""
    hidden, weight, targets = inputs()
    assert largest(lambda: token_logprobs(hidden, weight, targets, chunk=4)) == V * C < M * V
    assert largest(lambda: plain(hidden, weight, targets)) == M * V
    with Largest() as mode:
        compare_logprobs(hidden, weight, hidden, weight, targets, chunk=4)
    assert mode.elements <= V * C


def test_nothing_of_the_size_of_the_logits_is_saved_for_backward():
    hidden, weight, targets = inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        token_logprobs(hidden, weight, targets, chunk=4)
    assert sorted(saved) == sorted([M * C, V * C, M, M, M])


# --- KL of whole distributions


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 7, None])
def test_compare_logprobs(chunk, temperature):
    (hidden, weight, targets), (other_hidden, other_weight, _) = inputs(0), inputs(1)
    logp, logq = (
        (h.double() @ w.double().T / temperature).log_softmax(-1)
        for h, w in ((hidden, weight), (other_hidden, other_weight))
    )
    expected, reverse = (logp.exp() * (logp - logq)).sum(-1), (logq.exp() * (logq - logp)).sum(-1)
    logprobs, entropy, ref_logprobs, kl = compare_logprobs(
        hidden, weight, other_hidden, other_weight, targets, temperature, chunk
    )
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-5)
    assert error(reverse, expected) > WIDE  # the twin: the other direction is another number
    assert compare_logprobs(hidden, weight, hidden, weight, targets, temperature, chunk)[3].abs().max() < 2e-5
    for both in zip((logprobs, entropy), token_logprobs(hidden, weight, targets, temperature, chunk)):
        torch.testing.assert_close(*both, rtol=0, atol=0)
    torch.testing.assert_close(
        ref_logprobs.double(), logq.gather(1, targets[:, None])[:, 0], rtol=1e-5, atol=1e-5
    )
    assert logprobs.requires_grad and not ref_logprobs.requires_grad and not kl.requires_grad


def test_compiled_kernels_change_nothing(monkeypatch):
    """With the tracer of torch.compile, not its code generator, which would need a C++ compiler and a
    minute."""
    (hidden, weight, targets), (other_hidden, other_weight, _) = inputs(0), inputs(1)

    def numbers():
        hidden.grad = weight.grad = None
        found = compare_logprobs(hidden, weight, other_hidden, other_weight, targets, 0.7, chunk=7)
        (found[0].sum() + found[1].square().sum()).backward()
        entropy_too = hidden.grad.clone(), weight.grad.clone()
        hidden.grad = weight.grad = None
        token_logprobs(hidden, weight, targets, 0.7, chunk=7)[0].sum().backward()
        return [*found, *entropy_too, hidden.grad.clone(), weight.grad.clone()]

    expected, plain, compile = numbers(), dict(vars(kernels)), torch.compile
    for name, function in plain.items():
        monkeypatch.setattr(kernels, name, function)  # put back after the test
    monkeypatch.setattr(
        torch, "compile", lambda function, dynamic: compile(function, dynamic=dynamic, backend="eager")
    )
    compile_kernels()
    assert all(getattr(kernels, name) is not function for name, function in plain.items())
    for actual, wanted in zip(numbers(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, None])
def test_summed_nll(chunk):
    """Value and gradients are those of the sum of token_logprobs, scaled by whatever comes after; without
    gradients it gives the same value."""
    hidden, weight, targets = inputs()
    expected = -token_logprobs(hidden, weight, targets)[0].sum()
    wanted = torch.autograd.grad(expected / 17, (hidden, weight))
    actual = head_nll(hidden, weight, targets, chunk)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
    for one, other in zip(torch.autograd.grad(actual / 17, (hidden, weight)), wanted):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(
            head_nll(hidden, weight, targets, chunk), expected.detach(), rtol=1e-5, atol=1e-4
        )
