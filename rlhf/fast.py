"""The fast paths of CUDA, each with a plain twin that needs no compiler: --plain takes the twins.

    fast                                      plain
    flex_attention over a packed row          scaled_dot_product_attention, group by group
    a decode step recorded as a CUDA graph    the same step, kernel by kernel
    torch.compile (--compile)                 as written

Without a card the tests execute: flex_attention uncompiled, its block table against brute force
(test_groups.py); the plain path forward and backward, prefill and decode steps on meta tensors, which have a
device that is not the CPU, and no bytes; recording and replaying with a stand-in for the graph; the dtype of
logits (test_fast.py); compiled layers on the CPU (test_model.py).

What only a card can show, and runs/gpu_check.sh asks it: that Triton compiles flex_attention there, and what
numbers and gradients its kernels give; what a graph captures; bfloat16 products with a float32 result
(torch.mm with out_dtype); timing by events; the peaks that --dry_run predicts; every speed.
"""

from types import SimpleNamespace

import torch

paths = SimpleNamespace(plain=False)  # looked up at each use; set by common.setup

# One variant is compiled per grad mode, head shape and row of a single block, and torch's limit is 8: what
# comes after runs uncompiled, with (T, T) scores.
RECOMPILE_LIMIT = 64


def set_up_cuda() -> None:
    torch.set_float32_matmul_precision("highest")  # --dtype=float32 is no TF32, in Triton's kernels too
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT


def flex_options(T: int, D: int) -> dict[str, int | bool]:
    """kernel_options of flex_attention for a row of T tokens and heads of D features.

    Known here and not to a compiler that sees a symbolic T: every token sees at least itself, and rows are
    filled up to whole blocks. For D = 256 (Pythia 1B) torch's own choice spills 5,408 bytes per thread in the
    backward on sm_90, with 8 warps and these blocks 428 (compiled ahead of time; not timed on a card).
    """
    options = {"ROWS_GUARANTEED_SAFE": True, "IS_DIVISIBLE": T % 128 == 0}
    if D >= 256:
        blocks = {"BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32, "num_warps": 8}
        options |= {f"bwd_{name}": value for name, value in blocks.items()}
    return options
