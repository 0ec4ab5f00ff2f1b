"""What is measured of a checkpoint: its summaries, one row each, and the numbers of all rows together.

Only what could be measured is written: without a reference a row has no `ref_logprob`, without judges a
result has no win rate.
"""

import math
import re
from pathlib import Path

import torch

from evaluation.statistics import by_length, length_controlled, position_bias, win_rate
from rlhf.common import frozen, load_model
from rlhf.dist import deal, gather
from rlhf.forward import token_stats
from rlhf.generate import generate_all
from rlhf.groups import micro_batches, pack
from rlhf.model import NeoX
from rlhf.pretrained import load_tokenizer, read_json
from rlhf.summaries import COUNTED, Gold, Post, Summary, mean, sampled_summaries, summary_means, summary_rows

HEADLINE = (  # of the first judge
    "win_rate", "win_rate_low", "win_rate_high", "lc_win_rate", "lc_win_rate_low", "lc_win_rate_high",
    "lc_extrapolated",
)
SUMMED = (
    "response_length", "logprob", "ref_logprob",
    "sample_length", "sample_entropy", "sample_kl", "sample_kl_full",
)


@torch.no_grad()
def token_columns(
    model: NeoX, reference: NeoX | None, prompts: list, responses: list, temperature: float, max_tokens: int,
) -> list[dict[str, torch.Tensor]]:
    """Per response, by token, (R,) float64: logprobs and entropy; with a reference ref_logprobs and kl."""
    context = min(m.config.max_position_embeddings for m in (model, reference or model))
    columns = ["logprobs", "entropy"] + (["ref_logprobs", "kl"] if reference else [])
    slices = deal(micro_batches(prompts, responses, max_tokens))
    parts = []
    for s in slices:
        groups = pack(prompts[s], responses[s], max_positions=context, device=model.device)
        stats = token_stats(model, groups, temperature, reference)  # (n, 1, R) each
        values = {name: getattr(stats, name)[:, 0].double().cpu() for name in columns}  # (n, R)
        parts.append([
            {name: column[i, : len(tokens)].clone() for name, column in values.items()}
            for i, (tokens,) in enumerate(responses[s])
        ])
    return [row for part in gather(parts, slices) for row in part]


def summarise(
    cfg, path: str, device: torch.device, reference: NeoX | None, gold: Gold | None,
    posts: list[Post], references: list[Summary], R: int,
) -> list[dict]:
    """One row per post: the summary of at most R tokens by the checkpoint at `path`, and what is measured of
    it without a judge, in nats per summary and in tokens with EOS. `cfg` is evaluate.Config."""
    model = frozen(load_model(
        path, data_dir=cfg.data_dir, revision=cfg.revision, device=device, dtype=cfg.dtype
    ))
    tokenizer = load_tokenizer(path, cfg.revision)
    prompts = [post.query_token for post in posts]

    def sample(temperature: float, top_p: float, seed: int, name: str):
        generator = torch.Generator(device).manual_seed(seed)
        return generate_all(
            model, prompts, 1, R, batch=cfg.rollout_prompts, temperature=temperature, top_p=top_p,
            generator=generator, progress=f"{path}: {name}",
        )

    def stats_of(responses: list, temperature: float) -> list[dict]:
        return token_columns(model, reference, prompts, responses, temperature, cfg.micro_batch_tokens)

    responses, ended = sample(cfg.temperature, cfg.top_p, cfg.seed, "summaries")
    summaries = sampled_summaries(tokenizer, responses, ended)
    counted = summary_rows(posts, references, summaries, gold)
    stats = stats_of(responses, cfg.temperature or 1.0)
    if not cfg.sample_temperature:
        sample_stats = [None] * len(posts)
    elif (cfg.temperature, cfg.top_p) == (cfg.sample_temperature, 1.0):
        sample_stats = stats  # the summaries are such samples
    else:
        others, _ = sample(cfg.sample_temperature, 1.0, cfg.seed + 1, "samples")
        sample_stats = stats_of(others, cfg.sample_temperature)
    rows = []
    for i, texts in enumerate(zip(posts, references, summaries, strict=True)):
        row = {**text_columns(*texts), **counted[i], **log_prob_columns(stats[i])}
        rows.append({**row, **sample_columns(sample_stats[i])})
    return rows


def text_columns(post: Post, human: Summary, own: Summary) -> dict:
    return {
        "id": post.id, "query": post.query, "reference": human.text, "summary": own.text,
        "ended": own.ended, "tokens": own.tokens,
        "response_length": len(own.tokens), "reference_length": len(human.tokens),
    }


def log_prob_columns(stats: dict[str, torch.Tensor]) -> dict:
    """Of the judged summary: its log-prob; with a reference model also that one's, and the log-ratios."""
    row = {"logprob": stats["logprobs"].sum().item()}
    if "ref_logprobs" in stats:
        row["ref_logprob"] = stats["ref_logprobs"].sum().item()
        row["log_ratios"] = (stats["logprobs"] - stats["ref_logprobs"]).tolist()
    return row


def sample_columns(stats: dict[str, torch.Tensor] | None) -> dict:
    """Of the sample that KL and entropy are measured on, if there is one."""
    if stats is None:
        return {}
    row = {"sample_length": len(stats["logprobs"]), "sample_entropy": stats["entropy"].sum().item()}
    if "ref_logprobs" in stats:
        row["sample_kl"] = (stats["logprobs"] - stats["ref_logprobs"]).sum().item()
        row["sample_kl_full"] = stats["kl"].sum().item()
    return row


def summaries_of(rows: list[dict]) -> list[Summary]:
    return [Summary(row["summary"], row["tokens"], row["ended"]) for row in rows]


def verdict(rows: list[dict], judge: str) -> dict:
    """What a judge's preferences say: win rate, at equal length, by length, and its position bias."""
    preferences = [row[f"preference/{judge}"] for row in rows]
    lengths = [row["response_length"] for row in rows]
    human = [row["reference_length"] for row in rows]
    numbers = {**win_rate(preferences), **length_controlled(preferences, lengths, human)}
    if f"verdicts/{judge}" in rows[0]:
        numbers |= position_bias([row[f"verdicts/{judge}"] for row in rows])
    return {**numbers, "by_length": by_length(preferences, lengths, human)}


def log_prob_numbers(rows: list[dict]) -> dict[str, float]:
    """KL and log-ratio in nats per summary, entropy and surprisal in nats per token."""
    n = len(rows)
    total = {key: math.fsum(row[key] for row in rows) for key in SUMMED if key in rows[0]}
    tokens = total["response_length"]
    numbers = {}
    if "sample_kl" in total:
        numbers |= {"kl": total["sample_kl"] / n, "kl_full": total["sample_kl_full"] / n}
    if "sample_entropy" in total:
        numbers["entropy"] = total["sample_entropy"] / total["sample_length"]
    numbers["surprisal"] = -total["logprob"] / tokens
    if "ref_logprob" in total:
        numbers["log_ratio"] = (total["logprob"] - total["ref_logprob"]) / n
        numbers["ref_perplexity"] = math.exp(-total["ref_logprob"] / tokens)
    return numbers


def measure(
    cfg, name: str, path: str, rows: list[dict], references: list[Summary], judges: list[str],
) -> dict:
    """The numbers of one checkpoint, all from its rows."""
    verdicts = {judge: verdict(rows, judge) for judge in judges}
    result = {"name": name, "model": path, "split": cfg.split, "rows": len(rows)}
    result["temperature"] = cfg.temperature
    if step := re.search(r"(?:step_|checkpoint-)(\d+)$", path):
        result["step"] = int(step[1])
    if judges:
        result |= {key: verdicts[judges[0]][key] for key in HEADLINE}
    for column in ("gold", "gold_reference", "scores", "scores_reference"):
        if column in rows[0]:
            result[column] = mean([row[column] for row in rows])
    result |= log_prob_numbers(rows)
    counted = [{key: row[key] for key in COUNTED if key in row} for row in rows]
    result |= summary_means(counted, references, summaries_of(rows))
    if (trained := Path(path) / "result.json").exists() and "seconds" in (run := read_json(trained)):
        result["train_seconds"] = run["seconds"]
    return {**result, "judges": verdicts}
