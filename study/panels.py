"""Panels of a figure: lines with a band over seeds, legends, colours. matplotlib is asked for when the
first figure is made."""

import numpy as np

from rlhf.config import UserError

# Okabe and Ito: safe for colour-blind readers
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
DASHES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))]
SHADES = {  # of a family; then the same, dashed
    "KL": ["#0072B2", "#56B4E9"],
    "MaxEnt": ["#D55E00", "#E69F00", "#CC79A7"],
    "MinEnt": ["#009E73"],
}
LOOKS = {
    "font.size": 12,
    "axes.titlesize": 12,
    "legend.fontsize": 11,
    "axes.labelpad": 6,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
LABELS = {
    "rlhf_reward": "RLHF reward",
    # bonus/maxent_length, which a run with α = 0 has too
    "length_normalized_surprisal": "entropy bonus\n(coefficient-free)",
    "kl_full": r"KL($\pi_t\,\|\,\pi_{\mathrm{ref}}$), nats",
    "kl_prev/approxkl_avg": r"KL($\pi_t\,\|\,\pi_{t-1}$)",
    "kl_prev/k3": r"KL($\pi_{t-1}\,\|\,\pi_t$), k3",
}
GRAY = "#999999"


def pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("figures need matplotlib: pip install -r requirements-dev.txt") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def canvas(panels: int, columns: int, width: float = 4.0, height: float = 3.1):
    """A figure with `panels` axes, at most `columns` in a row."""
    rows = -(-panels // columns)
    columns = min(panels, columns)
    size = (width * columns, height * rows)
    figure, axes = pyplot().subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[panels:]:
        axis.set_visible(False)
    return figure, axes.flat[:panels]


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """(n,): of the last `window` points; before the first there are copies of it."""
    padded = np.pad(values, (window - 1, 0), mode="edge")
    return np.convolve(padded, np.ones(window) / window, mode="valid")


def band(seeds: list[dict], metric: str, x: str = "step", smooth: int = 1) -> tuple[np.ndarray, ...]:
    """x, mean, lowest and highest over the seeds, at the points that all of them have; each seed first
    averaged over its last `smooth` points."""
    n = min(len(seed[x]) for seed in seeds)
    values = np.array([seed[metric][:n] for seed in seeds], dtype=float)  # (seeds, n)
    if smooth > 1:
        values = np.stack([moving_average(v, smooth) for v in values])
    seen = ~np.isnan(values).all(0)
    return np.array(seeds[0][x][:n])[seen], values.mean(0)[seen], values.min(0)[seen], values.max(0)[seen]


def draw(
    axis, lines: dict[str, list[dict]], metric: str, x: str = "step", smooth: int = 1,
    styles: list[dict] | None = None,
) -> None:
    """A line for every label, with a band over its seeds (columns each); seeds that lack the metric are
    left out."""
    for i, (label, seeds) in enumerate(lines.items()):
        seeds = [seed for seed in seeds if metric in seed]
        if not seeds:
            continue
        steps, mean, low, high = band(seeds, metric, x, smooth)
        style = styles[i] if styles else {"color": COLORS[i % len(COLORS)]}
        axis.plot(steps, mean, label=label, **{"linewidth": 1.8, **style})
        if len(seeds) > 1:
            axis.fill_between(steps, low, high, color=style["color"], alpha=0.18, linewidth=0)
    axis.grid(alpha=0.25)


def legend(figure, axes, columns: int = 4) -> None:
    """One legend under all panels; the picture grows by it (bbox_inches="tight"), the panels keep their
    size."""
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(
        handles.values(), handles.keys(), loc="upper center", bbox_to_anchor=(0.5, -0.01),
        bbox_transform=figure.transFigure, ncols=min(columns, len(handles)), frameon=False,
    )


def below(axis, handles: list, columns: int = 1) -> None:
    """A legend under this one panel, half an inch below its axis."""
    from matplotlib.transforms import ScaledTranslation
    place = axis.transAxes + ScaledTranslation(0, -0.5, axis.figure.dpi_scale_trans)
    axis.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=place, ncols=columns,
        frameon=False, handlelength=1.6, columnspacing=1.0,
    )


def grid(titles: list[str], metrics: list[str], width: float = 4.6, height: float = 2.7):
    """A figure of one column per title and one row per metric, and its axes (rows, columns)."""
    figure, axes = canvas(len(titles) * len(metrics), len(titles), width, height)
    axes = np.reshape(list(axes), (len(metrics), len(titles)))
    for axis, title in zip(axes[0], titles):
        axis.set_title(title)
    for row, metric in zip(axes, metrics):
        row[0].set_ylabel(LABELS.get(metric, metric))
    for axis in axes[-1]:
        axis.set_xlabel("update")
    return figure, axes


def log_scale(axis) -> None:
    """A logarithmic axis, unless nothing is above 0 (one pass per batch: no drift to see)."""
    if any((np.asarray(line.get_ydata()) > 0).any() for line in axis.get_lines()):
        axis.set_yscale("log", nonpositive="mask")


def series_styles(keys) -> dict:
    """{key: colour and dashes}; dashes only where there are more than four lines."""
    dashes = DASHES if len(keys) > 4 else ["-"]
    return {
        key: {"color": COLORS[i % len(COLORS)], "linestyle": dashes[i % len(dashes)]}
        for i, key in enumerate(keys)
    }


def family_styles(keys) -> dict:
    """{(family, label): style}: a family has a hue, so an arm looks the same in every panel."""
    styles = {}
    for family, shades in SHADES.items():
        members = [key for key in dict.fromkeys(keys) if key[0] == family]
        for i, key in enumerate(members):
            dashes, shade = divmod(i, len(shades))
            styles[key] = {"color": shades[shade], "linestyle": DASHES[dashes % len(DASHES)]}
    return styles
