"""The whole field on one picture: gold reward against sqrt(KL), a panel per family of methods, in each the
other families in grey."""

from collections import Counter

import numpy as np

from study.frontier import Arm, chosen, stacked
from study.panels import COLORS, LOOKS, canvas, pyplot
from study.plot import write_caption

OTHERS = "#cfcfcf"
STYLES = [(color, "-") for color in COLORS[:-1]] + [(COLORS[0], "--"), (COLORS[1], "--")]
FONT = 14  # of a picture 13 inches wide, so that it can be read at half that width
GAP = 0.115  # of a panel's height: between two labels
CAPTION = (
    "Toy world: mean over the seeds, at the learning rate that most of them chose for each other. Dot: "
    "highest mean, with the range over the seeds. Grey: the methods of the other panels. Dotted: the SFT "
    "model. An arrow: where a line ends that leaves the panel."
)
ROOM = 1.15  # the axis of KL ends this far behind nine tenths of all methods


def usual(arms: dict[str, Arm]) -> Arm:
    """At the learning rate that most seeds have chosen (field_table.py)."""
    return arms[Counter(factor for factor, _ in chosen(arms)).most_common(1)[0][0]]


def limits(paths: dict[str, tuple]) -> tuple[float, float, float]:
    """The largest sqrt(KL), the lowest and the highest gold shown: a method that collapses leaves the panel,
    or all others would be one line."""
    start = next(iter(paths.values()))[1].mean(0)[0]
    ends = [d.mean(0).max() for d, _ in paths.values()]
    golds = np.concatenate([gold.mean(0) for _, gold in paths.values()])
    top = max(golds.max(), start + 0.05)
    low = max(golds.min(), start - 0.5 * (top - start))
    height = top - low
    return ROOM * float(np.quantile(ends, 0.9)), low - 0.04 * height, top + 0.06 * height


def spread_out(heights: list[float], gap: float) -> list[float]:
    """Heights in [0, 1], in the same order, at least `gap` apart, each near its own; those that would leave
    the panel at the bottom or the top are moved back."""
    order = np.argsort(heights)
    placed = np.array(heights, dtype=float)[order]
    for _ in range(200):
        close = np.diff(placed) < gap - 1e-9
        if not close.any():
            break
        for i in np.flatnonzero(close):
            middle = (placed[i] + placed[i + 1]) / 2
            placed[i : i + 2] = middle - gap / 2, middle + gap / 2
    placed += max(0.0, -placed[0]) - max(0.0, placed[-1] - 1)
    back = np.empty_like(placed)
    back[order] = placed
    return back.tolist()


def draw_family(axis, family: dict[str, tuple], box: tuple[float, float, float]) -> None:
    """Lines, a dot with the range over the seeds where the mean is highest, and a name at the right of
    each, joined to the end of its line."""
    right, low, top = box
    ends, words = [], []
    for (name, (d, gold)), (color, dashes) in zip(family.items(), STYLES, strict=False):
        x, y = d.mean(0), gold.mean(0)
        axis.plot(x, y, color=color, linestyle=dashes, linewidth=2, zorder=3)
        peak = int(y.argmax())
        bar = [[y[peak] - gold[:, peak].min()], [gold[:, peak].max() - y[peak]]]
        axis.errorbar(x[peak], y[peak], bar, color=color, marker="o", markersize=6, capsize=2, zorder=4)
        inside = np.flatnonzero((x <= right) & (y >= low))[-1]
        out = f" → {y[-1]:.1f} (KL {x[-1] ** 2:.0f})" if inside < len(x) - 1 else ""
        ends.append((x[inside], y[inside]))
        words.append((name.replace("_", " ") + out, color))
    heights = spread_out([(y - low) / (top - low) for _, y in ends], GAP)
    for end, height, (text, color) in zip(ends, heights, words):
        line = {"arrowstyle": "-", "color": color, "lw": 0.6, "alpha": 0.6, "relpos": (0, 0.5)}
        axis.annotate(
            text, end, (1.03, height), textcoords="axes fraction", color=color, fontsize=FONT, va="center",
            annotation_clip=False, arrowprops=line,
        )


def figure_field(field: dict[str, dict[str, Arm]], methods: dict):
    """field: {method: {factor: its seeds}}; methods: {method: family, ...}."""
    paths = {}  # {method: sqrt(KL) and gold, (seeds, points) each}
    for name, arms in field.items():
        arm = usual(arms)
        paths[name] = np.sqrt(stacked(arm, "kl")), stacked(arm, "gold")
    families: dict[str, dict[str, tuple]] = {}
    for name, path in paths.items():
        families.setdefault(methods[name].family, {})[name] = path
    box = limits(paths)
    with pyplot().rc_context(LOOKS | {"font.size": FONT, "axes.titlesize": FONT}):
        figure, axes = canvas(len(families), 2, 6.6, 3.2)
        for axis, (title, family) in zip(axes, families.items()):
            for name, (d, gold) in paths.items():
                if name not in family:
                    axis.plot(d.mean(0), gold.mean(0), color=OTHERS, linewidth=0.8, zorder=1)
            draw_family(axis, family, box)
            axis.set_title(title, loc="left")
            axis.set_xlim(0, box[0])
            axis.set_ylim(*box[1:])
            axis.axhline(next(iter(family.values()))[1].mean(0)[0], color="black", lw=0.8, ls=":", zorder=2)
            axis.set_ylabel("gold")
        for axis in list(axes)[-2:]:
            axis.set_xlabel(r"$\sqrt{\mathrm{KL}(\pi\,\|\,\pi_{\mathrm{SFT}})}$")
        write_caption(figure, CAPTION)
    return figure
