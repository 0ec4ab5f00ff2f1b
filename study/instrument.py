"""Is the toy world fit to measure with? The pipeline over five seeds, held to criteria fixed before.

    1 RLHF works      RLOO with a KL term gains at least 0.15 gold over SFT, its 95 % interval is above 0.05;
                      DPO gains too
    2 then it fails   without a constraint gold rises for 15 updates, peaks above SFT and ends below its peak,
                      each by 0.1 at least, for every seed
    3 the proxy       right on 70 to 78 % of unseen pairs; the labels' Bayes optimum is 80 to 88 %
    4 size            gold of SFT, greedy and sampled, rises from small to medium to large, each time by more
                      than the standard error (the larger of two: over posts, and over seeds of SFT)
    5 temperature     RLOO gains more than twice what any other temperature of the SFT model gains
    6 robust          the same signs, and the order by gold "without KL (reward alone, MaxEnt) < offline (DPO,
                      SimPO) < KL", for all seeds, other matrix kernels and another thread count

Seed s has its own reward model, prompts and samples. Run again, it goes on where it was stopped. No setting
was chosen with these seeds, nor with this seed of the world.

    python -m study.instrument --out_dir=out/instrument          (JOBS=2 runs at a time)

Writes instrument.md, a section for RESULTS.md, and instrument.json.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pyarrow.parquet as pq
import torch

from evaluation.judges import make_judge
from rlhf.common import frozen
from rlhf.config import UserError, command_line
from rlhf.data import read_meta
from rlhf.generate import generate_all
from rlhf.pretrained import from_pretrained, load_tokenizer, read_json
from rlhf.summaries import Post, Summary, read_posts, sampled_summaries
from study.criteria import (
    METHODS,
    fails,
    not_temperature,
    proxy,
    robust,
    size_helps,
    works,
)
from study.settings import OFFLINE, RLOO, RM, SAMPLED, SFT, SIZES, TEMPERATURE
from study.tasks import Task, start_all

SEEDS = (81, 82, 83, 84, 85)
SFT_SEEDS = (81, 82, 83)
WORLD = 81
TEMPERATURES = (0.0, 0.3, 0.5, 0.7, 1.0)
OTHER_KERNELS = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "2"}

REWARDS = {"kl": "kl:0.1", "free": "kl:0 --save_every=60 --keep=0", "maxent": "maxent_length:0.1"}


@dataclass(frozen=True, kw_only=True)
class Config:
    # I/O
    out_dir: str  # data, runs and the report
    # size
    seeds: int = 5  # reward models, each with its own runs
    rows: int = 500  # posts that are judged


def pipeline(data: Path, base: str, to: Path, seeds: list[int], rows: int) -> list[list[Task]]:
    """Stages for one size of model; the tasks of a stage need the stages before."""
    common = f"--resume --data_dir={data}"
    sft, first = to / "sft", SFT_SEEDS[0]
    evaluate = f"evaluate.py {common} --judge=gold --n={rows} --ref_model={sft}"
    runs = []
    for s in seeds:
        rloo = f"train_rloo.py {common} --model={sft} --reward_model={to}/rm_s{s} --seed={s} {RLOO}"
        runs += [Task(to / f"{name}_s{s}", f"{rloo} --reward={reward}") for name, reward in REWARDS.items()]
        offline = f"train_simpo.py {common} --model={sft} --seed={s} {OFFLINE}"
        runs += [Task(to / f"{loss}_s{s}", f"{offline} --loss={loss}") for loss in ("simpo", "dpo")]
    models = ",".join([str(sft), *(str(task.out) for task in runs)])
    return [
        [Task(sft, f"train_sft.py {common} --model={base} --seed={first} {SFT}")],
        [Task(to / f"rm_s{s}", f"train_rm.py {common} --model={base} --seed={s} {RM}") for s in seeds],
        runs,
        [Task(to / "eval", f"{evaluate} --model={models} {SAMPLED}", done="sweep.csv")] if runs else [],
    ]


def other_sizes(out: Path) -> list[Task]:
    """More seeds of every SFT model."""
    tasks = []
    for size in SIZES:
        common = f"--resume --data_dir={out / size / 'data'}"
        base = out / size / "data" / "base"
        for s in SFT_SEEDS[1:]:
            command = f"train_sft.py {common} --model={base} --seed={s} {SFT}"
            tasks.append(Task(out / size / f"sft_s{s}", command))
    return tasks


def sft_models(folder: Path) -> list[Path]:
    return [folder / "sft", *(folder / f"sft_s{s}" for s in SFT_SEEDS[1:])]


# --- measuring


def sampled(
    model: Path, data: Path, temperature: float, rows: int, seed: int = 1,
) -> tuple[list[Post], list[Summary]]:
    """The first posts and one summary of each."""
    posts, _ = read_posts(str(data), "sft_validation", [], rows)
    prompts = [post.query_token for post in posts]
    generator = torch.Generator().manual_seed(seed)
    limit = read_meta(str(data))["response_tokens"]
    lm = frozen(from_pretrained(str(model)))
    options = {"temperature": temperature, "generator": generator}
    samples, ended = generate_all(lm, prompts, 1, limit, batch=64, **options)
    return posts, sampled_summaries(load_tokenizer(str(model)), samples, ended)


def gold_of(model: Path, data: Path, temperature: float, rows: int) -> list[float]:
    return make_judge("gold", data_dir=str(data)).score(*sampled(model, data, temperature, rows))


def right_on_samples(model: Path, reward_model: Path, data: Path, rows: int) -> float:
    """How often the reward model orders two samples of a policy as gold does (equal gold left out)."""
    device = torch.device("cpu")
    options = {"revision": "main", "device": device, "dtype": "float32", "micro_batch_tokens": 8192}
    proxy = make_judge("rm", reward_model=str(reward_model), data_dir=str(data), **options)
    gold = make_judge("gold", data_dir=str(data))
    pair = [sampled(model, data, TEMPERATURE, rows, seed) for seed in (1, 2)]
    scores, truth = (np.subtract(*(judge.score(*one) for one in pair)) for judge in (proxy, gold))
    differ = np.abs(truth) > 1e-9
    return float((scores * truth > 0)[differ].mean()) if differ.any() else float("nan")


def remembered(path: Path, measure: Callable[[], dict]) -> dict:
    if not path.exists():
        path.write_text(json.dumps(measure()))
    return read_json(path)


def evaluations(folder: Path) -> dict[str, dict]:
    lines = [json.loads(line) for line in (folder / "eval" / "metrics.jsonl").read_text().splitlines()]
    return {line["name"]: line for line in lines}


def main(cfg: Config) -> None:
    if not 2 <= cfg.seeds <= len(SEEDS):
        raise UserError(f"--seeds={cfg.seeds} must be 2 to {len(SEEDS)}: an interval needs two")
    out, seeds = Path(cfg.out_dir), list(SEEDS[: cfg.seeds])
    logs = out / "logs"
    torch.set_num_threads(1)
    make = f"data/toy.py --overwrite --seed={WORLD} --size="
    worlds = [Task(out / size / "data", make + size, "meta.json") for size in SIZES]
    start_all(worlds, logs)
    medium, data = out / "medium", out / "medium" / "data"
    plans = {size: pipeline(out / size / "data", f"{out}/{size}/data/base", out / size,
                            seeds if size == "medium" else [], cfg.rows) for size in SIZES}
    for stage in zip(*plans.values()):
        start_all([task for tasks in stage for task in tasks], logs)
    start_all(other_sizes(out), logs)
    other = out / "other_kernels"
    for tasks in pipeline(data, f"{data}/base", other, seeds[:1], cfg.rows):
        start_all(tasks, logs, OTHER_KERNELS, jobs=1)

    def temperatures() -> dict:
        return {size: {str(t): [gold_of(model, data, t, cfg.rows) for model in sft_models(out / size)]
                       for t in TEMPERATURES} for size in SIZES}

    def along() -> dict:
        right = {}
        for s in seeds:
            models = [medium / "sft", *sorted((medium / f"free_s{s}" / "ckpt").glob("step_*"))]
            right[str(s)] = [right_on_samples(model, medium / f"rm_s{s}", data, cfg.rows) for model in models]
        return right

    golds = remembered(out / "temperatures.json", temperatures)
    on_samples = remembered(out / "on_samples.json", along)
    pairs = pq.read_table(data / "pairs_validation.parquet", columns=["preference"])
    preference = pairs["preference"].to_numpy()
    bayes = float(np.maximum(preference, 1 - preference).mean())
    rows = evaluations(medium)
    at_sft = {t: values[0] for t, values in golds["medium"].items()}  # of the SFT model that all start from
    criteria = {
        "1 RLHF works": works(rows, seeds),
        "2 then it fails": fails(medium, rows["sft"]["gold"], seeds),
        "3 the proxy": proxy(medium, bayes, seeds, on_samples),
        "4 size helps": size_helps(golds),
        "5 not temperature": not_temperature(at_sft, rows, seeds),
        "6 robust": robust(rows, evaluations(other), seeds),
    }
    lines = ["## Is the world fit to measure with?", "", "`python -m study.instrument`; what each criterion "
             "asks for stands at the top of that file.", ""]
    lines += ["| criterion | | measured |", "|---|---|---|"]
    for name, (passed, measured) in criteria.items():
        verdict = "pass" if passed else "FAIL"
        print(f"{name}: {verdict}\n    {measured}")
        lines.append(f"| {name} | {verdict} | {measured} |")
    lines += ["", "| method | gold | KL | entropy |", "|---|---|---|---|"]
    for t in TEMPERATURES:
        lines.append(f"| SFT at temperature {t} | {mean(at_sft[str(t)]):.2f} | | |")
    for name in reversed(METHODS):
        own = [rows[f"{name}_s{s}"] for s in seeds]
        gold = [row["gold"] for row in own]
        kl, entropy = mean(row["kl"] for row in own), mean(row["entropy"] for row in own)
        lines.append(f"| {name} | {mean(gold):.2f} ± {stdev(gold):.2f} | {kl:.1f} | {entropy:.2f} |")
    (out / "instrument.md").write_text("\n".join(lines) + "\n")
    result = {name: {"passed": bool(p), "measured": measured} for name, (p, measured) in criteria.items()}
    (out / "instrument.json").write_text(json.dumps(result, indent=2) + "\n")
    passed = sum(bool(p) for p, _ in criteria.values())
    print(json.dumps({"passed": passed, "of": len(criteria), "out_dir": str(out)}))


if __name__ == "__main__":
    command_line(main, Config)
