"""The losses of train_simpo.py side by side in the toy world, each at its default options: trains one SFT
model with every loss on the same data, and prints a table of what came of it.

    python -m study.losses --out_dir=out/losses             (JOBS=2 runs at a time)
    python -m study.losses --out_dir=out/losses --table     runs nothing: the table of what is there

Run again, it goes on where it was stopped; a finished run is not run again. Per loss mean ± standard
deviation over seeds: gold reward, KL to the SFT model and length of sampled summaries of the final model
(evaluate.py); the change of log pi(chosen) in nats per sequence from the first updates of training to the
last (of a ranking, of its best response); seconds of all updates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from rlhf.config import UserError, command_line
from rlhf.losses import PREFERENCE_LOSSES
from study.logs import RunLog, find_runs, select
from study.pipeline import seeds_in, sft_model, steps, sweep, world
from study.standing import change
from study.tasks import ONE_THREAD, Task, start, start_all

PAIRS = 5000  # rows of the training table
ROWS = 500  # posts that are judged

MEASURED: dict[str, Callable[[RunLog], float]] = {  # by evaluate.py
    "gold": lambda run: run.evaluation["gold"],
    "KL": lambda run: run.evaluation["kl_full"],
    "tokens": lambda run: run.evaluation["response_length"],
}
LOGGED: dict[str, Callable[[RunLog], float]] = {  # in training
    "change of log π(chosen)": lambda run: change(run, "logps/chosen"),
    "seconds": lambda run: run.metrics["seconds"].sum(),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    # I/O
    out_dir: str  # data, sft, and the runs
    table: bool = False  # run nothing, print the table of what is there
    # size
    seeds: str = "1,2,3"  # of every loss


def command_of(loss: str) -> str:
    return f"train_simpo.py --loss={loss} --train_rows={PAIRS}"


def tasks(loss: str, seed: int, out: Path) -> list[Task]:
    return steps((command_of(loss),), out / f"{loss}_s{seed}", seed, out=out, models=out)


def cell(values: list[float]) -> str:
    """Mean, and the standard deviation where there are several seeds."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{mean(values):.2f} ± {stdev(values):.2f}"


def cells_of(seeds: list[RunLog], columns: dict[str, Callable[[RunLog], float]]) -> list[str]:
    for run in seeds:
        if not run.evaluation:
            raise UserError(f"{run.path}: no eval*/ beside it tells its gold; run evaluate.py over it")
    return [cell([column(run) for run in seeds]) for column in columns.values()]


def table(runs: list[RunLog]) -> list[str]:
    """Lines of markdown: the SFT model if it was evaluated, then a row per loss in the order of losses.py."""
    columns = MEASURED | LOGGED
    lines = ["| loss | seeds | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    for run in select(runs, "train_sft"):
        if run.evaluation:
            cells = cells_of([run], MEASURED)
            lines.append(f"| (SFT) | | {' | '.join(cells)} |" + " |" * len(LOGGED))
    for loss in PREFERENCE_LOSSES:
        seeds = select(runs, "train_simpo", loss=loss)
        if not seeds:
            continue
        cells = cells_of(seeds, columns)
        lines.append(f"| `{loss}` | {len(seeds)} | {' | '.join(cells)} |")
    return lines


def main(cfg: Config) -> None:
    seeds = seeds_in(cfg.seeds)
    out = Path(cfg.out_dir)
    if not cfg.table:
        logs = out / "logs"
        start_all(world(out), logs)
        start_all(sft_model(out), logs)
        runs = [task for loss in PREFERENCE_LOSSES for seed in seeds for task in tasks(loss, seed, out)]
        start_all(runs, logs)
        models = [f"{out}/sft", f"{out}/*_s[0-9]"]
        start(sweep(out, "eval", models, ROWS), logs, ONE_THREAD)  # goes on with what is new
    print("\n".join(table(find_runs(out))))


if __name__ == "__main__":
    command_line(main, Config)
