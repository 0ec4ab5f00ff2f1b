"""Evaluation: summaries of one or many checkpoints, measured, and judged against the human reference (the paper, 4.1; recipe, section 8).

    win rate = mean over posts of preference(summary over reference), ties half, with a 95 % interval, by length, and at equal length

Several checkpoints, by a list or a glob, make a sweep: one table (sweep.csv; metrics.jsonl for plot.py), each compared with the first.
Log-probs of the judged summaries are taken at --temperature (1 if greedy): `log_ratio` is log pi - log pi_ref of that text; of greedy text
it is no KL. `kl` (k1), `kl_full` (full distributions) and `entropy` are of one more sample per post, drawn at --sample_temperature.

    CPU, toy:  python evaluate.py --data_dir=out/toy/data --model=out/toy/rloo --ref_model=out/toy/sft --judge=gold --out_dir=out/toy/eval
    GPU, 1B:   python evaluate.py --data_dir=out/tldr --model='out/1b/rloo/ckpt/*' --ref_model=out/1b/sft --judge=llm --out_dir=out/1b/eval
               (published: SFT 33 %, KL-constrained RLOO about 51 %, recipe section 10)
"""

import glob
import json
import math
import re
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from evaluation.judges import (
    Summary,
    agreement,
    decoded,
    human_summaries,
    make_judge,
    parse_judges,
    read_posts,
    summary_means,
    summary_rows,
)
from evaluation.page import page_data, render
from evaluation.statistics import by_length, length_controlled, position_bias, win_rate
from evaluation.tables import show, write, write_sweep
from rlhf.common import autocast, frozen, setup
from rlhf.config import UserError, command_line
from rlhf.data import check_tokenizer, read_meta
from rlhf.generate import generate_all
from rlhf.groups import micro_batches, pack
from rlhf.logprobs import compare_logprobs, token_logprobs
from rlhf.pretrained import from_pretrained, load_tokenizer, read_json
from rlhf.run import Run
from rlhf.summaries import ROUGE, ROUGE_HINT, mean


@dataclass(frozen=True, kw_only=True)
class Config:
    # I/O
    data_dir: str  # prepared data (data/tldr.py or data/toy.py)
    model: str  # what to evaluate: a run, a Hugging Face directory, a hub id, a glob ('out/rloo/ckpt/*'), or several joined by ','
    ref_model: str = ""  # model that log-ratio, KL and perplexity are measured to, usually the SFT model (empty: not measured)
    reward_model: str = ""  # reward model of the column scores and of --judge=rm (empty: none)
    revision: str = "main"  # revision of hub ids
    out_dir: str  # summaries.parquet and result.json, of a sweep in one folder per checkpoint
    resume: bool = False  # continue what was interrupted (a sweep with the same settings does so without being asked)
    overwrite: bool = False  # replace an existing evaluation in out_dir
    # summaries
    split: str = "validation"  # the posts: table sft_<split>
    n: int = 1000  # the first n posts (0 = all)
    temperature: float = 0.0  # of the judged summaries (0 = greedy)
    top_p: float = 1.0  # nucleus of the sampling (1 = off)
    response_tokens: int = 0  # longest summary (0 = what the data says; 53 for TL;DR)
    seed: int = 1  # of sampling, and of the order in which a judge sees a pair
    sample_temperature: float = 1.0  # KL and entropy are measured on a sample drawn at this temperature (0: not measured)
    # judge
    judge: str = "none"  # gold, rm, llm or several joined by ',' (the first one's win rate is the headline), or none
    judge_order: Literal["both", "random"] = "both"  # llm: ask about a pair in both orders, or in one at random as N+
    judge_model: str = "gpt-4o-mini"  # llm: name of the model at judge_url
    judge_url: str = "https://api.openai.com/v1"  # llm: an OpenAI-compatible endpoint; its key comes from the variable OPENAI_API_KEY
    judge_template: str = ""  # llm: a prompt file like rlhf/prompts/tldr.txt (empty: that one, N+'s)
    judge_cache: str = "out/judge_cache.jsonl"  # llm: all answers ever; a question that is in it is not asked again
    judge_concurrency: int = 8  # llm: requests at a time
    judge_timeout: float = 60.0  # llm: seconds until a request is given up and repeated
    judge_max_tokens: int = 200  # llm: longest answer
    judge_max_requests: int = 0  # llm: hard limit of this run, repeated requests included (0 = none)
    judge_max_cost: float = 5.0  # llm: hard limit of this run in dollars
    judge_price_in: float = -1.0  # llm: dollars per million tokens of prompts (-1: known for some models; 0 on this machine)
    judge_price_out: float = -1.0  # llm: dollars per million tokens of answers
    agreement: str = ""  # table of human choices, e.g. pairs_validation: how often do the judges agree with people? (empty: not asked)
    agreement_rows: int = 1000  # its first rows (0 = all)
    # page
    html: bool = False  # write page.html: posts, references and summaries side by side, with verdicts and log-ratios per token
    html_rows: int = 500  # posts on it (0 = all)
    # system
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: bfloat16 on CUDA, float32 on CPU
    micro_batch_tokens: int = 8192  # tokens in one forward; changes memory and speed, not the result
    rollout_prompts: int = 64  # prompts in one generation call


MAY_CHANGE = {"resume", "overwrite", "device", "micro_batch_tokens", "rollout_prompts", "html", "html_rows", "judge_cache",
              "judge_concurrency", "judge_timeout", "judge_max_requests", "judge_max_cost", "judge_price_in", "judge_price_out"}
PATTERN = re.compile(r"[*?\[]")


def find_checkpoints(text: str) -> dict[str, str]:
    """"sft,rloo/ckpt/*" -> {a short name that tells it from the others: path or hub id}, in the order given, a glob's matches by name."""
    found = []
    for part in filter(None, text.split(",")):
        if PATTERN.search(part):
            by_number = lambda path: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", path)]  # noqa: E731 (9 before 10)
            matches = [path for path in sorted(glob.glob(part), key=by_number) if Path(path).is_dir() and Path(path).name != "writing"]
            if not matches:
                raise UserError(f"--model={part}: no directory matches")
            found += matches
        else:
            found.append(part.rstrip("/"))
    if len(set(found)) < max(1, len(found)):
        raise UserError(f"--model={text}: " + ("names the same model twice" if found else "names no model"))
    parts = [Path(path).parts for path in found]
    tail = next(k for k in range(1, 99) if len({p[-k:] for p in parts}) == len(parts))
    return {"-".join(p[-tail:]).strip("/.-") or "model": path for p, path in zip(parts, found)}


def open_out_dir(cfg: Config, sweep: bool) -> Path:
    """A new directory, one that is emptied (--overwrite), or an evaluation with the same settings to go on with. Else a UserError."""
    out = Path(cfg.out_dir)
    if out.exists() and any(out.iterdir()):
        if not (out / "run.json").exists():
            raise UserError(f"{out} is not empty and holds no run.json, so it is not an evaluation; choose another --out_dir")
        if cfg.overwrite:
            shutil.rmtree(out)
        else:
            old = read_json(out / "run.json")["config"]
            changed = [f"--{k} was {old.get(k)!r}, is {v!r}" for k, v in asdict(cfg).items() if old.get(k) != v and k not in MAY_CHANGE]
            if changed:
                raise UserError(f"{out} holds an evaluation with other settings ({'; '.join(changed)}): "
                                "--overwrite it or choose another --out_dir")
            if not (cfg.resume or sweep):
                raise UserError(f"{out} exists: continue it with --resume, replace it with --overwrite, or choose another --out_dir")
    out.mkdir(parents=True, exist_ok=True)
    write(out / "run.json", json.dumps(Run.describe(cfg), indent=2) + "\n")
    return out


def forget_if_changed(where: Path, *sources: str) -> None:
    """Makes the folder of a checkpoint, or empties it if what it was evaluated from has been written anew since (a file's size or time)."""
    files = []
    for source in map(Path, filter(None, sources)):
        files += [source] if source.is_file() else source.glob("*.safetensors")
    identity = json.dumps(sorted([str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files))
    where.mkdir(exist_ok=True)
    if not (where / "sources.json").exists() or (where / "sources.json").read_text() != identity:
        for name in ("result.json", "summaries.parquet"):
            (where / name).unlink(missing_ok=True)
        write(where / "sources.json", identity)


@torch.no_grad()
def token_numbers(cfg: Config, device: torch.device, model, reference, prompts: list, responses: list, temperature: float) -> list[dict]:
    """Per response, by token: log-prob under model and under reference, entropy, full-distribution KL."""
    rows = []
    context = min(m.config.max_position_embeddings for m in (model, reference or model))
    for s in micro_batches(prompts, responses, cfg.micro_batch_tokens):
        groups = pack(prompts[s], responses[s], max_positions=context, device=device)
        with autocast(device, cfg.dtype):
            hidden = model(groups.ids, groups.positions, groups.attend)[groups.predicts]  # (M, C)
            if reference is None:
                columns = dict(zip(("logprobs", "entropy"), token_logprobs(hidden, model.embed_out.weight, groups.targets, temperature)))  # (M,)
            else:
                ref_hidden = reference(groups.ids, groups.positions, groups.attend)[groups.predicts]  # (M, C)
                columns = dict(zip(("logprobs", "entropy", "ref_logprobs", "kl_full"), compare_logprobs(
                    hidden, model.embed_out.weight, ref_hidden, reference.embed_out.weight, groups.targets, temperature)))  # (M,)
        split = {name: values.double().cpu().split([len(r[0]) for r in responses[s]]) for name, values in columns.items()}
        rows += [{name: parts[i] for name, parts in split.items()} for i in range(len(responses[s]))]
    return rows


def summarise(cfg: Config, device: torch.device, path: str, reference, posts: list, references: list[Summary], R: int) -> list[dict]:
    """One row per post: the checkpoint's summary of at most R tokens, and what is measured without a judge, in nats and tokens with EOS."""
    model = frozen(from_pretrained(path, revision=cfg.revision, device=device), device, cfg.dtype)
    tokenizer = load_tokenizer(path, cfg.revision)
    check_tokenizer(cfg.data_dir, tokenizer, model.config.vocab_size, path)
    prompts = [post.query_token for post in posts]

    def sample(temperature: float, top_p: float, seed: int, name: str):
        with autocast(device, cfg.dtype):
            return generate_all(model, prompts, 1, R, batch=cfg.rollout_prompts, temperature=temperature, top_p=top_p,
                                generator=torch.Generator(device).manual_seed(seed), progress=name)

    samples, ended = sample(cfg.temperature, cfg.top_p, cfg.seed, f"{path}: summaries")
    summaries = decoded(tokenizer, samples, ended)
    numbers = token_numbers(cfg, device, model, reference, prompts, samples, cfg.temperature or 1.0)
    if not cfg.sample_temperature:
        drawn = [{}] * len(posts)
    elif (cfg.temperature, cfg.top_p) == (cfg.sample_temperature, 1.0):
        drawn = numbers
    else:
        others, _ = sample(cfg.sample_temperature, 1.0, cfg.seed + 1, f"{path}: samples")
        drawn = token_numbers(cfg, device, model, reference, prompts, others, cfg.sample_temperature)
    rows = []
    for post, human, own, counted, at, on in zip(posts, references, summaries, summary_rows(posts, references, summaries), numbers, drawn):
        ratios = at["logprobs"] - at["ref_logprobs"] if reference is not None else None
        rows.append({
            "id": post.id, "query": post.query, "reference": human.text, "summary": own.text, "ended": own.ended, "tokens": own.tokens,
            "response_length": len(own.tokens), "reference_length": len(human.tokens), **counted,
            "logprob": at["logprobs"].sum().item(),
            "ref_logprob": at["ref_logprobs"].sum().item() if reference is not None else None,
            "log_ratios": ratios.tolist() if reference is not None else None,
            "sample_length": len(on["logprobs"]) if on else None,
            "sample_entropy": on["entropy"].sum().item() if on else None,
            "sample_kl": (on["logprobs"] - on["ref_logprobs"]).sum().item() if on and reference is not None else None,
            "sample_kl_full": on["kl_full"].sum().item() if on and reference is not None else None,
        })
    return rows


def summaries_of(rows: list[dict]) -> list[Summary]:
    return [Summary(row["summary"], row["tokens"], row["ended"]) for row in rows]


def measure(cfg: Config, name: str, path: str, rows: list[dict], references: list[Summary], judges: list[str]) -> dict:
    """The numbers of one checkpoint, all from its rows."""
    def total(column: str) -> float | None:
        return None if rows[0][column] is None else math.fsum(row[column] for row in rows)

    def over(top: float | None, bottom: float | None) -> float | None:
        return None if top is None or bottom is None else top / bottom

    tokens, drawn, logprob, ref_logprob = (total(column) for column in ("response_length", "sample_length", "logprob", "ref_logprob"))
    step = re.search(r"(?:step_|checkpoint-)(\d+)$", path)
    verdicts = {}
    for judge in judges:
        preferences, lengths = [row[f"preference/{judge}"] for row in rows], [row["response_length"] for row in rows]
        human = [row["reference_length"] for row in rows]
        position = position_bias([row[f"verdicts/{judge}"] for row in rows]) if f"verdicts/{judge}" in rows[0] else {}
        verdicts[judge] = {**win_rate(preferences), **length_controlled(preferences, lengths, human), **position,
                           "by_length": by_length(preferences, lengths, human)}
    first = verdicts[judges[0]] if judges else {}
    return {
        "name": name, "model": path, "step": int(step[1]) if step else None,
        "split": cfg.split, "rows": len(rows), "temperature": cfg.temperature,
        **{key: first.get(key) for rate in ("win_rate", "lc_win_rate") for key in (rate, f"{rate}_low", f"{rate}_high")},
        "lc_extrapolated": first.get("lc_extrapolated"),
        "gold": mean([row["gold"] for row in rows]), "gold_reference": mean([row["gold_reference"] for row in rows]),
        "scores": mean([row["scores"] for row in rows]), "scores_reference": mean([row["scores_reference"] for row in rows]),
        "kl": over(total("sample_kl"), len(rows)), "kl_full": over(total("sample_kl_full"), len(rows)),
        "entropy": over(total("sample_entropy"), drawn),
        "log_ratio": over(None if ref_logprob is None else logprob - ref_logprob, len(rows)), "surprisal": -logprob / tokens,
        "ref_perplexity": None if ref_logprob is None else math.exp(-ref_logprob / tokens),
        **summary_means([{k: row[k] for k in (*ROUGE, "repetition_3", "novelty_2")} for row in rows], references, summaries_of(rows)),
        "train_seconds": read_json(trained).get("seconds") if (trained := Path(path) / "result.json").exists() else None,
        "judges": verdicts,
    }


def ask_agreement(judges: dict, posts: list, table: dict) -> dict:
    """{judge: how often it agrees with people}; says so where a judge does no better than "longer wins"."""
    sides = [human_summaries(table[side], table[f"{side}_token"]) for side in ("chosen", "rejected")]
    found = {}
    for name, judge in judges.items():
        a = found[name] = agreement(judge, posts, *sides)
        if not a["pairs"]:
            print(f"judge {name} has no verdict on any of {len(posts)} human choices")
        else:
            print(f"judge {name} agrees with people on {a['agreement']:.1%} of {a['pairs']} pairs "
                  f"({a['agreement_low']:.1%} to {a['agreement_high']:.1%}); \"the longer one wins\" on {a['longer_wins']:.1%} (by {a['longer_by']})"
                  + ("" if a["beats_length"] else ": NO BETTER than taking the longer one"))
    return found


def main(cfg: Config) -> dict:
    began = time.time()
    device = setup(cfg.seed, cfg.device)
    names, checkpoints = parse_judges(cfg.judge), find_checkpoints(cfg.model)
    if cfg.agreement and not names:
        raise UserError("--agreement asks how often a judge agrees with people: it needs --judge")
    if cfg.temperature < 0 or cfg.sample_temperature < 0 or not 0 < cfg.top_p <= 1 or cfg.n < 0:
        raise UserError("--temperature, --sample_temperature and --n must be at least 0, --top_p above 0 and at most 1")
    sweep = len(checkpoints) > 1 or bool(PATTERN.search(cfg.model))
    meta = read_meta(cfg.data_dir)
    posts, table = read_posts(cfg.data_dir, f"sft_{cfg.split}", ["reference_response", "reference_response_token"], cfg.n)
    references = human_summaries(table["reference_response"], table["reference_response_token"])
    pair_columns = ["chosen", "chosen_token", "rejected", "rejected_token"]
    people = read_posts(cfg.data_dir, cfg.agreement, pair_columns, cfg.agreement_rows) if cfg.agreement else None
    options = {**vars(cfg), "device": device}
    judges = {name: make_judge(name, **options) for name in names}
    scorer = judges["rm"] if "rm" in judges else make_judge("rm", **options) if cfg.reward_model else None
    reference = frozen(from_pretrained(cfg.ref_model, revision=cfg.revision, device=device), device, cfg.dtype) if cfg.ref_model else None
    if reference is not None:
        check_tokenizer(cfg.data_dir, load_tokenizer(cfg.ref_model, cfg.revision), reference.config.vocab_size, cfg.ref_model)
    out = open_out_dir(cfg, sweep)
    where = {name: out / name if sweep else out for name in checkpoints}
    print(f"{len(checkpoints)} checkpoint(s), {len(posts)} posts of sft_{cfg.split}, judge: {cfg.judge}")

    rows, results = {}, {}
    for name, path in checkpoints.items():  # first all summaries: a judge that costs money tells the price of all before it asks
        table_file = str(Path(cfg.data_dir) / f"sft_{cfg.split}.parquet")
        forget_if_changed(where[name], path, cfg.ref_model, cfg.reward_model, table_file, cfg.judge_template)
        if (where[name] / "result.json").exists():
            results[name] = read_json(where[name] / "result.json")
        if (where[name] / "summaries.parquet").exists():
            rows[name] = pq.read_table(where[name] / "summaries.parquet").to_pylist()
        else:
            rows[name] = summarise(cfg, device, path, reference, posts, references, cfg.response_tokens or meta["response_tokens"])
            own, human = [scorer.score(posts, s) if scorer else [None] * len(posts) for s in (summaries_of(rows[name]), references)]
            rows[name] = [{**row, "scores": a, "scores_reference": b} for row, a, b in zip(rows[name], own, human)]
            write(where[name] / "summaries.parquet", pa.Table.from_pylist(rows[name]))
        if rows[name][0]["rougeL"] is None and not results:
            print(ROUGE_HINT)

    found = ask_agreement(judges, *people) if people else {}
    new = [name for name in checkpoints if name not in results]
    pairs = [summary for name in new for summary in summaries_of(rows[name])]
    for judge, ask in judges.items() if new else ():
        asked = posts * len(new), pairs, references * len(new)
        preferences = ask(*asked)
        details = ask.details(*asked) if hasattr(ask, "details") else [{}] * len(pairs)
        for row, preference, detail in zip([row for name in new for row in rows[name]], preferences, details, strict=True):
            row |= {f"preference/{judge}": preference, **{f"{key}/{judge}": value for key, value in detail.items()}}
    for name in new:
        results[name] = measure(cfg, name, checkpoints[name], rows[name], references, names)
        for judge, verdict in results[name]["judges"].items():
            if verdict["unjudged"]:
                print(f"judge {judge}: {verdict['unjudged']} of {len(posts)} pairs of {name} have no verdict (its answers: summaries.parquet)")
        write(where[name] / "summaries.parquet", pa.Table.from_pylist(rows[name]))
        write(where[name] / "result.json", json.dumps(results[name]) + "\n")
    ordered = [results[name] for name in checkpoints]
    lines = write_sweep(out, ordered, rows, names) if sweep else ordered
    show(lines)
    if cfg.html:
        tokenizer = load_tokenizer(next(iter(checkpoints.values())), cfg.revision)
        page = page_data(rows, ordered, names, tokenizer, cfg.html_rows)
        write(out / "page.html", render(f"{cfg.model}: {len(posts)} posts of sft_{cfg.split}", page))
        print(f"page: {out / 'page.html'}")
    best = max(lines, key=lambda line: line["win_rate"] or 0)
    table = {"checkpoints": len(lines), "best": best["name"], **{key: best[key] for key in best if key.startswith("win_rate")}}
    result = {**(table if sweep else ordered[0]), **({"agreement": found} if found else {})}
    result |= {"out_dir": str(out), "seconds": round(time.time() - began, 1)}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    command_line(main, Config)
