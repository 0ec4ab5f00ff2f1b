"""What a preference loss reads beside log-probs: columns of the table, and what models compute.

A batch is a dict of columns, one entry per prompt: `prompts`, `responses` (best first), and what the loss
reads beside them, by the names in its signature (`extras` in losses.py). Nothing else is read or computed.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf.config import UserError
from rlhf.data import check_tables, column_names, has_column, read_table
from rlhf.dist import deal
from rlhf.forward import TokenStats, token_stats
from rlhf.groups import Groups, micro_batches
from rlhf.losses import RANKED
from rlhf.masked import masked_mean, seq_logprobs
from rlhf.model import EOS, NeoX

# extra: its columns
COLUMNS = {
    "labels": ["preference"],
    "scores": ["rewards"],
    "objectives": ["chosen_parts", "rejected_parts"],  # named parts of each response's reward
}
MADE_BY = {"preference": "data/toy.py and data/tldr.py"}  # a column: what writes it, if not data/toy.py alone
MEANING = {
    "preference": "the probability that chosen is preferred",
    "rewards": "a list with one score per response",
    "chosen_parts": "the scores of chosen by name", "rejected_parts": "the scores of rejected by name",
}
AGAIN = "\n\nTL;DR:"  # after an answer that is shown: asks for another one

Batch = dict[str, list | Tensor]


# --- tables


def read_preferences(data_dir: str, table: str, loss: str, reads: set[str], limit: int = 0) -> Batch:
    """A table of pairs or rankings with the columns that the loss reads. UserError names what is missing."""
    ranked = table.startswith("rankings")
    columns = ["responses_token"] if ranked else ["chosen_token", "rejected_token"]
    wanted = [extra for extra in COLUMNS if extra in reads]
    if not ranked and "scores" in wanted:  # the order of a pair is its ranking
        wanted.remove("scores")
    columns += [column for extra in wanted for column in COLUMNS[extra]]
    if not ranked and not column_names(data_dir, table) and column_names(data_dir, "rankings_train"):
        ranked_losses = " and --loss=".join(sorted(RANKED))
        raise UserError(f"{data_dir} has rankings and no {table}: --loss={loss} compares two responses; "
                        f"rankings are for --loss={ranked_losses}")
    for column in columns:
        if not has_column(data_dir, table, column) and not column.endswith("_token"):
            raise UserError(f"{data_dir}/{table}.parquet has no column {column}, which --loss={loss} reads: "
                            f"{MEANING[column]}. Add it to your tables, or take another loss "
                            f"({MADE_BY.get(column, 'data/toy.py')} writes it)")
    check_tables(data_dir, [], (table, limit, 0))
    rows = read_table(data_dir, table, ["query_token", *columns], limit)
    pairs = None if ranked else [list(pair) for pair in zip(rows["chosen_token"], rows["rejected_token"])]
    batch = {"prompts": rows["query_token"], "responses": pairs or rows["responses_token"]}
    path = f"{data_dir}/{table}.parquet"
    check_parts(path, rows)
    if "labels" in wanted:
        batch["labels"] = rows["preference"]
    if "scores" in wanted:
        batch["scores"] = rows["rewards"]
    if "objectives" in wanted:
        both = zip(rows["chosen_parts"], rows["rejected_parts"])
        batch["objectives"] = [[better[part] - worse[part] for part in better] for better, worse in both]
    check_preferences(path, batch)
    return batch


def read_sft(data_dir: str, table: str) -> Batch:
    """What SFT learned from, as columns that stand beside a pair's."""
    rows = read_table(data_dir, table, ["query_token", "reference_response_token"])
    return {"other_prompts": rows["query_token"], "other_responses": rows["reference_response_token"]}


def check_preferences(path: str, batch: Batch) -> None:
    for i, label in enumerate(batch.get("labels", [])):
        if not is_number(label) or not 0 <= label <= 1:
            raise UserError(f"{path}: the preference of row {i} is {label!r}; it is a probability, from 0 to "
                            "1: mend the row, or take it out")
    for i, scores in enumerate(batch.get("scores", [])):
        K = len(batch["responses"][i])
        if not isinstance(scores, list) or len(scores) != K or not all(map(is_number, scores)):
            raise UserError(f"{path}: the rewards of row {i} are {scores!r}; expected {K} numbers, one per "
                            "response: mend the row, or take it out")


def check_parts(path: str, rows: dict[str, list]) -> None:
    for column in set(COLUMNS["objectives"]) & rows.keys():
        for i, parts in enumerate(rows[column]):
            if not isinstance(parts, dict) or not all(map(is_number, parts.values())):
                raise UserError(f"{path}: {column} of row {i} is {parts!r}; expected numbers by name: mend "
                                "the row, or take it out")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def rows_of(batch: Batch, rows: list[int] | slice) -> Batch:
    """Some rows of a batch."""
    if isinstance(rows, slice):
        return {key: values[rows] for key, values in batch.items()}
    return {key: [values[i] for i in rows] for key, values in batch.items()}


def slices_of(batch: Batch, tokens: int, reads: set[str], again: list[int]) -> list[slice]:
    """This rank's micro-batches of at most this many tokens, those of the further groups of a loss among
    them."""
    prompts, responses = batch["prompts"], batch["responses"]
    held = list(responses)  # of each pair what its rows hold beside the prompt
    if "improved" in reads:
        shown = [shown_prompts(*pair, again) for pair in zip(prompts, responses)]
        held = [answers + both + 2 * answers for answers, both in zip(held, shown)]
    if "other_prompts" in batch:
        others = zip(held, batch["other_prompts"], batch["other_responses"])
        held = [[*parts, prompt, response] for parts, prompt, response in others]
    return deal(micro_batches(prompts, held, tokens))


# --- what models compute


def other_logprobs(model: NeoX, batch: Batch, pack_rows: Callable[..., Groups]) -> Tensor:
    """(N,) log pi of the one more response beside each pair: what SFT learned from, or a sample."""
    groups = pack_rows(batch["other_prompts"], [[response] for response in batch["other_responses"]])
    return seq_logprobs(token_stats(model, groups).logprobs, groups.response_mask)[:, 0]


def shown_prompts(prompt: list[int], answers: list[list[int]], again: list[int]) -> list[list[int]]:
    """Per answer a prompt that shows it and asks for another one."""
    return [prompt + [token for token in answer if token != EOS] + again for answer in answers]


def shown_logprobs(model: NeoX, batch: Batch, again: list[int], pack_rows: Callable[..., Groups]) -> Tensor:
    """(N, 2, 2) log pi(y_j | x, y_i): answer i stands behind the prompt, and answer j is given."""
    pairs = zip(batch["prompts"], batch["responses"])
    shown = [prompt for pair in pairs for prompt in shown_prompts(*pair, again)]
    groups = pack_rows(shown, [answers for answers in batch["responses"] for _ in answers])
    return seq_logprobs(token_stats(model, groups).logprobs, groups.response_mask).view(-1, 2, 2)


def competitors(stats: TokenStats, k: int) -> Tensor:
    """(N, K, R, k) log-probs of the k best tokens other than the response's own; stats has k + 1 of them."""
    return stats.top_logprobs.masked_fill(stats.top_is_token, -torch.inf).topk(k, -1).values


def model_extras(
    reads: set[str], batch: Batch, stats: TokenStats, policy: NeoX, reference: NeoX | None,
    pack_rows: Callable[..., Groups], *, again: list[int], top_k: int,
) -> dict[str, Tensor]:
    """The extras of a micro-batch that take another forward, or a look at the whole distribution."""
    out = {}
    if "competitors" in reads:
        out["competitors"] = competitors(stats, top_k)[:, 1]  # (N, R, k), of the rejected response
    if "target" in reads:
        out["target"] = other_logprobs(policy, batch, pack_rows)  # (N,)
    if "calibration" in reads and "other_prompts" in batch:
        with torch.no_grad():
            ref_logprobs = other_logprobs(reference, batch, pack_rows)
        out["calibration"] = other_logprobs(policy, batch, pack_rows) - ref_logprobs  # (N,)
    if "improved" in reads:
        with torch.no_grad():
            ref_logprobs = shown_logprobs(reference, batch, again, pack_rows)
        out["improved"] = shown_logprobs(policy, batch, again, pack_rows) - ref_logprobs  # (N, 2, 2)
    return out


def given_extras(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The extras of a micro-batch that are columns of it."""
    columns = {*COLUMNS, "noise", "target_margins"} & batch.keys()
    return {key: torch.as_tensor(batch[key], dtype=torch.float32).to(device) for key in columns}


# --- what is logged


def top_tokens(top_logprobs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Probability mass of the k best tokens, and the entropy in nats of the distribution over them alone.

    Means over response tokens, (N, K). Both fall before a policy is over-optimised (arXiv 2410.11677).
    """
    mass = top_logprobs.exp().sum(-1)  # (N, K, R)
    logp = top_logprobs.log_softmax(-1)  # (N, K, R, k)
    entropy = -(logp.exp() * logp).sum(-1)  # (N, K, R)
    return {"top_mass": masked_mean(mass, mask), "top_entropy": masked_mean(entropy, mask)}
