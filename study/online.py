"""Every way to learn from one's own samples, side by side in the toy world: runs them, and prints a table.

    python -m study.online --out_dir=out/online             (JOBS=2 runs at a time)
    python -m study.online --out_dir=out/online --table     runs nothing: the table of what is there

All start from one SFT model and one reward model (some: three). Run again, it goes on where it was stopped; a
finished run is not run again. Per method the mean over seeds and their standard deviation: gold reward, KL to
the SFT model and length of sampled summaries of the final model (evaluate.py); mean seconds of all its steps
on one core.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rlhf.config import command_line
from study.logs import RunLog, find_runs
from study.losses import cells_of
from study.pipeline import (
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
from study.tasks import ONE_THREAD, Task, start, start_all, start_chains

REWARD_MODEL_SEEDS = (1, 2, 3)
ROWS = 300  # posts that are judged

ROUND = "--round_updates={third} --move_reference"
ENSEMBLE = "train_rloo.py --reward=kl:0.1 --reward_model={models}/rm,{models}/rm_2,{models}/rm_3"
# {name: (method, arXiv, its commands)}
METHODS = {
    "rloo": ("RLOO", "2402.14740", "train_rloo.py --reward=kl:0.1"),
    "grpo": ("GRPO", "2402.03300",
             "train_rloo.py --reward=kl:0.1 --advantage=grpo --policy_loss=token --clip_high=0.28"),
    "gspo": ("GSPO", "2507.18071", "train_rloo.py --reward=kl:0.1 --advantage=grpo --policy_loss=gspo "
             "--clip=3e-4 --clip_high=4e-4"),
    "ppo": ("PPO with a critic", "2403.17031", "train_ppo.py --kl_coef=0.1"),
    "maxent": ("MaxEnt", "2509.20265", "train_rloo.py --reward=maxent_length:0.1"),
    "attached": ("MaxEnt, its whole gradient", "README",
                 "train_rloo.py --reward=maxent_length:0.1 --attached"),
    "aer": ("MaxEnt at a target entropy", "2510.10959",
            "train_rloo.py --reward=maxent_length:0.1 --entropy_target=0.2 --entropy_rate=0.05"),
    "minent": ("MinEnt", "2509.20265", "train_rloo.py --reward=minent_length:0.1"),
    "entropy_minimisation": ("entropy minimisation", "2505.15134",
                             "train_rloo.py --reward=score:0+maxent:-0.5"),
    "sharpening_rl": ("sharpening by RL", "2412.01951",
                      "train_rloo.py --reward=score:0+ref_logprob:0.5+kl:0.5"),
    "chi2": ("χ²-RLHF", "2407.13399", "train_rloo.py --reward=chi2:0.05"),
    "reset": ("dataset reset (DR-PO)", "2404.08495", "train_rloo.py --reward=kl:0.1 --rollout=reset"),
    "adaptive": ("Reinforce-Ada", "2510.04996", "train_rloo.py --reward=kl:0.1 --rollout=adaptive"),
    "budget": ("budget per prompt (GVM)", "2505.02391", "train_rloo.py --reward=kl:0.1 --rollout=budget"),
    "ensemble": ("mean of 3 reward models", "2310.02743", ENSEMBLE),
    "worst": ("worst of 3", "2310.02743", f"{ENSEMBLE} --reward_mix=min"),
    "uwo": ("3, uncertainty-weighted", "2310.02743", f"{ENSEMBLE} --reward_mix=uwo:0.5"),
    "softmin": ("soft minimum of 3", "", f"{ENSEMBLE} --reward_mix=softmin:0.5"),
    "warm": ("averaged weights of 3 (WARM)", "2401.12187",
             "train_rloo.py --reward=kl:0.1 --reward_model={models}/rm_average"),
    "function": ("a function as the reward", "",
                 "train_rloo.py --reward=kl:0.1 --reward_model= --reward_fn=study/online.py:faithful"),
    "thinking": ("an answer after a marker (RLMT)", "2509.20357",
                 "train_rloo.py --reward=kl:0.1 --score_after=truly"),
    "online_dpo": ("online DPO", "2402.04792", "train_online.py --loss=dpo --beta=0.1"),
    "online_ipo": ("online IPO", "2403.08635", "train_online.py --loss=ipo --beta=0.1 --label=soft"),
    "ipo_md": ("IPO-MD", "2403.08635",
               "train_online.py --loss=ipo --beta=0.1 --label=soft --mixture=0.125"),
    "nash_md": ("Nash-MD", "2312.00886",
                "train_online.py --loss=nash_md --beta=0.1 --label=soft --opponent=0.5"),
    "xpo": ("XPO", "2405.21046", "train_online.py --loss=dpo --beta=0.1 --opponent=1 --explore=1e-5"),
    "vpo_online": ("optimistic VPO", "2405.19320",
                   "train_online.py --loss=dpo --beta=0.1 --opponent=1 --explore=0.01"),
    "selm": ("SELM", "2405.19332",
             f"train_online.py --loss=dpo --beta=0.01 --k=1 --data_pair --explore=1e-5 {ROUND}"),
    "iterative_dpo": ("iterative DPO", "2405.07863",
                      f"train_online.py --loss=dpo --beta=0.1 --k=8 --epochs=2 {ROUND}"),
    "raft": ("RAFT, ReST", "2304.06767", "sample.py --select=best --k=8", "train_sft.py"),
    "sharpening": ("sharpening by SFT", "2412.01951", "sample.py --select=own --k=8", "train_sft.py"),
    "rso": ("RSO", "2309.06657", "sample.py --select=rso --k=32 --accept=8 --rows=300",
            "train_simpo.py --loss=hinge"),
    "mpo": ("mixed preference optimisation", "2403.19443", "sample.py --select=gap --k=4 --gap=0.5",
            "train_simpo.py --loss=dpo --beta=0.1 --out_dir={run}_dpo",
            "train_rloo.py --reward=kl:0.1 --model={run}_dpo"),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    # I/O
    out_dir: str  # data, sft, rm, rm_2, rm_3, rm_average, and the runs
    table: bool = False  # run nothing, print the table of what is there
    # size
    seeds: str = "1,2,3"  # of every method
    episodes: int = 2560  # responses that a run of RL samples
    only: str = ""  # some of the methods, joined by ','


def faithful(prompts: list[str], texts: list[str]) -> list[float]:
    """A reward written by hand: words of the post that a summary tells, less words that it invents or tells
    again; over 10."""
    scores = []
    for prompt, text in zip(prompts, texts):
        told = re.findall(r"\w+", text)
        right = set(told) & set(re.findall(r"\w+", prompt.partition("POST:")[2]))
        scores.append((2 * len(right) - len(told)) / 10)
    return scores


def chain(name: str, seed: int, cfg: Config) -> list[Task]:
    """The tasks of a method's run, one after the other."""
    out = Path(cfg.out_dir)
    run = out / f"{name}_s{seed}"
    return steps(METHODS[name][2:], run, seed, out=out, models=out, episodes=cfg.episodes)


def short(name: str) -> str:
    """The commands as the table shows them: what tells this method from others."""
    shown = []
    for step in METHODS[name][2:]:
        text = step.format(run="mpo", models="", third="N").replace("=/", "=").replace(",/", ",")
        shown.append(re.sub(r" --(out_dir=\S+|rows=\d+|reward_model=(?= ))", "", text))
    return ", ".join(f"`{text}`" for text in shown)


COLUMNS: dict[str, Callable[[RunLog], float]] = {
    "gold": lambda run: run.evaluation["gold"],
    "KL": lambda run: run.evaluation["kl_full"],
    "tokens": lambda run: run.evaluation["response_length"],
}


def table(out: Path) -> list[str]:
    """Lines of markdown: the SFT model, then a row per method in the order of METHODS."""
    runs = {run.path.name: run for run in find_runs(out)}
    seconds = seconds_of(out)
    lines = ["| method | arXiv | command | " + " | ".join(COLUMNS) + " | seconds |", "|---" * 7 + "|"]
    if (sft := runs.get("sft")) and sft.evaluation:
        cells = cells_of([sft], COLUMNS)
        lines.append(f"| (SFT) | | | {' | '.join(cells)} | |")
    for name, (title, source, *_) in METHODS.items():
        seeds = [run for folder, run in runs.items() if re.fullmatch(rf"{name}_s\d+", folder)]
        if not seeds:
            continue
        cells = cells_of(seeds, COLUMNS)
        spent = [seconds[run.path.name] for run in seeds if run.path.name in seconds]
        cells.append(f"{sum(spent) / len(spent):.0f}" if spent else "")
        lines.append(f"| {title} | {source} | {short(name)} | {' | '.join(cells)} |")
    return lines


def main(cfg: Config) -> None:
    names, seeds = names_in(cfg.only, METHODS), seeds_in(cfg.seeds)
    out = Path(cfg.out_dir)
    if not cfg.table:
        logs = out / "logs"
        start_all(world(out), logs)
        start_all(sft_model(out), logs)
        start_all(reward_models(out, out, REWARD_MODEL_SEEDS), logs)
        for stage in average(out, out):
            start_all(stage, logs)
        start_chains([chain(name, seed, cfg) for seed in seeds for name in names], logs)
        models = [f"{out}/sft", f"{out}/*_s[0-9]"]
        start(sweep(out, "eval", models, ROWS), logs, ONE_THREAD)  # goes on with what is new
    print("\n".join(table(out)))


if __name__ == "__main__":
    command_line(main, Config)
