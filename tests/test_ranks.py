"""A rank that dies, one that hangs, and command lines that ranks refuse."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import said
from test_dist import CLOSE, HERE, job, options
from tiny import distance, log
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

import train_rm

KILLS = int(os.environ.get("KILLS", 3))
SLOW = dict(batch_size=10, episodes=80, save_every=1, keep=2, schedule="constant")


def command(tiny, out: Path, **changes) -> list[str]:
    given = options(tiny, "rloo", out, **SLOW, **changes)
    return ["train_rloo.py", *(f"--{name}={value}" for name, value in given.items())]


def log_lines(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []


def numbers(run: Path) -> list[dict]:
    """The lines of the log, without times."""
    return [{key: x for key, x in line.items() if "second" not in key} for line in log(run)]


@pytest.mark.parametrize("sizes", [(0, 1, 2, 3), (2,)], ids=["changing", "same"])
def test_kills(tiny, launcher, tmp_path, sizes):
    """A rank is killed at a random moment and the run goes on, on another number of ranks or on the same,
    where every bit is that of the run that was not killed."""
    expected = tmp_path / "expected"
    launcher.run(sizes[0], [{"line": command(tiny, expected)}], tmp_path / "jobs")
    steps = [line["step"] for line in log(expected)]
    draw = random.Random(5)
    dead = runs = 0
    while dead < KILLS:
        run = tmp_path / f"run_{runs}"
        runs += 1
        codes = [1]
        while any(codes):
            ranks = draw.choice(sizes)
            jobs = [{"line": command(tiny, run, resume=run.exists())}]
            if dead < KILLS:
                step = draw.choice([0, *steps[len(log_lines(run)) :][:3]])
                end = {"step": step, "seconds": draw.random() * 0.3, "how": signal.SIGKILL}
                jobs[0] |= {"rank": draw.randrange(max(1, ranks)), "end": end}
            codes = launcher.codes(ranks, jobs, tmp_path / "jobs")
            assert not any(codes) or -signal.SIGKILL in codes
            dead += any(codes)
        assert [line["step"] for line in log(run)] == steps
        assert distance(run, expected) < CLOSE
        if len(sizes) == 1:
            assert distance(run, expected) == 0 and numbers(run) == numbers(expected)


def test_a_dead_rank_ends_the_run(tiny, tmp_path):
    """Under torchrun itself."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = tmp_path / "run"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = subprocess.Popen(
        [*line, *command(tiny, run)], cwd=HERE.parent, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while torchrun.poll() is None and not log_lines(run):
        time.sleep(0.02)
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    killed = time.time()
    torchrun.communicate(timeout=60)
    assert torchrun.returncode == 1 and len(children) == 2
    assert time.time() - killed < 10  # 1 to 6 s
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_a_rank_that_hangs_is_told_at_the_timeout(tiny, launcher, tmp_path):
    line = command(tiny, tmp_path / "run", rank_timeout=5.0)
    jobs = [{"line": line, "rank": 1, "end": {"step": 1, "seconds": 0, "how": signal.SIGSTOP}}]
    began = time.time()
    codes = launcher.codes(2, jobs, tmp_path / "jobs")
    assert codes == [1, -signal.SIGKILL] and time.time() - began > 5
    (error,) = [line for line in said(tmp_path / "jobs", 0).splitlines() if line.startswith("error: ")]
    assert error == "error: rank 0 waited for another rank until the timeout (--rank_timeout): does one hang?"


def test_an_uneven_deal_does_not_pass(tiny, launcher, tmp_path):
    """The twin of every run in test_dist.py: one rank has a micro-batch more than the others."""
    jobs = [job(tiny, "dpo", tmp_path / "run", "uneven_deal", micro_batch_tokens=1, rank_timeout=5.0)]
    codes = launcher.codes(2, jobs, tmp_path / "jobs")
    assert (tmp_path / "run/run.json").exists()  # it had begun
    assert any(codes) and not (tmp_path / "run/result.json").exists()


def test_compiled_layers_on_ranks(tiny, launcher, tmp_path):
    """With torch.compile's code generator. An update of 12 pairs; nothing but its rows is long enough."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("no C++ compiler")
    update = dict(batch_size=12, epochs=3.0, eval_rows=1, center=False)
    runs = {ranks: tmp_path / f"run_{ranks}" for ranks in (0, 2)}
    for ranks, run in runs.items():
        jobs = [job(tiny, "rm", run, "short_rows_too", compile=True, **update)]
        jobs.append({"measure": "compiled", "of": {}})
        _, graphs = launcher.run(ranks, jobs, tmp_path / "jobs")
        assert min(graphs) >= 2  # two halves of a layer
        assert distance(run, tiny.run(train_rm, **update)) < CLOSE
    assert distance(runs[0], runs[2]) < CLOSE


@pytest.mark.parametrize("line, error", [
    (["data/toy.py"], "this script has no work to share between ranks: start it without torchrun"),
    (["train_sft.py", "--data_dir={world}/data", "--model={world}/policy", "--batch_size=1"],
     "2 ranks share the 1 prompts of an optimizer step: each needs one; start fewer (--nproc_per_node) or "
     "raise --batch_size"),
], ids=["data/toy.py", "train_sft.py"])
def test_what_is_refused_is_told_once(tiny, launcher, tmp_path, line, error):
    line = [word.format(world=tiny.root) for word in line]
    jobs = [{"line": [*line, f"--out_dir={tmp_path / 'out'}"]}]
    codes = launcher.codes(2, jobs, tmp_path / "jobs")
    assert codes == [2, -signal.SIGKILL]
    told = [text for rank in (0, 1) for text in said(tmp_path / "jobs", rank).splitlines()]
    assert told == [f"error: {error}"]
    assert not (tmp_path / "out").exists()
