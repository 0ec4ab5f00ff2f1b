"""What a rank holds, against the arithmetic of --dry_run: processes with models of a hundred megabytes,
beside which the interpreter's own steps are small."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_dist import RUNS, job

from bench import work
from rlhf.memory import HEAP_GAPS, Size, config_of, resident

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from /proc"
)
SHAPE = (512, 6, 8)  # width, layers, heads
VOCABULARY = 4096


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> work.Work:
    """A policy and a reward model, and 4 prompts of 100 tokens with 2 responses of 40 to each."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setitem(work.SHAPES, "wide", SHAPE)
        patches.setattr(work, "VOCABULARY", VOCABULARY)
        size = dict(prompts=4, k=2, prompt_tokens=100, response_tokens=40)
        cfg = SimpleNamespace(model="wide", sweep="", peer_rows=0, **size)
        made = work.make_work(cfg, "rloo", None, str(tmp_path_factory.mktemp("memory") / "work"))
        work.write_models(made)
        work.write_data(made)
    return made


def run_options(models: work.Work, script: str, out: Path) -> dict:
    """Every prompt is a micro-batch: each of two ranks has two, so a backward finds gradients."""
    given = dict(data_dir=models.data_dir, model=models.model_dir, out_dir=str(out), device="cpu",
                 micro_batch_tokens=180, eval_rows=2, save_every=0)
    if script == "train_sft":
        return given | dict(batch_size=4, epochs=2.0, loss_on="response")
    return given | dict(reward_model=models.rm_dir, k=2, batch_size=8, episodes=8, ppo_epochs=2,
                        missing_eos="none", samples_every=0)


@pytest.mark.parametrize("script", ["train_sft", "train_rloo"])
def test_peak_and_rest_of_each_rank(launcher, tiny, models, tmp_path, script):
    """A small run before it has loaded what any run loads."""
    name = script.removeprefix("train_")
    small = job(tiny, name, tmp_path / "small")
    of = {"script": script, "config": run_options(models, script, tmp_path / "run")}
    found = launcher.run(2, [small, {"measure": "peaks", "of": of}], tmp_path / "jobs")[1]
    size = Size.of(config_of(models.model_dir, "main"))
    score = Size.of(config_of(models.rm_dir, "main"), "score")
    frozen = {"reference": size, "reward model": score} if script == "train_rloo" else {}
    main, Config = RUNS[name][0].main, RUNS[name][0].Config
    on_one = main(Config(**of["config"], dry_run=True))["peak_gib"] / (1 + HEAP_GAPS) * 2**30
    held = sum(resident({"policy": size}, frozen, torch.float32, ranks=2).values())
    for rank in found:
        assert rank["predicted"] == pytest.approx(rank["peak"], rel=0.15)
        assert 2**28 < rank["peak"] < on_one / 1.15  # the twin: the arithmetic of one device
        # after an update the policy's embedding and head may still be whole, and FSDP keeps the last layer
        layer = size.layers // SHAPE[1]
        assert 0.98 * held < rank["rest"] < 1.02 * (held + 4 * (size.root + layer))
        if not frozen:
            assert rank["rest"] < 1.1 * 20 * size.parameters / 2 + 4 * size.root


def test_peak_of_loading(launcher, tiny, models, tmp_path):
    """No higher than a rank's rows and one tensor; the twin reads the whole model first."""
    directories = [str(tiny.root / "policy"), models.model_dir]
    jobs = [{"measure": "loaded", "of": {"directory": directory}} for directory in directories]
    jobs.append(jobs[1] | {"broken": "whole_first"})
    _, rows, whole = launcher.run(2, jobs, tmp_path / "jobs")
    size = Size.of(config_of(models.model_dir, "main"))
    largest = 4 * VOCABULARY * SHAPE[0]
    assert all(peak < 2 * size.parameters + largest for peak in rows)
    assert all(peak > 4 * size.parameters for peak in whole)
