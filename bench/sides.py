"""The sides of the bench, each in a process of its own that makes one step whenever it is told to.

    ours          the script's own main, held before every update; for generation rlhf/generate.py as the
                  scripts call it
    trl           RLOOTrainer, DPOTrainer, CPOTrainer (SimPO), RewardTrainer, SFTTrainer as they come; for
                  generation what they call, transformers
    trl-patched   the same with the language-model head on the positions that predict a completion token only.
                  On CUDA that is how TRL comes; on the CPU it computes every position of every row
    transformers  for SFT a bare loop around the model (compiled under --compile), for generation
                  model.generate
"""

import multiprocessing
import os
import time
import traceback
from contextlib import suppress

import torch

import rlhf.common
from bench.work import Work
from rlhf.config import RunError

TRAINED = ("rloo", "dpo", "simpo", "rm", "sft")
# what a side can do: a reward model has no head to patch, and TRL's SimPO makes its logits elsewhere
WORKS = {
    "ours": (*TRAINED, "generate"),
    "trl": (*TRAINED, "generate"),
    "trl-patched": ("rloo", "dpo", "sft"),
    "transformers": ("sft", "generate"),
}
STEPS = 1_000_000  # a run ends when nobody says go any more
GREEDY_TOKENS = 8


class Stopped(Exception):
    pass


def now(device: torch.device) -> float:
    """Seconds, after everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Gate:
    """A side's end of the pipe: hands over what a step measured, waits for the word to go on, and keeps the
    time between."""

    def __init__(self, pipe, device: str):
        self.pipe = pipe
        self.device = torch.device(device)
        self.began = 0.0

    def now(self) -> float:
        return now(self.device)

    def ready(self) -> None:
        self.wait({})

    def done(self, facts: dict) -> None:
        self.wait({"seconds": self.now() - self.began, "memory": self.peak_memory(), **facts})

    def wait(self, message: dict) -> None:
        self.pipe.send(message)
        if self.pipe.recv() == "stop":
            raise Stopped
        self.began = self.now()

    def peak_memory(self) -> int:
        """Bytes: of the card, or of this process since it began (VmHWM; ru_maxrss would include what the
        parent held when it forked)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        with open("/proc/self/status") as status:
            line = next(line for line in status if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024


def time_generation(work: Work, gate: Gate, greedy, seconds_of) -> None:
    """Steps of a side that only generates: the first tells its greedy tokens, the others time the prefill
    alone and the whole."""
    gate.ready()
    gate.done({"check": {"greedy": greedy()}})
    while True:
        prefill = seconds_of(1)
        whole = seconds_of(work.R)
        gate.done({"parts": {"prefill": prefill, "decode": whole - prefill}, "seconds": whole})


def do_work(side: str, work: Work, gate: Gate) -> None:
    """Imports only what the side needs: its memory is measured."""
    if side == "ours":
        from bench.ours import generation, training
    else:
        from bench.peers import TRAINING, generation
        training = TRAINING[side]
    (generation if work.kind == "generate" else training)(work, gate)


def worker(pipe, side: str, work: Work) -> None:
    """The process of a side."""
    log = open(work.out_dir(side) + ".log", "w")
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    if work.cfg.threads:
        torch.set_num_threads(work.cfg.threads)
    if work.cfg.untuned:
        rlhf.common.keep_freed_memory = lambda: None
    rlhf.common.setup(1, work.cfg.device)  # for the peers too: the allocator on the CPU, TF32 on CUDA
    try:
        do_work(side, work, Gate(pipe, work.cfg.device))
    except Stopped:
        pass
    except BaseException:
        pipe.send({"error": traceback.format_exc()})


class Side:
    """The bench's end of a side."""

    def __init__(self, name: str, work: Work):
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=worker, args=(theirs, name, work), daemon=True)
        self.process.start()
        theirs.close()
        self.receive()

    def receive(self) -> dict:
        try:
            message = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RunError(f"{self.name} died with exit code {self.process.exitcode}: out of memory? "
                           "--sequential holds one side at a time") from None
        if "error" in message:
            raise RunError(f"{self.name} failed:\n{message['error']}")
        return message

    def step(self) -> dict:
        with suppress(BrokenPipeError):  # it has died: receive() says so
            self.pipe.send("go")
        return self.receive()

    def close(self) -> None:
        if self.process.is_alive():
            self.pipe.send("stop")
        self.process.join(60)
