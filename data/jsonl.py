"""Your own rows, jsonl or parquet, as a prepared data directory: the tables that every script reads.

    {"prompt": ..., "response": ...}                   SFT, RLOO
    {"prompt": ..., "chosen": ..., "rejected": ...}    reward model, DPO, SimPO; SFT learns the chosen ones
    {"prompt": ..., "responses": [best, ..., worst]}   Plackett-Luce SimPO; and all of the above
    {"prompt": ...}                                    RLOO with a reward that needs no reference

A file has rows of one kind; several files may have different ones. Prompt and response are joined as they
stand: a prompt that ends in "Answer:" wants responses that begin with a space. A response gets its EOS here.
Rows that are longer than --prompt_tokens or --response_tokens are dropped and counted, so are rows with two
equal responses. Without --validation a share of the prompts is held out, with all rows of each.

    python data/jsonl.py --train=posts.jsonl --tokenizer=EleutherAI/pythia-160m --out_dir=out/own/data
"""

import hashlib
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.rows import encode, load_tokenizer, read_rows, value  # noqa: E402
from data.toy import write_parquet  # noqa: E402
from rlhf.config import UserError, check_ranges, command_line  # noqa: E402
from rlhf.files import check_apart, check_data_dir, data_aside, move_data_in  # noqa: E402
from rlhf.model import EOS  # noqa: E402

KINDS = {  # columns of the texts beside the prompt
    "responses": ("response",),
    "pairs": ("chosen", "rejected"),
    "rankings": ("responses",),
    "prompts": (),
}
NOTES = {"batch": (str, ""), "split": (str, ""), "confidence": (int, -1)}  # kept where a file has them


@dataclass(frozen=True, kw_only=True)
class Config:
    # I/O
    train: str  # files to train on, .jsonl or .parquet, joined by ','
    validation: str = ""  # files to validate on (empty: --validation_share of the prompts)
    tokenizer: str  # of the model that will be trained: its directory, its hub id, or a tokenizer.json
    out_dir: str  # prepared data directory to write
    overwrite: bool = False  # write into a directory that is not empty; its tables are removed first
    # rows
    validation_share: float = 0.05  # of the prompts, at least one
    seed: int = 0  # which prompts these are
    prompt_tokens: int = 512  # longest prompt
    response_tokens: int = 128  # longest response, its EOS included; also of the samples of all scripts


# --- rows


def kind_of(row: dict) -> str:
    kinds = [kind for kind, columns in KINDS.items() if any(column in row for column in columns)]
    if len(kinds) > 1:
        columns = ", ".join(column for kind in kinds for column in KINDS[kind] if column in row)
        raise UserError(f"{row['where']}: has the columns {columns}: a file has rows of one kind, see --help")
    return kinds[0] if kinds else "prompts"


def text(row: dict, column: str) -> str:
    """Raises UserError for what is no text, or an empty one."""
    found = value(row, column, str)
    if not found.strip():
        raise UserError(f"{row['where']}: column {column!r} is empty: mend the row, or take it out")
    return found


def read_row(row: dict, kind: str) -> dict:
    """{id, query, texts, and the NOTES that there are}; texts best first."""
    if (own := kind_of(row)) != kind:
        raise UserError(f"{row['where']}: a row of the kind {own!r} in a file that began with {kind!r}: "
                        "give each kind a file of its own")
    columns = KINDS[kind]
    if kind == "rankings":
        number = len(value(row, "responses", list))
        if number < 2:
            raise UserError(f"{row['where']}: 'responses' has {number} texts, a ranking needs at least 2")
        columns = [f"responses.{i}" for i in range(number)]
    notes = {name: value(row, name, *types) for name, types in NOTES.items() if name in row}
    name = row.get("id")
    return {
        "id": row["where"] if name is None else str(name),
        "query": text(row, "prompt"),
        "texts": [text(row, column) for column in columns],
        **notes,
    }


def read_kinds(files: str) -> dict[str, list[dict]]:
    """The rows of all files by kind. Raises UserError with file and row for the first that is bad."""
    kinds = {kind: [] for kind in KINDS}
    for name in files.split(","):
        path = Path(name)
        if path.suffix not in (".jsonl", ".parquet") or not path.is_file():
            raise UserError(f"{name}: no such file, or its name ends neither in .jsonl nor in .parquet")
        kind = columns = None
        for row in read_rows([path], f"reading {path.name}"):
            kind = kind or kind_of(row)
            found = read_row(row, kind)
            columns = columns or found.keys()
            if found.keys() != columns:
                other = ", ".join(sorted(found.keys() ^ columns))
                raise UserError(f"{row['where']}: column {other} is in some rows of the file only: "
                                "it has to be in all or in none")
            if kinds[kind] and len(found["texts"]) != len(first := kinds[kind][0]["texts"]):
                number = len(found["texts"])
                raise UserError(f"{row['where']}: {number} responses, the rows before have {len(first)}; "
                                "every row needs the same number")
            kinds[kind].append(found)
    given = [kind for kind, rows in kinds.items() if rows]
    if "prompts" in given and len(given) > 1:
        raise UserError(
            f"{files}: prompts alone beside rows with responses: prepare them into a directory of their own "
            "(train_rloo.py takes its --data_dir, the other scripts take theirs)"
        )
    return kinds


def hold_out(kinds: dict[str, list[dict]], share: float, seed: int) -> tuple[dict, dict]:
    """Rows for training and for validation: of a share of the prompts, all rows, whatever their kind."""
    prompts = {row["query"] for rows in kinds.values() for row in rows}
    number = max(1, round(share * len(prompts)))
    if len(prompts) <= number:
        raise UserError(f"{len(prompts)} different prompts: too few to hold out {number} of them: "
                        "add prompts, or name a file in --validation")
    order = sorted(prompts, key=lambda prompt: hashlib.sha256(f"{seed} {prompt}".encode()).digest())
    held = set(order[:number])
    train = {kind: [row for row in rows if row["query"] not in held] for kind, rows in kinds.items()}
    return train, {kind: [row for row in rows if row["query"] in held] for kind, rows in kinds.items()}


# --- tables


def table_rows(kinds: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Rows of sft, pairs and rankings. Where no file has rows of a kind, they are made of those that say
    more: pairs of the best and the worst of a ranking, SFT rows of the chosen response of a pair."""
    rankings = kinds["rankings"]
    pairs = kinds["pairs"] or [{**row, "texts": [row["texts"][0], row["texts"][-1]]} for row in rankings]
    sft = kinds["responses"] or [{**row, "texts": row["texts"][:1]} for row in pairs] or kinds["prompts"]
    return {"sft": sft, "pairs": pairs, "rankings": rankings}


def text_columns(name: str, texts: list, suffix: str = "") -> dict:
    """A row's texts, or with the suffix "_token" their tokens, under the names of table `name`; of a prompt
    alone there are none."""
    if name == "rankings":
        return {f"responses{suffix}": texts}
    columns = ("chosen", "rejected") if name == "pairs" else ("reference_response",)
    return {f"{column}{suffix}": item for column, item in zip(columns, texts)}


def tokenise(
    name: str, rows: list[dict], tokenizer: Tokenizer, cfg: Config,
) -> tuple[list[dict], dict[str, int]]:
    """Rows of a table as it is written, without those that are too long or teach nothing; counts of all."""
    prompts = encode(tokenizer, [row["query"] for row in rows])
    flat = iter(encode(tokenizer, [text for row in rows for text in row["texts"]]))
    table, counts = [], Counter(rows=0, long_prompts=0, long_responses=0, ties=0)
    for row, prompt in zip(rows, prompts):
        responses = [next(flat) + [EOS] for _ in row["texts"]]
        if len(set(map(tuple, responses))) < len(responses):
            counts["ties"] += 1
        elif len(prompt) > cfg.prompt_tokens:
            counts["long_prompts"] += 1
        elif any(len(response) > cfg.response_tokens for response in responses):
            counts["long_responses"] += 1
        else:
            counts["rows"] += 1
            table.append({
                "id": row["id"], "query": row["query"], "query_token": prompt,
                **text_columns(name, row["texts"]), **text_columns(name, responses, "_token"),
                **{key: row[key] for key in NOTES if key in row and name == "pairs"},
            })
    return table, counts


def plan_of(cfg: Config) -> dict[str, list[dict]]:
    """{table: its rows}, read, checked and split."""
    train = read_kinds(cfg.train)
    if cfg.validation:
        valid = read_kinds(cfg.validation)
    else:
        train, valid = hold_out(train, cfg.validation_share, cfg.seed)
    if bool(train["prompts"]) != bool(valid["prompts"]):
        raise UserError("--train and --validation: either both have responses, or neither has")
    plan = {f"{name}_train": rows for name, rows in table_rows(train).items()}
    plan |= {f"{name}_validation": rows for name, rows in table_rows(valid).items() if name != "rankings"}
    if plan["pairs_train"] and not plan["pairs_validation"]:
        raise UserError("there are pairs to train on and none to validate: name a file of them in "
                        "--validation, or raise --validation_share")
    return {name: rows for name, rows in plan.items() if rows}


def main(cfg: Config) -> None:
    out = Path(cfg.out_dir)
    check_ranges(cfg)
    if cfg.response_tokens < 2:
        raise UserError(f"--response_tokens={cfg.response_tokens} must be at least 2: a token and the EOS")
    inputs = [name for name in (*cfg.train.split(","), *cfg.validation.split(","), cfg.tokenizer) if name]
    check_apart(cfg.out_dir, *(name for name in inputs if Path(name).exists()))
    check_data_dir(out, "own", cfg.overwrite)
    tokenizer, tokenizer_file = load_tokenizer(cfg.tokenizer)
    tables, counted = {}, {}
    for name, rows in plan_of(cfg).items():
        tables[name], counted[name] = tokenise(name.split("_")[0], rows, tokenizer, cfg)
        found = ", ".join(f"{key} {number}" for key, number in counted[name].items())
        print(f"{name:18} {found}")
        if not tables[name]:
            raise UserError(f"{name}: none of {len(rows)} rows is left ({found}): raise --prompt_tokens "
                            "or --response_tokens, or add rows")
    print(f"dropped: long_prompts, of more than {cfg.prompt_tokens} tokens (--prompt_tokens); "
          f"long_responses, of more than {cfg.response_tokens} with EOS (--response_tokens); "
          "ties, of two equal responses")
    queries = {name: {row["query"] for row in rows} for name, rows in tables.items()}
    if shared := queries["sft_train"] & queries["sft_validation"]:
        print(f"{len(shared)} prompts are in training and in validation: the validation numbers will flatter")

    aside = data_aside(out)
    for name, rows in tables.items():
        write_parquet(aside / f"{name}.parquet", rows)
    (aside / "tokenizer.json").write_bytes(tokenizer_file)
    result = {
        "world": "own",
        "response_tokens": cfg.response_tokens,
        "prompt_tokens": cfg.prompt_tokens,
        "splits": {name: len(rows) for name, rows in tables.items()},
        "tokenizer": hashlib.sha256(tokenizer_file).hexdigest(),
        "source": [cfg.train, cfg.validation],
        "tables": counted,
    }
    (aside / "meta.json").write_text(json.dumps(result, indent=2))
    move_data_in(out)
    print(json.dumps(result))


if __name__ == "__main__":
    command_line(main, Config)
