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

from data import toy
from data.toy_world import (
    DAYS,
    DISORDERED,
    FLOURISHES,
    GLUE,
    LAPSE,
    LIKES_FLOURISH,
    LIKES_LENGTH,
    MOST_WORDS,
    MUTTERING,
    NOT_ENDED,
    PEOPLE,
    RAMBLING,
    REFERENCE_WRITER,
    REPEATED,
    TEMPERATURE,
    THINGS,
    WORD,
    WRITERS,
    WRONG,
    Writer,
    gold_counts,
    gold_parts,
    gold_reward,
    gold_rewards,
    make_post,
    preference,
    rank,
    utility,
    write_summary,
)
from rlhf.config import UserError

ROOT = Path(__file__).parents[1]
X, Y, Z, FREE = DAYS[:4]
A, B, C, OTHER = THINGS[:4]
FACTS = {"facts": {X: A, Y: B, Z: C}}
SMALL = {"posts": 60, "pairs": 40, "rankings": 20, "validation": 30, "test": 10, "size": "small"}
ROWS = {
    "sft_train": 60,
    "sft_validation": 30,
    "sft_test": 10,
    "pairs_train": 40,
    "pairs_validation": 30,
    "rankings_train": 20,
}
PERFECT = f" {X} {A} {Y} {B} {Z} {C}."


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
    """(post, chosen, rejected) of 12,000 pairs."""
    rng, out = random.Random("many pairs"), []
    for _ in range(12000):
        post = make_post(rng)
        row = toy.pair_row(post, rng)
        out.append((post, row["chosen"], row["rejected"]))
    return out


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def own_tokens(row: dict) -> list[tuple[str, list[int]]]:
    """(text, ids) of every text in a row."""
    out = [
        (row[key], row[f"{key}_token"])
        for key in ("query", "reference_response", "chosen", "rejected")
        if key in row
    ]
    return out + list(zip(row.get("responses", []), row.get("responses_token", [])))


# --- gold reward
@pytest.mark.parametrize("text, expected", [
    # covered
    (PERFECT, 1.0),
    (f" {X} {A} {Y} {B}.", 2 / 3),
    (f" {Y} {B}", 1 / 3),
    ("", 0.0),
    (" , and.", 0.0),
    # wrong
    (f"{PERFECT} {FREE} {OTHER}.", 1 - WRONG),  # a day without a fact
    (f" {X} {B} {Y} {B} {Z} {C}.", 2 / 3 - WRONG),  # the thing of another day
    (f" {X} {A} {B} {Z} {C}.", 2 / 3 - WRONG),  # no day
    (f" {OTHER} {A}", -2 * WRONG),
    # repeated
    (f" {X} {A} {Y} {B} {X} {A} {Z} {C}", 1 - REPEATED),
    (f" {X} {A} {X} {A} {X} {A}", 1 / 3 - 2 * REPEATED),
    # disordered: told after one that comes later
    (f" {Y} {B} {X} {A} {Z} {C}", 1 - DISORDERED),
    (f" {Z} {C} {X} {A} {Y} {B}", 1 - 2 * DISORDERED),
    (f" {Z} {C} {Y} {B} {X} {A}", 1 - 2 * DISORDERED),
    # rambling
    (f" really {X} {A} {Y} {B} {Z} {C}.", 1 - RAMBLING),
    (f" {X} really {A} {Y} {B} {Z} {C}.", 1 - RAMBLING),
    (f" {X} {A} {Y} {B} {Z} {C} not my day.", 1 - 3 * RAMBLING),
    (f" {X} {A},, {Y} {B} {Z} {C}.", 1 - RAMBLING),  # the same glue twice in one gap
    (f" {A}{B}{C}" + "x" * (17 - len(A + B + C)), -3 * RAMBLING),  # glued together: 17 letters
    (f"  {X} {A} {Y} {B} {Z} {C}", 1 - RAMBLING),  # a second space
    (f" {X} {A}\n{Y} {B}\n\n{Z} {C}", 1 - 3 * RAMBLING),
    # the word, and the day that has no thing
    (f" {X} {A} {Y} {B} {Z} {C.capitalize()}", 2 / 3 - 2 * RAMBLING),
    (f" {X} {A} {Y} {B} {Z} {C}\N{REPLACEMENT CHARACTER}", 1 - RAMBLING),  # what broken bytes are decoded to
    (f" {X} {X} {A} {FREE}", 1 / 3 - 2 * RAMBLING),  # days of which nothing is told
    # all at once: B and A told, A late, B again, OTHER wrong, "really" and "so"
    (f" really {Y} {B} {X} {A} so {Y} {B} {Z} {OTHER}", 2 / 3 - DISORDERED - REPEATED - WRONG - 2 * RAMBLING),
])  # fmt: skip
def test_gold_to_the_last_digit(text, expected):
    assert gold_reward(FACTS, text, ended=True) == pytest.approx(expected, abs=1e-12)
    assert gold_reward(FACTS, text, ended=False) == pytest.approx(expected - NOT_ENDED, abs=1e-12)


def test_counts_and_parts():
    text = f" really {Y} {B} {X} {A} so {Y} {B} {Z} {OTHER}"
    assert gold_counts(FACTS, text) == {
        "covered": 2,
        "wrong": 1,
        "repeated": 1,
        "disordered": 1,
        "rambling": 2,
    }
    assert gold_counts(FACTS, "") == dict.fromkeys(
        ("covered", "wrong", "repeated", "disordered", "rambling"), 0
    )
    parts = {"covered": 2 / 3, "wrong": -WRONG, "repeated": -REPEATED, "disordered": -DISORDERED}
    assert gold_parts(FACTS, text, False) == parts | {"rambling": -2 * RAMBLING, "not_ended": -NOT_ENDED}
    assert sum(gold_parts(FACTS, text, False).values()) == gold_reward(FACTS, text, False)


def test_the_docstring_states_the_coefficients():
    stated = dict(re.findall(r"\| (\w[\w ]*?) +\| - (0\.\d\d) +\|", gold_reward.__doc__))
    actual = {
        "wrong": WRONG,
        "repeated": REPEATED,
        "disordered": DISORDERED,
        "rambling": RAMBLING,
        "not ended": NOT_ENDED,
    }
    assert {name: float(value) for name, value in stated.items()} == actual


def test_a_list_of_rewards_is_the_rewards_one_by_one():
    other = {"facts": {X: OTHER, Y: A}}
    assert gold_rewards([FACTS, other], [PERFECT, f" {Y} {A}"], [True, False]) == [1.0, 1 / 2 - NOT_ENDED]
    with pytest.raises(ValueError):
        gold_rewards([FACTS, other], [PERFECT], [True, False])


def test_gold_does_not_care_for_style():
    for joint in (" ", ", ", " and ", ", and "):
        for end in ("", ".", " "):
            assert (
                gold_reward(FACTS, " " + joint.join((f"{X} {A}", f"{Y} {B}", f"{Z} {C}")) + end, ended=True)
                == 1.0
            )


def test_every_fault_costs_and_every_fact_pays():
    """On 300 posts and drafts of all qualities: what is added to a summary moves the gold reward by exactly
    its own term."""
    rng = random.Random(0)
    for _ in range(300):
        post = make_post(rng)
        text = write_summary(post, WRITERS[rng.choice(list(WRITERS))], rng).rstrip(".")
        start, counts = gold_reward(post.hidden, text, True), gold_counts(post.hidden, text)
        words = WORD.findall(text)
        told = {day for day, thing in zip(words, words[1:]) if post.facts.get(day) == thing}
        assert len(told) == counts["covered"] and start <= 1.0
        free = next(day for day in DAYS if day not in post.facts)
        for added, change in [
            (f"{free} {A}", -WRONG),
            (f"{PEOPLE[0]} {A}", -WRONG - RAMBLING),
            (A, -WRONG),
            ("qqqq", -RAMBLING),
            ("q" * 9, -2 * RAMBLING),
        ]:
            assert gold_reward(post.hidden, f"{text} {added}", True) - start == pytest.approx(
                change, abs=1e-12
            )
        order = list(post.facts)
        latest = max((order.index(day) for day in told), default=-1)
        for index, (day, thing) in enumerate(post.facts.items()):
            change = -REPEATED if day in told else 1 / len(order) - DISORDERED * (index < latest)
            assert gold_reward(post.hidden, f"{text} {day} {thing}", True) - start == pytest.approx(
                change, abs=1e-12
            )


def test_a_post_is_best_summarised_by_its_facts_in_order():
    rng = random.Random(1)
    for _ in range(30):
        post = make_post(rng)
        rewards = {}
        for order in permutations(post.facts):
            text = " " + " ".join(f"{day} {post.facts[day]}" for day in order) + "."
            rewards[order] = gold_reward(post.hidden, text, True)
        assert rewards.pop(tuple(post.facts)) == 1.0
        assert max(rewards.values()) == pytest.approx(1 - DISORDERED, abs=1e-12)


def test_garbage_is_clearly_negative():
    assert gold_reward(FACTS, " " + " ".join(THINGS), ended=False) == pytest.approx(
        -len(THINGS) * WRONG - NOT_ENDED
    )
    assert gold_reward(FACTS, " really" * 32, ended=False) == pytest.approx(-32 * RAMBLING - NOT_ENDED)
    assert -len(THINGS) * WRONG < -1 and -32 * RAMBLING < -1


def test_gold_is_fast():
    rng = random.Random(2)
    posts = [make_post(rng) for _ in range(2000)]
    texts = [write_summary(post, REFERENCE_WRITER, rng) for post in posts]
    began = time.process_time()
    gold_rewards([post.hidden for post in posts], texts, [True] * len(posts))
    assert time.process_time() - began < 0.2  # 10,000 a second


# --- posts and writers
def test_posts_tell_their_facts_and_a_distraction():
    rng, places = random.Random(3), set()
    for _ in range(300):
        post = make_post(rng)
        told = post.query.split("POST: ")[1].removesuffix("\n\nTL;DR:").split(" ")
        pairs = list(zip(told[::2], told[1::2]))
        assert [pair for pair in pairs if pair[0] in DAYS] == list(post.facts.items())
        assert [pair for pair in pairs if pair[0] in PEOPLE] == post.others
        assert list(post.facts) == sorted(post.facts, key=DAYS.index)
        things = [thing for _, thing in pairs]
        assert len(set(things)) == len(things) < len(THINGS)  # a thing can be invented
        places.add((pairs[0][0] in DAYS, pairs[-1][0] in DAYS))
        assert re.fullmatch(r"SUBREDDIT: r/\w+\n\nTITLE: .+\n\nPOST: .+\n\nTL;DR:", post.query)
    assert len(places) == 3  # the distraction comes first, last or between


def test_word_classes_do_not_overlap():
    mutter = {word for text in MUTTERING for word in text.split()}
    classes = [set(THINGS), set(DAYS), set(PEOPLE), set(GLUE), set(FLOURISHES), mutter]
    assert sum(map(len, classes)) == len(set().union(*classes))


NOTHING = {name: 0.0 for name in Writer.__dataclass_fields__}


@pytest.mark.parametrize(
    "fault, count",
    [
        ("mix", "wrong"),
        ("invent", "wrong"),
        ("add", "wrong"),
        ("repeat", "repeated"),
        ("mutter", "rambling"),
        ("flourish", "rambling"),
        ("miss", "covered"),
    ],
)
def test_each_fault_of_a_writer_shows_in_its_own_count(fault, count):
    rng = random.Random(fault)
    posts = [make_post(rng) for _ in range(100)]
    faultless = Writer(**NOTHING | {"most": 7})
    assert all(gold_reward(post.hidden, write_summary(post, faultless, rng), True) == 1.0 for post in posts)
    totals = {True: 0, False: 0}  # of the count that should move, of the others
    for post in posts:
        counts = gold_counts(
            post.hidden, write_summary(post, Writer(**NOTHING | {"most": 7, fault: 0.5}), rng)
        )
        for name, value in counts.items():
            totals[name == count] += len(post.facts) - value if name == "covered" else value
    # a wrong thing is also a fact missed; a repeated one stands where it stands: behind the last
    assert totals[True] > 30 and (totals[False] == 0 or fault in ("mix", "invent"))


def test_references_are_fallible_and_writers_differ():
    rng = random.Random(4)
    posts = [make_post(rng) for _ in range(1500)]
    gold = {
        name: mean(gold_reward(post.hidden, write_summary(post, writer, rng), True) for post in posts)
        for name, writer in WRITERS.items()
    }
    assert 0.4 < gold["reference"] < 0.7  # good enough to learn from, far enough from 1 to be bettered
    assert max(gold, key=gold.get) == "concise" and min(gold, key=gold.get) == "inventive"
    assert gold["concise"] - gold["reference"] > 0.2


def test_the_faults_of_references_are_habits():
    """What most references do a greedy summary does too, so lowering the temperature does not better it."""
    rng = random.Random(8)
    posts = [post for post in (make_post(rng) for _ in range(1000)) if len(post.facts) > 3]
    texts = [write_summary(post, REFERENCE_WRITER, rng) for post in posts]
    counts = [gold_counts(post.hidden, text) for post, text in zip(posts, texts)]
    assert mean(count["covered"] < len(post.facts) for post, count in zip(posts, counts)) > 0.6
    assert mean("sorry" in text for text in texts) > 0.5
    assert mean(count["wrong"] == 0 for count in counts) > 0.8  # and these are not


def test_summaries_keep_to_the_cap():
    rng = random.Random(5)
    lengths = [
        len(WORD.findall(write_summary(make_post(rng), writer, rng)))
        for writer in WRITERS.values()
        for _ in range(300)
    ]
    assert max(lengths) <= MOST_WORDS and min(lengths) >= 2


# --- people who compare
def test_utility_is_gold_and_a_liking_for_flourish_and_length():
    # 9 words with the full stop, two flourishes
    text = f" {FLOURISHES[0]} {X} {A} {Y} {B} {FLOURISHES[1]} {Z} {C}."
    assert utility(FACTS, text) == pytest.approx(
        1 - 2 * RAMBLING + 2 * LIKES_FLOURISH + 9 * LIKES_LENGTH, abs=1e-12
    )


def plackett_luce(utilities: list[float], order: tuple[int, ...]) -> float:
    """P(order), written out: each place is a lapse or a softmax over who is left."""
    probability = 1.0
    for place, chosen in enumerate(order):
        left = order[place:]
        softmax = math.exp(utilities[chosen] / TEMPERATURE) / sum(
            math.exp(utilities[i] / TEMPERATURE) for i in left
        )
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
        assert preference(*pair) == pytest.approx(plackett_luce(pair, (0, 1)), abs=1e-12)
    assert sorted(rank([1e6, -1e6, 0.0, 0.0], random.Random(0))) == [0, 1, 2, 3]  # no overflow


def agreement(many_pairs, lapse: float, temperature: float) -> tuple[float, float, float]:
    """Share of pairs in which the people took the summary of the higher utility; the share that the model
    predicts; its standard error."""
    differences = [
        utility(post.hidden, chosen) - utility(post.hidden, rejected) for post, chosen, rejected in many_pairs
    ]
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
    alike = [
        (measure(chosen), measure(rejected))
        for post, chosen, rejected in many_pairs
        if abs(gold_reward(post.hidden, chosen, True) - gold_reward(post.hidden, rejected, True)) < 0.1
    ]
    wins = [chosen > rejected for chosen, rejected in alike if chosen != rejected]
    return mean(wins), 2 / math.sqrt(len(wins))


def test_people_like_flourish_and_length(many_pairs):
    """For no good reason: at the same gold reward."""
    share, error = share_of_wins(
        many_pairs, lambda text: sum(word in FLOURISHES for word in WORD.findall(text))
    )
    assert share - 0.5 > error
    share, error = share_of_wins(many_pairs, lambda text: len(WORD.findall(text)))
    assert share - 0.5 > error
    share, error = share_of_wins(
        many_pairs, lambda text: hashlib.sha256(text.encode()).digest()
    )  # must fail: nobody likes a hash
    assert abs(share - 0.5) < error


# --- files
def test_the_same_seed_writes_the_same_bytes_in_another_process(world, tmp_path):
    """In another process, with another order of Python's sets."""
    command = [
        sys.executable,
        str(ROOT / "data" / "toy.py"),
        f"--out_dir={tmp_path / 'again'}",
        *(f"--{k}={v}" for k, v in SMALL.items()),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONHASHSEED": "1"},
        timeout=120,
    )
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
    assert [row["reference_response"] for row in rows[:60]] == [
        row["reference_response"] for row in tables["sft_train"]
    ]


def test_no_post_comes_twice(tables):
    queries = [row["query"] for rows in tables.values() for row in rows]
    assert len(set(queries)) == len(queries) == sum(ROWS.values())
    post = toy.make_rows("sft_train", 1, toy.sft_row, 0, set())[0]["query"]
    assert (
        toy.make_rows("sft_train", 1, toy.sft_row, 0, {post})[0]["query"] != post
    )  # a post that was seen is made anew


def test_columns_and_rows(world, tables):
    text, ids = pa.string(), pa.list_(pa.int32())
    common = {"id": text, "query": text, "query_token": ids, "facts": text}
    parts = pa.struct([(name, pa.float64()) for name in gold_parts(FACTS, "", True)])
    sft = {**common, "reference_response": text, "reference_response_token": ids, "reference_parts": parts}
    names = ("chosen", "rejected", "chosen_policy", "rejected_policy", "batch", "split")
    pairs = {
        **common,
        **dict.fromkeys(names, text),
        "chosen_token": ids,
        "rejected_token": ids,
        "confidence": pa.int32(),
    }
    pairs |= {"preference": pa.float64(), "chosen_parts": parts, "rejected_parts": parts}
    numbers = pa.list_(pa.float64())
    rankings = {**common, "responses": pa.list_(text), "responses_token": pa.list_(ids)}
    rankings |= {"rewards": numbers, "utilities": numbers}
    for file, rows in tables.items():
        schema = pq.read_schema(world / f"{file}.parquet")
        expected = sft if file.startswith("sft") else pairs if file.startswith("pairs") else rankings
        assert {name: schema.field(name).type for name in schema.names} == expected
        assert len(rows) == ROWS[file] and len({row["id"] for row in rows}) == len(rows)
    assert {row["split"] for row in tables["pairs_validation"]} == {"validation"}


def test_rows_hold_what_they_say(tables):
    for row in tables["pairs_train"] + tables["pairs_validation"]:
        assert row["chosen"] != row["rejected"] and {row["chosen_policy"], row["rejected_policy"]} <= set(
            WRITERS
        )
        gap = abs(
            gold_reward(json.loads(row["facts"]), row["chosen"], True)
            - gold_reward(json.loads(row["facts"]), row["rejected"], True)
        )
        facts = json.loads(row["facts"])
        liked = [utility(facts, row[side]) for side in ("chosen", "rejected")]
        assert row["preference"] == pytest.approx(preference(*liked), abs=1e-12)
        for side in ("chosen", "rejected"):
            assert row[f"{side}_parts"] == pytest.approx(gold_parts(facts, row[side], True), abs=1e-12)
        assert row["confidence"] == (
            1 if gap <= 0.1 else 2 if gap <= 0.25 else 3 if gap <= 0.5 else 4 if gap <= 1 else 5
        )
    for row in tables["rankings_train"]:
        assert len(set(row["responses"])) == len(row["responses"]) == toy.CANDIDATES
        facts = json.loads(row["facts"])
        assert row["rewards"] == pytest.approx(
            [gold_reward(facts, text, True) for text in row["responses"]], abs=1e-12
        )
        assert row["utilities"] == pytest.approx(
            [utility(facts, text) for text in row["responses"]], abs=1e-12
        )
    first, last = (
        [utility(json.loads(row["facts"]), row["responses"][place]) for row in tables["rankings_train"]]
        for place in (0, -1)
    )
    assert mean(first) > mean(last) + 0.2  # best first
    assert all(
        text.startswith(" ") for rows in tables.values() for row in rows for text, _ in own_tokens(row)[1:]
    )


def test_meta(world, tables):
    meta = json.loads((world / "meta.json").read_text())
    assert (meta["world"], meta["response_tokens"], meta["splits"]) == ("toy", MOST_WORDS + 1, ROWS)
    assert meta["prompt_tokens"] == max(len(row["query_token"]) for rows in tables.values() for row in rows)
    assert meta["tokenizer"] == hashlib.sha256((world / "tokenizer.json").read_bytes()).hexdigest()
    references = [
        gold_reward(json.loads(row["facts"]), row["reference_response"], True) for row in tables["sft_train"]
    ]
    assert meta["gold_reference"] == pytest.approx(mean(references))


def test_check_prints_the_labels_bayes_accuracy_and_each_writers_faults(capsys):
    toy.main(toy.Config(check=True))
    printed = capsys.readouterr().out
    numbers = json.loads(printed.splitlines()[-1])
    assert (
        0.80 <= numbers["label_bayes_accuracy"] <= 0.88
    )  # noise enough to matter, signal enough to be learnt
    assert set(numbers["writers"]) == set(WRITERS)
    for name, faults in numbers["writers"].items():
        assert faults["gold"] == pytest.approx(sum(faults["cost"].values())) and name in printed
    assert numbers["writers"]["inventive"]["wrong"] > 3 * numbers["writers"]["careful"]["wrong"]
    with pytest.raises(UserError, match="--out_dir is missing"):
        toy.main(toy.Config())


def test_a_full_directory_is_refused(world, tmp_path, capsys):
    with pytest.raises(UserError, match="not empty.*--overwrite"):
        toy.main(toy.Config(out_dir=str(world), **SMALL))
    with pytest.raises(UserError, match="--pairs=0 must be at least 1"):
        toy.main(toy.Config(out_dir=str(tmp_path / "none"), **SMALL | {"pairs": 0}))
    assert not (tmp_path / "none").exists()


# --- tokenizer
def test_tokens_of_the_tables(world, tables):
    tokenizer = Tokenizer.from_file(str(world / "tokenizer.json"))
    vocabulary = json.loads((world / "base" / "config.json").read_text())["vocab_size"]
    assert vocabulary == tokenizer.get_vocab_size() <= 512  # no id that the tokenizer cannot decode
    for rows in tables.values():
        for row in rows:
            for place, (text, ids) in enumerate(own_tokens(row)):
                assert max(ids) < vocabulary
                assert (ids[-1] == 0) == (
                    place > 0 or "responses" in row and text != row["query"]
                )  # EOS ends responses and no prompt
                assert 0 not in ids[:-1] and 1 not in ids
                assert tokenizer.decode(ids) == text
                assert len(ids) <= (MOST_WORDS + 1 if text != row["query"] else 256 - MOST_WORDS - 1)
                assert (
                    tokenizer.encode(row["query"] + text).ids[len(row["query_token"]) :] == ids[:-1]
                    or text == row["query"]
                )


def test_every_word_of_a_summary_is_one_token(world):
    """So the cap on words is the cap on tokens, and naming a thing is one choice of the policy."""
    tokenizer = Tokenizer.from_file(str(world / "tokenizer.json"))
    rng = random.Random(7)
    texts = [write_summary(make_post(rng), writer, rng) for writer in WRITERS.values() for _ in range(100)]
    for text in texts + [f" {word}" for word in (*THINGS, *DAYS, *FLOURISHES)]:
        assert len(tokenizer.encode(text).ids) == len(WORD.findall(text))


@pytest.mark.parametrize(
    "text",
    ["", " ", "Tabs\tand\n\nlines  ", "gr\u00fc\u00df \N{SNOWMAN}\N{GRINNING FACE}", "r/tifu", "\x00\x7f"],
)
def test_any_text_survives_the_tokenizer(world, text):
    tokenizer = Tokenizer.from_file(str(world / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_transformers_opens_base(world, tables):
    theirs = AutoTokenizer.from_pretrained(world / "base")
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.eos_token, theirs.pad_token) == (
        0,
        1,
        "<|endoftext|>",
        "<|padding|>",
    )
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
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (
        width,
        layers,
        heads,
    )
    model = AutoModelForCausalLM.from_config(config)
    assert parameters / 2 < sum(p.numel() for p in model.parameters()) < parameters * 1.5
