"""Who wins? Judges behind one signature, whatever they are: the toy world's gold reward, a reward model, a language model.

    judge(posts, summaries_a, summaries_b) -> preferences: one number in [0, 1] per post, 1 = A is better, 0.5 = a tie, nan = no verdict

To add a judge, write a function or class that returns such a callable and put it in JUDGES. Its keyword parameters are filled by name from
the options of evaluate.py (`make_judge`). The language model also has `details(posts, a, b)`: what it answered, for the table.
"""

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from rlhf.common import autocast, frozen
from rlhf.config import UserError
from rlhf.data import check_tokenizer, has_column, read_table
from rlhf.groups import micro_batches, pack
from rlhf.llm_judge import LLMJudge
from rlhf.model import EOS
from rlhf.pretrained import from_pretrained, load_tokenizer
from rlhf.stats import paired_bootstrap, win_rate
from rlhf.text_metrics import mean, text_means, text_rows


@dataclass(frozen=True)
class Post:
    id: str
    query: str
    query_token: list[int]
    facts: dict | None  # the toy world's hidden truth


@dataclass(frozen=True)
class Summary:
    text: str
    tokens: list[int]  # with EOS, if there is one
    ended: bool  # has an EOS


Judge = Callable[[list[Post], list[Summary], list[Summary]], list[float]]


class ScoreJudge:
    """The higher score wins, equal scores are a tie. `score(posts, summaries)` gives one number each."""

    def __init__(self, score: Callable[[list[Post], list[Summary]], list[float]]):
        self.score = score

    def __call__(self, posts: list[Post], summaries_a: list[Summary], summaries_b: list[Summary]) -> list[float]:
        pairs = zip(self.score(posts, summaries_a), self.score(posts, summaries_b), strict=True)
        return [0.5 if a == b else float(a > b) for a, b in pairs]


def gold_judge() -> ScoreJudge:
    """The toy world's exact gold reward."""
    from data.toy_world import gold_rewards

    def score(posts: list[Post], summaries: list[Summary]) -> list[float]:
        if any(post.facts is None for post in posts):
            raise UserError("the gold reward needs the column `facts`: only the data of data/toy.py has it (use --judge=rm or --judge=llm)")
        return gold_rewards([p.facts for p in posts], [s.text for s in summaries], [s.ended for s in summaries])

    return ScoreJudge(score)


def reward_model_judge(*, reward_model: str, revision: str, data_dir: str, device: torch.device, dtype: str,
                       micro_batch_tokens: int) -> ScoreJudge:
    """A reward model's score, read at the last token there is: raw, without a missing-EOS rule. What was scored once is remembered."""
    if not reward_model:
        raise UserError("--judge=rm needs --reward_model (train one with train_rm.py)")
    model = frozen(from_pretrained(reward_model, revision=revision, head="score", device=device), device, dtype)
    check_tokenizer(data_dir, load_tokenizer(reward_model, revision), model.config.vocab_size, reward_model)
    known: dict[tuple, float] = {}

    @torch.no_grad()
    def score(posts: list[Post], summaries: list[Summary]) -> list[float]:
        keys = [(tuple(p.query_token), tuple(s.tokens)) for p, s in zip(posts, summaries, strict=True)]
        new = list(dict.fromkeys(key for key in keys if key not in known))
        prompts, responses = [list(query) for query, _ in new], [[list(tokens)] for _, tokens in new]
        for s in micro_batches(prompts, responses, micro_batch_tokens):
            groups = pack(prompts[s], responses[s], max_positions=model.config.max_position_embeddings, device=device)
            with autocast(device, dtype):
                hidden = model(groups.ids, groups.positions, groups.attend)  # (T, C)
            known.update(zip(new[s], model.scores(hidden[groups.last])[:, 0].tolist()))
        return [known[key] for key in keys]

    return ScoreJudge(score)


JUDGES: dict[str, Callable[..., Judge]] = {"gold": gold_judge, "rm": reward_model_judge, "llm": LLMJudge}


def make_judge(name: str, **options) -> Judge:
    """JUDGES[name], given the options that its parameters name."""
    return JUDGES[name](**{key: options[key] for key in inspect.signature(JUDGES[name]).parameters})


def parse_judges(text: str) -> list[str]:
    """"gold,rm" -> ["gold", "rm"], "none" -> []; UserError for a judge that JUDGES does not know or that is named twice."""
    names = [] if text in ("", "none") else text.split(",")
    for name in names:
        if name not in JUDGES:
            raise UserError(f"--judge={text}: no judge {name!r}; known: none, {', '.join(JUDGES)}, or several joined by ','")
        if names.count(name) > 1:
            raise UserError(f"--judge={text}: names {name!r} twice")
    return names


# --- data


def read_posts(data_dir: str, table: str, columns: list[str], limit: int = 0) -> tuple[list[Post], dict[str, list]]:
    """The posts of a prepared table, and the named further columns."""
    rows = read_table(data_dir, table, ["id", "query", "query_token", *columns], limit)
    facts = read_table(data_dir, table, ["facts"], limit)["facts"] if has_column(data_dir, table, "facts") else []
    hidden = [json.loads(f) for f in facts] or [None] * len(rows["id"])
    return [Post(*row) for row in zip(rows["id"], rows["query"], rows["query_token"], hidden)], rows


def human_summaries(texts: list[str], tokens: list[list[int]]) -> list[Summary]:
    return [Summary(text, ids, bool(ids) and ids[-1] == EOS) for text, ids in zip(texts, tokens, strict=True)]


def decoded(tokenizer: Tokenizer, samples: list[list[list[int]]], ended: Tensor) -> list[Summary]:
    """What `generate_all` returned with K = 1, as summaries."""
    tokens = [sample for (sample,) in samples]
    texts = tokenizer.decode_batch([[t for t in ids if t != EOS] for ids in tokens])
    return [Summary(*row) for row in zip(texts, tokens, ended[:, 0].tolist(), strict=True)]


# --- numbers


def summary_rows(posts: list[Post], references: list[Summary], summaries: list[Summary]) -> list[dict]:
    """What is known of each summary without a model: ROUGE, repetition, novelty, and in the toy world the gold reward."""
    rows = text_rows([p.query for p in posts], [r.text for r in references], [s.text for s in summaries])
    gold = gold_judge().score if posts[0].facts is not None else None
    own, human = (gold(posts, summaries), gold(posts, references)) if gold else ([None] * len(posts),) * 2
    return [{**row, "gold": g, "gold_reference": h} for row, g, h in zip(rows, own, human)]


def summary_means(rows: list[dict], references: list[Summary], summaries: list[Summary]) -> dict[str, float | None]:
    """Means of the `summary_rows`, the numbers of all texts together, length in tokens (EOS included), share of summaries with an EOS."""
    return {**text_means(rows, [s.text for s in summaries]), "response_length": mean([len(s.tokens) for s in summaries]),
            "reference_length": mean([len(r.tokens) for r in references]), "eos_share": mean([float(s.ended) for s in summaries])}


def summary_metrics(data_dir: str, table: str, tokenizer: Tokenizer, samples: list[list[list[int]]], ended: Tensor) -> dict[str, float | None]:
    """The few numbers a training script ends with, of one greedy summary for each of the first rows of an sft table."""
    posts, rows = read_posts(data_dir, table, ["reference_response", "reference_response_token"], len(samples))
    references, summaries = human_summaries(rows["reference_response"], rows["reference_response_token"]), decoded(tokenizer, samples, ended)
    measured = summary_rows(posts, references, summaries)
    out = {"greedy/rougeL": mean([row["rougeL"] for row in measured]), "greedy/tokens": mean([len(s.tokens) for s in summaries]),
           "greedy/eos_share": mean([float(s.ended) for s in summaries])}
    return out if measured[0]["gold"] is None else {**out, "greedy/gold": mean([row["gold"] for row in measured])}


def agreement(judge: Judge, posts: list[Post], chosen: list[Summary], rejected: list[Summary]) -> dict[str, float | int | bool | None]:
    """How often a judge prefers what a person chose (ties half), beside "the longer one wins" on the same pairs.

    Longer by tokens or by characters (`longer_by`), whichever people chose more often: to take the longer in one unit is to beat the other.
    `beats_length` is False unless the paired 95 % interval of the difference lies above 0: such a judge knows no more than a ruler.
    """
    preferences = judge(posts, chosen, rejected)
    sizes = {"tokens": lambda s: len(s.tokens), "characters": lambda s: len(s.text)}
    longer = {unit: [math.nan if math.isnan(p) else 0.5 if size(c) == size(r) else float(size(c) > size(r))
                     for p, c, r in zip(preferences, chosen, rejected)] for unit, size in sizes.items()}
    unit = max(longer, key=lambda unit: win_rate(longer[unit])["win_rate"] or 0.0)
    share, ruler, over = win_rate(preferences), win_rate(longer[unit]), paired_bootstrap(longer[unit], preferences)
    return {"agreement": share["win_rate"], "agreement_low": share["win_rate_low"], "agreement_high": share["win_rate_high"],
            "pairs": share["judged"], "unjudged": share["unjudged"], "longer_wins": ruler["win_rate"], "longer_by": unit,
            "over_longer": over["difference"], "over_longer_low": over["difference_low"], "over_longer_high": over["difference_high"],
            "beats_length": bool(over["paired"]) and over["difference_low"] > 0}
