"""The whole field on one picture: every pair loss and every online method in the toy world, gold reward
against sqrt(KL), the truth known.

    python -m study.field --out_dir=out/field          (JOBS=2 runs at a time)

Every method runs at its settings (rlhf/losses.py, study/online.py) with three learning rates: a third of its
own, its own, three times that; each with the same seeds. About eight checkpoints of every run are scored by
evaluate.py: gold and KL of summaries sampled at 0.7. Seed s has its own three reward models, prompts and
samples, or its own order of the pairs. Beside them run the arms of claims_field.py.

Run again, it goes on where it was stopped; a finished run is never run again. A run whose loss is no longer
finite is a result, too. Scored checkpoints are deleted. Writes figure_field.png and field.md in --out_dir.
"""

import json
import os
import shutil
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from rlhf.config import command_line
from rlhf.losses import PREFERENCE_LOSSES, RANKED, defaults
from rlhf.out_dir import read_about
from study import online
from study.claims_field import claims_section
from study.field_table import field_section
from study.figures_field import figure_field
from study.frontier import Arm, course
from study.logs import find_runs, read_lines
from study.losses import PAIRS, command_of
from study.pipeline import (
    BATCH,
    average,
    names_in,
    reward_models,
    seconds_of,
    seeds_in,
    sft_model,
    steps,
    sweep,
    world,
)
from study.plan import WORLD
from study.plot import save
from study.tasks import JOBS, Task, start_all, start_chains

FACTORS = {"x0.33": 1 / 3, "x1": 1.0, "x3": 3.0}  # of the learning rate
POINTS = 8  # checkpoints of a run that are scored
ROWS = 200  # posts that each is scored on
LONG = 3  # times --episodes: runs that are to come past their peak
UPDATES = {"train_sft.py": 50, "train_simpo.py": PAIRS // 32}  # of a run
FEW = 32  # about: updates on rankings, or on pairs that sample.py selected


@dataclass(frozen=True, kw_only=True)
class Config:
    # I/O
    out_dir: str  # data, models, runs, sweeps; field.md and figure_field.png
    # size
    seeds: str = "1,2,3,4"  # of every method at every learning rate
    episodes: int = 2560  # responses that a run of RL samples
    only: str = ""  # some of the methods and arms, joined by ','


@dataclass(frozen=True)
class Method:
    title: str
    family: str  # the panel of the picture; empty: an arm of claims_field.py
    settings: str  # for readers
    commands: tuple[str, ...]  # as in pipeline.steps

    @property
    def factors(self) -> dict[str, float]:
        return FACTORS if self.family else {"x1": 1.0}


# --- methods


FAMILIES = {
    "offline, with a reference": "dpo ipo ipo_length dpo_length hinge chipo osp vpo",
    "offline, without a reference": "simpo simpo_pl dpo_free cpo cpo_mean orpo slic rrhf",
    "offline, other shapes and data": "alphapo gammapo gammapo_dpo confpo amopo cringe srpo",
    "RLOO and its neighbours": "rloo grpo gspo ppo chi2 function",
    "entropy and likelihood as rewards":
        "maxent attached aer minent entropy_minimisation sharpening_rl",
    "how responses are drawn": "reset adaptive budget thinking raft sharpening rso mpo",
    "several reward models": "ensemble worst uwo softmin warm",
    "online preferences": "online_dpo online_ipo ipo_md nash_md xpo vpo_online selm iterative_dpo",
}
THREE = "--reward_model={models}/rm,{models}/rm_2,{models}/rm_3"


def offline(loss: str) -> Method:
    family = next(name for name, members in FAMILIES.items() if loss in members.split())
    options = " ".join(f"--{key}={value:g}" for key, value in defaults(PREFERENCE_LOSSES[loss]).items())
    return Method(loss, family, f"`--loss={loss} {options}`", (command_of(loss),))


def sampling(name: str) -> Method:
    family = next(title for title, members in FAMILIES.items() if name in members.split())
    title, _, *commands = online.METHODS[name]
    return Method(title, family, online.short(name), tuple(commands))


def arm(title: str, command: str) -> Method:
    return Method(title, "", "", (command,))


def rloo_arm(title: str, options: str) -> Method:
    return arm(title, f"train_rloo.py {options} --episodes={{long}}")


def claim_arms() -> dict[str, Method]:
    """What claims_field.py reads beside the methods; at their own learning rate only. An ensemble's arm has
    the reward model of `free` as one of its three."""
    found = {
        "rloo_long": rloo_arm("RLOO, KL 0.1, long", "--reward=kl:0.1"),
        "weak": rloo_arm("RLOO, KL 0.02, long", "--reward=kl:0.02"),
        "free": rloo_arm("RLOO without KL, long", "--reward=kl:0"),
        "free_mean": rloo_arm("without KL, mean of 3", f"--reward=kl:0 {THREE}"),
        "free_min": rloo_arm("without KL, worst of 3", f"--reward=kl:0 {THREE} --reward_mix=min"),
        "free_uwo": rloo_arm("without KL, 3 uncertainty-weighted",
                             f"--reward=kl:0 {THREE} --reward_mix=uwo:0.5"),
        "free_warm": rloo_arm("without KL, averaged weights of 3",
                              "--reward=kl:0 --reward_model={models}/rm_average"),
        "maxent_1": arm("MaxEnt, coefficient 1", "train_rloo.py --reward=maxent_length:1"),
        "attached_1": arm("MaxEnt, coefficient 1, its whole gradient",
                          "train_rloo.py --reward=maxent_length:1 --attached"),
        "dpo_all": arm("DPO on the pairs of the reward model",
                       "train_simpo.py --loss=dpo --train_rows=20000"),
    }
    for loss in ("dpo", "ipo", "hinge", "chipo"):
        beta = defaults(PREFERENCE_LOSSES[loss])["beta"]
        for word, times in (("small", 1 / 5), ("large", 5)):
            if (loss, word) != ("chipo", "large"):
                found[f"{loss}_{word}_beta"] = arm(f"{loss}, β = {beta * times:g}",
                                                   f"{command_of(loss)} --beta={beta * times:g}")
    return found


METHODS = {loss: offline(loss) for loss in PREFERENCE_LOSSES}
METHODS |= {name: sampling(name) for name in online.METHODS}
ARMS = claim_arms()
EVERYTHING = METHODS | ARMS


# --- runs


def folder(name: str, factor: str, seed: int) -> str:
    return f"{name}_{factor}_s{seed}"


def save_every(commands: tuple[str, ...], episodes: int) -> int:
    """Updates between two checkpoints: of a run of usual length there are about POINTS."""
    script = commands[-1].split()[0]
    updates = UPDATES.get(script, ceil(episodes / BATCH))
    ranked = any(f"--loss={loss} " in f"{commands[-1]} " for loss in RANKED)
    if script == "train_simpo.py" and (ranked or len(commands) > 1):
        updates = FEW
    return ceil(updates / POINTS)


def chain(name: str, factor: str, seed: int, cfg: Config) -> list[Task]:
    """The tasks of a run, one after the other."""
    out = Path(cfg.out_dir)
    method = EVERYTHING[name]
    keep = f" --save_every={save_every(method.commands, cfg.episodes)} --keep=0"
    long = str(LONG * cfg.episodes)
    commands = [command.replace("{long}", long) + keep * (not command.startswith("sample.py"))
                for command in method.commands]
    found = steps(
        tuple(commands), out / folder(name, factor, seed), seed, out=out, models=out / f"models_s{seed}",
        episodes=cfg.episodes, factor=method.factors[factor],
    )
    return [Task(task.out, task.command, may_diverge=True) for task in found]


def preparation(names: list[str], seed: int, out: Path) -> list[list[Task]]:
    """Reward models of a seed, and an average, if one of these methods asks for them."""
    if all(command.startswith("train_simpo.py") for name in names for command in EVERYTHING[name].commands):
        return []
    models = out / f"models_s{seed}"
    three = reward_models(out, models, (10 * seed + 1, 10 * seed + 2, 10 * seed + 3))
    return [three, *average(out, models)]


def trained(tasks: list[Task]) -> list[Task]:
    """The training runs of a chain that have begun."""
    return [task for task in tasks if (task.out / "metrics.jsonl").exists()]


def points(task: Task) -> list[str]:
    """The checkpoints of an ended run, and its final model where that is none of them; by the log, so that
    the list stays when the checkpoints are gone."""
    last = read_lines(task.out / "metrics.jsonl")[-1]["step"]
    every = int(task.command.split("--save_every=")[1].split()[0])
    found = [f"{task.out}/ckpt/step_{step:08d}" for step in range(every, last + 1, every)]
    return found + [str(task.out)] * (last % every > 0 and not task.diverged())


def scoring(name: str, seed: int, cfg: Config) -> list[Task]:
    """One sweep over what a method left with one seed."""
    out = Path(cfg.out_dir)
    runs = [task for factor in EVERYTHING[name].factors for task in trained(chain(name, factor, seed, cfg))]
    models = [model for task in runs for model in points(task)]
    return [sweep(out, f"eval_{name}_s{seed}", [f"{out}/sft", *models], ROWS)] if models else []


def run_all(names: list[str], seeds: list[int], cfg: Config) -> None:
    out = Path(cfg.out_dir)
    logs = out / "logs"
    start_all(world(out, f"--seed={WORLD}"), logs)
    start_all(sft_model(out), logs)
    for seed in seeds:
        for stage in preparation(names, seed, out):
            start_all(stage, logs)
        chains = [chain(name, factor, seed, cfg) for name in names for factor in EVERYTHING[name].factors]
        start_chains(chains, logs)
        start_all([task for name in names for task in scoring(name, seed, cfg)], logs)
        for tasks in chains:
            for task in tasks:
                shutil.rmtree(task.out / "ckpt", ignore_errors=True)


# --- what came of it


def read_field(names: list[str], seeds: list[int], cfg: Config) -> dict[str, dict[str, Arm]]:
    """{method: {factor: its seeds}}"""
    out = Path(cfg.out_dir)
    logs = {run.path.name: run for run in find_runs(out)}
    sft = logs["sft"].evaluation
    found: dict[str, dict[str, Arm]] = {}
    for name in names:
        for factor in EVERYTHING[name].factors:
            arm = found.setdefault(name, {}).setdefault(factor, [])
            for seed in seeds:
                tasks = chain(name, factor, seed, cfg)
                diverged = any(task.diverged() for task in tasks)
                arm.append(course(sft, [logs[task.out.name] for task in trained(tasks)], diverged))
    return found


def seconds_per_run(name: str, seeds: list[int], out: Path) -> list[float]:
    """Of the runs of a method whose seconds are known."""
    known = seconds_of(out)
    runs = [folder(name, factor, seed) for factor in EVERYTHING[name].factors for seed in seeds]
    return [known[run] for run in runs if run in known]


def provenance(cfg: Config) -> str:
    about = read_about(Path(cfg.out_dir) / "sft")
    return (f"(`python -m study.field --seeds={cfg.seeds} --episodes={cfg.episodes}`, begun "
            f"{about['started'].split()[0]}, {os.cpu_count()} cores, {JOBS} runs at a time, torch "
            f"{about['torch']}.)\n")


def main(cfg: Config) -> dict:
    names, seeds = names_in(cfg.only, EVERYTHING), seeds_in(cfg.seeds)
    out = Path(cfg.out_dir)
    run_all(names, seeds, cfg)
    field = read_field(names, seeds, cfg)
    shown = {name: field[name] for name in names if name in METHODS}
    sections = []
    if shown:
        save(figure_field(shown, METHODS), str(out / "figure_field.png"))
        spent = {name: seconds_per_run(name, seeds, out) for name in shown}
        sections.append(field_section(shown, METHODS, seeds, spent))
    sections.append(claims_section(field))
    (out / "field.md").write_text("\n".join([*sections, provenance(cfg)]))
    result = {"methods": len(shown), "seeds": len(seeds), "table": str(out / "field.md")}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    command_line(main, Config)
