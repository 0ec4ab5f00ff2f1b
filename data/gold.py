"""Which prepared data has a true reward: the toy world's, whose gold reward is exact. Nobody knows that of
real posts."""

import json
from collections.abc import Callable

from data.toy_world import gold_rewards
from rlhf.data import has_column

Gold = Callable[[list[str], list[str], list[bool]], list[float]]


def gold(data_dir: str) -> Gold | None:
    """score(facts, texts, ended) -> the true reward of each text, or None where nobody knows it.

    facts   the column `facts` of each text's post, as it stands in the tables
    texts   summaries without EOS; ended: whether each had one
    """
    if not has_column(data_dir, "sft_train", "facts"):
        return None

    def score(facts: list[str], texts: list[str], ended: list[bool]) -> list[float]:
        return gold_rewards([json.loads(f) for f in facts], texts, ended)

    return score
