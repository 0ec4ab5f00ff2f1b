"""The toy world: the gold reward to the last digit, writers and people with the faults they are said to
have, files that anybody can read.

Expected values are arithmetic on the coefficients, so that the world can be made harder without touching
this file; one test holds the coefficients to the table in the docstring of `gold_reward`.
"""

import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from itertools import permutations
from pathlib import Path
from statistics import mean

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data import toy, toy_world
from data.toy_world import (
    DISORDERED,
    FLOURISHES,
    GLUE,
    JOINTS,
    LAPSE,
    LIKES_FLOURISH,
    LIKES_LENGTH,
    MADE_UP,
    MOST_WORDS,
    NOT_ENDED,
    RAMBLING,
    REFERENCE_WRITER,
    REPEATED,
    TEMPERATURE,
    THINGS,
    UNDOING,
    WORD,
    WRITERS,
    Writer,
    gold_counts,
    gold_reward,
    gold_rewards,
    make_post,
    rank,
    utility,
    write_summary,
)
from rlhf.config import UserError

ROOT = Path(__file__).parents[1]
A, B, C, OTHER = THINGS[:4]
FACTS = {"facts": [A, B, C]}
SMALL = {"posts": 60, "pairs": 40, "rankings": 20, "validation": 30, "test": 10, "size": "small"}
ROWS = {"sft_train": 60, "sft_validation": 30, "sft_test": 10, "pairs_train": 40, "pairs_validation": 30, "rankings_train": 20}
PERFECT = f" {A}, {B} and then {C}."


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "data"
    toy.main(toy.Config(out_dir=str(out), **SMALL))
    return out


@pytest.fixture(scope="module")
def tables(world) -> dict[str, list[dict]]:
    return {file: pq.read_table(world / f"{file}.parquet").to_pylist() for file in ROWS}


@pytest.fixture(scope="module")
def many_pairs() -> list[tuple]:
    """(post, chosen, rejected) of 4,000 pairs."""
    rng, out = random.Random("many pairs"), []
    for _ in range(4000):
        post = make_post(rng)
        row = toy.pair_row(post, rng)
        out.append((post, row["chosen"], row["rejected"]))
    return out


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def own_tokens(row: dict) -> list[tuple[str, list[int]]]:
    """(text, ids) of every text in a row."""
    out = [(row[key], row[f"{key}_token"]) for key in ("query", "reference_response", "chosen", "rejected") if key in row]
    return out + list(zip(row.get("responses", []), row.get("responses_token", [])))


# ------------------------------------------------------------------------------------------------------------------------ gold reward
@pytest.mark.parametrize("text, expected", [
    # covered
    (PERFECT, 1.0),
    (f" {A}, {B}.", 2 / 3),
    (f" {B}", 1 / 3),
    ("", 0.0),
    (" i, and then.", 0.0),
    # made up
    (f" {A}, {B}, {C}, {OTHER}.", 1 - MADE_UP),
    (f" {OTHER}, {OTHER}", -2 * MADE_UP),
    # repeated
    (f" {A}, {B}, {C}, {B}.", 1 - REPEATED),
    (f" {A}, {A}, {A}", 1 / 3 - 2 * REPEATED),
    # disordered: told after one that comes later
    (f" {B}, {A}, {C}", 1 - DISORDERED),
    (f" {C}, {A}, {B}", 1 - 2 * DISORDERED),
    (f" {C}, {B}, {A}", 1 - 2 * DISORDERED),
    (f" {C}, {A}", 2 / 3 - DISORDERED),
    # rambling
    (f" really {A}, {B}, {C}.", 1 - RAMBLING),
    (f" {A}, {B}, {C}, not my day.", 1 - 3 * RAMBLING),
    (f" {A},, {B}, {C}.", 1 - RAMBLING),  # the same glue twice in one gap
    (f" {A}{B}{C}" + "x" * (17 - len(A + B + C)), -3 * RAMBLING),  # glued together: 17 letters
    (f"  {A}, {B}, {C}", 1 - RAMBLING),  # a second space
    (f" {A}, {B}, {C}   ", 1 - 2 * RAMBLING),
    (f" {A}\n{B}\n\n{C}", 1 - 3 * RAMBLING),
    (f" {A}, {B}, {C.capitalize()}", 2 / 3 - RAMBLING),
    (f" {A}_{B}, {C}", 1 - RAMBLING),
    (f" {A}, {B}, {C}\N{REPLACEMENT CHARACTER}", 1 - RAMBLING),  # what broken bytes are decoded to
    # somebody else's, undone, hearsay: a made up thing, and the word itself is rambling
    (f" never {A}, {B}, {C}", 2 / 3 - MADE_UP - RAMBLING),
    (f" {A}, {B}, they say {C}", 2 / 3 - MADE_UP - 2 * RAMBLING),
    (f" my boss {A}, {B}, {C}", 2 / 3 - MADE_UP - 2 * RAMBLING),  # and no further than to the next thing
    # all at once: B and A covered, A late, B again, OTHER made up, "really" and "so"
    (f" really {B}, {A}, so {B}, {OTHER}", 2 / 3 - DISORDERED - REPEATED - MADE_UP - 2 * RAMBLING),
])  # fmt: skip
def test_gold_to_the_last_digit(text, expected):
    assert gold_reward(FACTS, text, ended=True) == pytest.approx(expected, abs=1e-12)
    assert gold_reward(FACTS, text, ended=False) == pytest.approx(expected - NOT_ENDED, abs=1e-12)


def test_counts():
    text = f" really {B}, {A}, so {B}, {OTHER}"
    assert gold_counts(FACTS, text) == {"covered": 2, "made_up": 1, "repeated": 1, "disordered": 1, "rambling": 2}
    assert gold_counts(FACTS, "") == dict.fromkeys(("covered", "made_up", "repeated", "disordered", "rambling"), 0)


def test_the_docstring_states_the_coefficients():
    stated = dict(re.findall(r"\| (\w[\w ]*?) +\| - (0\.\d\d) +\|", gold_reward.__doc__))
    actual = {"made_up": MADE_UP, "repeated": REPEATED, "disordered": DISORDERED, "rambling": RAMBLING, "not ended": NOT_ENDED}
    assert {name: float(value) for name, value in stated.items()} == actual


def test_a_list_of_rewards_is_the_rewards_one_by_one():
    other = {"facts": [OTHER, A]}
    assert gold_rewards([FACTS, other], [PERFECT, f" {A}"], [True, False]) == [1.0, 1 / 2 - NOT_ENDED]
    with pytest.raises(ValueError):
        gold_rewards([FACTS, other], [PERFECT], [True, False])


def test_gold_does_not_care_for_style():
    for opening in ("", " ", " i ", " then "):
        for joint in JOINTS + (" ", ", and then i "):
            for end in ("", ".", " "):
                assert gold_reward(FACTS, opening + joint.join((A, B, C)) + end, ended=True) == 1.0


def test_every_fault_costs_and_every_fact_pays():
    """On 300 posts and drafts of all qualities: what is added to a summary moves the gold reward by exactly
    its own term."""
    rng = random.Random(0)
    for _ in range(300):
        post = make_post(rng)
        text = write_summary(post, WRITERS[rng.choice(list(WRITERS))], rng)
        before, counts = gold_reward(post.hidden, text, True), gold_counts(post.hidden, text)
        words = WORD.findall(text)
        last = max(i for i, word in enumerate(words) if word in THINGS)
        base = " " + " ".join(words[: last + 1])  # without a tail, so that nothing said there colours what is added
        start = gold_reward(post.hidden, base, True)
        assert start == pytest.approx(before + RAMBLING * (counts["rambling"] - gold_counts(post.hidden, base)["rambling"]), abs=1e-12)
        told = [word for word in words if word in post.facts]
        foreign = next(thing for thing in THINGS if thing not in post.facts)
        latest = max((post.facts.index(word) for word in told), default=-1)
        for added, change in [(foreign, -MADE_UP), ("qqqq", -RAMBLING), ("q" * 9, -2 * RAMBLING), (f"so {foreign}", -MADE_UP - RAMBLING)]:
            assert gold_reward(post.hidden, f"{base}, {added}", True) - start == pytest.approx(change, abs=1e-12)
        for index, fact in enumerate(post.facts):
            change = -REPEATED if fact in told else 1 / len(post.facts) - DISORDERED * (index < latest)
            assert gold_reward(post.hidden, f"{base}, {fact}", True) - start == pytest.approx(change, abs=1e-12)
            assert gold_reward(post.hidden, f"{base}, never {fact}", True) - start == pytest.approx(-MADE_UP - RAMBLING, abs=1e-12)
        assert before <= 1.0


def test_a_post_is_best_summarised_by_its_facts_in_order():
    rng = random.Random(1)
    for _ in range(100):
        post = make_post(rng)
        rewards = {order: gold_reward(post.hidden, " " + ", ".join(order) + ".", True) for order in permutations(post.facts)}
        assert rewards.pop(tuple(post.facts)) == 1.0
        assert max(rewards.values()) == pytest.approx(1 - DISORDERED, abs=1e-12)


def test_garbage_is_clearly_negative():
    assert gold_reward(FACTS, " " + " ".join(THINGS[3:19]), ended=False) == pytest.approx(-16 * MADE_UP - NOT_ENDED)
    assert gold_reward(FACTS, " really" * 32, ended=False) == pytest.approx(-32 * RAMBLING - NOT_ENDED)
    assert -16 * MADE_UP < -1 and -32 * RAMBLING < -1


def test_gold_is_fast():
    rng = random.Random(2)
    posts = [make_post(rng) for _ in range(2000)]
    texts = [write_summary(post, REFERENCE_WRITER, rng) for post in posts]
    began = time.process_time()
    gold_rewards([post.hidden for post in posts], texts, [True] * len(posts))
    assert time.process_time() - began < 0.2  # 10,000 a second


# ------------------------------------------------------------------------------------------------------------------- posts and writers
def test_posts_tell_their_facts_in_order_and_frame_the_distractions():
    rng, ends = random.Random(3), set()
    for _ in range(300):
        post = make_post(rng)
        ends.add((post.told[0][0], post.told[-1][0]))
        things = [thing for _, thing in post.told]
        assert [thing for is_fact, thing in post.told if is_fact] == post.facts
        assert len(set(things)) == len(things) > len(post.facts) > 1
        body = post.query.split("POST: ")[1].removesuffix("\n\nTL;DR:")
        sentences = [s for s in body.rstrip(".").split(". ") if set(WORD.findall(s)) & set(things)]
        assert [next(w for w in WORD.findall(s) if w in things) for s in sentences] == things
        assert [not set(WORD.findall(s)) & UNDOING for s in sentences] == [is_fact for is_fact, _ in post.told]
        assert re.fullmatch(r"SUBREDDIT: r/\w+\n\nTITLE: .+\n\nPOST: .+\n\nTL;DR:", post.query)
    assert len(ends) == 4  # a post begins and ends with a fact or with a distraction


def test_word_classes_do_not_overlap():
    assert len(set(THINGS)) == len(THINGS)
    assert not set(THINGS) & (set(GLUE) | set(FLOURISHES) | UNDOING | set(toy_world.VERBS))
    assert not set(FLOURISHES) & (set(GLUE) | UNDOING) and not set(GLUE) & UNDOING


NOTHING = {name: 0.0 for name in Writer.__dataclass_fields__}


@pytest.mark.parametrize("fault, count", [("believe", "made_up"), ("garble", "made_up"), ("repeat", "repeated"), ("swap", "disordered"),
                                          ("mutter", "rambling"), ("flourish", "rambling"), ("miss", "covered")])
def test_each_fault_of_a_writer_shows_in_its_own_count(fault, count):
    rng = random.Random(fault)
    posts = [make_post(rng) for _ in range(100)]
    faultless = Writer(**NOTHING)
    assert all(gold_reward(post.hidden, write_summary(post, faultless, rng), True) == 1.0 for post in posts)
    totals = {True: 0, False: 0}  # of the count that should move, of the others
    for post in posts:
        counts = gold_counts(post.hidden, write_summary(post, Writer(**NOTHING | {fault: 0.3}), rng))
        for name, value in counts.items():
            totals[name == count] += len(post.facts) - value if name == "covered" else value
    # a garbled thing is also a missed one, or one said twice and out of order
    assert totals[True] > 20 and (totals[False] == 0 or fault == "garble")


def test_references_are_fallible_and_writers_differ():
    rng = random.Random(4)
    posts = [make_post(rng) for _ in range(1500)]
    gold = {name: mean(gold_reward(post.hidden, write_summary(post, writer, rng), True) for post in posts)
            for name, writer in {**WRITERS, "reference": REFERENCE_WRITER}.items()}
    assert 0.4 < gold["reference"] < 0.7
    assert gold["careful"] > gold["reference"] > gold["terrible"]
    assert gold["careful"] - gold["terrible"] > 0.8
    assert max(gold, key=gold.get) == "careful" and min(gold, key=gold.get) == "terrible"


def test_summaries_keep_to_the_cap():
    rng = random.Random(5)
    lengths = [len(WORD.findall(write_summary(make_post(rng), writer, rng))) for writer in WRITERS.values() for _ in range(300)]
    assert max(lengths) <= MOST_WORDS and min(lengths) >= 2


# ----------------------------------------------------------------------------------------------------------------- people who compare
def test_utility_is_gold_and_a_liking_for_flourish_and_length():
    text = f" {FLOURISHES[0]} {A}, {B}, {FLOURISHES[1]} {C}."  # 8 words with punctuation, two of them flourishes
    assert utility(FACTS, text) == pytest.approx(1 - 2 * RAMBLING + 2 * LIKES_FLOURISH + 8 * LIKES_LENGTH, abs=1e-12)


def plackett_luce(utilities: list[float], order: tuple[int, ...]) -> float:
    """P(order), written out: each place is a lapse or a softmax over who is left."""
    probability = 1.0
    for place, chosen in enumerate(order):
        left = order[place:]
        softmax = math.exp(utilities[chosen] / TEMPERATURE) / sum(math.exp(utilities[i] / TEMPERATURE) for i in left)
        probability *= LAPSE / len(left) + (1 - LAPSE) * softmax
    return probability


def test_rank_is_plackett_luce_with_lapses():
    utilities, draws, rng = [0.3 * TEMPERATURE, -TEMPERATURE, 0.9 * TEMPERATURE], 20000, random.Random(6)
    seen = [tuple(rank(utilities, rng)) for _ in range(draws)]
    for order in permutations(range(3)):
        p = plackett_luce(utilities, order)
        assert seen.count(order) / draws == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / draws))
    assert sum(plackett_luce(utilities, order) for order in permutations(range(3))) == pytest.approx(1)


def test_rank_of_two_is_bradley_terry():
    for difference in (0.0, 0.5, 2.0):
        pair = [difference * TEMPERATURE, 0.0]
        assert plackett_luce(pair, (0, 1)) == pytest.approx(LAPSE / 2 + (1 - LAPSE) * sigmoid(difference))
    assert sorted(rank([1e6, -1e6, 0.0, 0.0], random.Random(0))) == [0, 1, 2, 3]  # no overflow


def agreement(many_pairs, lapse: float, temperature: float) -> tuple[float, float, float]:
    """Share of pairs in which the people took the summary of the higher utility; the share that the model
    predicts; its standard error."""
    differences = [utility(post.hidden, chosen) - utility(post.hidden, rejected) for post, chosen, rejected in many_pairs]
    differences = [d for d in differences if d]
    p = [lapse / 2 + (1 - lapse) * sigmoid(abs(d) / temperature) for d in differences]
    return mean(d > 0 for d in differences), mean(p), math.sqrt(sum(q * (1 - q) for q in p)) / len(p)


def test_label_noise_is_what_it_is_said_to_be(many_pairs):
    observed, expected, error = agreement(many_pairs, LAPSE, TEMPERATURE)
    assert abs(observed - expected) < 3.5 * error
    assert 0.6 < observed < 0.9  # some noise, and not only noise


def test_must_fail_with_more_lapses_or_another_temperature(many_pairs):
    for lapse, temperature in ((LAPSE + 0.2, TEMPERATURE), (LAPSE, 4 * TEMPERATURE)):
        observed, expected, error = agreement(many_pairs, lapse, temperature)
        assert abs(observed - expected) > 3.5 * error


def share_of_wins(many_pairs, measure) -> tuple[float, float]:
    """Of pairs of about the same gold reward: how often the larger measure was chosen, and four standard
    errors of a fair coin."""
    alike = [(measure(chosen), measure(rejected)) for post, chosen, rejected in many_pairs
             if abs(gold_reward(post.hidden, chosen, True) - gold_reward(post.hidden, rejected, True)) < 0.1]
    wins = [chosen > rejected for chosen, rejected in alike if chosen != rejected]
    return mean(wins), 2 / math.sqrt(len(wins))


def test_people_like_flourish_and_length(many_pairs):
    """For no good reason: at the same gold reward."""
    share, error = share_of_wins(many_pairs, lambda text: sum(word in FLOURISHES for word in WORD.findall(text)))
    assert share - 0.5 > error
    share, error = share_of_wins(many_pairs, lambda text: len(WORD.findall(text)))
    assert share - 0.5 > error
    share, error = share_of_wins(many_pairs, lambda text: hashlib.sha256(text.encode()).digest())  # must fail: nobody likes a hash
    assert abs(share - 0.5) < error


# ------------------------------------------------------------------------------------------------------------------------------ files
def test_the_same_seed_writes_the_same_bytes_in_another_process(world, tmp_path):
    """In another process, with another order of Python's sets."""
    command = [sys.executable, str(ROOT / "data" / "toy.py"), f"--out_dir={tmp_path / 'again'}", *(f"--{k}={v}" for k, v in SMALL.items())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONHASHSEED": "1"}, timeout=120)
    assert done.returncode == 0, done.stderr
    files = sorted(str(path.relative_to(world)) for path in world.rglob("*") if path.is_file())
    assert len(files) == len(ROWS) + 2 + 4  # tables, meta and tokenizer, base/
    for file in files:
        assert (world / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads((world / "meta.json").read_text())


def test_another_seed_writes_other_rows_with_the_same_tokenizer(world, tables, tmp_path):
    toy.main(toy.Config(out_dir=str(tmp_path / "other"), **SMALL, seed=1))
    assert (tmp_path / "other" / "tokenizer.json").read_bytes() == (world / "tokenizer.json").read_bytes()
    for file, rows in tables.items():
        other = pq.read_table(tmp_path / "other" / f"{file}.parquet").to_pylist()
        assert not {row["query"] for row in rows} & {row["query"] for row in other}


def test_more_rows_begin_with_the_same_rows(tables):
    rows = toy.make_rows("sft_train", 80, toy.sft_row, 0, set())
    assert [row["reference_response"] for row in rows[:60]] == [row["reference_response"] for row in tables["sft_train"]]


def test_no_post_comes_twice(tables):
    queries = [row["query"] for rows in tables.values() for row in rows]
    assert len(set(queries)) == len(queries) == sum(ROWS.values())
    post = toy.make_rows("sft_train", 1, toy.sft_row, 0, set())[0]["query"]
    assert toy.make_rows("sft_train", 1, toy.sft_row, 0, {post})[0]["query"] != post  # a post that was seen is made anew


def test_columns_and_rows(world, tables):
    text, ids = pa.string(), pa.list_(pa.int32())
    common = {"id": text, "query": text, "query_token": ids, "facts": text}
    sft = {**common, "reference_response": text, "reference_response_token": ids}
    names = ("chosen", "rejected", "chosen_policy", "rejected_policy", "batch", "split")
    pairs = {**common, **dict.fromkeys(names, text), "chosen_token": ids, "rejected_token": ids, "confidence": pa.int32()}
    rankings = {**common, "responses": pa.list_(text), "responses_token": pa.list_(ids)}
    for file, rows in tables.items():
        schema = pq.read_schema(world / f"{file}.parquet")
        expected = sft if file.startswith("sft") else pairs if file.startswith("pairs") else rankings
        assert {name: schema.field(name).type for name in schema.names} == expected
        assert len(rows) == ROWS[file] and len({row["id"] for row in rows}) == len(rows)
    assert {row["split"] for row in tables["pairs_validation"]} == {"validation"}


def test_rows_hold_what_they_say(tables):
    for row in tables["pairs_train"] + tables["pairs_validation"]:
        assert row["chosen"] != row["rejected"] and {row["chosen_policy"], row["rejected_policy"]} <= set(WRITERS)
        gap = abs(gold_reward(json.loads(row["facts"]), row["chosen"], True) - gold_reward(json.loads(row["facts"]), row["rejected"], True))
        assert row["confidence"] == (1 if gap <= 0.1 else 2 if gap <= 0.25 else 3 if gap <= 0.5 else 4 if gap <= 1 else 5)
    for row in tables["rankings_train"]:
        assert len(set(row["responses"])) == len(row["responses"]) == toy.CANDIDATES
    first, last = ([utility(json.loads(row["facts"]), row["responses"][place]) for row in tables["rankings_train"]] for place in (0, -1))
    assert mean(first) > mean(last) + 0.2  # best first
    assert all(text.startswith(" ") for rows in tables.values() for row in rows for text, _ in own_tokens(row)[1:])


def test_meta(world, tables):
    meta = json.loads((world / "meta.json").read_text())
    assert (meta["world"], meta["response_tokens"], meta["splits"]) == ("toy", MOST_WORDS + 1, ROWS)
    assert meta["prompt_tokens"] == max(len(row["query_token"]) for rows in tables.values() for row in rows)
    assert meta["tokenizer"] == hashlib.sha256((world / "tokenizer.json").read_bytes()).hexdigest()
    references = [gold_reward(json.loads(row["facts"]), row["reference_response"], True) for row in tables["sft_train"]]
    assert meta["gold_reference"] == pytest.approx(mean(references))


def test_a_full_directory_is_refused(world, tmp_path, capsys):
    with pytest.raises(UserError, match="not empty.*--overwrite"):
        toy.main(toy.Config(out_dir=str(world), **SMALL))
    with pytest.raises(UserError, match="--pairs=0 must be at least 1"):
        toy.main(toy.Config(out_dir=str(tmp_path / "none"), **SMALL | {"pairs": 0}))
    assert not (tmp_path / "none").exists()


# -------------------------------------------------------------------------------------------------------------------------- tokenizer
def test_tokens_of_the_tables(world, tables):
    tokenizer = Tokenizer.from_file(str(world / "tokenizer.json"))
    vocabulary = json.loads((world / "base" / "config.json").read_text())["vocab_size"]
    assert vocabulary == tokenizer.get_vocab_size() <= 512  # no id that the tokenizer cannot decode
    for rows in tables.values():
        for row in rows:
            for place, (text, ids) in enumerate(own_tokens(row)):
                assert max(ids) < vocabulary
                assert (ids[-1] == 0) == (place > 0 or "responses" in row and text != row["query"])  # EOS ends responses and no prompt
                assert 0 not in ids[:-1] and 1 not in ids
                assert tokenizer.decode(ids) == text
                assert len(ids) <= (MOST_WORDS + 1 if text != row["query"] else 256 - MOST_WORDS - 1)
                assert tokenizer.encode(row["query"] + text).ids[len(row["query_token"]) :] == ids[:-1] or text == row["query"]


def test_every_word_of_a_summary_is_one_token(world):
    """So the cap on words is the cap on tokens, and naming a thing is one choice of the policy."""
    tokenizer = Tokenizer.from_file(str(world / "tokenizer.json"))
    rng = random.Random(7)
    texts = [write_summary(make_post(rng), writer, rng) for writer in WRITERS.values() for _ in range(100)]
    for text in texts + [f" {word}" for word in (*THINGS, *FLOURISHES)]:
        assert len(tokenizer.encode(text).ids) == len(WORD.findall(text))


@pytest.mark.parametrize("text", ["", " ", "Tabs\tand\n\nlines  ", "gr\u00fc\u00df \N{SNOWMAN}\N{GRINNING FACE}", "r/tifu", "\x00\x7f"])
def test_any_text_survives_the_tokenizer(world, text):
    tokenizer = Tokenizer.from_file(str(world / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_transformers_opens_base(world, tables):
    theirs = AutoTokenizer.from_pretrained(world / "base")
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.eos_token, theirs.pad_token) == (0, 1, "<|endoftext|>", "<|padding|>")
    for rows in tables.values():
        for row in rows:
            for text, ids in own_tokens(row):
                assert theirs(text)["input_ids"] == (ids if text == row["query"] else ids[:-1])
                assert theirs.decode(ids, skip_special_tokens=True) == text
    assert (world / "base" / "tokenizer.json").read_bytes() == (world / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("size, parameters", [("small", 0.2e6), ("medium", 0.7e6), ("large", 2e6)])
def test_base_sizes(tmp_path, size, parameters):
    toy.write_base(tmp_path, size, toy.train_tokenizer())
    config = AutoConfig.from_pretrained(tmp_path)
    width, layers, heads = toy.SIZES[size]
    assert config.model_type == "gpt_neox"
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (width, layers, heads)
    model = AutoModelForCausalLM.from_config(config)
    assert parameters / 2 < sum(p.numel() for p in model.parameters()) < parameters * 1.5
