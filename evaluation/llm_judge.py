"""A language model behind an OpenAI-compatible endpoint as the judge of summaries (N+ eval/oai.py; recipe, section 8), without two biases:
an answer such as `"A"` or `A.` is an A, and one that cannot be read is counted as unread, never as a loss; a pair is asked in both orders.

Every answer goes to an append-only file as it arrives, found again by the content of its request: a run that was killed goes on where it
was, and a repeated run asks nothing. The key comes from the environment (OPENAI_API_KEY); what a server says is shown without it.
"""

import email.utils
import hashlib
import json
import math
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from urllib.parse import urlsplit

from tqdm import tqdm

from evaluation.llm_answers import AnswerCache, Budget, fill, parse_verdict, read_template
from rlhf.config import RunError, UserError

KEY = "OPENAI_API_KEY"
TRIES = 8  # of one request, with waits of about 1, 2, 4, ... 60 seconds between them
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds; a server's Retry-After goes before
PRICES = {  # dollars per million tokens of prompt and of answer; they change: --judge_price_in, --judge_price_out
    "gpt-4o-mini": (0.15, 0.60),
    "gpt-4o": (2.50, 10.00),
    "gpt-4.1-mini": (0.40, 1.60),
    "gpt-4.1-nano": (0.10, 0.40),
    "gpt-3.5-turbo-0125": (0.50, 1.50),
}
REFUSED = {"content_filter", "content_policy_violation"}  # error codes (400) of a request that was understood and declined


class LLMJudge:
    """judge(posts, summaries_a, summaries_b) -> preferences. Identical summaries are a tie, unasked; nan if an answer was not read."""

    def __init__(self, *, judge_model: str, judge_url: str, judge_template: str, judge_order: str, judge_cache: str, judge_concurrency: int,
                 judge_timeout: float, judge_max_tokens: int, judge_max_requests: int, judge_max_cost: float, judge_price_in: float,
                 judge_price_out: float, seed: int):
        try:
            import openai
        except ImportError as error:
            raise UserError("--judge=llm needs the openai package: pip install -r requirements-judge.txt") from error
        if judge_concurrency < 1 or judge_timeout <= 0 or judge_max_tokens < 1:
            raise UserError("--judge_concurrency, --judge_timeout and --judge_max_tokens must be at least 1")
        self.openai, self.model, self.url, self.order, self.seed = openai, judge_model, judge_url, judge_order, seed
        url = urlsplit(judge_url)
        local = url.hostname in ("localhost", "127.0.0.1", "::1")
        self.place = url._replace(netloc=url.hostname).geturl() if local else judge_url  # a local server may come back on another port
        self.key = os.environ.get(KEY, "")
        if not self.key and not local:
            raise UserError(f"--judge=llm: put the key of {judge_url} into the environment variable {KEY}")
        known = (0.0, 0.0) if local else PRICES.get(judge_model)
        price = tuple(given if given >= 0 else known[i] if known else math.nan for i, given in enumerate((judge_price_in, judge_price_out)))
        if any(map(math.isnan, price)):
            raise UserError(f"--judge_model={judge_model}: price unknown, so --judge_max_cost cannot be kept; give --judge_price_in and "
                            "--judge_price_out (dollars per million tokens, 0 if it is free)")
        self.system, self.user = read_template(judge_template)
        self.cache = AnswerCache(judge_cache)
        self.budget = Budget(price, judge_max_requests, judge_max_cost)
        self.concurrency, self.max_tokens = judge_concurrency, judge_max_tokens
        self.client = openai.OpenAI(api_key=self.key or "none", base_url=judge_url, timeout=judge_timeout, max_retries=0)  # `ask` retries
        self.not_before = 0.0  # no request of any thread starts before this time
        self.stop = threading.Event()

    # --- questions and answers

    def questions(self, post, a, b) -> list[tuple[str, bool]]:
        """(filled template, is A shown first?) for a pair: both orders, or one that a coin decides.

        The coin is a hash of seed and content: repeated, it falls the same way, and when A and B are swapped it shows the same text first.
        """
        first, second = a.text.strip(), b.text.strip()
        if first == second:
            return []
        if self.order == "both":
            shown = [True, False]
        else:
            coin = hashlib.sha256(json.dumps([self.seed, post.query, *sorted((first, second))]).encode()).digest()[0] % 2
            shown = [(first < second) == bool(coin)]
        return [(fill(self.user, post.query.strip(), *((first, second) if a_first else (second, first))), a_first) for a_first in shown]

    def body(self, text: str) -> dict:
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, {"role": "user", "content": text}]
        return {"model": self.model, "messages": messages, "temperature": 0.0, "max_tokens": self.max_tokens}

    def key_of(self, body: dict) -> str:
        return hashlib.sha256(json.dumps([self.place, body], sort_keys=True).encode()).hexdigest()

    def answers(self, posts: list, summaries_a: list, summaries_b: list) -> list[list[tuple[str, bool]]]:
        """Per pair its answers, each with whether A was shown first; asks what the cache does not hold."""
        asked = [self.questions(*pair) for pair in zip(posts, summaries_a, summaries_b, strict=True)]
        bodies = [[(self.body(text), a_first) for text, a_first in pair] for pair in asked]
        keys = [[(self.key_of(body), a_first) for body, a_first in pair] for pair in bodies]
        self.fetch({key: body for k, b in zip(keys, bodies) for (key, _), (body, _) in zip(k, b)})
        return [[(self.cache[key]["answer"], a_first) for key, a_first in pair] for pair in keys]

    def __call__(self, posts: list, summaries_a: list, summaries_b: list) -> list[float]:
        return [self.preference(pair) for pair in self.answers(posts, summaries_a, summaries_b)]

    @staticmethod
    def preference(answers: list[tuple[str, bool]]) -> float:
        """Mean over the orders; nan if any of them was not read: half a pair would carry the judge's liking for a position."""
        if not answers:
            return 0.5
        verdicts = [(parse_verdict(answer), a_first) for answer, a_first in answers]
        if any(verdict is None for verdict, _ in verdicts):
            return math.nan
        return sum(0.5 if verdict == "tie" else float((verdict == "A") == a_first) for verdict, a_first in verdicts) / len(verdicts)

    def details(self, posts: list, summaries_a: list, summaries_b: list) -> list[dict]:
        """Per pair, for the table: the answers, and what was read in them ("A" = what was shown first)."""
        return [{"answers": [answer for answer, _ in pair], "verdicts": [parse_verdict(answer) or "unread" for answer, _ in pair]}
                for pair in self.answers(posts, summaries_a, summaries_b)]

    # --- the wire

    def fetch(self, bodies: dict[str, dict]) -> None:
        """Puts an answer to every body into the cache. Says before the first request what it will take; refuses what is over the limit."""
        missing = {key: body for key, body in bodies.items() if key not in self.cache}
        plan = [(key, body, Budget.tokens(body), self.max_tokens) for key, body in missing.items()]
        if plan:
            tokens = sum(p[2] for p in plan), sum(p[3] for p in plan)
            print(f"judge {self.model}: {len(bodies)} questions, {len(bodies) - len(plan)} answered before, {len(plan)} to ask; "
                  f"at most {tokens[0]:,} tokens of prompts and {tokens[1]:,} of answers, ${self.budget.price_of(*tokens):.2f}")
            self.budget.check(len(plan), self.budget.price_of(*tokens))
            self.stop.clear()
            pool = ThreadPoolExecutor(self.concurrency)
            try:
                jobs = [pool.submit(self.ask, *p) for p in plan]
                for job in tqdm(as_completed(jobs), total=len(jobs), desc=f"judge {self.model}", leave=False, disable=None):
                    job.result()
            finally:  # after an error or Ctrl-C: no new request, and what is under way still reaches the cache
                self.stop.set()
                pool.shutdown(cancel_futures=True)
            print(f"judge {self.model}: {self.budget}")

    def ask(self, key: str, body: dict, tokens_in: int, tokens_out: int) -> None:
        """One answer into the cache. Tries again after 408, 409, 429, 5xx, a lost connection, a timeout or a body that is no answer."""
        problem = "stopped"
        for attempt in range(TRIES):
            if self.stop.wait(max(0.0, self.not_before - time.time())):
                return
            reserved = self.budget.take(tokens_in, tokens_out)
            try:
                reply = self.client.chat.completions.with_raw_response.create(**body)
                record = read_reply(self.without_key(reply.http_response.text))
                if any(record["tokens"]):  # else the server does not count, and what was reserved stays the estimate
                    self.budget.settle(reserved, *record["tokens"])
                self.cache.put(key, record)
                return
            except self.openai.APIStatusError as error:
                self.budget.settle(reserved, 0, 0)
                problem, wait = self.status(error, key), retry_after(error.response.headers)
                if problem is None:
                    return
                if wait is not None:
                    self.not_before = max(self.not_before, time.time() + min(wait, 600))
            except (self.openai.APIError, ValueError) as error:  # its price stays reserved: the server may have answered, and may bill it
                problem = self.clean(error)
            asked_to_wait = time.time() < self.not_before
            pause = 0.0 if asked_to_wait or attempt == TRIES - 1 else min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1)
            if self.stop.wait(pause):
                return
        raise RunError(f"judge {self.model}: no answer after {TRIES} tries ({problem}). All others are in {self.cache.path}: run it again")

    def status(self, error, key: str) -> str | None:
        """What to do about an HTTP error: a description if trying again may help, None if it is an answer of its kind, else raises."""
        text, code = self.clean(error), error.status_code
        if code == 400 and error.code in REFUSED:
            self.cache.put(key, {"answer": "", "finish": error.code, "tokens": [0, 0]})
            return None
        if code in (408, 409) or code >= 500 or code == 429 and error.code != "insufficient_quota":
            return text
        if code == 429:
            raise RunError(f"judge {self.model}: no quota left ({text}). All answers are in {self.cache.path}: run it again")
        raise UserError(f"judge {self.model} at {self.url}: {text}")

    def clean(self, error: Exception) -> str:
        return self.without_key(" ".join(f"{type(error).__name__}: {error}".split()))[:300]

    def without_key(self, text: str) -> str:
        """A server may repeat the key it was sent."""
        return text.replace(self.key, "***") if self.key else text


def read_reply(text: str) -> dict:
    """A chat completion's JSON -> {answer, finish, tokens}. ValueError for anything else: cut off, not JSON, an error with status 200."""
    try:
        data = json.loads(text)
        choice = data["choices"][0]
        message, usage = choice["message"], data.get("usage") or {}
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
