"""The figures 1 to 12 of "Failure Modes of Maximum Entropy RLHF", and four that need a true reward (the toy world), drawn from the logs of runs.

    python plot.py --figure=1 --runs='small=out/study/small,medium=out/study/medium,large=out/study/large' --out=docs/figures/figure_1.png

Each figure is a function of {label: the runs of one model size} (rlhf/runs.py), in the paper's order 1B, 2.8B, 6.9B. It finds its runs by their settings;
runs that differ only in their seed are one line, their mean, in a band from the lowest to the highest.
"""

import numpy as np

from study.arms import arms_of, by_rate, constrained, dpo, folder, mark, maxent_at, need, rate, simpo, win_rate
from rlhf.config import UserError
from study.panels import COLORS, LABELS, SHADES, band, below, canvas, draw, family_styles, grid, legend, log_scale, series_styles
from study.logs import RunLog, read_columns, select
from study.fits import best_of_n_fit, gao_fit

PAIR_METRICS = ["loss", "grad_norm", "logits/chosen", "logits/rejected", "rewards/chosen",
                "rewards/rejected", "margins", "accuracies", "logps/chosen", "logps/rejected"]
GAMMAS = (0.0, 0.25, 0.5, 1.0)  # of the paper's Figures 6 and 7


def with_win_rate(text: str, runs: list[RunLog]) -> str:
    return text if (won := win_rate(runs)) is None else f"{text} (win rate {won:.0%})".replace("%", " %")


def logs(arms: dict, name: str) -> dict[str, list[dict]]:
    """{label with the win rate: columns of the seeds}."""
    return {with_win_rate(f"{name} = {value:g}", found): [run.metrics for run in found] for value, found in arms.items()}


def drift(arms: list[list[RunLog]]) -> str:
    """The KL between updates: the paper's, unless it is 0 everywhere (one pass in one minibatch), then k3 after the update."""
    known = any(run.metrics.get("kl_prev/approxkl_avg", np.zeros(1)).any() for arm in arms for run in arm)
    return "kl_prev/approxkl_avg" if known else "kl_prev/k3"


# ---- the paper's figures


def reward_and_bonus(label: str, runs: list[RunLog], which: tuple[int, int], smooth: int):
    """Figures 1 and 2: one column per learning rate, one line per entropy coefficient."""
    rates = maxent_at(label, runs, which)
    styles = series_styles(sorted({coef for arms in rates.values() for coef in arms}))
    metrics = ["rlhf_reward", "length_normalized_surprisal"]
    figure, axes = grid([f"{label}, lr {rate(lr)}" for lr in rates], metrics, 5.1)
    for column, arms in zip(axes.T, rates.values()):
        for axis, metric in zip(column, metrics):
            draw(axis, logs(arms, "α"), metric, "step", smooth, [styles[coef] for coef in arms])
        below(column[-1], column[-1].get_lines(), 2)
    return figure


def figure_1(folders: dict[str, list[RunLog]], smooth: int = 5):
    return reward_and_bonus(*folder(folders, 0), (0, 1), smooth)


def figure_2(folders: dict[str, list[RunLog]], smooth: int = 5):
    return reward_and_bonus(*folder(folders, 1), (-2, -1), smooth)


def figure_3(folders: dict[str, list[RunLog]], smooth: int = 5):
    """KL to the reference and between updates: KL-constrained runs beside MaxEnt, first and second size."""
    panels = {label: {key: arm for key, arm in arms_of(label, runs).items() if key[0] != "MinEnt"} for label, runs in list(folders.items())[:2]}
    styles = family_styles([key for arms in panels.values() for key in arms])
    metrics = ["kl_full", drift([arm for arms in panels.values() for arm in arms.values()])]
    figure, axes = grid(list(panels), metrics)
    for column, arms in zip(axes.T, panels.values()):
        for axis, metric in zip(column, metrics):
            draw(axis, {text: [run.metrics for run in arm] for (_, text), arm in arms.items()}, metric, "step", smooth, [styles[key] for key in arms])
        log_scale(column[-1])
    legend(figure, axes.flat, 3)
    return figure


def figure_4(folders: dict[str, list[RunLog]], smooth: int = 5):
    """The reference's own margin on DPO's batches: a thin line per seed, their mean."""
    title, runs = dpo(*folder(folders, 0))
    figure, axes = grid([title], [r"$\log\,\pi_{\mathrm{ref}}(y_w|x) - \log\,\pi_{\mathrm{ref}}(y_l|x)$" + "\nmean of the batch, nats"], 7, 3.8)
    axis = axes[0, 0]
    for run in runs:
        axis.plot(run.metrics["step"], run.metrics["ref_margin"], color=COLORS[0], linewidth=0.6, alpha=0.5)
    steps, mean, _, _ = band([run.metrics for run in runs], "ref_margin", smooth=smooth)
    axis.plot(steps, mean, color=COLORS[1], linewidth=2, label="mean of the seeds")
    axis.axhline(0, color="black", linewidth=1)
    axis.grid(alpha=0.25)
    return figure


def end_labels(axis, ends: list[tuple[float, float, str, str]]) -> None:
    """(x, y, text, colour) written at the right of the panel, moved apart where the lines end close together."""
    gap, heights = 0.062, [axis.transAxes.inverted().transform(axis.transData.transform((x, y)))[1] for x, y, _, _ in ends]
    places: list[float] = []
    for i in np.argsort(heights):  # from below, each at least a gap above the one before
        places.append(max(heights[i], places[-1] + gap if places else 0.0))
    shift = max(0.0, places[-1] - 1.0)  # too high: all those that are in the way move down together
    for j in reversed(range(len(places))):
        places[j] = min(places[j], places[j + 1] - gap if j + 1 < len(places) else places[j] - shift)
    for place, i in zip(places, np.argsort(heights)):
        x, y, text, color = ends[i]
        axis.annotate(text, (x, y), (1.06, place), textcoords=axis.transAxes, color=color, fontsize=11, va="center",
                      arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)})


def figure_5(folders: dict[str, list[RunLog]], smooth: int = 5):
    """KL to the reference of every arm; at its end, whether it beats the SFT model."""
    panels = {}
    for label, runs in list(folders.items())[:2]:
        arms_of(label, runs)  # the errors about missing runs
        arms = {("KL", "KL-constrained", f"β {coef:g}"): arm for coef, arm in constrained(runs).items()}
        panels[label] = arms | {("MaxEnt", f"MaxEnt, lr {rate(lr)}", f"α {coef:g}"): arm for lr, found in by_rate(runs).items() for coef, arm in found.items()}
    styles = family_styles([key[:2] for arms in panels.values() for key in arms])
    figure, axes = grid(list(panels), ["kl_full"], 5.8, 4.4)
    for axis, (label, arms) in zip(axes[0], panels.items()):
        sft, ends = win_rate(select(folders[label], "train_sft")), []
        for (family, text, coef), arm in arms.items():
            columns, style = [run.metrics for run in arm], styles[family, text]
            draw(axis, {text: columns}, "kl_full", "step", smooth, [style | {"linewidth": 1.0}])
            steps, mean, _, _ = band(columns, "kl_full", smooth=smooth)
            ends.append((steps[-1], mean[-1], f"{mark(win_rate(arm), sft)} {coef}", style["color"]))
        axis.margins(x=0.02)
        axis.autoscale_view()  # the limits are final: labels may ask for places
        end_labels(axis, ends)
    legend(figure, axes.flat)
    figure.suptitle("win rate ✓ above, × below that of the SFT model (= tie or not known)", fontsize=12)
    return figure


def figure_6(folders: dict[str, list[RunLog]], smooth: int = 1):
    """Win rate of SimPO's checkpoints, from the SFT model to the last update. Not smoothed: the points are few."""
    label, runs = folder(folders, 0)
    title, arms = simpo(label, runs, 0, GAMMAS)
    sft = win_rate(select(runs, "train_sft"))
    points = {}
    for gamma, found in arms.items():
        tables = []
        for run in found:
            known = {step: line["win_rate"] for step, line in run.checkpoints.items() if line.get("win_rate") is not None}
            known |= {} if run.win_rate is None else {int(run.metrics["step"][-1]): run.win_rate}
            if known:
                tables.append(({0: sft} if sft is not None else {}) | known)
        need(tables, label, f"evaluate.py over the checkpoints of SimPO with gamma={gamma:g}: no win rate is known")
        steps = sorted(set.intersection(*(set(table) for table in tables)))
        points[with_win_rate(f"γ = {gamma:g}", found)] = [{"step": steps, "win rate": [100 * table[step] for step in steps]} for table in tables]
    figure, axes = grid([title], ["win rate, %"], 7, 4)
    draw(axes[0, 0], points, "win rate", styles=[style | {"marker": "o", "markersize": 4} for style in series_styles(arms).values()])
    if sft is not None:
        axes[0, 0].axhline(100 * sft, color="#999999", linestyle="--", label=f"SFT ({sft:.0%})".replace("%", " %"))
    legend(figure, axes.flat, 2)
    return figure


def pair_panels(title: str, series: dict[str, list[dict]], smooth: int):
    """Figures 7 to 9: every metric of a pair loss."""
    figure, axes = canvas(len(PAIR_METRICS), 5, 2.5, 2.2)
    for i, (axis, metric) in enumerate(zip(axes, PAIR_METRICS)):
        draw(axis, series, metric, "step", smooth, list(series_styles(series).values()))
        axis.set_title(metric)
        axis.set_xlabel("update" if i >= 5 else "")
        axis.locator_params(nbins=4)
    figure.suptitle(title, fontsize=13)
    if len(series) > 1:
        legend(figure, axes, 5)
    return figure


def figure_7(folders: dict[str, list[RunLog]], smooth: int = 5):
    title, arms = simpo(*folder(folders, 0), 0, GAMMAS)
    return pair_panels(title, logs(arms, "γ"), smooth)


def figure_8(folders: dict[str, list[RunLog]], smooth: int = 5):
    title, arms = simpo(*folder(folders, 0), -1)
    return pair_panels(title, logs(arms, "γ"), smooth)


def figure_9(folders: dict[str, list[RunLog]], smooth: int = 5):
    title, runs = dpo(*folder(folders, 0))
    return pair_panels(with_win_rate(title, runs), {title: [run.metrics for run in runs]}, smooth)


def coefficients(label: str, runs: list[RunLog], which: int, smooth: int):
    """Figures 10 and 11: MaxEnt at one learning rate, one line per entropy coefficient."""
    (lr, arms), = maxent_at(label, runs, (which,)).items()
    figure, axes = canvas(4, 2, 4.6, 2.8)
    for i, (axis, metric) in enumerate(zip(axes, ["rlhf_reward", "kl_full", "length_normalized_surprisal", drift(list(arms.values()))])):
        draw(axis, logs(arms, "α"), metric, "step", smooth, list(series_styles(arms).values()))
        axis.set_ylabel(LABELS[metric])
        axis.set_xlabel("update" if i >= 2 else "")
    log_scale(axes[3])  # the first updates move far more than all others
    figure.suptitle(f"{label}, lr {rate(lr)}", fontsize=13)
    legend(figure, axes, 2)
    return figure


def figure_10(folders: dict[str, list[RunLog]], smooth: int = 5):
    return coefficients(*folder(folders, 2), 0, smooth)


def figure_11(folders: dict[str, list[RunLog]], smooth: int = 5):
    return coefficients(*folder(folders, 2), 1, smooth)


def figure_12(folders: dict[str, list[RunLog]], smooth: int = 5):
    """KL-constrained runs of the third size; the paper has one, here is one line per KL coefficient."""
    label, runs = folder(folders, 2)
    arms = need(constrained(runs), label, "train_rloo with reward=kl and kl_coef above 0, invalid_logprob_fill=None and the clip range 0.2")
    lr = next(iter(arms.values()))[0].config["lr"]
    metrics = ["kl_full", "rlhf_reward", drift(list(arms.values()))]
    figure, axes = grid([f"{label}, KL-constrained, lr {rate(lr)}"], metrics, 7, 2.2)
    for axis, metric in zip(axes[:, 0], metrics):
        draw(axis, logs(arms, "β"), metric, "step", smooth, list(series_styles(arms).values()))
    log_scale(axes[2, 0])
    legend(figure, axes.flat, 2)
    return figure


# ---- what the paper could not draw: the true reward


def gold_arms(folders: dict[str, list[RunLog]]) -> tuple[dict[str, dict], dict]:
    """{label of the folder: arms_of it}, and the style of every arm."""
    panels = {label: arms_of(label, runs) for label, runs in folders.items()}
    for label, arms in panels.items():
        without = [str(run.path) for arm in arms.values() for run in arm if "gold" not in run.metrics]
        if without:
            raise UserError(f"{label}: this figure needs the true reward, which only the toy world knows; no column gold in {without[0]}")
    return panels, family_styles([key for arms in panels.values() for key in arms])


def formula(name: str, a: float, b: float, r2: float, term: str) -> str:
    return f"{name}: d ({a:.2f} {'+' if b < 0 else '−'} {abs(b):.2f} {term}), R² {r2:.2f}".replace("-", "−")


def best_of_n_tables(runs: list[RunLog]) -> list[dict]:
    """The tables best_of_n*/ (n, kl, scores, gold) beside the runs: one per seed."""
    return [read_columns(path) for path in sorted(runs[0].path.parent.glob("best_of_n*/metrics.jsonl"))]


def path_and_end(axis, x: tuple, y: tuple, label: str, style: dict) -> None:
    """The way of an arm through a plane, (mean, low, high) of both coordinates; at its end a dot and the range over the seeds."""
    axis.plot(x[0], y[0], label=label, linewidth=1.8, **style)
    (x, x_low, x_high), (y, y_low, y_high) = ([values[-1] for values in side] for side in (x, y))
    axis.errorbar(x, y, [[y - y_low], [y_high - y]], [[x - x_low], [x_high - x]], marker="o", markersize=5, color=style["color"], capsize=2, zorder=4)
    axis.grid(alpha=0.25)


def gold_kl(folders: dict[str, list[RunLog]], smooth: int = 5):
    """Gold reward against d = sqrt(KL) along training, and the fits of Gao et al.; the SFT model's gold is that of the first rollouts."""
    panels, styles = gold_arms(folders)
    figure, axes = grid(list(panels), ["gold reward"], 4.1, 4.4)
    for axis, (label, arms) in zip(axes[0], panels.items()):
        axis.set_xlabel(r"$d = \sqrt{\mathrm{KL}(\pi\,\|\,\pi_{\mathrm{ref}})}$")
        start = np.mean([run.metrics["gold"][0] for arm in arms.values() for run in arm])
        points: dict[str, list] = {}
        curves = []
        for (family, text), arm in arms.items():
            columns = [run.metrics for run in arm]
            _, *kl = band(columns, "kl_full", smooth=smooth)
            _, *gold = band(columns, "gold", smooth=smooth)
            points.setdefault(family, []).append((kl[0], gold[0] - start))
            path_and_end(axis, [np.sqrt(np.maximum(value, 0)) for value in kl], gold, text, styles[family, text])
        for family, parts in points.items():
            kl, gain = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
            if (kl > 0).sum() > 2:
                a, b, r2 = gao_fit(kl, gain)
                d = np.linspace(1e-3, np.sqrt(kl.max()), 200)
                curves += axis.plot(d, start + d * (a - b * np.log(d)), color=SHADES[family][0], linestyle=":", linewidth=2.6,
                                    label=formula(family, a, b, r2, "log d"))
        if tables := best_of_n_tables(folders[label]):
            kl, gold, _, _ = band(tables, "gold", "kl")
            axis.plot(np.sqrt(kl), gold, color="black", marker="s", markersize=4, linestyle="none", label="best of n")
            origin = gold[0] if kl[0] == 0 else start  # n = 1 is the SFT model, at the temperature of this table
            a, b, r2 = best_of_n_fit(kl, gold - origin)
            d = np.linspace(0, np.sqrt(kl.max()), 200)
            curves += axis.plot(d, origin + d * (a - b * d), color="black", linestyle=":", linewidth=2,
                                label=formula("best of n", a, b, r2, "d"))
        below(axis, curves)
        for line in curves:
            line.set_label("_fit")  # in the panel's own legend only
    legend(figure, axes.flat, 2 if len(panels) == 1 else 3)
    return figure


def proxy_gold(folders: dict[str, list[RunLog]], smooth: int = 5):
    """Gold reward against the reward model's score along training."""
    panels, styles = gold_arms(folders)
    figure, axes = grid(list(panels), ["gold reward"], 4.1, 3.4)
    for axis, arms in zip(axes[0], panels.values()):
        axis.set_xlabel("reward model's score (proxy)")
        axis.locator_params(nbins=6)
        for key, arm in arms.items():
            columns = [run.metrics for run in arm]
            path_and_end(axis, band(columns, "scores", smooth=smooth)[1:], band(columns, "gold", smooth=smooth)[1:], key[1], styles[key])
    legend(figure, axes.flat, 2 if len(panels) == 1 else 3)
    return figure


def best_of_n(folders: dict[str, list[RunLog]], smooth: int = 1):
    """Proxy and gold reward of the best of n by the reward model, over its KL to the SFT model. Not smoothed: the points are few."""
    tables = {label: need(best_of_n_tables(runs), label, f"best of n: no {runs[0].path.parent}/best_of_n*/metrics.jsonl") for label, runs in folders.items()}
    if without := [label for label, seeds in tables.items() for seed in seeds if "gold" not in seed]:
        raise UserError(f"{without[0]}: this figure needs the true reward, which only the toy world knows; no column gold in best_of_n*")
    figure, axes = grid(list(tables), ["reward"], 4.1, 3.2)
    for axis, seeds in zip(axes[0], tables.values()):
        for metric, name, style in (("scores", "reward model (proxy)", {"linestyle": "--", "marker": "s"}), ("gold", "gold", {"marker": "o"})):
            draw(axis, {name: seeds}, metric, "kl", 1, [{"color": COLORS[metric == "gold"], "markersize": 5, **style}])
        axis.set_xlabel("KL = log n − (n − 1)/n, nats")
        top = axis.secondary_xaxis("top")  # which n that is
        ticks = [0]
        for i, kl in enumerate(seeds[0]["kl"]):
            if kl - seeds[0]["kl"][ticks[-1]] > seeds[0]["kl"].max() / 8:
                ticks.append(i)
        top.set_xticks(seeds[0]["kl"][ticks], [f"{'' if i else 'n = '}{seeds[0]['n'][i]:g}" for i in ticks])
    legend(figure, axes.flat)
    return figure


def reward_gold(folders: dict[str, list[RunLog]], smooth: int = 5):
    """Proxy and gold reward over time of one KL-constrained arm (β = 0.05, or the nearest), MaxEnt at its two highest learning rates, MinEnt."""
    panels, _ = gold_arms(folders)
    chosen = {}
    for label, arms in panels.items():
        of = {family: [key for key in arms if key[0] == family] for family in SHADES}
        usual = np.argmin([abs(np.log(arms[key][0].config["kl_coef"] / 0.05)) for key in of["KL"]])
        chosen[label] = {key: arms[key] for key in [of["KL"][usual], *of["MaxEnt"][:2], *of["MinEnt"]]}
    styles = family_styles([key for arms in chosen.values() for key in arms])
    figure, axes = grid(list(chosen), ["reward"], 4.1, 3.2)
    for axis, arms in zip(axes[0], chosen.values()):
        for key, arm in arms.items():
            for metric, dashes in (("scores", "--"), ("gold", "-")):
                name = key[1] if metric == "gold" else "_proxy"
                draw(axis, {name: [run.metrics for run in arm]}, metric, "step", smooth, [{"color": styles[key]["color"], "linestyle": dashes}])
        axis.plot([], [], color="black", linestyle="-", label="gold")
        axis.plot([], [], color="black", linestyle="--", label="reward model (proxy)")
    legend(figure, axes.flat, 2 if len(chosen) == 1 else 3)
    return figure


FIGURES = {"1": figure_1, "2": figure_2, "3": figure_3, "4": figure_4, "5": figure_5, "6": figure_6, "7": figure_7, "8": figure_8, "9": figure_9,
           "10": figure_10, "11": figure_11, "12": figure_12, "gold_kl": gold_kl, "proxy_gold": proxy_gold, "best_of_n": best_of_n, "reward_gold": reward_gold}
