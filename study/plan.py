"""What runs/study.sh runs for the paper's claims: the arms as a table, and the commands of their runs.

Small, medium and large stand for the paper's 1B, 2.8B and 6.9B; the learning rates HIGH, TENTH and TWENTIETH
for its 1e-6, 1e-7 and 5e-8 (online), OFFLINE_HIGH and OFFLINE_LOW for its 1e-6 and 2e-7. In trial runs in
another world KL-constrained RLOO gained gold at HIGH, and DPO at OFFLINE_HIGH but no more at twice that.
Seed s of an arm has its own reward model, prompts and samples. A second reward model watches: what it
scores is logged (rm_std), not learnt from.
"""

from dataclasses import dataclass
from pathlib import Path

from study.arms import GAMMAS, HIGH, OFFLINE_HIGH, OFFLINE_LOW, TENTH, TWENTIETH, lr_text
from study.settings import RM, SAMPLED, SFT, SIZES
from study.tasks import Task

WORLD = 41  # seed of the world: no setting was chosen in it
ONLINE = "--k=4 --batch_size=64 --episodes=4096 --temperature=0.7 --eval_rows=500"
OFFLINE = "--train_rows=5000 --batch_size=32 --keep=0 --save_every=39"
ROWS = 500  # posts that are judged
CROSSED = {"kl": "--reward=kl:0.1", "free": "--reward=kl:0"}  # reward models x seeds of the policy
CROSSED_SEEDS = (1, 2, 3, 4)


def watcher(seed: int) -> int:
    """Whose reward model watches: one that is there when these seeds begin."""
    return seed - 1 if seed > 1 else 2


@dataclass(frozen=True)
class Arm:
    size: str
    name: str
    options: str
    script: str = "train_rloo.py"

    def task(self, out: Path, seed: int, reward_model: int = 0) -> Task:
        """reward_model: whose seed is not the policy's (0: the same)."""
        folder = out / self.size
        command = f"{self.script} --resume --data_dir={folder}/data --model={folder}/sft --seed={seed}"
        if self.script == "train_simpo.py":
            return Task(folder / f"{self.name}_s{seed}", f"{command} {OFFLINE} {self.options}")
        scorer = f"{out}/rm_s{reward_model or seed}"
        if not reward_model:
            scorer += f",{out}/rm_s{watcher(seed)} --reward_mix=first"
        command += f" --reward_model={scorer} {ONLINE} {self.options}"
        to = f"crossed/{self.name}_rm{reward_model}_s{seed}" if reward_model else f"{self.name}_s{seed}"
        return Task(folder / to, command)


def online_arms(size: str) -> list[Arm]:
    """The paper's 4.1 to 4.2.1 at one size."""
    large = size == "large"
    betas = (0.2, 0.05) if large else (0.5, 0.2, 0.05, 0.02)
    alphas = (0, 0.1, 1) if large else (0, 0.1, 0.3, 1)
    lrs = (HIGH, TENTH) if large else (HIGH, TENTH, TWENTIETH)
    arms = [("kl", beta, HIGH, "") for beta in betas]  # coefficient 0 is MaxEnt's coefficient 0
    arms += [("maxent_length", alpha, lr, "") for lr in lrs for alpha in alphas]  # eq. 7
    if not large:
        arms += [("minent_length", alpha, HIGH, "") for alpha in (0.1, 0.3, 1)]
    for lr in (HIGH, TENTH):
        if size == "medium":  # 4.2: a tighter clip range
            arms += [("maxent_length", 0.1, lr, f" --clip={clip}") for clip in ("1e-2", "1e-4")]
        if size == "small":
            arms += [("maxent", alpha, lr, "") for alpha in (0.02, 0.1)]  # eq. 6
            fill = " --invalid_logprob_fill=1.0"  # padding filled with 1.0 instead of masked
            arms += [("maxent_length", alpha, lr, fill) for alpha in (0.1, 1)]
    made = []
    for reward, coefficient, lr, extra in arms:
        name = f"rloo_{reward}_{coefficient:g}_lr{lr_text(lr)}{extra.replace(' --', '_').replace('=', '')}"
        made.append(Arm(size, name, f"--reward={reward}:{coefficient:g} --lr={lr_text(lr)}{extra}"))
    return made


def offline_arms() -> list[Arm]:
    """SimPO and DPO, on the small model only, as in the paper: Figures 4, 6 to 9, 4.3, appendix B."""
    arms = []
    for lr in map(lr_text, (OFFLINE_HIGH, OFFLINE_LOW)):
        for gamma in GAMMAS:
            for beta in (2, 0.1):
                options = f"--loss=simpo --beta={beta:g} --gamma={gamma:g} --lr={lr}"
                arms.append((f"simpo_beta{beta:g}_gamma{gamma:g}_lr{lr}", options))
        arms.append((f"dpo_lr{lr}", f"--loss=dpo --beta=0.05 --lr={lr}"))
        arms.append((f"dpo_length_lr{lr}", f"--loss=dpo_length --beta=2 --gamma=0 --lr={lr}"))
    return [Arm("small", name, options, "train_simpo.py") for name, options in arms]


ARMS = [arm for size in reversed(SIZES) for arm in online_arms(size)] + offline_arms()  # the longest first


def worlds(out: Path) -> list[Task]:
    """The same posts for every size."""
    make = f"data/toy.py --overwrite --seed={WORLD} --size="
    return [Task(out / size / "data", make + size, "meta.json") for size in SIZES]


def sft_models(out: Path) -> list[Task]:
    tasks = []
    for size in reversed(SIZES):
        folder = out / size
        command = f"train_sft.py --resume --data_dir={folder}/data --model={folder}/data/base {SFT}"
        tasks.append(Task(folder / "sft", command))
    return tasks


def reward_models(out: Path, seeds: range) -> list[Task]:
    """One per seed, of medium size, the same for policies of every size."""
    data = out / "medium" / "data"
    command = f"train_rm.py --resume --data_dir={data} --model={data}/base {RM} --seed="
    return [Task(out / f"rm_s{seed}", f"{command}{seed}") for seed in seeds]


def crossed(out: Path) -> list[Task]:
    """A few arms with every reward model for every seed of the policy."""
    arms = [Arm("small", name, f"{reward} --lr={lr_text(HIGH)}") for name, reward in CROSSED.items()]
    return [arm.task(out, seed, rm) for arm in arms for rm in CROSSED_SEEDS for seed in CROSSED_SEEDS]


def best_of_n(out: Path, seeds: range) -> list[Task]:
    tasks = []
    for size in reversed(SIZES):
        folder = out / size
        command = f"-m study.best_of_n --overwrite --data_dir={folder}/data --model={folder}/sft"
        tasks += [Task(folder / f"best_of_n_s{s}", f"{command} --reward_model={out}/rm_s{s} --seed={s}",
                       "metrics.jsonl") for s in seeds]
    return tasks


def evaluation(folder: Path, name: str, models: str, sft: Path) -> Task:
    """Of the runs in a folder: win rate against the reference summaries by the gold reward.

    Sampled as in training: greedy summaries of the SFT model come close to the references in this world,
    which leaves little to gain; greedy gold is in every result.json.
    """
    command = f"evaluate.py --resume --data_dir={sft.parent}/data --model={models} --ref_model={sft}"
    return Task(folder / name, f"{command} --judge=gold --n={ROWS} {SAMPLED}", "sweep.csv")


def evaluations(out: Path, tasks: list[Task], with_sft: bool) -> list[Task]:
    """One sweep per size over these runs; named after the first seed and the last."""
    found = []
    for size in reversed(SIZES):
        folder = out / size
        runs = [task.out for task in tasks if task.out.parent == folder]
        seeds = sorted({int(run.name.rpartition("_s")[2]) for run in runs})
        if runs:
            sft = folder / "sft"
            models = ",".join(map(str, [sft, *runs] if with_sft else runs))
            found.append(evaluation(folder, f"eval_s{seeds[0]}_{seeds[-1]}", models, sft))
    return found
