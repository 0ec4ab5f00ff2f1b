"""Malformed inputs by kind over all scripts: one clear line, the right exit code, nothing lost."""

import json
import shutil
from pathlib import Path

import faults
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from faults import ON_MODELS, TRAINING, call, call_with, config, save, state_files, unfinished
from safetensors.torch import load_file

import evaluate
import sample
import train_online
import train_ppo
import train_rloo
import train_rm
import train_sft
import train_simpo
from study import best_of_n, plot, results

each_script = pytest.mark.parametrize("script", ON_MODELS, ids=lambda script: script.__name__)
each_training = pytest.mark.parametrize("script", TRAINING, ids=lambda script: script.__name__)

# --- malformed inputs by kind


def change_table(path: Path, column: str, change) -> None:
    table = pq.read_table(path)
    if change == "drop":
        table = table.drop_columns([column])
    else:
        values = change(table[column].to_pylist())
        table = table.set_column(table.schema.get_field_index(column), column, pa.array(values))
    pq.write_table(table, path)


def last_row(value):
    """Only the last row is wrong: it must not be met at the end of an epoch."""
    return lambda rows: [*rows[:-1], value(rows[-1])]


BAD_IDS = {
    "a null row": last_row(lambda ids: None),
    "a null id": last_row(lambda ids: [*ids[:-1], None]),
    "a negative id": last_row(lambda ids: [-1, *ids]),
    "an id beyond the vocabulary": last_row(lambda ids: [*ids[:-1], 10**6]),
    "a row without tokens": last_row(lambda ids: []),
    "a row beyond the context": last_row(lambda ids: ids * 400),
    "texts": lambda rows: ["text"] * len(rows),
    "numbers": lambda rows: list(range(len(rows))),
    "fractions": lambda rows: [[0.5] * len(ids) for ids in rows],
    "lists of texts": lambda rows: [["a"]] * len(rows),
    "nothing but nulls": lambda rows: [None] * len(rows),
    "no column": "drop",
}
READ = [
    (train_sft, "sft_train", "query_token", {}),
    (train_sft, "sft_train", "reference_response_token", {}),
    (train_sft, "sft_validation", "query_token", {"eval_rows": 0}),
    (train_rm, "pairs_train", "query_token", {}),
    (train_rm, "pairs_train", "rejected_token", {}),
    (train_rm, "pairs_validation", "chosen_token", {"eval_rows": 0}),
    (train_rm, "sft_train", "reference_response_token", {"center_rows": 0}),
    (train_rloo, "sft_train", "query_token", {}),
    (train_rloo, "sft_validation", "query_token", {"eval_rows": 0}),
    (train_simpo, "pairs_train", "chosen_token", {}),
    (train_simpo, "pairs_validation", "rejected_token", {"eval_rows": 0}),
    (train_simpo, "sft_validation", "query_token", {"eval_rows": 0}),
    (train_ppo, "sft_train", "query_token", {}),
    (train_ppo, "sft_validation", "query_token", {"eval_rows": 0}),
    (train_online, "sft_train", "query_token", {}),
    (train_online, "sft_validation", "query_token", {"eval_rows": 0}),
    (train_online, "pairs_train", "rejected_token", {"data_pair": True}),
    (sample, "sft_train", "query_token", {"rows": 0}),
    (evaluate, "sft_validation", "query_token", {"n": 0}),
    (evaluate, "sft_validation", "reference_response_token", {"n": 0}),
    (evaluate, "pairs_validation", "chosen_token", {"agreement": "pairs_validation"}),
    (best_of_n, "sft_validation", "query_token", {"rows": 0}),
]


@pytest.mark.parametrize(
    "script, name, column, options", READ, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_bad_token_columns(world, tmp_path, capsys, monkeypatch, script, name, column, options):
    for kind, change in BAD_IDS.items():
        shutil.copytree(world / "data", tmp_path / "data", dirs_exist_ok=True)
        change_table(tmp_path / f"data/{name}.parquet", column, change)
        cfg = config(world, script, tmp_path / "run", data_dir=str(tmp_path / "data"), **options)
        code, line = call(script, cfg, capsys, monkeypatch)
        assert code == 2 and (name in line or str(tmp_path / "data") in line), (kind, line)
        assert not (tmp_path / "run").exists(), kind


@pytest.mark.parametrize(
    "kind, change",
    {
        "rows of other lengths": last_row(lambda row: row[:-1]),
        "a null response": last_row(lambda row: [*row[:-1], None]),
        "a null row": last_row(lambda row: None),
        "one level": lambda rows: [row[0] for row in rows],
        "an id beyond the vocabulary": last_row(lambda row: [*row[:-1], [10**6]]),
        "texts": lambda rows: ["a"] * len(rows),
        "a response without tokens": last_row(lambda row: [*row[:-1], []]),
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_rankings(world, tmp_path, capsys, monkeypatch, kind, change):
    shutil.copytree(world / "data", tmp_path / "data")
    change_table(tmp_path / "data/rankings_train.parquet", "responses_token", change)
    cfg = config(world, train_simpo, tmp_path / "run", data_dir=str(tmp_path / "data"), loss="simpo_pl")
    code, line = call(train_simpo, cfg, capsys, monkeypatch)
    assert code == 2 and "rankings_train.parquet" in line, line


@each_script
def test_bad_text_columns_and_files(world, tmp_path, capsys, monkeypatch, script):
    tables = {train_rm: "pairs_validation", train_simpo: "pairs_validation", sample: "sft_train"}
    table = tables.get(script, "sft_validation")
    texts = ["query", "id"] + (["reference_response"] if table.startswith("sft") else ["chosen"])
    cases = {}
    for column in texts:
        cases |= {
            (column, "null"): last_row(lambda text: None),
            (column, "numbers"): lambda rows: list(range(len(rows))),
        }
    for (column, kind), change in cases.items():
        shutil.copytree(world / "data", tmp_path / "data", dirs_exist_ok=True)
        change_table(tmp_path / f"data/{table}.parquet", column, change)
        changes = {"eval_rows": 0} if script in TRAINING else {"n": 0} if script is evaluate else {"rows": 0}
        cfg = config(world, script, tmp_path / "run", data_dir=str(tmp_path / "data"), **changes)
        code, line = call(script, cfg, capsys, monkeypatch)
        assert code == 2 and f"{table}.parquet" in line, (column, kind, code, line)
    shutil.copytree(world / "data", tmp_path / "data", dirs_exist_ok=True)
    path = tmp_path / f"data/{table}.parquet"
    whole = path.read_bytes()
    for content in (b"", b"PAR1", whole[:-20], whole[20:], b"garbage" * 99, None):
        path.unlink(missing_ok=True)
        path.write_bytes(content) if content is not None else None
        code, line = call(
            script,
            config(world, script, tmp_path / "run", data_dir=str(tmp_path / "data")),
            capsys,
            monkeypatch,
        )
        assert code == (2 if content is not None or script is not train_rm else 0) and (
            code == 0 or table in line
        ), (content, line)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


FACTS = {
    "null": last_row(lambda text: None),
    "no JSON": last_row(lambda text: text[:-1]),
    "too deep": last_row(lambda text: "[" * 100_000),
    "a list": last_row(lambda text: "[]"),
    "a number": last_row(lambda text: "3"),
    "without facts": last_row(lambda text: "{}"),
    "no facts": last_row(lambda text: '{"facts": {}}'),
    "facts in a list": last_row(lambda text: '{"facts": ["monday"]}'),
    "numbers": lambda rows: list(range(len(rows))),
    "no column": "drop",
}


@each_script
def test_bad_facts(world, tmp_path, capsys, monkeypatch, script):
    """Of the toy world; the true reward must not fail at the end of a run."""
    table = {train_rm: "sft_train", sample: "sft_train"}.get(script, "sft_validation")
    rows = {"eval_rows": 0, "n": 0, "rows": 0, "center_rows": 0}
    rows = {name: 0 for name in rows if hasattr(script.Config, name)}
    for kind, change in FACTS.items():
        if kind == "no column" and table == "sft_train":
            continue  # then nobody knows the true reward, which is no fault
        shutil.copytree(world / "data", tmp_path / "data", dirs_exist_ok=True)
        change_table(tmp_path / f"data/{table}.parquet", "facts", change)
        cfg = config(world, script, tmp_path / "run", data_dir=str(tmp_path / "data"), **rows)
        code, line = call(script, cfg, capsys, monkeypatch)
        assert code == 2 and f"{table}.parquet" in line and "facts" in line, (kind, code, line)
        assert not (tmp_path / "run").exists(), kind


JSON = ["", "{", "[]", "null", "3", '"text"', "[" * 100_000, "\udcff\udcfe", "{}"]


@each_script
def test_bad_json(world, tmp_path, capsys, monkeypatch, script):
    """meta.json, config.json, tokenizer.json that are not what they should be; and none at all."""
    copy = Path(shutil.copytree(world, tmp_path / "world", ignore=shutil.ignore_patterns("run")))
    cfg = config(copy, script, tmp_path / "run")
    model = Path(cfg.model.split(",")[0])
    for file in (
        copy / "data/meta.json",
        model / "config.json",
        model / "tokenizer.json",
        copy / "data/tokenizer.json",
    ):
        whole = file.read_bytes()
        for text in [*JSON, None]:
            file.unlink()
            file.write_bytes(text.encode(errors="surrogateescape")) if text is not None else None
            code, line = call(script, cfg, capsys, monkeypatch)
            assert code == 2, (file, text, code, line)
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            file.write_bytes(whole)


def test_bad_config_values(world, tmp_path, capsys, monkeypatch):
    raw = json.loads((world / "sft/config.json").read_text())
    shutil.copytree(world / "sft", tmp_path / "sft")
    cfg = config(world, train_rm, tmp_path / "run", model=str(tmp_path / "sft"))
    bad = {
        name: [None, "12", -3, 0, 10**9, 1.5, [3], True]
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
        )
    }
    bad |= {
        "max_position_embeddings": ["12", -3, 0, [3]],
        "layer_norm_eps": ["x", -1.0, [1]],
        "hidden_act": [3, "none", []],
        "rope_parameters": [3, "x", [1], {"rope_type": "yarn"}],
        "tie_word_embeddings": ["yes", 3],
        "model_type": [None, "llama", 3],
        "use_parallel_residual": ["no", 0],
        "attention_bias": ["no"],
        "rotary_pct": ["x"],
    }
    for name, values in bad.items():
        for value in values:
            changed = {**raw, name: value}
            if name == "rotary_pct":
                changed["rope_parameters"] = None
            (tmp_path / "sft/config.json").write_text(json.dumps(changed))
            code, line = call(train_rm, cfg, capsys, monkeypatch)
            assert code == 2, (name, value, code, line)


def test_bad_weights(world, tmp_path, capsys, monkeypatch):
    shutil.copytree(world / "sft", tmp_path / "sft")
    file = tmp_path / "sft/model.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    name = "gpt_neox.final_layer_norm.weight"
    contents = {
        "empty": b"",
        "cut": whole[:-9],
        "garbage": b"x" * 999,
        "header": whole[:8] + b"!" * (len(whole) - 8),
        "short": whole[:5],
    }
    changed = {
        "a tensor missing": {k: v for k, v in tensors.items() if k != name},
        "one too many": {**tensors, "gpt_neox.other": torch.zeros(3)},
        "another shape": {**tensors, name: torch.ones(17)},
        "nan": {**tensors, name: tensors[name] * float("nan")},
        "inf": {**tensors, name: tensors[name] / 0},
        "none": {},
    }
    for script in (train_rm, train_rloo, train_simpo, evaluate):
        cfg = config(world, script, tmp_path / "run", model=str(tmp_path / "sft"))
        for kind, content in {**contents, **changed}.items():
            file.unlink(missing_ok=True)
            save(content, file) if isinstance(content, dict) else file.write_bytes(content)
            code, line = call(script, cfg, capsys, monkeypatch)
            assert code == 2 and "safetensors" in line or "tensors missing" in line, (
                script,
                kind,
                code,
                line,
            )
            shutil.rmtree(tmp_path / "run", ignore_errors=True)


@each_training
def test_damaged_runs_and_checkpoints(world, tmp_path, capsys, monkeypatch, script):
    """At a resume: one line, and nothing of the run is touched."""
    run = unfinished(world, script, tmp_path)
    newest = max((run / "ckpt").iterdir())
    cfg = config(world, script, run, resume=True)
    for file, without_sums in [
        (run / "run.json", False),
        (state_files(newest)[0], True),
        (newest / "model.safetensors", True),
        (newest / "checksums.json", False),
    ]:
        sums = (newest / "checksums.json").read_bytes()
        whole = file.read_bytes()
        for content in (b"", whole[: len(whole) // 2], b"garbage", b"[]", b"{}", b"null"):
            if without_sums:
                (newest / "checksums.json").unlink(missing_ok=True)
            file.write_bytes(content)
            if file.name == "checksums.json" and content == b"{}":
                continue  # names no file, so none is damaged
            before = faults.state_of(run)
            code, line = call(script, cfg, capsys, monkeypatch)
            assert code == 2, (file.name, content[:20], code, line)
            assert faults.state_of(run) == before
        file.write_bytes(whole)
        (newest / "checksums.json").write_bytes(sums)
    whole = load_file(state_files(newest)[0])
    moment = next(name for name in whole if name.endswith(".exp_avg"))
    bad = torch.zeros(3)
    for changed in ({"rng": bad}, {"step": bad}, {"rng": None}, {moment: bad}, {moment: None}):
        (newest / "checksums.json").unlink(missing_ok=True)
        state = {name: tensor for name, tensor in (whole | changed).items() if tensor is not None}
        save(state, state_files(newest)[0])
        code, line = call(script, cfg, capsys, monkeypatch)
        assert code == 2 and "to go on from" in line, (changed, line)


def test_damaged_logs_are_told_by_plot_and_results(world, tmp_path, capsys, monkeypatch):
    study = tmp_path / "study"
    for content in (
        b"",
        b"{}",
        b"[]",
        b"3",
        b"garbage",
        b'{"config": 3}',
        b'{"config": {}, "command": 7}',
        b"\xff\xfe",
    ):
        for name in ("run.json", "metrics.jsonl", "result.json"):
            shutil.rmtree(study, ignore_errors=True)
            shutil.copytree(world / "run/train_rloo", study / "small/rloo")
            (study / "small/rloo" / name).write_bytes(content + b"}" * (name == "metrics.jsonl"))
            calls = [
                (plot, [f"--runs={study}/small", "--figure=3", f"--out={tmp_path}/a.png"]),
                (results, [f"--study={study}", f"--out={tmp_path}/a.md"]),
            ]
            if name == "metrics.jsonl":
                calls.append(
                    (plot, [f"--runs={study}/small/rloo", "--metrics=kl", f"--out={tmp_path}/a.png"])
                )
            for script, options in calls:
                code, line = call_with(script, options, capsys, monkeypatch)
                assert code in (0, 2), (name, content, script, line)


