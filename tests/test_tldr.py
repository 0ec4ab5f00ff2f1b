"""data/tldr.py against the recipe written out in the simplest way, on invented posts; on the real sample
where ../shared is there."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data import rows as data_rows
from data import tldr, tldr_prompts
from data.rows import EOS, PAD
from data.tldr import Config, main
from data.tldr_prompts import CNNDM, TLDR, Template, make_prompts, make_responses
from rlhf.config import UserError

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
WORDS = (
    "I we a it my the dog left kitchen strawberry nevertheless Mississippi misunderstanding can't they'll "
    "12345 ... !? café"
).split()
FIELDS = {"subreddit": "gardening", "title": "My neighbour's goat", "post": "It ate the hedge."}
needs_sample = pytest.mark.skipif(
    not (SHARED / "tldr").is_dir(), reason="../shared is absent: real posts are not checked"
)


# --- tokenizers
def train_tiny(pre_tokenizer=None) -> Tokenizer:
    """A small byte-level BPE of Pythia's kind: NFC, the GPT-2 regex, runs of spaces as added tokens; every
    word of WORDS is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(
        [" ".join(WORDS) + "\n\nTL;DR: POST: TITLE: SUBREDDIT: Article:\n"] * 5, trainer
    )
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in (4, 3, 2)])
    return tokenizer


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tiny().save(str(path))
    return str(path)


@pytest.fixture(scope="session", params=["tiny", "pythia"])
def tokenizer(request, tiny_file) -> Tokenizer:
    if request.param == "pythia" and not (SHARED / "tokenizer.json").exists():
        pytest.skip("../shared is absent: the Pythia tokenizer is not checked")
    return tldr.load_tokenizer(tiny_file if request.param == "tiny" else str(SHARED / "tokenizer.json"))[0]


@pytest.fixture(scope="session")
def tiny(tiny_file) -> Tokenizer:
    return tldr.load_tokenizer(tiny_file)[0]


# --- the simplest way
def size(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text).ids)


def naive(tokenizer: Tokenizer, template: Template, fields: dict) -> str:
    """Recipe 1.3, letter by letter: the post that is left."""
    fields = dict(fields)
    while size(tokenizer, template.text.format(**fields)) > template.limit:
        if not fields[template.field]:
            raise ValueError
        try:
            i = fields[template.field].rindex("\n")
        except ValueError:
            i = -1
        fields[template.field] = fields[template.field][:i]
    return fields[template.field]


def bisected(tokenizer: Tokenizer, template: Template, fields: dict) -> str:
    """Only right if the number of tokens rose with every character."""
    low, high = 0, len(fields[template.field])  # `low` characters fit, `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        fits = (
            size(
                tokenizer, template.text.format(**fields | {template.field: fields[template.field][:middle]})
            )
            <= template.limit
        )
        low, high = (middle, high) if fits else (low, middle)
    return fields[template.field][:low]


def row(template: Template = TLDR, **fields) -> dict:
    return {"where": "made.jsonl, row 1", "template": template, "id": "made", "fields": FIELDS | fields}


def kept(tokenizer: Tokenizer, rows: list[dict]) -> list[str]:
    """What make_prompts leaves of the posts; checks that its three answers agree."""
    queries, ids, lost = make_prompts(tokenizer, rows)
    posts = [r["fields"][r["template"].field] for r in rows]
    posts = [post[: len(post) - n] for post, n in zip(posts, lost)]
    for r, post, query, tokens in zip(rows, posts, queries, ids):
        text = r["template"].text.format(**r["fields"] | {r["template"].field: post})
        assert (
            query == tokenizer.normalizer.normalize_str(text).strip()
            and tokens == tokenizer.encode(query).ids
        )
        assert size(tokenizer, text) <= r["template"].limit
    return posts


def post_of(tokenizer: Tokenizer, tokens: int, newlines: bool) -> str:
    """A post whose whole prompt has exactly so many tokens; without newlines it has about one character a
    token."""
    post = "a"
    while missing := tokens - size(tokenizer, TLDR.text.format(**FIELDS | {"post": post})):
        assert missing > 0
        line = "\nit" + " it" * (min(missing, 40) - 2) if missing > 1 else " it"
        post += line if newlines else (" a" + "1a" * 9)[: missing + 1]
    return post


def random_post(rng: random.Random, words: int, newlines: bool) -> str:
    blanks = (
        [" "] * 12
        + ["  ", "   ", "\t", "\u00a0", "-", "", " \u0301"]
        + (["\n", "\n\n", " \n"] if newlines else [])
    )
    marks = [""] * 12 + ["\u0301", "\u0301\u0323", "'s", ".", "🐐", "한", "ㅏ"]
    return "".join(rng.choice(WORDS) + rng.choice(marks) + rng.choice(blanks) for _ in range(words))


# --- truncation
@pytest.mark.parametrize("newlines", [False, True])
def test_posts_around_the_limit(tokenizer, newlines):
    rows = [row(post=post_of(tokenizer, n, newlines)) for n in (511, 512, 513, 700)]
    expected = [naive(tokenizer, TLDR, r["fields"]) for r in rows]
    assert kept(tokenizer, rows) == expected
    lost = [len(r["fields"]["post"]) - len(post) for r, post in zip(rows, expected)]
    assert lost[:2] == [0, 0] and 0 < lost[2] < lost[3]
    assert newlines == (lost[2] > 3)  # a whole line, or a few characters


@pytest.mark.parametrize("newlines", [False, True])
def test_post_of_2000_tokens_is_cut_in_few_encodings(tiny, monkeypatch, newlines):
    long, counts = row(post=post_of(tiny, 2000, newlines)), []
    expected = naive(tiny, TLDR, long["fields"])
    encode = tldr_prompts.encode
    monkeypatch.setattr(
        tldr_prompts, "encode", lambda tokenizer, texts: counts.append(len(texts)) or encode(tokenizer, texts)
    )
    assert kept(tiny, [long]) == [expected]
    assert sum(counts) < 20 < (len(long["fields"]["post"]) - len(expected)) / (120 if newlines else 1)


def test_random_posts_equal_the_naive_loop_and_a_wrong_bound_does_not(tokenizer, monkeypatch):
    rng = random.Random(0)
    base = size(tokenizer, TLDR.text.format(**FIELDS | {"post": ""}))
    rows = [
        row(
            replace(TLDR, limit=base + rng.randrange(30)),
            post=random_post(rng, rng.randrange(1, 40), i % 2 == 0),
        )
        for i in range(300)
    ]
    expected = [naive(tokenizer, r["template"], r["fields"]) for r in rows]
    assert sum(post != r["fields"]["post"] for post, r in zip(expected, rows)) > 150
    assert kept(tokenizer, rows) == expected
    monkeypatch.setattr(
        tldr_prompts,
        "most_that_can_fit",
        lambda *args, right=tldr_prompts.most_that_can_fit: right(*args) - 8,
    )
    assert sum(a != b for a, b in zip(kept(tokenizer, rows), expected)) > 20


def test_bisection_would_be_wrong(tokenizer):
    """A word is one token, its beginnings are more: up to the end of the word the prompt fits, one
    character earlier it does not."""
    rng, rows = random.Random(1), []
    for _ in range(60):
        start = "".join(" " + rng.choice(WORDS[:7]) for _ in range(20)) + " Mississippi"
        limit = size(tokenizer, TLDR.text.format(**FIELDS | {"post": start}))
        assert size(tokenizer, TLDR.text.format(**FIELDS | {"post": start[:-1]})) > limit
        rows.append(
            row(
                replace(TLDR, limit=limit),
                post=start + "".join(" " + rng.choice(WORDS[:7]) for _ in range(rng.randrange(1, 20))),
            )
        )
    expected = [naive(tokenizer, r["template"], r["fields"]) for r in rows]
    assert all(post.rstrip().endswith("Mississippi") for post in expected)
    assert kept(tokenizer, rows) == expected
    assert (
        sum(bisected(tokenizer, r["template"], r["fields"]) != post for r, post in zip(rows, expected)) > 10
    )


def test_other_tokenizers_take_every_step():
    """Without a split at spaces the bound has no proof; there the result is the naive loop's all the same."""
    whole = train_tiny(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    assert not tldr_prompts.splits_at_spaces(whole) and tldr_prompts.splits_at_spaces(train_tiny())
    assert tldr_prompts.most_that_can_fit(whole, TLDR, FIELDS | {"post": "it " * 900}) == 2700
    rng = random.Random(2)
    base = size(whole, TLDR.text.format(**FIELDS | {"post": ""}))
    rows = [row(replace(TLDR, limit=base + 15), post=random_post(rng, 30, False)) for _ in range(20)]
    assert kept(whole, rows) == [naive(whole, r["template"], r["fields"]) for r in rows]


def test_newline_rule_by_hand(tiny):
    """Cut at the last newline, which goes too, however much is lost; then character by character."""
    limit = size(tiny, TLDR.text.format(**FIELDS | {"post": "it it"}))
    post = "it it it\n\nmy dog\n" + "a" * 30
    assert kept(tiny, [row(replace(TLDR, limit=limit), post=post)]) == [
        "it it"
    ]  # "it it it" has one token too many, "it it " too
    assert kept(tiny, [row(replace(TLDR, limit=limit + 1), post=post)]) == ["it it it"]
    assert kept(tiny, [row(replace(TLDR, limit=limit), post="\n" + "it" * 60)]) == [
        ""
    ]  # the recipe's rule loses the whole post
    with pytest.raises(UserError, match="made.jsonl, row 1: column 'post' is cut to nothing"):
        make_prompts(tiny, [row(title="dog " * 600)])


# --- template, spaces, end of text
def test_template_byte_for_byte(tokenizer):
    (query,), (ids,), _ = make_prompts(tokenizer, [row()])
    assert (
        query.encode()
        == b"SUBREDDIT: r/gardening\n\nTITLE: My neighbour's goat\n\nPOST: It ate the hedge.\n\nTL;DR:"
    )
    assert ids == tokenizer.encode(query).ids
    wrong = tokenizer.encode(
        query + " "
    ).ids  # a trailing space: the response's own space would then be a second one
    assert ids != wrong and len(wrong) == len(ids) + 1


def test_cnndm_prompt_is_cut_with_its_newline_and_stored_without(tokenizer):
    article = "it " * 1920 + "my dog"
    long = {"where": "", "template": CNNDM, "id": "", "fields": {"article": article}}
    assert kept(tokenizer, [long]) == [naive(tokenizer, CNNDM, long["fields"])]
    (query,), (ids,), _ = make_prompts(tokenizer, [{**long, "fields": {"article": "The goat won."}}])
    assert query == "Article:\nThe goat won.\n\nTL;DR:"
    assert len(ids) == size(tokenizer, query + "\n") - 1


def test_responses_are_the_joined_texts_tokens(tokenizer):
    (query,), (ids,), _ = make_prompts(tokenizer, [row()])
    texts = [" the dog left", "the dog left", "  the dog", ""]
    tokens, apart = make_responses(tokenizer, [query] * 4, [ids] * 4, texts)
    assert [ids + t for t in tokens] == [
        tokenizer.encode(query + text).ids + [0] for text in texts
    ] and apart == 0
    assert tokens[0] != tokens[1] and tokens[3] == [0]  # the leading space counts
    assert [tokenizer.decode(t) for t in tokens] == texts


def test_response_that_changes_the_prompts_tokens_is_tokenised_alone(tiny):
    """ "TL;DR:" + "..." holds one piece ":..."; where that is a token, the prompt's own ids are not the
    beginning of the joined ones."""
    spec = json.loads(tiny.to_str())
    spec["model"]["vocab"][":."] = 601
    spec["model"]["merges"].append([":", "."])
    spec["added_tokens"] = spec["added_tokens"][:2]
    changed = Tokenizer.from_str(json.dumps(spec))
    ids = changed.encode("TL;DR:").ids
    tokens, apart = make_responses(changed, ["TL;DR:"] * 2, [ids] * 2, [".", " ."])
    assert apart == 1 and changed.encode("TL;DR:.").ids[: len(ids)] != ids
    assert tokens == [changed.encode(".").ids + [0], changed.encode(" .").ids + [0]]


def test_end_of_text_written_by_people_is_text(tokenizer):
    (query,), (ids,), _ = make_prompts(tokenizer, [row(post=f"The goat {EOS} ate {PAD} it")])
    (tokens,), _ = make_responses(tokenizer, [query], [ids], [f" it {EOS} left"])
    assert EOS in query and not {0, 1} & set(ids + tokens[:-1]) and tokens[-1] == 0
    assert tokenizer.decode(tokens) == f" it {EOS} left"


# --- whole program
def sft(n: int, **changes) -> dict:
    made = {
        "id": f"t{n}",
        "subreddit": "gardening",
        "title": f"Goat {n}",
        "post": "It ate the hedge. " * n,
        "summary": f"goat {n} eats",
    }
    return made | changes


def pair(n: int, batch: str = "batch3", **changes) -> dict:
    news = batch in tldr.CNNDM_BATCHES
    info = {
        "id": f"c{n}",
        "post": None if news else "It ate.\nAll of it.",
        "title": "Goat",
        "subreddit": None if news else "pets",
    }
    info |= {"site": "news" if news else None, "article": f"A goat ate {n} hedges." if news else None}
    summaries = [
        {"text": f" Goat {n}.", "policy": "sup1", "note": None},
        {"text": f" Hedge {n} is gone.", "policy": "ref", "note": None},
    ]
    made = {
        "info": info,
        "summaries": summaries,
        "choice": n % 2,
        "worker": "w",
        "batch": batch,
        "split": f"valid{1 + n % 2}",
    }
    return made | {"extra": {"confidence": 7 if n % 3 else None}} | changes


def source_rows() -> dict[str, list[dict]]:
    mixed = [pair(i, (*tldr.CNNDM_BATCHES, "batch4", "edit_b2")[i % 5]) for i in range(10)]
    return {
        "tldr_3_filtered/train": [sft(i) for i in range(1, 8)],
        "tldr_3_filtered/validation": [sft(10), sft(11, post="it " * 900)],
        "tldr_3_filtered/test": [sft(12)],
        "comparisons/train": [pair(i) for i in range(5)],
        "comparisons/validation": mixed,
    }


def write_source(folder: Path, rows: dict[str, list[dict]], kind: str) -> str:
    for name, table in rows.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(table), folder / f"{name}.parquet")
        else:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in table))
    return str(folder)


def prepare(
    tmp_path: Path, tokenizer: str, rows: dict[str, list[dict]], kind: str = "parquet", **options
) -> dict[str, list[dict]]:
    out = tmp_path / f"out_{kind}"
    main(
        Config(
            source=write_source(tmp_path / f"source_{kind}", rows, kind),
            out_dir=str(out),
            tokenizer=tokenizer,
            **options,
        )
    )
    return {path.stem: pq.read_table(path).to_pylist() for path in out.glob("*.parquet")}


def test_tables(tmp_path, tiny, tiny_file, capsys):
    tables = prepare(tmp_path, tiny_file, source_rows())
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    meta = json.loads((tmp_path / "out_parquet/meta.json").read_text())
    sizes = {
        "sft_train": 7,
        "sft_validation": 2,
        "sft_test": 1,
        "pairs_train": 5,
        "pairs_validation": 4,
        "pairs_validation_cnndm": 6,
    }
    assert {name: len(rows) for name, rows in tables.items()} == sizes == meta["splits"] == result["splits"]
    assert (meta["world"], meta["response_tokens"], meta["prompt_tokens"], meta["cnndm_prompt_tokens"]) == (
        "tldr",
        53,
        512,
        1919,
    )
    assert (
        meta["tables"]["sft_validation"]["prompts_cut"] == 1
        and meta["tables"]["sft_train"]["prompts_cut"] == 0
    )
    assert (tmp_path / "out_parquet/tokenizer.json").read_bytes() == Path(tiny_file).read_bytes()

    first = tables["sft_train"][0]
    assert first["reference_response"] == " goat 1 eats" and first["reference_response_token"][-1] == 0
    assert first["query_token"] + first["reference_response_token"] == tiny.encode(
        first["query"] + " goat 1 eats"
    ).ids + [0]
    assert {r["batch"] for r in tables["pairs_validation_cnndm"]} == set(tldr.CNNDM_BATCHES)
    assert {r["batch"] for r in tables["pairs_validation"]} == {"batch4", "edit_b2"}
    assert all(r["query"].startswith("Article:\nA goat") for r in tables["pairs_validation_cnndm"])
    assert all(
        r["query"].startswith("SUBREDDIT: r/pets\n\nTITLE: Goat\n\nPOST: It ate.\nAll")
        for r in tables["pairs_validation"]
    )
    even, odd = tables["pairs_train"][2], tables["pairs_train"][3]  # `choice` is n % 2
    shown = "chosen rejected chosen_policy rejected_policy split confidence preference".split()
    expected = [" Goat 2.", " Hedge 2 is gone.", "sup1", "ref", "valid1", 7, 0.75]
    assert [even[name] for name in shown] == expected
    expected = [" Hedge 3 is gone.", " Goat 3.", "ref", "sup1", "valid2", -1, 1.0]
    assert [odd[name] for name in shown] == expected
    columns = (
        "id query query_token chosen chosen_token rejected rejected_token chosen_policy rejected_policy "
        "batch split confidence preference"
    )
    assert list(even) == columns.split()
    assert list(first) == "id query query_token reference_response reference_response_token".split()


def test_soft_labels_of_the_slider():
    """1/2 would be the middle, which nobody could choose; both ends are certain."""
    labels = [tldr.preference(confidence) for confidence in (1, 2, 3, 4, 6, 7, 8, 9)]
    assert labels == [1, 0.875, 0.75, 0.625, 0.625, 0.75, 0.875, 1]
    assert tldr.preference(-1) == 1


def test_jsonl_and_parquet_and_chunks_give_the_same_tables(tmp_path, tiny_file, monkeypatch):
    parquet = prepare(tmp_path, tiny_file, source_rows(), "parquet")
    monkeypatch.setattr(tldr, "CHUNK", 2)
    monkeypatch.setattr(data_rows, "CHUNK", 2)
    assert prepare(tmp_path, tiny_file, source_rows(), "jsonl") == parquet
    assert pq.ParquetFile(tmp_path / "out_jsonl/sft_train.parquet").num_row_groups == 4
    changed = source_rows()
    changed["comparisons/train"][1]["choice"] = 0
    assert prepare(tmp_path, tiny_file, changed, "jsonl", overwrite=True) != parquet


def test_long_responses_are_kept_and_counted(tmp_path, tiny_file, capsys):
    rows = source_rows()
    rows["tldr_3_filtered/train"][:2] = [
        sft(1, summary="it " * 51 + "it"),
        sft(2, summary="it " * 52 + "it"),
    ]  # 53 and 54 tokens with EOS
    table = prepare(tmp_path, tiny_file, rows)["sft_train"]
    assert [len(r["reference_response_token"]) for r in table[:2]] == [53, 54] and table[1][
        "reference_response_token"
    ][-1] == 0
    meta = json.loads((tmp_path / "out_parquet/meta.json").read_text())["tables"]["sft_train"]
    assert (meta["responses_over_cap"], meta["longest_response"]) == (1, 54)
    assert "1 responses are longer than N+'s caps" in capsys.readouterr().out


def test_ties_limit_and_overwrite(tmp_path, tiny_file, capsys):
    rows = source_rows()
    rows["comparisons/train"][0]["summaries"][1]["text"] = rows["comparisons/train"][0]["summaries"][0][
        "text"
    ]
    assert len(prepare(tmp_path, tiny_file, rows)["pairs_train"]) == 4
    assert "1 pairs of two equal texts: dropped" in capsys.readouterr().out
    with pytest.raises(UserError, match="is not empty; use another one, or --overwrite"):
        prepare(tmp_path, tiny_file, rows)
    pq.write_table(pa.table({"id": ["old"]}), tmp_path / "out_parquet/rankings_train.parquet")
    pq.write_table(pa.table({"id": ["mine"]}), tmp_path / "out_parquet/other.parquet")
    tables = prepare(tmp_path, tiny_file, rows, overwrite=True, limit=3)
    assert "1 pairs of two equal texts: dropped" in capsys.readouterr().out
    assert [r["id"] for r in tables["pairs_train"]] == ["c1", "c2", "c3"]
    sizes = {
        "sft_train": 3,
        "sft_validation": 2,
        "sft_test": 1,
        "pairs_train": 3,
        "pairs_validation": 3,
        "pairs_validation_cnndm": 3,
    }
    assert {
        name: len(table) for name, table in tables.items() if name != "other"
    } == sizes and "other" in tables


INFO = pa.struct([(name, pa.string()) for name in "id post title subreddit site article".split()])
SUMMARY = pa.struct([(name, pa.string()) for name in "text policy note".split()])
HUB_SCHEMA = {  # the columns and types that the two data sets have on the hub
    "tldr_3_filtered": pa.schema([(name, pa.string()) for name in "id subreddit title post summary".split()]),
    "comparisons": pa.schema(
        [
            ("info", INFO),
            ("summaries", pa.list_(SUMMARY)),
            ("choice", pa.int32()),
            ("worker", pa.string()),
            ("batch", pa.string()),
            ("split", pa.string()),
            ("extra", pa.struct([("confidence", pa.int32())])),
        ]
    ),
}


def from_hub(
    tmp_path: Path, tokenizer: str, rows: dict[str, list[dict]], monkeypatch, **options
) -> tuple[dict[str, list[dict]], list]:
    """Tables prepared from a stand-in for the hub, and what it was asked: comparisons/train and
    tldr_3_filtered/train come in two shards."""
    asked = []

    def download(repo, *, repo_type, revision, allow_patterns):
        asked.append((repo, repo_type, revision, allow_patterns))
        folder, config = (
            ("comparisons", "comparisons") if repo.startswith("openai/") else ("tldr_3_filtered", "default")
        )
        split = allow_patterns.split("/")[1]
        table, target = rows[f"{folder}/{split}"], tmp_path / "hub" / folder / config / split
        target.mkdir(parents=True, exist_ok=True)
        for i, shard in enumerate((table[:3], table[3:]) if split == "train" else (table,)):
            pq.write_table(pa.Table.from_pylist(shard, HUB_SCHEMA[folder]), target / f"000{i}.parquet")
        return str(tmp_path / "hub" / folder)

    monkeypatch.setattr(tldr, "snapshot_download", download)
    main(Config(out_dir=str(tmp_path / "hub_out"), tokenizer=tokenizer, **options))
    return {
        path.stem: pq.read_table(path).to_pylist() for path in (tmp_path / "hub_out").glob("*.parquet")
    }, asked


def test_hub_files_are_those_of_the_parquet_branch(tmp_path, tiny_file, monkeypatch):
    tables, asked = from_hub(tmp_path, tiny_file, source_rows(), monkeypatch)
    assert tables == prepare(tmp_path, tiny_file, source_rows())
    assert (
        "openai/summarize_from_feedback",
        "dataset",
        "refs/convert/parquet",
        "comparisons/train/*.parquet",
    ) in asked
    monkeypatch.setattr(
        tldr, "snapshot_download", lambda repo, **_: (_ for _ in ()).throw(OSError("no network"))
    )
    with pytest.raises(
        UserError,
        match="cannot download vwxyzjn/summarize_from_feedback_tldr_3_filtered: no network; --source=",
    ):
        main(Config(out_dir=str(tmp_path / "hub_out2"), tokenizer=tiny_file))


def test_five_comparisons_without_an_id_are_prepared_to_the_end(tmp_path, tiny_file, monkeypatch):
    """As on the hub: the last rows of comparisons/validation, batch edit_b2_eval_test, have no id."""
    rows, nameless = source_rows(), [pair(20 + i, "edit_b2_eval_test") for i in range(5)]
    for made in nameless:
        made["info"]["id"] = None
    rows["comparisons/validation"] += nameless
    tables, _ = from_hub(tmp_path, tiny_file, rows, monkeypatch)
    assert json.loads((tmp_path / "hub_out/meta.json").read_text())["splits"]["pairs_validation"] == 9
    assert [r["id"] for r in tables["pairs_validation"]] == ["c3", "c4", "c8", "c9"] + [""] * 5
    named = source_rows()
    named["comparisons/validation"] += [pair(20 + i, "edit_b2_eval_test") for i in range(5)]
    expected = prepare(tmp_path, tiny_file, named)
    assert all(
        r | {"id": ""} == e | {"id": ""}
        for r, e in zip(tables["pairs_validation"], expected["pairs_validation"], strict=True)
    )
    assert all(tables[name] == expected[name] for name in expected if name != "pairs_validation")


OPTIONAL = {  # column: the columns of the prepared table that then hold a default
    "id": {"id": ""},
    "info.id": {"id": ""},
    "info.site": {},
    "info.article": {},
    "worker": {},
    "split": {"split": ""},
    "extra": {"confidence": -1, "preference": 1.0},
    "extra.confidence": {"confidence": -1, "preference": 1.0},
    "summaries.0.note": {},
    "summaries.0.policy": {"rejected_policy": ""},
    "summaries.1.policy": {"chosen_policy": ""},
}


def change(made: dict, column: str, missing: bool) -> dict:
    """A copy of the row without that column, or with null in it."""
    made = json.loads(json.dumps(made))
    *path, last = column.split(".")
    item = made
    for key in path:
        item = item[int(key) if key.isdigit() else key]
    if missing:
        del item[last]
    else:
        item[last] = None
    return made


@pytest.mark.parametrize("missing", [False, True], ids=["null", "missing"])
@pytest.mark.parametrize("column", OPTIONAL)
def test_what_no_prompt_needs_may_be_null_or_missing(tmp_path, tiny_file, column, missing):
    name, table = (
        ("tldr_3_filtered/test", "sft_test") if column == "id" else ("comparisons/train", "pairs_train")
    )
    whole = sft(1) if column == "id" else pair(1)
    rows = source_rows() | {name: [whole, change(whole, column, missing)]}
    full, lacking = prepare(tmp_path, tiny_file, rows, "jsonl")[table]
    assert lacking == full | OPTIONAL[column]


@pytest.mark.parametrize("column", ["info.post", "info.title", "info.subreddit"])
def test_an_article_needs_nothing_of_a_reddit_post(tmp_path, tiny_file, column):
    rows = source_rows() | {
        "comparisons/validation": [pair(1, "cnndm2"), change(pair(1, "cnndm2"), column, True)]
    }
    full, lacking = prepare(tmp_path, tiny_file, rows, "jsonl")["pairs_validation_cnndm"]
    assert lacking == full


def test_a_bad_row_is_named_before_anything_is_tokenised_or_removed(tmp_path, tiny_file, monkeypatch):
    prepare(tmp_path, tiny_file, source_rows(), "jsonl")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out_jsonl").iterdir()}
    rows = source_rows()
    rows["comparisons/validation"].append(pair(11, info=pair(11)["info"] | {"title": None}))
    monkeypatch.setattr(tldr_prompts, "encode", lambda *args: pytest.fail("tokenised"))
    with pytest.raises(
        UserError, match="comparisons/validation.jsonl, row 11: column 'info.title' is null, expected a text"
    ):
        prepare(tmp_path, tiny_file, rows, "jsonl", overwrite=True, limit=2)  # the limit hides no fault
    assert {path.name: path.read_bytes() for path in (tmp_path / "out_jsonl").iterdir()} == before


def test_a_written_end_of_text_is_counted(tmp_path, tiny_file, capsys):
    rows = source_rows()
    rows["tldr_3_filtered/train"][0]["post"] += EOS
    for i, side in ((0, 0), (0, 1), (3, 1)):  # a pair with two of them counts once
        rows["comparisons/train"][i]["summaries"][side]["text"] += f" {EOS} left"
    tables = prepare(tmp_path, tiny_file, rows)
    counted = {
        name: table["eos_in_text"]
        for name, table in json.loads((tmp_path / "out_parquet/meta.json").read_text())["tables"].items()
    }
    assert counted == dict.fromkeys(counted, 0) | {"sft_train": 1, "pairs_train": 2}
    assert f"3 rows with {EOS} in a text: kept as text" in capsys.readouterr().out
    assert (
        tables["pairs_train"][0]["chosen"].endswith(f"{EOS} left")
        and tables["pairs_train"][0]["chosen_token"].count(0) == 1
    )


def test_a_batch_with_two_names_is_counted_and_once_on_request(tmp_path, tiny_file, capsys):
    rows = source_rows()
    twice = [pair(i, batch) for batch in tldr.SAME_BATCHES for i in range(30, 33)]
    other = [
        pair(30, "cnndm2"),
        pair(30, "cnndm0"),
    ]  # a repetition within a batch, or in a third one, may be another worker's
    rows["comparisons/validation"] = [pair(3), *twice, *other]
    kept = prepare(tmp_path, tiny_file, rows)["pairs_validation_cnndm"]
    assert [r["id"] for r in kept] == ["c30", "c31", "c32"] * 2 + ["c30", "c30"]
    out = capsys.readouterr().out
    assert "4 pairs in both of the CNN/DM batches batch0_cnndm and cnndm0: kept, as in N+; " in out
    once = prepare(tmp_path, tiny_file, rows, overwrite=True, cnndm_once=True)["pairs_validation_cnndm"]
    assert [(r["id"], r["batch"]) for r in once] == [
        ("c30", "batch0_cnndm"),
        ("c31", "batch0_cnndm"),
        ("c32", "batch0_cnndm"),
        ("c30", "cnndm2"),
    ]
    meta = json.loads((tmp_path / "out_parquet/meta.json").read_text())
    assert (
        meta["tables"]["pairs_validation_cnndm"]["repeated"] == 4
        and meta["tables"]["pairs_validation"]["repeated"] == 0
    )
    assert "batch0_cnndm and cnndm0: dropped" in capsys.readouterr().out


# --- errors
def without(made: dict, column: str) -> dict:
    return {key: item for key, item in made.items() if key != column}


BAD = {
    "no summary": (
        "tldr_3_filtered/train",
        [without(sft(1), "summary")],
        "train.jsonl, row 1: no column 'summary'",
    ),
    "null post": (
        "tldr_3_filtered/test",
        [sft(1), sft(2, post=None)],
        "test.jsonl, row 2: column 'post' is null, expected a text",
    ),
    "no rows": ("tldr_3_filtered/validation", [], "validation.jsonl: the file is empty"),
    "no choice": (
        "comparisons/train",
        [without(pair(1), "choice")],
        "train.jsonl, row 1: no column 'choice'",
    ),
    "choice 2": (
        "comparisons/train",
        [pair(1, choice=2)],
        "train.jsonl, row 1: column 'choice' is 2 of 2 summaries",
    ),
    "no text": (
        "comparisons/train",
        [pair(1, summaries=[{}, {}])],
        "train.jsonl, row 1: no column 'summaries.1.text'",
    ),
    "no article": (
        "comparisons/validation",
        [pair(1, "cnndm0", info={})],
        "validation.jsonl, row 1: no column 'info.article'",
    ),
    "null summary": (
        "tldr_3_filtered/train",
        [sft(1, summary=None)],
        "train.jsonl, row 1: column 'summary' is null, expected a text",
    ),
    "null text": (
        "comparisons/train",
        [change(pair(1), "summaries.0.text", False)],
        "row 1: column 'summaries.0.text' is null, expected a text",
    ),
    "null subreddit": (
        "comparisons/train",
        [change(pair(1), "info.subreddit", False)],
        "row 1: column 'info.subreddit' is null",
    ),
    "null article": (
        "comparisons/validation",
        [change(pair(1, "cnndm0"), "info.article", False)],
        "row 1: column 'info.article' is null",
    ),
    "null choice": (
        "comparisons/train",
        [pair(1, choice=None)],
        "train.jsonl, row 1: column 'choice' is null, expected a whole number",
    ),
    "null batch": (
        "comparisons/validation",
        [pair(1, batch=None)],
        "validation.jsonl, row 1: column 'batch' is null, expected a text",
    ),
    "a worker's text as confidence": (
        "comparisons/train",
        [pair(1, extra={"confidence": "7"})],
        "column 'extra.confidence' is '7', expected a whole number",
    ),
    "a confidence beyond the slider": (
        "comparisons/train",
        [pair(1, extra={"confidence": 10})],
        "column 'extra.confidence' is 10, expected 1 to 9",
    ),
    "long title": (
        "tldr_3_filtered/train",
        [sft(1, title="dog " * 600)],
        "train.jsonl, row 1: column 'post' is cut to nothing",
    ),
    "no object": ("comparisons/train", [3], "train.jsonl, row 1: cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_name_file_row_and_column(tmp_path, tiny_file, case):
    name, rows, message = BAD[case]
    with pytest.raises(UserError) as error:
        prepare(tmp_path, tiny_file, source_rows() | {name: rows}, "jsonl")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (
        tmp_path / "out_jsonl/meta.json"
    ).exists()  # and nothing takes the half-made directory for a whole one


def test_bad_sources_and_tokenizers(tmp_path, tiny_file, monkeypatch):
    source = write_source(tmp_path / "source", source_rows(), "jsonl")
    out = str(tmp_path / "out")

    def message(**options) -> str:
        with pytest.raises(UserError) as error:
            main(Config(**{"out_dir": out, "source": source, "tokenizer": tiny_file} | options))
        return str(error.value)

    assert message(source="nowhere") == '--source nowhere: neither "hub" nor a directory'
    assert message(limit=-1).startswith("--limit=-1 must be at least 0")
    other = train_tiny()
    spec = json.loads(other.to_str())
    spec["added_tokens"] = spec["added_tokens"][1:]
    (tmp_path / "other.json").write_text(json.dumps(spec).replace(EOS, "<s>"))
    assert f"{EOS} must have id 0, it has None" in message(tokenizer=str(tmp_path / "other.json"))
    (tmp_path / "broken.json").write_text("{")
    assert "broken.json: not a tokenizer.json" in message(tokenizer=str(tmp_path / "broken.json"))
    monkeypatch.setattr(data_rows, "hf_hub_download", lambda *_: (_ for _ in ()).throw(OSError("no network")))
    assert (
        message(tokenizer="some/model")
        == "--tokenizer some/model: not a file, and no tokenizer.json on the hub: no network"
    )
    (tmp_path / "source/comparisons/train.jsonl").unlink()
    assert "no comparisons/train.parquet or .jsonl" in message()
    (tmp_path / "source/comparisons/train.parquet").write_bytes(b"no parquet")
    assert "train.parquet, row 1: cannot be read" in message()


def test_command_line(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "data/tldr.py"),
        f"--out_dir={tmp_path / 'out'}",
        "--source=nowhere",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, 'error: --source nowhere: neither "hub" nor a directory\n')


# --- the real sample
@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> dict[str, list[dict]]:
    out = tmp_path_factory.mktemp("sample") / "data"
    main(Config(source=str(SHARED / "tldr"), tokenizer=str(SHARED / "tokenizer.json"), out_dir=str(out)))
    tables = {path.stem: pq.read_table(path).to_pylist() for path in out.glob("*.parquet")}
    return tables | {"meta": json.loads((out / "meta.json").read_text())}


@needs_sample
def test_sample_rows(sample):
    sizes = {
        "sft_train": 644,
        "sft_validation": 149,
        "sft_test": 120,
        "pairs_train": 508,
        "pairs_validation": 124,
    }
    assert (
        {name: len(rows) for name, rows in sample.items() if name != "meta"}
        == sizes
        == sample["meta"]["splits"]
    )
    tables = sample["meta"]["tables"]
    assert [tables[name]["prompts_cut"] for name in sizes] == [0, 1, 2, 3, 0]
    assert all(table["tokenised_apart"] == table["responses_over_cap"] == 0 for table in tables.values())
    assert max(table["longest_prompt"] for table in tables.values()) == 512
    ids = [{r["id"] for r in sample[name]} for name in ("pairs_train", "pairs_validation")]
    assert not ids[0] & ids[1]


@needs_sample
def test_200_real_posts_equal_the_naive_loop():
    """Limits that cut 1 to 25 tokens; every other post without its newlines, so that characters go one by
    one."""
    pythia = tldr.load_tokenizer(str(SHARED / "tokenizer.json"))[0]
    rng, rows = random.Random(0), []
    for i, post in enumerate(pq.read_table(SHARED / "tldr/tldr_3_filtered/train.parquet").to_pylist()[:210]):
        fields = {name: post[name].replace("\n", " " if i % 2 else "\n") for name in FIELDS}
        if size(pythia, fields["post"]) < 40:
            continue  # too short to lose so much
        rows.append(
            row(
                replace(TLDR, limit=size(pythia, TLDR.text.format(**fields)) - rng.randrange(1, 25)), **fields
            )
        )
    posts = kept(pythia, rows)
    assert len(rows) >= 200 and posts == [naive(pythia, r["template"], r["fields"]) for r in rows]
    assert all(len(post) < len(r["fields"]["post"]) for post, r in zip(posts, rows))


@needs_sample
def test_1000_real_rows_have_the_tokens_that_transformers_gives(sample):
    """N+ tokenises the joined text with its EOS by transformers; here the prompt's and the response's
    tokens stand side by side."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(SHARED / "tokenizer.json"), eos_token=EOS, pad_token=PAD
    )
    rows = [
        (r, "reference_response")
        for name in ("sft_train", "sft_validation", "sft_test")
        for r in sample[name]
    ]
    rows += [(r, side) for r in sample["pairs_train"] for side in ("chosen", "rejected")]
    rows = rows[:1500]
    joined = theirs([r["query"] + r[name] + EOS for r, name in rows])["input_ids"]
    assert len(rows) == 1500 and joined == [r["query_token"] + r[f"{name}_token"] for r, name in rows]
    assert theirs([r["query"] for r, _ in rows])["input_ids"] == [r["query_token"] for r, _ in rows]
    assert theirs([r["query"] + r[name].strip() + EOS for r, name in rows])["input_ids"] != joined
