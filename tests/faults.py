"""A tiny world for faults, all scripts on it, and what can go wrong on a disk: every state that a kill may
leave, and a disk that is full from some moment on."""

import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import average
import evaluate
import rlhf.out_dir
import sample
import train_online
import train_ppo
import train_rloo
import train_rm
import train_sft
import train_simpo
from data import jsonl, tldr, toy
from rlhf.config import command_line
from rlhf.model import EOS, NeoX, NeoXConfig
from rlhf.pretrained import load_tokenizer, save_pretrained
from study import best_of_n

ROOT = Path(__file__).resolve().parents[1]
TRAINING = [train_sft, train_rm, train_rloo, train_simpo, train_ppo, train_online]
ON_MODELS = [*TRAINING, sample, evaluate, best_of_n]
DATA = [toy, jsonl, tldr]
ALL = [*ON_MODELS, average, *DATA]


def make_world(out: Path) -> None:
    """Data, an SFT model and a reward model with 1 layer of width 16, and sources of the data scripts."""
    toy.main(
        toy.Config(
            out_dir=str(out / "data"), posts=18, pairs=8, rankings=4, validation=4, test=2, size="small"
        )
    )
    raw = json.loads((out / "data/base/config.json").read_text())
    raw |= {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 1}
    (out / "data/base/config.json").write_text(json.dumps(raw))
    tokenizer = load_tokenizer(str(out / "data/base"))
    for name, head in (("sft", "embed_out"), ("rm", "score")):
        model = NeoX(NeoXConfig.from_dict(raw), head).init_weights(1)
        with torch.no_grad():
            end = model.gpt_neox.embed_in.weight[EOS]  # also of the head: a third of the samples end
            model.gpt_neox.final_layer_norm.bias += 5 * end / end.square().sum()
        save_pretrained(model, tokenizer, out / name)
    write_sources(out)


def post(i: int) -> dict:
    return {"id": f"p{i}", "subreddit": "tea", "title": f"cup {i}", "post": f"the cat {i} sat on the mat"}


def comparison(i: int) -> dict:
    texts = [{"text": f" the cat {i}", "policy": "a"}, {"text": " a mat", "policy": "b"}]
    return {
        "info": post(i), "summaries": texts, "choice": i % 2, "batch": "batch1", "split": "train",
        "extra": {"confidence": 5},
    }


def write_sources(out: Path) -> None:
    """Rows for data/jsonl.py, and in the form of the TL;DR data."""
    own = [{"prompt": f"cat {i}:", "chosen": f" sat {i}", "rejected": " a mat"} for i in range(9)]
    summaries = [post(i) | {"summary": f"the cat {i}"} for i in range(4)]
    files = {"own.jsonl": own}
    files |= {f"source/tldr_3_filtered/{s}.jsonl": summaries for s in ("train", "validation", "test")}
    files |= {f"source/comparisons/{s}.jsonl": [comparison(i) for i in range(3)]
              for s in ("train", "validation")}
    for name, rows in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(world: Path, script, out_dir: Path, **changes):
    io = {"out_dir": str(out_dir)}
    if script in ON_MODELS:
        io |= {"data_dir": str(world / "data"), "device": "cpu"}
    sft, rm = {"model": f"{world}/sft"}, {"reward_model": f"{world}/rm"}
    train = {"save_every": 1, "lr": 1e-3, "eval_rows": 2}
    samples = {"batch_size": 4, "episodes": 8, "k": 2, "response_tokens": 3}
    small = {
        train_sft: {**train, "model": f"{world}/data/base", "init": "scratch", "batch_size": 6},
        train_rm: {**train, **sft, "batch_size": 4, "center_rows": 4},
        train_rloo: {**train, **sft, **rm, **samples, "ppo_epochs": 1, "samples_every": 1},
        train_simpo: {**train, **sft, "loss": "dpo", "batch_size": 4},
        train_ppo: {**train, **sft, **rm, **samples, "ppo_epochs": 1},
        train_online: {**train, **sft, **rm, **samples, "label": "sampled", "round_updates": 1},
        sample: {**sft, **rm, "k": 2, "rows": 12, "rollout_prompts": 4, "select": "best", "temperature": 1.0,
                 "response_tokens": 8},
        evaluate: {
            "model": f"{world}/sft,{world}/data/../sft", **rm, "ref_model": f"{world}/sft", "judge": "rm",
            "n": 2, "response_tokens": 3, "html": True,
        },
        average: {"models": f"{world}/sft,{world}/data/../sft"},
        best_of_n: {**sft, **rm, "rows": 2, "samples": 2},
        toy: {"posts": 3, "pairs": 2, "rankings": 2, "validation": 2, "test": 2, "size": "small"},
        jsonl: {"train": f"{world}/own.jsonl", "tokenizer": f"{world}/sft", "validation_share": 0.3},
        tldr: {"source": f"{world}/source", "tokenizer": f"{world}/sft"},
    }
    return replace(script.Config(**io, **small[script]), **changes)


def run_of(world: Path, script, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(world / "run" / script.__name__, tmp_path / "run"))


def unfinished(world: Path, script, tmp_path: Path) -> Path:
    run = run_of(world, script, tmp_path)
    (run / "result.json").unlink()
    return run


def state_files(checkpoint: Path) -> list[Path]:
    """Those that a resumed run needs, and nobody who only takes the model."""
    model = ("config.json", "model.", "tokenizer", "special_tokens_map", "checksums")
    return [file for file in sorted(checkpoint.iterdir()) if not file.name.startswith(model)]


def go_on(script, cfg):
    """The command that goes on where this one was stopped."""
    if hasattr(cfg, "resume") and not cfg.overwrite:
        return replace(cfg, resume=True)
    return replace(cfg, overwrite=True)


def call(script, cfg, capsys, monkeypatch) -> tuple[int, str]:
    """(exit code, last line of stderr) of the script's command line."""
    given = {field.name: getattr(cfg, field.name) for field in fields(cfg)}
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return call_with(script, options, capsys, monkeypatch)


def call_with(script, options: list[str], capsys, monkeypatch) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *options])
    capsys.readouterr()
    try:
        command_line(script.main, script.Config)
    except SystemExit as stop:
        return stop.code, (capsys.readouterr().err.strip().splitlines() or [""])[-1]
    return 0, ""


# --- a folder as it is, and as a kill or a full disk would leave it


class Killed(BaseException):
    pass


HOOK: list[Callable[[str, tuple], None]] = []  # at most one; audit hooks cannot be removed
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")


def audit(event: str, args: tuple) -> None:
    if HOOK and event in EVENTS:
        HOOK[0](event, args)


sys.addaudithook(audit)


def writes_past_python() -> Iterator[tuple[object, str, int, type[Exception], str]]:
    """(where, function, number of its path argument, what it raises on a full disk, saying what)."""
    yield safetensors.torch, "serialize_file", 1, SafetensorError, "I/O error: No space left on device"
    yield pq.ParquetWriter, "__init__", 1, OSError, "[Errno 28] Error writing bytes. No space left on device"


@contextmanager
def watched(folder: Path, seen: Callable[[str, Path], None]) -> Iterator[None]:
    """Calls seen(operation, path) before each operation that changes something under `folder`, whoever does
    it: Python, torch, safetensors or pyarrow."""

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

    def told(write, place: int, error: type[Exception], message: str):
        def wrapper(*args, **options):
            try:
                HOOK[0]("open", (args[place], "wb", 0)) if HOOK else None
            except OSError as full:
                raise error(message) from full
            return write(*args, **options)

        return wrapper

    originals = [(where, name, getattr(where, name)) for where, name, *_ in writes_past_python()]
    for where, name, *rest in writes_past_python():
        setattr(where, name, told(getattr(where, name), *rest))
    HOOK.append(hook)
    try:
        yield
    finally:
        HOOK.clear()
        for original in originals:
            setattr(*original)


State = dict[str, bytes | None]  # {path: content, None of a directory}


def read_state(folder: Path) -> State:
    found: State = {}
    for path in sorted(folder.rglob("*")):
        found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else None
    return found


def write_state(folder: Path, state: State) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in state.items():
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)


def key(state: State) -> str:
    digest = hashlib.sha256()
    for name, content in state.items():
        digest.update(f"{name} {content is None} {len(content or b'')}\0".encode() + (content or b""))
    return digest.hexdigest()


def state_of(folder: Path) -> str:
    return key(read_state(folder))


def states(work: Callable[[], object], folder: Path) -> dict[str, State]:
    """{key: state} of all that a kill of `work` could leave in `folder`: what is there before each operation,
    and files that are empty or half written."""
    found: dict[str, State] = {}

    def seen(operation: str, path: Path) -> None:
        held = HOOK.pop()
        state = read_state(folder)
        found[key(state)] = state
        if operation in ("write", "append"):
            name = str(path.absolute().relative_to(folder))
            before = (state.get(name) or b"") if operation == "append" else b""
            parts = [b'{"half'] if "writing" in name else [b'{"half', b""]
            for part in parts:
                cut = dict(sorted({**state, name: before + part}.items()))
                found[key(cut)] = cut
        HOOK.append(held)

    with watched(folder, seen):
        work()
    return found


def killed_at(operation: int, work: Callable[[], object], folder: Path) -> int:
    """Runs `work` in a process of its own that ends, as by SIGKILL, before that operation; its exit code."""
    count = 0

    def seen(event: str, path: Path) -> None:
        nonlocal count
        count += 1
        if count > operation:
            os._exit(9)

    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        with watched(folder, seen):
            work()
        os._exit(0)
    finally:
        os._exit(1)


def full_disk(after: int) -> Callable[[str, Path], None]:
    """From operation `after` on nothing can be written; the first file is cut off in the middle."""
    count = 0

    def seen(operation: str, path: Path) -> None:
        nonlocal count
        count += 1
        if count > after and operation in ("write", "append", "create", "os.mkdir"):
            if operation in ("write", "append"):
                held = HOOK.pop()
                with open(path, operation[0]) as file:
                    file.write('{"half')
                HOOK.append(held)
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    return seen


def counted(work: Callable[[], object], folder: Path) -> int:
    operations = []
    with watched(folder, lambda operation, path: operations.append(operation)):
        work()
    return len(operations)


class Clock:
    """Stands in for the module `time` in all of the project: equal runs leave equal bytes."""

    def __init__(self):
        self.ticks = 0

    def perf_counter(self) -> float:
        self.ticks += 1
        return float(self.ticks)

    time = perf_counter

    def strftime(self, *args) -> str:
        return "today"

    def __getattr__(self, name: str):
        return getattr(time, name)


def stop_the_clock(monkeypatch) -> None:
    """And the disk: nobody waits for it. Nor is git asked at every run."""
    clock = Clock()
    monkeypatch.setattr(toy, "train_tokenizer", cache(toy.train_tokenizer))
    for module in list(sys.modules.values()):
        own = str(getattr(module, "__file__", None)).startswith(str(ROOT))
        if own and getattr(module, "time", None) is time:
            monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(rlhf.out_dir, "commit", lambda: "a commit")


# --- what must come out the same


def outcome(folder: Path | State) -> dict:
    """All that a run left, bit for bit; but for its lock, what a killed write left aside, the folder's name
    and whether the command said --resume or --overwrite."""
    state = read_state(folder) if isinstance(folder, Path) else folder
    kept = {name: content for name, content in state.items() if not name.endswith((".lock", ".writing"))}
    for name, content in kept.items():
        if name.endswith((".json", ".jsonl")):
            kept[name] = [nameless(json.loads(line)) for line in joined(name, content)]
    return kept


def joined(name: str, content: bytes) -> list[bytes]:
    return content.splitlines() if name.endswith(".jsonl") else [content]


UNLIKE = ("out_dir", "command", "resume", "overwrite", "seconds")


def nameless(entry):
    if not isinstance(entry, dict):
        return entry
    left = {k: v for k, v in entry.items() if k not in UNLIKE}
    return {k: nameless(v) for k, v in left.items()}


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def save(tensors: dict, path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
