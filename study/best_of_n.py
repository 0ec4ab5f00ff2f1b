"""Best-of-n: the reference curve of over-optimisation. Of n samples of the SFT model keep the one that the
reward model likes best; what is its true reward?

    KL(best of n || SFT) = log n - (n - 1)/n        nats per sequence; an upper bound that is tight for
                                                    continuous scores (arXiv 2009.01325, appendix G.3)
    E[best of n] = sum_i C(i-1, n-1)/C(M, n) x_(i)  x_(1..M): a prompt's M samples by rising score; unbiased
                                                    for every n <= M (arXiv 2112.09332)

Writes metrics.jsonl, one line per n = 1, 2, 4, ... M: kl, scores (proxy) and, in the toy world, gold.
study.plot draws it over x=kl beside the runs of RLOO.
    CPU, toy world:  python -m study.best_of_n --data_dir=out/toy/data --model=out/toy/sft
                         --reward_model=out/toy/rm --out_dir=out/toy/best_of_n
    GPU, Pythia 1B:  python -m study.best_of_n --data_dir=out/tldr --model=out/1b/sft
                         --reward_model=out/1b/rm --out_dir=out/1b/best_of_n
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from data.gold import gold
from evaluation.judges import make_judge
from evaluation.tables import write
from rlhf.common import frozen, load_model, setup
from rlhf.config import UserError, check_ranges, command_line
from rlhf.data import check_tables, read_meta
from rlhf.generate import generate_all
from rlhf.out_dir import check_same, enter, forget_replaced
from rlhf.pretrained import load_tokenizer
from rlhf.rewards import missing_eos
from rlhf.summaries import Post, gold_scores, read_posts, sampled_summaries


@dataclass(frozen=True, kw_only=True)
class Config:
    # I/O
    data_dir: str  # prepared data (data/tldr.py or data/toy.py)
    model: str  # what is sampled from, usually the SFT model: run, Hugging Face directory or hub id
    reward_model: str  # what chooses among the samples
    revision: str = "main"  # revision of hub ids
    out_dir: str  # metrics.jsonl, result.json
    overwrite: bool = False  # replace what is in out_dir
    # samples
    split: str = "validation"  # the posts: table sft_<split>
    rows: int = 128  # the first posts (0 = all)
    samples: int = 64  # M, samples per post: the largest n
    temperature: float = 0.7  # of the samples
    top_p: float = 1.0  # nucleus of the samples (1 = off)
    seed: int = 1  # of the samples
    missing_eos_penalty: float = 1.0  # a sample without EOS has minus this as its score, as in train_rloo.py
    # system
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: bfloat16 on CUDA,
                         # float32 on CPU
    plain: bool = False  # no flex_attention, no CUDA graph, no torch.compile: slower, needs no compiler
    micro_batch_tokens: int = 8192  # tokens in one forward; changes memory and speed, not the result
    rollout_prompts: int = 16  # prompts in one generation call
    rank_timeout: float = 600.0  # seconds that a rank (torchrun) waits for another one


# --- the estimator


def log_choose(n: Tensor, k: int) -> Tensor:
    return torch.lgamma(n + 1) - math.lgamma(k + 1) - torch.lgamma(n - k + 1)


def chance_to_win(M: int, n: int) -> Tensor:
    """(M,) float64: the chance that the i-th lowest of M is the highest of n drawn without replacement,
    C(i-1, n-1)/C(M, n). Sums to 1."""
    rank = torch.arange(1, M + 1, dtype=torch.float64)  # (M,)
    below = (rank - 1).clamp(min=n - 1)
    chance = (log_choose(below, n - 1) - log_choose(rank[-1], n)).exp()
    return torch.where(rank >= n, chance, 0.0)


def expected_best(scores: Tensor, values: Tensor, n: int) -> float:
    """Mean over prompts of E[value of the sample with the best score among n]; scores, values (N, M)."""
    order = scores.argsort(dim=1)
    ranked = values.gather(1, order).double()
    return (ranked @ chance_to_win(scores.shape[1], n)).mean().item()


def numbers_of_samples(M: int) -> list[int]:
    """1, 2, 4, ... and M."""
    return sorted({2**i for i in range(M.bit_length())} | {M})


def best_of_n_table(values: dict[str, Tensor]) -> list[dict]:
    """One line per n: its KL and the expected value of each column (N, M) for the best by `scores`."""
    lines = []
    for n in numbers_of_samples(values["scores"].shape[1]):
        expected = {name: expected_best(values["scores"], column, n) for name, column in values.items()}
        lines.append({"step": n, "n": n, "kl": math.log(n) - (n - 1) / n, **expected})
    return lines


# --- the samples


def check(cfg: Config) -> None:
    check_ranges(cfg)
    if cfg.temperature == 0:
        raise UserError("--temperature=0: n greedy samples are one and the same; take one above 0")


def sampled_values(cfg: Config, posts: list[Post], device: torch.device) -> dict[str, Tensor]:
    """Scores and, where it is known, the gold reward of M samples for each post, (N, M) each."""
    R = read_meta(cfg.data_dir)["response_tokens"]
    model = frozen(load_model(
        cfg.model, data_dir=cfg.data_dir, revision=cfg.revision, device=device, dtype=cfg.dtype
    ))
    tokenizer = load_tokenizer(cfg.model, cfg.revision)
    check_tables(cfg.data_dir, [model], (f"sft_{cfg.split}", cfg.rows, R))
    proxy = make_judge("rm", **{**vars(cfg), "device": device})
    true_reward = gold(cfg.data_dir)

    samples, ended = generate_all(
        model, [post.query_token for post in posts], cfg.samples, R, batch=cfg.rollout_prompts,
        temperature=cfg.temperature, top_p=cfg.top_p, generator=torch.Generator(device).manual_seed(cfg.seed),
        progress="samples",
    )
    shape = ended.shape  # (N, M)
    summaries = sampled_summaries(tokenizer, samples, ended)
    asked = [post for post in posts for _ in range(cfg.samples)]
    scores = torch.tensor(proxy.score(asked, summaries)).view(shape)
    values = {"scores": missing_eos(scores, ended, rule="replace", penalty=cfg.missing_eos_penalty)}
    if true_reward:
        values["gold"] = torch.tensor(gold_scores(true_reward, asked, summaries)).view(shape)
    return values


def main(cfg: Config) -> dict:
    began = time.time()
    device = setup(cfg.seed, cfg.device, cfg.plain, cfg.rank_timeout)
    check(cfg)
    about = check_same(cfg, may_change={"overwrite", "device"})
    posts, _ = read_posts(cfg.data_dir, f"sft_{cfg.split}", [], cfg.rows)
    lines = best_of_n_table(sampled_values(cfg, posts, device))
    for line in lines:
        print("  ".join(f"{key} {value:.4g}" for key, value in line.items() if key != "step"))
    enter(cfg, about)
    out = Path(cfg.out_dir)
    write(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    seconds = round(time.time() - began, 1)
    result = {"posts": len(posts), **lines[-1], "out_dir": str(out), "seconds": seconds}
    write(out / "result.json", json.dumps(result) + "\n")
    forget_replaced(out)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    command_line(main, Config)
