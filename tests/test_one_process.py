"""One process: it loads nothing of torch.distributed, learns what it always learnt, and every function of
rlhf/dist.py gives back what it gets. And what of that file needs no other rank."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import weights

import train_sft
from rlhf import dist
from rlhf.common import learning_rate
from rlhf.config import UserError
from rlhf.data import batch_indices
from rlhf.forward import summed_nll
from rlhf.groups import pack
from rlhf.model import NeoX
from rlhf.pretrained import from_pretrained
from train_sft import learnt_part

ROOT = Path(__file__).parents[1]


def test_one_process_loads_nothing_of_it():
    code = """
import sys
import train_rloo
from rlhf import dist
assert not dist.LAUNCHED and not hasattr(dist, "fully_shard")
loaded = {".".join(name.split(".")[:3]) for name in sys.modules}
assert not loaded & {"torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.run"}
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


def plain_sft(tiny, learn: Callable) -> dict[str, torch.Tensor]:
    """Final weights of SFT as it is written down without rlhf/dist.py."""
    model = from_pretrained(str(tiny.root / "policy"), dtype="float32")
    optimizer = torch.optim.AdamW(model.parameters(), eps=1.0, weight_decay=0.01, fused=True)
    rows = tiny.rows("sft_train")
    updates = len(rows) // 6
    for step in range(updates):
        some = [rows[i] for i in batch_indices(len(rows), 6, step, 1)]
        pairs = [learnt_part(row["query_token"], row["reference_response_token"], "all") for row in some]
        prompts, responses = zip(*pairs)
        groups = pack(list(prompts), list(responses), max_positions=256)
        (summed_nll(model, groups) / sum(len(r[0]) for r in responses)).backward()
        optimizer.param_groups[0]["lr"] = learning_rate(step, updates, 0.1, "cosine", 0.0)
        learn(model, optimizer)
        optimizer.zero_grad()
    return dict(model.named_parameters())


def clip_and_step(model: NeoX, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def test_one_process_learns_what_it_learnt_before_there_were_ranks_to_the_last_bit(tiny):
    plain = plain_sft(tiny, clip_and_step)
    ours = weights(tiny.run(train_sft, max_grad_norm=1.0))
    assert plain.keys() == ours.keys() and all(torch.equal(plain[name], ours[name]) for name in ours)
    unclipped = plain_sft(tiny, lambda model, optimizer: optimizer.step())  # the twin
    assert not all(torch.equal(unclipped[name], ours[name]) for name in ours)


def test_one_process_pays_nothing(tiny):
    """Every function gives back what it gets: no copy, no message."""
    model = from_pretrained(str(tiny.root / "policy"))
    parameters = list(model.parameters())
    slices, parts = [slice(0, 3), slice(3, 4)], [1.0, 2.0]
    assert dist.deal(slices) == slices and dist.gather(parts, slices) is parts
    assert dist.share(5, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert dist.whole(model) is model and dist.units(model) == []
    assert all(a is b for a, b in zip(dist.parameters(model).values(), parameters, strict=True))
    assert dist.by_kind(parameters) == [parameters]
    for parameter in parameters:
        own, rows = dist.own_rows(parameter)
        assert own is parameter and rows == slice(0, len(parameter))
        assert dist.full(parameter).data_ptr() == parameter.data_ptr()
    assert dist.exchange(7) == [7] and dist.on_first(lambda: 8) == 8


# --- the deal


def of_all_ranks(monkeypatch, ranks: int, function: Callable, *args) -> list:
    monkeypatch.setattr(dist, "RANKS", ranks)
    out = []
    for rank in range(ranks):
        monkeypatch.setattr(dist, "RANK", rank)
        out.append(function(*args))
    return out


def test_every_rank_gets_as_many_micro_batches_and_every_prompt_once(monkeypatch):
    draw = random.Random(1)
    for _ in range(500):
        ranks = draw.randint(1, 9)
        prompts = draw.randint(ranks, 40)
        cuts = sorted(draw.sample(range(1, prompts), draw.randint(0, prompts - 1)))
        slices = [slice(a, b) for a, b in zip([0, *cuts], [*cuts, prompts])]
        dealt = of_all_ranks(monkeypatch, ranks, dist.deal, slices)
        assert len({len(own) for own in dealt}) == 1
        assert sorted(i for own in dealt for s in own for i in range(s.start, s.stop)) == [*range(prompts)]
        shared = of_all_ranks(monkeypatch, ranks, dist.share, prompts, draw.randint(1, 9))
        assert [i for own in shared for s in own for i in range(s.start, s.stop)] == [*range(prompts)]


def test_fewer_prompts_than_ranks_are_computed_several_times(monkeypatch):
    dealt = of_all_ranks(monkeypatch, 3, dist.deal, [slice(0, 2)])
    assert dealt == [[slice(0, 1)], [slice(1, 2)], [slice(1, 2)]]


def test_fewer_cards_than_ranks(monkeypatch):
    """Found before any rank waits for another."""
    monkeypatch.setattr(dist, "LAUNCHED", True)
    monkeypatch.setattr(dist, "RANKS", 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="^4 ranks on a machine with 2 GPUs: --nproc_per_node is at most"):
        dist.join("cuda", timeout=1.0)
    with pytest.raises(UserError, match="^--device=cuda:1 with 4 ranks: give --device=cuda, each takes its"):
        dist.join("cuda:1", timeout=1.0)
