"""Log-probs for tests of losses: ragged, with garbage in the padding."""

import math

import pytest
import torch

from rlhf.losses import PREFERENCE_LOSSES as LOSSES

WRONG = 1e-3  # a wrong formula (sums for means, another sign) is off by more than this

# the check values' log-probs: policy and reference, chosen and rejected
A = [[[-0.5, -1.0, -1.5, -1.0], [-1.2, -0.8, -2.5]], [[-2.0, -0.3], [-0.7, -0.9, -1.1, -0.4, -0.9]]]
A_REF = [[[-0.6, -1.1, -1.2, -1.3], [-1.0, -0.9, -1.6]], [[-1.5, -0.5], [-0.8, -1.0, -1.0, -0.6, -1.1]]]


def padded(rows: list, fill: float = math.nan) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged lists (N, K) of log-probs -> (N, K, R) with `fill` in the padding, and the mask."""
    R = max(len(response) for row in rows for response in row)
    values = torch.tensor([[r + [fill] * (R - len(r)) for r in row] for row in rows], dtype=torch.float64)
    mask = torch.tensor([[[True] * len(r) + [False] * (R - len(r)) for r in row] for row in rows])
    return values, mask


def call(name: str, policy: list, reference: list, **options) -> list[float]:
    logprobs, mask = padded(policy)
    return LOSSES[name](logprobs, padded(reference)[0], mask, **options)[0].tolist()


def ragged(N=7, K=2, R=9, seed=0) -> tuple[list, list]:
    """Random log-probs of policy and reference, as ragged lists; one response of one token."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, R + 1, (N, K), generator=g)
    lengths[0, 0] = 1

    def response(n: int) -> list[float]:
        return (-3 * torch.rand(n, generator=g, dtype=torch.float64)).tolist()

    policy = [[response(n) for n in row] for row in lengths.tolist()]
    return policy, [[response(n) for n in row] for row in lengths.tolist()]


def batch(N=7, K=2, R=9, seed=0):
    """The same as tensors (N, K, R), and the mask. The padding is nan, and inf in the reference."""
    policy, reference = ragged(N, K, R, seed)
    logprobs, mask = padded(policy, math.nan)
    return logprobs.requires_grad_(), padded(reference, math.inf)[0], mask


def gradient(loss, x):
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


def close(values, tolerance=1e-9):
    return pytest.approx(values, rel=tolerance, abs=tolerance)
