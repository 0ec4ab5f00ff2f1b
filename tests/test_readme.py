"""What the README shows of a fork is run as printed; what it says of a log is in the log."""

import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import log

import train_rloo

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# What makes the printed commands small; a later option on a command line replaces an earlier one.
SMALL = "--device=cpu --batch_size=4 --eval_rows=2 --save_every=0".split()
SMALL_OF = {
    "train_rloo.py": "--k=4 --batch_size=16 --episodes=32 --ppo_epochs=2".split(),
    "train_simpo.py": [],
}


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def examples(text: str) -> list[tuple[str, str, list[str]]]:
    """(file, code to append to it, words of the command) of every python block, whose first line is `# file`,
    and the bash block after it."""
    found = re.findall(
        r"```python\n# (\S+)\n(.*?)```\n.*?```bash\n(.*?)```", section(text, "How to fork it"), re.S
    )
    return [(file, code, shlex.split(command.replace("\\\n", ""))) for file, code, command in found]


EXAMPLES = examples(README)
each_example = pytest.mark.parametrize("file, code, command", EXAMPLES, ids=[file for file, *_ in EXAMPLES])


def test_the_readme_shows_a_reward_a_loss_and_an_advantage():
    assert {file for file, *_ in EXAMPLES} == {"rlhf/rewards.py", "rlhf/losses.py", "rlhf/policy.py"}
    assert len(EXAMPLES) == section(README, "How to fork it").count("```python")


def test_a_block_without_its_file_or_its_command_is_no_example():
    blocks = "```python\n# a/b.py\nx = 1\n```\nthen\n```bash\npython c.py --d=1 \\\n  --e\n```\n"
    text = f"# Title\n\n## How to fork it\n\n{blocks}\n## Next\n\n{blocks}"
    assert examples(text) == [("a/b.py", "x = 1\n", ["python", "c.py", "--d=1", "--e"])]
    assert examples(text.replace("# a/b.py\n", "")) == examples(text.replace("```bash", "```")) == []


@pytest.fixture(scope="module")
def tree(tiny, tmp_path_factory) -> Path:
    """A clone with the data and the models that the commands name."""
    tree = tmp_path_factory.mktemp("fork") / "clone"
    dirt = shutil.ignore_patterns(".*", "__pycache__", "out", "tests", "docs")
    shutil.copytree(ROOT, tree, ignore=dirt)
    (tree / "out/toy").mkdir(parents=True)
    for name, made in (("data", "data"), ("sft", "policy"), ("rm", "rm")):
        (tree / "out/toy" / name).symlink_to(tiny.root / made)
    return tree


@each_example
def test_a_fork_runs_as_printed(tree, file, code, command):
    python, script, *options = command
    assert python == "python"
    original = (tree / file).read_text()
    (tree / file).write_text(f"{original}\n\n{code}")
    small = [*SMALL, *SMALL_OF[script]]
    done = subprocess.run(
        [sys.executable, script, *options, *small], capture_output=True, text=True, cwd=tree
    )
    (tree / file).write_text(original)
    assert done.returncode == 0, done.stderr
    (out_dir,) = [option.split("=")[1] for option in options if option.startswith("--out_dir=")]
    lines = log(tree / out_dir)
    assert len(lines) >= 2 and all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[0]["grad_norm"] > 0
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(
        (tree / out_dir / "result.json").read_text()
    )


@each_example
def test_without_the_fork_its_name_is_unknown(tree, file, code, command, monkeypatch, capsys):
    """Else the run above would say nothing of the block."""
    _, script, *options = command
    monkeypatch.chdir(tree)
    monkeypatch.setattr(sys, "argv", [script, *options, "--out_dir=out/unknown", "--device=cpu"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    (name,) = re.findall(r'\["(\w+)"\] = ', code)
    assert stop.value.code == 2 and re.search(rf"error: --\w+={name}.*known", capsys.readouterr().err)


def test_the_line_for_several_devices_runs_as_printed(tree):
    (command,) = re.findall(r"```bash\n(torchrun .*?)```", section(README, "Several devices"), re.S)
    _, *words = shlex.split(command.replace("\\\n", ""))
    line = [sys.executable, "-m", "torch.distributed.run", *words, *SMALL, *SMALL_OF["train_rloo.py"]]
    done = subprocess.run(
        line, capture_output=True, text=True, cwd=tree, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    (out_dir,) = [word.split("=")[1] for word in words if word.startswith("--out_dir=")]
    assert len(log(tree / out_dir)) == 2
    assert json.loads((tree / out_dir / "run.json").read_text())["ranks"] == 2


# --- the table of metrics


def described() -> set[str]:
    """The names in the first column of the table, as patterns."""
    rows = re.findall(r"^\| (`.*?`) \|", section(README, "Every metric of RLOO"), re.M)
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    return {re.sub(r"<\w+>|\*", r"[\\w]+", name) for name in names}


def test_every_metric_is_described_and_every_described_metric_is_logged(tiny):
    line = log(tiny.run(train_rloo))[0]
    assert len(described()) > 20
    unnamed = {key for key in line if not any(re.fullmatch(name, key) for name in described())}
    assert unnamed <= {"step", "episode", "seconds"}
    assert not {name for name in described() if not any(re.fullmatch(name, key) for key in line)}
