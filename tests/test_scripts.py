"""The scripts themselves, in process, on a tiny toy world: they run, resume to the same weights, do not
depend on the micro-batch, open in transformers, and refuse bad input with one clear line and nothing
overwritten."""

import importlib
import json
import math
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import MISSING, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import rlhf.policy
import train_online
import train_rloo
import train_rm
import train_sft
import train_simpo
from data import toy
from rlhf.config import RunError, UserError
from rlhf.generate import generate
from rlhf.groups import pack
from rlhf.losses import PREFERENCE_LOSSES, RANKED, defaults, describe, extras, needs_reference
from rlhf.model import NeoX, NeoXConfig
from rlhf.pretrained import from_pretrained, load_tokenizer, save_pretrained
from rlhf.run import Run
from study.logs import read_columns

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A prepared toy world and a finished run of every training script."""
    out = tmp_path_factory.mktemp("world")
    toy.main(
        toy.Config(
            out_dir=str(out / "data"), posts=96, pairs=64, rankings=32, validation=16, test=8, size="small"
        )
    )
    for script, cfg in configs(out).items():
        script.main(cfg)
    return out


def configs(out: Path) -> dict:
    io = dict(data_dir=str(out / "data"), device="cpu", save_every=2, keep=0)
    return {
        train_sft: train_sft.Config(
            **io, model=str(out / "data/base"), init="scratch", out_dir=str(out / "sft"), lr=3e-3,
            batch_size=24, eval_rows=8,
        ),
        train_rm: train_rm.Config(
            **io, model=str(out / "sft"), out_dir=str(out / "rm"), lr=1e-3, batch_size=16
        ),
        train_rloo: train_rloo.Config(
            **io, model=str(out / "sft"), reward_model=str(out / "rm"), out_dir=str(out / "rloo"), lr=1e-3,
            k=2, batch_size=16, episodes=64, ppo_epochs=2, response_tokens=12, eval_rows=8,
            reward="kl+maxent_length:0.1",
        ),
        train_simpo: train_simpo.Config(
            **io, model=str(out / "sft"), out_dir=str(out / "simpo"), loss="dpo", lr=1e-3, batch_size=16,
            eval_rows=8,
        ),
        train_online: train_online.Config(
            **io, model=str(out / "sft"), reward_model=str(out / "rm"), out_dir=str(out / "online"), lr=1e-3,
            k=4,
            opponent=0.5, label="sampled", epochs=2, round_updates=3, move_reference=True, explore=0.01,
            temperature=1.0, batch_size=32, episodes=128, response_tokens=12, eval_rows=8,
        ),
    }


SCRIPTS = [train_sft, train_rm, train_rloo, train_simpo, train_online]
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)


def again(world: Path, script, out_dir: Path, **changes):
    return replace(configs(world)[script], out_dir=str(out_dir), **changes)


def weights(run: Path | str) -> dict:
    return load_file(Path(run) / "model.safetensors")


def distance(a: Path | str, b: Path | str) -> float:
    """Largest difference between the weights of two runs."""
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys()
    return max((x[k] - y[k]).abs().max().item() for k in x)


def metrics(run: Path | str) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def without_times(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


# --- what a run leaves behind


@each_script
def test_a_run_directory_explains_itself(world, script, capsys):
    run = Path(configs(world)[script].out_dir)
    assert script.main(replace(configs(world)[script], resume=True)) == json.loads(
        capsys.readouterr().out.splitlines()[-1]
    )
    described = json.loads((run / "run.json").read_text())
    assert (
        described["config"]["lr"] == configs(world)[script].lr
        and described["torch"] == torch.__version__
        and "command" in described
    )
    assert [line["step"] for line in metrics(run)] == list(range(1, 5))
    assert all(math.isfinite(v) for line in metrics(run) for v in line.values())
    assert [p.name for p in sorted((run / "ckpt").iterdir())] == ["step_00000002", "step_00000004"]
    assert [(p / "optimizer.safetensors").exists() for p in sorted((run / "ckpt").iterdir())] == [True, True]


@each_script
def test_a_checkpoint_opens_in_transformers_with_the_same_numbers(world, script):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    run = Path(configs(world)[script].out_dir)
    for directory in (run, run / "ckpt/step_00000002"):
        ids = AutoTokenizer.from_pretrained(directory)("POST: i sold red bikes.\n\nTL;DR:")["input_ids"]
        assert (
            ids
            == Tokenizer.from_file(str(directory / "tokenizer.json"))
            .encode("POST: i sold red bikes.\n\nTL;DR:")
            .ids
        )
        groups = pack([ids], [[[5, 6, 0]]], max_positions=256)
        row = torch.tensor([ids + [5, 6, 0]])
        with torch.no_grad():
            if script is train_rm:
                theirs = AutoModelForSequenceClassification.from_pretrained(directory)(row).logits[0, 0]
                model = from_pretrained(str(directory), head="score")
                ours = model.scores(model(groups.ids, groups.positions, groups.attend)[groups.last])[0, 0]
            else:
                peer = AutoModelForCausalLM.from_pretrained(directory)
                theirs, model = peer(row).logits[0], from_pretrained(str(directory))
                ours = model.embed_out(model(groups.ids, groups.positions, groups.attend))
                tokens = generate(model, [ids], 1, 10, temperature=0)[0][0][0]
                assert (
                    tokens
                    == peer.generate(torch.tensor([ids]), max_new_tokens=10, do_sample=False, pad_token_id=1)[
                        0, len(ids) :
                    ].tolist()
                )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_results_hold_the_numbers_they_promise(world):
    result = {s: json.loads((Path(configs(world)[s].out_dir) / "result.json").read_text()) for s in SCRIPTS}
    assert {"eval/loss", "greedy/rougeL", "greedy/gold", "greedy/tokens", "greedy/eos_share"} <= result[
        train_sft
    ].keys()
    assert {"accuracy", "longer_wins_accuracy", "pairs"} <= result[train_rm].keys() and result[train_rm][
        "pairs"
    ] == 16
    assert {"scores", "kl", "greedy/gold"} <= result[train_rloo].keys()
    assert {"eval/loss", "eval/accuracies", "eval/ref_margin", "greedy/gold"} <= result[train_simpo].keys()
    assert {"scores", "kl", "entropy", "greedy/gold"} <= result[train_online].keys()


def test_reward_model_has_mean_zero_on_the_references(world):
    model = from_pretrained(str(world / "rm"), head="score")
    table = pq.read_table(world / "data/sft_train.parquet").to_pydict()
    groups = pack(table["query_token"], [[r] for r in table["reference_response_token"]], max_positions=256)
    with torch.no_grad():
        scores = model.scores(model(groups.ids, groups.positions, groups.attend)[groups.last])
    assert abs(scores.mean().item()) < 1e-5 and scores.std().item() > 1e-3


# --- identities


def test_dpo_starts_at_ln_2_and_rloo_at_kl_zero(world):
    first = metrics(world / "simpo")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["margins"] == pytest.approx(
        0, abs=1e-5
    )
    first, second = metrics(world / "rloo")[:2]
    assert first["kl"] == pytest.approx(0, abs=1e-4) and first["kl_full"] == pytest.approx(0, abs=1e-4)
    assert second["kl_full"] > 1e-4, "after an update the policy is not the reference any more"
    assert first["kl_prev/k3"] > 1e-6


def test_metrics_of_rloo_agree_with_each_other(world):
    for line in metrics(world / "rloo"):
        expected = line["scores"] + 0.05 * line["bonus/kl"] + 0.1 * line["bonus/maxent_length"]
        assert line["rlhf_reward"] == pytest.approx(expected, abs=1e-5)
        assert line["bonus/kl"] == pytest.approx(-line["kl"], abs=1e-4)
        assert line["bonus/maxent_length"] == pytest.approx(line["length_normalized_surprisal"], abs=1e-5)
        assert line["reward/kl"] == pytest.approx(0.05 * line["bonus/kl"], abs=1e-6)
        assert line["reward/maxent_length"] == pytest.approx(0.1 * line["bonus/maxent_length"], abs=1e-6)
        assert (
            line["kl_full"] > -1e-5
            and line["kl_k3"] >= 0
            and 0 <= line["eos_share"] <= 1
            and 1 <= line["response_length"] <= 12
        )


@pytest.mark.parametrize("factor, known", [(1e23, True), (math.inf, False)])
@pytest.mark.parametrize("ppo_epochs", [1, 2])
def test_the_log_is_json_whatever_the_ratios_are(world, tmp_path, monkeypatch, ppo_epochs, factor, known):
    """A ratio of 1e23 has a variance, an infinite one has none: null. Neither word of Python, Infinity and
    NaN, is JSON."""
    def far(*args, **options):
        losses, stats = rlhf.policy.clipped_policy_loss(*args, **options)
        return losses, {**stats, "ratio": stats["ratio"] * factor}

    monkeypatch.setitem(rlhf.policy.POLICY_LOSSES, "sequence", far)
    train_rloo.main(again(world, train_rloo, tmp_path / "run", episodes=16, ppo_epochs=ppo_epochs))
    text = (tmp_path / "run/metrics.jsonl").read_text()
    (line,) = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert (line["ratio"] is not None) == (line["ratio_var"] is not None) == known
    if known and ppo_epochs == 1:
        # every ratio is 1e23: the rest is rounding
        assert line["ratio"] == pytest.approx(1e23) and abs(line["ratio_var"]) < 1e36
    assert math.isnan(read_columns(tmp_path / "run/metrics.jsonl")["ratio_var"][0]) != known


@each_script
def test_the_micro_batch_does_not_change_the_result(world, script, tmp_path):
    script.main(again(world, script, tmp_path / "run", micro_batch_tokens=150))
    # AdamW turns rounding noise of tiny gradients into steps
    assert distance(tmp_path / "run", configs(world)[script].out_dir) < 2e-4
    one, other = metrics(tmp_path / "run")[0], metrics(configs(world)[script].out_dir)[0]
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-5) and one["grad_norm"] == pytest.approx(
        other["grad_norm"], rel=1e-4
    )


@each_script
def test_gradient_checkpointing_does_not_change_the_result(world, script, tmp_path):
    script.main(again(world, script, tmp_path / "run", gradient_checkpointing=True))
    assert metrics(tmp_path / "run")[0]["grad_norm"] == pytest.approx(
        metrics(configs(world)[script].out_dir)[0]["grad_norm"], rel=1e-5
    )


@each_script
def test_bfloat16_products_change_it_a_little(world, script, tmp_path):
    script.main(again(world, script, tmp_path / "run", dtype="bfloat16"))
    assert 0 < distance(tmp_path / "run", configs(world)[script].out_dir) < 0.1


# What train_simpo.py has the options and the data for.
LOSSES = [name for name, loss in PREFERENCE_LOSSES.items()
          if not extras(loss) and defaults(loss).keys() <= train_simpo.Config.__dataclass_fields__.keys()]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_offline_loss_trains(world, tmp_path, loss):
    rows = 32 if loss in RANKED else 64
    result = train_simpo.main(again(world, train_simpo, tmp_path / "run", loss=loss, batch_size=16))
    assert len(metrics(tmp_path / "run")) == rows // 16 and math.isfinite(result["eval/loss"])


@pytest.mark.parametrize("loss", [name for name in LOSSES if needs_reference(PREFERENCE_LOSSES[name])])
def test_a_reference_with_a_head_of_its_own_in_bfloat16(world, tmp_path, loss):
    """Pythia's embeddings are not tied, so a frozen model's head is kept in bfloat16."""
    config = NeoXConfig.from_dict(
        {**json.loads((world / "sft/config.json").read_text()), "tie_word_embeddings": False}
    )
    save_pretrained(NeoX(config).init_weights(0), load_tokenizer(str(world / "sft")), tmp_path / "untied")
    result = train_simpo.main(
        again(
            world, train_simpo, tmp_path / "run", model=str(tmp_path / "untied"), loss=loss, dtype="bfloat16",
            lr=1e-4,
        )
    )
    assert math.isfinite(result["eval/loss"]) and math.isfinite(result["eval/logits/chosen"])


def test_gamma_and_its_ratio_are_one_number(world, tmp_path):
    for name, option in (("a", {"gamma": 1.0}), ("b", {"gamma_beta_ratio": 0.5}), ("c", {"gamma": 0.5})):
        train_simpo.main(again(world, train_simpo, tmp_path / name, loss="simpo", beta=2.0, **option))
    assert distance(tmp_path / "a", tmp_path / "b") == 0 and distance(tmp_path / "a", tmp_path / "c") > 0


# --- interruption


@pytest.mark.parametrize("last", [1, 3])  # before the first checkpoint, which is of step 2, and after it
@each_script
def test_killed_and_resumed_equals_uninterrupted(world, script, last, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    log = Run.log

    def log_then_die(self, step, *args, **kwargs):
        log(self, step, *args, **kwargs)
        if step == last:
            raise Killed

    monkeypatch.setattr(Run, "log", log_then_die)
    with pytest.raises(Killed):
        script.main(again(world, script, tmp_path / "run"))
    monkeypatch.setattr(Run, "log", log)
    assert len(metrics(tmp_path / "run")) == last and not (tmp_path / "run/model.safetensors").exists()
    (tmp_path / "run/ckpt/writing").mkdir(parents=True)  # what a kill in the middle of a checkpoint leaves
    (tmp_path / "run/ckpt/writing/model.safetensors").write_bytes(b"half")
    script.main(again(world, script, tmp_path / "run", resume=True))
    assert distance(tmp_path / "run", configs(world)[script].out_dir) == 0
    assert without_times(metrics(tmp_path / "run")) == without_times(metrics(configs(world)[script].out_dir))


def test_resume_refuses_other_settings_and_a_damaged_checkpoint(world, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(world / "sft", run)
    (run / "result.json").unlink()
    with pytest.raises(UserError, match="--lr was 0.003, is 0.1"):
        train_sft.main(again(world, train_sft, run, resume=True, lr=0.1))
    state = run / "ckpt/step_00000004/optimizer.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(UserError, match="optimizer.safetensors"):
        train_sft.main(again(world, train_sft, run, resume=True))
    weights_file = run / "ckpt/step_00000004/model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:1000])
    with pytest.raises(UserError, match="model.safetensors: damaged"):
        train_sft.main(again(world, train_sft, run, resume=True))


# --- bad input


def broken_data(world: Path, tmp_path: Path, name: str, change) -> str:
    """A copy of the data with one table changed by `change(list of rows)`."""
    shutil.copytree(world / "data", tmp_path / "data")
    path = tmp_path / "data" / f"{name}.parquet"
    table = pq.read_table(path)
    pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), table.schema), path)
    return str(tmp_path / "data")


@pytest.mark.parametrize(
    "script, changes, message",
    [
        (train_rloo, dict(k=1), "at least 2"),
        (train_rloo, dict(batch_size=15), "not divisible"),
        (train_rloo, dict(reward="entropy"), "--reward=entropy: no term 'entropy'"),
        (train_rloo, dict(advantage="gae"), "known are rloo, grpo"),
        (train_rloo, dict(reward_model="./missing"), "no such directory"),
        (train_rloo, dict(response_tokens=250), "the model.s context"),
        (train_simpo, dict(loss="kto"), "known are dpo"),
        (train_simpo, dict(loss="simpo", gamma=1.0, gamma_beta_ratio=0.5), "give one of them"),
        (
            train_simpo, dict(gamma=1.0),
            "--gamma: the loss dpo has none; these have it: simpo, simpo_pl, dpo_length",
        ),
        (train_simpo, dict(gamma_beta_ratio=0.5), "--gamma: the loss dpo has none"),
        (train_sft, dict(batch_size=1000), "no update to make"),
        (train_sft, dict(data_dir="nowhere"), "no prepared data there"),
        (train_sft, dict(device="cuda:77"), "--device=cuda:77"),
        (train_rm, dict(model="out/nowhere"), "no such directory"),
    ],
)
def test_bad_options_are_named(world, tmp_path, script, changes, message):
    with pytest.raises(UserError, match=message):
        script.main(again(world, script, tmp_path / "run", **changes))
    assert not (tmp_path / "run/model.safetensors").exists()


def test_a_language_model_is_not_taken_for_a_reward_model(world, tmp_path):
    with pytest.raises(UserError, match="not a reward model"):
        train_rloo.main(again(world, train_rloo, tmp_path / "run", reward_model=str(world / "sft")))


def test_bad_data_is_named(world, tmp_path):
    same = broken_data(
        world, tmp_path / "a", "pairs_train",
        lambda rows: [{**rows[0], "rejected_token": rows[0]["chosen_token"]}] + rows[1:],
    )
    for script in (train_rm, train_simpo):
        with pytest.raises(UserError, match="chosen equals rejected in 1 rows, the first is row 0"):
            script.main(again(world, script, tmp_path / "run", data_dir=same))
    empty = broken_data(world, tmp_path / "b", "sft_train", lambda rows: [])
    with pytest.raises(UserError, match="sft_train.parquet: the table is empty"):
        train_sft.main(again(world, train_sft, tmp_path / "run", data_dir=empty))
    long = broken_data(
        world, tmp_path / "c", "sft_train",
        lambda rows: [{**row, "query_token": row["query_token"] * 20} for row in rows],
    )
    with pytest.raises(UserError, match="the model.s context"):
        train_rloo.main(again(world, train_rloo, tmp_path / "rloo", data_dir=long))
    (tmp_path / "c/data/sft_train.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="not a readable parquet file"):
        train_sft.main(again(world, train_sft, tmp_path / "sft", data_dir=long))


@pytest.mark.parametrize("script, table, row, changes, column", [
    (train_sft, "sft_train", 95, {}, "reference_response_token"),
    (train_sft, "sft_validation", 7, {}, "query_token"),
    (train_rm, "pairs_train", 63, {}, "rejected_token"),
    (train_rm, "pairs_validation", 15, {}, "chosen_token"),
    (train_rm, "sft_train", 95, {}, "reference_response_token"),
    (train_simpo, "pairs_train", 63, {}, "chosen_token"),
    (train_simpo, "rankings_train", 31, {"loss": "simpo_pl", "batch_size": 8}, "responses_token"),
    (train_simpo, "pairs_validation", 7, {}, "rejected_token"),
    (train_simpo, "sft_validation", 7, {}, "query_token"),
    (train_rloo, "sft_train", 95, {}, "query_token"),
    (train_rloo, "sft_validation", 7, {}, "query_token"),
])
def test_a_row_that_is_too_long_is_named_before_the_first_step(
    world, tmp_path, monkeypatch, script, table, row, changes, column
):
    """The last row that is used gets one token more than the context (256) has room for; with exactly as many
    as fit it is used."""
    def grown(extra: int):
        def change(rows: list[dict]) -> list[dict]:
            tokens = rows[row][column][0] if column == "responses_token" else rows[row][column]
            beside = sampled if column == "query_token" else len(rows[row]["query_token"])
            tokens[:0] = [5] * (256 + extra - beside - len(tokens))
            return rows
        return change

    sampled = (
        12 if script is train_rloo else json.loads((world / "data/meta.json").read_text())["response_tokens"]
    )

    long = broken_data(world, tmp_path / "long", table, grown(1))
    said = f"{table}.parquet: row {row} is longer than the model's context \\(256\\): .*; 1 such rows: drop"
    with pytest.raises(UserError, match=said):
        script.main(again(world, script, tmp_path / "run", data_dir=long, **changes))
    assert not (tmp_path / "run").exists()
    fits = broken_data(world, tmp_path / "fits", table, grown(0))
    monkeypatch.setattr(Run, "begin", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        script.main(again(world, script, tmp_path / "run", data_dir=fits, **changes))


def test_a_model_with_another_tokenizer_is_refused(world, tmp_path):
    shutil.copytree(world / "sft", tmp_path / "sft")
    other = json.loads((tmp_path / "sft/tokenizer.json").read_text())
    vocab = other["model"]["vocab"]
    a, b = list(vocab)[300:302]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (tmp_path / "sft/tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="the tokenizer of .* is not the one"):
        train_rm.main(again(world, train_rm, tmp_path / "rm", model=str(tmp_path / "sft")))


def test_resume_on_another_kind_of_device_is_refused(world, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(world / "rloo", run)
    (run / "result.json").unlink()
    for folder in (run / "ckpt").iterdir():
        if (file := folder / "optimizer.safetensors").exists():
            # the size of CUDA's
            save_file({**load_file(file), "generator": torch.zeros(16, dtype=torch.uint8)}, file)
            (folder / "checksums.json").unlink()
    with pytest.raises(UserError, match="another kind of device"):
        train_rloo.main(again(world, train_rloo, run, resume=True))


def test_a_loss_that_is_not_finite_ends_the_run_before_the_step(world, tmp_path):
    shutil.copytree(world / "sft", tmp_path / "sft")
    tensors = load_file(tmp_path / "sft/model.safetensors")
    tensors["gpt_neox.final_layer_norm.weight"][:] = 3e38  # finite, but no sum of two of them is
    save_file(tensors, tmp_path / "sft/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match="step 0: loss (nan|inf|-inf)"):
        train_rm.main(again(world, train_rm, tmp_path / "rm", model=str(tmp_path / "sft")))


def test_an_existing_run_is_not_overwritten(world, tmp_path):
    before = weights(world / "sft")
    with pytest.raises(UserError, match="exists: continue it with --resume"):
        train_sft.main(configs(world)[train_sft])
    assert all((before[k] == v).all() for k, v in weights(world / "sft").items())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("keep me")
    with pytest.raises(UserError, match="no such directory"):
        train_sft.main(replace(configs(world)[train_sft], overwrite=True, model="./nowhere"))
    assert all((before[k] == v).all() for k, v in weights(world / "sft").items()), (
        "bad input, nothing overwritten"
    )
    with pytest.raises(UserError, match="not a run of ours"):
        train_sft.main(again(world, train_sft, tmp_path / "mine", overwrite=True))
    assert (tmp_path / "mine/thesis.txt").exists()


# --- the command line


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """call(script, *arguments) -> (exit code, stdout, stderr) of `python script.py arguments` in an empty
    folder."""
    def run(script: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        return stop.value.code, *capsys.readouterr()
    return run


COMMANDS = [
    "train_sft", "train_rm", "train_rloo", "train_simpo", "train_online", "train_ppo", "sample", "evaluate",
]


@pytest.mark.parametrize("script", COMMANDS)
def test_command_line(script, call, tmp_path):
    """--help explains every option; an unknown option or a missing one is exit code 2 and one line."""
    fields = importlib.import_module(script).Config.__dataclass_fields__
    code, out, _ = call(script, "--help")
    assert code == 0 and all(f"--{field}" in out for field in fields)
    needed = [
        f"--{field}=nowhere" for field, f in fields.items() if f.default is MISSING and field != "out_dir"
    ]
    needed += ["--reward_model=nowhere"] if script == "train_rloo" else []  # or --reward_fn
    code, _, err = call(script, *needed, "--out_dir=x", "--lrr=1")
    assert code == 2 and err.endswith("error: unrecognized arguments: --lrr=1\n")
    code, _, err = call(script, *needed)
    assert code == 2 and err.endswith("the following arguments are required: --out_dir\n")
    code, _, err = call(script, *needed, "--out_dir=x")
    assert code == 2 and err.splitlines()[-1].startswith("error: nowhere: no prepared data there")
    assert not list(tmp_path.iterdir())


def test_help_of_train_simpo_tells_every_loss_with_its_defaults(call):
    _, out, _ = call("train_simpo", "--help")
    assert out.endswith(describe(PREFERENCE_LOSSES) + "\n")
    assert re.search(r"\n  simpo +beta 2, gamma 0.5, label_smoothing 0\n", out)
    assert re.search(r"\n  ipo +beta 0.05; reads a reference\n", out)


def test_run_json_of_train_simpo_tells_the_options_that_were_used(world, tmp_path):
    def told(name, **changes) -> tuple:
        changes = dict(model=str(world / "sft"), train_rows=16) | changes
        train_simpo.main(again(world, train_simpo, tmp_path / name, **changes))
        config = json.loads((tmp_path / name / "run.json").read_text())["config"]
        return tuple(config[option] for option in ("beta", "gamma", "gamma_beta_ratio", "label_smoothing"))

    assert told("dpo") == (0.05, None, None, 0.0)
    assert told("simpo", loss="simpo") == (2.0, 0.5, None, 0.0)
    assert told("given", loss="simpo", beta=1.5, gamma_beta_ratio=0.3, label_smoothing=0.1) == (
        1.5, 0.3 * 1.5, None, 0.1,
    )
    assert told("default beta", loss="simpo", gamma_beta_ratio=0.3) == (2.0, 0.6, None, 0.0)


def test_training_loads_no_judge_and_no_statistics():
    """Nor what draws, or asks a language model; and of what they do load there is a list, so an empty one
    fails."""
    program = f"import {', '.join(s.__name__ for s in SCRIPTS)}, sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert {"rlhf", "torch", "pyarrow"} <= loaded
    assert not loaded & {
        "evaluation", "evaluate", "study", "bench", "openai", "matplotlib", "scipy", "transformers", "trl",
    }
