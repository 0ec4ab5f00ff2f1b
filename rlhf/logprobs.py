"""Per-token log-prob, entropy and KL from hidden states, without ever holding a (tokens, V) matrix.

The vocabulary head of Pythia makes 50,304 logits per token: 200 KB in float32. Here the M response tokens go
through it in chunks, and a chunk's logits are dropped before the next one's are made. The forward keeps only
log-normalizer and entropy; the backward computes the logits again.
All results are float32, in nats, per token, at the given temperature: log softmax(logits / temperature).
"""

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from rlhf.matmul import ROWS, linear, outer

# Size of a chunk's logits. On the CPU: enough rows for a fast matmul, few enough to stay near the cache
# (common.keep_freed_memory keeps malloc from unmapping such a buffer at every use).
CHUNK_BYTES = {"cpu": 48 * 2**20, "cuda": 512 * 2**20}


def chunks(M: int, V: int, device: torch.device, chunk: int | None = None) -> Iterator[slice]:
    """Slices of M tokens; on the CPU multiples of ROWS as far as that goes, then the rest."""
    rows = ROWS if device.type == "cpu" else 1
    size = chunk or max(1, CHUNK_BYTES[device.type] // (4 * V))
    size = size // rows * rows or size
    whole = M // rows * rows
    for begin, end in ((0, whole), (whole, M)):
        for start in range(begin, end, size):
            yield slice(start, min(start + size, end))


def autocast_dtype(device: torch.device) -> torch.dtype:
    """The dtype of a matmul: autocast's inside an autocast block, else float32."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return torch.float32


def head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(m, C), (V, C) in the dtype of the matmul -> logits (m, V) in float32: in sampling as in scoring."""
    with torch.autocast(weight.device.type, enabled=False):
        hidden = hidden.to(weight.dtype)
        if weight.is_cuda and weight.dtype == torch.bfloat16:
            # float32 out: logits near 10 rounded to bfloat16 would be off by up to 1/32
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return linear(hidden, weight).float()


def chunk_logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """`head_logits` / temperature."""
    z = head_logits(hidden, weight)
    return z if temperature == 1 else z.div_(temperature)


# --- on a chunk of logits z (m, V): pure functions, which torch.compile fuses into one or two passes


def target_stats(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of each target, entropy H = log Z - E[z], and log-normalizer log Z, each (m,)."""
    top = z.amax(1, keepdim=True)
    shifted = z - top
    p = shifted.exp()
    total = p.sum(1)
    log_total = total.log()
    logprobs = shifted.gather(1, targets[:, None])[:, 0] - log_total
    entropy = log_total - (p * shifted).sum(1) / total
    return logprobs, entropy, top[:, 0] + log_total


def reference_stats(
    z: Tensor, normalizer: Tensor, ref_z: Tensor, targets: Tensor,
) -> tuple[Tensor, Tensor]:
    """The reference's log-prob of each target, and KL(p || ref), each (m,)."""
    top = ref_z.amax(1, keepdim=True)
    shifted = ref_z - top
    log_total = shifted.exp().sum(1).log()
    ref_normalizer = top[:, 0] + log_total
    # E[log p - log q], the difference of logits first, so that a small KL keeps its digits
    p = (z - normalizer[:, None]).exp()
    kl = (p * (z - ref_z)).sum(1) - (normalizer - ref_normalizer)
    # step by step as in target_stats: a reference that equals the policy gives a log-ratio of exactly 0
    return shifted.gather(1, targets[:, None])[:, 0] - log_total, kl


def logprob_gradient(z: Tensor, normalizer: Tensor, d_logprobs: Tensor) -> Tensor:
    """-p d_logprobs, (m, V): d log p[y] / dz = onehot(y) - p, without its onehot part."""
    return (z - normalizer[:, None]).exp() * -d_logprobs[:, None]


def entropy_gradient(
    z: Tensor, normalizer: Tensor, entropy: Tensor, d_logprobs: Tensor, d_entropy: Tensor,
) -> Tensor:
    """`logprob_gradient` plus the entropy's: dH/dz = -p (log p + H), (m, V)."""
    logp = z - normalizer[:, None]
    return -logp.exp() * (d_entropy[:, None] * (logp + entropy[:, None]) + d_logprobs[:, None])


PLAIN_KERNELS = (target_stats, reference_stats, logprob_gradient, entropy_gradient)
# looked up at each call, so that compile_kernels can replace them
kernels = SimpleNamespace(**{function.__name__: function for function in PLAIN_KERNELS})


def compile_kernels() -> None:
    """From now on the four functions above run compiled, in the whole process."""
    for function in PLAIN_KERNELS:
        setattr(kernels, function.__name__, torch.compile(function, dynamic=True))


def head_gradient(
    d_z: Tensor, d_logprobs: Tensor, targets: Tensor, hidden: Tensor, weight: Tensor,
    d_hidden: Tensor | None, d_weight: Tensor | None,
) -> None:
    """Adds the onehot part to a chunk's gradient d_z (m, V) and carries it through the head, in place.

    d_logprobs and targets are (m, J): the J tokens of a position whose log-prob is in the loss.
    d_hidden (m, C) is overwritten; to d_weight, held transposed (C, V), the chunk's part is added.
    """
    d_z = d_z.scatter_add_(1, targets, d_logprobs).to(weight.dtype)
    if d_hidden is not None:
        d_hidden.copy_(linear(d_z, weight.T))
    if d_weight is not None:  # summed over chunks in float32
        d_weight += outer(hidden.to(weight.dtype), d_z)


class TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, ref_hidden: Tensor | None,
        ref_weight: Tensor | None, temperature: float, chunk: int | None, top_k: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        device = hidden.device
        ctx.dtype = autocast_dtype(device)
        with torch.autocast(device.type, enabled=False):
            w = weight.to(ctx.dtype)
            ref_w = None if ref_weight is None else ref_weight.to(ctx.dtype)
            empty = [torch.empty(len(hidden), device=device) for _ in range(5)]
            logprobs, entropy, normalizer, ref_logprobs, kl = empty  # (M,) each
            top_logprobs = torch.empty(len(hidden), top_k, device=device)  # (M, top_k)
            top = torch.empty(len(hidden), top_k, dtype=torch.long, device=device)  # (M, top_k)
            for s in chunks(len(hidden), len(weight), device, chunk):
                z = chunk_logits(hidden[s], w, temperature)  # (m, V)
                logprobs[s], entropy[s], normalizer[s] = kernels.target_stats(z, targets[s])
                if top_k:
                    values, top[s] = z.topk(top_k, 1)
                    top_logprobs[s] = values - normalizer[s, None]
                if ref_w is not None:
                    ref_z = chunk_logits(ref_hidden[s], ref_w, temperature)  # (m, V)
                    ref_logprobs[s], kl[s] = kernels.reference_stats(z, normalizer[s], ref_z, targets[s])
        ctx.save_for_backward(hidden, weight, targets, normalizer, entropy, top if top_k else None)
        ctx.mark_non_differentiable(ref_logprobs, kl, top)
        ctx.set_materialize_grads(False)  # an entropy that no loss uses has the gradient None
        ctx.temperature = temperature
        ctx.chunk = chunk
        return logprobs, entropy, ref_logprobs, kl, top_logprobs, top

    @staticmethod
    def backward(ctx, d_logprobs, d_entropy, d_ref_logprobs, d_kl, d_top, _):
        hidden, weight, targets, normalizer, entropy, top = ctx.saved_tensors
        w = weight.to(ctx.dtype)
        d_hidden = d_weight = None
        if ctx.needs_input_grad[0]:
            d_hidden = torch.empty_like(hidden)
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros(weight.shape[::-1], device=weight.device)  # (C, V), as the matmul makes it
        if d_logprobs is None:
            d_logprobs = torch.zeros_like(normalizer)
        targets = targets[:, None]  # (M, J): the tokens whose log-prob is in the loss
        d_targets = d_logprobs[:, None]  # (M, J)
        if d_top is not None:
            targets = torch.cat([targets, top], 1)
            d_targets = torch.cat([d_targets, d_top], 1)
            d_logprobs = d_targets.sum(1)
        for s in chunks(len(hidden), len(weight), hidden.device, ctx.chunk):
            z = chunk_logits(hidden[s], w, ctx.temperature)  # (m, V)
            if d_entropy is not None:
                d_z = kernels.entropy_gradient(z, normalizer[s], entropy[s], d_logprobs[s], d_entropy[s])
            else:
                d_z = kernels.logprob_gradient(z, normalizer[s], d_logprobs[s])
            if ctx.temperature != 1:
                d_z = d_z.div_(ctx.temperature)
            d_onehot = d_targets[s] / ctx.temperature  # (m, J)
            d_rows = None if d_hidden is None else d_hidden[s]  # (m, C)
            head_gradient(d_z, d_onehot, targets[s], hidden[s], w, d_rows, d_weight)
        if d_weight is not None:
            d_weight = d_weight.T.to(weight.dtype)  # (V, C)
        return d_hidden, d_weight, None, None, None, None, None, None


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of the whole next-token distribution, both (M,), in nats.

    hidden (M, C), head weight (V, C), both with a gradient; targets (M,).
    chunk: tokens at a time (default: by bytes).
    """
    return TokenLogprobs.apply(hidden, weight, targets, None, None, temperature, chunk, 0)[:2]


def top_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, top_k: int, temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`token_logprobs`, and from the same pass the most probable tokens of each position.

    Returns logprobs (M,), entropy (M,), top_logprobs (M, top_k), best first, differentiable too, and which
    tokens they are (M, top_k).
    """
    top_k = min(top_k, len(weight))
    columns = TokenLogprobs.apply(hidden, weight, targets, None, None, temperature, chunk, top_k)
    return *columns[:2], *columns[4:]


def compare_logprobs(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, targets: Tensor,
    temperature: float = 1.0, chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`token_logprobs` together with a reference, in one pass: logprobs, entropy, ref_logprobs, kl, all (M,).

    ref_logprobs  the reference's log-prob of each target, without a gradient
    kl            KL(p || ref) = sum_v p_v (log p_v - log ref_v) over the vocabulary, without a gradient
    ref_hidden (M, C') and ref_weight (V, C'): the reference may have another width.
    """
    reference = ref_hidden.detach(), ref_weight.detach()
    return TokenLogprobs.apply(hidden, weight, targets, *reference, temperature, chunk, 0)[:4]


class HeadNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, with_gradient: bool, chunk: int | None,
    ) -> Tensor:
        device = hidden.device
        dtype = autocast_dtype(device)
        loss = torch.zeros((), device=device)
        d_logprobs = torch.full((len(hidden),), -1.0, device=device)
        d_hidden = d_weight = None
        if with_gradient:
            d_hidden = torch.empty_like(hidden)
            d_weight = torch.zeros(weight.shape[::-1], device=device)  # (C, V)
        with torch.autocast(device.type, enabled=False):
            w = weight.to(dtype)
            for s in chunks(len(hidden), len(weight), device, chunk):
                z = chunk_logits(hidden[s], w, 1.0)  # (m, V)
                logprobs, _, normalizer = kernels.target_stats(z, targets[s])
                loss -= logprobs.sum()
                if with_gradient:
                    head_gradient(
                        kernels.logprob_gradient(z, normalizer, d_logprobs[s]),
                        d_logprobs[s, None], targets[s, None], hidden[s], w, d_hidden[s], d_weight,
                    )
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    def backward(ctx, d_loss: Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        d_weight.mul_(d_loss)  # in place: it is as large as the head, and used once
        return d_hidden * d_loss, d_weight.T, None, None, None


def head_nll(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """-sum of log p(target) over the M tokens, in nats, the loss of SFT: `-token_logprobs(...)[0].sum()`.

    Every token weighs the same, so the gradient is formed in the forward and the logits are not computed a
    second time: three matmuls with the head instead of four. Backward once only.
    hidden (M, C), head weight (V, C), targets (M,).
    """
    return HeadNLL.apply(hidden, weight, targets, torch.is_grad_enabled(), chunk)
