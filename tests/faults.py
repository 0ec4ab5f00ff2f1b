"""A tiny world for faults, and what can go wrong on a disk: every state that a kill may leave, and a full disk."""

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

import evaluate
import rlhf.pretrained
import train_rloo
import train_rm
import train_sft
import train_simpo
from data import toy
from rlhf.model import NeoX, NeoXConfig
from rlhf.pretrained import load_tokenizer, save_pretrained
from study import best_of_n

TRAINING = [train_sft, train_rm, train_rloo, train_simpo]
ALL = [*TRAINING, evaluate, best_of_n]


def make_world(out: Path) -> None:
    """Data, an SFT model and a reward model with 1 layer of width 16."""
    toy.main(toy.Config(out_dir=str(out / "data"), posts=12, pairs=8, rankings=4, validation=4, test=2, size="small"))
    raw = json.loads((out / "data/base/config.json").read_text())
    raw |= {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    (out / "data/base/config.json").write_text(json.dumps(raw))
    tokenizer = load_tokenizer(str(out / "data/base"))
    for name, head in (("sft", "embed_out"), ("rm", "score")):
        save_pretrained(NeoX(NeoXConfig.from_dict(raw), head).init_weights(1), tokenizer, out / name)


def config(world: Path, script, out_dir: Path, **changes):
    io = {"data_dir": str(world / "data"), "out_dir": str(out_dir), "device": "cpu"}
    train = {"save_every": 1, "lr": 1e-3}
    small = {
        train_sft: {**train, "model": f"{world}/data/base", "init": "scratch", "batch_size": 6, "eval_rows": 2},
        train_rm: {**train, "model": f"{world}/sft", "batch_size": 3, "center_rows": 4, "eval_rows": 2},
        train_rloo: {
            **train, "model": f"{world}/sft", "reward_model": f"{world}/rm", "batch_size": 4, "episodes": 8, "k": 2,
            "ppo_epochs": 1, "response_tokens": 3, "eval_rows": 2,
        },
        train_simpo: {**train, "model": f"{world}/sft", "loss": "dpo", "batch_size": 4, "eval_rows": 2},
        evaluate: {
            "model": f"{world}/sft", "ref_model": f"{world}/sft", "reward_model": f"{world}/rm", "judge": "rm", "n": 2,
            "response_tokens": 3,
        },
        best_of_n: {"model": f"{world}/sft", "reward_model": f"{world}/rm", "rows": 2, "samples": 2},
    }
    return replace(script.Config(**io, **small[script]), **changes)


# --- what a kill or a full disk leaves


class Killed(BaseException):
    pass


HOOK: list[Callable[[str, tuple], None]] = []  # at most one; audit hooks cannot be removed


def audit(event: str, args: tuple) -> None:
    if HOOK and event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"):
        HOOK[0](event, args)


sys.addaudithook(audit)


@contextmanager
def watched(folder: Path, seen: Callable[[str, Path], None]) -> Iterator[None]:
    """Calls seen(operation, path) before each operation that changes something under `folder`; torch and
    safetensors, which write past Python, included."""

    def hook(event: str, args: tuple) -> None:
        path = args[0]
        if not isinstance(path, str | os.PathLike) or not Path(path).absolute().is_relative_to(folder):
            return
        if event != "open":
            seen(event, Path(path))
        elif isinstance(args[1], str) and set("wax+") & set(args[1]):
            seen("append" if "a" in args[1] else "write", Path(path))
        elif args[1] is None and args[2] & os.O_CREAT and not Path(path).exists():
            seen("create", Path(path))

    def before(write):
        def wrapper(content, path, *args, **options):
            HOOK[0]("open", (path, "wb", 0)) if HOOK else None
            return write(content, path, *args, **options)
        return wrapper

    saves = rlhf.pretrained.save_file, torch.save
    HOOK.append(hook)
    rlhf.pretrained.save_file, torch.save = map(before, saves)
    try:
        yield
    finally:
        HOOK.clear()
        rlhf.pretrained.save_file, torch.save = saves


def state_of(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(path.read_bytes() if path.is_file() else b"/")
    return digest.hexdigest()


def states(work: Callable[[], object], folder: Path, store: Path) -> dict[str, Path]:
    """{state: a copy of `folder` in it}: all that a kill of `work` could leave there, files half written too."""
    found: dict[str, Path] = {}

    def keep(cut: Path | None = None, append: bool = False) -> None:
        held = HOOK.pop()
        copy = store / f"{len(found)}"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        if cut is not None:
            half = copy / cut.absolute().relative_to(folder)
            half.write_bytes((half.read_bytes() if append and half.exists() else b"") + b'{"half')
        if (state := state_of(copy)) not in found:
            found[state] = copy
        HOOK.append(held)

    def seen(operation: str, path: Path) -> None:
        keep()
        if operation in ("write", "append"):
            keep(path, append=operation == "append")

    with watched(folder, seen):
        work()
    return found


def full_disk(after: int) -> Callable[[str, Path], None]:
    """From operation `after` on nothing can be written."""
    count = 0

    def seen(operation: str, path: Path) -> None:
        nonlocal count
        count += 1
        if count > after and operation in ("write", "append", "create", "os.mkdir"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    return seen


def counted(work: Callable[[], object], folder: Path) -> int:
    operations = []
    with watched(folder, lambda operation, path: operations.append(operation)):
        work()
    return len(operations)


# --- what must come out the same


def outcome(run: Path) -> dict:
    """Everything in a run but times: weights bit for bit, log, result."""
    weights = {str(path.relative_to(run)): path.read_bytes() for path in run.glob("*.safetensors")}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] if weights else []
    result = json.loads((run / "result.json").read_text())
    timeless = [{k: v for k, v in line.items() if "second" not in k and k != "out_dir"} for line in [*lines, result]]
    files = sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file() and p.suffix != ".writing")
    return {"weights": weights, "log": timeless, "files": files}


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def save(tensors: dict, path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
