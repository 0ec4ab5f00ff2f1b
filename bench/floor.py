"""What the machine could do: the arithmetic of a piece of work and its bytes, at the best rates measured
here."""

import torch

from bench.sides import now
from bench.work import SHAPES, VOCABULARY, Work
from rlhf.matmul import linear


def fastest(call, device: torch.device, times: int = 10) -> float:
    """Seconds of the fastest of some calls."""
    seconds = []
    for _ in range(times):
        began = now(device)
        call()
        seconds.append(now(device) - began)
    return min(seconds)


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Best rates seen here, per second.

    flops   of matrix products: the better of torch.mm, which is what the peers call, and rlhf.matmul
    mm      of torch.mm alone
    bytes   read and written by a copy
    """
    cuda = device.type == "cuda"
    size = 8192 if cuda else 2048
    length = 2**30 if cuda else 2**28
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source, out = (torch.zeros(length, dtype=torch.uint8, device=device) for _ in range(2))
    product = torch.empty_like(a)
    flops = 2 * size**3
    mm = flops / fastest(lambda: torch.mm(a, b, out=product), device)
    ours = flops / fastest(lambda: linear(a, b), device)
    copied = 2 * length / fastest(lambda: out.copy_(source), device)
    return {"flops": max(mm, ours), "mm": mm, "bytes": copied}


def costs(work: Work) -> dict[str, tuple[float, float]]:
    """{part: (FLOPs, bytes)} that the work cannot do without; a part's entries are added up under the name
    before the slash. Bytes: weights once per pass, the cache of decoding, AdamW's state; no activations."""
    C, L, _ = SHAPES[work.model]
    N, K, P, R = work.N, work.K, work.P, work.R
    size = 2 if work.cfg.dtype == "bfloat16" else 4
    body = 12 * C * C * L
    head = VOCABULARY * C
    weights = size * (body + head)  # of a language model, read once

    def forward(predicted: int, K: int = K) -> float:
        attended = P * (P + 1) / 2 + K * (R * P + R * (R + 1) / 2)  # who looks at whom, per prompt
        return 2 * body * N * (P + K * R) + 4 * C * L * N * attended + 2 * head * predicted

    def update(predicted: int) -> tuple[float, float]:
        return 3 * forward(predicted), 3 * weights

    # in float32: reads weight, gradient and two moments, writes all but the gradient
    adamw = 0, 28 * (body + 2 * head)
    prefill = forward(N, K=0), weights
    past = sum(P + t for t in range(1, R))  # tokens that a sequence looks at while it is decoded
    decode_flops = N * K * (2 * (body + head) * (R - 1) + 4 * C * L * past)
    decode_bytes = (R - 1) * (weights + size * 2 * C * L * N * (P + K * R / 2))
    response = N * K * R
    if work.kind == "generate":
        return {"prefill": prefill, "decode": (decode_flops, decode_bytes)}
    if work.kind == "rloo":
        epochs = work.cfg.ppo_epochs
        flops, bytes_ = update(response)
        return {
            "rollout": prefill,
            "rollout/decode": (decode_flops, decode_bytes),
            # the forward of the policy that scores is the first that learns
            "scoring": (2 * forward(response) + forward(0), 3 * weights),
            "update": (epochs * flops - forward(response), epochs * bytes_ - weights),
            "update/adamw": (0, epochs * adamw[1]),
        }
    if work.kind == "dpo":
        return {"reference": (forward(response), weights), "update": update(response), "update/adamw": adamw}
    if work.kind == "rm":
        return {"update": update(0), "update/adamw": adamw}
    every = work.kind == "sft" and work.cfg.loss_on == "all"
    return {"update": update(N * (P + R - 1) if every else response), "update/adamw": adamw}


def floor(work: Work, rates: dict[str, float]) -> dict[str, float]:
    """{part: seconds}: of each entry of `costs` the longer of arithmetic and bytes."""
    out: dict[str, float] = {}
    for name, (flops, bytes_) in costs(work).items():
        part = name.split("/")[0]
        out[part] = out.get(part, 0.0) + max(flops / rates["flops"], bytes_ / rates["bytes"])
    return out
