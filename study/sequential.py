"""How many seeds a claim gets, decided beforehand; and the runs of the paper's claims by that rule.

Every arm starts with the seeds of the first look. A claim that its rule leaves open gets more, for every arm
that it reads, up to the last look; one that is decided stays as decided. Looking several times would find
something in noise too often, so each look has its own level: what the looks may err in sum is 5 %, whatever
depends on what (the union bound; little is spent on the first looks, as by O'Brien and Fleming 1979).

    python -m study.sequential --out_dir=out/study          (JOBS=2 runs at a time)

Run again, it goes on where it was stopped; a finished run is never run again.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rlhf.config import UserError, command_line
from study.arms import Study
from study.claims import CLAIMS
from study.logs import RunLog, find_runs
from study.plan import (
    ARMS,
    best_of_n,
    crossed,
    evaluation,
    evaluations,
    reward_models,
    sft_models,
    worlds,
)
from study.settings import SIZES
from study.tasks import start_all
from study.verdict import OPEN, Claim

LOOKS = (4, 8, 12, 16, 24)  # seeds of each look,
SPENT = (0.005, 0.005, 0.01, 0.01, 0.02)  # and what its intervals may err: 0.05 in sum

Folders = dict[str, list[RunLog]]


@dataclass(frozen=True, kw_only=True)
class Config:
    # I/O
    out_dir: str  # folders small, medium, large
    # size
    most_seeds: int = LOOKS[-1]  # no look at more seeds than this


@dataclass(frozen=True)
class Conclusion:
    claim: Claim
    seeds: int  # of the look at which it was decided, or of the last one
    level: float  # of the intervals of that look
    power: str  # what difference that look could have seen
    arms: frozenset[tuple[str, str]]  # (size, name) of what it read


def seeds_of(folders: Folders, arm: tuple[str, str]) -> set[int]:
    size, name = arm
    return {run.config["seed"] for run in folders[size] if run.path.name.rpartition("_s")[0] == name}


def look(claim: Callable[[Study], Claim], folders: Folders, index: int) -> Conclusion:
    """The claim by the first seeds alone."""
    first = {size: [run for run in runs if run.config["seed"] <= LOOKS[index]]
             for size, runs in folders.items()}
    study = Study(first, level=1 - SPENT[index])
    return Conclusion(claim(study), LOOKS[index], study.level, study.power(), frozenset(study.used))


def conclude(claim: Callable[[Study], Claim], folders: Folders) -> Conclusion:
    """Looks again as long as the claim is open and all that it reads has the seeds of the next look."""
    found = look(claim, folders, 0)
    for index in range(1, len(LOOKS)):
        needed = set(range(1, LOOKS[index] + 1))
        if found.claim.verdict != OPEN or not all(needed <= seeds_of(folders, arm) for arm in found.arms):
            break
        found = look(claim, folders, index)
    return found


def wanted(folders: Folders, index: int) -> set[tuple[str, str]]:
    """The arms that need the seeds of a look: those of the claims that the looks before left open."""
    if index == 0:
        return {(arm.size, arm.name) for arm in ARMS}
    found = [conclude(claim, folders) for claim in CLAIMS]
    return {arm for c in found if c.claim.verdict == OPEN and c.seeds < LOOKS[index] for arm in c.arms}


def main(cfg: Config) -> None:
    if cfg.most_seeds < LOOKS[0]:
        raise UserError(f"--most_seeds={cfg.most_seeds}: the first look is at {LOOKS[0]}")
    out = Path(cfg.out_dir)
    logs = out / "logs"
    start_all(worlds(out), logs)
    start_all(sft_models(out), logs)
    before = 0
    for index, seeds in enumerate(LOOKS):
        if seeds > cfg.most_seeds:
            break
        names = wanted({size: find_runs(out / size) for size in SIZES}, index)
        arms = [arm for arm in ARMS if (arm.size, arm.name) in names]
        print(f"look {index + 1}: {len(arms)} arms with {seeds} seeds", flush=True)
        new = range(before + 1, seeds + 1)
        if any(arm.script == "train_rloo.py" for arm in arms):
            start_all(reward_models(out, new), logs)
        runs = [arm.task(out, seed) for seed in new for arm in arms]
        start_all(runs, logs)
        start_all(evaluations(out, runs, with_sft=index == 0), logs)
        before = seeds
    start_all(best_of_n(out, range(1, LOOKS[0] + 1)), logs)
    start_all(crossed(out), logs)
    sft = out / "small" / "sft"
    models = str(out / "small" / "crossed" / "*_s*")
    start_all([evaluation(out / "small" / "crossed", "eval", models, sft)], logs)
    checkpoints = str(out / "small" / "simpo_beta2_*" / "ckpt" / "*")  # Figure 6
    start_all([evaluation(out / "small", "eval_checkpoints", checkpoints, sft)], logs)
    folders = {size: find_runs(out / size) for size in SIZES}
    verdicts = [conclude(claim, folders).claim.verdict for claim in CLAIMS]
    print(json.dumps({verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}))


if __name__ == "__main__":
    command_line(main, Config)
