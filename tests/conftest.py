"""Before any test: the project on the path, no network, a seed. And what several files share."""

import inspect
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
