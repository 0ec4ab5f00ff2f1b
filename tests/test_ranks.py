"""A rank that dies, one that hangs, and scripts that have no work to share."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_dist import CLOSE, HERE, job, options, torchrun
from tiny import distance, log

import train_rloo

KILLS = int(os.environ.get("KILLS", 3))
SLOW = dict(batch_size=10, episodes=80, save_every=1, keep=2, schedule="constant")


def command(tiny, out: Path, **changes) -> list[str]:
    given = options(tiny, "rloo", out, **SLOW, **changes)
    return ["train_rloo.py", *(f"--{name}={value}" for name, value in given.items())]


def start(ranks: int, *line: str, **how) -> subprocess.Popen:
    """torchrun, or one process, in a session of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *(launcher if ranks > 1 else []), *line], cwd=HERE.parent, env=environment,
        start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how,
    )


def ranks_of(torchrun_id: int) -> list[int]:
    children = Path(f"/proc/{torchrun_id}/task/{torchrun_id}/children").read_text().split()
    return [int(child) for child in children]


def wait_for(run: Path, steps: int, process: subprocess.Popen) -> None:
    """Until the log has this many lines, or the process has ended."""
    while process.poll() is None:
        if (run / "metrics.jsonl").exists() and len(log_lines(run)) >= steps:
            return
        time.sleep(0.02)


def log_lines(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []


@pytest.fixture(scope="module")
def expected(tiny) -> Path:
    out = tiny.root / "not_killed"
    train_rloo.main(train_rloo.Config(**options(tiny, "rloo", out, **SLOW)))
    return out


def test_kills_with_changing_numbers_of_ranks(tiny, expected, tmp_path):
    """A rank is killed after a random number of steps; the run goes on with another number of ranks."""
    draw = random.Random(5)
    run = tmp_path / "run"
    total = len(log(expected))
    for kill in range(KILLS):
        ranks = draw.choice([1, 2, 3])
        done = len(log_lines(run))
        process = start(ranks, *command(tiny, run, resume=kill > 0))
        wait_for(run, min(done + draw.randint(0, 2), total - 1), process)
        time.sleep(draw.random() * 0.2)
        victims = [process.pid]
        while ranks > 1 and process.poll() is None and len(victims := ranks_of(process.pid)) < ranks:
            time.sleep(0.02)  # torchrun has not started them yet
        if process.poll() is None:  # it may have finished
            os.kill(draw.choice(victims), signal.SIGKILL)
        killed = time.time()
        process.wait(timeout=60)
        assert time.time() - killed < 30  # on a loaded machine; else 1 to 6 s
    ended = start(2, *command(tiny, run, resume=True))
    _, said = ended.communicate(timeout=300)
    assert ended.returncode == 0, [line for line in said.splitlines() if "rror" in line]
    assert [line["step"] for line in log(run)] == [line["step"] for line in log(expected)]
    assert distance(run, expected) < CLOSE


def test_a_rank_that_hangs_is_told_at_the_timeout(tiny, tmp_path):
    run = tmp_path / "run"
    process = start(2, *command(tiny, run, rank_timeout=5.0))
    wait_for(run, 1, process)
    stopped, waiting = ranks_of(process.pid)
    os.kill(stopped, signal.SIGSTOP)
    began = time.time()
    while waiting in ranks_of(process.pid) and time.time() - began < 60:
        time.sleep(0.1)
    os.kill(stopped, signal.SIGKILL)  # torchrun would wait half a minute for it
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and time.time() - began > 5
    assert "waited for another rank until the timeout (--rank_timeout): does one hang?" in said


def test_an_uneven_deal_does_not_pass(tiny, tmp_path):
    """The twin of every run in test_dist.py: one rank has a micro-batch more than the others."""
    jobs = [job(tiny, "dpo", tmp_path / "run", "uneven_deal", micro_batch_tokens=1, rank_timeout=20.0)]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = torchrun(2, str(HERE / "ranks.py"), str(tmp_path / "jobs.json"), timeout=300)
    assert (tmp_path / "run/run.json").exists()  # it had begun
    assert done.returncode == 1 and not (tmp_path / "run/result.json").exists()


def test_other_scripts_refuse_ranks(tmp_path):
    done = torchrun(2, "data/toy.py", f"--out_dir={tmp_path / 'data'}", timeout=100)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: this script has no work to share between ranks: start it without torchrun"]
    assert not (tmp_path / "data").exists()
