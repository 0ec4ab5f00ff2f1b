"""Reddit TL;DR and OpenAI's human comparisons, as the N+ reproduction (arXiv 2403.17031) prepares them, as a prepared data directory.

A prompt that is too long loses its post from the end: at the last newline, and where there is none one character at a time, until it
fits. Responses are the tokens that follow the prompt in the tokenised joined text; they are never cut: what exceeds N+'s caps is counted.
One difference: `<|endoftext|>` written out in a post or a summary is text and counted; N+ reads it as the end (token 0).
The CNN/DM batches batch0_cnndm and cnndm0 are the same 437 rows upstream: kept twice as in N+, once with --cnndm_once.
A source directory has tldr_3_filtered/{train,validation,test} and comparisons/{train,validation}, each .parquet or .jsonl.

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
from functools import cache, partial
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import hf_hub_download, snapshot_download
from tokenizers import Tokenizer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rlhf.config import UserError, check_ranges, command_line  # noqa: E402
from rlhf.files import check_apart, check_data_dir, data_aside, move_data_in  # noqa: E402

EOS, PAD = "<|endoftext|>", "<|padding|>"  # ids 0 and 1 in every prepared data directory
SFT_CAP = 53  # tokens of a response with EOS: the longest human summary, and the cap on generation
SLACK = 64  # tokens that one character more may take away from the prompt: far more than any was seen to
CHUNK = 1024  # rows that are tokenised, and written as a row group, at a time
HUB = {  # folder: data set on the hub, and its folder in the parquet branch that the hub makes of every data set
    "tldr_3_filtered": ("vwxyzjn/summarize_from_feedback_tldr_3_filtered", "*"),
    "comparisons": ("openai/summarize_from_feedback", "comparisons"),
}


@dataclass(frozen=True)
class Task:
    template: str
    field: str  # the part that is cut
    limit: int  # tokens of the prompt
    pair_cap: int  # tokens of a response of a pair, with EOS


TLDR = Task("SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:", "post", 512, 169)
CNNDM = Task("Article:\n{article}\n\nTL;DR:\n", "article", 2047 - 128, 155)
CNNDM_BATCHES = ("batch0_cnndm", "cnndm0", "cnndm2")
SAME_BATCHES = ("batch0_cnndm", "cnndm0")  # upstream the same rows under two names


@dataclass(frozen=True, kw_only=True)
class Config:
    # I/O
    out_dir: str                                     # prepared data directory to write
    overwrite: bool = False                          # write into a directory that is not empty; its tables are removed first
    source: str = "hub"                              # "hub", or a directory with files of the same columns, see above
    tokenizer: str = "EleutherAI/pythia-1b-deduped"  # a tokenizer.json, a directory that has one, or a hub id
    # rows
    max_prompt_tokens: int = 512                     # of a TL;DR prompt (a CNN/DM prompt has 1919)
    limit: int = 0                                   # rows of each table, 0 = all
    cnndm_once: bool = False                         # leave out CNN/DM pairs that batch0_cnndm and cnndm0 both have (N+ counts them twice)


# ------------------------------------------------------------------------------------------------------------------------------ source
def find_files(source: str, folder: str, split: str) -> list[Path]:
    """The files of one split: one on the disk, or the shards that the hub has."""
    if source == "hub":
        repo, config = HUB[folder]
        pattern = f"{config}/{split}/*.parquet"
        try:
            root = snapshot_download(repo, repo_type="dataset", revision="refs/convert/parquet", allow_patterns=pattern)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot download {repo}: {error}".splitlines()[0] + "; --source=DIRECTORY reads files") from error
        if files := sorted(Path(root).glob(pattern)):
            return files
        raise UserError(f"{repo} has no {pattern} in its branch refs/convert/parquet")
    if not Path(source).is_dir():
        raise UserError(f'--source {source}: neither "hub" nor a directory')
    for file in (Path(source) / folder / f"{split}{ending}" for ending in (".parquet", ".jsonl")):
        if file.is_file():
            return [file]
    raise UserError(f"--source {source}: no {folder}/{split}.parquet or .jsonl")


def read_rows(files: list[Path], title: str) -> Iterator[dict]:
    """Rows as dicts; `where` names the file and the row. `title` stands before the progress bar."""
    for file in files:
        number = 0
        try:
            with file.open("rb") as data:
                if file.suffix == ".parquet":
                    table = pq.ParquetFile(data)
                    rows, total = (row for batch in table.iter_batches(CHUNK) for row in batch.to_pylist()), table.metadata.num_rows
                else:
                    rows, total = map(dict, map(json.loads, data)), None
                for number, row in enumerate(tqdm(rows, title, total, unit=" rows", mininterval=1), 1):
                    yield {**row, "where": f"{file}, row {number}"}
        except (pa.ArrowException, OSError, ValueError, TypeError) as error:
            raise UserError(f"{file}, row {number + 1}: cannot be read: {error}") from error
        if not number:
            raise UserError(f"{file}: no rows")


def value(row: dict, column: str, kind: type, default: str | int | None = None):
    """row["a"][0]["b"] for the column "a.0.b". With a default it may be missing or null."""
    item = row
    for key in column.split("."):
        item = {str(i): x for i, x in enumerate(item)} if isinstance(item, list) else item
        if not isinstance(item, dict) or key not in item:
            if default is not None:
                return default
            raise UserError(f"{row['where']}: no column {column!r}")
        item = item[key]
    if item is None and default is not None:
        return default
    if not isinstance(item, kind):
        shown = "null" if item is None else repr(str(item)[:40])
        raise UserError(f"{row['where']}: column {column!r} is {shown}, which is no {kind.__name__}")
    return item


def prompt_of(row: dict, prefix: str, task: Task) -> dict:
    """What the template names must be there; an id need not (five rows of the batch edit_b2_eval_test have none)."""
    fields = {name: value(row, prefix + name, str) for name in re.findall(r"{(\w+)}", task.template)}
    return {"id": value(row, f"{prefix}id", str, ""), "task": task, "fields": fields, "where": row["where"]}


def sft_row(row: dict, task: Task) -> dict:
    return {**prompt_of(row, "", task), "reference_response": " " + value(row, "summary", str)}  # the pairs' texts have the space


def pair_row(row: dict, task: Task) -> dict:
    """`batch` must be there, it decides the template. Site, worker, notes and the article of a Reddit post are not read."""
    batch, choice, summaries = value(row, "batch", str), value(row, "choice", int), value(row, "summaries", list)
    if choice not in (0, 1) or len(summaries) != 2:
        raise UserError(f"{row['where']}: column 'choice' is {choice} of {len(summaries)} summaries, expected 0 or 1 of two")
    return {
        **prompt_of(row, "info.", CNNDM if batch in CNNDM_BATCHES else task),
        "chosen": value(row, f"summaries.{choice}.text", str),
        "rejected": value(row, f"summaries.{1 - choice}.text", str),
        "chosen_policy": value(row, f"summaries.{choice}.policy", str, ""),
        "rejected_policy": value(row, f"summaries.{1 - choice}.policy", str, ""),
        "batch": batch,
        "split": value(row, "split", str, ""),
        "confidence": value(row, "extra.confidence", int, -1),
    }


# -------------------------------------------------------------------------------------------------------------------------- tokenising
def load_tokenizer(name: str) -> tuple[Tokenizer, bytes]:
    """The tokenizer, and its file."""
    path = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    try:
        data = (path if path.is_file() else Path(hf_hub_download(name, "tokenizer.json"))).read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer {name}: not a file, and no tokenizer.json on the hub: {error}".splitlines()[0]) from error
    try:
        tokenizer = Tokenizer.from_str(data.decode())
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"--tokenizer {name}: not a tokenizer.json ({error})") from error
    for token, index in ((EOS, 0), (PAD, 1)):
        if tokenizer.token_to_id(token) != index:
            raise UserError(f"--tokenizer {name}: {token} must have id {index}, it has {tokenizer.token_to_id(token)}")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # what people wrote is text
    return tokenizer, data


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


@cache
def splits_at_spaces(tokenizer: Tokenizer) -> bool:
    """Is it a byte-level BPE as GPT-2's and GPT-NeoX's, for which the argument in `most_that_can_fit` holds?"""
    parts = json.loads(tokenizer.to_str())
    split, added = parts["pre_tokenizer"] or {}, [token for token in parts["added_tokens"] if not token["special"]]
    return (
        (parts["normalizer"] or {"type": "NFC"})["type"] == "NFC"
        and split.get("type") == "ByteLevel"
        and split.get("use_regex", True)
        and not split["add_prefix_space"]
        and parts["model"]["type"] == "BPE"
        and not parts["model"]["dropout"]
        and all(not token["content"].strip(" \n") for token in added)
    )


def most_that_can_fit(tokenizer: Tokenizer, task: Task, fields: dict[str, str]) -> int:
    """A number of characters of the post of a prompt that is too long: no prompt that keeps more of it can fit.

    The number of tokens may fall when text is added (" summa" may take more than " summary"), so bisection can miss the cut that the
    recipe finds. What holds instead: let b be the place of a space or newline behind a visible ASCII character. A new piece begins at b
    whatever follows, and nothing before b looks further than b: NFC joins neither character to the one before it, added tokens are runs
    of blanks, and a regex match looks one character ahead. BPE works within a piece. So the tokens before b are the same in every
    prompt that keeps b, at least one follows, and then those of "TL;DR:", which the newline in front of it splits off in the same way.

    A post without blanks (8,000 letters in a row) has no such place, and one step per character would encode it 8,000 times. There the
    cut begins where SLACK tokens too many are left: what a letter changes are the tokens of the few letters around it.
    """
    before, after = task.template.split(f"{{{task.field}}}")
    text = task.template.format(**fields)
    start = len(before.format(**fields))
    most = len(fields[task.field])
    room = task.limit - len(encode(tokenizer, [after.lstrip("\n")])[0])  # for what is before b; with one token more the prompt is too long
    if room < 1 or not splits_at_spaces(tokenizer):
        return most
    ends = [end for _, end in tokenizer.encode(text, add_special_tokens=False).offsets]
    if len(ends) > room + SLACK:
        most = min(most, max(0, ends[room + SLACK] - start))
    place = re.compile(r"[!-~][ \n]").search(text, ends[room - 1])  # `room` tokens end there
    if place:
        most = min(most, place.end() - 1 - start)
    return most


def cut(post: str, most: int) -> str:
    """The recipe's step, taken again while more than `most` characters are left: such a post cannot fit, and needs no encoding."""
    end = len(post)
    while (newline := post.rfind("\n", 0, end)) >= 0:
        end = newline
        if end <= most:
            return post[:end]
    return post[: max(0, min(end - 1, most))]


def make_prompts(tokenizer: Tokenizer, rows: list[dict]) -> tuple[list[str], list[list[int]], list[int]]:
    """Prompts as text, as tokens, and the characters that each lost. Prompts that are too long are cut side by side, one batch a step."""
    tasks, fields = [row["task"] for row in rows], [dict(row["fields"]) for row in rows]
    ids = encode(tokenizer, [task.template.format(**f) for task, f in zip(tasks, fields)])
    too_long = [i for i, task in enumerate(tasks) if len(ids[i]) > task.limit]
    most = {i: most_that_can_fit(tokenizer, tasks[i], fields[i]) for i in too_long}
    while too_long:
        for i in too_long:
            name, limit = tasks[i].field, tasks[i].limit
            if not fields[i][name]:
                raise UserError(f"{rows[i]['where']}: column {name!r} is cut to nothing, and still the prompt has more than {limit} tokens")
            fields[i][name] = cut(fields[i][name], most[i])
        for i, tokens in zip(too_long, encode(tokenizer, [tasks[i].template.format(**fields[i]) for i in too_long])):
            ids[i] = tokens
        too_long = [i for i in too_long if len(ids[i]) > tasks[i].limit]
    texts = tokenizer.decode_batch(ids)
    queries = [text.strip() for text in texts]
    changed = [i for i, query in enumerate(queries) if query != texts[i]]  # CNN/DM: what N+ joins to a response has no newline at its end
    for i, tokens in zip(changed, encode(tokenizer, [queries[i] for i in changed])):
        ids[i] = tokens
    return queries, ids, [len(row["fields"][task.field]) - len(f[task.field]) for row, task, f in zip(rows, tasks, fields)]


def make_responses(
    tokenizer: Tokenizer, queries: list[str], query_tokens: list[list[int]], texts: list[str]
) -> tuple[list[list[int]], int]:
    """Tokens behind those of the prompt in the joined text, and EOS. Where joining changes the prompt's own tokens (the number of such
    rows is returned) the response is tokenised alone."""
    joined = encode(tokenizer, [query + text for query, text in zip(queries, texts)])
    apart = {i for i, (q, j) in enumerate(zip(query_tokens, joined)) if j[: len(q)] != q}
    tokens = [encode(tokenizer, [texts[i]])[0] if i in apart else j[len(query_tokens[i]) :] for i, j in enumerate(joined)]
    return [t + [tokenizer.token_to_id(EOS)] for t in tokens], len(apart)


# -------------------------------------------------------------------------------------------------------------------------------- tables
def add_tokens(tokenizer: Tokenizer, rows: list[dict], counts: Counter) -> list[dict]:
    """Rows of a table. `counts`: what a reader of the numbers should know of them."""
    queries, query_tokens, lost = make_prompts(tokenizer, rows)
    table = [{"id": row["id"], "query": query, "query_token": tokens} for row, query, tokens in zip(rows, queries, query_tokens)]
    counts["rows"] += len(rows)
    counts["prompts_cut"] += sum(map(bool, lost))
    counts["posts_cut_to_nothing"] += sum(n > 0 and n == len(row["fields"][row["task"].field]) for n, row in zip(lost, rows))
    counts["longest_prompt"] = max(counts["longest_prompt"], *map(len, query_tokens))
    responses = [name for name in ("reference_response", "chosen", "rejected") if name in rows[0]]
    counts["eos_in_text"] += sum(EOS in query + "".join(row[name] for name in responses) for row, query in zip(rows, queries))
    for name in responses:
        tokens, apart = make_responses(tokenizer, queries, query_tokens, [row[name] for row in rows])
        caps = [SFT_CAP if name == "reference_response" else row["task"].pair_cap for row in rows]
        counts["tokenised_apart"] += apart
        counts["responses_over_cap"] += sum(len(t) > cap for t, cap in zip(tokens, caps))
        counts["longest_response"] = max(counts["longest_response"], *map(len, tokens))
        for out, row, t in zip(table, rows, tokens):
            out |= {name: row[name], f"{name}_token": t}
    rest = ("chosen_policy", "rejected_policy", "batch", "split", "confidence") if "chosen" in rows[0] else ()
    return [out | {name: row[name] for name in rest} for out, row in zip(table, rows)]


def write_table(path: Path, rows: Iterable[dict], tokenizer: Tokenizer) -> Counter:
    """Row groups of CHUNK rows. No rows, no file."""
    counts, rows, writer = Counter(), iter(rows), None
    try:
        while chunk := list(islice(rows, CHUNK)):
            table = add_tokens(tokenizer, chunk, counts)
            kinds = {list: pa.list_(pa.int32()), int: pa.int32(), str: pa.string()}
            schema = pa.schema([(name, kinds[type(item)]) for name, item in table[0].items()])
            writer = writer or pq.ParquetWriter(path, schema)
            writer.write_table(pa.Table.from_pylist(table, schema))
    finally:
        if writer:
            writer.close()
    return counts


def select(rows: Iterable[dict], cnndm: bool | None, once: bool, counts: Counter) -> Iterator[dict]:
    """Only CNN/DM rows, only others, or (None) all.

    Counts and drops `ties`, pairs of two equal texts. N+ keeps them: they give no gradient, and count as wrong in every accuracy.
    Counts as `repeated` the pairs that the other of SAME_BATCHES had before, and drops them if `once`.
    """
    seen = {}  # {content: the batch that had it first}
    for row in rows:
        if cnndm is not None and cnndm != (row["task"] is CNNDM):
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


def main(cfg: Config) -> None:
    start, out, task = time.time(), Path(cfg.out_dir), replace(TLDR, limit=cfg.max_prompt_tokens)
    check_ranges(cfg)
    check_apart(cfg.out_dir, *(path for path in (cfg.source, cfg.tokenizer) if Path(path).exists()))
    check_data_dir(out, "tldr", cfg.overwrite)
    plan = [(f"sft_{split}", "tldr_3_filtered", split, sft_row, None) for split in ("train", "validation", "test")]
    plan += [("pairs_train", "comparisons", "train", pair_row, None), ("pairs_validation", "comparisons", "validation", pair_row, False)]
    plan += [("pairs_validation_cnndm", "comparisons", "validation", pair_row, True)]
    makers = {name: partial(make_row, task=task) for name, _, _, make_row, _ in plan}
    files = {name: find_files(cfg.source, folder, split) for name, folder, split, _, _ in plan}
    tokenizer, tokenizer_file = load_tokenizer(cfg.tokenizer)
    for name in list(files)[:-1]:  # a bad row is named now, not after hours; the last table reads the files of the one before
        for row in read_rows(files[name], f"checking {name}"):
            makers[name](row)
    aside = data_aside(out)

    tables = {}
    for name, _, _, make_row, cnndm in plan:
        selected = Counter(dict.fromkeys(("ties", "repeated"), 0)) if make_row is pair_row else Counter()
        source = read_rows(files[name], name)
        rows = select(map(makers[name], source), cnndm, cfg.cnndm_once, selected)
        counts = write_table(aside / f"{name}.parquet", islice(rows, cfg.limit or None), tokenizer)
        source.close()  # with --limit it is not at its end
        if counts["rows"]:
            tables[name] = {**counts, **selected}
            print(f"{name:24}", ", ".join(f"{key} {number}" for key, number in tables[name].items()))
        else:
            print(f"{name:24} no rows, no table")
    kinds = ("responses_over_cap", "ties", "eos_in_text", "repeated")
    over, equal, written, repeated = (sum(counts.get(key, 0) for counts in tables.values()) for key in kinds)
    print(f"{over} responses are longer than N+'s caps ({SFT_CAP} sft, {TLDR.pair_cap} pairs, {CNNDM.pair_cap} CNN/DM): kept whole")
    print(f"{equal} pairs of two equal texts: dropped (N+ keeps them)")
    print(f"{written} rows with {EOS} in a text: kept as text (N+ reads token 0, the end)")
    kept = "dropped" if cfg.cnndm_once else "kept, as in N+; --cnndm_once drops them"
    print(f"{repeated} pairs in both of the CNN/DM batches {' and '.join(SAME_BATCHES)}: {kept}")
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
