"""Files that a kill or a full disk, at any moment, leaves whole; how to see that one is still what it was."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rlhf.config import UserError

WRITING = ".writing"  # where prepared data is written before it moves to its place


def write_file(path: Path, content: str | Callable[[Path], object]) -> None:
    """A text, or what `content` writes to a path. Aside and renamed: nobody ever reads half of it."""
    aside = path.with_name(path.name + ".writing")
    if callable(content):
        content(aside)
    else:
        aside.write_text(content)
    sync(aside)
    os.replace(aside, path)


def sync(*paths: Path) -> None:
    """Makes sure the bytes are on disk before a rename says so."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_objects(log: Path) -> list[tuple[str, dict]]:
    """The lines of a jsonl file and the objects in them; a line that a kill cut off is left out."""
    found = []
    for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            found.append((line, entry))
    return found


def remove(directory: Path) -> None:
    """Renamed before it is emptied: half a run is never found under its name."""
    doomed = directory.with_name(f".{directory.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    directory.rename(doomed)
    shutil.rmtree(doomed)


def replace_directory(aside: Path, final: Path) -> None:
    """A directory that is whole gets its name, in the place of an earlier one."""
    sync(*aside.iterdir(), aside)
    if final.exists():
        remove(final)
    aside.rename(final)
    sync(final.parent)


def move_in(aside: Path, out: Path, last: str) -> None:
    """Moves the files of `aside` into `out`. Until `last` is there too, `out` counts as unfinished."""
    out.mkdir(parents=True, exist_ok=True)
    (out / last).unlink(missing_ok=True)
    for file in sorted(aside.iterdir(), key=lambda file: (file.name == last, file.name)):
        file.replace(out / file.name)
    sync(out)
    aside.rmdir()


def check_data_dir(out: Path, world: str, overwrite: bool) -> None:
    """Raises UserError unless `out` is a new directory, or prepared data of the same world (or what a kill
    left of it) that --overwrite may replace."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out_dir {out} is a file; use another one")
    if not out.exists() or not any(path.name != WRITING for path in out.iterdir()):
        return
    if not overwrite:
        raise UserError(f"--out_dir {out} is not empty; use another one, or --overwrite")
    if (out / "run.json").exists():
        raise UserError(f"--out_dir {out} is a run, no prepared data; use another one")
    meta = out / "meta.json"
    if meta.exists() and f'"world": "{world}"' not in meta.read_text():
        raise UserError(f"--out_dir {out} holds data of another world than {world!r}; use another one")


def data_aside(out: Path) -> Path:
    """An empty folder for the files of a prepared data directory."""
    aside = out / WRITING
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def move_data_in(out: Path) -> None:
    """Until meta.json is there again, the directory is unfinished; no table of earlier data stays."""
    aside = out / WRITING
    (out / "meta.json").unlink(missing_ok=True)
    for old in [path for kind in ("sft_*", "pairs_*", "rankings_*") for path in out.glob(f"{kind}.parquet")]:
        old.unlink()
    if (aside / "base").exists():
        move_in(aside / "base", out / "base", last="config.json")
    move_in(aside, out, last="meta.json")


def checksum(path: Path) -> int:
    """Sum of a file's 8-byte words, modulo 2^64: finds any flipped bit, several times as fast as a CRC."""
    words = np.zeros(2**17, dtype=np.uint64)
    block = memoryview(words).cast("B")
    total = 0
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            block[size : -(-size // 8) * 8] = bytes(-size % 8)
            total += int(words[: -(-size // 8)].sum())
    return total % 2**64


def identity(path: Path) -> str:
    """Tells whether a file is still the one it was: a hash of its size and of all of it; beyond 4 MB of its
    two ends (where safetensors and parquet keep their headers) and of 64 places between."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= 2**22:
            digest.update(file.read())
            return digest.hexdigest()[:16]
        digest.update(file.read(2**20))
        for place in range(1, 65):
            file.seek(size * place // 65)
            digest.update(file.read(2**12))
        file.seek(size - 2**20)
        digest.update(file.read())
    return digest.hexdigest()[:16]


def fingerprint(directory: Path) -> dict[str, str]:
    """{file: its identity} of a model or of prepared data."""
    kinds = ("config.json", "meta.json", "tokenizer.json", "*.safetensors", "*.parquet")
    files = sorted(file for kind in kinds for file in directory.glob(kind))
    return {file.name: identity(file) for file in files}


def check_apart(out_dir: str, *inputs: str) -> None:
    """Raises UserError if the output is, holds or lies in something that is read: it would destroy it."""
    out = Path(out_dir).resolve()
    for name in filter(None, inputs):
        path = Path(name).resolve()
        if out == path or out in path.parents or path in out.parents:
            relation = "is" if out == path else "holds" if out in path.parents else "lies in"
            raise UserError(f"--out_dir={out_dir} {relation} {name}, which is read: choose another --out_dir")
