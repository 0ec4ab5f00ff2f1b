"""Best-of-n: the estimator against all subsets, the script on a tiny world; and that the scripts log what
study/ reads."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch

import train_rloo
import train_simpo
from data import toy
from rlhf.config import UserError
from rlhf.model import NeoX, NeoXConfig
from rlhf.pretrained import load_tokenizer, save_pretrained
from study import best_of_n
from study.early_warning import SIGNALS
from study.figures import PAIR_METRICS
from study.logs import find_runs
from study.panels import LABELS


def test_best_of_n_equals_all_subsets():
    scores = torch.rand(2, 6)
    values = torch.rand(2, 6)

    def brute(i: int, n: int) -> float:
        best = [max(subset, key=lambda j: scores[i, j]) for subset in combinations(range(6), n)]
        return np.mean([values[i, j].item() for j in best])

    for n in range(1, 7):
        expected = np.mean([brute(i, n) for i in range(2)])
        assert best_of_n.expected_best(scores, values, n) == pytest.approx(expected)
        assert best_of_n.chance_to_win(6, n).sum().item() == pytest.approx(1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data, a language model and a reward model, untrained."""
    root = tmp_path_factory.mktemp("world")
    sizes = {"posts": 8, "pairs": 8, "rankings": 8, "validation": 6, "test": 8}
    toy.main(toy.Config(out_dir=str(root / "data"), size="small", **sizes))
    config = NeoXConfig.from_dict(json.loads((root / "data/base/config.json").read_text()))
    for name, head in (("sft", "embed_out"), ("rm", "score")):
        model = NeoX(config, head).init_weights(0)
        save_pretrained(model, load_tokenizer(str(root / "data/base")), root / name)
    return root


def test_best_of_n_script(world):
    cfg = best_of_n.Config(
        data_dir=str(world / "data"), model=str(world / "sft"), reward_model=str(world / "rm"),
        out_dir=str(world / "bon"), samples=6, device="cpu",
    )
    best_of_n.main(cfg)
    lines = [json.loads(line) for line in (world / "bon/metrics.jsonl").read_text().splitlines()]
    assert [line["n"] for line in lines] == [1, 2, 4, 6] and "gold" in lines[0]
    for key in ("scores", "kl"):
        column = [line[key] for line in lines]
        steps = [after - before for before, after in zip(column, column[1:])]
        assert min(steps) > -1e-12 and max(steps) > 0  # rounding: the best of equal scores
    with pytest.raises(UserError, match="--overwrite"):
        best_of_n.main(cfg)


def test_the_scripts_log_what_the_study_reads(world, monkeypatch):
    """The names of metrics and settings, as a run leaves them."""
    common = {"data_dir": str(world / "data"), "model": str(world / "sft"), "device": "cpu", "eval_rows": 2}
    runs = {
        train_rloo: {"reward": "maxent_length:0.2", "episodes": 8, "batch_size": 4},
        train_simpo: {"loss": "dpo", "batch_size": 8},
    }
    runs[train_rloo] |= {"reward_model": f"{world}/rm,{world}/rm", "reward_mix": "first"}  # as study/plan.py
    for script, options in runs.items():
        monkeypatch.setattr("sys.argv", [f"/a clone/{script.__name__}.py", "--lr=1e-6"])
        script.main(script.Config(**common, **options, out_dir=str(world / "runs" / script.__name__)))
    rloo, dpo = find_runs(world / "runs")
    assert (rloo.script, dpo.script) == ("train_rloo", "train_simpo")
    assert rloo.config["reward"] == "maxent_length" and rloo.config["coefficient"] == 0.2
    assert {"lr", "clip", "invalid_logprob_fill", "seed", "k"} <= rloo.config.keys()
    assert rloo.metrics.keys() >= {*LABELS, "scores", "gold", "clipfrac"}
    for signal in SIGNALS.values():
        signal(rloo.metrics.__getitem__)  # each of its metrics is there
    assert dpo.config["gamma"] is None and dpo.config["beta"] == 0.05
    assert dpo.metrics.keys() >= {*PAIR_METRICS, "ref_margin", "ref_margin_mean"}
    assert {"greedy/gold"} <= rloo.result.keys() & dpo.result.keys()
