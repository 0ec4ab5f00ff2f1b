"""Own rewards: a function in place of a reward model, samples of what it scored, and the README's commands
from own rows to a trained policy; logs for other programs."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from own import LINES, lines_of, rloo
from safetensors.torch import load_file

from rlhf.config import RunError, UserError
from rlhf.data import read_table
from rlhf.pretrained import from_pretrained

ROOT = Path(__file__).resolve().parents[1]

# --- own rewards


REWARD = """
import math

def brief(prompts, texts):
    return [-len(text) / 10 + ("cat" in prompt) for prompt, text in zip(prompts, texts)]

def broken(prompts, texts):
    raise KeyError("no such\\nword")

def short(prompts, texts):
    return [1.0] * (len(texts) - 1)

def words(prompts, texts):
    return "good"

def holes(prompts, texts):
    return [1.0] * (len(texts) - 1) + [math.nan]

calls = 0
def stops(prompts, texts):
    global calls
    calls += 1
    return [math.inf if calls == 7 else 1.0 * len(text) for text in texts]  # each update calls twice

number = 3
"""


@pytest.fixture
def reward_file(prepare, models):
    prepare({"a.jsonl": LINES})
    Path("reward.py").write_text(REWARD)


@pytest.mark.parametrize("name, said", [
    ("reward.py", "expected file.py:function"),
    ("reward.txt:brief", "expected file.py:function"),
    ("nowhere.py:brief", "no such file: nowhere.py"),
    ("reward.py:missing", r"no function missing in .*reward.py \(functions there: brief, broken,"),
    ("reward.py:number", "no function number"),
    ("syntax.py:f", "syntax.py cannot be imported: SyntaxError"),
    ("imports.py:f", "imports.py cannot be imported: ModuleNotFoundError in line 2: .*'nowhere_at_all'"),
])
def test_a_reward_function_that_cannot_be_had(reward_file, name, said):
    Path("syntax.py").write_text("def f(:")
    Path("imports.py").write_text("\nimport nowhere_at_all")
    with pytest.raises(UserError, match=f"--reward_fn={name.split(':')[0]}.*{said}"):
        rloo(reward_fn=name)
    assert not Path("rloo").exists()


@pytest.mark.parametrize("name, said", [
    ("broken", r"broken raised KeyError in line 8: 'no such\\nword', for 8 texts, .* response to 'the cat"),
    ("short", r"short returned the shape \(7,\) for 8 texts, .* answers 'the cat"),
    ("words", "words returned 'good', no list of 8 numbers, .* answers 'the cat"),
    ("holes", "holes returned nan for the text '.*, a response to 'the cat"),
])
def test_a_reward_function_that_fails_is_named_with_the_prompt(reward_file, name, said):
    with pytest.raises(RunError, match=f"{said}.*mend it and continue with --resume"):
        rloo(reward_fn=f"reward.py:{name}")


def test_one_reward(reward_file):
    for rewards in ({}, {"reward_model": "rm", "reward_fn": "reward.py:brief"}):
        with pytest.raises(UserError, match="give --reward_model or --reward_fn, one of the two"):
            rloo(**rewards)


def test_a_run_with_a_function_is_resumed_where_it_failed(reward_file):
    """The same numbers as without the failure, and no line of samples twice."""
    options = dict(reward_fn="reward.py:stops", save_every=2, samples_every=1)
    Path("reward.py").write_text(REWARD.replace("calls == 7", "False"))
    rloo(**options, out_dir="whole")
    Path("reward.py").write_text(REWARD)
    with pytest.raises(RunError, match="stops returned inf"):
        rloo(**options)
    assert [line["step"] for line in lines_of("rloo/samples.jsonl")] == [1, 2, 3]
    rloo(**options, resume=True)
    assert lines_of("rloo/samples.jsonl") == lines_of("whole/samples.jsonl")
    scores = [[line["scores"] for line in lines_of(f"{run}/metrics.jsonl")] for run in ("rloo", "whole")]
    assert scores[0] == scores[1] and len(scores[0]) == 4


def test_a_function_may_be_mended_before_the_resume(reward_file, capsys):
    """What the error advises; a reward model that is another is refused."""
    with pytest.raises(RunError, match="stops returned inf.* mend it and continue with --resume"):
        rloo(reward_fn="reward.py:stops", save_every=1, samples_every=1)
    Path("reward.py").write_text(REWARD.replace("calls == 7", "False"))
    rloo(reward_fn="reward.py:stops", save_every=1, samples_every=1, resume=True)
    assert "--reward_fn=reward.py:stops has changed since the run began" in capsys.readouterr().out
    assert [line["step"] for line in lines_of("rloo/metrics.jsonl")] == [1, 2, 3, 4]


def test_samples_show_what_was_scored(reward_file):
    rloo(reward_fn="reward.py:brief", samples_every=3, missing_eos="none", reward="kl:0.5")
    lines = lines_of("rloo/samples.jsonl")
    assert [line["step"] for line in lines] == [1, 4]
    (prompt,) = read_table("data", "sft_validation", ["query"])["query"]  # a look at the same prompt again
    for line in lines:
        assert line["prompt"] == prompt and len(line["responses"]) == 2
        for response in line["responses"]:
            assert response["score"] == pytest.approx(-len(response["text"]) / 10 + 1, rel=1e-6)
            assert response.keys() == {"text", "score", "reward", "ended"}
            assert response["ended"] in (True, False)
    terms = [[r["reward"] - r["score"] for r in line["responses"]] for line in lines]
    assert not any(terms[0]) and any(terms[1])  # the KL is 0 before the first update


def test_a_look_at_samples_changes_no_number(reward_file):
    for every in (0, 1):
        rloo(reward_fn="reward.py:brief", samples_every=every, out_dir=f"every_{every}")
    logs = [lines_of(f"every_{n}/metrics.jsonl") for n in (0, 1)]
    numbers = [[{k: v for k, v in line.items() if "second" not in k} for line in log] for log in logs]
    assert numbers[0] == numbers[1] and not Path("every_0/samples.jsonl").exists()
    a, b = (load_file(f"every_{n}/model.safetensors") for n in (0, 1))
    assert all(a[name].equal(b[name]) for name in a)


# --- from the README


def readme_block(language: str, holds: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return next(block for block in blocks if holds in block)


def run_script(command: str, more: str, monkeypatch) -> None:
    """A command of the README in this process, as `python` would run it, with some options after its own."""
    python, script, *options = shlex.split(command)
    assert python == "python"
    monkeypatch.setattr(sys, "argv", [script, *options, *more.split()])
    runpy.run_path(str(ROOT / script), run_name="__main__")


def test_own_data_and_own_reward_by_the_commands_of_the_readme(prepare, models, monkeypatch, capsys):
    shown = readme_block("jsonl", "prompt")
    others = [{"prompt": f"Q: Which animal is number {i}?\nA:", "response": " A dog is."} for i in range(40)]
    Path("answers.jsonl").write_text(shown + "".join(json.dumps(row) + "\n" for row in others))
    Path("reward.py").write_text(readme_block("py", "def brief"))
    commands = readme_block("bash", "--reward_fn=").replace("EleutherAI/pythia-160m", "model").splitlines()
    scripts = [shlex.split(command)[1] for command in commands]
    assert scripts == ["data/jsonl.py", "train_sft.py", "train_rloo.py"]
    more = ["", "--batch_size=8 --eval_rows=2", "--batch_size=8 --episodes=16 --eval_rows=2"]
    for command, options in zip(commands, more):
        run_script(command, options, monkeypatch)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["out_dir"] == "out/own/rloo" and result["scores"] < 1
    first = lines_of("out/own/rloo/metrics.jsonl")[0]
    sampled = lines_of("out/own/rloo/samples.jsonl")[0]
    namespace = {}
    exec(Path("reward.py").read_text(), namespace)
    texts = [response["text"] for response in sampled["responses"]]
    expected = namespace["brief"]([sampled["prompt"]] * len(texts), texts)
    given = [r["score"] if r["ended"] else e for r, e in zip(sampled["responses"], expected)]
    assert given == pytest.approx(expected) and len(texts) == 4
    assert "scores_over_reference" not in first and first["raw_scores"] < 1
    from_pretrained("out/own/rloo")


# --- logs elsewhere


def test_trackers_get_the_lines_of_the_log(reward_file, monkeypatch):
    """Stand-ins for the two packages: what they are given is what metrics.jsonl has, also after a resume."""
    got = {"wandb": [], "tensorboard": []}
    opened = []

    def init(**options):
        opened.append(options)
        log = lambda numbers, step: got["wandb"].append({"step": step, **numbers})  # noqa: E731
        return SimpleNamespace(log=log)

    class SummaryWriter:
        def __init__(self, directory, purge_step):
            opened.append((directory, purge_step))

        def add_scalar(self, name, number, step):
            got["tensorboard"].append((step, name, number))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    with pytest.raises(RunError, match="stops returned inf"):
        rloo(reward_fn="reward.py:stops", wandb="mine", tensorboard=True, samples_every=1)
    lines = lines_of("rloo/metrics.jsonl")
    assert got["wandb"] == lines and len(lines) == 3
    assert got["tensorboard"][:2] == [(1, "episode", 8), (1, "scores", lines[0]["scores"])]
    rloo(reward_fn="reward.py:brief", wandb="mine", tensorboard=True, out_dir="other")
    rloo(reward_fn="reward.py:stops", wandb="mine", tensorboard=True, resume=True)
    assert opened[1::2] == [("rloo/tensorboard", 1), ("other/tensorboard", 1), ("rloo/tensorboard", 3)]
    first, other, again = opened[::2]
    assert first["id"] == again["id"] != other["id"]
    assert again["resume"] == "allow" and first["project"] == "mine"


@pytest.mark.parametrize("name, module", [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_tracker_is_told_before_the_run(reward_file, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"--{name} needs a package: pip install {name}"):
        rloo(reward_fn="reward.py:brief", **{name: "x"})
    assert not Path("rloo").exists()
