r"""Curves of one or several runs, side by side, as a PNG; or a figure of the paper, from a whole study.

    python -m study.plot --runs='KL=out/demo/rloo_kl,MaxEnt=out/demo/rloo_maxent' --out=out/demo/rloo.png \\
        --metrics=scores,gold,kl,entropy
    python -m study.plot --figure=3 --out=docs/figures/figure_3.png \\
        --runs='small=out/study/small,medium=out/study/medium,large=out/study/large'

    python -m study.plot --samples --runs='KL=out/demo/rloo_kl,MaxEnt=out/demo/rloo_maxent' --out=samples.png

A run is a directory with metrics.jsonl. An item of --runs is [label=]pattern; a pattern that matches
several runs (seeds: 'KL=out/study/kl_s*') is drawn as their mean with a band from the lowest to the
highest. With --figure (figures.py) an item is [label=]folder, the folder of all runs of one model size, in
the paper's order 1B, 2.8B, 6.9B; the runs are found by their settings. With --samples a run is one with
samples.jsonl: how the answers to one prompt change (samples.py). Needs matplotlib (requirements-dev.txt).
"""

import glob
import io
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf.config import UserError, command_line
from study.figures import FIGURES
from study.logs import find_runs, read_columns
from study.panels import LOOKS, canvas, draw, legend, pyplot
from study.samples import answers

TITLES = {  # what an axis says; a metric that is not here goes by its own name
    "scores": "reward model's score (proxy)",
    "gold": "gold reward (truth)",
    "rlhf_reward": "RLHF reward",
    "kl": "KL(π‖π_ref), nats per sequence",
    "kl_full": "KL(π‖π_ref), full, nats per sequence",
    "entropy": "entropy, nats per token",
    "kl_prev/approxkl_avg": "KL between updates (k2, average)",
    "kl_prev/k3": "KL(π_old‖π_new) after the update (k3)",
    "response_length": "response tokens",
    "eos_share": "share with EOS",
    "margins": "reward margin",
    "accuracies": "accuracy on the batch",
    "logps/chosen": "log π(chosen), nats per sequence",
    "logps/rejected": "log π(rejected), nats per sequence",
    "ref_margin": "log π_ref(chosen) − log π_ref(rejected)",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    # I/O
    runs: str  # runs joined by ',': [label=]directory or pattern, several matches of one pattern are seeds;
               # with --figure [label=]folder of runs
    metrics: str = "scores,gold,kl,entropy"  # columns of metrics.jsonl joined by ',': one panel each
    samples: bool = False  # instead of --metrics: the answers to one prompt over the updates of each run
    prompt: int = 1  # of --samples: which of the prompts that a run shows
    figure: str = ""  # instead of --metrics: 1 to 12, gold_kl, proxy_gold, best_of_n or reward_gold
    out: str = "curves.png"  # the picture
    # looks
    x: str = "step"  # column on the horizontal axis
    columns: int = 4  # panels in a row
    smooth: int | None = None  # moving average over this many points (default: 1, with --figure 5)
    title: str = ""  # above the panels
    caption: str = ""  # a line below everything


def matches(items: str, file: str) -> dict[str, list[Path]]:
    """{label: the runs (seeds) with that file that its pattern matches}."""
    out = {}
    for item in items.split(","):
        label, _, pattern = item.rpartition("=")
        found = sorted(path for path in map(Path, glob.glob(pattern)) if (path / file).exists())
        if not found:
            raise UserError(f"--runs: {pattern} matches no run (a directory with {file})")
        out[label or Path(pattern).name] = found
    return out


def read_curves(items: str) -> dict[str, list[dict[str, np.ndarray]]]:
    """{label: the columns of its runs}."""
    found = matches(items, "metrics.jsonl")
    return {label: [read_columns(path / "metrics.jsonl") for path in paths] for label, paths in found.items()}


def curves(cfg: Config, lines: dict[str, list[dict[str, np.ndarray]]]):
    """One panel per metric."""
    metrics = cfg.metrics.split(",")
    known = {key for seeds in lines.values() for seed in seeds for key in seed}
    missing = [metric for metric in metrics if metric not in known]
    if missing:
        raise UserError(f"--metrics: none of the runs has {', '.join(missing)}; "
                        f"they have: {', '.join(sorted(known))}")
    figure, axes = canvas(len(metrics), cfg.columns)
    for axis, metric in zip(axes, metrics):
        draw(axis, lines, metric, cfg.x, cfg.smooth or 1)
        axis.set_title(TITLES.get(metric, metric), fontsize=11)
        axis.set_xlabel(cfg.x)
    legend(figure, axes)
    return figure


def paper_figure(cfg: Config, folders: dict[str, list]):
    """One of FIGURES."""
    options = {} if cfg.smooth is None else {"smooth": cfg.smooth}
    with pyplot().rc_context(LOOKS):
        try:
            return FIGURES[cfg.figure](folders, **options)
        except UserError as error:
            raise UserError(f"--figure={cfg.figure}: {error}") from error


def write_caption(figure, caption: str) -> None:
    """Below the legend."""
    figure.draw_without_rendering()
    text = "\n".join(textwrap.wrap(caption, int(11 * figure.get_figwidth())))
    y = figure.get_tightbbox().y0 / figure.get_figheight() - 0.02
    figure.text(0.5, y, text, ha="center", va="top", fontsize=11, color="#555555")


def save(figure, path: str) -> None:
    """A PNG of 128 colours (a third of the bytes) or whatever the name ends with; without the version of
    matplotlib: the same data give the same bytes."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    looks = {"dpi": 110, "bbox_inches": "tight"}
    if Path(path).suffix != ".png":
        figure.savefig(path, **looks)
        return
    from PIL import Image  # comes with matplotlib
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None}, **looks)
    Image.open(picture).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def main(cfg: Config) -> None:
    if cfg.figure:
        if cfg.figure not in FIGURES:
            raise UserError(f"--figure={cfg.figure}: known are {', '.join(FIGURES)}")
        items = [item.rpartition("=") for item in cfg.runs.split(",")]
        found = {label or Path(folder).name: find_runs(folder) for label, _, folder in items}
        figure = paper_figure(cfg, found)
    elif cfg.samples:
        found = matches(cfg.runs, "samples.jsonl")
        figure = answers({label: path / "samples.jsonl" for label, (path, *_) in found.items()}, cfg.prompt)
    else:
        found = read_curves(cfg.runs)
        figure = curves(cfg, found)
    if cfg.title:
        figure.suptitle(cfg.title)
    if cfg.caption:
        write_caption(figure, cfg.caption)
    save(figure, cfg.out)
    print(json.dumps({"out": cfg.out, "runs": {label: len(runs) for label, runs in found.items()}}))


if __name__ == "__main__":
    command_line(main, Config)
