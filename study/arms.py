"""Which runs belong together: the arms of a study, found by their settings. An arm is one setting; its runs differ in the seed."""

import json
import sys

from rlhf.config import UserError
from study.logs import RunLog, by_setting, select

# settings in which two seeds of one arm may differ
SEED_SETTINGS = {"seed", "out_dir", "data_dir", "model", "ref_model", "reward_model", "revision", "resume", "overwrite", "eval_rows", "eval_every",
                 "save_every", "keep", "device", "dtype", "compile", "micro_batch_tokens", "rollout_prompts", "gradient_checkpointing"}


def need(found, label: str, what: str):
    if not found:
        raise UserError(f"{label}: no runs of {what}")
    return found


def folder(folders: dict[str, list[RunLog]], i: int) -> tuple[str, list[RunLog]]:
    """The i-th model size, or the only one there is."""
    if i >= len(folders) > 1:
        raise UserError(f"--runs: this figure is about folder {i + 1}, and there are {len(folders)}; name that one, or all in the order 1B, 2.8B, 6.9B")
    return list(folders.items())[i if len(folders) > 1 else 0]


def rate(lr: float) -> str:
    """0.0003 -> 3e-4"""
    digits, power = f"{lr:.1e}".split("e")
    return f"{float(digits):g}e{int(power)}"


def seeds(runs: list[RunLog]) -> list[RunLog]:
    """The runs that differ in nothing but the seed, ordered by it. Should an arm hold several such groups, the largest; what is left out is said."""
    groups: dict[str, list[RunLog]] = {}
    for run in runs:
        groups.setdefault(json.dumps({k: v for k, v in run.config.items() if k not in SEED_SETTINGS}, sort_keys=True), []).append(run)
    kept = max(groups.values(), key=len)
    for run in runs:
        if run not in kept:
            other = [f"{k}={v}" for k, v in run.config.items() if k not in SEED_SETTINGS and kept[0].config.get(k) != v]
            print(f"left out: {run.path} ({', '.join(other)}), no seed of {kept[0].path}", file=sys.stderr)
    if len(lengths := {len(run.metrics["step"]) for run in kept}) > 1:
        print(f"{kept[0].path} and its other seeds have {min(lengths)} to {max(lengths)} updates: drawn up to the shortest", file=sys.stderr)
    return sorted(kept, key=lambda run: run.config.get("seed", 0))


def win_rate(runs: list[RunLog]) -> float | None:
    """Mean over the seeds."""
    known = [run.win_rate for run in runs if run.win_rate is not None]
    return sum(known) / len(known) if known else None


def mark(won: float | None, sft: float | None) -> str:
    """✓ above the SFT model's win rate, × below it, = the same or unknown."""
    return "=" if won is None or sft is None or won == sft else "✓" if won > sft else "×"


def base(runs: list[RunLog]) -> list[RunLog]:
    """RLOO without the ablations: padded tokens masked, the clip range 0.2 (or the largest there is)."""
    masked = select(runs, "train_rloo", invalid_logprob_fill=None)
    clips = {run.config["clip"] for run in masked}
    return [run for run in masked if run.config["clip"] == (0.2 if 0.2 in clips else max(clips))]


def by_rate(runs: list[RunLog], reward: str = "maxent_length") -> dict[float, dict[float, list[RunLog]]]:
    """{learning rate, from high to low: {entropy coefficient: its seeds}}."""
    plain = [run for run in base(runs) if run.config["reward"] == "kl" and run.config["kl_coef"] == 0]  # the same objective as a coefficient of 0
    rates = by_setting(select(base(runs), "train_rloo", reward=reward), "lr")
    arms = {}
    for lr in sorted(rates, reverse=True):
        arms[lr] = {coef: seeds(found) for coef, found in by_setting(rates[lr], "entropy_coef").items()}
        if 0 not in arms[lr] and (same := select(plain, "train_rloo", lr=lr)):
            arms[lr] = {0.0: seeds(same), **arms[lr]}
    return arms


def constrained(runs: list[RunLog]) -> dict[float, list[RunLog]]:
    """{KL coefficient, from high to low: its seeds}, at the highest learning rate of these runs."""
    found = [run for run in select(base(runs), "train_rloo", reward="kl") if run.config["kl_coef"] > 0]
    rates = by_setting(found, "lr")
    return {coef: seeds(arm) for coef, arm in reversed(by_setting(rates[max(rates)], "kl_coef").items())} if rates else {}


def maxent_at(label: str, runs: list[RunLog], which: tuple[int, ...]) -> dict[float, dict[float, list[RunLog]]]:
    """by_rate at the learning rates of these ranks (0: the highest, -1: the lowest)."""
    arms = by_rate(runs)
    rates, least = list(arms), max(i + 1 if i >= 0 else -i for i in which)
    what = f"train_rloo with reward=maxent_length, invalid_logprob_fill=None and the clip range 0.2 at {least} learning rate(s)"
    need(len(rates) >= least, label, f"{what}; there are {', '.join(map(rate, rates)) or 'none'}")
    return {rates[i]: arms[rates[i]] for i in which}


def arms_of(label: str, runs: list[RunLog]) -> dict[tuple[str, str], list[RunLog]]:
    """{(family, label): seeds}: every KL coefficient; MaxEnt at every learning rate and MinEnt at the highest, both at the smallest coefficient above 0."""
    what = "train_rloo, clip range 0.2, invalid_logprob_fill=None, with"
    arms = {("KL", f"KL, β = {coef:g}"): found for coef, found in need(constrained(runs), label, f"{what} reward=kl and kl_coef above 0").items()}
    for family, reward, last in (("MaxEnt", "maxent_length", None), ("MinEnt", "minent_length", 1)):
        rates = by_rate(runs, reward)
        coefs = [coef for found in rates.values() for coef in found if coef > 0]
        if family == "MaxEnt":
            need(coefs, label, f"{what} reward=maxent_length and entropy_coef above 0")
        arms |= {(family, f"{family}, α = {min(coefs):g}, lr {rate(lr)}"): found[min(coefs)] for lr, found in list(rates.items())[:last] if min(coefs) in found}
    return arms


def simpo(label: str, runs: list[RunLog], rank: int, gammas: tuple = ()) -> tuple[str, dict[float, list[RunLog]]]:
    """A title and {gamma: its seeds} of SimPO at its largest beta and the lowest (rank 0) or the highest (-1) of its learning rates."""
    found = need(select(runs, "train_simpo", loss="simpo"), label, "train_simpo with loss=simpo")
    beta, found = max(by_setting(found, "beta").items())
    rates = by_setting(found, "lr")
    need(len(rates) > abs(rank), label, f"train_simpo with loss=simpo, beta={beta:g} at a learning rate above {rate(min(rates))}")
    lr = sorted(rates)[rank]
    arms = by_setting(rates[lr], "gamma")
    missing = [f"{gamma:g}" for gamma in gammas if gamma not in arms]
    need(not missing, label, f"train_simpo with loss=simpo, beta={beta:g}, lr={rate(lr)}, gamma={', '.join(missing)}")
    return f"{label}: SimPO, β = {beta:g}, lr {rate(lr)}", {gamma: seeds(arms[gamma]) for gamma in gammas or arms}


def dpo(label: str, runs: list[RunLog]) -> tuple[str, list[RunLog]]:
    """A title and the seeds of DPO at its highest learning rate."""
    rates = by_setting(need(select(runs, "train_simpo", loss="dpo"), label, "train_simpo with loss=dpo"), "lr")
    found = seeds(rates[max(rates)])
    return f"{label}: DPO, β = {found[0].config['beta']:g}, lr {rate(max(rates))}", found
