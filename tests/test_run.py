"""Learning rate, optimizer step, and the directory of a run."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from faults import state_files
from tokenizers import Tokenizer
from util import raw_config, tiny_tokenizer

from rlhf.common import adamw, learning_rate, optimizer_step, set_lr, setup
from rlhf.config import RunError, UserError
from rlhf.model import NeoX, NeoXConfig
from rlhf.pretrained import from_pretrained
from rlhf.run import Run

TOKENIZER = tiny_tokenizer()


@dataclass(frozen=True, kw_only=True)
class Config:
    out_dir: str
    resume: bool = False
    overwrite: bool = False
    lr: float = 3e-6
    save_every: int = 2
    keep: int = 0


def rates(schedule, warmup, total=10):
    return [learning_rate(step, total, 2.0, schedule, warmup) for step in range(total)]


def test_learning_rates():
    assert rates("constant", 0.0) == [2.0] * 10
    assert rates("linear", 0.0) == pytest.approx([2.0 * (1 - t / 10) for t in range(10)])
    assert rates("cosine", 0.0) == pytest.approx([1 + math.cos(math.pi * t / 10) for t in range(10)])
    assert rates("linear", 0.2) == pytest.approx([1.0, 2.0] + [2.0 * (1 - t / 8) for t in range(8)])
    assert rates("constant", 0.4) == pytest.approx([0.5, 1.0, 1.5, 2.0] + [2.0] * 6)
    assert rates("cosine", 1.0) == pytest.approx([0.2 * t for t in range(1, 11)])
    assert learning_rate(0, 1, 2.0, "cosine", 0.1) == 2.0


def small_model(seed=0):
    return NeoX(
        NeoXConfig.from_dict(raw_config(vocab_size=300, hidden_size=24, num_hidden_layers=1))
    ).init_weights(seed)


def test_optimizer_step():
    model = small_model()
    optimizer = adamw(model, 0.0, eps=1e-8, weight_decay=0.0)
    set_lr(optimizer, 0.1)
    before = [p.detach().clone() for p in model.parameters()]
    sum((3 * p).sum() for p in model.parameters()).backward()
    count = sum(p.numel() for p in model.parameters())
    assert optimizer_step(model, optimizer, 1.0, 1.0, 0) == pytest.approx(3 * count**0.5, rel=1e-5)
    for p, q in zip(model.parameters(), before):
        # Adam's first step is the learning rate in the gradient's sign
        torch.testing.assert_close(p, q - 0.1, rtol=0, atol=1e-5)
        assert p.grad is None


@pytest.mark.parametrize("loss, gradient", [(math.nan, 1.0), (1.0, math.inf), (1.0, math.nan)])
def test_a_step_that_is_not_finite_ends_the_run_and_moves_nothing(loss, gradient):
    model = small_model()
    optimizer = adamw(model, 0.1, eps=1e-8, weight_decay=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, gradient)
    with pytest.raises(RunError, match="step 7: .*not finite"):
        optimizer_step(model, optimizer, loss, 0.0, 7)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_unknown_device():
    with pytest.raises(UserError, match="--device=abacus"):
        setup(0, "abacus")


# --- the directory of a run


def test_what_is_not_finite_is_null_in_every_file(tmp_path, capsys):
    """Infinity and NaN are words of Python: no other reader of JSON knows them."""
    run, model = train(Config(out_dir=str(tmp_path / "run")), 1)
    run.log(
        2,
        {"loss": math.inf, "kl": -math.inf, "gold": math.nan, "lr": 0.5, "eos": None, "rows": 3},
        show=("loss", "gold"),
    )
    result = run.finish(model, TOKENIZER, {"gold": math.nan, "kl": 1.5})
    printed = capsys.readouterr().out.splitlines()[-1]
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    last, written, said = (
        json.loads(text, parse_constant=pytest.fail)
        for text in (lines[-1], (tmp_path / "run/result.json").read_text(), printed)
    )
    assert last == {"step": 2, "loss": None, "kl": None, "gold": None, "lr": 0.5, "eos": None, "rows": 3}
    assert written == said == result and (result["gold"], result["kl"]) == (None, 1.5)


@pytest.fixture
def cfg(tmp_path):
    return Config(out_dir=str(tmp_path / "run"))


def train(cfg, last: int, start_model=0):
    """A run of 8 updates stopped after `last`; every step's metric is its number."""
    run, model = Run(cfg, 8), small_model(start_model)
    optimizer, generator = adamw(model, 0.01, eps=1e-8, weight_decay=0.0), torch.Generator().manual_seed(1)
    for step in range(run.begin(model, optimizer, generator), last):
        noise = torch.randn(24, generator=generator) + torch.randn(24)
        (model.gpt_neox.final_layer_norm.weight * noise).sum().backward()
        optimizer.step(), optimizer.zero_grad()
        run.log(step + 1, {"loss": step + 1.5})
        run.checkpoint(step + 1, model, TOKENIZER, optimizer, generator)
    return run, model


def out(cfg) -> Path:
    return Path(cfg.out_dir)


def folders(cfg) -> list[str]:
    return sorted(p.name for p in (out(cfg) / "ckpt").iterdir())


def test_an_existing_run_is_refused(cfg):
    train(cfg, 2)
    with pytest.raises(UserError, match="exists: continue it with --resume, replace it with --overwrite"):
        Run(cfg, 8)
    with pytest.raises(UserError, match="--lr was 3e-06, is 0.5"):
        Run(replace(cfg, resume=True, lr=0.5), 8)
    Run(replace(cfg, resume=True, keep=3), 8)  # settings that change no number may differ
    run = Run(replace(cfg, overwrite=True, lr=0.5), 8)
    assert (out(cfg) / "ckpt").exists(), "nothing is removed before data and models are known to be good"
    model = small_model(0)
    assert run.begin(model, adamw(model, 0.5, eps=1e-5, weight_decay=0.0)) == 0
    assert (
        not (out(cfg) / "ckpt").exists()
        and json.loads((out(cfg) / "run.json").read_text())["config"]["lr"] == 0.5
    )


def test_overwrite_removes_only_runs(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mother.txt").write_text("dear")
    with pytest.raises(UserError, match="holds no run.json"):
        Run(Config(out_dir=str(tmp_path / "letters"), overwrite=True), 8)
    assert (tmp_path / "letters" / "mother.txt").exists()


@pytest.mark.parametrize("keep, expected", [(0, [2, 4, 6]), (1, [6]), (2, [4, 6]), (9, [2, 4, 6])])
def test_checkpoints_that_stay(keep, expected, cfg):
    cfg = replace(cfg, keep=keep)
    train(cfg, 7)
    assert folders(cfg) == [f"step_{step:08d}" for step in expected]  # and no folder half-written
    for step in expected:
        folder = out(cfg) / "ckpt" / f"step_{step:08d}"
        assert bool(state_files(folder)) == (step >= 4)  # the newest two can be resumed
        from_pretrained(str(folder))


def test_resumed_equals_uninterrupted(cfg, tmp_path):
    torch.manual_seed(3)
    _, expected = train(replace(cfg, out_dir=str(tmp_path / "whole")), 8)
    torch.manual_seed(3)
    train(cfg, 5)  # step 5 is lost: the newest checkpoint is step 4
    torch.manual_seed(99)
    (out(cfg) / "ckpt" / "writing").mkdir()  # a checkpoint that was being written
    _, model = train(replace(cfg, resume=True), 8, start_model=1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters()))
    lines = [json.loads(line) for line in (out(cfg) / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "loss": step + 0.5} for step in range(1, 9)]
    assert folders(cfg)[-1] == "step_00000008" and "writing" not in folders(cfg)


def test_a_checkpoint_of_an_earlier_version_is_told_in_one_line(cfg):
    train(cfg, 4)
    folder = out(cfg) / "ckpt" / "step_00000004"
    (folder / "optimizer.safetensors").rename(folder / "trainer.pt")
    with pytest.raises(UserError, match="trainer.pt.* begin a new run with --model=.*step_00000004"):
        train(replace(cfg, resume=True), 8)


def test_unreadable_trainer_state(cfg):
    train(cfg, 4)
    state = state_files(out(cfg) / "ckpt" / "step_00000004")[0]
    state.write_bytes(state.read_bytes()[:100])
    said = f"step_00000004/{state.name}: damaged .* to go on from step_00000002"
    with pytest.raises(UserError, match=said):
        train(replace(cfg, resume=True), 8)


def test_finished_run(cfg, capsys):
    run, model = train(cfg, 8)
    result = run.finish(model, TOKENIZER, {"gold": 1.5})
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result and result["gold"] == 1.5
    final = from_pretrained(cfg.out_dir)
    assert all(torch.equal(p, q) for p, q in zip(final.parameters(), model.parameters()))
    assert Tokenizer.from_file(cfg.out_dir + "/tokenizer.json").get_vocab() == TOKENIZER.get_vocab()
    assert not (out(cfg) / "writing").exists()
    again = Run(replace(cfg, resume=True), 8)
    assert again.finished and again.earlier_result() == result
    assert not Run(replace(cfg, overwrite=True), 8).finished
