"""Write the toy world (data/toy_world.py) as a prepared data directory: TL;DR in small, with a true reward.

Fallible writers summarise posts, fallible people compare the summaries. Everything follows from the seed: the
same seed gives the same files. The tokenizer (byte-level BPE, one token per word) is the same for every seed.
Beside the data lies `base/` for --init=scratch: the configuration of a small GPT-NeoX, and the tokenizer.

    python data/toy.py --out_dir=out/toy/data
    python data/toy.py --check      # writes nothing: noise of the labels, faults of the writers, gold
"""

import hashlib
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.toy_world import (  # noqa: E402
    FIELDS,
    MOST_WORDS,
    REFERENCE_WRITER,
    WRITERS,
    Post,
    gold_counts,
    gold_parts,
    gold_reward,
    make_post,
    preference,
    rank,
    utility,
    write_summary,
)
from rlhf.config import UserError, check_ranges, command_line  # noqa: E402
from rlhf.files import check_data_dir, data_aside, move_data_in  # noqa: E402
from rlhf.model import NeoXConfig  # noqa: E402
from rlhf.pretrained import save_tokenizer  # noqa: E402

EOS, PAD = "<|endoftext|>", "<|padding|>"  # ids 0 and 1
RESPONSE_TOKENS = MOST_WORDS + 1  # with EOS
CANDIDATES = 4  # in a ranking
SIZES = {  # width, layers, heads
    "small": (64, 4, 1),
    "medium": (128, 4, 2),
    "large": (192, 4, 3),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    # I/O
    out_dir: str = ""  # prepared data directory to write
    overwrite: bool = False  # write into a directory that is not empty
    check: bool = False  # print the numbers of the world and write nothing
    # world
    seed: int = 0  # of posts, writers and people
    posts: int = 12000  # rows of sft_train
    pairs: int = 20000  # rows of pairs_train
    rankings: int = 1000  # rows of rankings_train
    validation: int = 500  # rows of sft_validation and of pairs_validation
    test: int = 500  # rows of sft_test
    # base model
    size: Literal["small", "medium", "large"] = "medium"  # of base/: 0.23, 0.85 or 1.86 million parameters


# --- rows
def sft_row(post: Post, rng: random.Random) -> dict:
    text = write_summary(post, REFERENCE_WRITER, rng)
    return {"reference_response": text, "reference_parts": gold_parts(post.hidden, text, ended=True)}


def candidates(post: Post, number: int, rng: random.Random) -> tuple[list[str], list[str]]:
    """Different summaries of a post, and the names of their writers, as people rank them: best first."""
    by_text: dict[str, str] = {}
    while len(by_text) < number:
        writer = rng.choice(list(WRITERS))
        by_text.setdefault(write_summary(post, WRITERS[writer], rng), writer)
    texts = list(by_text)
    texts = [texts[i] for i in rank([utility(post.hidden, text) for text in texts], rng)]
    return texts, [by_text[text] for text in texts]


def pair_row(post: Post, rng: random.Random) -> dict:
    """`preference` is the exact probability that the chosen summary is preferred to the rejected one."""
    texts, writers = candidates(post, 2, rng)
    parts = [gold_parts(post.hidden, text, ended=True) for text in texts]
    gold = [sum(part.values()) for part in parts]
    utilities = [utility(post.hidden, text) for text in texts]
    difference = abs(gold[0] - gold[1])
    return {
        "chosen": texts[0],
        "rejected": texts[1],
        "chosen_policy": writers[0],
        "rejected_policy": writers[1],
        "chosen_parts": parts[0],
        "rejected_parts": parts[1],
        "preference": preference(*utilities),
        "batch": "toy",
        "confidence": 1 + sum(difference > edge for edge in (0.1, 0.25, 0.5, 1.0)),  # 1 = a toss-up
    }


def ranking_row(post: Post, rng: random.Random) -> dict:
    texts = candidates(post, CANDIDATES, rng)[0]
    return {
        "responses": texts,
        "rewards": [gold_reward(post.hidden, text, ended=True) for text in texts],
        "utilities": [utility(post.hidden, text) for text in texts],
    }


def make_rows(
    file: str, number: int, row: Callable[[Post, random.Random], dict], seed: int, seen: set[str],
) -> list[dict]:
    """Each row has its own random numbers: the first rows stay the same when more are asked for.

    `seen`: no post comes twice in any file.
    """
    rows = []
    for index in range(number):
        rng = random.Random(f"{seed}/{file}/{index}")
        while (post := make_post(rng)).query in seen:
            pass
        seen.add(post.query)
        common = {"id": f"{file}-{index}", "query": post.query, "facts": json.dumps(post.hidden)}
        rows.append(common | row(post, rng))
    return rows


# --- tokenizer
def train_tokenizer() -> Tokenizer:
    """Byte-level BPE on a fixed sample of the world: models of different seeds share their tokens."""
    rng = random.Random("tokenizer")
    posts = (make_post(rng) for _ in range(2000))
    texts = [post.query + write_summary(post, WRITERS["chatty"], rng) for post in posts]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(field, normalized=False) for field in FIELDS])
    return tokenizer


def add_tokens(rows: list[dict], tokenizer: Tokenizer) -> None:
    """`x_token` beside every text column x; responses end in EOS."""
    end = tokenizer.token_to_id(EOS)
    texts = [key for key in ("query", "reference_response", "chosen", "rejected") if key in rows[0]]
    for key in texts:
        for row, encoding in zip(rows, tokenizer.encode_batch([row[key] for row in rows])):
            row[f"{key}_token"] = encoding.ids + ([] if key == "query" else [end])
    if "responses" in rows[0]:
        for row in rows:
            encodings = tokenizer.encode_batch(row["responses"])
            row["responses_token"] = [encoding.ids + [end] for encoding in encodings]


# --- files
def write_parquet(path: Path, rows: list[dict]) -> None:
    ids, numbers = pa.list_(pa.int32()), pa.list_(pa.float64())
    types = {"responses": pa.list_(pa.string()), "responses_token": pa.list_(ids), "confidence": pa.int32()}
    types |= {"preference": pa.float64(), "rewards": numbers, "utilities": numbers}
    parts = pa.struct([(name, pa.float64()) for name in gold_parts({"facts": {"": ""}}, "", True)])

    def type_of(key: str) -> pa.DataType:
        if key.endswith("_token"):
            return types.get(key, ids)
        return parts if key.endswith("_parts") else types.get(key, pa.string())

    schema = pa.schema([(key, type_of(key)) for key in rows[0]])
    pq.write_table(pa.Table.from_pylist(rows, schema), path)


def write_base(folder: Path, size: str, tokenizer: Tokenizer) -> None:
    """A Hugging Face GPT-NeoX directory without weights. Tied embeddings, rotary on whole heads with a base
    for short texts, wide initial weights, heads of 64, four layers: copying from the post forms early."""
    folder.mkdir(exist_ok=True)
    width, layers, heads = SIZES[size]
    config = NeoXConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=256,
        rotary_pct=1.0,
        rotary_emb_base=100.0,
        tie_word_embeddings=True,
        initializer_range=0.08,
    )
    described = {"architectures": ["GPTNeoXForCausalLM"], **config.to_dict()}
    (folder / "config.json").write_text(json.dumps(described, indent=2))
    save_tokenizer(tokenizer, folder, config.max_position_embeddings)


# --- statistics
def sft_statistics(rows: list[dict]) -> dict[str, float]:
    return {
        "prompt_tokens_mean": mean(len(row["query_token"]) for row in rows),
        "reference_tokens_mean": mean(len(row["reference_response_token"]) for row in rows),
        "gold_reference": mean(sum(row["reference_parts"].values()) for row in rows),
    }


def pair_statistics(rows: list[dict]) -> dict[str, float]:
    gold = [[sum(row[f"{side}_parts"].values()) for side in ("chosen", "rejected")] for row in rows]
    length = [[len(row[f"{side}_token"]) for side in ("chosen", "rejected")] for row in rows]
    return {
        "gold_chosen": mean(chosen for chosen, _ in gold),
        "gold_rejected": mean(rejected for _, rejected in gold),
        "label_bayes_accuracy": mean(max(row["preference"], 1 - row["preference"]) for row in rows),
        "label_agrees_with_gold": mean(chosen > rejected for chosen, rejected in gold if chosen != rejected),
        "longer_chosen": mean(chosen > rejected for chosen, rejected in length if chosen != rejected),
    }


def check(seed: int, number: int = 4000) -> dict:
    """The numbers of the world, from `number` posts: noise of the labels, faults and what they cost."""
    posts = [make_post(random.Random(f"{seed}/check/{index}")) for index in range(number)]
    faults = {}
    for name, writer in WRITERS.items():
        rng = random.Random(f"{seed}/{name}")
        texts = [write_summary(post, writer, rng) for post in posts]
        counts = [gold_counts(post.hidden, text) for post, text in zip(posts, texts)]
        parts = [gold_parts(post.hidden, text, ended=True) for post, text in zip(posts, texts)]
        faults[name] = {
            "gold": mean(sum(part.values()) for part in parts),
            "missing": mean(len(post.facts) - count["covered"] for post, count in zip(posts, counts)),
            **{key: mean(count[key] for count in counts) for key in counts[0] if key != "covered"},
            "cost": {key: mean(part[key] for part in parts) for key in parts[0] if key != "not_ended"},
        }
    rng = random.Random(f"{seed}/pairs")
    pairs = [pair_row(post, rng) for post in posts]
    agree = mean(row["preference"] > 0.5 for row in pairs)
    return {
        "facts_per_post": mean(len(post.facts) for post in posts),
        "label_bayes_accuracy": mean(max(row["preference"], 1 - row["preference"]) for row in pairs),
        "label_is_the_likelier": agree,
        "writers": faults,
    }


def show_check(numbers: dict) -> None:
    print(f"facts in a post: {numbers['facts_per_post']:.2f}")
    print(f"Bayes accuracy of the labels: {numbers['label_bayes_accuracy']:.3f}")
    columns = [key for key in numbers["writers"]["reference"] if key != "cost"]
    print("\nfaults in a summary, by writer\n" + " " * 12 + "".join(f"{key:>12}" for key in columns))
    for name, faults in numbers["writers"].items():
        print(f"{name:12}" + "".join(f"{faults[key]:12.2f}" for key in columns))
    costs = numbers["writers"]["reference"]["cost"]
    parts = ", ".join(f"{key} {value:+.3f}" for key, value in costs.items())
    print(f"\ngold reward of a reference by its parts: {parts}")
    print(json.dumps(numbers))


def main(cfg: Config) -> None:
    check_ranges(cfg)
    if cfg.check:
        show_check(check(cfg.seed))
        return
    if not cfg.out_dir:
        raise UserError("--out_dir is missing: where to write the data (--check prints numbers only)")
    out = Path(cfg.out_dir)
    check_data_dir(out, "toy", cfg.overwrite)
    aside = data_aside(out)

    tokenizer, seen = train_tokenizer(), set()
    files = {
        "sft_train": (cfg.posts, sft_row),
        "sft_validation": (cfg.validation, sft_row),
        "sft_test": (cfg.test, sft_row),
        "pairs_train": (cfg.pairs, pair_row),
        "pairs_validation": (cfg.validation, pair_row),
        "rankings_train": (cfg.rankings, ranking_row),
    }
    data = {file: make_rows(file, number, row, cfg.seed, seen) for file, (number, row) in files.items()}
    for file, rows in data.items():
        add_tokens(rows, tokenizer)
        for row in rows if file.startswith("pairs_") else []:
            row["split"] = file.removeprefix("pairs_")
        write_parquet(aside / f"{file}.parquet", rows)
    (aside / "tokenizer.json").write_text(tokenizer.to_str(pretty=True))
    write_base(aside / "base", cfg.size, tokenizer)

    result = {
        "world": "toy",
        "seed": cfg.seed,
        "size": cfg.size,
        "vocabulary": tokenizer.get_vocab_size(),
        "prompt_tokens": max(len(row["query_token"]) for rows in data.values() for row in rows),
        "response_tokens": RESPONSE_TOKENS,
        "splits": {file: len(rows) for file, rows in data.items()},
        "tokenizer": hashlib.sha256((aside / "tokenizer.json").read_bytes()).hexdigest(),
        **sft_statistics(data["sft_train"]),
        **pair_statistics(data["pairs_train"]),
    }
    (aside / "meta.json").write_text(json.dumps(result, indent=2))
    move_data_in(out)

    row = data["pairs_train"][0]
    print(f"{row['query']}\n\nchosen:  {row['chosen']}\nrejected:{row['rejected']}")
    print(f"facts:   {row['facts']}\n")
    for name, value in result.items():
        print(f"{name:24}", f"{value:.3f}" if isinstance(value, float) else value)
    print(json.dumps(result))


if __name__ == "__main__":
    command_line(main, Config)
