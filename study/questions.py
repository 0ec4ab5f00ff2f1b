"""What the paper leaves open, answered from the runs of runs/study.sh: four sections of RESULTS.md, as
Markdown."""

import math
from pathlib import Path

import numpy as np

from study.arms import GAMMAS, HIGH, OFFLINE_HIGH, OFFLINE_LOW, TENTH, Study, lr_text
from study.fits import gao_fit
from study.logs import RunLog, best_of_n_tables
from study.settings import SIZES
from study.standing import (
    golds,
    mean_change,
    mean_last,
    percent,
    pm,
    smoothed,
    standing,
    win_rates,
)

OFFLINE_LRS = (OFFLINE_HIGH, OFFLINE_LOW)
BETA = 2.0  # SimPO's scale in the paper's figures here
SMALL_BETA = 0.1  # TRL's default
FIXED_GAMMA = 0.5  # the fixed margin that the adaptive one is compared with
FILL_ALPHAS = (0.1, 1.0)


def table(header: list[str], rows: list[list]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def gain_text(study: Study, arm: list[RunLog]) -> str:
    return pm(standing(study, "small", arm).gain)


def chosen_text(arm: list[RunLog]) -> str:
    return f"{mean_change(arm, 'logps/chosen'):+.1f}"


# --- is an adaptive margin what separates DPO from SimPO?


def margin_rows(study: Study, lr: float) -> list[list[str]]:
    """One row per loss at a learning rate."""
    adaptive = study.offline("dpo_length", lr)
    mean_margin = BETA * np.mean([run.metrics["ref_margin_mean"].mean() for run in adaptive])
    named = [
        ("dpo_length, β = 2: adaptive", f"{mean_margin:.2f}", adaptive),
        ("DPO, β = 0.05", "", study.offline("dpo", lr)),
    ]
    for gamma in GAMMAS:
        arm = study.offline("simpo", lr, beta=BETA, gamma=gamma)
        named.append((f"SimPO, β = 2, γ = {gamma:g}", f"{gamma:.2f}", arm))
    rows = []
    for name, margin, arm in named:
        kl = np.mean([run.evaluation["kl_full"] for run in arm])
        won = percent(win_rates(arm).mean())
        rows.append([lr_text(lr), name, margin, gain_text(study, arm), won, chosen_text(arm), f"{kl:.2f}"])
    return rows


def margin_verdict(study: Study, lr: float) -> str:
    fixed = golds(study.offline("simpo", lr, beta=BETA, gamma=FIXED_GAMMA))
    adaptive = study.interval(golds(study.offline("dpo_length", lr)) - fixed)
    dpo = study.interval(golds(study.offline("dpo", lr)) - fixed)
    words = "not distinguishable from"
    if adaptive[1] > 0:
        words = "better than"
    elif adaptive[2] < 0:
        words = "worse than"
    return (f"At {lr_text(lr)} the adaptive margin is {words} the fixed γ = {FIXED_GAMMA:g} "
            f"(gold {pm(adaptive)}); DPO minus that SimPO: {pm(dpo)}.")


def adaptive_margin(study: Study) -> str:
    header = ["lr", "loss", "mean margin", "gold minus SFT", "win rate", "change of log π(chosen)", "KL"]
    rows = [row for lr in OFFLINE_LRS for row in margin_rows(study, lr)]
    return (
        "Length-normalised DPO is SimPO whose margin is β times the reference's own mean log-prob "
        "difference: another margin for each pair, on average that of the column. If adaptivity were "
        "what separates DPO from SimPO, it would move SimPO towards "
        f"DPO.\n\n{table(header, rows)}\n{' '.join(margin_verdict(study, lr) for lr in OFFLINE_LRS)}\n"
    )


# --- is it SimPO's beta?


def beta_gap(study: Study, lr: float) -> str:
    """Gold at the small beta minus that at the large one, mean over the margins above 0."""
    small = study.simpo_arms(lr, SMALL_BETA)
    large = study.simpo_arms(lr, BETA)
    gaps = [golds(small[gamma]) - golds(large[gamma]) for gamma in GAMMAS if gamma > 0]
    return f"lr {lr_text(lr)} {pm(study.interval(np.mean(gaps, axis=0)))}"


def small_beta(study: Study) -> str:
    rows = []
    for lr in OFFLINE_LRS:
        for gamma in GAMMAS:
            row = [lr_text(lr), f"{gamma:g}"]
            for beta in (BETA, SMALL_BETA):
                arm = study.offline("simpo", lr, beta=beta, gamma=gamma)
                row += [gain_text(study, arm), chosen_text(arm)]
            rows.append(row)
    changed = "change of log π(chosen)"
    header = ["lr", "γ", "β = 2: gold minus SFT", changed, "β = 0.1: gold minus SFT", changed]
    return (
        "The paper does not state SimPO's β. At TRL's default of 0.1 a margin γ asks for γ/β nats per "
        f"token, 20 times what it asks for at 2.\n\n{table(header, rows)}\nβ = 0.1 minus β = 2, mean "
        f"over γ > 0: {'; '.join(beta_gap(study, lr) for lr in OFFLINE_LRS)}.\n"
    )


# --- could a padding bug be the cause?


def padding_fill(study: Study) -> str:
    rows = []
    worse = []
    for lr in (HIGH, TENTH):
        for alpha in FILL_ALPHAS:
            masked = study.ablation("small", alpha, lr)
            filled = study.ablation("small", alpha, lr, fill=1.0)
            gap = study.interval(golds(filled) - golds(masked))
            worse.append(gap[2] < 0)
            row = [lr_text(lr), f"{alpha:g}", gain_text(study, masked), gain_text(study, filled), pm(gap)]
            row += [f"{mean_last(arm, 'response_length'):.1f}" for arm in (masked, filled)]
            row += [percent(mean_last(arm, "eos_share")) for arm in (masked, filled)]
            rows.append(row)
    header = [
        "lr", "α", "masked: gold minus SFT", "filled", "filled minus masked", "tokens, masked", "filled",
        "EOS, masked", "filled",
    ]
    return (
        "TRL filled the log-probs after the EOS with 1.0; summed over the padding and divided by |y|, "
        "eq. 7 then contains a hidden penalty of β(R - |y|)/|y| on short answers "
        "(`--invalid_logprob_fill=1.0`). Whether the paper's code had it is not "
        f"known.\n\n{table(header, rows)}\nThe fill makes the gold reward worse in {sum(worse)} of "
        f"{len(worse)} settings (interval below 0).\n"
    )


# --- gold reward against KL


def fit_row(size: str, family: str, arms: dict[float, list[RunLog]], sft: float) -> list[str]:
    """The fit of Gao et al. through all updates of all seeds and coefficients of a family."""
    runs = [run for arm in arms.values() for run in arm]
    kl = np.concatenate([smoothed(run.metrics["kl_full"]) for run in runs])
    gain = np.concatenate([smoothed(run.metrics["gold"]) for run in runs]) - sft
    a, b, r2 = gao_fit(kl, gain)
    peak = f"{math.exp(a / b - 1) ** 2:.1f}" if b > 0 and a / b < 4 else ""
    return [size, family, f"{a:.2f}", f"{b:.2f}", f"{r2:.2f}", f"{kl.max():.1f}", peak]


def best_of_n_row(size: str, tables: list[dict]) -> list[str]:
    gold = np.mean([seed["gold"] for seed in tables], axis=0)
    n = tables[0]["n"]
    kl = tables[0]["kl"]
    peak = gold.argmax()
    described = (f"best of n: {gold[0]:.2f} at n = 1, highest {gold[peak]:.2f} at n = {n[peak]:.0f} "
                 f"(KL {kl[peak]:.1f}), {gold[-1]:.2f} at n = {n[-1]:.0f}")
    return [size, described, "", "", "", f"{kl[-1]:.1f}", ""]


def gold_over_kl(study: Study, root: Path) -> str:
    """`root`: the study's directory, which has the tables of best-of-n."""
    rows = []
    for size in SIZES:
        sft = study.sft(size)["gold"]
        rows.append(fit_row(size, "KL-constrained", study.kl_arms(size), sft))
        rows.append(fit_row(size, "MaxEnt, full rate", study.maxent_arms(size, HIGH), sft))
        rows.append(fit_row(size, "MaxEnt, a tenth", study.maxent_arms(size, TENTH), sft))
        rows.append(best_of_n_row(size, best_of_n_tables(root / size)))
    header = ["size", "family", "a", "b", "R²", "largest KL", "KL of the peak"]
    return (
        "gold - gold_SFT = d (a - b log d), d = √KL (Gao et al. 2022, for RL), over the updates of all "
        "seeds and coefficients of a family; the peak of the fitted curve lies at KL = exp(a/b - 1)². "
        "One curve for a family is a summary, not a law: R² says how well it does. (The picture's fits "
        "are of the arms drawn in it.)\n\n"
        + table(header, rows)
    )
