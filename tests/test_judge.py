"""Judges: one signature; what an answer says; what a faulty server, a kill, a limit cannot do. All against a server on 127.0.0.1."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from judge_server import JudgeServer, sections

import evaluation.llm_judge
from rlhf.config import RunError, UserError
from evaluation.judges import JUDGES, Post, Summary, agreement, gold_judge, make_judge, parse_judges
from evaluation.llm_answers import AnswerCache, Budget, fill, parse_verdict, read_template
from evaluation.llm_judge import LLMJudge
from evaluation.statistics import position_bias, win_rate

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("openai", reason="openai is not installed (requirements-judge.txt): the language-model judge is not tested")
KEY = "sk-never-to-be-seen-0123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(evaluation.llm_judge, "FIRST_WAIT", 0.02)


def options(url: str, cache: Path, **changes) -> dict:
    return {"judge_model": "tiny", "judge_url": url, "judge_template": "", "judge_order": "both", "judge_cache": str(cache),
            "judge_concurrency": 4, "judge_timeout": 0.8, "judge_max_tokens": 50, "judge_max_requests": 0, "judge_max_cost": 5.0,
            "judge_price_in": -1.0, "judge_price_out": -1.0, "seed": 1, **changes}


def text(rng: random.Random) -> str:
    return " " + " ".join("".join(rng.choices("abcdefgh", k=4)) for _ in range(5)) + "."


def pairs(n: int, seed: int = 0) -> tuple[list[Post], list[Summary], list[Summary]]:
    rng = random.Random(seed)
    posts = [Post(str(i), f"SUBREDDIT: r/x\n\nTITLE: t{i}\n\nPOST: p{i}\n\nTL;DR:", [1, 2, 3], None) for i in range(n)]
    return posts, *([Summary(text(rng), [5] * rng.randint(3, 9) + [0], True) for _ in range(n)] for _ in range(2))


def expected(a: list[Summary], b: list[Summary]) -> list[float]:
    """What the server's alphabetic judge must come to."""
    return [float(x.text.strip() < y.text.strip()) for x, y in zip(a, b)]


# --- what an answer says


@pytest.mark.parametrize("said", ["A", "A.", '"A"', "**A**", "(A)", "[[A]]", "'A'.", "“A”", "`A`", "<A>", "<\"A\">", " A\t"])
def test_an_answer_that_is_a_is_read_as_a(said):
    for answer in (said, f"Summary {said}", f"Preferred: Summary {said}", f"**Preferred: summary** {said}",
                   f"Comparison: B is long.\nPreferred: {said}", f"Comparison: x.\n\n**Preferred:** {said}\n", f"Preferred:\n{said}\n",
                   f"preferred : {said}"):
        assert parse_verdict(answer) == "A", answer
        assert parse_verdict(answer.replace("A", "B")) == "B", answer


@pytest.mark.parametrize("answer", ["", "A or B", "Preferred: A because it is short", "Preferred: Summary A is short", "Preferred: Summary",
                                    "Preferred: the summary", "Preferred: Summary A\nPreferred: Summary B", "Preferred: SummaryA",
                                    "Preferred: a", "Preferred: C",
                                    "Preferred:", "I cannot compare these.", "Comparison: A is better.", "Preferred: A\nPreferred: B",
                                    "Preferred: <\"A\" or \"B\">", "AB", "Preferred: neither", "A\nB"])
def test_anything_else_is_unread_and_never_a_loss(answer):
    assert parse_verdict(answer) is None
    assert math.isnan(LLMJudge.preference([(answer, True)]))
    assert math.isnan(LLMJudge.preference([(answer, True), ("Preferred: B", False)]))


def test_ties_and_both_orders():
    assert parse_verdict("Preferred: Tie.") == "tie"
    assert LLMJudge.preference([("Preferred: A", True), ("Preferred: B", False)]) == 1.0  # A both times
    assert LLMJudge.preference([("Preferred: A", True), ("Preferred: A", False)]) == 0.5  # the first both times
    assert LLMJudge.preference([("Preferred: tie", True), ("Preferred: B", False)]) == 0.75
    assert LLMJudge.preference([]) == 0.5


def test_template_is_filled_in_one_pass_and_can_be_replaced(tmp_path):
    system, user = read_template("")
    assert system == "You are a helpful assistant." and "accuracy, coverage, and coherence" in user
    assert fill("{{post}}|{{summary_a}}|{{summary_b}}", "{{summary_a}}", "\\1 {{post}}", "b") == "{{summary_a}}|\\1 {{post}}|b"
    own = tmp_path / "own.txt"
    own.write_text("Which is shorter?\n{{post}}\nONE {{summary_a}} TWO {{summary_b}} END")
    assert read_template(str(own))[0] == ""
    posts, a, b = pairs(3)
    with JudgeServer(answer=lambda prompt: "B" if prompt.startswith("Which is shorter?") and " END" in prompt else "?") as server:
        assert make_judge("llm", **options(server.url, tmp_path / "c", judge_template=str(own)))(posts, a, b) == [0.5] * 3
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
    with JudgeServer() as server:
        makers = [lambda o=order: make_judge("llm", **options(server.url, tmp_path / "c", judge_order=o)) for order in ("both", "random")]
        judges = []
        pq.write_table(pa.table({"facts": [posts[0].facts]}), tmp_path / "sft_train.parquet")
        for maker in (*makers, lambda: gold_judge(data_dir=str(tmp_path))):
            judges.append(judge := maker())
            p, q = judge(posts, a, b), judge(posts, b, a)
            assert p == [1 - x for x in q] and 0 < sum(p) < 30
            assert judge(posts, a, a) == [0.5] * 30
            assert win_rate(p)["win_rate"] == pytest.approx(1 - win_rate(q)["win_rate"])
        both, coin, _ = judges
        assert both(posts, a, b) == coin(posts, a, b) == expected(a, b)
        shown = [d["verdicts"][0] == "A" for d in coin.details(posts, a, b)]
        assert 5 < sum(first == bool(e) for first, e in zip(shown, expected(a, b))) < 25  # A is shown first about half of the time
        asked = [sections(body["messages"][-1]["content"]) for body in server.bodies]
        assert len(asked) == 60 and not any(x == y for x, y in asked)  # the coin's questions were among those of both; equals are not asked


def test_a_fork_adds_a_judge_in_one_place(monkeypatch):
    monkeypatch.setitem(JUDGES, "short", lambda seed: lambda posts, a, b: [float(len(x.text) < len(y.text)) for x, y in zip(a, b)])
    assert parse_judges("gold,short") == ["gold", "short"] and parse_judges("none") == []
    post, short, long = Post("1", "q", [1], None), Summary("x", [1], True), Summary("xx", [1, 2], True)
    assert make_judge("short", seed=3, judge_model="not asked for")([post], [short], [long]) == [1.0]
    for bad in ("gold,gold", "nobody"):
        with pytest.raises(UserError, match="judge"):
            parse_judges(bad)


def test_agreement_with_people_is_compared_with_a_ruler():
    posts, a, b = pairs(200)
    chosen, rejected = zip(*((x, y) if i % 10 else (y, x) for i, (x, y) in enumerate(zip(a, b))))
    right = agreement(lambda p, x, y: [1.0] * len(p), posts, chosen, rejected)
    assert right["agreement"] == 1 and right["beats_length"] and right["over_longer"] == pytest.approx(1 - right["longer_wins"])
    longer = lambda u, v: 0.5 if len(u.tokens) == len(v.tokens) else float(len(u.tokens) > len(v.tokens))  # noqa: E731
    ruler = agreement(lambda p, x, y: list(map(longer, x, y)), posts, chosen, rejected)
    assert ruler["agreement"] == ruler["longer_wins"] and ruler["beats_length"] is False
    assert right["longer_by"] == ruler["longer_by"] == "tokens"
    half = agreement(lambda p, x, y: [math.nan, 1.0] * 100, posts, chosen, rejected)
    assert (half["pairs"], half["unjudged"]) == (100, 100)


def test_the_ruler_is_the_better_of_tokens_and_characters():
    """People took the text with more characters, and by tokens it is a coin: a judge that counts characters is a ruler, and so is one of tokens."""
    posts = pairs(200)[0]
    chosen = [Summary("x" * 9, [5] * (3 + i % 2) + [0], True) for i in range(200)]
    rejected = [Summary("x" * 8, [5] * (4 - i % 2) + [0], True) for i in range(200)]

    def measured(size, a=chosen, b=rejected):
        return agreement(lambda p, x, y: [float(size(u) > size(v)) for u, v in zip(x, y)], posts, a, b)

    by_characters = measured(lambda s: len(s.text))
    assert (by_characters["agreement"], by_characters["longer_wins"], by_characters["longer_by"]) == (1.0, 1.0, "characters")
    assert by_characters["over_longer"] == 0 and by_characters["beats_length"] is False
    by_tokens = measured(lambda s: len(s.tokens))
    assert (by_tokens["agreement"], by_tokens["longer_wins"]) == (0.5, 1.0) and by_tokens["beats_length"] is False
    long, short = ([Summary("x", [5] * n, True)] * 200 for n in (3, 2))
    assert (measured(lambda s: len(s.tokens), long, short)["longer_by"], measured(lambda s: 1, short, long)["longer_wins"]) == ("tokens", 0.5)


def test_a_local_server_may_come_back_on_another_port(tmp_path):
    """Answers are found again by what was asked: on this machine the port of a server is chance, elsewhere it is another server."""
    posts, a, b = pairs(4)
    with JudgeServer() as server:
        make_judge("llm", **options(server.url, tmp_path / "c"))(posts, a, b)
    with JudgeServer() as other:
        assert other.url != server.url
        assert make_judge("llm", **options(other.url, tmp_path / "c"))(posts, a, b) == expected(a, b) and not other.requests

    def key(url: str) -> str:
        return make_judge("llm", **options(url, tmp_path / "d", judge_model="gpt-4o-mini")).key_of({"model": "gpt-4o-mini"})

    for host in ("localhost", "127.0.0.1", "[::1]"):
        assert key(f"http://{host}:8000/v1") == key(f"http://{host}:9000/v1") == key(f"http://{host}/v1") != key(f"http://{host}:8000/v2")
    assert key("https://judge.example:8000/v1") != key("https://judge.example:9000/v1") != key("https://judge.example/v1")


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
        judge = make_judge("llm", **options(server.url, tmp_path / "cache.jsonl", judge_concurrency=8))
        assert judge(posts, a, b) == expected(a, b)
        assert set(server.answered.values()) == {1} and len(server.answered) == 48
        assert {k for ks in kinds.values() for k in ks} == set(FAULTS)
        assert all(server.requests[p] == len(kinds[p]) + 1 for p in kinds)  # and not one request more than the faults made necessary
        assert 1 < server.most_busy <= 8 + sum(k.count("slow") for k in kinds.values())  # a slow one is still busy when the client has gone
        closing = sum(k.count("cut") + k.count("drop") for k in kinds.values())  # the client may try such a connection once more in vain
        assert 0 <= judge.budget.requests - sum(server.requests.values()) <= closing
        before = sum(server.requests.values())
        again = make_judge("llm", **options(server.url, tmp_path / "cache.jsonl"))
        assert again(posts, a, b) == expected(a, b) and again.details(posts, a, b) == judge.details(posts, a, b)
        assert sum(server.requests.values()) == before and again.budget.requests == 0  # a repeated run costs nothing
    assert len((tmp_path / "cache.jsonl").read_text().splitlines()) == 48


def test_retry_after_is_kept_by_all_threads(tmp_path):
    posts, a, b = pairs(12)
    with JudgeServer(fault=lambda prompt, attempt: "429" if len(server.log) == 5 else None, retry_after="0.6", delay=0.02) as server:
        assert make_judge("llm", **options(server.url, tmp_path / "c", judge_concurrency=2))(posts, a, b) == expected(a, b)
        times = sorted(t for t, _, _ in server.log)
        limited = next(t for t, _, kind in server.log if kind == "429")
        assert not [t for t in times if limited + 0.15 < t < limited + 0.55] and max(times) > limited + 0.55
    date = "Wed, 21 Oct 2065 07:28:00 GMT"
    assert evaluation.llm_judge.retry_after({"retry-after": date}) > 1e9 and evaluation.llm_judge.retry_after({"retry-after": "soon"}) is None


def test_a_refusal_is_unread_kept_and_not_asked_again(tmp_path):
    posts, a, b = pairs(6)
    refuses = lambda prompt, attempt: "refusal" if "p2" in prompt else "filtered" if "p4" in prompt else None  # noqa: E731
    with JudgeServer(fault=refuses) as server:
        for _ in range(2):
            judge = make_judge("llm", **options(server.url, tmp_path / "c"))
            p = judge(posts, a, b)
            assert [math.isnan(x) for x in p] == [i in (2, 4) for i in range(6)]
            assert win_rate(p)["unjudged"] == 2 and win_rate(p)["judged"] == 4
            bias = position_bias([d["verdicts"] for d in judge.details(posts, a, b)])
            assert (bias["answers"], bias["unread"], bias["first_share"], bias["consistent"]) == (12, 4, 0.5, 1.0)
        assert set(server.requests.values()) == {1}


def test_a_server_that_stays_down_ends_the_run_and_loses_nothing(tmp_path):
    posts, a, b = pairs(10)
    down = lambda prompt, attempt: "500" if "p7" in prompt else None  # noqa: E731
    with JudgeServer(fault=down) as server:
        with pytest.raises(RunError, match="no answer after 8 tries.*InternalServerError"):
            make_judge("llm", **options(server.url, tmp_path / "c", judge_concurrency=1))(posts, a, b)
        done = dict(server.answered)
        assert len(done) == 14
        server.fault = lambda prompt, attempt: None
        assert make_judge("llm", **options(server.url, tmp_path / "c"))(posts, a, b) == expected(a, b)
        assert set(server.answered.values()) == {1}
        server.fault = lambda prompt, attempt: "quota"
        with pytest.raises(RunError, match="quota"):
            make_judge("llm", **options(server.url, tmp_path / "other"))(posts, a, b)
        server.fault = lambda prompt, attempt: 404
        with pytest.raises(UserError, match="NotFoundError"):
            make_judge("llm", **options(server.url, tmp_path / "other"))(posts, a, b)


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
    """kill -9 at three moments; what was on the wire at that moment may be asked again (at most one per thread), nothing else is."""
    posts, a, b = pairs(80)
    task, cache = tmp_path / "task.json", tmp_path / "cache.jsonl"
    with JudgeServer(delay=0.02) as server:
        task.write_text(json.dumps([options(server.url, cache), [[p.query for p in posts], [s.text for s in a], [s.text for s in b]]]))
        command = [sys.executable, "-c", WORKER.format(root=str(ROOT), tests=str(ROOT / "tests")), str(task)]
        for kill in range(1, 4):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while sum(server.answered.values()) < 33 * kill and process.poll() is None:
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        last = subprocess.run(command, capture_output=True, text=True, check=True)
        assert json.loads(last.stdout.splitlines()[-1]) == expected(a, b)
        assert len(server.answered) == 160 and sum(server.requests.values()) <= 160 + 3 * 4
        assert KEY not in last.stdout + last.stderr


def test_a_line_cut_off_by_a_kill_is_passed_over(tmp_path):
    path = tmp_path / "c.jsonl"
    cache = AnswerCache(str(path))
    for i in range(3):
        cache.put(f"k{i}", {"answer": f"é{i}", "finish": "stop", "tokens": [1, 2]})
    whole = path.read_bytes()
    for cut in (1, 5, len(whole.splitlines()[-1]) + 0):
        path.write_bytes(whole[:-cut])
        again = AnswerCache(str(path))
        assert ("k1" in again) and ("k2" in again) == (cut == 1)
        again.put("k3", {"answer": "x", "finish": "stop", "tokens": [1, 2]})
        assert AnswerCache(str(path))["k3"]["answer"] == "x" and AnswerCache(str(path))["k1"]["answer"] == "é1"
    with pytest.raises(UserError, match="judge_cache"):
        AnswerCache(str(tmp_path))


# --- money and keys


def test_limits_hold_before_and_during_a_run(tmp_path, capsys):
    posts, a, b = pairs(10)
    priced = {"judge_price_in": 1000.0, "judge_price_out": 1000.0}
    with JudgeServer() as server:
        with pytest.raises(UserError, match="--judge_max_cost is"):
            make_judge("llm", **options(server.url, tmp_path / "c", judge_max_cost=1.0, **priced))(posts, a, b)
        with pytest.raises(UserError, match="asked 20 times, --judge_max_requests is 19"):
            make_judge("llm", **options(server.url, tmp_path / "c", judge_max_requests=19))(posts, a, b)
        assert not server.requests and "20 to ask; at most" in capsys.readouterr().out  # said before, refused before
        server.fault = lambda prompt, attempt: None if attempt else "500"
        with pytest.raises(RunError, match="judge_max_requests=25"):
            make_judge("llm", **options(server.url, tmp_path / "c", judge_max_requests=25))(posts, a, b)
        assert sum(server.requests.values()) == 25  # repeated requests count
        judge = make_judge("llm", **options(server.url, tmp_path / "d", judge_max_cost=100.0, **priced))
        assert judge(posts, a, b) == expected(a, b)
        assert judge.budget.cost == pytest.approx(20 * 110 * 1000 / 1e6)  # what the server counted, not what was reserved


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
            make_judge("llm", **options(server.url, tmp_path / "c"))(posts, a, b)
        server.fault, server.answer = lambda prompt, attempt: None, lambda prompt: f"{KEY}\nPreferred: A"
        judge = make_judge("llm", **options(server.url, tmp_path / "c"))
        assert judge(posts, a, b) == [0.5] * 4 and judge.details(posts, a, b)[0]["answers"] == ["***\nPreferred: A"] * 2
    out = capsys.readouterr()
    assert KEY not in str(error.value) + out.out + out.err + (tmp_path / "c").read_text()
