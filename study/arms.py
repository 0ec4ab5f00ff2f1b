"""Which runs belong together: the arms of a study, found by their settings. What is made of an arm:
standing.py.

An arm is one setting; its runs differ in the seed. `coefficient` is that of the reward's term (logs.py):
beta of a KL-constrained run, alpha of a MaxEnt or MinEnt one.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from evaluation.statistics import t_interval, t_quantile
from rlhf.config import UserError
from study.logs import RunLog, by_setting, select

# settings in which two seeds of one arm may differ
SEED_SETTINGS = {
    "seed", "out_dir", "data_dir", "model", "ref_model", "reward_model", "revision", "resume", "overwrite",
    "eval_rows", "eval_every", "save_every", "keep", "device", "dtype", "compile", "micro_batch_tokens",
    "rollout_prompts", "gradient_checkpointing",
}
Interval = tuple[float, float, float]  # mean, low, high
UNABLATED = "invalid_logprob_fill=None and the clip range 0.2"  # what `without_ablations` keeps, for messages

# the toy study of runs/study.sh
HIGH = 2e-4  # learning rates of RLOO: for the paper's 1e-6,
TENTH = 2e-5  # its 1e-7,
TWENTIETH = 1e-5  # and its 5e-8
OFFLINE_HIGH = 2e-4  # of SimPO and DPO: for the paper's 1e-6
OFFLINE_LOW = 4e-5  # and its 2e-7
GAMMAS = (0.0, 0.25, 0.5, 1.0, 2.0)  # SimPO's margins


def need(found, label: str, what: str):
    if not found:
        raise UserError(f"{label}: no runs of {what}")
    return found


def nth_size(folders: dict[str, list[RunLog]], i: int) -> tuple[str, list[RunLog]]:
    """The i-th model size, or the only one there is."""
    if i >= len(folders) > 1:
        raise UserError(f"--runs: this figure is about folder {i + 1}, and there are {len(folders)}; "
                        "name that one, or all in the order 1B, 2.8B, 6.9B")
    return list(folders.items())[i if len(folders) > 1 else 0]


def lr_text(lr: float) -> str:
    """0.0003 -> 3e-4"""
    digits, power = f"{lr:.1e}".split("e")
    return f"{float(digits):g}e{int(power)}"


# --- arms in any folder of runs


def seeds(runs: list[RunLog]) -> list[RunLog]:
    """The runs that differ in nothing but the seed, ordered by it.

    Should an arm hold several such groups, the largest; what is left out is said.
    """
    def settings(run: RunLog) -> dict:
        return {key: value for key, value in run.config.items() if key not in SEED_SETTINGS}

    groups: dict[str, list[RunLog]] = {}
    for run in runs:
        groups.setdefault(json.dumps(settings(run), sort_keys=True), []).append(run)
    kept = max(groups.values(), key=len)
    usual = kept[0].config
    for run in runs:
        if run not in kept:
            other = [f"{key}={value}" for key, value in settings(run).items() if usual.get(key) != value]
            print(f"left out: {run.path} ({', '.join(other)}), no seed of {kept[0].path}", file=sys.stderr)
    lengths = {len(run.metrics["step"]) for run in kept}
    if len(lengths) > 1:
        print(f"{kept[0].path} and its other seeds have {min(lengths)} to {max(lengths)} updates: "
              "drawn up to the shortest", file=sys.stderr)
    return sorted(kept, key=lambda run: run.config.get("seed", 0))


def without_ablations(runs: list[RunLog]) -> list[RunLog]:
    """RLOO with padded tokens masked and the clip range 0.2 (or the largest there is)."""
    masked = select(runs, "train_rloo", invalid_logprob_fill=None)
    if not masked:
        return []
    clips = {run.config["clip"] for run in masked}
    usual = 0.2 if 0.2 in clips else max(clips)
    return [run for run in masked if run.config["clip"] == usual]


def by_lr(runs: list[RunLog], reward: str = "maxent_length") -> dict[float, dict[float, list[RunLog]]]:
    """{learning rate, from high to low: {coefficient: its seeds}}."""
    plain = without_ablations(runs)
    unpaid = select(plain, "train_rloo", reward="kl", coefficient=0)  # the same as any other term x 0
    found = by_setting(select(plain, "train_rloo", reward=reward), "lr")
    arms = {}
    for lr in sorted(found, reverse=True):
        arms[lr] = {coef: seeds(arm) for coef, arm in by_setting(found[lr], "coefficient").items()}
        same = select(unpaid, "train_rloo", lr=lr)
        if same and 0 not in arms[lr]:
            arms[lr] = {0.0: seeds(same), **arms[lr]}
    return arms


def kl_constrained(runs: list[RunLog]) -> dict[float, list[RunLog]]:
    """{KL coefficient, from high to low: its seeds}, at the highest learning rate of these runs."""
    kl_runs = select(without_ablations(runs), "train_rloo", reward="kl")
    found = by_setting([run for run in kl_runs if run.config["coefficient"] > 0], "lr")
    if not found:
        return {}
    arms = by_setting(found[max(found)], "coefficient")
    return {coef: seeds(arm) for coef, arm in reversed(arms.items())}


def maxent_at(
    label: str, runs: list[RunLog], ranks: tuple[int, ...],
) -> dict[float, dict[float, list[RunLog]]]:
    """`by_lr` at the learning rates of these ranks (0: the highest, -1: the lowest)."""
    arms = by_lr(runs)
    lrs = list(arms)
    least = max(rank + 1 if rank >= 0 else -rank for rank in ranks)
    what = f"train_rloo with reward=maxent_length, {UNABLATED} at {least} learning rate(s)"
    need(len(lrs) >= least, label, f"{what}; there are {', '.join(map(lr_text, lrs)) or 'none'}")
    return {lrs[rank]: arms[lrs[rank]] for rank in ranks}


def families(label: str, runs: list[RunLog]) -> dict[tuple[str, str], list[RunLog]]:
    """{(family, label): seeds}: every KL coefficient; MaxEnt at every learning rate and MinEnt at the
    highest, both at their smallest coefficient above 0."""
    what = f"train_rloo, {UNABLATED}, with a coefficient above 0 and"
    kl_arms = need(kl_constrained(runs), label, f"{what} reward=kl")
    arms = {("KL", f"KL, β = {coef:g}"): arm for coef, arm in kl_arms.items()}
    for family, reward, lrs in (("MaxEnt", "maxent_length", None), ("MinEnt", "minent_length", 1)):
        found = by_lr(runs, reward)
        coefs = [coef for at_lr in found.values() for coef in at_lr if coef > 0]
        if family == "MaxEnt":
            need(coefs, label, f"{what} reward=maxent_length")
        smallest = min(coefs, default=None)
        for lr, at_lr in list(found.items())[:lrs]:
            if smallest in at_lr:
                arms[family, f"{family}, α = {smallest:g}, lr {lr_text(lr)}"] = at_lr[smallest]
    return arms


def simpo_by_gamma(
    label: str, runs: list[RunLog], rank: int, gammas: tuple = (),
) -> tuple[str, dict[float, list[RunLog]]]:
    """A title and {gamma: its seeds} of SimPO at its largest beta and the lowest (rank 0) or the highest
    (-1) of its learning rates."""
    found = need(select(runs, "train_simpo", loss="simpo"), label, "train_simpo with loss=simpo")
    beta, found = max(by_setting(found, "beta").items())
    what = f"train_simpo with loss=simpo, beta={beta:g}"
    at_lr = by_setting(found, "lr")
    need(len(at_lr) > abs(rank), label, f"{what} at a learning rate above {lr_text(min(at_lr))}")
    lr = sorted(at_lr)[rank]
    arms = by_setting(at_lr[lr], "gamma")
    missing = [f"{gamma:g}" for gamma in gammas if gamma not in arms]
    need(not missing, label, f"{what}, lr={lr_text(lr)}, gamma={', '.join(missing)}")
    title = f"{label}: SimPO, β = {beta:g}, lr {lr_text(lr)}"
    return title, {gamma: seeds(arms[gamma]) for gamma in gammas or arms}


def dpo_seeds(label: str, runs: list[RunLog]) -> tuple[str, list[RunLog]]:
    """A title and the seeds of DPO at its highest learning rate."""
    found = need(select(runs, "train_simpo", loss="dpo"), label, "train_simpo with loss=dpo")
    at_lr = by_setting(found, "lr")
    arm = seeds(at_lr[max(at_lr)])
    return f"{label}: DPO, β = {arm[0].config['beta']:g}, lr {lr_text(max(at_lr))}", arm


# --- arms of the toy study


@dataclass(frozen=True)
class Study:
    """The runs of runs/study.sh. An arm that is missing is a UserError.

    It notes which arms were asked for and how wide its intervals were: sequential.py reads both.
    """

    folders: dict[str, list[RunLog]]  # {size: its runs}
    level: float = 0.95  # of the intervals
    used: set[tuple[str, str]] = field(default_factory=set)  # (size, name) of the arms asked for
    seen: dict[str, list[float]] = field(default_factory=dict)  # {unit: differences seen with power 0.8}

    def note(self, size: str, arms: dict[float, list[RunLog]]) -> dict[float, list[RunLog]]:
        self.used.update((size, run.path.name.rpartition("_s")[0]) for arm in arms.values() for run in arm)
        return arms

    def interval(self, values: Sequence[float], unit: str = "gold") -> Interval:
        """Of Student's t over the seeds."""
        found = t_interval(values, self.level)
        degrees = len(values) - 1
        if degrees:
            half = found[2] - found[0]
            t, power = t_quantile(degrees, self.level), t_quantile(degrees, 0.6)  # 0.6: one-sided 0.8
            self.seen.setdefault(unit, []).append(half * (1 + power / t))
        return found

    def power(self) -> str:
        """The differences that its intervals would have told from 0 with probability 0.8."""
        parts = []
        for unit, differences in self.seen.items():
            low, high = min(differences), max(differences)
            parts.append(f"{low:.2g} to {high:.2g} {unit}" if len(differences) > 1 else f"{low:.2g} {unit}")
        return "; ".join(parts)

    def arm(self, size: str, script: str, **settings) -> list[RunLog]:
        runs = sorted(select(self.folders[size], script, **settings), key=lambda run: run.config["seed"])
        if not runs:
            raise UserError(f"the study has no run of {script} with {settings} in {size}: "
                            "finish it with runs/study.sh")
        return self.note(size, {0.0: runs})[0.0]

    def sft(self, size: str) -> dict:
        """What evaluate.py says of the SFT model."""
        return select(self.folders[size], "train_sft")[0].evaluation

    def kl_arms(self, size: str) -> dict[float, list[RunLog]]:
        """The KL-constrained arms, by coefficient; all at the high learning rate."""
        found = kl_constrained(self.folders[size])
        return self.note(size, need(found, size, "train_rloo with reward=kl"))

    def maxent_by_lr(self, size: str) -> dict[float, dict[float, list[RunLog]]]:
        """{learning rate, from high to low: {coefficient: arm}}, MaxEnt (eq. 7)."""
        return {lr: self.note(size, arms) for lr, arms in by_lr(self.folders[size]).items()}

    def maxent_arms(self, size: str, lr: float) -> dict[float, list[RunLog]]:
        """The MaxEnt arms of a learning rate, by coefficient."""
        what = f"train_rloo with reward=maxent_length, lr={lr_text(lr)}"
        return self.note(size, need(by_lr(self.folders[size]).get(lr), size, what))

    def minent_arms(self, size: str) -> dict[float, list[RunLog]]:
        arms = by_lr(self.folders[size], "minent_length").get(HIGH)
        what = f"train_rloo with reward=minent_length, lr={lr_text(HIGH)}"
        return self.note(size, need(arms, size, what))

    def ablation(
        self, size: str, coefficient: float, lr: float, clip: float = 0.2, fill: float | None = None,
    ) -> list[RunLog]:
        """A MaxEnt arm (eq. 7) at a clip range, with or without filled padding."""
        settings = {"coefficient": coefficient, "lr": lr, "clip": clip, "invalid_logprob_fill": fill}
        return self.arm(size, "train_rloo", reward="maxent_length", **settings)

    def offline(self, loss: str, lr: float, **settings) -> list[RunLog]:
        """The offline methods run on the small model only, as in the paper."""
        return self.arm("small", "train_simpo", loss=loss, lr=lr, **settings)

    def simpo_arms(self, lr: float, beta: float = 2.0) -> dict[float, list[RunLog]]:
        """{gamma: arm}"""
        return by_setting(self.offline("simpo", lr, beta=beta), "gamma")
