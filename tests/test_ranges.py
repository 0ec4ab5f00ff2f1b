"""Numbers that no script takes, options that warn, failures that say what to do."""

import errno
import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from faults import ALL, call, call_with, config
from own import lines_of

import evaluate
import train_rloo
import train_rm
import train_sft
import train_simpo
from evaluation.judges import ScoreJudge
from rlhf.common import optimizer_step
from rlhf.config import RANGES, RunError, UserError, check_ranges
from rlhf.pretrained import from_pretrained, load_tokenizer, save_pretrained
from study import plot, results

# --- numbers


def numbers(cls) -> list[str]:
    kinds = (int, float, float | None, int | None)
    return [field.name for field in fields(cls) if field.type in kinds]


@pytest.mark.parametrize("script", [*ALL, plot, results], ids=lambda script: script.__name__)
def test_every_number_has_a_range(script, capsys, monkeypatch):
    """And what is outside of it, or not finite, ends with code 2 before anything is read."""
    required = ("data_dir", "model", "reward_model", "out_dir", "runs", "train", "tokenizer", "models")
    given = [f"--{f.name}=nowhere" for f in fields(script.Config) if f.name in required]
    for name in numbers(script.Config):
        assert name in RANGES, f"{script.__name__} --{name} has no range in config.py"
        below = {"[0, inf)": "-1", "(0, inf)": "0", "(-inf, inf)": "nan"}.get(RANGES[name], "-7")
        above = RANGES[name].split(", ")[1][:-1]
        beyond = {
            "1": ["7"],
            "0.5": ["7"],
            "inf": ["inf", "1e999"] if RANGES[name].endswith(")") else [],
        }.get(above, [])
        for value in (below, "nan", "-inf", "abc", "", *beyond):
            code, line = call_with(script, [*given, f"--{name}={value}"], capsys, monkeypatch)
            assert code == 2 and f"--{name}" in line and "error: " in line, (name, value, line)


def test_ranges_hold_in_process_too(world, tmp_path):
    for script, changes in (
        (train_sft, {"batch_size": 0}),
        (train_rm, {"max_grad_norm": -1.0}),
        (train_rloo, {"episodes": 0}),
        (train_simpo, {"label_smoothing": 2.0}),
        (train_simpo, {"beta": -1.0}),
        (evaluate, {"judge_max_cost": float("nan")}),
    ):
        with pytest.raises(UserError, match=f"--{next(iter(changes))}=.* must be "):
            script.main(config(world, script, tmp_path / "run", **changes))
    check_ranges(config(world, train_simpo, tmp_path / "run"))


def test_top_p_warns(world, tmp_path, capsys):
    train_rloo.main(config(world, train_rloo, tmp_path / "run", top_p=0.9))
    assert "warning: --top_p=0.9" in capsys.readouterr().err


def test_the_last_line_of_a_failed_run_is_its_error(world, tmp_path, capsys, monkeypatch):
    def fail(*args):
        raise RunError("not finite")

    monkeypatch.setattr(train_sft, "set_lr", lambda optimizer, lr: fail() if lr < 0.0009 else None)
    code, line = call(train_sft, config(world, train_sft, tmp_path / "run"), capsys, monkeypatch)
    assert (code, line) == (1, "error: not finite") and len(
        (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ) > 0


def test_out_of_memory_says_what_to_do(world, tmp_path, capsys, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(train_rloo, "pack", full)
    code, line = call(train_rloo, config(world, train_rloo, tmp_path / "run"), capsys, monkeypatch)
    assert code == 1 and "lower --micro_batch_tokens" in line


def test_without_git(world, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    train_sft.main(config(world, train_sft, tmp_path / "run"))
    assert json.loads((tmp_path / "run/run.json").read_text())["commit"] is None


def test_weights_that_are_not_finite_are_neither_read_nor_saved(world, tmp_path):
    model = from_pretrained(str(world / "sft"))
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.bias[3] = float("inf")
    with pytest.raises(RunError, match="final_layer_norm.bias holds numbers that are not finite"):
        save_pretrained(model, load_tokenizer(str(world / "sft")), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_nan_is_no_verdict():
    scores = iter([[1.0, float("nan"), 0.0], [0.0, 1.0, float("nan")]])
    first, second, third = ScoreJudge(lambda posts, summaries: next(scores))([], [], [])
    assert first == 1.0 and second != second and third != third


def test_a_full_disk_and_a_loss_that_is_not_finite_say_how_to_go_on(world, tmp_path, capsys, monkeypatch):
    """A resumed run would meet the same batch with the same weights: that is no advice."""
    full = OSError(errno.ENOSPC, "No space left on device", "x")
    monkeypatch.setattr(train_sft, "load_tokenizer", lambda *args: (_ for _ in ()).throw(full))
    code, line = call(train_sft, config(world, train_sft, tmp_path / "run"), capsys, monkeypatch)
    assert code == 1 and line.endswith("make room and run it again (with --resume where the script has it)")
    with pytest.raises(RunError, match="start anew with a lower --lr .* --model=.*ckpt/step_N"):
        optimizer_step(torch.nn.Linear(1, 1), None, float("nan"), 0.0, 3)


def test_one_model_for_another_and_tables_that_are_not_there(world, tmp_path):
    own = Path(shutil.copytree(world / "data", tmp_path / "own"))
    (own / "pairs_train.parquet").unlink()
    (own / "rankings_train.parquet").unlink()
    for script, changes, said in (
        (train_rloo, {"model": str(world / "rm")}, "rm: is a reward model, not a language model"),
        (train_rloo, {"reward_model": str(world / "sft")}, "sft: is a language model, not a reward model"),
        (train_rm, {"data_dir": str(own)}, "no such table .* prompt, chosen and rejected: see"),
        (train_simpo, {"data_dir": str(own), "loss": "simpo_pl"}, "no such table .* a prompt and responses"),
    ):
        with pytest.raises(UserError, match=said):
            script.main(config(world, script, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_policy_that_never_ends_is_told_once(world, tmp_path, capsys):
    """Then all scores are the penalty, all advantages 0."""
    train_rloo.main(config(world, train_rloo, tmp_path / "ends", response_tokens=30))
    assert "ended (EOS)" not in capsys.readouterr().err
    silent = Path(shutil.copytree(world / "sft", tmp_path / "sft"))
    model = from_pretrained(str(silent))
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.bias *= -3
    save_pretrained(model, load_tokenizer(str(silent)), silent)
    train_rloo.main(config(world, train_rloo, tmp_path / "run", model=str(silent)))
    assert capsys.readouterr().err.count("warning: no response of this update ended (EOS)") == 1
    assert {line["loss"] for line in lines_of(tmp_path / "run/metrics.jsonl")} == {0.0}
