"""Speed and memory beside TRL and transformers, and beside what the machine could do.

    python -m bench.bench --work=rloo --model=pythia-14m --peer=trl,trl-patched    one row of README's table
    python -m bench.bench --work=generate --model=pythia-70m --peer=transformers --sweep=k
    python -m bench.bench --work=rloo --model=pythia-70m --ranks=1,2               ours on several ranks

All sides get the same random weights (Pythia's shapes), prompts and completions. Each runs in a process of
its own (sides.py): ours is the script's `main`, held before every update, theirs the trainer's `train`. The
first update is compared (loss, gradient norm, log-probs), then there is warm-up, then the sides take turns,
and only one works at a time. The floor (floor.py) is the arithmetic of the work at the rate of matrix
products or its bytes at the rate of a copy, whichever takes longer, both rates measured here; it counts a
shared prompt once, the head only where a token is predicted, and no number twice. Responses have a fixed
length; RLOO samples and is timed on each side, and goes on with the shared completions.
"""

import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from bench.floor import ceilings, costs, floor
from bench.ranks import on_paper, scaling
from bench.sides import TRAINED, WORKS, Side
from bench.work import SAMPLED, SHAPES, SIZES, SWEEPS, Work, make_work, write_data, write_models
from rlhf.common import setup
from rlhf.config import RunError, UserError, command_line
from rlhf.out_dir import describe

PEERS = [side for side in WORKS if side != "ours"]
BUSY = 0.85  # of the best rate: one that is lower at times says that something else ran, too


@dataclass(frozen=True, kw_only=True)
class Config:
    # what
    work: str = "rloo,dpo,simpo,rm,sft,generate"  # which of these, joined by commas
    model: str = "pythia-70m"  # a shape of the Pythia suite, 14m to 6.9b, with random weights
    peer: str = "trl"  # trl, trl-patched, transformers, joined by commas; none = only ours beside the floor
    sweep: Literal["", "k", "prompt", "batch", "model"] = ""  # how the cost grows with this, the rest fixed
    ranks: str = ""  # ours alone, on these numbers of ranks joined by commas: all but generate (ranks.py)
    # size
    prompts: int = 0  # prompts, pairs or posts (0 = 8 for rloo and generate, 4 elsewhere)
    k: int | None = None  # responses per prompt of rloo and generate (None = 4)
    prompt_tokens: int = 512  # tokens of each prompt
    response_tokens: int = 0  # tokens of each response (0 = 53, for rm 126)
    ppo_epochs: int = 1  # rloo: passes over the responses of an update
    loss_on: Literal["all", "response"] = "all"  # sft: the tokens that are learnt
    # how
    device: str = "cpu"  # cpu or cuda
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products
    threads: int = 0  # CPU threads (0 = torch's choice)
    compile: bool = False  # torch.compile ours and the bare transformers loop
    untuned: bool = False  # leave the memory allocator as it is, on all sides
    micro_batch_tokens: int = 8192  # ours: tokens in one forward and backward
    peer_rows: int = 0  # TRL: rows in one forward and backward, the rest by gradient accumulation (0 = all)
    gradient_checkpointing: bool = False  # ours and TRL
    # measuring
    repeats: int = 5  # timed steps of each side
    warmup_steps: int = 2  # steps of each side that are not timed, after the one that is compared
    sequential: bool = False  # one side after the other instead of in turns: for models that fit only once


# --- measuring


def compare(work: Work, name: str, ours: dict, theirs: dict) -> dict[str, float]:
    """Largest difference of the first update's numbers, relative to the larger of 1 and the number.
    RunError if it was not the same work."""
    exact = work.cfg.dtype == "float32" and work.cfg.device == "cpu"
    if work.kind == "generate":  # a token may differ where two are as likely, and then everything after it
        first = [a[0] == b[0] for a, b in zip(ours["greedy"], theirs["greedy"], strict=True)]
        share = sum(first) / len(first)
        if share < (0.95 if exact else 0.5):
            raise RunError(f"{name} and ours begin {share:.0%} of the greedy answers alike: not one model")
        return {"equal first tokens": share}
    differences = {}
    for key in ours:
        scale = max(1.0, abs(ours[key]), abs(theirs[key]))
        differences[key] = abs(ours[key] - theirs[key]) / scale
    tolerance = 1e-3 if exact else 5e-2
    if not all(difference <= tolerance for difference in differences.values()):  # nan is not all right
        both = ", ".join(f"{key} {ours[key]:.6g} and {theirs[key]:.6g}" for key in ours)
        raise RunError(f"{name} and ours did not compute the same: {both}")
    return differences


def take_turns(work: Work, names: list[str], first: dict, steps: dict[str, list[dict]], same: dict) -> None:
    """Starts these sides, compares their first step with ours (`same`), fills `steps` with the timed
    ones."""
    sides = []
    try:
        for name in names:
            sides.append(Side(name, work))
        for side in sides:
            first[side.name] = side.step()
            if side.name != "ours":
                same[side.name] = compare(work, side.name, first["ours"]["check"], first[side.name]["check"])
        for turn in range(work.cfg.warmup_steps + work.cfg.repeats):
            for side in sides:
                result = side.step()
                if turn >= work.cfg.warmup_steps:
                    steps[side.name].append(result)
    finally:
        for side in sides:
            side.close()


def measure(work: Work, names: list[str]) -> tuple[dict[str, list[dict]], dict]:
    """{side: its timed steps}, {peer: largest differences to ours}. Sides in turns, or one after the
    other."""
    first = {}
    steps = {name: [] for name in names}
    same = {}
    for group in [[name] for name in names] if work.cfg.sequential else [names]:
        take_turns(work, group, first, steps, same)
    return steps, same


def side_summary(steps: list[dict], tokens: int, seconds_floor: float, flops: float, rates: dict) -> dict:
    """What is known of a side's timed steps."""
    seconds = [step["seconds"] for step in steps]
    median = statistics.median(seconds)
    parts = steps[0].get("parts", {})
    return {
        "seconds": median,
        "min": min(seconds),
        "max": max(seconds),
        "tokens_per_second": tokens / median,
        "peak_gib": max(step["memory"] for step in steps) / 2**30,
        "over_floor": median / seconds_floor,
        "share_of_peak_flops": flops / median / rates["flops"],
        "parts": {part: statistics.median(step["parts"][part] for step in steps) for part in parts},
    }


def summary(work: Work, steps: dict[str, list[dict]], same: dict, rates: dict) -> dict:
    """What is printed and what the JSON line holds, for one piece of work."""
    parts = floor(work, rates)
    seconds = sum(parts.values())
    tokens = work.N * work.K * (work.R if work.kind in SAMPLED else work.P + work.R)
    flops = sum(cost[0] for cost in costs(work).values())
    sides = {name: side_summary(timed, tokens, seconds, flops, rates) for name, timed in steps.items()}
    for side in sides.values():
        side["ratio"] = side["seconds"] / sides["ours"]["seconds"]
        side["memory_ratio"] = side["peak_gib"] / sides["ours"]["peak_gib"]
    return {
        "work": work.kind,
        "model": work.model,
        "prompts": work.N,
        "k": work.K,
        "prompt_tokens": work.P,
        "response_tokens": work.R,
        "gflop": flops / 1e9,
        "floor": {"seconds": seconds, **parts},
        "differences": same,
        "sides": sides,
    }


# --- the screen


def show_line(work: Work, result: dict) -> None:
    """One value of a sweep."""
    times = [
        f"{name} {s['seconds']:.3f} s ({s['over_floor']:.2f} x floor, {s['ratio']:.2f} x ours, "
        f"{s['peak_gib']:.2f} GiB)"
        for name, s in result["sides"].items()
    ]
    size = f"{work.kind}, {work.model}, {work.N} prompts x {work.K}, {work.P} + {work.R}"
    print(f"{size}: floor {result['floor']['seconds']:.3f} s; {'; '.join(times)}")


def show_parts(work: Work, name: str, parts: dict[str, float]) -> None:
    step = ""
    if "decode" in parts and work.R > 1:
        step = f"; {parts['decode'] / (work.R - 1) * 1e3:.2f} ms per decode step"
    if parts:
        print(f"  {name:14}" + ", ".join(f"{part} {seconds:.3f} s" for part, seconds in parts.items()) + step)


def show_table(work: Work, result: dict) -> None:
    unit = "sampled tokens/s" if work.kind in SAMPLED else "tokens/s"
    print(f"\n{work.kind}, {work.model}, {work.N} prompts x {work.K}, {work.P} + {work.R} tokens; "
          f"floor {result['floor']['seconds']:.3f} s ({result['gflop']:.0f} GFLOP)")
    for peer, numbers in result["differences"].items():
        equal = ", ".join(f"{key} {value:.3g}" for key, value in numbers.items())
        print(f"  {peer} computes the same: {equal}")
    print(f"  {'':14}{'median':>10}{'min':>10}{'max':>10}  {unit:>16}{'peak GiB':>10}"
          f"{'x floor':>9}{'of peak':>9}{'ours is':>10}{'memory':>8}")
    for name, s in result["sides"].items():
        print(f"  {name:14}{s['seconds']:9.3f}s{s['min']:9.3f}s{s['max']:9.3f}s  "
              f"{s['tokens_per_second']:16.0f}{s['peak_gib']:10.2f}{s['over_floor']:9.2f}"
              f"{s['share_of_peak_flops']:9.1%}{s['ratio']:9.2f}x{s['memory_ratio']:7.2f}x")
    for name, s in result["sides"].items():
        show_parts(work, name, s["parts"])
    show_parts(work, "floor", {part: s for part, s in result["floor"].items() if part != "seconds"})


def show_ceilings(seen: list[dict[str, float]]) -> dict[str, float]:
    """Prints the rates of all times, says if the machine was busy; the best of each, in units of 1e9."""
    giga = {key: [rates[key] / 1e9 for rates in seen] for key in ("flops", "mm", "bytes")}
    flops = " ".join(f"{x:.0f}" for x in giga["flops"])
    copied = " ".join(f"{x:.1f}" for x in giga["bytes"])
    print(f"\nceilings measured here, before and after: {flops} GFLOP/s in matrix products "
          f"({max(giga['mm']):.0f} by torch.mm), {copied} GB/s in a copy; floors take the best so far")
    if any(min(values) < BUSY * max(values) for values in giga.values()):
        print(f"THE MACHINE WAS BUSY OR THROTTLED AT TIMES: these differ by more than {1 - BUSY:.0%}, "
              "so measure again when nothing else runs")
    return {"gflops": max(giga["flops"]), "gflops_mm": max(giga["mm"]), "gbytes": max(giga["bytes"])}


# --- all together


def checked(cfg: Config) -> tuple[list[str], list[str]]:
    """The kinds of work and the sides that the command line asks for; UserError for what does not exist."""
    kinds = cfg.work.split(",")
    sides = [] if cfg.peer == "none" else cfg.peer.split(",")
    asked = {"work": (kinds, SIZES), "peer": (sides, PEERS), "model": ([cfg.model], SHAPES)}
    for option, (values, known) in asked.items():
        unknown = [value for value in values if value not in known]
        if unknown:
            raise UserError(f"--{option}={','.join(unknown)}: known are {', '.join(known)}")
    if cfg.sweep == "k" and not set(kinds) <= set(SAMPLED):
        raise UserError("--sweep=k: only rloo and generate have a number of responses to choose")
    if cfg.k == 1 and "rloo" in kinds:
        raise UserError("--k=1: RLOO's leave-one-out baseline needs at least 2 responses per prompt")
    if cfg.ppo_epochs < 1:
        raise UserError(f"--ppo_epochs={cfg.ppo_epochs} must be at least 1")
    if cfg.ranks:
        check_ranks(cfg, kinds)
    return kinds, ["ours", *sides]


def check_ranks(cfg: Config, kinds: list[str]) -> None:
    numbers = cfg.ranks.split(",")
    if not all(n.isdecimal() and int(n) for n in numbers):
        raise UserError(f"--ranks={cfg.ranks}: numbers of ranks joined by commas, as in 1,2")
    if cfg.sweep:
        raise UserError("--ranks and --sweep: give one of them")
    most = max(map(int, numbers))
    for kind in kinds:
        prompts = cfg.prompts or SIZES[kind][0]
        if kind in TRAINED and prompts < most:
            raise UserError(f"--ranks={cfg.ranks}: {kind} has {prompts} prompts for {most} ranks, and each "
                            "needs one: raise --prompts")


def see_ceilings(cfg: Config, device: torch.device, seen: list[dict[str, float]]) -> dict[str, float]:
    """Measures the ceilings once more: the best counts, and a busy moment shows."""
    seen.append(ceilings(device, getattr(torch, cfg.dtype)))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the card is the sides'
    return {key: max(rates[key] for rates in seen) for key in seen[0]}


def run_work(work: Work, sides: list[str], device: torch.device, seen: list[dict[str, float]]) -> dict:
    if not Path(work.rm_dir).exists():
        write_models(work)
    write_data(work)
    steps, same = measure(work, sides)
    result = summary(work, steps, same, see_ceilings(work.cfg, device, seen))
    (show_line if work.cfg.sweep else show_table)(work, result)
    return result


def cpu_name() -> str:
    with open("/proc/cpuinfo") as info:
        names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    return names[0] if names else "unknown CPU"


def measure_ranks(cfg: Config, kinds: list[str]) -> dict:
    about = {**describe(cfg), "cpu": cpu_name()}
    each = "one thread" if cfg.device == "cpu" else "one card"
    print(f"{about['cpu']}, {each} per rank, torch {about['torch']}, {cfg.dtype}, commit {about['commit']}")
    ranks = [int(n) for n in cfg.ranks.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        results = [scaling(cfg, kind, ranks, folder, compare) for kind in kinds if kind in TRAINED]
    out = {**about, "results": results, "on_paper": on_paper(cfg.model)}
    print(json.dumps(out))
    return out


def main(cfg: Config) -> dict:
    kinds, sides = checked(cfg)
    if cfg.ranks:
        return measure_ranks(cfg, kinds)
    device = setup(1, cfg.device)
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    about = {**describe(cfg), "cpu": cpu_name()}
    tuned = "tuned on all sides (rlhf.common.setup: freed memory is kept)"
    seen: list[dict[str, float]] = []
    see_ceilings(cfg, device, seen)
    print(f"{about['cpu']}, {about['device']}, torch {about['torch']}, {cfg.dtype}, "
          f"commit {about['commit']}; memory allocator {'as it is' if cfg.untuned else tuned}")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            able = [side for side in sides if kind in WORKS[side]]
            if able != sides:
                print(f"\n{kind}: not with {', '.join(sorted(set(sides) - set(able)))}")
            for value in SWEEPS[cfg.sweep] if cfg.sweep else (None,):
                work = make_work(cfg, kind, value, f"{folder}/{kind}-{value}")
                if kind == "rloo" and work.K < 2:
                    continue  # no leave-one-out baseline
                results.append(run_work(work, able, device, seen))
    out = {**about, **show_ceilings(seen), "results": results}
    print(json.dumps(out))
    return out


if __name__ == "__main__":
    command_line(main, Config)
