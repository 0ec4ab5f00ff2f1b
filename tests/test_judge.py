"""Judges: one signature; what an answer says; what a faulty server, a kill, a limit cannot do. All against a
server on 127.0.0.1."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from judge_server import JudgeServer, sections

import evaluation.llm_judge
from evaluation.judges import JUDGES, Post, Summary, agreement, gold_judge, make_judge, parse_judges
from evaluation.llm_answers import AnswerCache, Budget, fill, parse_verdict, read_template
from evaluation.llm_judge import LLMJudge, retry_after
from evaluation.statistics import position_bias, win_rate
from rlhf.config import RunError, UserError

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
NO_OPENAI = "openai is not installed (requirements-judge.txt): the language-model judge is not tested"
pytest.importorskip("openai", reason=NO_OPENAI)
KEY = "sk-never-to-be-seen-0123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(evaluation.llm_judge, "FIRST_WAIT", 0.02)


def options(url: str, cache: Path, **changes) -> dict:
    defaults = {
        "judge_model": "tiny", "judge_url": url, "judge_template": "", "judge_order": "both",
        "judge_cache": str(cache), "judge_concurrency": 4, "judge_timeout": 0.8, "judge_max_tokens": 50,
        "judge_max_requests": 0, "judge_max_cost": 5.0, "judge_price_in": -1.0, "judge_price_out": -1.0,
        "seed": 1,
    }
    return {**defaults, **changes}


def llm_judge(server: JudgeServer, cache: Path, **changes) -> LLMJudge:
    return make_judge("llm", **options(server.url, cache, **changes))


def text(rng: random.Random) -> str:
    return " " + " ".join("".join(rng.choices("abcdefgh", k=4)) for _ in range(5)) + "."


def pairs(n: int, seed: int = 0) -> tuple[list[Post], list[Summary], list[Summary]]:
    rng = random.Random(seed)
    queries = [f"SUBREDDIT: r/x\n\nTITLE: t{i}\n\nPOST: p{i}\n\nTL;DR:" for i in range(n)]
    posts = [Post(str(i), query, [1, 2, 3], None) for i, query in enumerate(queries)]
    summaries = [Summary(text(rng), [5] * rng.randint(3, 9) + [0], True) for _ in range(2 * n)]
    return posts, summaries[:n], summaries[n:]


def expected(a: list[Summary], b: list[Summary]) -> list[float]:
    """What the server's alphabetic judge must come to."""
    return [float(x.text.strip() < y.text.strip()) for x, y in zip(a, b)]


# --- what an answer says


SAYS_A = ["A", "A.", '"A"', "**A**", "(A)", "[[A]]", "'A'.", "“A”", "`A`", "<A>", "<\"A\">", " A\t"]
SAYS_NOTHING = [
    "", "A or B", "AB", "A\nB", "I cannot compare these.", "Comparison: A is better.", "Preferred:",
    "Preferred: a", "Preferred: C", "Preferred: neither", "Preferred: <\"A\" or \"B\">",
    "Preferred: A because it is short", "Preferred: A\nPreferred: B", "Preferred: Summary",
    "Preferred: the summary", "Preferred: SummaryA", "Preferred: Summary A is short",
    "Preferred: Summary A\nPreferred: Summary B",
]


@pytest.mark.parametrize("said", SAYS_A)
def test_an_answer_that_is_a_is_read_as_a(said):
    answers = [
        said,
        f"Summary {said}",
        f"Preferred: Summary {said}",
        f"**Preferred: summary** {said}",
        f"Comparison: B is long.\nPreferred: {said}",
        f"Comparison: x.\n\n**Preferred:** {said}\n",
        f"Preferred:\n{said}\n",
        f"preferred : {said}",
    ]
    for answer in answers:
        assert parse_verdict(answer) == "A", answer
        assert parse_verdict(answer.replace("A", "B")) == "B", answer


@pytest.mark.parametrize("answer", SAYS_NOTHING)
def test_anything_else_is_unread_and_never_a_loss(answer):
    assert parse_verdict(answer) is None
    assert math.isnan(LLMJudge.preference([(answer, True)]))
    assert math.isnan(LLMJudge.preference([(answer, True), ("Preferred: B", False)]))


def test_ties_and_both_orders():
    assert parse_verdict("Preferred: Tie.") == "tie"
    assert LLMJudge.preference([("Preferred: A", True), ("Preferred: B", False)]) == 1.0  # A both times
    assert LLMJudge.preference([("Preferred: A", True), ("Preferred: A", False)]) == 0.5  # always the first
    assert LLMJudge.preference([("Preferred: tie", True), ("Preferred: B", False)]) == 0.75
    assert LLMJudge.preference([]) == 0.5


def test_template_is_filled_in_one_pass_and_can_be_replaced(tmp_path):
    system, user = read_template("")
    assert system == "You are a helpful assistant."
    assert "accuracy, coverage, and coherence" in user
    filled = fill("{{post}}|{{summary_a}}|{{summary_b}}", "{{summary_a}}", "\\1 {{post}}", "b")
    assert filled == "{{summary_a}}|\\1 {{post}}|b"
    own = tmp_path / "own.txt"
    own.write_text("Which is shorter?\n{{post}}\nONE {{summary_a}} TWO {{summary_b}} END")
    assert read_template(str(own))[0] == ""
    posts, a, b = pairs(3)

    def answer(prompt: str) -> str:
        return "B" if prompt.startswith("Which is shorter?") and " END" in prompt else "?"

    with JudgeServer(answer=answer) as server:
        assert llm_judge(server, tmp_path / "c", judge_template=str(own))(posts, a, b) == [0.5] * 3
        assert all(len(body["messages"]) == 1 and body["temperature"] == 0 for body in server.bodies)
    own.write_text("{{post}} {{summary_a}}")
    with pytest.raises(UserError, match="summary_b"):
        read_template(str(own))
    with pytest.raises(UserError, match="no-such-file"):
        read_template("no-such-file")


# --- one signature


def test_every_judge_maps_a_swap_to_one_minus_p_and_equals_to_a_half(tmp_path):
    posts, a, b = pairs(30)
    posts = [Post(p.id, p.query, p.query_token, '{"facts": ["keys"]}') for p in posts]
    a[0] = Summary(" keys.", [4, 5, 0], True)
    pq.write_table(pa.table({"facts": [posts[0].facts]}), tmp_path / "sft_train.parquet")
    gold = gold_judge(data_dir=str(tmp_path))
    with JudgeServer() as server:
        both = llm_judge(server, tmp_path / "c", judge_order="both")
        assert_symmetric(both, posts, a, b)
        coin = llm_judge(server, tmp_path / "c", judge_order="random")  # reads the answers that `both` got
        for judge in (coin, gold):
            assert_symmetric(judge, posts, a, b)
        assert both(posts, a, b) == coin(posts, a, b) == expected(a, b)
        first_won = [d["verdicts"][0] == "A" for d in coin.details(posts, a, b)]
        a_first = [won == bool(e) for won, e in zip(first_won, expected(a, b))]
        assert 5 < sum(a_first) < 25
        asked = [sections(body["messages"][-1]["content"]) for body in server.bodies]
        assert len(asked) == 60  # the coin's questions were among those of both
        assert not any(x == y for x, y in asked)  # equals are not asked about


def assert_symmetric(judge, posts: list[Post], a: list[Summary], b: list[Summary]) -> None:
    p = judge(posts, a, b)
    q = judge(posts, b, a)
    assert p == [1 - x for x in q]
    assert 0 < sum(p) < len(posts)
    assert judge(posts, a, a) == [0.5] * len(posts)
    assert win_rate(p)["win_rate"] == pytest.approx(1 - win_rate(q)["win_rate"])


def test_a_fork_adds_a_judge_in_one_place(monkeypatch):
    def shorter(seed: int):
        return lambda posts, a, b: [float(len(x.text) < len(y.text)) for x, y in zip(a, b)]

    monkeypatch.setitem(JUDGES, "short", shorter)
    assert parse_judges("gold,short") == ["gold", "short"]
    assert parse_judges("none") == []
    short = Summary("x", [1], True)
    long = Summary("xx", [1, 2], True)
    judge = make_judge("short", seed=3, judge_model="not asked for")
    assert judge([Post("1", "q", [1], None)], [short], [long]) == [1.0]
    for bad in ("gold,gold", "nobody"):
        with pytest.raises(UserError, match="judge"):
            parse_judges(bad)


def test_agreement_with_people_is_compared_with_a_ruler():
    posts, chosen, rejected = pairs(200)

    def longer(u: Summary, v: Summary) -> float:
        return 0.5 if len(u.tokens) == len(v.tokens) else float(len(u.tokens) > len(v.tokens))

    right = agreement(lambda p, x, y: [1.0] * len(p), posts, chosen, rejected)
    assert right["agreement"] == 1
    assert right["beats_length"]
    assert right["over_longer"] == pytest.approx(1 - right["longer_wins"])
    ruler = agreement(lambda p, x, y: list(map(longer, x, y)), posts, chosen, rejected)
    assert ruler["agreement"] == ruler["longer_wins"]
    assert ruler["beats_length"] is False
    assert right["longer_by"] == ruler["longer_by"] == "tokens"
    half = agreement(lambda p, x, y: [math.nan, 1.0] * 100, posts, chosen, rejected)
    assert (half["pairs"], half["unjudged"]) == (100, 100)


def test_the_ruler_is_the_better_of_tokens_and_characters():
    """People took the text with more characters, and by tokens it is a coin: a judge that counts characters
    is a ruler, and so is one that counts tokens."""
    posts = pairs(200)[0]
    chosen = [Summary("x" * 9, [5] * (3 + i % 2) + [0], True) for i in range(200)]
    rejected = [Summary("x" * 8, [5] * (4 - i % 2) + [0], True) for i in range(200)]

    def measured(size, a=chosen, b=rejected):
        return agreement(lambda p, x, y: [float(size(u) > size(v)) for u, v in zip(x, y)], posts, a, b)

    by_characters = measured(lambda s: len(s.text))
    assert by_characters["agreement"] == by_characters["longer_wins"] == 1
    assert by_characters["longer_by"] == "characters"
    assert by_characters["over_longer"] == 0
    assert by_characters["beats_length"] is False
    by_tokens = measured(lambda s: len(s.tokens))
    assert (by_tokens["agreement"], by_tokens["longer_wins"]) == (0.5, 1.0)
    assert by_tokens["beats_length"] is False
    long = [Summary("x", [5] * 3, True)] * 200
    short = [Summary("x", [5] * 2, True)] * 200
    assert measured(lambda s: len(s.tokens), long, short)["longer_by"] == "tokens"
    assert measured(lambda s: 1, short, long)["longer_wins"] == 0.5  # by characters, which are equally many


def test_a_local_server_may_come_back_on_another_port(tmp_path):
    """Answers are found again by what was asked. On this machine the port of a server is chance, elsewhere
    another port is another server."""
    posts, a, b = pairs(4)
    with JudgeServer() as server:
        llm_judge(server, tmp_path / "c")(posts, a, b)
    with JudgeServer() as other:
        assert other.url != server.url
        assert llm_judge(other, tmp_path / "c")(posts, a, b) == expected(a, b)
        assert not other.requests

    def key(url: str) -> str:
        judge = make_judge("llm", **options(url, tmp_path / "d", judge_model="gpt-4o-mini"))
        return judge.key_of({"model": "gpt-4o-mini"})

    for host in ("localhost", "127.0.0.1", "[::1]"):
        assert key(f"http://{host}:8000/v1") == key(f"http://{host}:9000/v1") == key(f"http://{host}/v1")
        assert key(f"http://{host}:8000/v1") != key(f"http://{host}:8000/v2")
    far = {key(f"https://judge.example{port}/v1") for port in (":8000", ":9000", "")}
    assert len(far) == 3


# --- a server that fails

FAULTS = ["429", "500", "slow", "cut", "drop", "garbage"]


def test_whatever_the_server_does_every_pair_is_judged_once(tmp_path, capsys):
    """Every question meets one or two faults of all kinds before its answer."""
    posts, a, b = pairs(24)
    kinds = {}

    def fault(prompt, attempt):
        rng = random.Random(prompt)
        kinds.setdefault(prompt, rng.choices(FAULTS, weights=[4, 4, 1, 4, 4, 4], k=rng.randint(1, 2)))
        return kinds[prompt][attempt] if attempt < len(kinds[prompt]) else None

    with JudgeServer(fault=fault) as server:
        judge = llm_judge(server, tmp_path / "cache.jsonl", judge_concurrency=8)
        assert judge(posts, a, b) == expected(a, b)
        assert set(server.answered.values()) == {1}
        assert len(server.answered) == 48
        happened = Counter(kind for several in kinds.values() for kind in several)
        assert set(happened) == set(FAULTS)
        for prompt, several in kinds.items():  # not one request more than the faults made necessary
            assert server.requests[prompt] == len(several) + 1
        # a slow one is still busy when the client has gone
        assert 1 < server.most_busy <= 8 + happened["slow"]
        # the client may try a connection that was closed once more in vain
        closing = happened["cut"] + happened["drop"]
        before = sum(server.requests.values())
        assert 0 <= judge.budget.requests - before <= closing
        again = llm_judge(server, tmp_path / "cache.jsonl")
        assert again(posts, a, b) == expected(a, b)
        assert again.details(posts, a, b) == judge.details(posts, a, b)
        assert sum(server.requests.values()) == before  # a repeated run costs nothing
        assert again.budget.requests == 0
    assert len((tmp_path / "cache.jsonl").read_text().splitlines()) == 48


def test_retry_after_is_kept_by_all_threads(tmp_path):
    posts, a, b = pairs(12)

    def sixth(prompt: str, attempt: int) -> str | None:
        return "429" if len(server.log) == 5 else None

    with JudgeServer(fault=sixth, retry_after="0.6", delay=0.02) as server:
        assert llm_judge(server, tmp_path / "c", judge_concurrency=2)(posts, a, b) == expected(a, b)
        times = sorted(t for t, _, _ in server.log)
        limited = next(t for t, _, kind in server.log if kind == "429")
        assert not [t for t in times if limited + 0.15 < t < limited + 0.55]
        assert max(times) > limited + 0.55
    assert retry_after({"retry-after": "Wed, 21 Oct 2065 07:28:00 GMT"}) > 1e9
    assert retry_after({"retry-after": "soon"}) is None


def test_a_refusal_is_unread_kept_and_not_asked_again(tmp_path):
    posts, a, b = pairs(6)

    def refuses(prompt: str, attempt: int) -> str | None:
        if "p2" in prompt:
            return "refusal"
        return "filtered" if "p4" in prompt else None

    with JudgeServer(fault=refuses) as server:
        for _ in range(2):
            judge = llm_judge(server, tmp_path / "c")
            p = judge(posts, a, b)
            assert [math.isnan(x) for x in p] == [i in (2, 4) for i in range(6)]
            rate = win_rate(p)
            assert (rate["judged"], rate["unjudged"]) == (4, 2)
            bias = position_bias([d["verdicts"] for d in judge.details(posts, a, b)])
            assert (bias["answers"], bias["unread"]) == (12, 4)
            assert (bias["first_share"], bias["consistent"]) == (0.5, 1.0)
        assert set(server.requests.values()) == {1}


def test_a_server_that_stays_down_ends_the_run_and_loses_nothing(tmp_path):
    posts, a, b = pairs(10)
    with JudgeServer(fault=lambda prompt, attempt: "500" if "p7" in prompt else None) as server:
        with pytest.raises(RunError, match="no answer after 8 tries.*InternalServerError"):
            llm_judge(server, tmp_path / "c", judge_concurrency=1)(posts, a, b)
        assert len(server.answered) == 14
        server.fault = lambda prompt, attempt: None
        assert llm_judge(server, tmp_path / "c")(posts, a, b) == expected(a, b)
        assert set(server.answered.values()) == {1}
        server.fault = lambda prompt, attempt: "quota"
        with pytest.raises(RunError, match="quota"):
            llm_judge(server, tmp_path / "other")(posts, a, b)
        server.fault = lambda prompt, attempt: 404
        with pytest.raises(UserError, match="NotFoundError"):
            llm_judge(server, tmp_path / "other")(posts, a, b)


WORKER = """
import json, sys
sys.path[:0] = [{root!r}, {tests!r}]
from types import SimpleNamespace
from evaluation.llm_judge import LLMJudge
options, pairs = json.load(open(sys.argv[1]))
posts, a, b = ([SimpleNamespace(query=t, text=t) for t in side] for side in pairs)
print(json.dumps(LLMJudge(**options)(posts, a, b)))
"""


def test_killed_at_any_point_and_resumed(tmp_path):
    """kill -9 at three moments; a request that was under way at that moment may be asked again (at most one
    per thread), nothing else is."""
    posts, a, b = pairs(80)
    task = tmp_path / "task.json"
    texts = [[p.query for p in posts], [s.text for s in a], [s.text for s in b]]
    with JudgeServer(delay=0.02) as server:
        task.write_text(json.dumps([options(server.url, tmp_path / "cache.jsonl"), texts]))
        worker = WORKER.format(root=str(ROOT), tests=str(ROOT / "tests"))
        command = [sys.executable, "-c", worker, str(task)]
        for kill in range(1, 4):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while sum(server.answered.values()) < 33 * kill and process.poll() is None:
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        last = subprocess.run(command, capture_output=True, text=True, check=True)
        assert json.loads(last.stdout.splitlines()[-1]) == expected(a, b)
        assert len(server.answered) == 160
        assert sum(server.requests.values()) <= 160 + 3 * 4
        assert KEY not in last.stdout + last.stderr


def test_a_line_cut_off_by_a_kill_is_passed_over(tmp_path):
    path = tmp_path / "c.jsonl"
    cache = AnswerCache(str(path))
    for i in range(3):
        cache.put(f"k{i}", {"answer": f"é{i}", "finish": "stop", "tokens": [1, 2]})
    whole = path.read_bytes()
    for cut in (1, 5, len(whole.splitlines()[-1])):
        path.write_bytes(whole[:-cut])
        again = AnswerCache(str(path))
        assert "k1" in again
        assert ("k2" in again) == (cut == 1)
        again.put("k3", {"answer": "x", "finish": "stop", "tokens": [1, 2]})
        written = AnswerCache(str(path))
        assert written["k3"]["answer"] == "x"
        assert written["k1"]["answer"] == "é1"
    with pytest.raises(UserError, match="judge_cache"):
        AnswerCache(str(tmp_path))


# --- money and keys


def test_limits_hold_before_and_during_a_run(tmp_path, capsys):
    posts, a, b = pairs(10)
    priced = {"judge_price_in": 1000.0, "judge_price_out": 1000.0}
    with JudgeServer() as server:
        with pytest.raises(UserError, match="--judge_max_cost is"):
            llm_judge(server, tmp_path / "c", judge_max_cost=1.0, **priced)(posts, a, b)
        with pytest.raises(UserError, match="asked 20 times, --judge_max_requests is 19"):
            llm_judge(server, tmp_path / "c", judge_max_requests=19)(posts, a, b)
        assert not server.requests
        assert "20 to ask; at most" in capsys.readouterr().out  # said before it is refused
        server.fault = lambda prompt, attempt: None if attempt else "500"
        with pytest.raises(RunError, match="judge_max_requests=25"):
            llm_judge(server, tmp_path / "c", judge_max_requests=25)(posts, a, b)
        assert sum(server.requests.values()) == 25  # repeated requests count
        judge = llm_judge(server, tmp_path / "d", judge_max_cost=100.0, **priced)
        assert judge(posts, a, b) == expected(a, b)
        # what the server counted, not what was reserved
        assert judge.budget.cost == pytest.approx(20 * 110 * 1000 / 1e6)


def test_a_request_under_way_counts_in_full():
    budget = Budget((1000.0, 1000.0), 0, 1.0)
    first = budget.take(400, 100)  # $0.50 at most
    budget.take(400, 100)
    with pytest.raises(RunError, match="judge_max_cost"):
        budget.take(1, 0)
    budget.settle(first, 100, 10)
    budget.take(300, 90)
    assert budget.cost == pytest.approx(0.5 + 0.11 + 0.39)


def test_price_key_and_package_are_asked_for_in_one_line(tmp_path, monkeypatch):
    far = options("https://api.example.com/v1", tmp_path / "c")
    with pytest.raises(UserError, match="price unknown"):
        make_judge("llm", **far)
    assert make_judge("llm", **far | {"judge_model": "gpt-4o-mini"}).budget.price == (0.15, 0.60)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        make_judge("llm", **far)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match="requirements-judge.txt"):
        make_judge("llm", **far)


def test_the_key_is_never_written(tmp_path, capsys):
    posts, a, b = pairs(4)
    with JudgeServer(fault=lambda prompt, attempt: "echo key") as server:
        with pytest.raises(UserError, match=r"who is Bearer \*\*\*\?") as error:
            llm_judge(server, tmp_path / "c")(posts, a, b)
        server.fault = lambda prompt, attempt: None
        server.answer = lambda prompt: f"{KEY}\nPreferred: A"
        judge = llm_judge(server, tmp_path / "c")
        assert judge(posts, a, b) == [0.5] * 4
        assert judge.details(posts, a, b)[0]["answers"] == ["***\nPreferred: A"] * 2
    out = capsys.readouterr()
    assert KEY not in str(error.value) + out.out + out.err + (tmp_path / "c").read_text()
