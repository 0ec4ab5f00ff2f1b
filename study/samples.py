"""How the answers to one prompt change over training: samples.jsonl of one run or several, side by side.

Every look at a prompt uses the same random numbers (rlhf/rollout.py: watched), so what differs between two
looks is the policy. An answer that the look before had too is grey; the number before it is its score.
"""

import json
import textwrap
from pathlib import Path

from rlhf.config import UserError
from study.panels import GRAY, pyplot

LOOKS = 6  # of a run, at most: the first, the last and some between
WIDTH = 58  # characters of a line
INCH = 0.17  # height of a line


def read_samples(file: Path) -> dict[str, dict[int, list[dict]]]:
    """{prompt: {step: its responses}} in the order of the file, without a last line that a kill cut off."""
    found: dict[str, dict[int, list[dict]]] = {}
    for line in file.read_text().splitlines():
        try:
            row = json.loads(line)
            found.setdefault(row["prompt"], {})[row["step"]] = row["responses"]
        except (ValueError, KeyError, TypeError):
            continue
    if not found:
        raise UserError(f"{file}: no samples in it (--samples_every of the run)")
    return found


def some(steps: list[int]) -> list[int]:
    """At most LOOKS of the steps, evenly spread."""
    last = len(steps) - 1
    return sorted({steps[round(i * last / (LOOKS - 1))] for i in range(LOOKS)})


def column(looks: dict[int, list[dict]]) -> list[tuple[str, str]]:
    """The lines of a run, (text, colour): a heading per step, its answers below it."""
    lines = []
    before = set()
    for step in some(list(looks)):
        lines += [("", "black"), (f"update {step}", "#0072B2")]
        for response in looks[step]:
            text = " ".join(response["text"].split())
            end = "" if response["ended"] else " [...]"
            score = "  null" if response["score"] is None else f"{response['score']:6.2f}"
            wrapped = textwrap.wrap(f"{text}{end}", WIDTH - 8) or ["(nothing)"]
            color = GRAY if text in before else "black"
            lines += [(f"{score}  {wrapped[0]}", color), *((" " * 8 + more, color) for more in wrapped[1:])]
        before = {" ".join(response["text"].split()) for response in looks[step]}
    return lines


def answers(files: dict[str, Path], number: int):
    """A column of text for each run, {label: its samples.jsonl}; `number` counts the prompts from 1."""
    found = {label: read_samples(file) for label, file in files.items()}
    prompts = list(next(iter(found.values())))
    if number > len(prompts):
        raise UserError(f"--prompt={number}: the run shows {len(prompts)} prompts")
    prompt = prompts[number - 1]
    for label, samples in found.items():
        if prompt not in samples:
            raise UserError(f"--runs: {label} shows other prompts than {next(iter(found))}")
    columns = {label: column(samples[prompt]) for label, samples in found.items()}
    shown = textwrap.wrap(" ".join(prompt.split()), WIDTH * len(columns))
    rows = len(shown) + 2 + max(map(len, columns.values()))
    size = (0.075 * WIDTH * len(columns) + 0.3, INCH * (rows + 1))
    figure = pyplot().figure(figsize=size)

    def write(row: int, column: int, text: str, **looks) -> None:
        x = 0.02 + column / len(columns)
        y = 1 - (row + 0.5) / (rows + 1)
        figure.text(x, y, text, va="top", fontsize=8, family="monospace", parse_math=False, **looks)

    for row, text in enumerate(shown):
        write(row, 0, text, style="italic")
    for place, (label, lines) in enumerate(columns.items()):
        write(len(shown) + 1, place, label, weight="bold")
        for row, (text, color) in enumerate(lines):
            write(len(shown) + 2 + row, place, text, color=color)
    return figure
