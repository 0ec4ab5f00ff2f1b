"""RESULTS.md from the runs of runs/study.sh: the paper's claims with their verdicts (claims.py), four questions it leaves open, and the table of all arms.

    python results.py --study=out/study --out=RESULTS.md

Every number and verdict in the report is computed from the runs' logs.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from study.claims import CLAIMS, FAILS
from study.arms import rate
from rlhf.config import UserError, command_line
from study.logs import RunLog, find_runs, read_columns, select
from evaluation.statistics import t_interval
from study.fits import gao_fit
from study.standing import HIGH, OFFLINE_HIGH, OFFLINE_LOW, SIZES, TENTH, WINDOW, Study, change, golds, kl_arms, last, maxent, percent, pm, smoothed, standing, win_rates

FELL, STAYED = 0.1, 0.05  # gold: a run that fell by more than this from its peak over-optimised; one that fell by less stayed healthy
FALSE_ALARMS = 0.1  # share of healthy runs that a threshold may alarm


@dataclass(frozen=True, kw_only=True)
class Config:
    study: str = "out/study"  # what runs/study.sh wrote: folders small, medium, large
    out: str = "RESULTS.md"  # the report


def table(header: list[str], rows: list[list]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


# --- what the paper leaves open


def adaptive_margin(study: Study) -> str:
    rows = []
    for lr in (OFFLINE_HIGH, OFFLINE_LOW):
        arms = {"dpo_length, β = 2: adaptive": study.offline("dpo_length", lr), "DPO, β = 0.05": study.offline("dpo", lr)}
        arms |= {f"SimPO, β = 2, γ = {gamma:g}": study.offline("simpo", lr, beta=2.0, gamma=gamma) for gamma in (0.0, 0.25, 0.5, 1.0, 2.0)}
        for name, arm in arms.items():
            margin = 2 * np.mean([r.metrics["ref_margin_mean"].mean() for r in arm]) if "dpo_length" in name else arm[0].config["gamma"]
            rows.append([f"{rate(lr)}", name, "" if "DPO" in name else f"{margin:.2f}", pm(standing(study, "small", arm).gain), percent(win_rates(arm)),
                         f"{np.mean([change(r, 'logps/chosen') for r in arm]):+.1f}", f"{np.mean([r.evaluation['kl_full'] for r in arm]):.2f}"])
    verdicts = []
    for lr in (OFFLINE_HIGH, OFFLINE_LOW):
        adaptive, fixed, dpo = study.offline("dpo_length", lr), study.offline("simpo", lr, beta=2.0, gamma=0.5), study.offline("dpo", lr)
        to_fixed, to_dpo = t_interval(golds(adaptive) - golds(fixed)), t_interval(golds(dpo) - golds(fixed))
        word = "better than" if to_fixed[1] > 0 else "worse than" if to_fixed[2] < 0 else "not distinguishable from"
        verdicts.append(f"At {rate(lr)} the adaptive margin is {word} the fixed γ = 0.5 (gold {pm(to_fixed)}); DPO minus that SimPO: {pm(to_dpo)}.")
    return ("Length-normalised DPO is SimPO whose margin is β times the reference's own mean log-prob difference: another margin for each pair, on average "
            "that of the column. If adaptivity were what separates DPO from SimPO, it would move SimPO towards DPO.\n\n"
            + table(["lr", "loss", "mean margin", "gold minus SFT", "win rate", "change of log π(chosen)", "KL"], rows) + "\n" + " ".join(verdicts) + "\n")


def small_beta(study: Study) -> str:
    rows = []
    for lr in (OFFLINE_HIGH, OFFLINE_LOW):
        for gamma in (0.0, 0.25, 0.5, 1.0, 2.0):
            two, tenth = (study.offline("simpo", lr, beta=beta, gamma=gamma) for beta in (2.0, 0.1))
            rows.append([f"{rate(lr)}", f"{gamma:g}", *(cell for arm in (two, tenth) for cell in (
                pm(standing(study, "small", arm).gain), f"{np.mean([change(r, 'logps/chosen') for r in arm]):+.1f}"))])
    gaps = [(lr, t_interval(np.mean([golds(study.offline("simpo", lr, beta=0.1, gamma=g)) - golds(study.offline("simpo", lr, beta=2.0, gamma=g))
                                     for g in (0.25, 0.5, 1.0, 2.0)], axis=0))) for lr in (OFFLINE_HIGH, OFFLINE_LOW)]
    return ("The paper does not state SimPO's β. At TRL's default of 0.1 a margin γ asks for γ/β nats per token, 20 times what it asks for at 2.\n\n"
            + table(["lr", "γ", "β = 2: gold minus SFT", "change of log π(chosen)", "β = 0.1: gold minus SFT", "change of log π(chosen)"], rows)
            + "\nβ = 0.1 minus β = 2, mean over γ > 0: " + "; ".join(f"lr {rate(lr)} {pm(g)}" for lr, g in gaps) + ".\n")


def fill(study: Study) -> str:
    rows, worse = [], []
    for lr in (HIGH, TENTH):
        for coef in (0.1, 1.0):
            masked, filled = (study.ablation("small", coef, lr, fill=value) for value in (None, 1.0))
            gap = t_interval(golds(filled) - golds(masked))
            worse.append(gap[2] < 0)
            rows.append([f"{rate(lr)}", f"{coef:g}", *(pm(standing(study, "small", arm).gain) for arm in (masked, filled)), pm(gap),
                         *(f"{np.mean([last(r, 'response_length') for r in arm]):.1f}" for arm in (masked, filled)),
                         *(f"{100 * np.mean([last(r, 'eos_share') for r in arm]):.0f} %" for arm in (masked, filled))])
    return ("TRL filled the log-probs after the EOS with 1.0; summed over the padding and divided by |y|, eq. 7 then contains a hidden penalty of β(R - "
            "|y|)/|y| on short answers (`--invalid_logprob_fill=1.0`). Whether the paper's code had it is not known.\n\n"
            + table(["lr", "α", "masked: gold minus SFT", "filled", "filled minus masked", "tokens, masked", "filled", "EOS, masked", "filled"], rows)
            + f"\nThe fill makes the gold reward worse in {sum(worse)} of {len(worse)} settings (interval below 0).\n")


def fits(study: Study, root: Path) -> str:
    rows = []
    for size in SIZES:
        sft = study.sft(size)["gold"]
        families = {"KL-constrained": kl_arms(study, size), "MaxEnt, full rate": maxent(study, size, HIGH),
                    "MaxEnt, a tenth": maxent(study, size, TENTH)}
        for name, arms in families.items():
            runs = [r for arm in arms.values() for r in arm]
            kl, gain = (np.concatenate([smoothed(r.metrics[key]) for r in runs]) for key in ("kl_full", "gold"))
            a, b, r2 = gao_fit(kl, gain - sft)
            rows.append([size, name, f"{a:.2f}", f"{b:.2f}", f"{r2:.2f}", f"{kl.max():.1f}", f"{math.exp(a / b - 1) ** 2:.1f}" if b > 0 and a / b < 4 else ""])
        columns = [read_columns(path) for path in sorted((root / size).glob("best_of_n*/metrics.jsonl"))]
        gold = np.mean([c["gold"] for c in columns], axis=0)
        peak = gold.argmax()
        rows.append([size, f"best of n: {gold[0]:.2f} at n = 1, highest {gold[peak]:.2f} at n = {columns[0]['n'][peak]:.0f} (KL {columns[0]['kl'][peak]:.1f}), "
                     f"{gold[-1]:.2f} at n = {columns[0]['n'][-1]:.0f}", "", "", "", f"{columns[0]['kl'][-1]:.1f}", ""])
    return ("gold - gold_SFT = d (a - b log d), d = √KL (Gao et al. 2022, for RL), over the updates of all seeds and coefficients of a family; the peak of "
            "the fitted curve lies at KL = exp(a/b - 1)². One curve for a family is a summary, not a law: R² says how well it does. (The picture's fits "
            "are of the arms drawn in it.)\n\n"
            + table(["size", "family", "a", "b", "R²", "largest KL", "KL of the peak"], rows))


# --- early warning

SIGNALS = {  # what a user sees without a gold reward -> a number that should rise before trouble; all of the past and present only
    "KL to the reference, level": lambda m: m("kl_full"),
    "KL between updates, over its lowest so far": lambda m: m("kl_prev/k3") / np.minimum.accumulate(m("kl_prev/k3")),
    "entropy bonus (per token), rise": lambda m: m("length_normalized_surprisal") - m("length_normalized_surprisal")[0],
    "entropy bonus, change either way": lambda m: abs(m("length_normalized_surprisal") - m("length_normalized_surprisal")[0]),
    "response length, change either way": lambda m: abs(m("response_length") - m("response_length")[0]),
    "share of EOS, fall": lambda m: m("eos_share")[0] - m("eos_share"),
    "spread of the RM score, rise": lambda m: m("scores_std") - m("scores_std")[0],
    "spread of the RM score, fall": lambda m: m("scores_std")[0] - m("scores_std"),
    "RM score, rise": lambda m: m("scores") - m("scores")[0],
}


def signal(run: RunLog, name: str) -> np.ndarray:
    """(updates - 3,): the signal of the causal mean over 4 updates; entry i is known after update i + 4."""
    return SIGNALS[name](lambda key: smoothed(run.metrics[key], 4))


def early_warning(study: Study) -> str:
    runs = [r for size in SIZES for r in select(study.folders[size], "train_rloo")]
    gold = [smoothed(r.metrics["gold"]) for r in runs]  # entry i is the mean of updates i + 1 ... i + WINDOW, and stands for the one in the middle
    fall = [curve.max() - curve[-1] for curve in gold]
    peaks = [int(curve.argmax()) for curve in gold]
    falls = [peak + int((curve[peak:] < curve.max() - FELL).argmax()) for peak, curve in zip(peaks, gold)]
    rows = []
    for name in SIGNALS:
        signals, alarmed, false, to_peak, to_fall = [signal(r, name) for r in runs], [], [], [], []
        for r, values, depth, peak, broken in zip(runs, signals, fall, peaks, falls):
            # the threshold comes from the other seeds, so from other reward models
            healthy = [s.max() for other, s, f in zip(runs, signals, fall) if other.config["seed"] != r.config["seed"] and f < STAYED]
            alarms = np.flatnonzero(values > np.quantile(healthy, 1 - FALSE_ALARMS))
            if depth < STAYED:
                false.append(len(alarms) > 0)
            elif depth > FELL:
                alarmed.append(len(alarms) > 0)
                to_peak += [peak + WINDOW // 2 - (i + 4) for i in alarms[:1]]
                to_fall += [broken + WINDOW // 2 - (i + 4) for i in alarms[:1]]

        def lead(updates: list[int], found: list[bool] = alarmed) -> list[str]:
            if not updates:
                return ["0 %", ""]
            low, middle, high = np.quantile(updates, [0.25, 0.5, 0.75])
            return [f"{100 * np.sum(np.array(updates) > 0) / len(found):.0f} %", f"{middle:+.0f} ({low:+.0f} to {high:+.0f})"]

        rows.append([name, f"{100 * np.mean(alarmed):.0f} %", *lead(to_peak), *lead(to_fall), f"{100 * np.mean(false):.0f} %"])
    rows.sort(key=lambda row: -int(row[1].split()[0]))
    return (f"All {len(runs)} RLOO runs of the grid. {sum(f > FELL for f in fall)} over-optimised (gold, mean of {WINDOW} updates, more than {FELL} below "
            f"its peak at the end), {sum(f < STAYED for f in fall)} stayed healthy (less than {STAYED} below). A signal alarms at the first update where "
            f"its mean over 4 updates exceeds a threshold: the lowest that would have alarmed at most {100 * FALSE_ALARMS:.0f} % of the healthy runs of "
            f"the OTHER seeds (other reward models). Leads are in updates, from the alarm to the gold peak and to the update where gold was {FELL} below "
            "it: positive = warned before. The peak of the over-optimised runs is at update "
            f"{np.median([p for p, f in zip(peaks, fall) if f > FELL]) + WINDOW // 2:.0f} in the median, which leaves little time. Sizes and learning "
            "rates are pooled, so a level may in part tell the learning rate; and a run is judged by its own noisy peak here.\n\n"
            + table(["signal", "alarmed, of over-optimised", "before the peak", "median lead to the peak (quartiles)", f"before gold fell by {FELL}",
                     "median lead to that fall (quartiles)", "false alarms, held-out"], rows))


# --- the report

PICTURES = {  # file: what it shows; all of the toy world
    "1": "the paper's Figure 1: RLHF reward and entropy bonus at two learning rates, by entropy coefficient (1B there, small here)",
    "2": "Figure 2: the same at the two lower rates (2.8B, medium)",
    "3": "Figure 3: KL to the reference, and KL between updates (1B and 2.8B, small and medium)",
    "4": "Figure 4: the reference's log-prob margins during DPO, batch averages (1B, small)",
    "5": "Figure 5: KL to the reference of all arms, and whether each ends above the SFT model's win rate (1B and 2.8B, small and medium)",
    "6": "Figure 6: win rate over SimPO's checkpoints at the low rate, by margin (1B, small)",
    "7": "Figure 7: SimPO at the low rate, by margin (1B, small)",
    "8": "Figure 8: SimPO at the high rate, by margin (1B, small)",
    "9": "Figure 9: DPO (1B, small)",
    "10": "Figure 10: MaxEnt at the high rate (6.9B, large)",
    "11": "Figure 11: MaxEnt at a tenth of it (6.9B, large)",
    "12": "Figure 12: KL-constrained (6.9B, large)",
    "gold_kl": "what the paper could not draw: gold reward against the square root of the KL, with the fits of Gao et al. 2022 and best-of-n",
    "proxy_gold": "gold reward against the reward model's score",
    "reward_gold": "both over time",
    "best_of_n": "best-of-n: proxy and gold reward over its KL",
}


def setting(r: RunLog) -> tuple:
    """What an arm is, in four cells: method, its note, learning rate, coefficient or margin."""
    c = r.config
    if r.script == "train_simpo":
        return c["loss"], f"β {c['beta']:g}", c["lr"], c["gamma"] or 0.0
    notes = [f"clip {c['clip']:g}"] * (c["clip"] != 0.2) + ["fill 1.0"] * (c["invalid_logprob_fill"] is not None)
    return f"RLOO {c['reward']}", " ".join(notes), c["lr"], c["kl_coef"] if c["reward"] == "kl" else c["entropy_coef"]


def all_arms(study: Study) -> str:
    rows = []
    for size in SIZES:
        arms: dict[tuple, list[RunLog]] = {}
        for r in (r for r in study.folders[size] if r.script in ("train_rloo", "train_simpo")):
            arms.setdefault(setting(r), []).append(r)
        for (method, note, lr, coef), arm in sorted(arms.items(), key=lambda item: (*item[0][:2], -item[0][2], item[0][3])):
            arm.sort(key=lambda r: r.config["seed"])
            s, measured = standing(study, size, arm), {key: np.mean([r.evaluation[key] for r in arm]) for key in ("kl_full", "entropy")}
            online = [pm(s.drop), f"{np.mean([last(r, 'scores') for r in arm]):.2f}", s] if method.startswith("RLOO") else ["", "", ""]
            rows.append([size, method, note, f"{rate(lr)}", f"{coef:g}", len(arm), pm(s.gain), percent(win_rates(arm)),
                         f"{np.mean([r.result['greedy/gold'] for r in arm]):.2f}", f"{measured['kl_full']:.2f}", f"{measured['entropy']:.2f}", *online])
    return table(["size", "method", "", "lr", "coefficient or γ", "seeds", "gold minus SFT", "win rate", "greedy gold", "KL", "entropy", "fall of gold",
                  "proxy", "standing"], rows)


HEAD = """# Results: the paper's claims in a world where the true reward is known

Written by `python results.py` from the runs of `bash runs/study.sh`; do not edit by hand. {date}, 2 cores, one run per core, torch {torch}; {runs} runs
and 9 of best-of-n.

**The world** (`data/toy_world.py`): posts hide three to five facts among distractions; the gold reward of a summary is exact; fallible people with a
liking for flourishes and length compare summaries; a reward model learns from 20,000 such choices and is right on {accuracy} of held-out ones. Three small
GPT-NeoX models stand for the paper's three: small (0.13M parameters) for 1B, medium (0.66M) for 2.8B, large (1.9M) for 6.9B; after SFT (learning rates
1.5e-3, 8e-4, 7e-4) their greedy summaries have gold {greedy} on 256 posts, where the human references have {references}. So a larger model is not a better
one here. RLOO with k = 4, 64 updates of 64 responses, 4 passes each, temperature 0.7, a learning rate that falls linearly to 0. The learning rates 3e-4,
3e-5 and 1.5e-5 stand for the paper's 1e-6, 1e-7 and 5e-8; the first is a rate at which KL-constrained trial runs of the small and the medium model
improved (a handful of MaxEnt trial runs at 3e-4 and 3e-5 were seen then, too). Offline 3e-4 and 6e-5 stand for 1e-6 and 2e-7; the first was chosen by
trial runs of DPO. What holds here need not hold for Pythia on TL;DR, and the other way round: `runs/paper_1b.sh` and its siblings are a similar grid
there.

**How to read the numbers.** Three seeds per arm. In RLOO each seed has its own reward model, prompts and samples; in SimPO and DPO its own order of the
data. All share the SFT model of their size and the 20,000 choices. ± is the half width of the 95 % interval of Student's t over the seeds, which with
three of them is 2.5 standard deviations. `gold` is the mean gold reward of 500 validation summaries sampled at 0.7, as in training; `gold +0.10` means
above the SFT model's, whose own standard error ({error}) is common to all arms of a size and not in their intervals. `fall` is how far the gold reward of
the training samples (means of {window} updates) ended below its peak, the peak taken from the other seeds. An arm is over-optimised if the interval of its
gold lies below SFT or that of its fall above 0. The win rate is the share of those 500 summaries with a higher gold reward than the human reference, ties
as half. The paper judges greedy summaries; the SFT models' greedy ones come close to the references, which leaves little to gain, so sampled ones are
judged (greedy gold is in the table of all arms; 500 posts for RLOO, 256 for SimPO and DPO). Mind what follows: a policy that only becomes more certain
gains sampled gold, up to the distance between the SFT model's sampled gold ({sampled}) and its greedy gold. Where entropy falls, as under MinEnt or with a
coefficient of 0, part of a gain is this.

The rules of the claims were written after those trial runs and before the first RLOO run of the study; the history of `claims.py` shows what was changed
since (wording, none of the thresholds).
"""


def standard_error(summaries: Path) -> float:
    """Of the mean gold reward in a table of evaluate.py."""
    gold = pq.read_table(summaries, columns=["gold"])["gold"].to_numpy()
    return gold.std(ddof=1) / math.sqrt(len(gold))


def check_complete(study: Study) -> None:
    """UserError unless every run is finished and evaluated, and all arms of a script have the same seeds and lengths: arms are compared seed by seed."""
    for size, runs in study.folders.items():
        arms: dict[tuple, list[RunLog]] = {}
        for r in runs:
            if r.script in ("train_rloo", "train_simpo"):
                if not r.result or r.win_rate is None:
                    raise UserError(f"{r.path}: " + ("no win rate in a sweep beside it (eval*/metrics.jsonl)" if r.result else "not finished"))
                arms.setdefault((r.script, *setting(r)), []).append(r)
        for script in {key[0] for key in arms}:
            shapes = {key: (sorted(r.config["seed"] for r in arm), {len(next(iter(r.metrics.values()))) for r in arm})
                      for key, arm in arms.items() if key[0] == script}
            usual = max(shapes.values(), key=list(shapes.values()).count)
            for key, (seeds, lengths) in shapes.items():
                if (seeds, lengths) != usual:
                    raise UserError(f"{size}, {' '.join(map(str, key))}: seeds {seeds} of {' and '.join(map(str, sorted(lengths)))} updates, "
                                    f"where other arms have seeds {usual[0]} of {' and '.join(map(str, sorted(usual[1])))}")


def main(cfg: Config) -> dict:
    root = Path(cfg.study)
    study = Study({size: find_runs(root / size) for size in SIZES})
    check_complete(study)
    about = json.loads((select(study.folders["small"], "train_rloo")[0].path / "run.json").read_text())
    accuracy = [r.result["accuracy"] for runs in study.folders.values() for r in select(runs, "train_rm")]
    judged = [claim(study) for claim in CLAIMS]
    count = Counter(c.verdict for c in judged)
    greedy = ", ".join(f"{select(study.folders[size], 'train_sft')[0].result['greedy/gold']:.2f} ({size})" for size in SIZES)
    sampled = ", ".join(f"{study.sft(size)['gold']:.2f}" for size in SIZES)
    error = ", ".join(f"{standard_error(root / size / 'eval/sft/summaries.parquet'):.3f} {size}" for size in SIZES)
    parts = [HEAD.format(date=about["started"].split()[0], torch=about["torch"], runs=sum(map(len, study.folders.values())), window=WINDOW, greedy=greedy,
                         error=error, sampled=sampled, accuracy=f"{100 * min(accuracy):.0f} to {100 * max(accuracy):.0f} "
                         f"%", references=f"{study.sft('small')['gold_reference']:.2f}"),
             f"## Verdicts\n\n{len(judged)} claims: " + ", ".join(f"{number} {verdict}" for verdict, number in count.most_common()) + ".\n",
             table(["", "claim", "verdict here"], [[i, c.title, f"**{c.verdict}**"] for i, c in enumerate(judged, 1)]), "## The claims\n"]
    for i, c in enumerate(judged, 1):
        reason = f"\n\n*A likely reason, not tested:* {c.reason}" if c.reason and c.verdict == FAILS else ""
        pictures = ", ".join(f"[figure {name}](docs/figures/figure_{name}.png)" for name in c.figures.split()) or "see the table of all arms"
        parts.append(f"### {i}. {c.title}\n\n*Paper:* {c.paper}\n\n*Rule:* {c.rule}\n\n*Here:* {c.ours} ({pictures}).\n\n**{c.verdict}**{reason}\n")
    parts += ["## What the paper leaves open\n\n### Is an adaptive margin what separates DPO from SimPO?\n", adaptive_margin(study),
              "### Is it β?\n", small_beta(study), "### How much of \"MaxEnt over-optimises\" could a padding bug produce?\n", fill(study),
              "### Gold reward against KL\n\n![gold against KL](docs/figures/figure_gold_kl.png)\n", fits(study, root),
              "### Which logged metric warns first?\n", early_warning(study), "## All arms\n", all_arms(study), "## Figures\n",
              *(f"![{name}](docs/figures/figure_{name}.png)\n*Toy world; {text}.*\n" for name, text in PICTURES.items())]
    Path(cfg.out).write_text("\n".join(parts))
    print(json.dumps({"claims": len(judged), **count, "out": cfg.out}))
    return dict(count)


if __name__ == "__main__":
    command_line(main, Config)
