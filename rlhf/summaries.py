"""Posts and summaries as text, and what can be counted on a summary without a judge.

ROUGE (the `rouge_score` package's, an extra), repetition, novelty against the post, distinct n-grams,
and the gold reward where the caller has one. N-grams are of lower-case words; a text too short for one has
rate 0.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from rlhf.config import UserError
from rlhf.data import has_column, read_table
from rlhf.dist import FIRST
from rlhf.files import write_file
from rlhf.model import EOS
from rlhf.pretrained import read_tokenizer
from rlhf.run import finite

ROUGE = ("rouge1", "rouge2", "rougeL")
COUNTED = (*ROUGE, "repetition_3", "novelty_2")  # columns of `text_rows`
ROUGE_HINT = "ROUGE is left out (pip install rouge_score)"

Gold = Callable[[list[str], list[str], list[bool]], list[float]]  # see data/gold.py


@dataclass(frozen=True)
class Post:
    id: str
    query: str
    query_token: list[int]
    facts: str | None  # what the gold reward is computed from (JSON); None where nobody knows it


@dataclass(frozen=True)
class Summary:
    text: str
    tokens: list[int]  # with EOS, if there is one
    ended: bool  # has an EOS


# --- from tables and samples


TEXTS = ("query", "reference_response", "chosen", "rejected")  # each stands beside its <name>_token


def read_column(data_dir: str, table: str, column: str, limit: int = 0) -> list:
    """A column of a prepared table. Texts may be missing: they are decoded from their tokens."""
    if column not in TEXTS or has_column(data_dir, table, column):
        return read_table(data_dir, table, [column], limit)[column]
    tokens = read_table(data_dir, table, [f"{column}_token"], limit)[f"{column}_token"]
    return texts_of(read_tokenizer(Path(data_dir) / "tokenizer.json"), [tokens])


def read_posts(
    data_dir: str, table: str, columns: list[str], limit: int = 0,
) -> tuple[list[Post], dict[str, list]]:
    """The posts of a prepared table, and the named further columns. Rows without an id have their number."""
    there = [c for c in ("id", "facts") if has_column(data_dir, table, c)]
    names = ["query", "query_token", *there, *columns]
    rows = {name: read_column(data_dir, table, name, limit) for name in names}
    n = len(rows["query"])
    ids = rows.get("id", [str(i) for i in range(n)])
    facts = rows.get("facts", [None] * n)
    return [Post(*row) for row in zip(ids, rows["query"], rows["query_token"], facts)], rows


def human_summaries(texts: list[str], tokens: list[list[int]]) -> list[Summary]:
    return [Summary(text, ids, bool(ids) and ids[-1] == EOS) for text, ids in zip(texts, tokens, strict=True)]


def texts_of(tokenizer: Tokenizer, responses: list[list[list[int]]]) -> list[str]:
    """N prompts with K responses each -> N K texts without EOS."""
    return tokenizer.decode_batch([[t for t in ids if t != EOS] for group in responses for ids in group])


def sampled_summaries(tokenizer: Tokenizer, responses: list[list[list[int]]], ended: Tensor) -> list[Summary]:
    """What `generate_all` returned, as N K summaries."""
    tokens = [ids for group in responses for ids in group]
    texts = texts_of(tokenizer, responses)
    return [Summary(*row) for row in zip(texts, tokens, ended.flatten().tolist(), strict=True)]


SHOWN = {"score": "scores", "reward": "rewards", "ended": "ended", "gold": "gold"}  # of each response


def log_samples(
    file: Path, step: int, tokenizer: Tokenizer, prompts: list[list[int]], responses: list[list[list[int]]],
    batch: dict[str, Tensor],
) -> None:
    """Adds scored responses to a jsonl file, a line per prompt; of each response SHOWN as far as it is known.
    Lines of this step and later ones, which a run left behind before it was resumed, are dropped."""
    if not FIRST:
        return
    lines = file.read_text().splitlines() if file.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] < step]
    texts = texts_of(tokenizer, responses)
    K = len(responses[0])
    for n, prompt in enumerate(tokenizer.decode_batch(prompts)):
        columns = {key: batch[name][n].tolist() for key, name in SHOWN.items() if name in batch}
        own = texts[n * K : (n + 1) * K]
        rows = [dict(zip(columns, numbers)) for numbers in zip(*columns.values(), strict=True)]
        shown = [{"text": text, **finite(row)} for text, row in zip(own, rows, strict=True)]
        kept.append(json.dumps({"step": step, "prompt": prompt, "responses": shown}))
    write_file(file, "".join(line + "\n" for line in kept))


def gold_scores(gold: Gold, posts: list[Post], summaries: list[Summary]) -> list[float]:
    return gold([p.facts for p in posts], [s.text for s in summaries], [s.ended for s in summaries])


# --- counts


def rouge_rows(references: list[str], summaries: list[str]) -> list[dict[str, float]] | None:
    """F-measures of ROUGE-1, -2 and -L of each summary against its reference; None without the package.

    Without stemming, as in summarize_from_feedback_details (github vwxyzjn), sft.py.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return None
    scorer = RougeScorer(list(ROUGE), use_stemmer=False)
    rows = []
    for reference, summary in zip(references, summaries, strict=True):
        scores = scorer.score(reference, summary)
        rows.append({name: score.fmeasure for name, score in scores.items()})
    return rows


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return list(zip(*(words[i:] for i in range(n))))


def repetition(text: str, n: int = 3) -> float:
    """Share of a text's n-grams that it has said before: 0 = says nothing twice."""
    grams = ngrams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def novelty(text: str, post: str, n: int = 2) -> float:
    """Share of a text's n-grams that the post does not have: 0 = copied from the post."""
    grams = ngrams(text, n)
    known = set(ngrams(post, n))
    return sum(gram not in known for gram in grams) / len(grams) if grams else 0.0


def distinct(texts: list[str], n: int) -> float:
    """Different n-grams over all n-grams of all texts together (distinct-n).

    Low = the summaries of different posts say the same.
    """
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def text_rows(posts: list[str], references: list[str], summaries: list[str]) -> list[dict[str, float]]:
    """One dict per summary: ROUGE (with the package), repetition_3, novelty_2."""
    rouge = rouge_rows(references, summaries) or [{}] * len(summaries)
    return [
        {**scores, "repetition_3": repetition(summary), "novelty_2": novelty(summary, post)}
        for scores, summary, post in zip(rouge, summaries, posts, strict=True)
    ]


def mean(values: list[float | None]) -> float | None:
    """Mean of a column; None if nothing in it was measured."""
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def text_means(rows: list[dict[str, float]], summaries: list[str]) -> dict[str, float]:
    """Means of the `text_rows`, and distinct-1 and distinct-2 of all summaries."""
    if not rows:
        raise UserError("no summaries to measure")
    means = {name: mean([row[name] for row in rows]) for name in rows[0]}
    return {**means, "distinct_1": distinct(summaries, 1), "distinct_2": distinct(summaries, 2)}


# --- all together


def summary_rows(
    posts: list[Post], references: list[Summary], summaries: list[Summary], gold: Gold | None,
) -> list[dict]:
    """What is known of each summary without a model: ROUGE, repetition, novelty; with `gold` gold rewards."""
    rows = text_rows([p.query for p in posts], [r.text for r in references], [s.text for s in summaries])
    if not gold:
        return rows
    own = gold_scores(gold, posts, summaries)
    human = gold_scores(gold, posts, references)
    return [{**row, "gold": g, "gold_reference": h} for row, g, h in zip(rows, own, human, strict=True)]


def summary_means(
    rows: list[dict], references: list[Summary], summaries: list[Summary],
) -> dict[str, float | None]:
    """Means of the `summary_rows`, the numbers of all texts together, length in tokens (EOS included), share
    of summaries with an EOS."""
    return {
        **text_means(rows, [s.text for s in summaries]),
        "response_length": mean([len(s.tokens) for s in summaries]),
        "reference_length": mean([len(r.tokens) for r in references]),
        "eos_share": mean([float(s.ended) for s in summaries]),
    }


def summary_metrics(
    data_dir: str, table: str, tokenizer: Tokenizer, samples: list[list[list[int]]], ended: Tensor,
    gold: Gold | None,
) -> dict[str, float | None]:
    """The few numbers a training script ends with, of one greedy summary for each first row of an sft table;
    ROUGE where the table has references."""
    posts, _ = read_posts(data_dir, table, [], len(samples))
    summaries = sampled_summaries(tokenizer, samples, ended)
    metrics = {
        "greedy/tokens": mean([len(s.tokens) for s in summaries]),
        "greedy/eos_share": mean([float(s.ended) for s in summaries]),
    }
    if has_column(data_dir, table, "reference_response_token"):
        references = read_column(data_dir, table, "reference_response", len(samples))
        if rouge := rouge_rows(references, [s.text for s in summaries]):
            metrics["greedy/rougeL"] = mean([row["rougeL"] for row in rouge])
    if gold:
        metrics["greedy/gold"] = mean(gold_scores(gold, posts, summaries))
    return metrics
