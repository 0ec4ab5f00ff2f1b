r"""Evaluation: summaries of one or many checkpoints, measured, and judged against the human reference.

    win rate = mean over posts of preference(summary over reference), ties half

With a 95 % interval, by length, and at equal length ("Failure Modes of Maximum Entropy RLHF", arXiv
2509.20265, 4.1). Several checkpoints, by a list or a glob, make a sweep: one table (sweep.csv; metrics.jsonl
for study/plot.py), each compared with the first. Log-probs of the judged summaries are taken at --temperature
(1 if greedy): `log_ratio` is log pi - log pi_ref of that text; of greedy text it is no KL. `kl` (k1),
`kl_full` (full distributions) and `entropy` are of one more sample per post, drawn at --sample_temperature.

CPU, toy world:
    python evaluate.py --data_dir=out/toy/data --model=out/toy/rloo --ref_model=out/toy/sft --judge=gold \
        --out_dir=out/toy/eval
GPU, Pythia 1B (win rates in TRL's documentation, same judge: SFT 33 %, KL-constrained RLOO 51 %):
    python evaluate.py --data_dir=out/tldr --model='out/1b/rloo/ckpt/*' --ref_model=out/1b/sft --judge=llm \
        --out_dir=out/1b/eval
"""

import glob
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from data.gold import gold
from evaluation.judges import Judge, ScoreJudge, agreement, make_judge, parse_judges
from evaluation.measures import measure, summaries_of, summarise
from evaluation.page import page_data, render
from evaluation.tables import show, write, write_sweep
from rlhf.common import frozen, load_model, setup
from rlhf.config import UserError, check_ranges, command_line
from rlhf.data import check_tables, read_meta
from rlhf.dist import on_first
from rlhf.files import fingerprint, identity, write_file
from rlhf.model import NeoX, NeoXConfig
from rlhf.out_dir import check_same, enter, forget_replaced
from rlhf.pretrained import load_tokenizer, read_json, resolve
from rlhf.summaries import ROUGE_HINT, Post, Summary, human_summaries, read_posts


@dataclass(frozen=True, kw_only=True)
class Config:
    # I/O
    data_dir: str  # prepared data (data/tldr.py or data/toy.py)
    model: str  # what to evaluate: a run, a Hugging Face directory, a hub id, a glob ('out/rloo/ckpt/*'), or
    #   several joined by ','
    ref_model: str = ""
    #   model that log-ratio, KL and perplexity are measured to, usually the SFT model (empty: not measured)
    reward_model: str = ""  # reward model of the column scores and of --judge=rm (empty: none)
    revision: str = "main"  # revision of hub ids
    out_dir: str  # summaries.parquet and result.json, of a sweep in one folder per checkpoint
    resume: bool = False  # continue what was interrupted (a sweep does so without being asked)
    overwrite: bool = False  # replace an existing evaluation in out_dir
    # summaries
    split: str = "validation"  # the posts: table sft_<split>
    n: int = 1000  # the first n posts (0 = all)
    temperature: float = 0.0  # of the judged summaries (0 = greedy)
    top_p: float = 1.0  # nucleus of the sampling (1 = off)
    response_tokens: int = 0  # longest summary (0 = what the data says; 53 for TL;DR)
    seed: int = 1  # of sampling, and of the order in which a judge sees a pair
    sample_temperature: float = 1.0  # of the sample that KL and entropy are measured on (0: not measured)
    # judge
    judge: str = "none"  # gold, rm, llm or several joined by ',' (the first is the headline), or none
    judge_order: Literal["both", "random"] = "both"
    #   llm: ask about a pair in both orders, or in one at random
    judge_model: str = "gpt-4o-mini"  # llm: name of the model at judge_url
    judge_url: str = "https://api.openai.com/v1"
    #   llm: an OpenAI-compatible endpoint; its key comes from the variable OPENAI_API_KEY
    judge_template: str = ""  # llm: a prompt file (empty: evaluation/prompts/tldr.txt)
    judge_cache: str = "out/judge_cache.jsonl"
    #   llm: all answers ever; a question that is in it is not asked again
    judge_concurrency: int = 8  # llm: requests at a time
    judge_timeout: float = 60.0  # llm: seconds until a request is given up and repeated
    judge_max_tokens: int = 200  # llm: longest answer
    judge_max_requests: int = 0  # llm: hard limit of this run, repeated ones included (0 = none)
    judge_max_cost: float = 5.0  # llm: hard limit of this run in dollars
    judge_price_in: float = -1.0
    #   llm: dollars per million tokens of prompts (-1: known for some models; 0 on this machine)
    judge_price_out: float = -1.0  # llm: dollars per million tokens of answers
    agreement: str = ""
    #   table of human choices, e.g. pairs_validation: how often do the judges agree with people?
    agreement_rows: int = 1000  # its first rows (0 = all)
    # page
    html: bool = False
    #   write page.html: posts, references and summaries side by side, with verdicts and log-ratios per token
    html_rows: int = 500  # posts on it (0 = all)
    # system
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    #   of matrix products; auto: bfloat16 on CUDA, float32 on CPU
    plain: bool = False  # no flex_attention, no CUDA graph, no torch.compile: slower, needs no compiler
    micro_batch_tokens: int = 8192  # tokens in one forward: memory and speed, not the result
    rollout_prompts: int = 64  # prompts in one generation call: memory and speed, not the result
    rank_timeout: float = 600.0  # seconds that a rank (torchrun) waits for another one


MAY_CHANGE = {
    "resume", "overwrite", "device", "micro_batch_tokens", "rollout_prompts", "html", "html_rows",
    "rank_timeout", "judge_cache", "judge_concurrency", "judge_timeout", "judge_max_requests",
    "judge_max_cost", "judge_price_in", "judge_price_out",
}
PATTERN = re.compile(r"[*?\[]")


def check(cfg: Config) -> None:
    check_ranges(cfg)
    if cfg.agreement and not parse_judges(cfg.judge):
        raise UserError("--agreement asks how often a judge agrees with people: it needs --judge")


def matches(pattern: str) -> list[str]:
    """The directories that a glob matches, step_9 before step_10."""

    def by_number(path: str) -> list:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]

    found = [path for path in sorted(glob.glob(pattern), key=by_number) if Path(path).is_dir()]
    return [path for path in found if Path(path).name != "writing"]


def find_checkpoints(text: str) -> dict[str, str]:
    """"sft,rloo/ckpt/*" -> {a short name that tells it from the others: path or hub id}, in order."""
    found = []
    for part in filter(None, text.split(",")):
        if not PATTERN.search(part):
            found.append(part.rstrip("/"))
        elif paths := matches(part):
            found += paths
        else:
            raise UserError(f"--model={part}: no directory matches; a run has its checkpoints in ckpt/step_*")
    if not found:
        raise UserError(f"--model={text}: names no model")
    parts = [Path(path).parts for path in found]
    if len(set(parts)) < len(parts):
        raise UserError(f"--model={text}: names the same model twice: name it once")
    tail = next(k for k in range(1, 99) if len({p[-k:] for p in parts}) == len(parts))
    return {"-".join(p[-tail:]).strip("/.-") or "model": path for p, path in zip(parts, found)}


def unloaded(cfg: Config, *paths: str) -> list:
    """What `check_tables` asks of models, before they are loaded: their config."""
    folders = [resolve(path, cfg.revision) for path in paths if path]
    raw = [read_json(folder / "config.json") for folder in folders]
    return [SimpleNamespace(config=NeoXConfig.from_dict(content)) for content in raw]


def sources_of(cfg: Config, path: str) -> dict[str, dict | str]:
    """What the rows and verdicts of a checkpoint come from, by content: a copy with another date is the
    same."""
    models = {"model": path, "ref_model": cfg.ref_model, "reward_model": cfg.reward_model}
    found = {name: fingerprint(resolve(model, cfg.revision)) for name, model in models.items() if model}
    found["posts"] = identity(Path(cfg.data_dir) / f"sft_{cfg.split}.parquet")
    if cfg.judge_template:
        found["judge_template"] = identity(Path(cfg.judge_template))
    return found


def forget_if_changed(where: Path, sources: dict[str, dict | str]) -> None:
    """Makes the folder of a checkpoint, or empties it if one of `sources` is another since."""
    where.mkdir(exist_ok=True)
    known = where / "sources.json"
    before = read_json(known) if known.exists() else None
    if before == sources:
        return
    results = [where / name for name in ("result.json", "summaries.parquet")]
    if any(map(Path.exists, results)):
        print(f"{where}: evaluated anew, for what it was evaluated from has changed since")
    for file in results:
        file.unlink(missing_ok=True)
    write_file(known, json.dumps(sources) + "\n")


def write_summaries(
    cfg: Config, folders: dict[str, Path], checkpoints: dict[str, str],
    summarise_one: Callable[[str], list[dict]], scorer: ScoreJudge | None,
    posts: list[Post], references: list[Summary],
) -> dict[str, list[dict]]:
    """{checkpoint: its rows}: read from its folder, or summarised, scored and written there."""
    rows = {}
    for name, path in checkpoints.items():
        file = folders[name] / "summaries.parquet"
        on_first(partial(forget_if_changed, folders[name], sources_of(cfg, path)))
        if file.exists():
            rows[name] = pq.read_table(file).to_pylist()
            continue
        rows[name] = summarise_one(path)
        if scorer:
            own = scorer.score(posts, summaries_of(rows[name]))
            human = scorer.score(posts, references)
            for row, score, reference_score in zip(rows[name], own, human, strict=True):
                row |= {"scores": score, "scores_reference": reference_score}
        write(file, pa.Table.from_pylist(rows[name]))
    return rows


def ask_judges(
    judges: dict[str, Judge], rows: dict[str, list[dict]], posts: list[Post], references: list[Summary],
) -> None:
    """Adds each judge's preference, and what else it says, to the rows of all checkpoints.

    One call per judge: one that costs money tells the whole price before it asks.
    """
    flat = [row for name in rows for row in rows[name]]
    asked = (posts * len(rows), summaries_of(flat), references * len(rows))
    for judge, ask in judges.items():
        preferences = ask(*asked)
        details = ask.details(*asked) if hasattr(ask, "details") else [{}] * len(flat)
        for row, preference, detail in zip(flat, preferences, details, strict=True):
            row[f"preference/{judge}"] = preference
            row |= {f"{key}/{judge}": value for key, value in detail.items()}


def write_results(
    cfg: Config, folders: dict[str, Path], checkpoints: dict[str, str], rows: dict[str, list[dict]],
    judges: dict[str, Judge], posts: list[Post], references: list[Summary],
) -> list[dict]:
    """The result of each checkpoint, in order: read from its folder, or judged, measured and written."""
    results = {name: folder / "result.json" for name, folder in folders.items()}
    new = [name for name, file in results.items() if not file.exists()]
    ask_judges(judges if new else {}, {name: rows[name] for name in new}, posts, references)
    for name in new:
        result = measure(cfg, name, checkpoints[name], rows[name], references, list(judges))
        for judge, verdict in result["judges"].items():
            if verdict["unjudged"]:
                print(f"judge {judge}: {verdict['unjudged']} of {len(posts)} pairs of {name} have no verdict "
                      "(its answers: summaries.parquet)")
        write(folders[name] / "summaries.parquet", pa.Table.from_pylist(rows[name]))
        write(results[name], json.dumps(result) + "\n")
    return [read_json(file) for file in results.values()]


def ask_agreement(judges: dict[str, Judge], posts: list[Post], table: dict[str, list]) -> dict[str, dict]:
    """{judge: how often it agrees with people}; says so where a judge does no better than "longer wins"."""
    sides = [human_summaries(table[side], table[f"{side}_token"]) for side in ("chosen", "rejected")]
    found = {}
    for name, judge in judges.items():
        found[name] = share = agreement(judge, posts, *sides)
        if not share["pairs"]:
            print(f"judge {name} has no verdict on any of {len(posts)} human choices")
            continue
        print(f"judge {name} agrees with people on {share['agreement']:.1%} of {share['pairs']} pairs "
              f"({share['agreement_low']:.1%} to {share['agreement_high']:.1%}); "
              f"\"the longer one wins\" on {share['longer_wins']:.1%} (by {share['longer_by']})"
              + ("" if share["beats_length"] else ": NO BETTER than taking the longer one"))
    return found


def make_judges(cfg: Config, device: torch.device) -> tuple[dict[str, Judge], ScoreJudge | None]:
    """{name: judge}, and what the column `scores` comes from."""
    options = {**vars(cfg), "device": device}
    judges = {name: make_judge(name, **options) for name in parse_judges(cfg.judge)}
    if "rm" in judges or not cfg.reward_model:
        return judges, judges.get("rm")
    return judges, make_judge("rm", **options)


def load_reference(cfg: Config, device: torch.device) -> NeoX | None:
    if not cfg.ref_model:
        return None
    return frozen(load_model(
        cfg.ref_model, data_dir=cfg.data_dir, revision=cfg.revision, device=device, dtype=cfg.dtype
    ))


def write_page(cfg: Config, out: Path, rows: dict, results: list[dict], judges: list[str]) -> None:
    tokenizer = load_tokenizer(results[0]["model"], cfg.revision)
    data = page_data(rows, results, judges, tokenizer, cfg.html_rows)
    posts = len(next(iter(rows.values())))
    write(out / "page.html", render(f"{cfg.model}: {posts} posts of sft_{cfg.split}", data))
    print(f"page: {out / 'page.html'}")


def best_of(lines: list[dict]) -> dict:
    """What a sweep ends with: how many checkpoints, and with a judge the win rate of the best."""
    result = {"checkpoints": len(lines)}
    if judged := [line for line in lines if line.get("win_rate") is not None]:
        best = max(judged, key=lambda line: line["win_rate"])
        won = {key: value for key, value in best.items() if key.startswith("win_rate")}
        result |= {"best": best["name"], **won}
    return result


def main(cfg: Config) -> dict:
    began = time.time()
    check(cfg)
    device = setup(cfg.seed, cfg.device, cfg.plain, cfg.rank_timeout)
    meta = read_meta(cfg.data_dir)
    checkpoints = find_checkpoints(cfg.model)
    sweep = len(checkpoints) > 1 or bool(PATTERN.search(cfg.model))
    for path in checkpoints.values():
        resolve(path, cfg.revision)  # a wrong name is told before anything is written
    inputs = [*checkpoints.values(), cfg.judge_cache, cfg.judge_template]
    about = check_same(cfg, *inputs, may_change=MAY_CHANGE, go_on=sweep)
    R = cfg.response_tokens or meta["response_tokens"]
    read = [(f"sft_{cfg.split}", cfg.n, 0), (cfg.agreement, cfg.agreement_rows, 0)]
    check_tables(cfg.data_dir, unloaded(cfg, cfg.reward_model), *read[: 1 + bool(cfg.agreement)])
    sampling = unloaded(cfg, *checkpoints.values(), cfg.ref_model, cfg.reward_model)
    check_tables(cfg.data_dir, sampling, (f"sft_{cfg.split}", cfg.n, R))
    columns = ["reference_response", "reference_response_token"]
    posts, table = read_posts(cfg.data_dir, f"sft_{cfg.split}", columns, cfg.n)
    references = human_summaries(*(table[column] for column in columns))
    judges, scorer = make_judges(cfg, device)
    people = None
    if cfg.agreement:
        sides = ["chosen", "chosen_token", "rejected", "rejected_token"]
        people = read_posts(cfg.data_dir, cfg.agreement, sides, cfg.agreement_rows)
    reference = load_reference(cfg, device)
    true_reward = gold(cfg.data_dir)  # known in the toy world only
    enter(cfg, about)
    out = Path(cfg.out_dir)
    folders = {name: out / name if sweep else out for name in checkpoints}
    print(f"{len(checkpoints)} checkpoint(s), {len(posts)} posts of sft_{cfg.split}, judge: {cfg.judge}")

    summarise_one = partial(
        summarise, cfg, device=device, reference=reference, gold=true_reward, posts=posts,
        references=references, R=R,
    )
    rows = write_summaries(cfg, folders, checkpoints, summarise_one, scorer, posts, references)
    if "rougeL" not in next(iter(rows.values()))[0]:
        print(ROUGE_HINT)
    found = ask_agreement(judges, *people) if people else {}
    results = write_results(cfg, folders, checkpoints, rows, judges, posts, references)
    lines = write_sweep(out, results, rows, list(judges)) if sweep else results
    show(lines)
    if cfg.html:
        write_page(cfg, out, rows, results, list(judges))
    result = best_of(lines) if sweep else results[0]
    if found:
        result = {**result, "agreement": found}
    result = {**result, "out_dir": str(out), "seconds": round(time.time() - began, 1)}
    forget_replaced(out)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    command_line(main, Config)
