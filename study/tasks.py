"""Many runs, some at a time: what is finished is not run again, what was stopped goes on.

The number at a time is JOBS, or that of the cores.
"""

import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from rlhf.config import RunError
from rlhf.out_dir import read_about

JOBS = int(os.environ.get("JOBS", os.cpu_count() or 1))
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
DIVERGED = "diverged.txt"  # in a run's folder: its last words


def given(words: list[str]) -> dict[str, str]:
    """{option: value} of a command line; of one that is there twice the last."""
    return dict(word.partition("=")[::2] for word in words if word.startswith("--"))


@dataclass(frozen=True)
class Task:
    out: Path
    command: str  # a script (or -m module) and its options, without --out_dir
    done: str = "result.json"  # the file that says it is finished
    may_diverge: bool = False  # a loss that is no longer finite ends it, and is a result

    @property
    def words(self) -> list[str]:
        return [*shlex.split(self.command), f"--out_dir={self.out}"]

    def diverged(self) -> bool:
        return self.may_diverge and (self.out / DIVERGED).exists()

    def finished(self) -> bool:
        """There is a result, and it was made with these options."""
        if not (self.out / self.done).exists() and not self.diverged():
            return False
        if not (self.out / "run.json").exists():  # of a data script
            return True
        about = read_about(self.out)
        return given(str(about.get("command")).split()) == given(self.words)


def start(task: Task, logs: Path, env: dict[str, str]) -> float:
    """Seconds that the task took, also a line of seconds.txt. RunError, with its last words, if it fails."""
    logs.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    log = logs / f"{task.out.parent.name}-{task.out.name}.log"
    with open(log, "w") as handle:
        code = subprocess.run(
            [sys.executable, *task.words], stdout=handle, stderr=subprocess.STDOUT, env=os.environ | env
        ).returncode
    if code:
        last = " ".join(log.read_text(errors="replace").strip().splitlines()[-1:])
        if not (task.may_diverge and code == 1 and "not finite" in last):
            raise RunError(f"{' '.join(task.words)}\nended with code {code}: {last}\n"
                           f"its output is in {log}")
        (task.out / DIVERGED).write_text(last + "\n")
    seconds = time.monotonic() - began
    with open(logs.parent / "seconds.txt", "a") as handle:
        handle.write(f"{os.path.relpath(task.out, logs.parent)} {seconds:.0f}\n")
    return seconds


def start_all(tasks: list[Task], logs: Path, env: dict[str, str] = ONE_THREAD, jobs: int = JOBS) -> None:
    """Runs what is not finished, in this order; after a failure nothing new is begun."""
    left = [task for task in tasks if not task.finished()]
    if not left:
        return
    began, done = time.monotonic(), 0

    def one(task: Task) -> None:
        nonlocal done
        seconds = start(task, logs, env)
        done += 1
        rest = (time.monotonic() - began) / done * (len(left) - done) / 60
        print(f"{time.strftime('%H:%M')} {task.out} ({seconds:.0f} s); {done} of {len(left)}, "
              f"about {rest:.0f} minutes left", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        runs: list[Future] = [pool.submit(one, task) for task in left]
        finished, _ = wait(runs, return_when=FIRST_EXCEPTION)
        pool.shutdown(wait=False, cancel_futures=True)
        for run in finished:
            run.result()


def start_chains(chains: list[list[Task]], logs: Path) -> None:
    """Of each chain the first task, then the second, ...: one needs those before it, and none that
    diverged."""
    for i in range(max(map(len, chains), default=0)):
        ready = [chain for chain in chains if len(chain) > i and not any(t.diverged() for t in chain[:i])]
        start_all([chain[i] for chain in ready], logs)
