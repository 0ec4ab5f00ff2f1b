"""Matmul: by oneDNN on the CPU in float32, elsewhere torch's own.

For float32 on a CPU torch calls MKL, which on AMD processors uses AVX2 only: half the speed of a core with
AVX-512. oneDNN, which comes with torch, uses AVX-512. (torch.compile calls it as `_linear_pointwise`. Where
that is missing, or without AVX-512, everything here is F.linear.)

oneDNN compiles a kernel for every new shape, which takes as long as a small matmul itself. So it gets shapes
that recur, multiples of ROWS rows or fewer than ROWS: `groups.pack` pads and `logprobs.chunks` cuts to them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ONEDNN = (hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
          and torch.backends.cpu.get_cpu_capability() == "AVX512")
ROWS = 64  # see above


def by_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN computes the matmul of a, which gives the rows, and b."""
    return (ONEDNN and a.device.type == "cpu" and a.dtype == b.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu") and a.dim() == 2
            and (a.shape[0] < ROWS or a.shape[0] % ROWS == 0) and a.numel() * b.numel() > 0)


def plain_onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# F.linear with a gradient, as an operator of our own: torch.compile takes `_linear_pointwise` for constant
# weights only. After a change of `backward` empty torch's compile cache: it knows the operator by its name.
onednn_linear = torch.library.custom_op("rlhf::onednn_linear", plain_onednn_linear, mutates_args=())


@onednn_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    d_out = d_out.contiguous()  # the gradient of a sum has strides of 0
    d_x = linear(d_out, weight.T) if ctx.needs_input_grad[0] else None
    d_weight = outer(d_out, x) if ctx.needs_input_grad[1] else None
    d_bias = d_out.sum(0) if ctx.needs_input_grad[2] else None
    return d_x, d_weight, d_bias


def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


onednn_linear.register_autograd(backward, setup_context=setup_context)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: (T, C), (out, C), (out,) -> (T, out)."""
    if not by_onednn(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return onednn_linear(x, weight, bias)
    return plain_onednn_linear(x, weight, bias)  # decode steps: saves the 10 us of an operator in Python


def outer(a: Tensor, b: Tensor) -> Tensor:
    """a.T @ b: (T, M), (T, N) -> (M, N).

    The narrower one is transposed in memory: oneDNN is fast where the terms of a sum lie side by side.
    """
    if not by_onednn(a, b):
        return a.T @ b
    if a.shape[1] <= b.shape[1]:
        return linear(a.T.contiguous(), b.T)
    return linear(b.T.contiguous(), a.T).T


class Linear(nn.Linear):
    """nn.Linear of rows (T, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
