"""One piece of work of one size, and what all sides read: models, data, tokenizer."""

import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from rlhf.config import UserError
from rlhf.model import NeoX, NeoXConfig
from rlhf.pretrained import from_pretrained, save_pretrained

SHAPES = {  # width, layers, heads of the Pythia suite
    "pythia-14m": (128, 6, 4),
    "pythia-31m": (256, 6, 8),
    "pythia-70m": (512, 6, 8),
    "pythia-160m": (768, 12, 12),
    "pythia-410m": (1024, 24, 16),
    "pythia-1b": (2048, 16, 8),
    "pythia-1.4b": (2048, 24, 16),
    "pythia-2.8b": (2560, 32, 32),
    "pythia-6.9b": (4096, 32, 32),
}
VOCABULARY = 50304
SIZES = {  # prompts, responses per prompt, response tokens
    "rloo": (8, 4, 53),
    "dpo": (4, 2, 53),
    "simpo": (4, 2, 53),
    "rm": (4, 2, 126),
    "sft": (4, 1, 53),
    "generate": (8, 4, 53),
}
SAMPLED = ("rloo", "generate")  # the responses are sampled; elsewhere they are given
SWEEPS = {
    "k": (1, 2, 4, 8, 16),
    "prompt": (128, 256, 512, 1024, 2048),
    "batch": (1, 2, 4, 8, 16),
    "model": tuple(SHAPES)[:5],
}
SWEPT = {"k": "K", "prompt": "P", "batch": "N", "model": "model"}  # the field of Work that a sweep changes


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every process gets: N prompts of P tokens, K responses of R tokens to each."""

    kind: str  # rloo, dpo, ...
    model: str
    N: int
    K: int
    P: int
    R: int
    folder: str
    cfg: object  # the Config of bench.py
    lr: float = 1e-6

    @property
    def positions(self) -> int:
        return max(2048, self.P + self.R)

    @property
    def model_dir(self) -> str:
        return f"{Path(self.folder).parent}/{self.model}-{self.positions}"

    @property
    def rm_dir(self) -> str:
        return f"{self.model_dir}-rm"

    @property
    def data_dir(self) -> str:
        return f"{self.folder}/data"

    def out_dir(self, side: str) -> str:
        return f"{self.folder}/{side}"

    def rows(self) -> tuple[list[list[int]], list[list[list[int]]]]:
        """Prompts and their responses, random tokens; the last token of a response is EOS where the work
        learns from given responses."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(2, VOCABULARY, (self.N, self.P + self.K * self.R), generator=generator)
        responses = ids[:, self.P :].reshape(self.N, self.K, self.R).clone()
        if self.kind not in SAMPLED:
            responses[:, :, -1] = 0
        return ids[:, : self.P].tolist(), responses.tolist()

    def given(self) -> dict[tuple[int, ...], list[list[int]]]:
        """{prompt: its responses}"""
        prompts, responses = self.rows()
        return {tuple(prompt): group for prompt, group in zip(prompts, responses)}


def as_text(ids: list[int]) -> str:
    """One private-use character per token: text that has exactly these tokens, alone and joined to other
    text."""
    return "".join(chr(0xF0000 + i) for i in ids)


def make_work(cfg, kind: str, value, folder: str) -> Work:
    """The work at its default size, at the size of the command line, or with `value` of what is swept."""
    N, K, R = SIZES[kind]
    size = {"model": cfg.model, "N": cfg.prompts or N, "K": K, "P": cfg.prompt_tokens}
    if kind in SAMPLED:
        size["K"] = cfg.k or K
    if cfg.sweep:
        size[SWEPT[cfg.sweep]] = value
    rows = size["N"] * (size["K"] if kind == "rloo" else 1)
    if cfg.peer_rows and rows % cfg.peer_rows:
        raise UserError(f"--peer_rows={cfg.peer_rows} does not divide the rows of {kind}")
    return Work(kind=kind, R=cfg.response_tokens or R, folder=folder, cfg=cfg, **size)


# --- files


def tokenizer() -> Tokenizer:
    special = {"<|endoftext|>": 0, "<|padding|>": 1}
    vocabulary = special | {as_text([i]): i for i in range(2, VOCABULARY)}
    out = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    out.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    out.decoder = decoders.Fuse()
    out.add_special_tokens(list(special))
    return out


def write_models(work: Work) -> None:
    """A language model and a reward model on its backbone, weights N(0, 1/C): logits of size 1 whatever the
    width."""
    width, layers, heads = SHAPES[work.model]
    config = NeoXConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, max_position_embeddings=work.positions, initializer_range=width**-0.5,
    )
    model = NeoX(config).init_weights(1)
    # in bfloat16: half the disk, all sides round alike; read as float32
    save_pretrained(model, tokenizer(), Path(work.model_dir), dtype=torch.bfloat16)
    # what train_rm.py starts from
    reward_model = from_pretrained(work.model_dir, head="score", new_head=True, seed=1)
    save_pretrained(reward_model, tokenizer(), Path(work.rm_dir))


def write_data(work: Work) -> None:
    """A prepared data directory of exactly one batch, which every update sees again."""
    folder = Path(work.data_dir)
    folder.mkdir(parents=True)
    prompts, responses = work.rows()
    first = [group[0] for group in responses]
    last = [group[-1] for group in responses]
    sft = pa.table({"query_token": prompts, "reference_response_token": first})
    pairs = pa.table({"query_token": prompts, "chosen_token": first, "rejected_token": last})
    for split in ("train", "validation"):
        pq.write_table(sft, folder / f"sft_{split}.parquet")
        pq.write_table(pairs, folder / f"pairs_{split}.parquet")
    (folder / "meta.json").write_text(json.dumps({"world": "bench", "response_tokens": work.R}))
    tokenizer().save(str(folder / "tokenizer.json"))
