"""Sums and means over the kept positions of the last dimension: only here a sequence becomes one number.

A masked position is replaced (`where`), never multiplied by zero: what the padding holds, even inf or nan,
reaches neither the number nor its gradient. The sum and the mean of log-probs have two names, because some
losses differ in nothing else.
"""

import torch
from torch import Tensor


def lengths(mask: Tensor) -> Tensor:
    """Kept positions of every row: (..., R) bool -> (...) int64; at least 1, so that no mean is nan."""
    return mask.sum(-1).clamp(min=1)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """(..., R), (..., R) bool -> (...): sum over the last dimension where the mask is True."""
    return torch.where(mask, values, 0).sum(-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """(..., R), (..., R) bool -> (...): mean over the last dimension where the mask is True."""
    return masked_sum(values, mask) / lengths(mask)


def seq_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """log pi(y|x) in nats per sequence: `logprobs` (..., R) summed over the response tokens -> (...).

    The mask keeps the first EOS.
    """
    return masked_sum(logprobs, mask)


def mean_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """(1/|y|) log pi(y|x) in nats per token: `seq_logprobs` divided by the number of response tokens |y|."""
    return masked_mean(logprobs, mask)
