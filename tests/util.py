"""Random GPT-NeoX models, here and in transformers, with the same weights; and the plainest attention there
is."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification
from transformers.utils import logging

from rlhf.groups import pack
from rlhf.logprobs import token_logprobs
from rlhf.model import NeoX, NeoXConfig

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)

# Of float32, relative to the largest entry of a tensor. Rounding alone makes 4e-6 (values) and 1.3e-5
# (gradients).
TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-4
WIDE = 1e-2  # a wrong formula is off by at least this much

# config.json in the old spelling of the rotary settings; widths and head counts that are not powers of two
RAW = {
    "model_type": "gpt_neox", "vocab_size": 61, "hidden_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 3, "intermediate_size": 80, "max_position_embeddings": 128, "rotary_pct": 0.25,
    "rotary_emb_base": 10000, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
}
NEW_ROPE = {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 300.0}

VARIANTS = {
    "parallel residual": {},
    "sequential residual": {"use_parallel_residual": False},
    "rotary on the whole head": {"rotary_pct": 1.0},
    "rotary base, old spelling": {"rotary_pct": 1.0, "rotary_emb_base": 500},
    "rotary base, new spelling": {"rotary_pct": None, "rotary_emb_base": None, "rope_parameters": NEW_ROPE},
    "odd rotary width": {"hidden_size": 36},  # 3 of 12: transformers turns 4
    "seven heads": {"hidden_size": 70, "num_attention_heads": 7, "rotary_pct": 0.4},
    "tied embeddings": {"tie_word_embeddings": True},
    "no attention bias": {"attention_bias": False},
    "layer norm eps": {"layer_norm_eps": 0.05},
    "all at once": {
        "use_parallel_residual": False, "tie_word_embeddings": True, "attention_bias": False,
        "hidden_act": "relu", "rotary_pct": None, "rotary_emb_base": None, "rope_parameters": NEW_ROPE,
    },
}


def raw_config(variant: str = "parallel residual", **changes) -> dict:
    """The config.json of a variant; None removes an entry."""
    return {k: v for k, v in (RAW | VARIANTS[variant] | changes).items() if v is not None}


def pair(raw: dict, head: str = "embed_out", seed: int = 0, dtype: torch.dtype = torch.float32):
    """(ours, transformers') with equal random weights: every parameter has std 0.5, biases and layer norms
    (around 1) too."""
    config = GPTNeoXConfig.from_dict(raw | ({"num_labels": 1} if head == "score" else {}))
    config._attn_implementation = "eager"
    theirs = (GPTNeoXForCausalLM if head == "embed_out" else GPTNeoXForSequenceClassification)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.5, generator=generator)
            parameter.copy_(parameter.to(dtype))
    ours = NeoX(NeoXConfig.from_dict(raw), head)
    ours.load_state_dict({our_name(name): tensor for name, tensor in theirs.state_dict().items()})
    return ours, theirs.eval()


def our_name(theirs: str) -> str:
    """The name in memory differs from the name on disk for one tensor (transformers 5)."""
    return theirs.replace("lm_head.", "embed_out.")


def causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence, every token sees itself and what is before it, (T, H, D)."""
    scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), float("-inf"))
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)


def hidden_of(model: NeoX, ids: list[int], attend=causal) -> Tensor:
    return model(torch.tensor(ids), torch.arange(len(ids)), attend)  # (T, C)


def logits_of(model: NeoX, ids: list[int], attend=causal) -> Tensor:
    return model.embed_out(hidden_of(model, ids, attend))  # (T, V)


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected entry."""
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


def worst_gradient(ours: NeoX, theirs) -> float:
    """The largest `error` over the gradients of all parameters; both sides must have the same ones."""
    expected = {our_name(name): p.grad for name, p in theirs.named_parameters()}
    actual = {name: p.grad for name, p in ours.named_parameters()}
    assert actual.keys() == expected.keys()
    return max(error(actual[name], expected[name]) for name in expected)


def random_groups(lengths: list[list[int]], vocab: int = 61, seed: int = 0, ended: bool = False):
    """Prompts of uneven length and K responses each with these lengths; tokens never are padding. ended: each
    response ends with EOS."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[int]:
        return torch.randint(2, vocab, (n,), generator=generator).tolist()

    prompts = [draw(3 + 5 * (n % 3)) for n in range(len(lengths))]
    return prompts, [[draw(R - ended) + [0] * ended for R in row] for row in lengths]


def packed_logprobs(model: NeoX, prompts, responses, **options) -> Tensor:
    """Log-prob of every response token (M,), from one packed row."""
    groups = pack(prompts, responses, max_positions=model.config.max_position_embeddings, **options)
    return logprobs_of(model, groups)


def logprobs_of(model: NeoX, groups) -> Tensor:
    hidden = model(groups.ids, groups.positions, groups.attend)
    return token_logprobs(hidden[groups.predicts], model.embed_out.weight, groups.targets)[0]


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE as GPT-NeoX has it, EOS 0 and padding 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<|padding|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog sat on the cat"] * 3, trainer)
    return tokenizer
