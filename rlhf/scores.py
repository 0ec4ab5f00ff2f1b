"""Where the scores of responses come from: reward models, a function of your own, the toy world's truth.

    scorer(drawn, responses, ended) -> {"scores": (N, K), ...}

Several reward models make one score by MIXES; --reward_mix=uwo:0.1 is a name and its coefficient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature

import torch
from tokenizers import Tokenizer
from torch import Tensor

from rlhf.config import UserError
from rlhf.dist import deal, gather, on_first
from rlhf.forward import response_scores
from rlhf.groups import micro_batches
from rlhf.model import EOS, NeoX
from rlhf.reward_fn import RewardFn, rewards_of
from rlhf.rewards import missing_eos
from rlhf.summaries import Gold, texts_of

# --- scores of M reward models, (M, N, K) -> (N, K): reward model ensembles (Coste et al., arXiv 2310.02743)


def mean(scores: Tensor) -> Tensor:
    return scores.mean(0)


def worst(scores: Tensor) -> Tensor:
    """Worst-case optimisation."""
    return scores.amin(0)


def uncertainty_weighted(scores: Tensor, coefficient: float = 0.1) -> Tensor:
    """Mean - coefficient x variance, with M below the sum of squares."""
    return scores.mean(0) - coefficient * scores.var(0, correction=0)


def softmin(scores: Tensor, beta: float = 1.0) -> Tensor:
    """-beta log mean exp(-r / beta): the mean for a large beta, the smallest for a small one."""
    return -beta * ((-scores / beta).logsumexp(0) - math.log(len(scores)))


def first(scores: Tensor) -> Tensor:
    """The first alone; the others watch: their spread is logged, `rm_std`."""
    return scores[0]


MIXES = {"mean": mean, "min": worst, "uwo": uncertainty_weighted, "softmin": softmin, "first": first}


def parse_mix(text: str) -> Callable[[Tensor], Tensor]:
    """"uwo:0.1" -> the mixing function with that coefficient, "uwo" with its default."""
    name, colon, number = text.partition(":")
    if name not in MIXES:
        raise UserError(f"--reward_mix={text}: known are {', '.join(MIXES)}, as in uwo:0.1")
    if not colon:
        return MIXES[name]
    try:
        coefficient = float(number)
    except ValueError:
        coefficient = math.nan
    if len(signature(MIXES[name]).parameters) < 2 or not 0 < coefficient < math.inf:
        raise UserError(f"--reward_mix={text}: uwo and softmin take a number above 0, others none")
    return lambda scores: MIXES[name](scores, coefficient)


# --- what is read of a response


def after_marker(
    responses: list[list[list[int]]], ended: Tensor, marker: str, tokenizer: Tokenizer,
) -> tuple[list[list[list[int]]], Tensor]:
    """What follows the last marker in each response, and `ended` (N, K).

    RLMT (arXiv 2509.20357): the reward reads the answer, not the thoughts before it. `ended` is False too
    where there is no marker: the missing-EOS rule is also that for a response that never answers.
    """
    K = len(responses[0])
    parts = [text.rpartition(marker) for text in texts_of(tokenizer, responses)]
    answers = [encoding.ids for encoding in tokenizer.encode_batch([after for _, _, after in parts])]
    own = [ids for group in responses for ids in group]
    answers = [a + [EOS] * (y[-1:] == [EOS]) for a, y in zip(answers, own)]
    found = torch.tensor([bool(mark) for _, mark, _ in parts]).view(-1, K)
    answers = [a if mark else y for a, y, (_, mark, _) in zip(answers, own, parts)]
    return [answers[n : n + K] for n in range(0, len(answers), K)], ended & found.to(ended.device)


# --- scores


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Scores of K responses to each of N prompts, after the missing-EOS rule.

    Called with columns of the prompts: query_token; references, a list of none or one human response, which
    a reward model scores too, in the same row; facts, where the truth is known.
    """

    device: torch.device
    tokenizer: Tokenizer
    pack_rows: Callable  # (prompts, responses) -> Groups
    max_tokens: int  # of a row
    models: list[NeoX]  # one or several reward models, or none:
    mix: Callable[[Tensor], Tensor] = mean
    reward_fn: RewardFn | None = None  # then this function scores,
    compare_fn: RewardFn | None = None  # this one compares the two responses of a prompt,
    truth: Gold | None = None  # or, without either, the truth scores; with one it is only logged
    rule: str = "none"  # missing EOS
    penalty: float = 1.0
    marker: str = ""  # only what follows it is read

    @torch.no_grad()
    def __call__(self, drawn: dict[str, list], responses: list, ended: Tensor) -> dict[str, Tensor]:
        """(N, K): ended, raw_scores, scores; gold, rm_std where known; reference_scores (N, 0 or 1); of a
        compare_fn wins (N,)."""
        ended = ended.to(self.device)
        found = {"ended": ended}
        if self.marker:
            responses, ended = after_marker(responses, ended, self.marker, self.tokenizer)
        function = self.reward_fn or self.compare_fn
        texts = texts_of(self.tokenizer, responses) if self.truth or function else []
        if self.truth:
            facts = [f for f in drawn["facts"] for _ in responses[0]]
            gold = self.truth(facts, texts, ended.flatten().tolist())
            found["gold"] = torch.tensor(gold, device=self.device).view(ended.shape)
        if self.models:
            found |= self.model_scores(drawn["query_token"], responses, drawn.get("references"))
        elif function:
            K = len(responses[0]) if self.reward_fn else 1
            queries = [query for query in self.tokenizer.decode_batch(drawn["query_token"]) for _ in range(K)]
            compared = [texts] if self.reward_fn else [texts[::2], texts[1::2]]
            returned = on_first(lambda: rewards_of(function, queries, *compared)).to(self.device)
            found |= {"raw_scores": returned.view(-1, K)} if self.reward_fn else self.won(returned, ended)
        else:
            found["raw_scores"] = found["gold"]
        found["scores"] = missing_eos(found["raw_scores"], ended, rule=self.rule, penalty=self.penalty)
        return found

    def won(self, wins: Tensor, ended: Tensor) -> dict[str, Tensor]:
        """P(the first is better) (N,), and as scores (N, 2). One without EOS loses against one with it."""
        first, second = ended.T
        if self.rule != "none":
            wins = torch.where(first == second, wins, first.to(wins))
        return {"wins": wins, "raw_scores": torch.stack([wins, 1 - wins], 1)}

    def model_scores(self, prompts: list, responses: list, references: list | None) -> dict[str, Tensor]:
        """The human references are response K + 1 of their row."""
        K = len(responses[0])
        rows = [own + human for own, human in zip(responses, references or [[]] * len(prompts))]
        slices = deal(micro_batches(prompts, rows, self.max_tokens))
        parts = []
        for s in slices:
            groups = self.pack_rows(prompts[s], rows[s])
            parts.append(torch.stack([response_scores(model, groups) for model in self.models]))
        each = torch.cat(gather(parts, slices), 1)  # (M, N, K or K + 1)
        scores = self.mix(each)  # (N, K or K + 1)
        found = {"raw_scores": scores[:, :K], "reference_scores": scores[:, K:]}
        if len(self.models) > 1:
            found["rm_std"] = each[..., :K].std(0)  # (N, K)
        return found
