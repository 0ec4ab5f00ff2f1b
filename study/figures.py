"""The figures 1 to 12 of "Failure Modes of Maximum Entropy RLHF", drawn from the logs of runs.

    python -m study.plot --figure=1 --out=docs/figures/figure_1.png \\
        --runs='small=out/study/small,medium=out/study/medium,large=out/study/large'

Each figure is a function of {label: the runs of one model size} (logs.py), in the paper's order 1B, 2.8B,
6.9B. It finds its runs by their settings; runs that differ only in their seed are one line, their mean, in
a band from the lowest to the highest. FIGURES has four more, which need a true reward (figures_gold.py).
"""

import numpy as np

from study.arms import (
    UNABLATED,
    by_lr,
    dpo_seeds,
    families,
    kl_constrained,
    lr_text,
    maxent_at,
    need,
    nth_size,
    simpo_by_gamma,
)
from study.figures_gold import figure_best_of_n, figure_gold_kl, figure_proxy_gold, figure_reward_gold
from study.logs import RunLog, select
from study.panels import (
    COLORS,
    GRAY,
    LABELS,
    band,
    below,
    canvas,
    draw,
    family_styles,
    grid,
    legend,
    log_scale,
    series_styles,
)
from study.standing import mark, mean_win_rate, percent

Folders = dict[str, list[RunLog]]  # {label: the runs of one model size}

PAIR_METRICS = [
    "loss", "grad_norm", "logits/chosen", "logits/rejected", "rewards/chosen",
    "rewards/rejected", "margins", "accuracies", "logps/chosen", "logps/rejected",
]
LOW_GAMMAS = (0.0, 0.25, 0.5, 1.0)  # of the paper's Figures 6 and 7


def with_win_rate(text: str, runs: list[RunLog]) -> str:
    won = mean_win_rate(runs)
    return text if won is None else f"{text} (win rate {percent(won)})"


def columns_of(arms: dict, name: str) -> dict[str, list[dict]]:
    """{label with the win rate: columns of the seeds}."""
    return {
        with_win_rate(f"{name} = {value:g}", arm): [run.metrics for run in arm]
        for value, arm in arms.items()
    }


def drift(arms: list[list[RunLog]]) -> str:
    """The KL between updates: the paper's, unless it is 0 everywhere (one pass), then k3 after the
    update."""
    runs = [run for arm in arms for run in arm]
    known = any(run.metrics.get("kl_prev/approxkl_avg", np.zeros(1)).any() for run in runs)
    return "kl_prev/approxkl_avg" if known else "kl_prev/k3"


# --- reward and entropy bonus


def reward_and_bonus(label: str, runs: list[RunLog], ranks: tuple[int, int], smooth: int):
    """Figures 1 and 2: one column per learning rate, one line per entropy coefficient."""
    at_lr = maxent_at(label, runs, ranks)
    styles = series_styles(sorted({coef for arms in at_lr.values() for coef in arms}))
    metrics = ["rlhf_reward", "length_normalized_surprisal"]
    figure, axes = grid([f"{label}, lr {lr_text(lr)}" for lr in at_lr], metrics, 5.1)
    for column, arms in zip(axes.T, at_lr.values()):
        for axis, metric in zip(column, metrics):
            draw(axis, columns_of(arms, "α"), metric, "step", smooth, [styles[coef] for coef in arms])
        below(column[-1], column[-1].get_lines(), 2)
    return figure


def figure_1(folders: Folders, smooth: int = 5):
    return reward_and_bonus(*nth_size(folders, 0), (0, 1), smooth)


def figure_2(folders: Folders, smooth: int = 5):
    return reward_and_bonus(*nth_size(folders, 1), (-2, -1), smooth)


# --- KL to the reference


def without_minent(label: str, runs: list[RunLog]) -> dict[tuple[str, str], list[RunLog]]:
    return {key: arm for key, arm in families(label, runs).items() if key[0] != "MinEnt"}


def figure_3(folders: Folders, smooth: int = 5):
    """KL to the reference and between updates: KL-constrained runs beside MaxEnt, first and second size."""
    panels = {label: without_minent(label, runs) for label, runs in list(folders.items())[:2]}
    styles = family_styles([key for arms in panels.values() for key in arms])
    metrics = ["kl_full", drift([arm for arms in panels.values() for arm in arms.values()])]
    figure, axes = grid(list(panels), metrics)
    for column, arms in zip(axes.T, panels.values()):
        lines = {text: [run.metrics for run in arm] for (_, text), arm in arms.items()}
        for axis, metric in zip(column, metrics):
            draw(axis, lines, metric, "step", smooth, [styles[key] for key in arms])
        log_scale(column[-1])
    legend(figure, axes.flat, 3)
    return figure


def end_labels(axis, ends: list[tuple[float, float, str, str]]) -> None:
    """(x, y, text, colour) written at the right of the panel, moved apart where the lines end close
    together."""
    gap = 0.062  # of the panel's height
    to_panel = axis.transData + axis.transAxes.inverted()
    heights = [to_panel.transform((x, y))[1] for x, y, _, _ in ends]
    places: list[float] = []
    for i in np.argsort(heights):  # from below, each at least a gap above the one before
        places.append(max(heights[i], places[-1] + gap if places else 0.0))
    shift = max(0.0, places[-1] - 1.0)  # too high: all those that are in the way move down together
    for j in reversed(range(len(places))):
        places[j] = min(places[j], places[j + 1] - gap if j + 1 < len(places) else places[j] - shift)
    for place, i in zip(places, np.argsort(heights)):
        x, y, text, color = ends[i]
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.5}
        axis.annotate(
            text, (x, y), (1.06, place), textcoords=axis.transAxes, color=color, fontsize=11, va="center",
            arrowprops=line | {"shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)},
        )


def figure_5(folders: Folders, smooth: int = 5):
    """KL to the reference of every arm; at its end, whether it beats the SFT model."""
    panels = {}
    for label, runs in list(folders.items())[:2]:
        families(label, runs)  # the errors about missing runs
        arms = {("KL", "KL-constrained", f"β {coef:g}"): arm for coef, arm in kl_constrained(runs).items()}
        for lr, at_lr in by_lr(runs).items():
            line = f"MaxEnt, lr {lr_text(lr)}"
            arms |= {("MaxEnt", line, f"α {coef:g}"): arm for coef, arm in at_lr.items()}
        panels[label] = arms
    styles = family_styles([key[:2] for arms in panels.values() for key in arms])
    figure, axes = grid(list(panels), ["kl_full"], 5.8, 4.4)
    for axis, (label, arms) in zip(axes[0], panels.items()):
        sft = mean_win_rate(select(folders[label], "train_sft"))
        ends = []
        for (family, text, coef), arm in arms.items():
            columns = [run.metrics for run in arm]
            style = styles[family, text]
            draw(axis, {text: columns}, "kl_full", "step", smooth, [style | {"linewidth": 1.0}])
            steps, mean, _, _ = band(columns, "kl_full", smooth=smooth)
            ends.append((steps[-1], mean[-1], f"{mark(mean_win_rate(arm), sft)} {coef}", style["color"]))
        axis.margins(x=0.02)
        axis.autoscale_view()  # the limits are final: labels may ask for places
        end_labels(axis, ends)
    legend(figure, axes.flat)
    figure.suptitle("win rate ✓ above, × below that of the SFT model (= tie or not known)", fontsize=12)
    return figure


# --- offline methods


def figure_4(folders: Folders, smooth: int = 5):
    """The reference's own margin on DPO's batches: a thin line per seed, their mean."""
    title, runs = dpo_seeds(*nth_size(folders, 0))
    margin = r"$\log\,\pi_{\mathrm{ref}}(y_w|x) - \log\,\pi_{\mathrm{ref}}(y_l|x)$"
    figure, axes = grid([title], [f"{margin}\nmean of the batch, nats"], 7, 3.8)
    axis = axes[0, 0]
    for run in runs:
        axis.plot(run.metrics["step"], run.metrics["ref_margin"], color=COLORS[0], linewidth=0.6, alpha=0.5)
    steps, mean, _, _ = band([run.metrics for run in runs], "ref_margin", smooth=smooth)
    axis.plot(steps, mean, color=COLORS[1], linewidth=2, label="mean of the seeds")
    axis.axhline(0, color="black", linewidth=1)
    axis.grid(alpha=0.25)
    return figure


def win_rates_over_steps(run: RunLog, sft: float | None) -> dict[int, float]:
    """{step: win rate} of a run's checkpoints, its final model and the model it began with; {} if none is
    known."""
    known = {step: line.get("win_rate") for step, line in run.checkpoints.items()}
    known[int(run.metrics["step"][-1])] = run.win_rate
    known = {step: won for step, won in known.items() if won is not None}
    return {0: sft} | known if known and sft is not None else known


def figure_6(folders: Folders, smooth: int = 1):
    """Win rate of SimPO's checkpoints, from the SFT model to the last update. Not smoothed: the points are
    few."""
    label, runs = nth_size(folders, 0)
    title, arms = simpo_by_gamma(label, runs, 0, LOW_GAMMAS)
    sft = mean_win_rate(select(runs, "train_sft"))
    lines = {}
    for gamma, arm in arms.items():
        tables = [table for table in (win_rates_over_steps(run, sft) for run in arm) if table]
        what = f"evaluate.py over the checkpoints of SimPO with gamma={gamma:g}: no win rate is known"
        need(tables, label, what)
        steps = sorted(set.intersection(*map(set, tables)))
        lines[with_win_rate(f"γ = {gamma:g}", arm)] = [
            {"step": steps, "win rate": [100 * table[step] for step in steps]} for table in tables
        ]
    figure, axes = grid([title], ["win rate, %"], 7, 4)
    styles = [style | {"marker": "o", "markersize": 4} for style in series_styles(arms).values()]
    draw(axes[0, 0], lines, "win rate", styles=styles)
    if sft is not None:
        axes[0, 0].axhline(100 * sft, color=GRAY, linestyle="--", label=f"SFT ({percent(sft)})")
    legend(figure, axes.flat, 2)
    return figure


def pair_panels(title: str, lines: dict[str, list[dict]], smooth: int):
    """Figures 7 to 9: every metric of a pair loss."""
    figure, axes = canvas(len(PAIR_METRICS), 5, 2.5, 2.2)
    for i, (axis, metric) in enumerate(zip(axes, PAIR_METRICS)):
        draw(axis, lines, metric, "step", smooth, list(series_styles(lines).values()))
        axis.set_title(metric)
        axis.set_xlabel("update" if i >= 5 else "")
        axis.locator_params(nbins=4)
    figure.suptitle(title, fontsize=13)
    if len(lines) > 1:
        legend(figure, axes, 5)
    return figure


def figure_7(folders: Folders, smooth: int = 5):
    title, arms = simpo_by_gamma(*nth_size(folders, 0), 0, LOW_GAMMAS)
    return pair_panels(title, columns_of(arms, "γ"), smooth)


def figure_8(folders: Folders, smooth: int = 5):
    title, arms = simpo_by_gamma(*nth_size(folders, 0), -1)
    return pair_panels(title, columns_of(arms, "γ"), smooth)


def figure_9(folders: Folders, smooth: int = 5):
    title, runs = dpo_seeds(*nth_size(folders, 0))
    return pair_panels(with_win_rate(title, runs), {title: [run.metrics for run in runs]}, smooth)


# --- one size in detail


def maxent_panels(label: str, runs: list[RunLog], rank: int, smooth: int):
    """Figures 10 and 11: MaxEnt at one learning rate, one line per entropy coefficient."""
    (lr, arms), = maxent_at(label, runs, (rank,)).items()
    figure, axes = canvas(4, 2, 4.6, 2.8)
    metrics = ["rlhf_reward", "kl_full", "length_normalized_surprisal", drift(list(arms.values()))]
    for i, (axis, metric) in enumerate(zip(axes, metrics)):
        draw(axis, columns_of(arms, "α"), metric, "step", smooth, list(series_styles(arms).values()))
        axis.set_ylabel(LABELS[metric])
        axis.set_xlabel("update" if i >= 2 else "")
    log_scale(axes[3])  # the first updates move far more than all others
    figure.suptitle(f"{label}, lr {lr_text(lr)}", fontsize=13)
    legend(figure, axes, 2)
    return figure


def figure_10(folders: Folders, smooth: int = 5):
    return maxent_panels(*nth_size(folders, 2), 0, smooth)


def figure_11(folders: Folders, smooth: int = 5):
    return maxent_panels(*nth_size(folders, 2), 1, smooth)


def figure_12(folders: Folders, smooth: int = 5):
    """KL-constrained runs of the third size; the paper has one, here is one line per KL coefficient."""
    label, runs = nth_size(folders, 2)
    what = f"train_rloo, {UNABLATED}, with a coefficient above 0 and reward=kl"
    arms = need(kl_constrained(runs), label, what)
    lr = next(iter(arms.values()))[0].config["lr"]
    metrics = ["kl_full", "rlhf_reward", drift(list(arms.values()))]
    figure, axes = grid([f"{label}, KL-constrained, lr {lr_text(lr)}"], metrics, 7, 2.2)
    for axis, metric in zip(axes[:, 0], metrics):
        draw(axis, columns_of(arms, "β"), metric, "step", smooth, list(series_styles(arms).values()))
    log_scale(axes[2, 0])
    legend(figure, axes.flat, 2)
    return figure


FIGURES = {
    "1": figure_1,
    "2": figure_2,
    "3": figure_3,
    "4": figure_4,
    "5": figure_5,
    "6": figure_6,
    "7": figure_7,
    "8": figure_8,
    "9": figure_9,
    "10": figure_10,
    "11": figure_11,
    "12": figure_12,
    "gold_kl": figure_gold_kl,
    "proxy_gold": figure_proxy_gold,
    "best_of_n": figure_best_of_n,
    "reward_gold": figure_reward_gold,
}
