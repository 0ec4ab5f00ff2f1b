"""Before any test: the project on the path, no network, a seed."""

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
