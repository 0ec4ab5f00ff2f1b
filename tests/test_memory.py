"""--dry_run: its arithmetic against bytes counted on fake tensors, and against the peak of a process."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from live import Live
from tiny import TRAINING
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import train_rloo
import train_simpo
from bench import work
from rlhf.common import adamw
from rlhf.config import UserError
from rlhf.forward import response_scores, token_stats
from rlhf.generate import generate
from rlhf.groups import Groups, pack
from rlhf.memory import Size, resident, rollout_memory, update_memory
from rlhf.model import NeoX, NeoXConfig

WIDE = dict(vocab_size=50304, hidden_size=1024, num_attention_heads=8, intermediate_size=4096)
ROW = [[5] * 1500] * 2, [[[7] * 300]] * 2  # 3,600 tokens


def freeze(model: NeoX, dtype: torch.dtype) -> NeoX:
    """As `common.frozen`; modules of fake tensors cannot be moved."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not getattr(model, "score", None):
            for name, p in list(module.named_parameters()):
                setattr(module, name, nn.Parameter(p.detach().to(dtype), requires_grad=False))
    model.matmul_dtype = dtype
    return model.requires_grad_(False)


def fake(mode: FakeTensorMode, groups: Groups) -> Groups:
    tensors = [f.name for f in fields(groups) if isinstance(getattr(groups, f.name), torch.Tensor)]
    return replace(groups, **{name: mode.from_tensor(getattr(groups, name)) for name in tensors})


def counted_update(config: NeoXConfig, head: str, dtype: torch.dtype, checkpointing: bool) -> int:
    """Peak of a row after an update and another row, beside a frozen reference; no byte is written."""
    groups = pack(*ROW, max_positions=2048)
    with FakeTensorMode() as mode:
        model = NeoX(config, head)
        model.matmul_dtype = dtype
        model.gpt_neox.gradient_checkpointing = checkpointing
        reference = freeze(NeoX(config), dtype)
        groups = fake(mode, groups)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        live = Live()
        for p in [*model.parameters(), *reference.parameters()]:
            live.add(p)
        with live:
            for _ in range(3):
                if head == "score":
                    loss = response_scores(model, groups).sum()
                else:
                    loss = token_stats(model, groups, 0.7, reference).logprobs.sum()
                loss.backward()
                del loss
                if not optimizer.state:
                    optimizer.step()
    return live.peak


@pytest.mark.parametrize("head", ["embed_out", "score"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_an_update(head, dtype, checkpointing):
    config = NeoXConfig(num_hidden_layers=4, **WIDE)
    size, reference = Size.of(config, head), Size.of(config)
    held = resident({"model": size}, {"reference": reference}, dtype, 1)
    tokens = len(pack(*ROW, max_positions=2048).ids)
    options = dict(cuda=False, checkpointing=checkpointing)
    update = update_memory({"model": size}, {"reference": reference}, dtype, tokens, **options)
    predicted = sum(held.values()) + sum(update.values())
    counted = counted_update(config, head, dtype, checkpointing)
    assert 0.98 < predicted / counted < 1.15
    assert (predicted - held["AdamW"]) / counted < 0.85  # the twins: an item is forgotten
    assert checkpointing or (predicted - update["activations"]) / counted < 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_samples(dtype):
    narrow = dict(vocab_size=8192, hidden_size=64, intermediate_size=256)
    config = NeoXConfig(num_hidden_layers=4, **WIDE | narrow)
    model = NeoX(config).requires_grad_(True)
    model.matmul_dtype = dtype
    prompts, K, R = [[5] * 300] * 8, 4, 40
    live = Live()
    for p in model.parameters():
        live.add(p)
    weights = live.now
    with live:
        generate(model, prompts, K, R, temperature=0.7)
    stage = rollout_memory(Size.of(config), dtype, len(prompts), K, 300, R)
    counted = live.peak - weights
    assert stage["cache"] == 2 * 4 * 64 * 8 * (300 + K * R) * dtype.itemsize
    assert 0.9 < sum(stage.values()) / counted < 1.35
    assert (sum(stage.values()) - stage["cache"]) / counted < 0.85  # the twin


def test_devices_share_what_is_sharded():
    config = NeoXConfig(num_hidden_layers=2, **WIDE)
    size = {"policy": Size.of(config)}
    whole, half = (resident(size, {}, torch.float32, ranks) for ranks in (1, 2))
    assert all(2 * half[name] == whole[name] for name in whole)
    one, two, many = (resident({}, size, torch.bfloat16, ranks)["policy"] for ranks in (1, 2, 10**9))
    assert one - many == 2 * (two - many) == 2 * size["policy"].layers  # embedding and head stay whole
    row = (size, {}, torch.bfloat16, 1000)
    one, two = (update_memory(*row, cuda=True, checkpointing=False, ranks=ranks) for ranks in (1, 2))
    assert 2 * two["gradients"] == one["gradients"] and two["activations"] == one["activations"]
    sampled = [rollout_memory(size["policy"], torch.bfloat16, 9, 2, 50, 5, ranks=n)["cache"] for n in (1, 2)]
    assert sampled[1] / sampled[0] == 5 / 9


def test_parameters_are_counted_as_the_model_has_them():
    """1.01 billion of Pythia 1B; adamw's two moments are as large as the parameters each."""
    shape = work.SHAPES["pythia-1b"]
    size = Size.of(NeoXConfig(50304, shape[0], shape[1], shape[2], 4 * shape[0]))
    assert size.parameters == 1_011_781_632
    config = NeoXConfig(97, 48, 2, 3, 80)
    model = NeoX(config)
    optimizer = adamw(model, 1e-3, eps=1e-5, weight_decay=0.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    held = resident({"policy": Size.of(config)}, {}, torch.float32, 1)
    assert held["AdamW"] == sum(t.nbytes for t in moments)
    assert held["policy"] == sum(p.nbytes for p in model.parameters())


# --- of the scripts


@pytest.mark.parametrize("script", TRAINING, ids=lambda s: s.__name__)
def test_a_dry_run_touches_nothing(tiny, tmp_path, capsys, script):
    options = dict(data_dir=f"{tiny.root}/data", model=f"{tiny.root}/policy", out_dir=str(tmp_path / "run"))
    if "reward_model" in script.Config.__dataclass_fields__:
        options |= dict(reward_model=f"{tiny.root}/rm")
    # planned where there is no card
    result = script.main(script.Config(**options, dry_run=True, device="cuda"))
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == result and result["peak_gib"] == max(result.values())
    assert "matrix products in bfloat16" in printed[0]
    assert ("samples_gib" in result) == (script.__name__ != "train_rm")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_names_what_a_run_holds(tiny, tmp_path, capsys):
    io = dict(data_dir=f"{tiny.root}/data", model=f"{tiny.root}/policy", out_dir=str(tmp_path), dry_run=True)
    for loss, reads in (("dpo", True), ("simpo", False)):
        train_simpo.main(train_simpo.Config(**io, loss=loss))
        assert ("reference" in capsys.readouterr().out) == reads
    two = f"{tiny.root}/rm,{tiny.root}/other_rm"
    train_rloo.main(train_rloo.Config(**io, reward_model=two))
    assert "reward model 2" in capsys.readouterr().out
    with pytest.raises(UserError, match="nowhere: no such directory"):
        train_rloo.main(train_rloo.Config(**io | dict(model="nowhere"), reward_model="x"))


MEASURE = """
import json, re, sys
import torch
import train_sft

def resident(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

torch.randn(64, 64) @ torch.randn(64, 64)
options = json.loads(sys.argv[1])
predicted = train_sft.main(train_sft.Config(**options, dry_run=True))
before = resident("VmRSS")
train_sft.main(train_sft.Config(**options))
print(json.dumps([predicted["peak_gib"], (resident("VmHWM") - before) / 2**30]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_peak_of_a_process(tmp_path, monkeypatch):
    """train_sft.py on a model of Pythia's vocabulary: a gigabyte, beside which the interpreter is small."""
    monkeypatch.setitem(work.SHAPES, "wide", (512, 2, 8))
    size = dict(prompts=4, prompt_tokens=300, response_tokens=20)
    cfg = SimpleNamespace(model="wide", sweep="", peer_rows=0, **size)
    made = work.make_work(cfg, "sft", None, str(tmp_path / "work"))
    work.write_data(made)
    width, layers, heads = work.SHAPES["wide"]
    config = NeoXConfig(work.VOCABULARY, width, layers, heads, 4 * width)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config.to_dict()))
    work.tokenizer().save(str(model / "tokenizer.json"))
    options = dict(
        data_dir=made.data_dir, model=str(model), init="scratch", out_dir=str(tmp_path / "run"), device="cpu",
        batch_size=4, epochs=2.0, micro_batch_tokens=700, eval_rows=2, save_every=0,
        loss_on="response")
    command = [sys.executable, "-c", MEASURE, json.dumps(options)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True, timeout=300)
    predicted, measured = json.loads(done.stdout.splitlines()[-1])
    assert measured > 0.9 and predicted == pytest.approx(measured, rel=0.15)
