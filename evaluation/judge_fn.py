r"""A language model behind an OpenAI-compatible endpoint as a reward, or as what compares, in training.

    export JUDGE_MODEL=Qwen/Qwen2.5-7B-Instruct JUDGE_URL=http://localhost:8000/v1
    python train_rloo.py --reward_fn=evaluation/judge_fn.py:grade ...          a grade from 1 to 10, over 10
    python train_online.py --compare_fn=evaluation/judge_fn.py:prefer ...      P(first is better), both orders

The key comes from OPENAI_API_KEY. Answers are kept in JUDGE_CACHE (out/judge_cache.jsonl), so a resumed run
asks nothing twice; JUDGE_MAX_COST (5) is the most that a process may spend, in dollars. An answer that cannot
be read counts as the middle of the scale, and is counted on stderr.
"""

import math
import os
import re
import sys
from functools import cache
from pathlib import Path

from evaluation.llm_answers import fill
from evaluation.llm_judge import LLMJudge
from rlhf.config import UserError
from rlhf.summaries import Post, Summary

GRADE = Path(__file__).parent / "prompts" / "grade.txt"


@cache
def judge() -> LLMJudge:
    """One for the whole run: it holds the answers and the budget."""
    if not (model := os.environ.get("JUDGE_MODEL")):
        raise UserError("evaluation/judge_fn.py: put the judge's name into the environment variable "
                        "JUDGE_MODEL, and its endpoint into JUDGE_URL")
    return LLMJudge(
        judge_model=model, judge_url=os.environ.get("JUDGE_URL", "https://api.openai.com/v1"),
        judge_template="", judge_order="both", judge_concurrency=8, judge_timeout=60.0, judge_max_tokens=200,
        judge_cache=os.environ.get("JUDGE_CACHE", "out/judge_cache.jsonl"), judge_max_requests=0,
        judge_max_cost=float(os.environ.get("JUDGE_MAX_COST", "5")), judge_price_in=-1.0,
        judge_price_out=-1.0, seed=1,
    )


def counted(values: list[float], middle: float) -> list[float]:
    """The middle for every nan, which is an answer that could not be read."""
    if unread := sum(map(math.isnan, values)):
        print(f"judge {judge().model}: {unread} of {len(values)} answers could not be read", file=sys.stderr)
    return [middle if math.isnan(value) else value for value in values]


def parse_grade(answer: str) -> float:
    """"7", "7/10", "Grade: 7." are 0.7; nan for everything else than one whole number from 1 to 10."""
    numbers = re.findall(r"\d+(?:\.\d+)?", re.sub(r"/\s*10\b", "", answer))
    known = numbers[0] if len(numbers) == 1 else ""
    return int(known) / 10 if known.isdecimal() and 1 <= int(known) <= 10 else math.nan


def grade(prompts: list[str], texts: list[str]) -> list[float]:
    llm = judge()
    system, _, user = GRADE.read_text().partition("\n---\n")
    filled = [fill(user.strip(), prompt.strip(), text.strip(), "") for prompt, text in zip(prompts, texts)]
    messages = [[{"role": "system", "content": system}, {"role": "user", "content": text}] for text in filled]
    bodies = [{**llm.body(""), "messages": own} for own in messages]
    llm.fetch({llm.key_of(body): body for body in bodies})
    return counted([parse_grade(llm.cache[llm.key_of(body)]["answer"]) for body in bodies], 0.5)


def prefer(prompts: list[str], texts: list[str], others: list[str]) -> list[float]:
    posts = [Post("", prompt, [], None) for prompt in prompts]
    sides = [[Summary(text, [], True) for text in side] for side in (texts, others)]
    return counted(judge()(posts, *sides), 0.5)
