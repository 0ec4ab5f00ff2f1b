"""A language model behind an OpenAI-compatible endpoint as the judge of summaries.

As in summarize_from_feedback_details (github vwxyzjn), eval/oai.py, without two of its biases. An answer
such as `"A"` or `A.` is an A, and one that cannot be read is counted as unread, never as a loss. A pair is
asked in both orders.

Every answer goes to an append-only file as it arrives, found again by the content of its request: a run that
was killed goes on where it was, and a repeated run asks nothing. The key comes from the environment
(OPENAI_API_KEY); what a server says is shown without it.
"""

import email.utils
import hashlib
import json
import math
import os
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from urllib.parse import SplitResult, urlsplit

from tqdm import tqdm

from evaluation.llm_answers import AnswerCache, Budget, fill, parse_verdict, read_template
from rlhf.config import RunError, UserError
from rlhf.dist import on_first

KEY = "OPENAI_API_KEY"
SECRET = re.compile(r"(key|token|secret|password|auth|sig)[^=&]*=", re.IGNORECASE)  # in a query: ?api_key=...
TRIES = 8  # of one request, with waits of about 1, 2, 4, ... 60 seconds between them
TRIES_TO_CONNECT = 3  # of the first connection: a server that is not running is told within seconds
FIRST_WAIT = 1.0  # seconds; a server's Retry-After goes before
LONGEST_WAIT = 60.0  # seconds
# dollars per million tokens of prompts and of answers; they change: --judge_price_in, --judge_price_out
PRICES = {
    "gpt-4o-mini": (0.15, 0.60),
    "gpt-4o": (2.50, 10.00),
    "gpt-4.1-mini": (0.40, 1.60),
    "gpt-4.1-nano": (0.10, 0.40),
    "gpt-3.5-turbo-0125": (0.50, 1.50),
}
REFUSED = {"content_filter", "content_policy_violation"}  # codes of error 400: understood and declined


def parse_url(text: str) -> SplitResult:
    url = urlsplit(text)
    if url.username or url.password or SECRET.search(url.query):
        raise UserError("--judge_url holds a password or a key, and would be written to run.json: "
                        f"put the key into the environment variable {KEY}")
    if url.scheme not in ("http", "https") or not url.hostname:
        raise UserError(f"--judge_url={text}: expected http://HOST:PORT/v1 or https://HOST/v1")
    return url


def prices(model: str, local: bool, price_in: float, price_out: float) -> tuple[float, float]:
    """Dollars per million tokens of prompts and of answers: as given, or, below 0, as known."""
    known_in, known_out = (0.0, 0.0) if local else PRICES.get(model, (math.nan, math.nan))
    price = (price_in if price_in >= 0 else known_in, price_out if price_out >= 0 else known_out)
    if any(map(math.isnan, price)):
        raise UserError(f"--judge_model={model}: price unknown, so --judge_max_cost cannot be kept; give "
                        "--judge_price_in and --judge_price_out (dollars per million tokens, 0 if free)")
    return price


class LLMJudge:
    """judge(posts, summaries_a, summaries_b) -> preferences.

    Identical summaries are a tie, and nobody is asked about them; nan if an answer was not read.
    """

    def __init__(
        self, *, judge_model: str, judge_url: str, judge_template: str, judge_order: str, judge_cache: str,
        judge_concurrency: int, judge_timeout: float, judge_max_tokens: int, judge_max_requests: int,
        judge_max_cost: float, judge_price_in: float, judge_price_out: float, seed: int,
    ):
        try:
            import openai
        except ImportError as error:
            hint = "pip install -r requirements-judge.txt"
            raise UserError(f"--judge=llm needs the openai package: {hint}") from error
        self.openai = openai
        self.model = judge_model
        self.url = judge_url
        self.order = judge_order
        self.seed = seed
        url = parse_url(judge_url)
        local = url.hostname in ("localhost", "127.0.0.1", "::1")
        # what an answer is kept under: a local server may come back on another port
        self.place = url._replace(netloc=url.hostname).geturl() if local else judge_url
        self.key = os.environ.get(KEY, "")
        if not self.key and not local:
            raise UserError(f"--judge=llm: put the key of {judge_url} into the environment variable {KEY}")
        price = prices(judge_model, local, judge_price_in, judge_price_out)
        self.system, self.user = read_template(judge_template)
        self.cache = AnswerCache(judge_cache)
        self.budget = Budget(price, judge_max_requests, judge_max_cost)
        self.concurrency = judge_concurrency
        self.max_tokens = judge_max_tokens
        self.client = openai.OpenAI(  # without retries: `ask` does them
            api_key=self.key or "none", base_url=judge_url, timeout=judge_timeout, max_retries=0,
        )
        self.connected = False  # once: then a server that is gone may come back
        self.not_before = 0.0  # no request of any thread starts before this time
        self.stop = threading.Event()

    # --- questions and answers

    def questions(self, post, a, b) -> list[tuple[str, bool]]:
        """(filled template, is A shown first?) for a pair: both orders, or one that a coin decides.

        The coin is a hash of seed and content: repeated, it falls the same way, and when A and B are swapped
        it shows the same text first.
        """
        text_a = a.text.strip()
        text_b = b.text.strip()
        if text_a == text_b:
            return []
        query = post.query.strip()
        a_first = (fill(self.user, query, text_a, text_b), True)
        b_first = (fill(self.user, query, text_b, text_a), False)
        if self.order == "both":
            return [a_first, b_first]
        content = json.dumps([self.seed, post.query, *sorted((text_a, text_b))])
        coin = hashlib.sha256(content.encode()).digest()[0] % 2  # 1: the text that sorts first is shown first
        return [a_first if (text_a < text_b) == bool(coin) else b_first]

    def body(self, text: str) -> dict:
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, {"role": "user", "content": text}]
        return {"model": self.model, "messages": messages, "temperature": 0.0, "max_tokens": self.max_tokens}

    def key_of(self, body: dict) -> str:
        return hashlib.sha256(json.dumps([self.place, body], sort_keys=True).encode()).hexdigest()

    def answers(self, posts: list, summaries_a: list, summaries_b: list) -> list[list[tuple[str, bool]]]:
        """Per pair its answers, each with whether A was shown first; asks what the cache does not hold."""
        keys = []  # per pair and question: (key, is A shown first?)
        bodies = {}
        for pair in zip(posts, summaries_a, summaries_b, strict=True):
            asked = [(self.body(text), a_first) for text, a_first in self.questions(*pair)]
            keys.append([(self.key_of(body), a_first) for body, a_first in asked])
            bodies |= {key: body for (key, _), (body, _) in zip(keys[-1], asked)}
        on_first(lambda: self.fetch(bodies))
        known = on_first(lambda: {key: self.cache[key]["answer"] for key in bodies})
        return [[(known[key], a_first) for key, a_first in pair] for pair in keys]

    def __call__(self, posts: list, summaries_a: list, summaries_b: list) -> list[float]:
        return [self.preference(pair) for pair in self.answers(posts, summaries_a, summaries_b)]

    @staticmethod
    def preference(answers: list[tuple[str, bool]]) -> float:
        """Mean over the orders. nan if any was not read: one order alone has the judge's position bias."""
        if not answers:
            return 0.5
        wins = []
        for answer, a_first in answers:
            verdict = parse_verdict(answer)
            if verdict is None:
                return math.nan
            wins.append(0.5 if verdict == "tie" else float((verdict == "A") == a_first))
        return sum(wins) / len(wins)

    def details(self, posts: list, summaries_a: list, summaries_b: list) -> list[dict]:
        """Per pair, for the table: the answers, and what was read in them ("A" = what was shown first)."""
        details = []
        for pair in self.answers(posts, summaries_a, summaries_b):
            answers = [answer for answer, _ in pair]
            verdicts = [parse_verdict(answer) or "unread" for answer in answers]
            details.append({"answers": answers, "verdicts": verdicts})
        return details

    # --- requests

    def fetch(self, bodies: dict[str, dict]) -> None:
        """Puts an answer to every body into the cache.

        Says before the first request what it will take, and refuses what is over the limit.
        """
        missing = {key: body for key, body in bodies.items() if key not in self.cache}
        plan = [(key, body, Budget.tokens(body), self.max_tokens) for key, body in missing.items()]
        if not plan:
            return
        tokens_in = sum(p[2] for p in plan)
        tokens_out = sum(p[3] for p in plan)
        price = self.budget.price_of(tokens_in, tokens_out)
        print(f"judge {self.model}: {len(bodies)} questions, {len(bodies) - len(plan)} answered before, "
              f"{len(plan)} to ask; at most {tokens_in:,} tokens of prompts and {tokens_out:,} of answers, "
              f"${price:.2f}")
        self.budget.check(len(plan), price)
        self.stop.clear()
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            jobs = [pool.submit(self.ask, *p) for p in plan]
            done = as_completed(jobs)
            for job in tqdm(done, total=len(jobs), desc=f"judge {self.model}", leave=False, disable=None):
                job.result()
        finally:  # after an error or Ctrl-C: no new request; answers to those under way still reach the cache
            self.stop.set()
            pool.shutdown(cancel_futures=True)
        print(f"judge {self.model}: {self.budget}")

    def ask(self, key: str, body: dict, tokens_in: int, tokens_out: int) -> None:
        """One answer into the cache.

        Tries again after 408, 409, 429, 5xx, a lost connection, a timeout or a body that is no answer.
        """
        problem = "stopped"
        for attempt in range(TRIES):
            if self.stop.wait(max(0.0, self.not_before - time.time())):
                return
            reserved = self.budget.take(tokens_in, tokens_out)
            try:
                reply = self.client.chat.completions.with_raw_response.create(**body)
                self.connected = True
                record = read_reply(self.without_key(reply.http_response.text))
                if any(record["tokens"]):  # else the server does not count: what was reserved is the estimate
                    self.budget.settle(reserved, *record["tokens"])
                self.cache.put(key, record)
                return
            except self.openai.APIStatusError as error:
                self.budget.settle(reserved, 0, 0)
                problem = self.status(error, key)
                if problem is None:
                    return
                wait = retry_after(error.response.headers)
                if wait is not None:
                    self.not_before = max(self.not_before, time.time() + min(wait, 600))
            except (self.openai.APIError, ValueError) as error:
                # its price stays reserved: the server may have answered and may bill it
                problem = self.clean(error)
                if type(error.__cause__).__name__ == "ConnectError":  # nothing was sent, nothing is billed
                    self.budget.settle(reserved, 0, 0)
                    problem = f"no connection to {self.url}: {error.__cause__}"
                    if not self.connected and attempt + 1 >= TRIES_TO_CONNECT:
                        raise RunError(f"judge {self.model}: {problem}. Is the server running?") from error
            asked_to_wait = time.time() < self.not_before
            pause = 0.0
            if not asked_to_wait and attempt < TRIES - 1:
                pause = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1)
            if self.stop.wait(pause):
                return
        raise RunError(f"judge {self.model}: no answer after {TRIES} tries ({problem}). All others are in "
                       f"{self.cache.path}: run it again")

    def status(self, error, key: str) -> str | None:
        """What an HTTP error means: its description if trying again may help, None if the server declined to
        answer (kept as an answer that cannot be read). Everything else is raised."""
        text = self.clean(error)
        code = error.status_code
        if code == 400 and error.code in REFUSED:
            self.cache.put(key, {"answer": "", "finish": error.code, "tokens": [0, 0]})
            return None
        if code in (408, 409) or code >= 500 or code == 429 and error.code != "insufficient_quota":
            return text
        if code == 429:
            raise RunError(f"judge {self.model}: no quota left ({text}). All answers are in "
                           f"{self.cache.path}: run it again")
        raise UserError(f"judge {self.model} at {self.url}: {text}; are --judge_model, --judge_url and "
                        f"the key in {KEY} right?")

    def clean(self, error: Exception) -> str:
        return self.without_key(" ".join(f"{type(error).__name__}: {error}".split()))[:300]

    def without_key(self, text: str) -> str:
        """A server may repeat the key it was sent."""
        return text.replace(self.key, "***") if self.key else text


def read_reply(text: str) -> dict:
    """A chat completion's JSON -> {answer, finish, tokens}.

    ValueError for anything else: cut off, not JSON, an error with status 200.
    """
    try:
        data = json.loads(text)
        choice = data["choices"][0]
        message = choice["message"]
        usage = data.get("usage") or {}
        answer = message.get("content") or message.get("refusal") or ""
        if not isinstance(answer, str):
            raise TypeError("content is not a string")
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        return {"answer": answer, "finish": choice.get("finish_reason"), "tokens": tokens}
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"the body is not a chat completion: {text[:100]!r}") from error


def retry_after(headers) -> float | None:
    """Seconds that a server asks to wait: a number or a date."""
    text = headers.get("retry-after")
    try:
        return None if text is None else float(text)
    except ValueError:
        try:
            return email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return None
