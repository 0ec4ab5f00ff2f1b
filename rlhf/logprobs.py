"""Per-token log-prob, entropy and KL from hidden states, without ever holding a (tokens, V) matrix, forward or backward.

The vocabulary head of Pythia makes 50,304 logits per token: 200 KB in float32. Here the M response tokens go through it in chunks, whose
logits are dropped before the next one's are made: forward keeps log-normaliser and entropy only, and backward computes the chunk's logits again.
All results are float32, in nats, per token, at the given temperature: log softmax(logits / temperature).
"""

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from rlhf.matmul import ROWS, linear, outer

# Logits of one chunk. On the CPU: enough rows for fast matrix products, few enough to stay near the cache (common.keep_freed_memory keeps malloc from
# unmapping such a buffer at every use).
CHUNK_BYTES = {"cpu": 48 * 2**20, "cuda": 512 * 2**20}


def chunks(M: int, V: int, device: torch.device, chunk: int | None = None) -> Iterator[slice]:
    """Slices of M tokens; on the CPU multiples of ROWS as far as that goes, then the rest."""
    rows = ROWS if device.type == "cpu" else 1
    size = chunk or max(1, CHUNK_BYTES[device.type] // (4 * V))
    size, whole = size // rows * rows or size, M // rows * rows
    for begin, end in ((0, whole), (whole, M)):
        for start in range(begin, end, size):
            yield slice(start, min(start + size, end))


def autocast_dtype(device: torch.device) -> torch.dtype:
    """The type of matrix products: autocast's inside an autocast block, else float32."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


def chunk_logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """(m, C), (V, C) of the product's type -> logits / temperature (m, V) in float32."""
    hidden = hidden.to(weight.dtype)
    if weight.is_cuda and weight.dtype == torch.bfloat16:
        z = torch.mm(hidden, weight.T, out_dtype=torch.float32)  # logits of 10 rounded to bfloat16 would be off by up to 1/32
    else:
        z = linear(hidden, weight).float()
    return z if temperature == 1 else z.div_(temperature)


# --- what is done to a chunk of logits z (m, V), as pure functions that torch.compile fuses into one or two passes over the chunk


def target_stats(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of each target, entropy, and log-normalizer, each (m,)."""
    top = z.amax(1, keepdim=True)
    shifted = z - top
    p = shifted.exp()
    total = p.sum(1)
    log_total = total.log()
    logprobs = shifted.gather(1, targets[:, None])[:, 0] - log_total
    return logprobs, log_total - (p * shifted).sum(1) / total, top[:, 0] + log_total  # H = log Z - E[z]


def reference_stats(z: Tensor, normalizer: Tensor, ref_z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The reference's log-prob of each target, and KL(p || ref), each (m,)."""
    top = ref_z.amax(1, keepdim=True)
    shifted = ref_z - top
    log_total = shifted.exp().sum(1).log()
    # E[log p - log q], the difference of logits first, so that a small KL keeps its digits
    kl = ((z - normalizer[:, None]).exp() * (z - ref_z)).sum(1) - (normalizer - (top[:, 0] + log_total))
    # step by step as in target_stats: a reference that equals the policy gives a log-ratio of exactly 0
    return shifted.gather(1, targets[:, None])[:, 0] - log_total, kl


def logprob_gradient(z: Tensor, normalizer: Tensor, d_logprobs: Tensor) -> Tensor:
    """-p * gradient: d log p[y] / dz = onehot(y) - p, without the onehot part, (m, V)."""
    return (z - normalizer[:, None]).exp() * -d_logprobs[:, None]


def entropy_gradient(z: Tensor, normalizer: Tensor, entropy: Tensor, d_logprobs: Tensor, d_entropy: Tensor) -> Tensor:
    """`logprob_gradient` plus the entropy's: dH/dz = -p (log p + H), (m, V)."""
    logp = z - normalizer[:, None]
    return -logp.exp() * (d_entropy[:, None] * (logp + entropy[:, None]) + d_logprobs[:, None])


kernels = SimpleNamespace(target_stats=target_stats, reference_stats=reference_stats, logprob_gradient=logprob_gradient, entropy_gradient=entropy_gradient)


def compile_kernels() -> None:
    """From now on the four functions above run compiled, in the whole process."""
    for function in (target_stats, reference_stats, logprob_gradient, entropy_gradient):
        setattr(kernels, function.__name__, torch.compile(function, dynamic=True))


def head_gradient(d_z: Tensor, d_logprobs: Tensor, targets: Tensor, hidden: Tensor, weight: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None) -> None:
    """From the gradient of a chunk of logits, still without its onehot part, into those of hidden states (m, C) and head weight, transposed: (C, V).

    d_logprobs and targets are (m, J): the J tokens of a position whose log-prob is in the loss.
    """
    d_z = d_z.scatter_add_(1, targets, d_logprobs).to(weight.dtype)
    if d_hidden is not None:
        d_hidden.copy_(linear(d_z, weight.T))
    if d_weight is not None:  # summed over chunks in float32
        d_weight += outer(hidden.to(weight.dtype), d_z)


class TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, ref_hidden: Tensor | None, ref_weight: Tensor | None,
                temperature: float, chunk: int | None, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        ctx.dtype = autocast_dtype(hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight.to(ctx.dtype)
            ref_w = None if ref_weight is None else ref_weight.to(ctx.dtype)
            logprobs, entropy, normalizer, ref_logprobs, kl = (torch.empty(len(hidden), device=hidden.device) for _ in range(5))
            top_logprobs = torch.empty(len(hidden), top_k, device=hidden.device)  # (M, top_k)
            top = torch.empty(len(hidden), top_k, dtype=torch.long, device=hidden.device)
            for s in chunks(len(hidden), len(weight), hidden.device, chunk):
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
        ctx.set_materialize_grads(False)  # an entropy that no loss uses has the gradient None: known without asking the device
        ctx.temperature, ctx.chunk = temperature, chunk
        return logprobs, entropy, ref_logprobs, kl, top_logprobs, top

    @staticmethod
    def backward(ctx, d_logprobs: Tensor | None, d_entropy: Tensor | None, d_ref, d_kl, d_top: Tensor | None, _):
        hidden, weight, targets, normalizer, entropy, top = ctx.saved_tensors
        w = weight.to(ctx.dtype)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros(weight.shape[::-1], device=weight.device) if ctx.needs_input_grad[1] else None  # (C, V), as the product makes it
        d_logprobs = torch.zeros_like(normalizer) if d_logprobs is None else d_logprobs
        targets, d_targets = targets[:, None], d_logprobs[:, None]  # (M, J)
        if d_top is not None:
            targets, d_targets = torch.cat([targets, top], 1), torch.cat([d_targets, d_top], 1)
            d_logprobs = d_targets.sum(1)
        for s in chunks(len(hidden), len(weight), hidden.device, ctx.chunk):
            z = chunk_logits(hidden[s], w, ctx.temperature)  # (m, V)
            if d_entropy is not None:
                d_z = kernels.entropy_gradient(z, normalizer[s], entropy[s], d_logprobs[s], d_entropy[s])
            else:
                d_z = kernels.logprob_gradient(z, normalizer[s], d_logprobs[s])
            d_z = d_z if ctx.temperature == 1 else d_z.div_(ctx.temperature)
            head_gradient(d_z, d_targets[s] / ctx.temperature, targets[s], hidden[s], w, None if d_hidden is None else d_hidden[s], d_weight)
        return d_hidden, d_weight if d_weight is None else d_weight.T.to(weight.dtype), *[None] * 6


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of the whole next-token distribution, both (M,), differentiable in hidden and weight.

    hidden (M, C), head weight (V, C), targets (M,); chunk: tokens at a time (default: by bytes).
    """
    return TokenLogprobs.apply(hidden, weight, targets, None, None, temperature, chunk, 0)[:2]


def top_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, top_k: int, temperature: float = 1.0, chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`token_logprobs`, and from the same pass the log-probs of the top_k tokens at each position, best first, differentiable, and which
    tokens they are: logprobs (M,), entropy (M,), top_logprobs (M, top_k), top (M, top_k)."""
    columns = TokenLogprobs.apply(hidden, weight, targets, None, None, temperature, chunk, min(top_k, len(weight)))
    return *columns[:2], *columns[4:]


def compare_logprobs(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, targets: Tensor, temperature: float = 1.0,
                     chunk: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`token_logprobs`, and from the same pass the reference's log-prob of each target and KL(p || ref) of the whole next-token distributions,
    sum_v p_v (log p_v - log ref_v): logprobs, entropy, ref_logprobs, kl, all (M,). The last two carry no gradient.

    ref_hidden (M, C') and ref_weight (V, C'): the reference may have another width.
    """
    return TokenLogprobs.apply(hidden, weight, targets, ref_hidden.detach(), ref_weight.detach(), temperature, chunk, 0)[:4]


class HeadNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, with_gradient: bool, chunk: int | None) -> Tensor:
        dtype = autocast_dtype(hidden.device)
        loss, minus_one = torch.zeros((), device=hidden.device), torch.full((len(hidden),), -1.0, device=hidden.device)
        d_hidden, d_weight = (torch.empty_like(hidden), torch.zeros(weight.shape[::-1], device=weight.device)) if with_gradient else (None, None)
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight.to(dtype)
            for s in chunks(len(hidden), len(weight), hidden.device, chunk):
                z = chunk_logits(hidden[s], w, 1.0)  # (m, V)
                logprobs, _, normalizer = kernels.target_stats(z, targets[s])
                loss -= logprobs.sum()
                if with_gradient:
                    d_z = kernels.logprob_gradient(z, normalizer, minus_one[s])
                    head_gradient(d_z, minus_one[s, None], targets[s, None], hidden[s], w, d_hidden[s], d_weight)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    def backward(ctx, d_loss: Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_loss, d_weight.mul_(d_loss).T, None, None, None  # in place: it is as large as the head, and used once


def head_nll(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """-sum of log p(target) over the M tokens, in nats: `-token_logprobs(...)[0].sum()`, where every token weighs the same (SFT).

    Because the weights are known beforehand the gradient is formed in the forward, and the logits are not computed a second time: three products with
    the head instead of four. Backward once only. hidden (M, C), head weight (V, C), targets (M,).
    """
    return HeadNLL.apply(hidden, weight, targets, torch.is_grad_enabled(), chunk)
