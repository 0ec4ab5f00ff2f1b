"""Best-of-n: the reference curve of over-optimisation. Of n samples of the SFT model keep the one the reward model likes best; what is the truth of it?

    KL(best of n || SFT) = log n - (n - 1)/n   nats per sequence (Stiennon et al. 2020, appendix G.3; an upper bound that is tight for continuous scores)
    E[best of n]         = sum_i C(i-1, n-1)/C(M, n) x_(i),   x_(1..M) a prompt's M samples by rising score: unbiased for every n <= M (Nakano et al. 2021)

Writes metrics.jsonl, one line per n = 1, 2, 4, ... M: kl, scores (proxy) and, in the toy world, gold. plot.py draws it over x=kl beside the runs of RLOO.

    CPU, toy world:  python best_of_n.py --data_dir=out/toy/data --model=out/toy/sft --reward_model=out/toy/rm --out_dir=out/toy/best_of_n
    GPU, Pythia 1B:  python best_of_n.py --data_dir=out/tldr --model=out/1b/sft --reward_model=out/1b/rm --out_dir=out/1b/best_of_n
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from evaluation.judges import Summary, gold_judge, make_judge, read_posts
from evaluation.tables import write
from rlhf.common import autocast, frozen, setup
from rlhf.config import UserError, command_line
from rlhf.data import check_tokenizer, read_meta
from rlhf.generate import generate_all
from rlhf.model import EOS
from rlhf.out_dir import describe
from rlhf.pretrained import from_pretrained, load_tokenizer
from rlhf.rewards import missing_eos


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
    dtype: str = "auto"  # float32 or bfloat16 of matrix products; auto: bfloat16 on CUDA, float32 on CPU
    micro_batch_tokens: int = 8192  # tokens in one forward; changes memory and speed, not the result
    rollout_prompts: int = 16  # prompts in one generation call


def best_of_n_weights(M: int, n: int) -> Tensor:
    """(M,) float64: the chance that the i-th lowest of M is the highest of n drawn without replacement, C(i-1, n-1)/C(M, n). Sums to 1."""
    rank = torch.arange(1, M + 1, dtype=torch.float64)  # (M,)
    log_choose = lambda a, b: torch.lgamma(a + 1) - math.lgamma(b + 1) - torch.lgamma(a - b + 1)  # noqa: E731
    weights = (log_choose((rank - 1).clamp(min=n - 1), n - 1) - log_choose(torch.tensor(float(M), dtype=torch.float64), n)).exp()
    return torch.where(rank >= n, weights, 0.0)


def best_of_n(scores: Tensor, values: Tensor, n: int) -> float:
    """Mean over prompts of E[value of the sample with the best score among n]; scores, values (N, M)."""
    order = scores.argsort(dim=1)
    return (values.gather(1, order).double() @ best_of_n_weights(scores.shape[1], n)).mean().item()


def main(cfg: Config) -> dict:
    began, out = time.time(), Path(cfg.out_dir)
    device = setup(cfg.seed, cfg.device)
    if cfg.samples < 1 or cfg.temperature <= 0:
        raise UserError(f"--samples={cfg.samples} must be at least 1, --temperature={cfg.temperature} above 0")
    if out.exists() and any(out.iterdir()) and not cfg.overwrite:
        raise UserError(f"{out} is not empty: replace it with --overwrite, or choose another --out_dir")
    R = read_meta(cfg.data_dir)["response_tokens"]
    posts, _ = read_posts(cfg.data_dir, f"sft_{cfg.split}", [], cfg.rows)
    model = frozen(from_pretrained(cfg.model, revision=cfg.revision, device=device), device, cfg.dtype)
    tokenizer = load_tokenizer(cfg.model, cfg.revision)
    check_tokenizer(cfg.data_dir, tokenizer, model.config.vocab_size, cfg.model)
    scorer = make_judge("rm", **{**vars(cfg), "device": device})

    with autocast(device, cfg.dtype):
        samples, ended = generate_all(model, [post.query_token for post in posts], cfg.samples, R, batch=cfg.rollout_prompts, temperature=cfg.temperature,
                                      top_p=cfg.top_p, generator=torch.Generator(device).manual_seed(cfg.seed), progress="samples")
    tokens = [y for group in samples for y in group]  # N M of them
    texts = tokenizer.decode_batch([[t for t in y if t != EOS] for y in tokens])
    summaries, asked = [Summary(*row) for row in zip(texts, tokens, ended.flatten().tolist())], [post for post in posts for _ in range(cfg.samples)]
    scores = torch.tensor(scorer.score(asked, summaries)).view(len(posts), cfg.samples)  # (N, M)
    scores = missing_eos(scores, ended, rule="replace", penalty=cfg.missing_eos_penalty)
    values = {"scores": scores}
    if posts[0].facts is not None:
        values["gold"] = torch.tensor(gold_judge().score(asked, summaries)).view(len(posts), cfg.samples)

    lines = []
    for n in sorted({2**i for i in range(cfg.samples.bit_length())} | {cfg.samples}):
        lines.append({"step": n, "n": n, "kl": math.log(n) - (n - 1) / n, **{name: best_of_n(scores, v, n) for name, v in values.items()}})
        print("  ".join(f"{key} {value:.4g}" for key, value in lines[-1].items() if key != "step"))
    out.mkdir(parents=True, exist_ok=True)
    write(out / "run.json", json.dumps(describe(cfg), indent=2) + "\n")
    write(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    result = {"posts": len(posts), **lines[-1], "out_dir": str(out), "seconds": round(time.time() - began, 1)}
    write(out / "result.json", json.dumps(result) + "\n")
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    command_line(main, Config)
