"""--out_dir: new, replaced, or gone on with. Nothing in it is lost before something better is there.

It belongs to one script (run.json) and to one process at a time (.lock), and it is no input of that script.
What --overwrite replaces is renamed, and deleted when the new run has a checkpoint or a result.
"""

import fcntl
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from rlhf.config import UserError
from rlhf.dist import FIRST, RANKS, agree, check_prompts, exchange, on_first
from rlhf.files import check_apart, fingerprint, identity, remove, write_file
from rlhf.pretrained import read_json, resolve

INPUTS = ("data_dir", "model", "ref_model", "reward_model")  # options that name what a script reads
FUNCTIONS = ("reward_fn", "compare_fn")  # and those that name a function of the user's, file.py:name


def script_of(config) -> str:
    return Path(inspect.getfile(type(config))).stem


def describe(config) -> dict:
    """What run.json says of a run at its start."""
    device = f"cpu x {torch.get_num_threads()}"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {
        "script": script_of(config),
        "command": " ".join(sys.argv),
        "config": asdict(config),
        "commit": commit(),
        "torch": torch.__version__,
        "device": device,
        "ranks": RANKS,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def commit() -> str | None:
    try:
        git = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
        )
    except OSError:  # no git here
        return None
    return git.stdout.strip() or None


def is_new(out: Path) -> bool:
    """Nothing there, or no more than a kill leaves before run.json is written."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another --out_dir")
    left = {path.name for path in out.iterdir() if path.suffix != ".probe"} if out.exists() else set()
    return left <= {".lock", "run.json.writing"}


def read_about(out: Path) -> dict:
    """run.json of an earlier run."""
    if not (out / "run.json").exists():
        raise UserError(f"{out} is not empty and holds no run.json, so it is not a run of ours: "
                        "choose another --out_dir")
    about = read_json(out / "run.json")
    if not isinstance(about, dict) or not isinstance(about.get("config"), dict):
        raise UserError(f"{out}/run.json does not describe a run; remove {out}, or choose another --out_dir")
    return about


def named_by(config, name: str) -> list[str]:
    """The paths or ids that an option of INPUTS names: none, one, or several reward models."""
    value = getattr(config, name, "")
    return [part for part in (value.split(",") if name == "reward_model" else [value]) if part]


def function_files(config) -> dict[str, str]:
    """{option: its file}."""
    files = {name: getattr(config, name, "").rpartition(":")[0] for name in FUNCTIONS}
    return {name: file for name, file in files.items() if file}


def inputs_of(config) -> dict[str, dict[str, str]]:
    """{option: fingerprint of what it names}."""
    revision = getattr(config, "revision", "main")
    found = {}
    for name in INPUTS:
        values = named_by(config, name)
        for value in values:
            path = Path(value) if name == "data_dir" else resolve(value, revision)
            folder = f"{value}/" if len(values) > 1 else ""
            files = {folder + file: mark for file, mark in fingerprint(path).items()}
            found[name] = found.get(name, {}) | files
    for name, source in function_files(config).items():
        found[name] = {source: identity(Path(source))}
    return found


def check_inputs(about: dict, config) -> None:
    """Raises UserError if data or a model is another than when the run began. A function that failed has to
    be mended: that it is another is only said."""
    before = about.get("inputs")
    now = inputs_of(config) if before else {}
    for name in now:
        old = before.get(name, {})
        new = now[name]
        if other := sorted(file for file in old.keys() | new if old.get(file) != new.get(file)):
            path = getattr(config, name)
            if name in FUNCTIONS:
                print(f"--{name}={path} has changed since the run began: from here on it is the new one's")
                continue
            raise UserError(f"--resume of {config.out_dir}: --{name}={path} is not what it was when the run "
                            f"began ({', '.join(other[:3])}): bring that back, or start anew with "
                            "--overwrite")


def check_out_dir(config, *inputs: str) -> dict:
    """run.json of what lies in --out_dir, {} if that is a new directory. Touches nothing. Raises UserError if
    it is neither new nor a run of the same script, or if it is an input: one of INPUTS or of `inputs`."""
    out = Path(config.out_dir)
    read = [path for name in INPUTS for path in named_by(config, name)]
    check_apart(config.out_dir, *read, *function_files(config).values(), *inputs)
    if config.overwrite and getattr(config, "resume", False):
        raise UserError("--resume goes on with a run, --overwrite replaces it: give one of them")
    if is_new(out):
        return {}
    about = read_about(out)
    script = about.get("script") or Path(str(about.get("command")).split()[0]).stem
    if script != script_of(config):
        raise UserError(f"{out} is a run of {script}.py: choose another --out_dir")
    return about


def check_ranks(config, about: dict, inputs: Callable = lambda config: {}) -> None:
    """Raises UserError unless all ranks have the same code, options and inputs and see the same --out_dir."""
    if RANKS == 1:
        return
    if hasattr(config, "batch_size"):
        check_prompts(config.batch_size // getattr(config, "k", 1))
    root = Path(__file__).parents[1]
    files = sorted([*root.glob("*.py"), *root.glob("*/*.py")])  # no virtual environment, which lies deeper
    code = {str(path.relative_to(root)): identity(path) for path in files}
    agree({"version of the code": code, "command line": asdict(config), "model or data": inputs(config)})
    out = Path(config.out_dir)
    there = out.resolve()
    while not there.is_dir():
        there = there.parent
    probe = there / on_first(lambda: f".{out.name}.{os.getpid()}.probe")
    on_first(probe.touch)
    seen = exchange(probe.exists())
    on_first(probe.unlink)
    if not all(seen):
        raise UserError(f"rank {seen.index(False)} does not see {there}, where rank 0 writes: --out_dir has "
                        "to be on a disk that all ranks share")
    agree({"run in --out_dir": about})


def changes(about: dict, config, may_change: set[str]) -> dict[str, list]:
    """{option: [what it was, what it is]} of an earlier run and one that would go on with it."""
    old = about["config"]
    now = {key: value for key, value in asdict(config).items() if key not in may_change}
    return {key: [old[key], value] for key, value in now.items() if key in old and old[key] != value}


def named(changed: dict[str, list]) -> str:
    return "; ".join(f"--{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())


HELD: dict[Path, int] = {}  # locks of this process


def lock(out: Path) -> None:
    """One process per directory. However the process ends, the system takes the lock back."""
    path = out.resolve() / ".lock"
    unlock(out)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise UserError(f"{out}: another process is writing this run (it holds {path}): wait for it, end it, "
                        "or choose another --out_dir") from error
    except OSError:  # a file system without locks
        pass
    HELD[path] = handle


def unlock(out: Path) -> None:
    path = out.resolve() / ".lock"
    if path in HELD:
        os.close(HELD.pop(path))


def replaced(out: Path) -> Path:
    """Where --overwrite keeps the old run until the new one has something to show."""
    return out.resolve().with_name(f".{out.resolve().name}.replaced")


def has_shown(out: Path) -> bool:
    """A checkpoint or a result."""
    return (out / "result.json").exists() or any(out.glob("ckpt/step_*"))


def set_aside(out: Path) -> None:
    kept = replaced(out)
    if kept.exists() and not has_shown(out):
        remove(out.resolve())  # a new run that came to nothing; the old one stays kept
        return
    if kept.exists():
        remove(kept)
    out.resolve().rename(kept)
    print(f"{out}: what was there is kept as {kept} until the new run has something to show")


def forget_replaced(out: Path) -> None:
    if FIRST and replaced(out).exists():
        remove(replaced(out))


def enter(config, about: dict, inputs: dict | None = None) -> None:
    """Makes --out_dir, of which check_out_dir said `about`, this process's own: locked, and with a run.json.
    --overwrite sets aside what is there."""
    on_first(lambda: take(config, about, inputs))


def take(config, about: dict, inputs: dict | None) -> None:
    out = Path(config.out_dir)
    if about:
        lock(out)
        if config.overwrite:
            set_aside(out)
    out.mkdir(parents=True, exist_ok=True)
    lock(out)
    if is_new(out):
        written = describe(config) | ({"inputs": inputs} if inputs else {})
        write_file(out / "run.json", json.dumps(written, indent=2) + "\n")
    elif not about:
        raise UserError(f"{out}: another process has begun a run there: choose another --out_dir")


def check_same(config, *inputs: str, may_change: set[str], go_on: bool = False) -> dict:
    """check_out_dir for scripts without checkpoints. Raises UserError too unless the directory is new, will
    be replaced (--overwrite) or, with the same settings, gone on with (--resume, or `go_on`)."""
    out = Path(config.out_dir)
    about = check_out_dir(config, *inputs)
    if about and not config.overwrite:
        if changed := changes(about, config, may_change):
            raise UserError(f"{out} was made with other settings ({named(changed)}): "
                            "--overwrite it or choose another --out_dir")
        if not (go_on or getattr(config, "resume", False)):
            raise UserError(exists(out, resumable=hasattr(config, "resume")))
    check_ranks(config, about)
    return about


def exists(out: Path, resumable: bool = True) -> str:
    go_on = "continue it with --resume, " if resumable else ""
    return f"{out} exists: {go_on}replace it with --overwrite, or choose another --out_dir"
