"""What a method in the toy world starts from, and the commands of a run: shared by the studies of methods
(online.py, losses.py, field.py)."""

import re
from pathlib import Path

from rlhf.config import UserError
from study.arms import lr_text
from study.settings import RM, SAMPLED, SFT
from study.tasks import Task

# What methods of one script have in common
BATCH = 64  # responses per update of what samples
SAMPLES = f"--batch_size={BATCH} --episodes={{episodes}}"
COMMON = {
    "train_rloo.py": f"--k=4 {SAMPLES} --ppo_epochs=1 --schedule=constant",
    "train_ppo.py": f"{SAMPLES} --ppo_epochs=1 --schedule=constant",
    "train_online.py": SAMPLES,
    "sample.py": "--rows=800",
    "train_sft.py": "--batch_size=16 --warmup=0.05 --loss_on=response --max_grad_norm=1",
    "train_simpo.py": "--batch_size=32",
}
RATES = {  # learning rates
    "train_rloo.py": 2e-4,
    "train_ppo.py": 2e-4,
    "train_online.py": 2e-4,
    "train_sft.py": 3e-4,
    "train_simpo.py": 1e-4,
}
RM_GOES_ON = f"{RM} --init=pretrained --lr=5e-4 --train_rows=8000"  # a later option overrides
OFFLINE = ("train_sft.py", "train_simpo.py")  # they ask no reward model


# --- preparation


def world(out: Path, options: str = "") -> list[Task]:
    return [Task(out / "data", f"data/toy.py --overwrite {options}".strip(), "meta.json")]


def sft_model(out: Path) -> list[Task]:
    command = f"train_sft.py --resume --data_dir={out}/data --model={out}/data/base {SFT}"
    return [Task(out / "sft", command)]


def reward_models(out: Path, models: Path, seeds: tuple[int, int, int]) -> list[Task]:
    """Three, in the folder `models`: rm, rm_2 and rm_3."""
    command = f"train_rm.py --resume --data_dir={out}/data --model={out}/data/base {RM} --seed="
    return [Task(models / name, f"{command}{seed}") for name, seed in zip(("rm", "rm_2", "rm_3"), seeds)]


def average(out: Path, models: Path) -> list[list[Task]]:
    """Stages: three reward models that go on from `rm`, each with another head and order; their mean weights.
    WARM averages models of one pretrained start; of random starts of their own the mean is no model."""
    command = f"train_rm.py --resume --data_dir={out}/data --model={models}/rm {RM_GOES_ON} --seed="
    members = [Task(models / f"rm_on_{seed}", f"{command}{seed}") for seed in (1, 2, 3)]
    names = ",".join(str(task.out) for task in members)
    mean = Task(models / "rm_average", f"average.py --overwrite --models={names}", "config.json")
    return [members, [mean]]


# --- runs


def steps(
    commands: tuple[str, ...], run: Path, seed: int, *, out: Path, models: Path, episodes: int = 0,
    factor: float = 1.0,
) -> list[Task]:
    """The tasks of a run, one after the other; a later option overrides an earlier one.

    commands  a script and its own options, with {run}: the run's folder, {models}: that of the reward models,
              {third}: updates in a third of the run
    factor    of all learning rates
    """
    tasks = []
    data = out / "data"
    for step in commands:
        script, _, own = step.partition(" ")
        reads = f"--data_dir={data} --model={out}/sft"
        if script not in OFFLINE:
            reads += f" --reward_model={models}/rm"
        lr = f"--lr={lr_text(RATES[script] * factor)}" if script in RATES else ""
        words = {"run": run, "models": models, "episodes": episodes, "third": episodes // BATCH // 3 + 1}
        options = f"{reads} --seed={seed} {COMMON[script]} {lr} {own}".format(**words)
        elsewhere = re.search(r" --out_dir=(\S+)", options)
        to = Path(f"{run}_data") if script == "sample.py" else Path(elsewhere[1] if elsewhere else run)
        options = re.sub(r" --out_dir=\S+", "", options)
        tasks.append(Task(to, " ".join(f"{script} --resume {options}".split())))
        data = to if script == "sample.py" else data
    return tasks


def sweep(out: Path, name: str, models: list[str], rows: int) -> Task:
    """evaluate.py over runs and checkpoints: gold, KL and length of summaries sampled as in training."""
    command = f"evaluate.py --data_dir={out}/data --model={','.join(models)} --ref_model={out}/sft"
    return Task(out / name, f"{command} --judge=gold --n={rows} {SAMPLED}", "sweep.csv")


def seconds_of(out: Path) -> dict[str, float]:
    """{run: seconds of all its steps}, from the lines `run seconds` of seconds.txt; a run of several steps,
    or one that was made longer, has several."""
    lines = (out / "seconds.txt").read_text().splitlines() if (out / "seconds.txt").exists() else []
    total: dict[str, float] = {}
    for name, seconds in (line.split() for line in lines if line.strip()):
        run = re.sub(r"(_s\d+)_(data|dpo)$", r"\1", name)
        total[run] = total.get(run, 0.0) + float(seconds)
    return total


# --- options of the studies


def seeds_in(text: str) -> list[int]:
    """"1,2" -> [1, 2]"""
    parts = text.split(",")
    if not all(re.fullmatch(r"[1-9]\d*", part) for part in parts) or len(set(parts)) < len(parts):
        raise UserError(f"--seeds={text}: whole numbers from 1 on joined by ',', each once")
    return [int(part) for part in parts]


def names_in(text: str, known) -> list[str]:
    """Those named, or all; in the order of `known`."""
    named = text.split(",") if text else list(known)
    if unknown := set(named) - set(known):
        raise UserError(f"--only={text}: unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    return [name for name in known if name in named]
