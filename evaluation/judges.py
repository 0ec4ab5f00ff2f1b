"""Judges of two summaries: the toy world's gold reward, a reward model, a language model.

    judge(posts, summaries_a, summaries_b) -> preferences

A preference is one number in [0, 1] per post: 1 = A is better, 0.5 = a tie, nan = no verdict. To add a judge,
write a function or class that returns such a callable and put it in JUDGES. Its keyword parameters are filled
by name from the options of evaluate.py (`make_judge`). A judge may also have `details(posts, summaries_a,
summaries_b)`, one dict per post, whose values become columns of the table: the language model's answers.
"""

import inspect
import math
from collections.abc import Callable

import torch

from data.gold import gold
from evaluation.llm_judge import LLMJudge
from evaluation.statistics import paired_bootstrap, win_rate
from rlhf.common import frozen, load_model
from rlhf.config import UserError
from rlhf.dist import deal, gather
from rlhf.forward import response_scores
from rlhf.groups import micro_batches, pack
from rlhf.summaries import Post, Summary, gold_scores

Judge = Callable[[list[Post], list[Summary], list[Summary]], list[float]]


class ScoreJudge:
    """The higher score wins, equal scores are a tie, nan is no verdict. `score(posts, summaries)` gives one
    number each."""

    def __init__(self, score: Callable[[list[Post], list[Summary]], list[float]]):
        self.score = score

    def __call__(
        self, posts: list[Post], summaries_a: list[Summary], summaries_b: list[Summary],
    ) -> list[float]:
        pairs = zip(self.score(posts, summaries_a), self.score(posts, summaries_b), strict=True)
        return [math.nan if math.isnan(a - b) else 0.5 if a == b else float(a > b) for a, b in pairs]


def gold_judge(*, data_dir: str) -> ScoreJudge:
    """The exact gold reward, in a world that has one."""
    true_reward = gold(data_dir)
    if true_reward is None:
        raise UserError(f"--judge=gold: {data_dir} has no column `facts`, so nobody knows the true reward "
                        "there; only the data of data/toy.py has it (use --judge=rm or --judge=llm)")
    return ScoreJudge(lambda posts, summaries: gold_scores(true_reward, posts, summaries))


def reward_model_judge(
    *, reward_model: str, revision: str, data_dir: str,
    device: torch.device, dtype: str, micro_batch_tokens: int,
) -> ScoreJudge:
    """A reward model's score of the last token, without a missing-EOS rule; nothing is scored twice."""
    if not reward_model:
        raise UserError("--judge=rm needs --reward_model (train one with train_rm.py)")
    model = frozen(load_model(
        reward_model, data_dir=data_dir, revision=revision, head="score", device=device, dtype=dtype
    ))
    context = model.config.max_position_embeddings
    known: dict[tuple, float] = {}  # (query tokens, summary tokens) -> score

    @torch.no_grad()
    def score(posts: list[Post], summaries: list[Summary]) -> list[float]:
        keys = [(tuple(p.query_token), tuple(s.tokens)) for p, s in zip(posts, summaries, strict=True)]
        new = list(dict.fromkeys(key for key in keys if key not in known))
        prompts = [list(query) for query, _ in new]
        responses = [[list(tokens)] for _, tokens in new]
        slices = deal(micro_batches(prompts, responses, micro_batch_tokens))
        parts = []
        for s in slices:
            groups = pack(prompts[s], responses[s], max_positions=context, device=device)
            scores = response_scores(model, groups)[:, 0]  # (n,)
            parts.append(scores.tolist())
        known.update(zip(new, [score for part in gather(parts, slices) for score in part]))
        return [known[key] for key in keys]

    return ScoreJudge(score)


JUDGES: dict[str, Callable[..., Judge]] = {"gold": gold_judge, "rm": reward_model_judge, "llm": LLMJudge}


def make_judge(name: str, **options) -> Judge:
    """JUDGES[name], given the options that its parameters name."""
    return JUDGES[name](**{key: options[key] for key in inspect.signature(JUDGES[name]).parameters})


def parse_judges(text: str) -> list[str]:
    """"gold,rm" -> ["gold", "rm"], "none" -> []. UserError for an unknown judge and for one named twice."""
    names = [] if text in ("", "none") else text.split(",")
    for name in names:
        if name not in JUDGES:
            known = ", ".join(["none", *JUDGES])
            raise UserError(f"--judge={text}: no judge {name!r}; known: {known}, or several joined by ','")
        if names.count(name) > 1:
            raise UserError(f"--judge={text}: names {name!r} twice")
    return names


def longer_wins(
    size: Callable[[Summary], int], preferences: list[float], chosen: list[Summary], rejected: list[Summary],
) -> list[float]:
    """The preferences of a judge that takes the longer summary, nan where `preferences` is."""
    wins = []
    for preference, c, r in zip(preferences, chosen, rejected):
        longer = 0.5 if size(c) == size(r) else float(size(c) > size(r))
        wins.append(math.nan if math.isnan(preference) else longer)
    return wins


def agreement(
    judge: Judge, posts: list[Post], chosen: list[Summary], rejected: list[Summary],
) -> dict[str, float | int | str | bool | None]:
    """How often a judge prefers what a person chose (ties half), and how often "the longer one wins" does so
    on the same pairs.

    Longer in tokens or in characters (`longer_by`), whichever people chose more often: a judge that looks at
    one of the two may beat the other. `beats_length` is False unless the paired 95 % interval of the
    difference lies above 0: until then nothing shows that the judge knows more than the length.
    """
    preferences = judge(posts, chosen, rejected)
    sizes = {"tokens": lambda summary: len(summary.tokens), "characters": lambda summary: len(summary.text)}
    longer = {unit: longer_wins(size, preferences, chosen, rejected) for unit, size in sizes.items()}
    unit = max(longer, key=lambda unit: win_rate(longer[unit])["win_rate"] or 0.0)
    agreed = win_rate(preferences)
    over = paired_bootstrap(longer[unit], preferences)
    return {
        "agreement": agreed["win_rate"],
        "agreement_low": agreed["win_rate_low"],
        "agreement_high": agreed["win_rate_high"],
        "pairs": agreed["judged"],
        "unjudged": agreed["unjudged"],
        "longer_wins": win_rate(longer[unit])["win_rate"],
        "longer_by": unit,
        "over_longer": over["difference"],
        "over_longer_low": over["difference_low"],
        "over_longer_high": over["difference_high"],
        "beats_length": bool(over["paired"]) and over["difference_low"] > 0,
    }
