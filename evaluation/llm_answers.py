"""The parts of the language-model judge that need no server: prompt, answers, cache, budget."""

import json
import os
import re
import threading
from pathlib import Path

from rlhf.config import RunError, UserError

TEMPLATE = Path(__file__).parent / "prompts" / "tldr.txt"
SLOTS = ("post", "summary_a", "summary_b")
BYTES_PER_TOKEN = 3  # English has more than 4: an estimate with this is an upper bound


# --- template


def read_template(path: str) -> tuple[str, str]:
    """A template file -> (system message, user message); "" is the one for TL;DR.

    A line `---` ends the system message. The user message has the slots {{post}}, {{summary_a}} and
    {{summary_b}}. The TL;DR prompt is that of summarize_from_feedback_details (github vwxyzjn), eval/oai.py.
    """
    file = Path(path) if path else TEMPLATE
    try:
        text = file.read_text()
    except (OSError, ValueError) as error:
        raise UserError(f"--judge_template={path}: cannot be read ({error})") from error
    system, line, user = text.partition("\n---\n")
    if not line:  # no system message
        system, user = "", text
    if missing := [slot for slot in SLOTS if f"{{{{{slot}}}}}" not in user]:
        raise UserError(f"{file}: the template has no {{{{{missing[0]}}}}}")
    return system.strip(), user.strip()


def fill(template: str, *texts: str) -> str:
    """In one pass: what a post says in double braces is left as it is. A heading in a text (### Summary B:)
    is escaped as in Markdown, so that none but the template's own ends a summary."""
    slots = dict(zip(SLOTS, [text.replace("###", r"\#\#\#") for text in texts], strict=True))
    return re.sub(r"\{\{(post|summary_a|summary_b)\}\}", lambda match: slots[match[1]], template)


# --- answers

DECORATION = re.compile(r"[*_`\"'“”‘’]")


def parse_verdict(answer: str) -> str | None:
    """"A", "B" or "tie" if the answer's `Preferred:` line, or the whole answer, says that and nothing else.

    Quotes, stars, brackets, a full stop and the word "Summary" before it do not matter. None for everything
    else: more words, no verdict, two different ones.
    """
    plain = DECORATION.sub("", answer)
    found = re.findall(r"preferred\s*:\s*([^\n]*)", plain, re.IGNORECASE) or [plain]
    verdicts = set()
    for text in found:
        text = re.sub(r"^\W*summary\b", "", text, flags=re.IGNORECASE)
        verdicts.add(text.strip(" \t\r\n.<>()[]"))
    verdict = verdicts.pop() if len(verdicts) == 1 else ""
    if verdict in ("A", "B"):
        return verdict
    return "tie" if verdict.lower() == "tie" else None


# --- disk


class AnswerCache:
    """{hash of a request: its answer}, in memory and as lines of an append-only file.

    A line is written at once and whole. One that a kill cut off is ignored, and the next starts on a line of
    its own.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        self.lock = threading.Lock()
        self.known: dict[str, dict] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            content = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"--judge_cache={path}: cannot be opened ({error})") from error
        for line in content.splitlines():
            try:
                record = json.loads(line)
                self.known[record.pop("key")] = {"answer": str(record["answer"]), **record}
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
        if content and not content.endswith(b"\n"):
            os.write(self.file, b"\n")

    def __contains__(self, key: str) -> bool:
        return key in self.known

    def __getitem__(self, key: str) -> dict:
        return self.known[key]

    def put(self, key: str, record: dict) -> None:
        with self.lock:
            os.write(self.file, json.dumps({"key": key, **record}).encode() + b"\n")
            self.known[key] = record


# --- money


class Budget:
    """Counts requests and dollars of this run, also of requests not yet answered, and lets none start that
    could go over a limit. `price`: dollars per million tokens of prompts and of answers."""

    def __init__(self, price: tuple[float, float], max_requests: int, max_cost: float):
        self.price = price
        self.max_requests = max_requests
        self.max_cost = max_cost
        self.lock = threading.Lock()
        self.requests = 0
        self.cost = 0.0
        self.tokens_in = 0
        self.tokens_out = 0

    @staticmethod
    def tokens(body: dict) -> int:
        """Upper bound on the tokens of a request's messages."""
        return sum(len(m["content"].encode()) // BYTES_PER_TOKEN + 8 for m in body["messages"])

    def price_of(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.price[0] + tokens_out * self.price[1]) / 1e6

    def check(self, requests: int, cost: float) -> None:
        """Before the first request of many."""
        requests += self.requests
        cost += self.cost
        if self.max_requests and requests > self.max_requests:
            raise UserError(f"the judge would be asked {requests} times, --judge_max_requests is "
                            f"{self.max_requests}; nothing was asked: raise it, or lower --n")
        if cost > self.max_cost:
            raise UserError(f"the judge could cost ${cost:.2f}, --judge_max_cost is ${self.max_cost:.2f}; "
                            "nothing was asked: raise it, or lower --n")

    def take(self, tokens_in: int, tokens_out: int) -> float:
        """Before each request, the repeated ones too: reserves what it can cost at most."""
        most = self.price_of(tokens_in, tokens_out)
        with self.lock:
            if self.max_requests and self.requests >= self.max_requests:
                raise RunError(f"stopped at --judge_max_requests={self.max_requests} (repeated requests "
                               "count); all answers are kept: raise it and run the command again")
            if self.cost + most > self.max_cost:
                raise RunError(f"stopped before --judge_max_cost=${self.max_cost:.2f} "
                               f"(${self.cost:.2f} spent or reserved); all answers are kept: raise it and "
                               "run the command again")
            self.requests += 1
            self.cost += most
        return most

    def settle(self, reserved: float, tokens_in: int, tokens_out: int) -> None:
        """After a request: what it did cost replaces what was reserved."""
        with self.lock:
            self.cost += self.price_of(tokens_in, tokens_out) - reserved
            self.tokens_in += tokens_in
            self.tokens_out += tokens_out

    def __str__(self) -> str:
        return (f"{self.requests} requests, {self.tokens_in:,} tokens of prompts, "
                f"{self.tokens_out:,} of answers, ${self.cost:.4f}")
