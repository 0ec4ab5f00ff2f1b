"""Four figures that the paper could not draw: they need the true reward, which the toy world knows."""

import numpy as np

from rlhf.config import UserError
from study.arms import families, need
from study.fits import best_of_n_fit, gao_fit
from study.logs import RunLog, best_of_n_tables
from study.panels import COLORS, SHADES, band, below, draw, family_styles, grid, legend

USUAL_BETA = 0.05  # KL coefficient of summarize_from_feedback_details/ppo.py and of TRL's RLOO


def gold_families(folders: dict[str, list[RunLog]]) -> tuple[dict[str, dict], dict]:
    """{label of the folder: its `families`}, and the style of every arm. UserError without a gold
    reward."""
    panels = {label: families(label, runs) for label, runs in folders.items()}
    for label, arms in panels.items():
        without = [run.path for arm in arms.values() for run in arm if "gold" not in run.metrics]
        if without:
            raise UserError(f"{label}: this figure needs the true reward, which only the toy world knows; "
                            f"no column gold in {without[0]}")
    return panels, family_styles([key for arms in panels.values() for key in arms])


def fit_text(name: str, a: float, b: float, r2: float, term: str) -> str:
    sign = "+" if b < 0 else "−"
    return f"{name}: d ({a:.2f} {sign} {abs(b):.2f} {term}), R² {r2:.2f}".replace("-", "−")


def path_and_end(axis, x: tuple, y: tuple, label: str, style: dict) -> None:
    """The way of an arm through a plane, (mean, low, high) of both coordinates; at its end a dot and the
    range over the seeds."""
    axis.plot(x[0], y[0], label=label, linewidth=1.8, **style)
    x_end, x_low, x_high = (values[-1] for values in x)
    y_end, y_low, y_high = (values[-1] for values in y)
    x_error = [[x_end - x_low], [x_high - x_end]]
    y_error = [[y_end - y_low], [y_high - y_end]]
    axis.errorbar(
        x_end, y_end, y_error, x_error, marker="o", markersize=5, color=style["color"], capsize=2, zorder=4,
    )
    axis.grid(alpha=0.25)


def family_fits(axis, points: dict[str, list[tuple]], start: float) -> list:
    """A dotted curve d (a - b log d) through the (KL, gain) of each family; the lines."""
    lines = []
    for family, parts in points.items():
        kl = np.concatenate([kl for kl, _ in parts])
        gain = np.concatenate([gain for _, gain in parts])
        if (kl > 0).sum() > 2:
            a, b, r2 = gao_fit(kl, gain)
            d = np.linspace(1e-3, np.sqrt(kl.max()), 200)
            lines += axis.plot(
                d, start + d * (a - b * np.log(d)), color=SHADES[family][0], linestyle=":", linewidth=2.6,
                label=fit_text(family, a, b, r2, "log d"),
            )
    return lines


def best_of_n_curve(axis, tables: list[dict], start: float) -> list:
    """Squares at the n of best-of-n, and a dotted curve d (a - b d) through them; the curve's line."""
    kl, gold, _, _ = band(tables, "gold", "kl")
    axis.plot(np.sqrt(kl), gold, color="black", marker="s", markersize=4, linestyle="none", label="best of n")
    origin = gold[0] if kl[0] == 0 else start  # n = 1 is the SFT model, at the temperature of this table
    a, b, r2 = best_of_n_fit(kl, gold - origin)
    d = np.linspace(0, np.sqrt(kl.max()), 200)
    return axis.plot(
        d, origin + d * (a - b * d), color="black", linestyle=":", linewidth=2,
        label=fit_text("best of n", a, b, r2, "d"),
    )


def figure_gold_kl(folders: dict[str, list[RunLog]], smooth: int = 5):
    """Gold reward against d = sqrt(KL) along training, and the fits of Gao et al.; the SFT model's gold is
    that of the first rollouts."""
    panels, styles = gold_families(folders)
    figure, axes = grid(list(panels), ["gold reward"], 4.1, 4.4)
    for axis, (label, arms) in zip(axes[0], panels.items()):
        axis.set_xlabel(r"$d = \sqrt{\mathrm{KL}(\pi\,\|\,\pi_{\mathrm{ref}})}$")
        start = np.mean([run.metrics["gold"][0] for arm in arms.values() for run in arm])
        points: dict[str, list] = {}
        for (family, text), arm in arms.items():
            columns = [run.metrics for run in arm]
            _, *kl = band(columns, "kl_full", smooth=smooth)
            _, *gold = band(columns, "gold", smooth=smooth)
            points.setdefault(family, []).append((kl[0], gold[0] - start))
            distance = [np.sqrt(np.maximum(value, 0)) for value in kl]
            path_and_end(axis, distance, gold, text, styles[family, text])
        curves = family_fits(axis, points, start)
        tables = best_of_n_tables(folders[label][0].path.parent)
        if tables:
            curves += best_of_n_curve(axis, tables, start)
        below(axis, curves)
        for line in curves:
            line.set_label("_fit")  # in the panel's own legend only
    legend(figure, axes.flat, 2 if len(panels) == 1 else 3)
    return figure


def figure_proxy_gold(folders: dict[str, list[RunLog]], smooth: int = 5):
    """Gold reward against the reward model's score along training."""
    panels, styles = gold_families(folders)
    figure, axes = grid(list(panels), ["gold reward"], 4.1, 3.4)
    for axis, arms in zip(axes[0], panels.values()):
        axis.set_xlabel("reward model's score (proxy)")
        axis.locator_params(nbins=6)
        for key, arm in arms.items():
            columns = [run.metrics for run in arm]
            _, *scores = band(columns, "scores", smooth=smooth)
            _, *gold = band(columns, "gold", smooth=smooth)
            path_and_end(axis, scores, gold, key[1], styles[key])
    legend(figure, axes.flat, 2 if len(panels) == 1 else 3)
    return figure


def n_axis(axis, table: dict) -> None:
    """A second axis at the top that says which n a KL is, as far apart as labels need."""
    kl = table["kl"]
    ticks = [0]
    for i, value in enumerate(kl):
        if value - kl[ticks[-1]] > kl.max() / 8:
            ticks.append(i)
    names = [f"{table['n'][i]:g}" for i in ticks]
    axis.secondary_xaxis("top").set_xticks(kl[ticks], [f"n = {names[0]}", *names[1:]])


def figure_best_of_n(folders: dict[str, list[RunLog]], smooth: int = 1):
    """Proxy and gold reward of the best of n by the reward model, over its KL to the SFT model. Not
    smoothed: the points are few."""
    tables = {}
    for label, runs in folders.items():
        folder = runs[0].path.parent
        what = f"best of n: no {folder}/best_of_n*/metrics.jsonl"
        tables[label] = need(best_of_n_tables(folder), label, what)
        if any("gold" not in seed for seed in tables[label]):
            raise UserError(f"{label}: this figure needs the true reward, which only the toy world knows; "
                            "no column gold in best_of_n*")
    figure, axes = grid(list(tables), ["reward"], 4.1, 3.2)
    proxy = {"color": COLORS[0], "markersize": 5, "linestyle": "--", "marker": "s"}
    gold = {"color": COLORS[1], "markersize": 5, "marker": "o"}
    for axis, seeds in zip(axes[0], tables.values()):
        draw(axis, {"reward model (proxy)": seeds}, "scores", "kl", 1, [proxy])
        draw(axis, {"gold": seeds}, "gold", "kl", 1, [gold])
        axis.set_xlabel("KL = log n − (n − 1)/n, nats")
        n_axis(axis, seeds[0])
    legend(figure, axes.flat)
    return figure


def chosen_arms(arms: dict[tuple[str, str], list[RunLog]]) -> dict[tuple[str, str], list[RunLog]]:
    """One KL-constrained arm (the usual beta, or the nearest), MaxEnt at its two highest learning rates,
    MinEnt."""
    def family(name: str) -> list[tuple[str, str]]:
        return [key for key in arms if key[0] == name]

    def distance(key: tuple[str, str]) -> float:
        return abs(np.log(arms[key][0].config["coefficient"] / USUAL_BETA))

    keys = [min(family("KL"), key=distance), *family("MaxEnt")[:2], *family("MinEnt")]
    return {key: arms[key] for key in keys}


def figure_reward_gold(folders: dict[str, list[RunLog]], smooth: int = 5):
    """Proxy and gold reward over time of `chosen_arms`."""
    panels = {label: chosen_arms(arms) for label, arms in gold_families(folders)[0].items()}
    styles = family_styles([key for arms in panels.values() for key in arms])
    figure, axes = grid(list(panels), ["reward"], 4.1, 3.2)
    for axis, arms in zip(axes[0], panels.values()):
        for key, arm in arms.items():
            columns = [run.metrics for run in arm]
            color = {"color": styles[key]["color"]}
            draw(axis, {"_proxy": columns}, "scores", "step", smooth, [color | {"linestyle": "--"}])
            draw(axis, {key[1]: columns}, "gold", "step", smooth, [color | {"linestyle": "-"}])
        axis.plot([], [], color="black", linestyle="-", label="gold")
        axis.plot([], [], color="black", linestyle="--", label="reward model (proxy)")
    legend(figure, axes.flat, 2 if len(panels) == 1 else 3)
    return figure
