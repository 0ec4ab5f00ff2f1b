"""A training run: what it leaves on disk, how it goes on after an interruption, and its log."""

import json
import math
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from rlhf.checkpoint import restore, state_tensors
from rlhf.config import UserError
from rlhf.dist import FIRST, on_first
from rlhf.files import checksum, move_in, read_objects, remove, replace_directory, sync, write_file
from rlhf.model import NeoX
from rlhf.out_dir import (
    changes,
    check_inputs,
    check_out_dir,
    check_ranks,
    enter,
    exists,
    forget_replaced,
    has_shown,
    inputs_of,
    lock,
    named,
    unlock,
)
from rlhf.pretrained import read_json, save_pretrained, save_tensors
from rlhf.trackers import Trackers

MAY_CHANGE = {  # at a resume: where and how fast, but no number
    "out_dir", "resume", "overwrite", "device", "save_every", "keep", "micro_batch_tokens", "compile",
    "gradient_checkpointing", "samples_every", "wandb", "tensorboard", "rank_timeout", "rollout_prompts",
}
OTHER_SAMPLES = {"eval_rows"}  # may change too, and that is said and written down
LENGTH = {"episodes", "epochs"}  # may rise where no learning rate depends on them


def finite(record: dict) -> dict:
    """None, which JSON writes as null, for every number that is not finite: JSON has no word for it."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


LAST_TO_GO = "optimizer.safetensors*"  # the file or the index of its shards


def resumable(out: Path) -> list[Path]:
    """Checkpoints with the optimizer's state, the newest first."""
    found = sorted((out / "ckpt").glob("step_*"), reverse=True)
    if old := [path for path in found if (path / "trainer.pt").exists()]:
        raise UserError(f"{old[0]} is of an earlier version: its optimizer state (trainer.pt) is not read "
                        f"any more; begin a new run with --model={old[0]}")
    return [path for path in found if any(path.glob(LAST_TO_GO))]


class Run:
    """A run directory: run.json (the configuration and what it ran on), metrics.jsonl, ckpt/step_*/, and at
    the end the model and result.json.

    The final model lies in the directory itself, so `--model=<out_dir>` and transformers' from_pretrained
    take a run as it is (config.json is the model's; the run's own settings are in run.json).
    """

    def __init__(self, config, steps: int):
        """Touches nothing: a UserError here costs nothing."""
        self.out = Path(config.out_dir)
        self.steps = steps
        self.config = config
        self.start = 0
        self.began = time.time()
        self.bar = None
        self.track = Trackers(config)
        self.warned = set()
        self.last = {}  # what was logged last, also before an interruption
        self.changed = {}  # settings that are others than at the start of a resumed run
        self.about = check_out_dir(config)
        check_ranks(config, self.about, inputs_of)
        self.finished = False
        if self.about and not config.overwrite:
            if not config.resume:
                raise UserError(exists(self.out))
            self.check_resume()

    def check_resume(self) -> None:
        self.changed = changes(self.about, self.config, MAY_CHANGE)
        forbidden = {k: v for k, v in self.changed.items() if k not in OTHER_SAMPLES and not self.longer(k)}
        if forbidden:
            hint = ""
            if LENGTH & set(forbidden):
                hint = (" (a run can be made longer if --schedule=constant and --warmup=0: else the learning "
                        f"rates would be others; or start a new run with --model={self.out})")
            raise UserError(f"--resume of {self.out} with other settings: {named(forbidden)}{hint}")
        longer = any(map(self.longer, self.changed))
        self.finished = (self.out / "result.json").exists() and not longer
        if not self.finished:
            on_first(lambda: lock(self.out))
            check_inputs(self.about, self.config)

    def longer(self, key: str) -> bool:
        """Is this change only more updates, with the learning rates that the earlier ones had?"""
        constant = getattr(self.config, "schedule", "") == "constant" and not self.config.warmup
        old, new = self.changed[key]
        return key in LENGTH and constant and new > old

    def begin(
        self, model: NeoX, optimizer: torch.optim.Optimizer, generator: torch.Generator | None = None,
        critic: NeoX | None = None,
    ) -> int:
        """Now that data and models are known to be good, touches the directory: sets aside what is there
        (--overwrite) or restores its newest checkpoint (--resume). Returns the step to go on from."""
        enter(self.config, self.about, inputs_of(self.config))
        if not self.config.resume:
            return 0
        logs = [self.out / name for name in ("metrics.jsonl", "samples.jsonl")]
        checkpoints = resumable(self.out)
        if not checkpoints:
            # of an attempt that ended before its first checkpoint; no rank reads what another removes
            on_first(lambda: [log.unlink(missing_ok=True) for log in logs])
            print(f"{self.out}: no checkpoint to resume, starting at step 0")
        else:
            self.start = restore(checkpoints, model, optimizer, generator, critic)
            if self.start > self.steps:
                raise UserError(f"{checkpoints[0]}: this command makes only {self.steps} updates: "
                                "give --episodes or --epochs as they were")
            print(f"resuming {self.out} at step {self.start} of {self.steps}")
        for log in filter(Path.exists, logs):  # lines after the checkpoint will be written again
            lines = read_lines(log, self.start)
            if FIRST:
                write_file(log, "".join(line + "\n" for line in lines))
            if lines and log == logs[0]:
                self.last = json.loads(lines[-1])
        if FIRST:
            self.tidy()
        return self.start

    def tidy(self) -> None:
        if self.changed:
            self.note_changes()
        thin(self.out / "ckpt", self.config.keep)
        (self.out / "result.json").unlink(missing_ok=True)  # of a run that is made longer
        if has_shown(self.out):
            forget_replaced(self.out)  # a kill came between

    def note_changes(self) -> None:
        """Into run.json, and on the screen where they change numbers."""
        if other := {k: v for k, v in self.changed.items() if k in OTHER_SAMPLES}:
            print(f"{named(other)}: from here on other samples than those of an uninterrupted run")
        noted = [*self.about.get("changes", []), {"step": self.start, **self.changed}]
        about = self.about | {"config": asdict(self.config), "changes": noted}
        write_file(self.out / "run.json", json.dumps(about, indent=2) + "\n")

    def log(self, step: int, metrics: dict, show: tuple[str, ...] = ()) -> None:
        """Appends one line to metrics.jsonl; `show` names what the progress bar tells."""
        self.last = {"step": step, **finite(metrics)}
        if not FIRST:
            return
        if self.bar is None:
            live = sys.stderr.isatty()
            self.bar = tqdm(
                total=self.steps, initial=self.start, desc=str(self.out), mininterval=0.5 if live else 15,
                dynamic_ncols=live,
            )
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(self.last) + "\n")
        self.track(step, finite(metrics))
        if metrics.get("eos_share") == 0 and getattr(self.config, "missing_eos", "") == "replace":
            self.warn("no response of this update ended (EOS): all scores are the penalty's, the reward "
                      "teaches nothing: raise --response_tokens, train SFT longer, or --missing_eos=none")
        shown = {key.split("/")[-1]: f"{metrics[key]:.3g}" for key in show if key in metrics}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(step - self.bar.n)
        if step == self.steps:
            self.bar.close()

    def warn(self, message: str) -> None:
        """Once in a run."""
        if message not in self.warned:
            self.bar.write(f"warning: {message}", file=sys.stderr)
        self.warned.add(message)

    def checkpoint(
        self, step: int, model: NeoX, tokenizer: Tokenizer, optimizer: torch.optim.Optimizer,
        generator: torch.Generator | None = None, critic: NeoX | None = None,
    ) -> None:
        """Every --save_every steps: ckpt/step_N, a Hugging Face directory, optimizer.safetensors (one file or
        shards) and checksums.json: the same files, however many ranks wrote them.

        Old ones go first (--keep), so that the disk holds no more than keep, or two. The newest two can be
        resumed: the optimizer's state is two thirds of the bytes.
        """
        if not self.config.save_every or step % self.config.save_every:
            return
        folder = self.out / "ckpt"
        aside = folder / "writing"
        if FIRST:
            shutil.rmtree(aside, ignore_errors=True)
            thin(folder, self.config.keep and max(1, self.config.keep - 1))
        save_pretrained(model, tokenizer, aside)
        state = state_tensors(model, optimizer, critic)
        state |= {"step": torch.tensor([step]), "rng": torch.get_rng_state()}
        if generator is not None:
            state["generator"] = generator.get_state()
        save_tensors(state, aside, "optimizer")
        if FIRST:
            self.move_in(aside, folder / f"step_{step:08d}")

    def move_in(self, aside: Path, final: Path) -> None:
        """A checkpoint is whole before it has its name."""
        sums = {file.name: checksum(file) for file in sorted(aside.iterdir())}
        (aside / "checksums.json").write_text(json.dumps(sums, indent=2) + "\n")
        sync(self.out / "metrics.jsonl")
        replace_directory(aside, final)
        thin(final.parent, self.config.keep)
        forget_replaced(self.out)

    def finish(self, model: NeoX, tokenizer: Tokenizer, result: dict) -> dict:
        """Saves the final model and result.json, prints the result as the last line of stdout."""
        if self.bar is not None:
            self.bar.close()
        aside = self.out / "writing"
        if FIRST:
            shutil.rmtree(aside, ignore_errors=True)
        save_pretrained(model, tokenizer, aside)
        seconds = round(time.time() - self.began, 1)
        result = {**finite(result), "out_dir": str(self.out), "seconds": seconds}
        if FIRST:
            sync(*aside.iterdir())
            move_in(aside, self.out, last="config.json")  # a directory without it is not a model
            write_file(self.out / "result.json", json.dumps(result) + "\n")
            forget_replaced(self.out)
            unlock(self.out)
        print(json.dumps(result))
        return result

    def earlier_result(self) -> dict:
        print(f"{self.out}: finished already; to train on: a new run with --model={self.out}, or "
              "more --episodes or --epochs if --schedule=constant")
        result = read_json(self.out / "result.json")
        print(json.dumps(result))
        return result


def thin(folder: Path, keep: int) -> None:
    """Only the newest `keep` checkpoints stay (0: all), of which the newest two can be resumed; and nothing
    of one that a kill left half removed."""
    for half in folder.glob(".*.removed"):
        shutil.rmtree(half)
    kept = sorted(folder.glob("step_*"))
    for old in kept[:-keep] if keep else []:
        remove(old)
    for old in kept[:-2]:
        for file in (*old.glob(LAST_TO_GO), *old.glob("optimizer-*")):
            file.unlink(missing_ok=True)


def read_lines(log: Path, last: int) -> list[str]:
    """The lines of a log up to step `last`."""
    entries = read_objects(log)
    return [line for line, entry in entries if isinstance(entry.get("step"), int) and entry["step"] <= last]
