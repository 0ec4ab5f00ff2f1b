"""--dry_run: the memory of a training run by arithmetic, before anything is loaded.

Every number is bytes that are alive at once; tests/test_memory.py counts them on tensors without data (fake
tensors) and holds the sum to the peak of a process. Not counted on a card: about 1 GB of CUDA itself, and
what its allocator loses between blocks.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import torch
from huggingface_hub import hf_hub_download
from torch import nn

from rlhf.config import UserError
from rlhf.data import open_table, read_meta
from rlhf.dist import RANKS
from rlhf.logprobs import CHUNK_BYTES
from rlhf.model import NeoX, NeoXConfig
from rlhf.pretrained import matmul_dtype, read_json, resolve

GIB = 2**30  # as cards are sold: one of 80 GB has 80 GiB
LOGIT_BUFFERS = 5  # of the size of a chunk's logits: of policy and reference, p, products (logprobs.py)
SAMPLE_BUFFERS = 3  # the same of `sample`: logits, probabilities, sums
# On the CPU: freed blocks that nothing fits into, measured 6 to 15 % (keep_freed_memory). On several ranks 50
# to 100 %, as gathered layers come and go between activations that stay: that is said, not counted.
HEAP_GAPS = 0.1
HEADS = {"critic": "score", "reward model": "score"}  # others: embed_out


@dataclass(frozen=True)
class Size:
    """Of a model: its parameters, and those of them that are in matrix products."""

    config: NeoXConfig
    head: str
    parameters: int
    layers: int  # in the linear layers between embedding and head
    head_weights: int  # of the vocabulary head

    @staticmethod
    def of(config: NeoXConfig, head: str = "embed_out") -> "Size":
        with torch.device("meta"):
            model = NeoX(config, head)
        linear = [m for name, m in model.gpt_neox.named_modules() if isinstance(m, nn.Linear)]
        layers = sum(p.numel() for module in linear for p in module.parameters())
        head_weights = model.embed_out.weight.numel() if head == "embed_out" else 0
        return Size(config, head, sum(p.numel() for p in model.parameters()), layers, head_weights)

    def kept(self, dtype: torch.dtype) -> int:
        """Activations of a layer that its backward reads, bytes per token.

        float32: the input. In the dtype of matrix products: two normed inputs, q, k and v as they come, q and
        k rotated, the attention's output as it comes and as `dense` takes it; the MLP before and after `act`.
        """
        C, wide = self.config.hidden_size, self.config.intermediate_size
        return 4 * C + dtype.itemsize * (9 * C + 2 * wide)

    def passing(self, dtype: torch.dtype) -> int:
        """Activations at once in a forward without a backward, bytes per token: one layer's, in its MLP."""
        C, wide = self.config.hidden_size, self.config.intermediate_size
        return 8 * C + dtype.itemsize * (4 * C + 2 * wide)

    @property
    def root(self) -> int:
        """Parameters that a rank holds whole from a forward to its backward: embedding and head."""
        return self.parameters - self.layers

    def gathered(self, dtype: torch.dtype) -> int:
        """Of a sharded model: two layers as a rank computes with them, one layer's gradient, and its sum."""
        return (3 * dtype.itemsize + 4) * self.layers // self.config.num_hidden_layers

    def frozen(self, dtype: torch.dtype) -> int:
        """Weights of a model for inference only: its matrices are kept in the dtype of matrix products."""
        matrices = self.layers + self.head_weights
        return 4 * (self.parameters - matrices) + dtype.itemsize * matrices


def resident(
    trained: dict[str, Size], frozen: dict[str, Size], dtype: torch.dtype, ranks: int,
) -> dict[str, int]:
    """What stays in memory from the first update on: weights and AdamW's two moments, in float32."""
    held = {name: 4 * size.parameters // ranks for name, size in trained.items()}
    held["AdamW"] = sum(8 * size.parameters for size in trained.values()) // ranks
    for name, size in frozen.items():
        weights = size.frozen(dtype)
        root = weights - dtype.itemsize * size.layers  # whole on every rank once it has run
        held[name] = weights if ranks == 1 else (weights - root) // ranks + root
    return held


def rollout_memory(
    policy: Size, dtype: torch.dtype, prompts: int, k: int, prompt_tokens: int, response_tokens: int,
    ranks: int = 1,
) -> dict[str, int]:
    """Sampling k responses to each of `prompts` prompts: beside what is resident."""
    C = policy.config.hidden_size
    prompts = -(-prompts // ranks)
    cached = prompts * (prompt_tokens + k * response_tokens)  # tokens with a key and a value in each layer
    copied = copies(policy, dtype) + (dtype != torch.float32) * dtype.itemsize * policy.head_weights
    return {
        "copies": copied if ranks == 1 else policy.frozen(dtype),  # a sharded policy decodes on a whole copy
        "cache": 2 * policy.config.num_hidden_layers * C * cached * dtype.itemsize,
        "prefill or logits": max(
            prompts * prompt_tokens * policy.passing(dtype),
            SAMPLE_BUFFERS * 4 * prompts * k * policy.config.vocab_size,
        ),
    }


def update_memory(
    trained: dict[str, Size], frozen: dict[str, Size], dtype: torch.dtype, tokens: int, *, cuda: bool,
    checkpointing: bool, ranks: int = 1,
) -> dict[str, int]:
    """Forward and backward of one row of `tokens` tokens, with the gradients of earlier rows: beside what is
    resident."""
    out = dict.fromkeys(("gradients", "copies", "activations", "head"), 0)
    for size in trained.values():
        C, L = size.config.hidden_size, size.config.num_hidden_layers
        kept = L * size.kept(dtype)
        if checkpointing:  # the input of each layer, and all of the layer that is computed again
            kept = L * 4 * C + size.kept(dtype)
        out["gradients"] += 4 * size.parameters // ranks
        out["copies"] += copies(size, dtype) if ranks == 1 else size.gathered(dtype) + 4 * size.root
        out["activations"] += tokens * (kept + 8 * C)  # and before and after the last norm
        if size.head_weights:
            logits = min(CHUNK_BYTES["cuda" if cuda else "cpu"], 4 * tokens * size.config.vocab_size)
            copied = dtype.itemsize if dtype != torch.float32 else 0
            out["head"] += LOGIT_BUFFERS * logits + (4 + copied) * size.head_weights
    others = [tokens * size.passing(dtype) for size in frozen.values()]
    return out | {"frozen models": max(others, default=0)}


def copies(size: Size, dtype: torch.dtype) -> int:
    """The weights that autocast casts for a forward, and that its backward reads; the head makes its own."""
    return 0 if dtype == torch.float32 else dtype.itemsize * size.layers


# --- for a script


def config_of(model: str, revision: str) -> NeoXConfig:
    """The config.json of a model directory or of a hub id, of which nothing else is downloaded."""
    try:
        hub = not Path(model).is_dir() and model.count("/") == 1
        file = Path(hf_hub_download(model, "config.json", revision=revision)) if hub else None
    except Exception as error:  # the client has a dozen error types; each means: not to be had
        said = str(error).splitlines()[0]
        raise UserError(f"{model}: not a local directory, and the hub says: {said}") from error
    return NeoXConfig.from_dict(read_json(file or resolve(model) / "config.json"))


def sizes_of(models: dict[str, str], revision: str) -> dict[str, Size]:
    """{name: Size}; several models of a name are joined by ','."""
    sizes = {}
    for name, paths in models.items():
        for i, path in enumerate(paths.split(",")):
            size = Size.of(config_of(path, revision), HEADS.get(name, "embed_out"))
            sizes[f"{name} {i + 1}" if i else name] = size
    return sizes


def prompt_lengths(data_dir: str, table: str) -> list[int]:
    return pc.list_value_length(open_table(data_dir, table, ["query_token"], 0)["query_token"]).to_pylist()


def line(name: str, held: dict[str, int]) -> str:
    parts = ", ".join(f"{key} {value / GIB:.2f}" for key, value in held.items() if value)
    return f"  {name:8}{sum(held.values()) / GIB:7.2f} = {parts}"


def dry_run(
    cfg, trained: dict[str, str], frozen: dict[str, str], *, table: str = "", prompts: int = 0, k: int = 1,
    ranks: int = RANKS,
) -> dict[str, float]:
    """Prints what each stage takes on one device, and returns it in GiB; touches and loads nothing.

    trained, frozen  {name: model directory or hub id, several joined by ','}
    table, prompts, k  k samples at a time to each of `prompts` prompts of that table; 0: it does not sample
    """
    cuda = cfg.device.startswith("cuda") or (cfg.device == "auto" and torch.cuda.is_available())
    dtype = matmul_dtype(cfg.dtype, torch.device("cuda" if cuda else "cpu"))
    learners = sizes_of(trained, cfg.revision)
    others = sizes_of(frozen, cfg.revision)
    always = resident(learners, others, dtype, ranks)
    stages = {}
    if prompts:
        lengths = prompt_lengths(cfg.data_dir, table)
        prompts, P = min(prompts, len(lengths)), max(lengths)
        R = getattr(cfg, "response_tokens", 0) or read_meta(cfg.data_dir)["response_tokens"]
        stages["samples"] = rollout_memory(learners["policy"], dtype, prompts, k, P, R, ranks)
    stages["update"] = update_memory(
        learners, others, dtype, cfg.micro_batch_tokens, cuda=cuda, checkpointing=cfg.gradient_checkpointing,
        ranks=ranks,
    )
    name = str(dtype).removeprefix("torch.")
    gaps = f"{HEAP_GAPS:.0%} more for gaps in the heap" if ranks == 1 else "gaps in the heap may double it"
    more = "1 to 2 more for CUDA itself" if cuda else gaps
    each = f" on each of {ranks} devices" if ranks > 1 else ""
    print(f"GiB{each}, matrix products in {name}; {more}")
    print(line("always", always))
    if prompts:
        print(f"samples: {prompts} prompts of at most {P} tokens, {k} responses of at most {R} to each; "
              f"update: rows of {cfg.micro_batch_tokens} tokens")
    for name, held in stages.items():
        print(line(name, held))
    allocator = 1.0 if cuda else 1 + HEAP_GAPS
    total = {name: sum(always.values()) + sum(held.values()) for name, held in stages.items()}
    result = {f"{name}_gib": round(allocator * value / GIB, 2) for name, value in total.items()}
    result["peak_gib"] = max(result.values())
    print(json.dumps(result))
    return result
