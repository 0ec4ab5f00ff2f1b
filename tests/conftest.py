"""Before any test: the project on the path, no network, a seed. And what several files share."""

import inspect
import json
import os
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are tiny: a second thread only waits, and busily
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny world and the runs on it, see tiny.py."""
    from tiny import Tiny
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def launcher():
    """Runs jobs on any number of ranks, see ranks.py."""
    from ranks import Ranks
    started = Ranks()
    yield started
    started.close()


@pytest.fixture
def generated(monkeypatch) -> list[dict]:
    """Every call of `generate` from now on: arguments by name, defaults included, and what it returned."""
    from rlhf.generate import generate
    calls = []
    signature = inspect.signature(generate)

    def spy(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        responses, ended = generate(*args, **kwargs)
        calls.append({**bound.arguments, "responses": responses, "ended": ended})
        return responses, ended

    for module in [m for m in sys.modules.values() if vars(m).get("generate") is generate]:
        monkeypatch.setattr(module, "generate", spy)
    return calls


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """prepare(files, ...) -> the tables that data/jsonl.py writes; a file is a list of rows, or of lines."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from own import TOKENIZER

    from data import jsonl
    monkeypatch.chdir(tmp_path)
    TOKENIZER.save("tokenizer.json")

    def run(files: dict[str, list], out_dir: str = "data", **options) -> dict[str, list[dict]]:
        for name, rows in files.items():
            if name.endswith(".parquet"):
                pq.write_table(pa.Table.from_pylist(rows), name)
            else:
                lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
                Path(name).write_text("".join(line + "\n" for line in lines))
        train = options.pop("train", ",".join(name for name in files if not name.startswith("valid")))
        jsonl.main(jsonl.Config(train=train, tokenizer="tokenizer.json", out_dir=out_dir, **options))
        return {path.stem: pq.read_table(path).to_pylist() for path in Path(out_dir).glob("*.parquet")}

    return run


@pytest.fixture
def models(prepare):
    """A policy `model` and a reward model `rm` beside the data that `prepare` writes."""
    from own import TOKENIZER, small

    from rlhf.pretrained import save_pretrained
    save_pretrained(small(), TOKENIZER, Path("model"))
    save_pretrained(small("score", seed=1), TOKENIZER, Path("rm"))


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """The tiny world of faults.py, and in run/ an uninterrupted run of every script on its models."""
    import faults
    out = tmp_path_factory.mktemp("world")
    faults.make_world(out)
    with pytest.MonkeyPatch.context() as patches:
        faults.stop_the_clock(patches)
        for script in faults.ON_MODELS:
            script.main(faults.config(out, script, out / "run" / script.__name__))
    return out
