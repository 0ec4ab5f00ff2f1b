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


@dataclass(frozen=True)
class Task:
    out: Path
    command: str  # a script (or -m module) and its options, without --out_dir
    done: str = "result.json"  # the file that says it is finished

    @property
    def words(self) -> list[str]:
        return [*shlex.split(self.command), f"--out_dir={self.out}"]

    def finished(self) -> bool:
        """There is a result, and it was made with these options."""
        if not (self.out / self.done).exists():
            return False
        if not (self.out / "run.json").exists():  # of a data script
            return True
        about = read_about(self.out)
        options = [word for word in self.words if word.startswith("--")]
        return str(about.get("command")).split()[1:] == options


def start(task: Task, logs: Path, env: dict[str, str]) -> float:
    """Seconds that the task took. RunError, with its last words, if it fails."""
    began = time.monotonic()
    log = logs / f"{task.out.parent.name}-{task.out.name}.log"
    with open(log, "w") as handle:
        code = subprocess.run(
            [sys.executable, *task.words], stdout=handle, stderr=subprocess.STDOUT, env=os.environ | env
        ).returncode
    if code:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise RunError(f"{' '.join(task.words)}\nended with code {code}: {' '.join(last)}\n"
                       f"its output is in {log}")
    return time.monotonic() - began


def start_all(tasks: list[Task], logs: Path, env: dict[str, str] = ONE_THREAD, jobs: int = JOBS) -> None:
    """Runs what is not finished, in this order; after a failure nothing new is begun."""
    left = [task for task in tasks if not task.finished()]
    if not left:
        return
    logs.mkdir(parents=True, exist_ok=True)
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
