"""Reddit TL;DR and OpenAI's human comparisons as a prepared data directory.

As "N+", The N+ Implementation Details of RLHF with PPO (arXiv 2403.17031), prepares them: see
data/tldr_prompts.py. Responses are never cut: what exceeds N+'s caps is counted. One difference:
`<|endoftext|>` written out in a post or a summary is text and counted; N+ reads it as the end (token 0). The
CNN/DM batches batch0_cnndm and cnndm0 are the same 437 rows upstream: kept twice as in N+, once with
--cnndm_once. Pairs have a soft label too (see `preference`). A source directory has
tldr_3_filtered/{train,validation,test} and comparisons/{train,validation}, each .parquet or .jsonl.

    python data/tldr.py --out_dir=out/tldr
    python data/tldr.py --out_dir=out/sample/data --source=../shared/tldr --tokenizer=../shared/tokenizer.json
"""

import hashlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.rows import CHUNK, EOS, load_tokenizer, read_rows, value  # noqa: E402
from data.tldr_prompts import CNNDM, TLDR, Template, make_prompts, make_responses  # noqa: E402
from rlhf.config import UserError, check_ranges, command_line  # noqa: E402
from rlhf.files import check_apart, check_data_dir, data_aside, move_data_in  # noqa: E402

SFT_CAP = 53  # tokens of a response with EOS: the longest human summary, and the cap on generation
HUB = {  # folder: data set on the hub, its folder in the parquet branch that the hub makes of every data set
    "tldr_3_filtered": ("vwxyzjn/summarize_from_feedback_tldr_3_filtered", "*"),
    "comparisons": ("openai/summarize_from_feedback", "comparisons"),
}
CNNDM_BATCHES = ("batch0_cnndm", "cnndm0", "cnndm2")
SAME_BATCHES = ("batch0_cnndm", "cnndm0")  # upstream the same rows under two names


@dataclass(frozen=True, kw_only=True)
class Config:
    # I/O
    out_dir: str  # prepared data directory to write
    overwrite: bool = False  # write into a directory that is not empty; its tables are removed first
    source: str = "hub"  # "hub", or a directory with files of the same columns, see above
    tokenizer: str = "EleutherAI/pythia-1b-deduped"  # a tokenizer.json, a directory that has one, or a hub id
    # rows
    max_prompt_tokens: int = 512  # of a TL;DR prompt (a CNN/DM prompt has 1919)
    limit: int = 0  # rows of each table, 0 = all
    cnndm_once: bool = False  # count CNN/DM pairs that batch0_cnndm and cnndm0 both have once (N+: twice)


# --- source


def find_files(source: str, folder: str, split: str) -> list[Path]:
    """The files of one split: one on the disk, or the shards that the hub has."""
    if source == "hub":
        return hub_files(folder, split)
    if not Path(source).is_dir():
        raise UserError(f'--source {source}: neither "hub" nor a directory')
    for file in (Path(source) / folder / f"{split}{ending}" for ending in (".parquet", ".jsonl")):
        if file.is_file():
            return [file]
    raise UserError(f"--source {source}: no {folder}/{split}.parquet or .jsonl")


def hub_files(folder: str, split: str) -> list[Path]:
    repo, config = HUB[folder]
    pattern = f"{config}/{split}/*.parquet"
    branch = "refs/convert/parquet"
    try:
        root = snapshot_download(repo, repo_type="dataset", revision=branch, allow_patterns=pattern)
    except (OSError, ValueError) as error:
        reason = f"cannot download {repo}: {error}".splitlines()[0]
        raise UserError(f"{reason}; --source=DIRECTORY reads files") from error
    if files := sorted(Path(root).glob(pattern)):
        return files
    raise UserError(f"{repo} has no {pattern} in its branch {branch}")


def prompt_of(row: dict, prefix: str, template: Template) -> dict:
    """What the template names must be there; an id need not (five rows of the batch edit_b2_eval_test have
    none)."""
    fields = {name: value(row, prefix + name, str) for name in re.findall(r"{(\w+)}", template.text)}
    name = value(row, f"{prefix}id", str, "")
    return {"id": name, "template": template, "fields": fields, "where": row["where"]}


def sft_row(row: dict, template: Template) -> dict:
    summary = " " + value(row, "summary", str)  # the pairs' texts have the space
    return {**prompt_of(row, "", template), "reference_response": summary}


def preference(confidence: int) -> float:
    """Probability that the chosen summary is the better one, as far as the labeler's slider tells it.

    The slider goes from 1 (surely the first summary) to 9 (surely the second); choice 0 comes with 1 to 4,
    choice 1 with 6 to 9. What a step means is written nowhere (openai/summarize-from-feedback, arXiv
    2009.01325), and no mapping to a probability is published. This one is ours: linear in the distance from
    the middle, 5, where it is 1/2, to 1 at both ends: 0.625, 0.75, 0.875, 1. No confidence (-1): 1, a hard
    label.
    """
    return 1.0 if confidence == -1 else 0.5 + abs(confidence - 5) / 8


def pair_row(row: dict, template: Template) -> dict:
    """`batch` must be there, it decides the template. Site, worker, notes and the article of a Reddit post
    are not read."""
    batch = value(row, "batch", str)
    choice = value(row, "choice", int)
    summaries = value(row, "summaries", list)
    if choice not in (0, 1) or len(summaries) != 2:
        raise UserError(f"{row['where']}: column 'choice' is {choice} of {len(summaries)} summaries, "
                        "expected 0 or 1 of two")
    confidence = value(row, "extra.confidence", int, -1)
    if confidence != -1 and not 1 <= confidence <= 9:
        raise UserError(f"{row['where']}: column 'extra.confidence' is {confidence}, expected 1 to 9")
    return {
        **prompt_of(row, "info.", CNNDM if batch in CNNDM_BATCHES else template),
        "chosen": value(row, f"summaries.{choice}.text", str),
        "rejected": value(row, f"summaries.{1 - choice}.text", str),
        "chosen_policy": value(row, f"summaries.{choice}.policy", str, ""),
        "rejected_policy": value(row, f"summaries.{1 - choice}.policy", str, ""),
        "batch": batch,
        "split": value(row, "split", str, ""),
        "confidence": confidence,
        "preference": preference(confidence),
    }


def select(rows: Iterable[dict], cnndm: bool | None, once: bool, counts: Counter) -> Iterator[dict]:
    """Only CNN/DM rows, only others, or (None) all.

    Counts and drops `ties`, pairs of two equal texts. N+ keeps them: they give no gradient, and count as
    wrong in every accuracy. Counts as `repeated` the pairs that the other of SAME_BATCHES had before, and
    drops them if `once`.
    """
    seen = {}  # {content: the batch that had it first}
    for row in rows:
        if cnndm is not None and cnndm != (row["template"] is CNNDM):
            continue
        if "chosen" in row and row["chosen"] == row["rejected"]:
            counts["ties"] += 1
            continue
        if row.get("batch") in SAME_BATCHES:
            content = row["fields"]["article"], row["chosen"], row["rejected"]
            again = seen.setdefault(content, row["batch"]) != row["batch"]
            counts["repeated"] += again
            if again and once:
                continue
        yield row


# --- tables


def add_tokens(tokenizer: Tokenizer, rows: list[dict], counts: Counter) -> list[dict]:
    """Rows of a table. `counts`: what a reader of the numbers should know of them."""
    queries, query_tokens, lost = make_prompts(tokenizer, rows)
    table = [
        {"id": row["id"], "query": query, "query_token": tokens}
        for row, query, tokens in zip(rows, queries, query_tokens)
    ]
    whole = [len(row["fields"][row["template"].field]) for row in rows]
    counts["rows"] += len(rows)
    counts["prompts_cut"] += sum(map(bool, lost))
    counts["posts_cut_to_nothing"] += sum(0 < n == length for n, length in zip(lost, whole))
    counts["longest_prompt"] = max(counts["longest_prompt"], *map(len, query_tokens))
    responses = [name for name in ("reference_response", "chosen", "rejected") if name in rows[0]]
    texts = [query + "".join(row[name] for name in responses) for row, query in zip(rows, queries)]
    counts["eos_in_text"] += sum(EOS in text for text in texts)
    for name in responses:
        tokens, apart = make_responses(tokenizer, queries, query_tokens, [row[name] for row in rows])
        caps = [SFT_CAP if name == "reference_response" else row["template"].pair_cap for row in rows]
        counts["tokenised_apart"] += apart
        counts["responses_over_cap"] += sum(len(t) > cap for t, cap in zip(tokens, caps))
        counts["longest_response"] = max(counts["longest_response"], *map(len, tokens))
        for out, row, t in zip(table, rows, tokens):
            out |= {name: row[name], f"{name}_token": t}
    if "chosen" not in rows[0]:
        return table
    rest = ("chosen_policy", "rejected_policy", "batch", "split", "confidence", "preference")
    return [out | {name: row[name] for name in rest} for out, row in zip(table, rows)]


def write_table(path: Path, rows: Iterable[dict], tokenizer: Tokenizer) -> Counter:
    """Row groups of CHUNK rows. No rows, no file."""
    counts = Counter()
    rows = iter(rows)
    writer = None
    try:
        while chunk := list(islice(rows, CHUNK)):
            table = add_tokens(tokenizer, chunk, counts)
            kinds = {list: pa.list_(pa.int32()), int: pa.int32(), float: pa.float64(), str: pa.string()}
            schema = pa.schema([(name, kinds[type(item)]) for name, item in table[0].items()])
            writer = writer or pq.ParquetWriter(path, schema)
            writer.write_table(pa.Table.from_pylist(table, schema))
    finally:
        if writer:
            writer.close()
    return counts


PLAN = [  # table, folder, split, what makes a row, only CNN/DM rows (True), only others (False), all (None)
    ("sft_train", "tldr_3_filtered", "train", sft_row, None),
    ("sft_validation", "tldr_3_filtered", "validation", sft_row, None),
    ("sft_test", "tldr_3_filtered", "test", sft_row, None),
    ("pairs_train", "comparisons", "train", pair_row, None),
    ("pairs_validation", "comparisons", "validation", pair_row, False),
    ("pairs_validation_cnndm", "comparisons", "validation", pair_row, True),
]


def check_rows(files: dict[str, list[Path]]) -> None:
    """A bad row is named before anything is tokenised, not after hours."""
    for name, _, _, make_row, cnndm in PLAN:
        if not cnndm:  # the last table reads the files of the one before
            for row in read_rows(files[name], f"checking {name}"):
                make_row(row, TLDR)


def write_tables(
    cfg: Config, files: dict[str, list[Path]], folder: Path, tokenizer: Tokenizer,
) -> dict[str, dict[str, int]]:
    """{table: what was counted of it}."""
    template = replace(TLDR, limit=cfg.max_prompt_tokens)
    tables = {}
    for name, _, _, make_row, cnndm in PLAN:
        selected = Counter(dict.fromkeys(("ties", "repeated"), 0)) if make_row is pair_row else Counter()
        source = read_rows(files[name], name)
        rows = select(map(partial(make_row, template=template), source), cnndm, cfg.cnndm_once, selected)
        counts = write_table(folder / f"{name}.parquet", islice(rows, cfg.limit or None), tokenizer)
        source.close()  # with --limit it is not at its end
        if counts["rows"]:
            tables[name] = {**counts, **selected}
            print(f"{name:24}", ", ".join(f"{key} {number}" for key, number in tables[name].items()))
        else:
            print(f"{name:24} no rows, no table")
    return tables


def print_counts(tables: dict[str, dict[str, int]], cnndm_once: bool) -> None:
    kinds = ("responses_over_cap", "ties", "eos_in_text", "repeated")
    over, equal, written, repeated = (sum(counts.get(key, 0) for counts in tables.values()) for key in kinds)
    print(f"{over} responses are longer than N+'s caps ({SFT_CAP} sft, {TLDR.pair_cap} pairs, "
          f"{CNNDM.pair_cap} CNN/DM): kept whole")
    print(f"{equal} pairs of two equal texts: dropped (N+ keeps them)")
    print(f"{written} rows with {EOS} in a text: kept as text (N+ reads token 0, the end)")
    kept = "dropped" if cnndm_once else "kept, as in N+; --cnndm_once drops them"
    print(f"{repeated} pairs in both of the CNN/DM batches {' and '.join(SAME_BATCHES)}: {kept}")


def main(cfg: Config) -> None:
    start = time.time()
    out = Path(cfg.out_dir)
    check_ranges(cfg)
    check_apart(cfg.out_dir, *(path for path in (cfg.source, cfg.tokenizer) if Path(path).exists()))
    check_data_dir(out, "tldr", cfg.overwrite)
    files = {name: find_files(cfg.source, where, split) for name, where, split, _, _ in PLAN}
    tokenizer, tokenizer_file = load_tokenizer(cfg.tokenizer)
    check_rows(files)
    aside = data_aside(out)
    tables = write_tables(cfg, files, aside, tokenizer)
    print_counts(tables, cfg.cnndm_once)
    (aside / "tokenizer.json").write_bytes(tokenizer_file)
    result = {
        "world": "tldr",
        "response_tokens": SFT_CAP,
        "prompt_tokens": cfg.max_prompt_tokens,
        "cnndm_prompt_tokens": CNNDM.limit,
        "splits": {name: counts["rows"] for name, counts in tables.items()},
        "tokenizer": hashlib.sha256(tokenizer_file).hexdigest(),
        "source": cfg.source,
        "tables": tables,
    }
    (aside / "meta.json").write_text(json.dumps(result, indent=2))
    move_data_in(out)
    print(json.dumps({**result, "seconds": round(time.time() - start, 1)}))


if __name__ == "__main__":
    command_line(main, Config)
