"""The run directory: what a run leaves on disk, how it goes on after an interruption, and its log."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from rlhf.config import UserError
from rlhf.model import NeoX
from rlhf.pretrained import load_weights, read_json, save_pretrained

MAY_CHANGE = {"out_dir", "resume", "overwrite", "device", "save_every", "keep", "micro_batch_tokens", "compile", "gradient_checkpointing"}


def finite(record: dict) -> dict:
    """None, which JSON writes as null, for every number that is not finite: JSON has no word for it."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


class Run:
    """A run directory: run.json (the configuration and what it ran on), metrics.jsonl, ckpt/step_*/, and at the end the model and result.json.

    The final model lies in the directory itself, so `--model=<out_dir>` and transformers' from_pretrained both take a run as it is
    (config.json is the model's; the run's own settings are in run.json).
    """

    def __init__(self, config, steps: int):
        self.out, self.steps, self.config = Path(config.out_dir), steps, config
        self.start, self.began, self.bar = 0, time.time(), None
        self.finished = (self.out / "result.json").exists()
        if self.out.exists() and any(self.out.iterdir()):
            if not (self.out / "run.json").exists():
                raise UserError(f"{self.out} is not empty and holds no run.json, so it is not a run of ours: choose another --out_dir")
            if config.overwrite:
                self.finished = False
            elif config.resume:
                self.check_same(config)
            else:
                raise UserError(f"{self.out} exists: continue it with --resume, replace it with --overwrite, or choose another --out_dir")

    def check_same(self, config) -> None:
        old = read_json(self.out / "run.json")["config"]
        changed = [f"--{k} was {old[k]!r}, is {v!r}" for k, v in asdict(config).items() if k in old and old[k] != v and k not in MAY_CHANGE]
        if changed:
            raise UserError(f"--resume of {self.out} with other settings: {'; '.join(changed)}")

    @staticmethod
    def describe(config) -> dict:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu x {torch.get_num_threads()}"
        return {"command": " ".join(sys.argv), "config": asdict(config), "commit": git.stdout.strip() or None, "torch": torch.__version__,
                "device": device, "started": time.strftime("%Y-%m-%d %H:%M:%S")}

    def begin(
        self, model: NeoX, optimizer: torch.optim.Optimizer, generator: torch.Generator | None = None,
        critic: NeoX | None = None,
    ) -> int:
        """Now that data and models are known to be good, touches the directory: empties it (--overwrite) or restores its newest checkpoint (--resume),
        writes run.json, and returns the step to go on from."""
        if self.config.overwrite and self.out.exists():
            shutil.rmtree(self.out)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "run.json").write_text(json.dumps(self.describe(self.config), indent=2) + "\n")
        checkpoints = sorted((self.out / "ckpt").glob("step_*"))
        if not self.config.resume:
            return 0
        if not checkpoints:
            (self.out / "metrics.jsonl").unlink(missing_ok=True)  # lines of an attempt that ended before its first checkpoint
            print(f"{self.out}: no checkpoint to resume, starting at step 0")
            return 0
        newest = checkpoints[-1]
        load_weights(model, newest)
        try:
            state = torch.load(newest / "trainer.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises whatever zip and pickle raise
            raise UserError(f"{newest}/trainer.pt: not readable ({error}); remove that folder to resume the checkpoint before it") from error
        optimizer.load_state_dict(state["optimizer"])
        if critic is not None:
            critic.load_state_dict(state["critic"])
        torch.set_rng_state(state["rng"])
        if generator is not None:
            try:
                generator.set_state(state["generator"])
            except RuntimeError as error:  # a CPU's and a GPU's generators have nothing in common
                raise UserError(f"{newest} was written on another kind of device: its samples cannot be continued on {generator.device}") from error
        self.start = state["step"]
        metrics = self.out / "metrics.jsonl"
        if metrics.exists():  # lines after the checkpoint will be written again
            lines = [line for line in metrics.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= self.start]
            metrics.write_text("".join(line + "\n" for line in lines))
        print(f"resuming {self.out} at step {self.start} of {self.steps}")
        return self.start

    def log(self, step: int, metrics: dict, show: tuple[str, ...] = ()) -> None:
        """Appends one line to metrics.jsonl; `show` names what the progress bar tells."""
        if self.bar is None:
            live = sys.stderr.isatty()
            self.bar = tqdm(total=self.steps, initial=self.start, desc=str(self.out), mininterval=0.5 if live else 15, dynamic_ncols=live)
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **finite(metrics)}) + "\n")
        self.bar.set_postfix({k.split("/")[-1]: f"{metrics[k]:.3g}" for k in show if k in metrics}, refresh=False)
        self.bar.update(step - self.bar.n)

    def checkpoint(self, step: int, model: NeoX, tokenizer: Tokenizer, optimizer: torch.optim.Optimizer,
                   generator: torch.Generator | None = None, critic: NeoX | None = None) -> None:
        """Every --save_every steps: ckpt/step_N, a Hugging Face directory and trainer.pt, written aside and renamed; then old ones go (--keep)."""
        if not self.config.save_every or step % self.config.save_every:
            return
        final, aside = self.out / "ckpt" / f"step_{step:08d}", self.out / "ckpt" / "writing"
        shutil.rmtree(aside, ignore_errors=True)
        save_pretrained(model, tokenizer, aside)
        state = {"step": step, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
        if generator is not None:
            state["generator"] = generator.get_state()
        if critic is not None:
            state["critic"] = critic.state_dict()
        torch.save(state, aside / "trainer.pt")
        sync(aside)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        kept = sorted((self.out / "ckpt").glob("step_*"))
        for old in kept[:-1]:
            (old / "trainer.pt").unlink(missing_ok=True)  # two thirds of the bytes, and only the newest can be needed
        for old in kept[: -self.config.keep] if self.config.keep else []:
            shutil.rmtree(old)

    def finish(self, model: NeoX, tokenizer: Tokenizer, result: dict) -> dict:
        """Saves the final model and result.json, prints the result as the last line of stdout."""
        if self.bar is not None:
            self.bar.close()
        aside = self.out / "writing"
        shutil.rmtree(aside, ignore_errors=True)
        save_pretrained(model, tokenizer, aside)
        sync(aside)
        for file in sorted(aside.iterdir(), key=lambda f: f.name == "config.json"):  # config.json last: a directory without it is not a model
            file.replace(self.out / file.name)
        aside.rmdir()
        result = {**finite(result), "out_dir": str(self.out), "seconds": round(time.time() - self.began, 1)}
        (self.out / "result.json").write_text(json.dumps(result) + "\n")
        print(json.dumps(result))
        return result

    def earlier_result(self) -> dict:
        print(f"{self.out}: finished already")
        result = read_json(self.out / "result.json")
        print(json.dumps(result))
        return result


def sync(directory: Path) -> None:
    """Makes sure the bytes are on disk before the rename says so."""
    for file in directory.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
