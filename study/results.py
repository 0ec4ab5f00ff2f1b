"""RESULTS.md from the runs of runs/study.sh: the paper's claims with their verdicts (claims.py,
sequential.py), questions that it leaves open (questions.py, crossed.py, early_warning.py), and all arms.

    python -m study.results --study=out/study --out=RESULTS.md

Every number and verdict in the report is computed from the runs' logs.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from safetensors.torch import load_file

from rlhf.config import UserError, command_line
from rlhf.out_dir import read_about
from study.arms import HIGH, OFFLINE_HIGH, OFFLINE_LOW, TENTH, TWENTIETH, Study, lr_text
from study.claims import CLAIMS
from study.crossed import crossed_section
from study.early_warning import early_warning
from study.logs import RunLog, best_of_n_tables, find_runs, select
from study.questions import adaptive_margin, gold_over_kl, padding_fill, small_beta, table
from study.sequential import LOOKS, Conclusion, conclude
from study.settings import SIZES
from study.standing import WINDOW, mean_last, percent, pm, standing, win_rates
from study.verdict import FAILS

TRAINED = ("train_rloo", "train_simpo")  # the scripts whose runs are arms


@dataclass(frozen=True, kw_only=True)
class Config:
    study: str = "out/study"  # what runs/study.sh wrote: folders small, medium, large
    other: str = ""  # a study with other matrix kernels: whether it comes to the same verdicts
    instrument: str = "out/instrument"  # what study/instrument.py wrote, if it was run,
    field: str = "out/field"  # and study/field.py
    out: str = "RESULTS.md"  # the report


# --- all arms


def setting(run: RunLog) -> tuple[str, str, float, float]:
    """What an arm is, in four cells: method, its note, learning rate, coefficient or margin."""
    config = run.config
    if run.script == "train_simpo":
        return config["loss"], f"β {config['beta']:g}", config["lr"], config["gamma"] or 0.0
    notes = []
    if config["clip"] != 0.2:
        notes.append(f"clip {config['clip']:g}")
    if config["invalid_logprob_fill"] is not None:
        notes.append(f"fill {config['invalid_logprob_fill']}")
    return f"RLOO {config['reward']}", " ".join(notes), config["lr"], config["coefficient"]


def arms_by_setting(runs: list[RunLog]) -> dict[tuple, list[RunLog]]:
    """{`setting`: its seeds in order}"""
    arms: dict[tuple, list[RunLog]] = {}
    for run in sorted(runs, key=lambda run: run.config["seed"]):
        if run.script in TRAINED:
            arms.setdefault(setting(run), []).append(run)
    return arms


def arm_row(study: Study, size: str, key: tuple[str, str, float, float], arm: list[RunLog]) -> list:
    method, note, lr, coefficient = key
    s = standing(study, size, arm)
    greedy = np.mean([run.result["greedy/gold"] for run in arm])
    kl = np.mean([run.evaluation["kl_full"] for run in arm])
    entropy = np.mean([run.evaluation["entropy"] for run in arm])
    won = percent(win_rates(arm).mean())
    row = [size, method, note, lr_text(lr), f"{coefficient:g}", len(arm), pm(s.gain), won]
    row += [f"{greedy:.2f}", f"{kl:.2f}", f"{entropy:.2f}"]
    online = method.startswith("RLOO")
    return row + ([pm(s.drop), f"{mean_last(arm, 'scores'):.2f}", s] if online else ["", "", ""])


def all_arms(study: Study) -> str:
    header = [
        "size", "method", "", "lr", "coefficient or γ", "seeds", "gold minus SFT", "win rate", "greedy gold",
        "KL", "entropy", "fall of gold", "proxy", "standing",
    ]
    rows = []
    for size in SIZES:
        arms = arms_by_setting(study.folders[size])
        for method, note, lr, coefficient in sorted(arms, key=lambda key: (*key[:2], -key[2], key[3])):
            key = method, note, lr, coefficient
            rows.append(arm_row(study, size, key, arms[key]))
    return table(header, rows)


# --- is the study complete?


def check_finished(run: RunLog) -> None:
    if not run.result:
        raise UserError(f"{run.path}: not finished: go on with its command and --resume")
    if run.win_rate is None:
        raise UserError(f"{run.path}: no win rate in a sweep beside it (eval*/metrics.jsonl)")


def extent(arm: list[RunLog]) -> tuple[list[int], list[int]]:
    """The seeds of an arm up to the first look, and the numbers of updates that its runs have."""
    updates = {len(next(iter(run.metrics.values()))) for run in arm}
    return [run.config["seed"] for run in arm if run.config["seed"] <= LOOKS[0]], sorted(updates)


def extent_text(seeds: list[int], updates: list[int]) -> str:
    return f"seeds {seeds} of {' and '.join(map(str, updates))} updates"


def check_complete(study: Study) -> None:
    """UserError unless every run is finished and evaluated, and all arms of a script have the same first
    seeds and lengths: arms are compared seed by seed."""
    for size, runs in study.folders.items():
        for script in TRAINED:
            found = select(runs, script)
            for run in found:
                check_finished(run)
            extents = {key: extent(arm) for key, arm in arms_by_setting(found).items()}
            usual = max(extents.values(), key=list(extents.values()).count, default=None)
            for key, own in extents.items():
                if own != usual:
                    raise UserError(f"{size}, {script} {' '.join(map(str, key))}: {extent_text(*own)}, "
                                    f"where other arms have {extent_text(*usual)}")


# --- the report

HEAD = """# Results: the paper's claims in a world where the true reward is known

Written by `python -m study.results` from the runs of `bash runs/study.sh`; do not edit by hand. {date}, 2
cores, one run per core, torch {torch}; {runs} runs and {best_of_n} of best-of-n.

**The world** (`data/toy_world.py`): posts hide three to five facts among distractions; the gold reward of a
summary is exact; fallible people with a liking for flourishes and length compare summaries; a reward model
learns from 20,000 such choices and is right on {accuracy} of held-out ones. Three small GPT-NeoX models
stand for the paper's three: small for 1B, medium for 2.8B, large for 6.9B ({parameters} parameters); after
SFT their greedy summaries have gold {greedy} on 256 posts, where the human references have {references}.
RLOO with k = 4, 64 updates of 64 responses, 4 passes each, temperature 0.7, a learning rate that falls
linearly to 0. The learning rates {high}, {tenth} and {twentieth} stand for the paper's 1e-6, 1e-7 and 5e-8:
the first is a rate at which KL-constrained runs improve here. Offline {offline_high} and {offline_low} stand
for 1e-6 and 2e-7: DPO gains at the first, and no more at twice that. All rates were chosen by a handful of
trial runs in another world (another seed of `data/toy.py`). What
holds here need not hold for Pythia on TL;DR, and the other way round: `runs/paper_1b.sh` and its siblings
are a similar grid there.

**How to read the numbers.** Every arm has {first} seeds at least. A claim that its rule leaves open gets
more for all arms that it reads, at looks fixed beforehand ({looks} seeds); each look has its own level, so
that all looks together err in at most 5 % (`study/sequential.py`). In RLOO each seed has its own reward
model (of medium size, the same for policies of every size), prompts and samples; in SimPO and DPO its own
order of the data. All share the SFT model of their size and the 20,000 choices. ± is the half width of an
interval of Student's t over the seeds: at the level of its look in the claims, of 95 % elsewhere. `gold` is
the mean gold reward of 500 validation summaries sampled at 0.7, as in training; `gold +0.10` means above
the SFT model's, whose own standard error ({error}) is common to all arms of a size and not in their
intervals. `fall` is how far the gold reward of the training samples (means of {window} updates) ended below
its peak, the peak taken from the other seeds. An arm is over-optimised if the interval of its gold lies
below SFT or that of its fall above 0. The win rate is the share of those 500 summaries with a higher gold
reward than the human reference, ties as half. The paper judges greedy summaries; here sampled ones are
judged (greedy gold is in the table of all arms; 500 posts for RLOO, 256 for SimPO and DPO). Mind what
follows: a policy that only becomes more certain gains sampled gold, up to the distance between the SFT
model's sampled gold ({sampled}) and its greedy gold. Where entropy falls, as under MinEnt or with a
coefficient of 0, part of a gain is this.

The rules of the claims are older than the runs; the history of `study/claims*.py` and `study/sequential.py`
shows it.
"""

PICTURES = {  # file: what it shows; all of the toy world
    "1": "the paper's Figure 1: RLHF reward and entropy bonus at two learning rates, by entropy coefficient "
         "(1B there, small here)",
    "2": "Figure 2: the same at the two lower rates (2.8B, medium)",
    "3": "Figure 3: KL to the reference, and KL between updates (1B and 2.8B, small and medium)",
    "4": "Figure 4: the reference's log-prob margins during DPO, batch averages (1B, small)",
    "5": "Figure 5: KL to the reference of all arms, and whether each ends above the SFT model's win rate "
         "(1B and 2.8B, small and medium)",
    "6": "Figure 6: win rate over SimPO's checkpoints at the low rate, by margin (1B, small)",
    "7": "Figure 7: SimPO at the low rate, by margin (1B, small)",
    "8": "Figure 8: SimPO at the high rate, by margin (1B, small)",
    "9": "Figure 9: DPO (1B, small)",
    "10": "Figure 10: MaxEnt at the high rate (6.9B, large)",
    "11": "Figure 11: MaxEnt at a tenth of it (6.9B, large)",
    "12": "Figure 12: KL-constrained (6.9B, large)",
    "gold_kl": "what the paper could not draw: gold reward against the square root of the KL, with the fits "
               "of Gao et al. 2022 and best-of-n",
    "proxy_gold": "gold reward against the reward model's score",
    "reward_gold": "both over time",
    "best_of_n": "best-of-n: proxy and gold reward over its KL",
}


def standard_error(summaries: Path) -> float:
    """Of the mean gold reward in a table of evaluate.py."""
    gold = pq.read_table(summaries, columns=["gold"])["gold"].to_numpy()
    return gold.std(ddof=1) / math.sqrt(len(gold))


def parameters(model: Path) -> int:
    return sum(weight.numel() for weight in load_file(model / "model.safetensors").values())


def head(study: Study, root: Path) -> str:
    first = select(study.folders["small"], "train_rloo")[0]
    about = read_about(first.path)
    accuracies = [run.result["accuracy"] for run in select(find_runs(root), "train_rm")]
    greedy = {size: study.arm(size, "train_sft")[0].result["greedy/gold"] for size in SIZES}
    judged = {size: next((root / size).glob("eval_s*/sft/summaries.parquet")) for size in SIZES}
    errors = {size: standard_error(file) for size, file in judged.items()}
    return HEAD.format(
        date=about["started"].split()[0],
        torch=about["torch"],
        runs=sum(map(len, study.folders.values())),
        best_of_n=sum(len(best_of_n_tables(root / size)) for size in SIZES),
        accuracy=f"{100 * min(accuracies):.0f} to {percent(max(accuracies))}",
        greedy=", ".join(f"{gold:.2f} ({size})" for size, gold in greedy.items()),
        references=f"{study.sft('small')['gold_reference']:.2f}",
        high=lr_text(HIGH),
        tenth=lr_text(TENTH),
        twentieth=lr_text(TWENTIETH),
        offline_high=lr_text(OFFLINE_HIGH),
        offline_low=lr_text(OFFLINE_LOW),
        error=", ".join(f"{error:.3f} {size}" for size, error in errors.items()),
        window=WINDOW,
        sampled=", ".join(f"{study.sft(size)['gold']:.2f}" for size in SIZES),
        first=LOOKS[0],
        looks=", ".join(map(str, LOOKS)),
        parameters=", ".join(f"{parameters(root / size / 'sft') / 1e6:.2f}M" for size in SIZES),
    )


def claim_section(i: int, conclusion: Conclusion, elsewhere: str) -> str:
    claim = conclusion.claim
    links = [f"[figure {name}](docs/figures/figure_{name}.png)" for name in claim.figures.split()]
    reason = ""
    if claim.reason and claim.verdict == FAILS:
        reason = f"\n\n*A likely reason, not tested:* {claim.reason}"
    return (
        f"### {i}. {claim.title}\n\n*Paper:* {claim.paper}\n\n*Rule:* {claim.rule}\n\n*Here:* "
        f"{claim.ours} "
        f"({', '.join(links) or 'see the table of all arms'}). {conclusion.seeds} seeds, intervals of "
        f"{100 * conclusion.level:g} %; differences that would have been seen with probability 0.8: "
        f"{conclusion.power or 'none is judged by an interval'}.\n\n**{claim.verdict}**{elsewhere}{reason}\n"
    )


def other_kernels(conclusions: list[Conclusion], other: str) -> list[str]:
    """What a study with other matrix kernels says of each claim; '' where there is none, or it agrees."""
    if not other:
        return [""] * len(conclusions)
    folders = {size: find_runs(Path(other) / size) for size in SIZES}
    there = [conclude(claim, folders) for claim in CLAIMS]
    said = []
    for c, t in zip(conclusions, there):
        same = t.claim.verdict == c.claim.verdict
        verdict = "the same" if same else f"{t.claim.verdict}, {t.seeds} seeds"
        said.append(f" (with other matrix kernels: {verdict})")
    return said


def verdict_sections(conclusions: list[Conclusion], elsewhere: list[str]) -> list[str]:
    count = Counter(c.claim.verdict for c in conclusions)
    counted = ", ".join(f"{number} {verdict}" for verdict, number in count.most_common())
    rows = [[i, c.claim.title, f"**{c.claim.verdict}**", c.seeds] for i, c in enumerate(conclusions, 1)]
    sections = [claim_section(i, *both) for i, both in enumerate(zip(conclusions, elsewhere), 1)]
    return [
        f"## Verdicts\n\n{len(conclusions)} claims: {counted}.\n",
        table(["", "claim", "verdict here", "seeds"], rows),
        "## The claims\n",
        *sections,
    ]


def open_questions(study: Study, root: Path) -> list[str]:
    return [
        "## What the paper leaves open\n",
        "### Is an adaptive margin what separates DPO from SimPO?\n",
        adaptive_margin(study),
        "### Is it β?\n",
        small_beta(study),
        "### How much of \"MaxEnt over-optimises\" could a padding bug produce?\n",
        padding_fill(study),
        "### Gold reward against KL\n\n![gold against KL](docs/figures/figure_gold_kl.png)\n",
        gold_over_kl(study, root),
        "### How much is the reward model's luck?\n",
        crossed_section(root),
        "### Which logged metric warns first?\n",
        early_warning(study),
    ]


def section_of(folder: str, file: str) -> list[str]:
    """What another study wrote, if it was run; its pictures are in docs/figures (runs/study.sh)."""
    path = Path(folder) / file
    return [path.read_text().replace("](figure_", "](docs/figures/figure_")] if path.exists() else []


def picture(name: str, shows: str) -> str:
    return f"![{name}](docs/figures/figure_{name}.png)\n*Toy world; {shows}.*\n"


def main(cfg: Config) -> dict:
    root = Path(cfg.study)
    folders = {size: find_runs(root / size) for size in SIZES}
    study = Study(folders)
    check_complete(study)
    conclusions = [conclude(claim, folders) for claim in CLAIMS]
    first = {size: [run for run in runs if run.config["seed"] <= LOOKS[0]] for size, runs in folders.items()}
    parts = [
        head(study, root),
        *verdict_sections(conclusions, other_kernels(conclusions, cfg.other)),
        *open_questions(Study(first), root),
        *section_of(cfg.field, "field.md"),
        *section_of(cfg.instrument, "instrument.md"),
        "## All arms\n",
        all_arms(study),
        "## Figures\n",
        *(picture(name, shows) for name, shows in PICTURES.items()),
    ]
    Path(cfg.out).write_text("\n".join(parts))
    count = Counter(c.claim.verdict for c in conclusions)
    print(json.dumps({"claims": len(conclusions), **count, "out": cfg.out}))
    return dict(count)


if __name__ == "__main__":
    command_line(main, Config)
