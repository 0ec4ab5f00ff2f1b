"""What --overwrite and --resume may touch: no input, only a run of the same script, of one process at a
time; and what a resumed run may find: changed inputs, damage, other settings."""

import json
import multiprocessing
import os
import shutil
from dataclasses import replace
from pathlib import Path

import faults
import pyarrow.parquet as pq
import pytest
import torch
from faults import TRAINING, config, flip, outcome, run_of, state_files, unfinished

import evaluate
import train_rloo
import train_rm
import train_sft
import train_simpo
from data import tldr, toy
from rlhf.config import UserError
from rlhf.files import checksum, identity, write_file
from rlhf.out_dir import check_same, enter, lock, replaced, unlock
from study import best_of_n


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    faults.stop_the_clock(monkeypatch)


each_training = pytest.mark.parametrize("script", TRAINING, ids=lambda script: script.__name__)


def test_a_written_file_is_old_or_new(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("old")

    def fail(path):
        path.write_text("ne")
        raise OSError("full")

    with pytest.raises(OSError):
        write_file(file, fail)
    assert file.read_text() == "old"
    write_file(file, "new")
    assert file.read_text() == "new" and [p.name for p in tmp_path.iterdir() if p.suffix == ".json"] == [
        "a.json"
    ]


# --- what --overwrite may touch


@pytest.mark.parametrize(
    "script, changes",
    [
        (train_rm, {"model": "run/train_sft", "out_dir": "run/train_sft"}),
        (train_rm, {"model": "run/train_sft", "out_dir": "run/train_sft/rm"}),
        (train_rm, {"model": "run/train_sft/ckpt/step_00000002", "out_dir": "run/train_sft"}),
        (train_rloo, {"reward_model": "run/train_rm", "out_dir": "run/train_rm"}),
        (train_simpo, {"ref_model": "run/train_sft", "out_dir": "run"}),
        (train_sft, {"out_dir": "data"}),
        (train_sft, {"out_dir": "data/base"}),
        (evaluate, {"model": "run/train_sft", "out_dir": "run/train_sft"}),
        (evaluate, {"model": "run/train_*", "out_dir": "run/train_sft"}),
        (evaluate, {"model": "sft,run/train_sft", "out_dir": "run"}),
        (best_of_n, {"model": "run/train_sft", "out_dir": "run/train_sft"}),
    ],
)
def test_no_input_is_replaced(world, tmp_path, script, changes):
    copy = Path(shutil.copytree(world, tmp_path / "world"))
    before = faults.state_of(copy)
    paths = {key: ",".join(str(copy / part) for part in value.split(",")) for key, value in changes.items()}
    with pytest.raises(UserError, match="which is read: choose another --out_dir"):
        script.main(replace(config(copy, script, copy), **paths, overwrite=True))
    assert faults.state_of(copy) == before


def test_only_a_run_of_the_same_script_is_replaced(world, tmp_path):
    run = run_of(world, train_sft, tmp_path)
    before = faults.state_of(run)
    for script in (train_rm, train_rloo, evaluate, best_of_n):
        with pytest.raises(UserError, match="is a run of train_sft.py"):
            script.main(config(world, script, run, overwrite=True))
    with pytest.raises(UserError, match="give one of them"):
        train_sft.main(config(world, train_sft, run, overwrite=True, resume=True))
    with pytest.raises(UserError, match="is a run, no prepared data"):
        toy.main(toy.Config(out_dir=str(run), overwrite=True))
    with pytest.raises(UserError, match="holds data of another world"):
        tldr.main(
            tldr.Config(
                out_dir=str(world / "data"),
                overwrite=True,
                source=str(tmp_path / "run"),
                tokenizer=str(world / "sft"),
            )
        )
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        train_sft.main(config(world, train_sft, tmp_path / "file", overwrite=True))
    assert faults.state_of(run) == before


def test_a_replaced_run_is_kept_until_the_new_one_has_something_to_show(world, tmp_path):
    run = run_of(world, train_sft, tmp_path)
    before = outcome(run)
    cfg = config(world, train_sft, run, overwrite=True)

    def stop(operation, path):
        if path.name == "metrics.jsonl":
            raise faults.Killed

    for _ in range(2):  # the second time there is a new run that came to nothing
        with faults.watched(tmp_path, stop), pytest.raises(faults.Killed):
            train_sft.main(cfg)
        assert outcome(replaced(run)) == before and not (run / "ckpt").exists()
    train_sft.main(cfg)
    assert outcome(run) == before and not replaced(run).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_scripts_without_checkpoints(world, tmp_path):
    cfg = config(world, evaluate, tmp_path / "run")
    out = tmp_path / "run"

    def open_directory(config, **options):
        enter(config, check_same(config, **options))
        return json.loads((out / "run.json").read_text())

    assert open_directory(cfg, may_change={"resume", "overwrite"})["script"] == "evaluate"
    with pytest.raises(UserError, match="exists: continue it with --resume"):
        open_directory(cfg, may_change=set())
    with pytest.raises(UserError, match="--n was 2, is 3"):
        open_directory(replace(cfg, n=3), may_change={"resume"}, go_on=True)
    written = (out / "run.json").read_bytes()
    open_directory(replace(cfg, resume=True), may_change={"resume"})
    assert (out / "run.json").read_bytes() == written
    assert open_directory(replace(cfg, n=3, overwrite=True), may_change=set())["config"]["n"] == 3


def hold(path: str, ready, done) -> None:
    lock(Path(path))
    ready.set()
    done.wait(20)


def test_one_process_per_run(world, tmp_path):
    run = unfinished(world, train_sft, tmp_path)
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(str(run), ready, done))
    other.start()
    ready.wait(20)
    before = faults.state_of(run)
    for cfg in (config(world, train_sft, run, resume=True), config(world, train_sft, run, overwrite=True)):
        with pytest.raises(UserError, match="another process is writing this run .*\\.lock"):
            train_sft.main(cfg)
    assert faults.state_of(run) == before
    done.set()
    other.join()
    train_sft.main(config(world, train_sft, run, resume=True))
    unlock(run)


# --- what a resume may find


@pytest.mark.parametrize(
    "script, option, file",
    [
        (train_sft, "data_dir", "sft_train.parquet"),
        (train_rm, "data_dir", "pairs_validation.parquet"),
        (train_rm, "model", "model.safetensors"),
        (train_rloo, "reward_model", "model.safetensors"),
        (train_rloo, "data_dir", "meta.json"),
        (train_simpo, "model", "config.json"),
    ],
)
def test_changed_inputs_are_refused(world, tmp_path, script, option, file):
    copy = Path(shutil.copytree(world, tmp_path / "world"))
    cfg = config(copy, script, tmp_path / "run")
    script.main(cfg)
    (tmp_path / "run/result.json").unlink()
    changed = Path(getattr(cfg, option)) / file
    original = changed.read_bytes()
    if file.endswith(".parquet"):
        pq.write_table(pq.read_table(changed), changed, compression="none")
    else:
        changed.write_bytes(original + b" ")
    before = faults.state_of(tmp_path / "run")
    with pytest.raises(UserError, match=f"--{option}=.* is not what it was .*{file}"):
        script.main(replace(cfg, resume=True))
    assert faults.state_of(tmp_path / "run") == before
    changed.write_bytes(original)
    script.main(replace(cfg, resume=True))


def test_identity_sees_the_ends_and_samples_of_a_large_file(tmp_path):
    file = tmp_path / "large"
    data = bytearray(torch.randint(256, (5_000_000,), dtype=torch.uint8).numpy().tobytes())
    file.write_bytes(data)
    first = identity(file)
    os.utime(file, (1, 1))
    assert identity(file) == first
    for place in (8, len(data) - 8, len(data) * 32 // 65 + 5):
        flip(file, place / (len(data) - 1))
        assert identity(file) != first
        file.write_bytes(data)
    file.write_bytes(data + b"x")
    assert identity(file) != first


@each_training
def test_a_flipped_bit_in_a_checkpoint_is_found_and_the_one_before_resumed(world, script, tmp_path):
    run = unfinished(world, script, tmp_path)
    newest, older = sorted((run / "ckpt").iterdir(), reverse=True)
    files = sorted(path for path in newest.iterdir())
    assert {"model.safetensors", "checksums.json"} < {path.name for path in files} and state_files(newest)
    for file in files:
        for place in (0.1, 0.5, 0.9):
            flip(file, place)
            with pytest.raises(UserError, match=f"remove .*{newest.name} to go on from {older.name}"):
                script.main(config(world, script, run, resume=True))
            flip(file, place)
    shutil.rmtree(newest)
    script.main(config(world, script, run, resume=True))
    assert outcome(run) == outcome(world / "run" / script.__name__)


def test_advice_where_no_other_checkpoint_is_left(world, tmp_path):
    run = unfinished(world, train_sft, tmp_path)
    newest, older = sorted((run / "ckpt").iterdir(), reverse=True)
    for file in state_files(older):
        file.unlink()
    flip(state_files(newest)[0], 0.5)
    with pytest.raises(UserError, match="damaged .* it was the only one: start anew with --overwrite"):
        train_sft.main(config(world, train_sft, run, resume=True))


def test_a_checksum_sees_every_bit(tmp_path):
    file = tmp_path / "file"
    for size in (0, 1, 7, 8, 9, 2**20 + 3):
        file.write_bytes(bytes(size))
        assert checksum(file) == 0
    for place in (0, 5, 2**20 + 2):
        for bit in range(8):
            data = bytearray(2**20 + 3)
            data[place] = 1 << bit
            file.write_bytes(data)
            assert checksum(file) == 1 << (place % 8 * 8 + bit)


def test_settings_that_may_change_at_a_resume(world, tmp_path, capsys):
    run = unfinished(world, train_rloo, tmp_path)
    train_rloo.main(config(world, train_rloo, run, resume=True, rollout_prompts=1, eval_rows=1))
    assert (
        "--eval_rows was 2, is 1: from here on other samples"
        in capsys.readouterr().out
    )
    about = json.loads((run / "run.json").read_text())
    assert about["config"]["rollout_prompts"] == 1
    # --rollout_prompts changes memory and speed, and no sample: no change worth a word
    assert about["changes"] == [{"step": 2, "eval_rows": [2, 1]}]


def test_a_finished_run_is_made_longer(world, tmp_path):
    """Where the learning rate is constant, as if it had been asked for at once; else it says how to go on."""
    for script, length in ((train_rloo, {"episodes": 16}), (train_sft, {"epochs": 2.0})):
        short = config(world, script, tmp_path / f"short_{script.__name__}", schedule="constant")
        script.main(short)
        script.main(replace(short, resume=True, **length))
        whole = config(world, script, tmp_path / f"whole_{script.__name__}", schedule="constant", **length)
        script.main(whole)
        found, expected = (outcome(Path(cfg.out_dir)) for cfg in (short, whole))
        assert found.pop("run.json")[0].pop("changes")[0]["step"] and expected.pop("run.json")
        assert found == expected
        with pytest.raises(UserError, match="was .*, is .* made longer if --schedule=constant"):
            script.main(replace(short, resume=True))  # shorter again
        with pytest.raises(UserError, match="start a new run with --model="):
            script.main(
                config(
                    world, script, run_of(world, script, tmp_path / script.__name__), resume=True, **length
                )
            )


def test_a_finished_run_says_so(world, tmp_path, capsys):
    run = run_of(world, train_sft, tmp_path)
    train_sft.main(config(world, train_sft, run, resume=True))
    assert f"finished already; to train on: a new run with --model={run}" in capsys.readouterr().out


