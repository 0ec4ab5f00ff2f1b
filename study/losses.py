"""The losses of train_simpo.py side by side, as a markdown table: what each did to one model on the same
data.

    python -m study.losses --runs=out/losses            (the folder that runs/losses.sh fills)

Per loss mean ± standard deviation over seeds: gold reward, KL to the SFT model and length of sampled
summaries of the final model (evaluate.py); the change of log pi(chosen) in nats per sequence from the first
updates of training to the last (of a ranking, of its best response); seconds of all updates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, stdev

from rlhf.config import UserError, command_line
from rlhf.losses import PREFERENCE_LOSSES
from study.logs import RunLog, find_runs, select
from study.standing import change

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
    runs: str  # folder with runs of train_simpo.py, and evaluate.py's sweep over them beside them (eval*)


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
    print("\n".join(table(find_runs(cfg.runs))))


if __name__ == "__main__":
    command_line(main, Config)
