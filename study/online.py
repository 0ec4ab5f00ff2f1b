r"""Every way to learn from one's own samples, side by side: the commands of runs/online.sh, and its table.

    python -m study.online --commands --out=out/online    a line per run that is not finished: name, commands
    python -m study.online --table --out=out/online       a markdown table of what each came to

Per method the mean over seeds and their standard deviation: gold reward, KL to the SFT model and length of
sampled summaries of the final model (evaluate.py); mean seconds of all its steps on one core.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rlhf.config import UserError, command_line
from study.logs import RunLog, find_runs
from study.losses import cells_of

# What methods of one script have in common. {run}: a method's folder, {run}_data: what it selected.
SAMPLED = "--batch_size=64 --episodes={episodes} --lr=2e-4"
COMMON = {
    "train_rloo.py": f"--k=4 {SAMPLED} --ppo_epochs=1 --schedule=constant",
    "train_ppo.py": f"{SAMPLED} --ppo_epochs=1 --schedule=constant",
    "train_online.py": SAMPLED,
    "sample.py": "--rows=800",
    "train_sft.py": "--batch_size=16 --lr=3e-4 --warmup=0.05 --loss_on=response --max_grad_norm=1",
    "train_simpo.py": "--batch_size=32 --lr=1e-4",
}
ROUND = "--round_updates={third} --move_reference"
ENSEMBLE = "train_rloo.py --reward=kl:0.1 --reward_model={out}/rm,{out}/rm_2,{out}/rm_3"
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
             "train_rloo.py --reward=kl:0.1 --reward_model={out}/rm_average"),
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
    out: str  # the folder that runs/online.sh fills: data, sft, rm, rm_2, rm_3, rm_average, and the runs
    commands: bool = False  # print what is to be run
    table: bool = False  # print what came of it
    seeds: str = "1,2,3"  # of --commands
    episodes: int = 2560  # of --commands: responses that a run of RL samples
    only: str = ""  # of --commands: some of the methods, joined by ','


def faithful(prompts: list[str], texts: list[str]) -> list[float]:
    """A reward written by hand: words of the post that a summary tells, less words that it invents or tells
    again; over 10."""
    scores = []
    for prompt, text in zip(prompts, texts):
        told = re.findall(r"\w+", text)
        right = set(told) & set(re.findall(r"\w+", prompt.partition("POST:")[2]))
        scores.append((2 * len(right) - len(told)) / 10)
    return scores


def steps(name: str, seed: int, cfg: Config) -> list[str]:
    """The commands of a run; a later option overrides an earlier one."""
    out = cfg.out
    run = f"{out}/{name}_s{seed}"
    commands = []
    data = f"{out}/data"
    for step in METHODS[name][2:]:
        script, _, own = step.partition(" ")
        models = f"--model={out}/sft"
        if script not in ("train_sft.py", "train_simpo.py"):
            models += f" --reward_model={out}/rm"
        to = f"{run}_data" if script == "sample.py" else run
        options = f"--data_dir={data} {models} --out_dir={to} --seed={seed} {COMMON[script]} {own}"
        words = {"run": run, "out": out, "episodes": cfg.episodes, "third": cfg.episodes // 64 // 3 + 1}
        commands.append(f"python {script} --resume {options}".format(**words).strip())
        data = to if script == "sample.py" else data
    return commands


def finished(name: str, seed: int, out: str) -> bool:
    return Path(f"{out}/{name}_s{seed}/result.json").exists()


def short(name: str) -> str:
    """The commands as the table shows them: what tells this method from others."""
    shown = []
    for step in METHODS[name][2:]:
        text = step.format(run="mpo", out="", third="N", episodes="").replace("=/", "=").replace(",/", ",")
        shown.append(re.sub(r" --(out_dir=\S+|rows=\d+|reward_model=(?= ))", "", text))
    return ", ".join(f"`{text}`" for text in shown)


COLUMNS: dict[str, Callable[[RunLog], float]] = {
    "gold": lambda run: run.evaluation["gold"],
    "KL": lambda run: run.evaluation["kl_full"],
    "tokens": lambda run: run.evaluation["response_length"],
}


def seconds_of(out: Path) -> dict[str, float]:
    """{run: seconds}, from the lines that runs/online.sh writes: a run that was interrupted has several."""
    lines = (out / "seconds.txt").read_text().split("\n") if (out / "seconds.txt").exists() else []
    total: dict[str, float] = {}
    for name, seconds in (line.split() for line in lines if line.strip()):
        total[name] = total.get(name, 0.0) + float(seconds)
    return total


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
    if cfg.commands == cfg.table:
        raise UserError("give --commands or --table")
    if cfg.table:
        print("\n".join(table(Path(cfg.out))))
        return
    names = cfg.only.split(",") if cfg.only else list(METHODS)
    if unknown := set(names) - set(METHODS):
        raise UserError(f"--only={cfg.only}: unknown: {', '.join(sorted(unknown))}; "
                        f"known: {', '.join(METHODS)}")
    for seed in map(int, cfg.seeds.split(",")):
        for name in names:
            if not finished(name, seed, cfg.out):
                print(f"{name}_s{seed}", " && ".join(steps(name, seed, cfg)))


if __name__ == "__main__":
    command_line(main, Config)
