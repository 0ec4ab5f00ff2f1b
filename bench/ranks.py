"""Our training scripts on several ranks: CPU processes of one thread each, or the GPUs of a machine.

    python -m bench.bench --work=rloo --model=pythia-70m --ranks=1,2

strong    the same update on more ranks; the speed-up is over one process without torchrun
weak      n times the prompts on n ranks; the efficiency is that process's seconds over theirs
hooks     what FSDP adds to a forward of one module and its backward: a model of hardly any arithmetic,
          sharded on one rank, against the same model as it is
on paper  RLOO with the paper's sizes: the arithmetic of floor.py and the bytes that a rank receives, at the
          rates named here; speed-up if one comes after the other, and if both go on at once. Nothing of it
          is measured
"""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from math import ceil
from pathlib import Path
from types import SimpleNamespace

import torch

from bench.floor import costs
from bench.sides import Gate, Stopped
from bench.work import SHAPES, VOCABULARY, Work, make_work, write_data, write_models
from rlhf import dist
from rlhf.common import setup
from rlhf.config import RunError
from rlhf.forward import summed_nll
from rlhf.groups import pack
from rlhf.model import NeoX, NeoXConfig

CARD = 400e12  # FLOP/s in bfloat16: 40 % of an H100's 989e12
INSIDE = 200e9  # bytes/s that a card receives from the others of its machine (NVLink)
BETWEEN = 50e9  # bytes/s from other machines, with a network card of 400 Gbit/s for each card
PER_MACHINE = 8
ON_PAPER = (1, 8, 16, 32, 64)
BATCH = dict(N=256, K=2, P=512, R=53)  # the paper's update: 512 responses, 4 epochs
EPOCHS = 4
LAYERS = 16  # of the model whose hooks are timed
MICRO_BATCH_TOKENS = 4096


# --- one rank


class Clock(Gate):
    """Keeps the seconds of each update, and ends the script after the last one."""

    def __init__(self, updates: int, device: str):
        super().__init__(None, device)
        self.updates = updates
        self.seen = []

    def wait(self, message: dict) -> None:
        if message:
            self.seen.append(message)
        if len(self.seen) == self.updates:
            raise Stopped
        self.began = self.now()


def hook_seconds(clock: Clock, passes: int = 100) -> float:
    """Of a module and pass: the median of the sharded model less that of the plain one, which take turns."""
    models = []
    for sharded in (False, True):
        with torch.device("meta"):
            model = NeoX(NeoXConfig(128, 16, LAYERS, 2, 32))
        if sharded:
            dist.shard(model)
        models.append(model.to_empty(device=clock.device))
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
    groups = pack([[5] * 8], [[[7] * 8]], max_positions=64, device=clock.device)
    took = [[], []]
    for _ in range(passes):
        for model, seconds in zip(models, took):
            began = clock.now()
            summed_nll(model, groups).backward()
            seconds.append(clock.now() - began)
    plain, sharded = map(statistics.median, took)
    return (sharded - plain) / len(dist.units(models[1]))


def main(job: Path) -> None:
    from bench.ours import training  # the scripts, which the bench itself does not need

    dist.hush()
    given = json.loads(job.read_text())
    cfg = SimpleNamespace(**given["cfg"])
    if cfg.device == "cpu":
        torch.set_num_threads(1)
    clock = Clock(1 + cfg.warmup_steps + cfg.repeats, str(setup(1, cfg.device)))
    try:
        training(Work(**given["work"] | {"cfg": cfg}), clock)
    except Stopped:
        pass
    peaks = dist.exchange(clock.peak_memory())
    timed = [step["seconds"] for step in clock.seen[1 + cfg.warmup_steps :]]
    found = {"seconds": statistics.median(timed), "peak_gib": max(peaks) / 2**30}
    found["check"] = clock.seen[0]["check"]
    if dist.LAUNCHED and dist.RANKS == 1:
        found["hooks"] = hook_seconds(clock)
    if dist.FIRST:
        job.with_suffix(".found").write_text(json.dumps(found))
    dist.leave()


# --- all ranks


def timed(work: Work, ranks: int) -> dict:
    """What `main` found; ranks=0: in a process without torchrun."""
    folder = Path(f"{work.folder}-{ranks}")
    folder.mkdir()
    (folder / "data").symlink_to(work.data_dir)
    here = replace(work, folder=str(folder))
    job = folder / "job.json"
    job.write_text(json.dumps({"cfg": asdict(work.cfg), "work": vars(here) | {"cfg": None}}))
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"] if ranks else []
    threads = {"OMP_NUM_THREADS": "1"} if work.cfg.device == "cpu" else {}
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "bench.ranks", str(job)], env=os.environ | threads,
        capture_output=True, text=True, cwd=Path(__file__).parents[1],
    )
    if done.returncode:
        raise RunError(f"{work.kind} on {ranks} ranks failed:\n{done.stderr[:4000]}")
    return json.loads(job.with_suffix(".found").read_text())


def scaling(cfg, kind: str, ranks: list[int], folder: str, compare) -> dict:
    """Strong and weak scaling of a kind of work; `compare` raises RunError if ranks learn something else."""
    work = make_work(cfg, kind, None, f"{folder}/{kind}")
    if not Path(work.rm_dir).exists():
        write_models(work)
    write_data(work)
    alone = timed(work, 0)
    print(f"\n{kind}, {work.model}, {work.N} prompts x {work.K}, {work.P} + {work.R} tokens; "
          f"one process without torchrun: {alone['seconds']:.3f} s, {alone['peak_gib']:.2f} GiB")
    print(f"  {'ranks':>5}{'strong':>10}{'speed-up':>10}{'peak GiB':>10}{'weak':>10}{'efficiency':>12}")
    rows = {}
    for n in ranks:
        strong = timed(work, n)
        compare(work, f"{n} ranks", alone["check"], strong["check"])
        larger = replace(work, N=n * work.N, folder=f"{work.folder}-weak")
        weak = strong
        if n > 1:
            write_data(larger)
            weak = timed(larger, n)
        rows[n] = {"strong": strong, "weak": weak, "speed_up": alone["seconds"] / strong["seconds"],
                   "efficiency": alone["seconds"] / weak["seconds"]}
        print(f"  {n:5}{strong['seconds']:9.3f}s{rows[n]['speed_up']:9.2f}x{strong['peak_gib']:10.2f}"
              f"{weak['seconds']:9.3f}s{rows[n]['efficiency']:12.1%}")
    if 1 in rows:
        hooks = rows[1]["strong"]["hooks"] * 1e6
        print(f"  hooks: {hooks:.0f} us for a forward of one module and its backward")
    return {"work": kind, "model": work.model, "alone": alone, "ranks": rows}


# --- on paper


def passes(ranks: int) -> int:
    """Micro-batches of each rank in a pass over the batch."""
    tokens = BATCH["N"] * (BATCH["P"] + BATCH["K"] * BATCH["R"])
    return ceil(ceil(tokens / MICRO_BATCH_TOKENS) / ranks)


def received(model: str, ranks: int) -> float:
    """Bytes that a rank receives in an update.

    A forward gathers layers in bfloat16, embedding and head in float32; the backward gathers the layers again
    and sums all gradients in float32. Reference and reward model have a forward each, the first quarter's
    drift another one, and the rollout a whole copy of the policy.
    """
    width, layers, _ = SHAPES[model]
    body = 12 * width**2 * layers
    root = 2 * VOCABULARY * width
    forward = 2 * body + 4 * root
    backward = (2 + 4) * body + 4 * root
    learning = EPOCHS * passes(ranks) * (forward + backward)
    scoring = ceil(2.25 * passes(ranks)) * forward
    return (learning + scoring + forward) * (ranks - 1) / ranks


def on_paper(model: str) -> list[dict]:
    """Prints seconds of an update of the paper's size on more and more cards."""
    cfg = SimpleNamespace(dtype="bfloat16", ppo_epochs=EPOCHS)
    work = Work(kind="rloo", model=model, folder="", cfg=cfg, **BATCH)
    flops = sum(cost[0] for cost in costs(work).values())
    print(f"\non paper: rloo, {model}, 256 prompts x 2, 512 + 53 tokens, {EPOCHS} epochs, micro-batches of "
          f"{MICRO_BATCH_TOKENS} tokens, {CARD / 1e12:.0f} TFLOP/s,\n  {INSIDE / 1e9:.0f} GB/s inside a "
          f"machine of {PER_MACHINE}, {BETWEEN / 1e9:.0f} GB/s between machines")
    print(f"  {'ranks':>5}{'compute':>11}{'received':>12}{'transfer':>11}{'speed-up':>18}")
    rows = []
    for n in ON_PAPER:
        compute = flops / n / CARD
        bytes_ = received(model, n)
        transfer = bytes_ / (INSIDE if n <= PER_MACHINE else BETWEEN)
        least = flops / CARD / (compute + transfer)
        most = flops / CARD / max(compute, transfer)
        rows.append({"ranks": n, "compute": compute, "bytes": bytes_, "transfer": transfer,
                     "speed_up": [least, most]})
        print(f"  {n:5}{compute:10.3f}s{bytes_ / 1e9:9.1f} GB{transfer:10.3f}s{least:9.1f} to {most:.1f}x")
    return rows


if __name__ == "__main__":
    main(Path(sys.argv[1]))
