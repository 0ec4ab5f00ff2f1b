"""Ranks for the tests: a process that has loaded torch once, and of which every rank is a fork.

`Ranks` starts it. It reads a line {"ranks": n, "jobs": FILE} for each group and answers with the ranks' exit
codes. A rank runs the jobs of the file (rank_jobs.py), one after the other, and writes what it has to say to
FILE.RANK.log. As under torchrun, the others are ended once one has failed. ranks=0: a process on its own.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
# What takes seconds to import, and knows nothing of ranks: all that is not this project.
LOADED = ("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "pyarrow.parquet",
          "pyarrow.dataset", "rouge_score.rouge_scorer", "safetensors.torch", "tokenizers", "tqdm",
          "huggingface_hub")


class Ranks:
    def __init__(self):
        self.server = subprocess.Popen(
            [sys.executable, str(HERE / "ranks.py")], cwd=HERE.parent, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def start(self, ranks: int, jobs: list[dict], file: Path) -> None:
        file.write_text(json.dumps(jobs))
        print(json.dumps({"ranks": ranks, "jobs": str(file)}), file=self.server.stdin, flush=True)

    def codes(self, ranks: int, jobs: list[dict], file: Path) -> list[int]:
        """The exit code of each rank; -9 of one that was killed."""
        self.start(ranks, jobs, file)
        return json.loads(self.server.stdout.readline())

    def run(self, ranks: int, jobs: list[dict], file: Path) -> list[list]:
        """What each job gave, by rank."""
        self.start(ranks, jobs, file)
        return self.results(ranks, file)

    def results(self, ranks: int, file: Path) -> list[list]:
        codes = json.loads(self.server.stdout.readline())
        assert not any(codes), "".join(said(file, rank)[-4000:] for rank, code in enumerate(codes) if code)
        by_rank = [json.loads(Path(f"{file}.{rank}.results").read_text()) for rank in range(max(1, ranks))]
        return [list(results) for results in zip(*by_rank, strict=True)]

    def close(self) -> None:
        self.server.kill()
        self.server.wait()


def said(file: Path, rank: int) -> str:
    """What a rank wrote to stdout and stderr."""
    return Path(f"{file}.{rank}.log").read_text()


def rank_process(ranks: int, rank: int, port: int, jobs: str) -> int:
    for stream in (1, 2):
        os.dup2(os.open(f"{jobs}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    if ranks:
        sizes = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "RANK": rank, "LOCAL_RANK": rank}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in (sizes | place).items()}
    try:
        importlib.import_module("rank_jobs").main(Path(jobs))
    except SystemExit as error:
        return error.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def group(ranks: int, jobs: str) -> list[int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    running = {}
    for rank in range(max(1, ranks)):
        if not (child := os.fork()):
            code = 1
            try:
                code = rank_process(ranks, rank, port, jobs)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)
        running[child] = rank
    codes = {}
    while running:
        child, status = os.wait()
        codes[running.pop(child)] = code = os.waitstatus_to_exitcode(status)
        for other in running if code else ():
            os.kill(other, signal.SIGKILL)
    return [codes[rank] for rank in sorted(codes)]


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    for name in LOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(group(**json.loads(line))), flush=True)
