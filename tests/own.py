"""Rows and small models for the tests of own data and own rewards; what is made of them: `prepare` and
`models` in conftest.py."""

import json
from pathlib import Path

from util import raw_config, tiny_tokenizer

import train_rloo
from rlhf.model import NeoX, NeoXConfig

TOKENIZER = tiny_tokenizer()

LINES = [{"prompt": f"the cat {i} sat on the mat", "response": f" and the dog {i}"} for i in range(20)]
PAIRS = [{"prompt": r["prompt"], "chosen": r["response"], "rejected": " the mat"} for r in LINES]
RANKED = [{"prompt": r["prompt"], "responses": [r["response"], " the cat", " the mat"]} for r in LINES]
ALONE = [{"prompt": r["prompt"]} for r in LINES]


def small(head: str = "embed_out", seed: int = 0) -> NeoX:
    config = raw_config(vocab_size=TOKENIZER.get_vocab_size())
    return NeoX(NeoXConfig.from_dict(config), head).init_weights(seed)


QUICK = dict(data_dir="data", model="model", device="cpu", save_every=2)
RLOO = dict(
    **QUICK, out_dir="rloo", lr=1e-3, k=2, batch_size=8, episodes=32, ppo_epochs=1, response_tokens=6,
    eval_rows=4,
)


def rloo(**changes) -> dict:
    return train_rloo.main(train_rloo.Config(**{**RLOO, **changes}))


def lines_of(file: str) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]
