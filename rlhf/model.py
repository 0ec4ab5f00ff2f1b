"""GPT-NeoX (the Pythia suite) in plain PyTorch, with Hugging Face's parameter names (see pretrained.py).

Tokens always come as one flat row `ids (T,)`: many prompts, each with its responses, or one new token per
sequence. Which token may look at which is given with the row: `attend(layer, q, k, v) -> out`, all (T, H, D).
`groups.py` has the one for packed groups, `generate.py` those that fill and read a key-value cache.

Dropout is left out on purpose: every stage of vwxyzjn/summarize_from_feedback_details (github) turns it off.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import MISSING, asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf.config import UserError
from rlhf.dist import full, parameters
from rlhf.matmul import Linear

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

EOS = 0  # <|endoftext|> of the GPT-NeoX tokenizer
PAD = 1  # <|padding|>

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class NeoXConfig:
    """The architecture part of a Hugging Face GPTNeoXConfig."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str = "gelu"
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    use_parallel_residual: bool = True
    attention_bias: bool = True
    tie_word_embeddings: bool = False
    rotary_pct: float = 0.25
    rotary_emb_base: float = 10000.0

    @staticmethod
    def from_dict(raw: dict) -> "NeoXConfig":
        """Reads a `config.json`, its rotary settings in the old spelling (`rotary_pct`, `rotary_emb_base`) or
        in the new one (`rope_parameters`).

        Raises UserError, naming the field, for anything that this model would silently compute differently.
        """
        kind = raw.get("model_type")
        if kind != "gpt_neox":
            raise UserError(f"model_type is {kind!r}: only 'gpt_neox' (Pythia, GPT-NeoX) is implemented")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise UserError(f"config.json: the rotary settings are {rope!r}, expected names with values")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise UserError(f"rope type {kind!r} is not implemented: only 'default' rotary embeddings are")
        known = {f.name: raw[f.name] for f in fields(NeoXConfig) if raw.get(f.name) is not None}
        base = raw.get("rotary_emb_base", raw.get("rope_theta", 10000.0))
        known["rotary_pct"] = rope.get("partial_rotary_factor", raw.get("rotary_pct", 0.25))
        known["rotary_emb_base"] = rope.get("rope_theta", base)
        required = [f.name for f in fields(NeoXConfig) if f.default is MISSING]
        if missing := [name for name in required if name not in known]:
            raise UserError(f"config.json lacks {', '.join(missing)}")
        for field in fields(NeoXConfig):
            value = known.get(field.name, field.default)
            kinds = (int, float) if field.type is float else field.type
            sensible = isinstance(value, kinds) and isinstance(value, bool) == (field.type is bool)
            if field.type in (int, float):
                most = 1000 if field.name == "num_hidden_layers" else 2**21  # a hang, or all memory
                sensible = sensible and 0 <= value <= most and (field.type is float or value > 0)
            if not sensible:
                kind = field.type.__name__
                raise UserError(f"config.json: {field.name} is {value!r}, which is no sensible {kind}")
        config = NeoXConfig(**known)
        if config.hidden_act not in ACTIVATIONS:
            names = ", ".join(ACTIVATIONS)
            raise UserError(f"hidden_act {config.hidden_act!r} is not implemented; known: {names}")
        if config.hidden_size % config.num_attention_heads:
            raise UserError(f"hidden_size {config.hidden_size} is not divisible by num_attention_heads "
                            f"{config.num_attention_heads}")
        return config

    def to_dict(self) -> dict:
        """A `config.json` that both old and new transformers read (both spellings of the rotary settings)."""
        rope = {
            "rope_type": "default",
            "rope_theta": self.rotary_emb_base,
            "partial_rotary_factor": self.rotary_pct,
        }
        special = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD}
        return {"model_type": "gpt_neox", **asdict(self), "rope_parameters": rope, **special}


def rotary(positions: Tensor, config: NeoXConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles in float32, each (T, 1, rotary_dim).

    The second half repeats the first: GPT-NeoX's layout, not the interleaved one.
    """
    dim = int(config.hidden_size // config.num_attention_heads * config.rotary_pct)
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
    frequencies = config.rotary_emb_base ** -exponents  # radians per position, (rotary_dim / 2,)
    angles = positions[:, None].float() * frequencies  # (T, rotary_dim / 2)
    angles = torch.cat([angles, angles], dim=-1)[:, None]  # (T, 1, rotary_dim)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first `rotary_dim` features of each head of x (T, H, D) and leaves the others."""
    rotary_dim = cos.shape[-1]
    rotated, rest = x.split([rotary_dim, x.shape[-1] - rotary_dim], dim=-1)
    left, right = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat([-right, left], dim=-1) * sin
    return torch.cat([rotated.to(x.dtype), rest], dim=-1)  # (T, H, D)


class Attention(nn.Module):
    def __init__(self, config: NeoXConfig):
        super().__init__()
        C = config.hidden_size
        self.query_key_value = Linear(C, 3 * C, bias=config.attention_bias)
        self.dense = Linear(C, C, bias=config.attention_bias)


class MLP(nn.Module):
    def __init__(self, config: NeoXConfig):
        super().__init__()
        self.dense_h_to_4h = Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = Linear(config.intermediate_size, config.hidden_size)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(self.act(self.dense_h_to_4h(x)))


class Layer(nn.Module):
    """One block, in two halves around the attention: `compile_layers` fuses each; `attend` stays outside."""

    def __init__(self, config: NeoXConfig):
        super().__init__()
        self.parallel = config.use_parallel_residual
        self.heads = config.num_attention_heads
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.attention.query_key_value(self.input_layernorm(x))  # (T, 3 C)
        # within a head q, k and v lie side by side
        q, k, v = qkv.view(len(x), self.heads, -1).chunk(3, dim=-1)  # (T, H, D) each
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def merge(self, x: Tensor, attended: Tensor) -> Tensor:
        attention = self.attention.dense(attended.reshape(x.shape))  # (T, C)
        if self.parallel:
            return x + attention + self.mlp(self.post_attention_layernorm(x))
        x = x + attention
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, layer: int) -> Tensor:
        return self.merge(x, attend(layer, *self.project(x, cos, sin)))


class Backbone(nn.Module):
    """Embedding, layers, final layer norm: ids (T,), positions (T,), attend -> hidden states (T, C)."""

    def __init__(self, config: NeoXConfig):
        super().__init__()
        self.config = config
        self.embed_in = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        x = self.embed_in(ids)  # (T, C)
        cos, sin = rotary(positions, self.config)
        for i, layer in enumerate(self.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, attend, i, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos, sin, attend, i)
        return self.final_layer_norm(x)  # (T, C)


class NeoX(nn.Module):
    """Backbone and one head: `embed_out` (V, C) of a language model or `score` (1, C) of a reward model.

    The forward returns hidden states (T, C). The caller applies the head, and only where it is needed
    (`logprobs.py`, `scores`).
    """

    def __init__(self, config: NeoXConfig, head: str = "embed_out"):
        super().__init__()
        self.config = config
        self.head = head
        self.matmul_dtype = torch.float32  # see `autocast`
        self.gpt_neox = Backbone(config)
        if head == "embed_out":
            self.embed_out = Linear(config.hidden_size, config.vocab_size, bias=False)
            if config.tie_word_embeddings:
                self.embed_out.weight = self.gpt_neox.embed_in.weight
        else:
            self.score = Linear(config.hidden_size, 1, bias=False)

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        return self.gpt_neox(ids, positions, attend)

    @property
    def device(self) -> torch.device:
        return self.gpt_neox.embed_in.weight.device

    def autocast(self):
        """A context in which matmuls run in `matmul_dtype`; weights, reductions and losses stay float32."""
        if self.matmul_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.matmul_dtype)

    def scores(self, hidden: Tensor) -> Tensor:
        """Reward of each hidden state: (..., C) -> (...), float32."""
        return (hidden.float() * self.score.weight[0].float()).sum(-1)

    def init_weights(self, seed: int) -> "NeoX":
        """Matrices N(0, std = initializer_range), biases 0, layer norms 1, as in transformers.

        A reward head has std = 1 / sqrt(C + 1), as in summarize_from_feedback_details, reward.py.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                if name == "score.weight":
                    std = 1 / math.sqrt(self.config.hidden_size + 1)
                    parameter.normal_(0, std, generator=generator)
                elif parameter.dim() == 2:
                    parameter.normal_(0, self.config.initializer_range, generator=generator)
                else:
                    parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        return self

    def fold_offset(self, offset: float) -> None:
        """Subtracts `offset` from every score, by moving the bias b of the final layer norm along the head w:
        w . (x + b - offset w / |w|^2) = w . (x + b) - offset.

        summarize_from_feedback_details (reward.py) keeps the mean score in the config, as a bias of the head.
        Hugging Face's GPTNeoXForSequenceClassification has no such bias, but it keeps a moved norm.
        """
        w = full(parameters(self)["score.weight"])[0]
        with torch.no_grad():
            self.gpt_neox.final_layer_norm.bias -= offset * w / w.square().sum()


def compile_layers(model: NeoX, least: int | None = None) -> None:
    """torch.compile of the two halves of each layer, in place.

    The number of tokens stays dynamic: one compilation serves all layers and all lengths of packed rows.
    Rows shorter than `least` tokens (decode steps; default 256, 2048 on CUDA) run uncompiled. On a CPU the
    guards of a compiled call would cost more than the fusion saves. On CUDA a compiled call would cast all
    weights anew at every step, where autocast remembers its copies.
    """
    if least is None:
        least = 2048 if model.device.type == "cuda" else 256

    def compiled(plain):
        fused = torch.compile(plain, dynamic=True)
        return lambda x, *rest: (fused if len(x) >= least else plain)(x, *rest)

    for layer in model.gpt_neox.layers:
        layer.project = compiled(layer.project)
        layer.merge = compiled(layer.merge)
