"""The CPU's matrix products: those of float64, with gradients, whatever the shape and the layout; and torch's
own where oneDNN has none."""

import pytest
import torch
import torch.nn.functional as F

from rlhf import matmul
from rlhf.groups import pack
from rlhf.logprobs import chunks
from rlhf.matmul import ROWS, Linear, by_onednn, linear, outer

# rows, inputs, outputs
SHAPES = [
    (0, 8, 4),
    (1, 8, 4),
    (3, 1, 4),
    (5, 8, 1),
    (7, 64, 129),
    (300, 33, 512),
    (256, 33, 512),
    (128, 512, 48),
]


def inputs(T, C, out):
    generator = torch.Generator().manual_seed(T + C + out)
    return [torch.randn(*size, generator=generator).requires_grad_() for size in ((T, C), (out, C), (out,))]


def with_gradients(function, tensors):
    y = function(*tensors)
    return [
        y,
        *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum(), tensors),
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("onednn", [True, False])
def test_value_and_gradients(shape, onednn, monkeypatch):
    if onednn and not matmul.ONEDNN:
        pytest.skip("no oneDNN with AVX-512 here")
    monkeypatch.setattr(matmul, "ONEDNN", onednn)
    tensors = inputs(*shape)
    # fewer than ROWS, or multiples of it
    assert by_onednn(*tensors[:2]) == (onednn and shape[0] in (1, 3, 5, 7, 128, 256))
    exact = with_gradients(F.linear, [t.detach().double().requires_grad_() for t in tensors])
    for found, expected in zip(with_gradients(linear, tensors), exact):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * shape[1] ** 0.5)


def test_only_what_is_needed_is_computed(monkeypatch):
    """A frozen weight costs no gradient, and neither does an input that has none; backward without one of
    them is the same for the other."""
    x, weight, bias = inputs(64, 8, 3)
    expected = with_gradients(linear, [x, weight, bias])
    calls = []
    monkeypatch.setattr(matmul, "outer", lambda a, b: calls.append("weight") or outer(a, b))
    for frozen in ("weight", "x"):
        free = {"x": x, "weight": weight}
        free[frozen] = free[frozen].detach()
        kept = "x" if frozen == "weight" else "weight"
        y = linear(free["x"], free["weight"], None)
        (found,) = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), [free[kept]])
        torch.testing.assert_close(found, expected[1 if kept == "x" else 2], rtol=1e-5, atol=1e-5)
    assert calls == ["weight"] * matmul.ONEDNN


def test_without_a_gradient_the_operator_is_called_directly():
    x, weight, bias = inputs(64, 8, 3)
    expected = linear(x, weight, bias).detach()
    with torch.no_grad():
        assert torch.equal(linear(x, weight, bias), expected)


@pytest.mark.parametrize("out", [3, 30])
def test_the_gradient_of_a_sum(out):
    """Its strides are 0."""
    x, weight, bias = inputs(64, 8, out)
    linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(out, 8), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(64, 8), rtol=1e-5, atol=1e-5)
    assert bias.grad.tolist() == [64.0] * out


@pytest.mark.parametrize("a,b", [((6, 3), (6, 5)), ((6, 5), (6, 3)), ((1, 4), (1, 4)), ((0, 4), (0, 2))])
def test_outer_turns_the_narrower_one(a, b):
    a, b = torch.randn(a), torch.randn(b)
    torch.testing.assert_close(outer(a, b), (a.double().T @ b.double()).float(), rtol=1e-5, atol=1e-5)


def test_layouts():
    wide, weight = torch.randn(9, 40), torch.randn(12, 7)
    for x in (wide[:, 5:12], torch.randn(7, 9).T, wide[::2, :7]):
        torch.testing.assert_close(
            linear(x, weight), (x.double() @ weight.double().T).float(), rtol=1e-5, atol=1e-5
        )
    x = torch.randn(3, 12)
    torch.testing.assert_close(
        linear(x, weight.T), (x.double() @ weight.double()).float(), rtol=1e-5, atol=1e-5
    )


def test_products_are_float32_not_a_narrower_type():
    """1 + 2^-12 is a float32 and no bfloat16 or TF32: its square minus 1 would be 0 or off by 1e-3 of itself
    there."""
    x = torch.full((4, 1), 1 + 2.0**-12)
    found = linear(torch.cat([x, -torch.ones_like(x)], 1), torch.tensor([[1 + 2.0**-12, 1.0]]))
    torch.testing.assert_close(found, torch.full((4, 1), 2.0**-11), rtol=2e-4, atol=0)
    narrow = linear(
        torch.cat([x, -torch.ones_like(x)], 1).bfloat16(), torch.tensor([[1 + 2.0**-12, 1.0]]).bfloat16()
    )
    assert not torch.allclose(narrow.float(), torch.full((4, 1), 2.0**-11), rtol=2e-4, atol=0)


@pytest.mark.skipif(not matmul.ONEDNN, reason="no oneDNN with AVX-512 here")
@pytest.mark.parametrize("biased", [True, False])
def test_the_operator_keeps_torchs_rules(biased):
    """No aliases, the right fake, gradients under tracing, with dynamic shapes."""
    x, weight, bias = inputs(64, 8, 3)
    torch.library.opcheck(matmul.onednn_linear, (x, weight, bias if biased else None))


def test_compiled_is_the_same():
    """With the tracers of torch.compile, not its code generator, which would need a C++ compiler; both kinds
    of row numbers."""
    layer = Linear(16, 24)
    compiled = torch.compile(lambda x: F.gelu(layer(x)) + 1, dynamic=True, backend="aot_eager")
    for T in (5, 64, 192, 100):
        x = torch.randn(T, 16, requires_grad=True)
        plain = with_gradients(lambda x, *_: F.gelu(layer(x)) + 1, [x, *layer.parameters()])
        for found, expected in zip(
            with_gradients(lambda x, *_: compiled(x), [x, *layer.parameters()]), plain
        ):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_products_are_torchs_own():
    x, weight, bias = (t.detach() for t in inputs(5, 8, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear(x, weight, bias)
        assert found.dtype == torch.bfloat16 and torch.equal(found, F.linear(x, weight, bias))
    assert not by_onednn(x.bfloat16(), weight.bfloat16())


@pytest.mark.parametrize("M", [1, 63, 64, 65, 300, 1000])
@pytest.mark.parametrize("chunk", [None, 7, 100, 200])
def test_chunks_are_of_sizes_that_come_again(M, chunk):
    found = list(chunks(M, 512, torch.device("cpu"), chunk))
    assert [i for s in found for i in range(s.start, s.stop)] == list(range(M))
    assert all(s.stop - s.start < ROWS or (s.stop - s.start) % ROWS == 0 for s in found)


@pytest.mark.parametrize("P, T", [(1, 4), (61, 64), (62, 128), (125, 128), (1000, 1024)])
def test_rows_are_of_lengths_that_come_again(P, T):
    groups = pack([[5] * P], [[[7] * 3]], max_positions=2048)
    assert len(groups.ids) == len(groups.positions) == T and groups.last.tolist() == [[P + 2]]
