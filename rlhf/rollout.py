"""How the responses of an update are drawn.

A rollout is `f(sample, score, drawn, k, R, lap) -> Rollout`, an entry of ROLLOUTS. `drawn` are the columns of
the update's prompts (query_token, references, ...), `sample(prompts, k)` gives k responses of at most R
tokens to each and whether they ended, `score` is a Scorer, `lap` names what the time was spent on.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from rlhf.common import frozen
from rlhf.dist import on_first
from rlhf.files import replace_directory
from rlhf.model import EOS, NeoX, compile_layers
from rlhf.pretrained import from_pretrained, save_pretrained

ROUNDS = 4  # of Reinforce-Ada, at most


@dataclass
class Rollout:
    """N rows of one prompt and K responses.

    prompts    [N] what the policy went on from: query_token, and the forced tokens of a reset
    responses  [N][K] what it sampled
    scored     what the Scorer found, (N, K) each
    weights    (N, 1) of the rows in the mean
    left_out   (N, 1) mean score of all samples drawn for the prompt minus that of the K; None: 0
    log        numbers about the drawing itself
    """

    prompts: list[list[int]]
    responses: list[list[list[int]]]
    scored: dict[str, Tensor]
    weights: Tensor
    left_out: Tensor | None = None
    log: dict[str, float] = field(default_factory=dict)


def rollout_of(prompts: list, responses: list, scored: dict[str, Tensor]) -> Rollout:
    """One whose rows count equally."""
    return Rollout(prompts, responses, scored, torch.ones_like(scored["scores"][:, :1]))


def take(drawn: dict[str, list], rows: list[int]) -> dict[str, list]:
    return {column: [values[i] for i in rows] for column, values in drawn.items()}


def one_by_one(sample: Callable, score: Callable, drawn: dict, k: int, R: int, lap: Callable) -> Rollout:
    """k responses to each prompt."""
    prompts = drawn["query_token"]
    responses, ended = sample(prompts, k)
    lap("rollout")
    return rollout_of(prompts, responses, score(drawn, responses, ended))


WATCHED = 3  # validation prompts whose responses a run shows again and again


def watched(sample: Callable, score: Callable, valid: dict[str, list], k: int, seed: int) -> Rollout:
    """k responses to the same few prompts from the same random numbers whenever it is called: what differs
    is the policy. What the training draws stays as it is."""
    drawn = take(valid, list(range(min(WATCHED, len(valid["query_token"])))))
    generator = torch.Generator(score.device).manual_seed(seed)
    return one_by_one(partial(sample, generator=generator), score, drawn, k, 0, lambda phase: None)


# --- dataset reset (DR-PO, arXiv 2404.08495)


def forced_tokens(references: list[list[list[int]]], share: float, R: int, seed: int) -> list[list[int]]:
    """The first L tokens of a share of the human responses, else none. L ~ uniform on {1, ..., length - 1},
    with room for one of R tokens after it."""
    generator = torch.Generator().manual_seed(seed)
    coins, sizes = torch.rand(2, len(references), generator=generator)
    forced = []
    for (reference,), coin, size in zip(references, coins.tolist(), sizes.tolist()):
        most = min(len(reference), R) - 1
        L = 1 + int(size * most)
        forced.append(reference[:L] if coin < share and most > 0 else [])
    return forced


def reset(sample: Callable, score: Callable, drawn: dict, k: int, R: int, lap: Callable) -> Rollout:
    """The k responses to a prompt go on from its forced tokens, column `forced`.

    For the policy these are part of the prompt: no loss, log-prob, KL, entropy or length counts them. The
    whole is scored; it has at most R tokens.
    """
    forced = drawn["forced"]
    prompts = [query + first for query, first in zip(drawn["query_token"], forced)]
    responses, _ = sample(prompts, k)
    lap("rollout")
    responses = [[y[: R - len(first)] for y in group] for first, group in zip(forced, responses)]
    ended = torch.tensor([[y[-1] == EOS for y in group] for group in responses])
    answers = [[first + y for y in group] for first, group in zip(forced, responses)]
    return rollout_of(prompts, responses, score(drawn, answers, ended))


# --- rounds until there is something to compare (Reinforce-Ada, arXiv 2510.04996)


def balanced(positive: list[bool], k: int) -> list[int]:
    """k of the samples: the first k/2 positive and the first k/2 negative ones, or more of one kind where the
    other has fewer."""
    kinds = [[i for i, is_positive in enumerate(positive) if is_positive == kind] for kind in (True, False)]
    first = min(len(kinds[0]), max(k // 2, k - len(kinds[1])))
    return kinds[0][:first] + kinds[1][: k - first]


def adaptive(sample: Callable, score: Callable, drawn: dict, k: int, R: int, lap: Callable) -> Rollout:
    """Rounds of k samples for the prompts that do not yet have k/2 positive and k/2 negative ones, at most
    ROUNDS; k of them are learnt from. Positive: its score is above the human response's."""
    prompts = drawn["query_token"]
    pools = [[] for _ in prompts]  # the samples of each prompt
    active = list(range(len(prompts)))
    for _ in range(ROUNDS):
        some = take(drawn, active)
        responses, ended = sample(some["query_token"], k)
        lap("rollout")
        found = score(some, responses, ended)
        for n, samples in zip(active, samples_of(responses, found)):
            pools[n] += samples
        lap("scoring")
        active = [n for n in active if lacks_a_kind(pools[n], k)]
        if not active:
            break
    kept = [[pool[i] for i in balanced([y["positive"] for y in pool], k)] for pool in pools]
    responses = [[y["response"] for y in group] for group in kept]
    tensor = partial(torch.tensor, device=found["scores"].device)
    scored = {name: tensor([[y[name] for y in group] for group in kept]) for name in found}  # (N, k)
    scored["reference_scores"] = scored["reference_scores"][:, :1]
    means = tensor([[sum(y["scores"] for y in pool) / len(pool)] for pool in pools])  # (N, 1)
    positive = [sum(y["positive"] for y in pool) / len(pool) for pool in pools]
    log = {
        "samples_drawn": float(sum(map(len, pools))),
        "never_positive": positive.count(0) / len(pools),
        "never_negative": positive.count(1) / len(pools),
    }
    left_out = means - scored["scores"].mean(1, keepdim=True)
    return Rollout(prompts, responses, scored, torch.ones_like(means), left_out, log)


def samples_of(responses: list, scored: dict[str, Tensor]) -> list[list[dict]]:
    """[N][K]: each response with the numbers that the Scorer found; positive: above the human response."""
    columns = {name: x.expand(len(x), len(responses[0])).tolist() for name, x in scored.items()}
    found = []
    for n, group in enumerate(responses):
        own = [{name: values[n][i] for name, values in columns.items()} for i in range(len(group))]
        found.append([
            {"response": y, "positive": numbers["scores"] > numbers["reference_scores"], **numbers}
            for y, numbers in zip(group, own)
        ])
    return found


def lacks_a_kind(samples: list[dict], k: int) -> bool:
    positive = sum(y["positive"] for y in samples)
    return min(positive, len(samples) - positive) < k // 2


# --- a budget per prompt (GVM, arXiv 2505.02391)


def shares(spread: Tensor, rows: int) -> list[int]:
    """`rows` more rows, dealt to the prompts in proportion to their spread (P,), by the largest remainder."""
    total = spread.sum()
    exact = rows * (spread / total if total > 0 else torch.full_like(spread, 1 / len(spread)))
    whole = exact.floor()
    rest = (exact - whole).argsort(descending=True, stable=True)[: rows - int(whole.sum())]
    whole[rest] += 1
    return whole.int().tolist()


def budget(sample: Callable, score: Callable, drawn: dict, k: int, R: int, lap: Callable) -> Rollout:
    """Each prompt has one row of k samples; as many rows again go where the scores of the first differ most.

    The variance of a mean over prompts is least when the samples of each are in proportion to the standard
    deviation of its gradient; here, as in a bandit, that of its scores stands for it (GVM multiplies an
    estimate of the gradient's norm with a term of the acceptance rate). Every prompt counts as much as any
    other: its rows share its weight.
    """
    prompts = drawn["query_token"]
    P = len(prompts)
    first = one_by_one(sample, score, drawn, k, R, lap)
    spread = first.scored["scores"].std(1).cpu()  # (P,)
    extra = shares(spread, P)
    more = [n for n, count in enumerate(extra) for _ in range(count)]
    lap("scoring")
    second = one_by_one(sample, score, take(drawn, more), k, R, lap)
    scored = {name: torch.cat([values, second.scored[name]]) for name, values in first.scored.items()}
    rows = torch.tensor(extra) + 1  # (P,) of each prompt
    weights = 2 / torch.cat([rows, rows[more]])  # (2 P,): sums to 2 over the rows of a prompt
    responses = first.responses + second.responses
    log = {"most_rows": float(rows.max())}
    weights = weights[:, None].to(scored["scores"])  # (2 P, 1)
    return Rollout(prompts + second.prompts, responses, scored, weights, log=log)


ROLLOUTS = {"plain": one_by_one, "reset": reset, "adaptive": adaptive, "budget": budget}


# --- two samplers, and a sampler that stays for a round


def two_samplers(
    sample: Callable, prompts: list, k: int, mixture: float, opponent: float | None,
) -> tuple[list, Tensor]:
    """k responses to each prompt, and `ended` (N, k): drawn with the reference's share `mixture`, with an
    `opponent` the last half of them with that share."""
    if opponent is None:
        return sample(prompts, k, mixture=mixture)
    own, own_ended = sample(prompts, k - k // 2, mixture=mixture)
    other, other_ended = sample(prompts, k // 2, mixture=opponent)
    return [a + b for a, b in zip(own, other)], torch.cat([own_ended, other_ended], 1)


def round_model(
    folder: Path, begins: bool, policy: NeoX, tokenizer: Tokenizer, dtype: str, compiled: bool,
) -> NeoX:
    """The policy as it was at the start of a round: written to its folder where one begins, and read back, so
    that a resumed run has the same, and each round's model can be evaluated."""
    if begins:
        aside = folder.with_name("writing")
        save_pretrained(policy, tokenizer, aside)
        on_first(lambda: replace_directory(aside, folder))  # all wait for it
    model = frozen(from_pretrained(str(folder), device=policy.device, dtype=dtype, sharded=True))
    if compiled:
        compile_layers(model)
    return model
