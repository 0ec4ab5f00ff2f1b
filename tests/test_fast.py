"""The path of CUDA as far as a machine without a card executes it, and the switch to its plain twin."""

from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from util import WIDE, pair, random_groups, raw_config

import rlhf.generate
from rlhf import config, fast, groups, logprobs
from rlhf.common import load_model, setup
from rlhf.config import RunError
from rlhf.forward import response_scores, token_stats, token_values
from rlhf.generate import Cache, Decoder, generate, generate_all, make_decoder, sample
from rlhf.groups import Groups, block_mask, pack, response_bias
from rlhf.logprobs import head_logits
from rlhf.model import NeoX, NeoXConfig

G = torch.Generator().manual_seed(7)
PROMPTS = [torch.randint(2, 61, (P,), generator=G).tolist() for P in (17, 5, 9, 40, 3)]


@pytest.fixture
def plain():
    yield
    fast.paths.plain = False


# --- tensors of another device, without bytes: what stays on the CPU, or asks for a number, is an error


@pytest.fixture
def meta(monkeypatch):
    """Policy, reference and reward model on the meta device."""
    monkeypatch.setitem(logprobs.CHUNK_BYTES, "meta", 2**16)
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)
    shape = NeoXConfig(512, 48, 2, 3, 80)
    with torch.device("meta"):
        return NeoX(shape), NeoX(shape), NeoX(shape, "score")


def packed() -> Groups:
    prompts, responses = random_groups([[5, 3], [2, 7]])
    return pack(prompts, responses, max_positions=128, device="meta", multiple=128)


def test_forward_and_backward_stay_on_their_device(meta):
    policy, reference, reward_model = meta
    row = packed()
    assert row.segments[-1][2] == []  # the padding is a segment of its own
    stats = token_stats(policy, row, 0.7, reference, mean_logits=True)
    best = token_stats(policy, row, top_k=3)
    (stats.logprobs + stats.entropy).sum().backward()
    best.top_logprobs.sum().backward()
    (response_scores(reward_model, row).sum() + token_values(reward_model, row).sum()).backward()
    for model in (policy, reward_model):
        assert all(p.grad.device.type == "meta" for p in model.parameters())
    assert stats.kl.device.type == stats.mean_logits.device.type == "meta"


def test_a_mask_that_stays_on_the_cpu_is_seen(meta, monkeypatch):
    def on_the_cpu(self, dtype):
        return [response_bias(P, R, dtype) if len(R) > 1 else None for _, P, R in self.segments]

    monkeypatch.setattr(Groups, "response_biases", on_the_cpu)
    with pytest.raises(RuntimeError, match="device"):
        token_stats(meta[0], packed())


@torch.no_grad()
def test_a_decode_step_asks_the_device_nothing(meta):
    """A question, as `bool(x.any())`, is an error on the meta device; a graph could not record it either."""
    decoder = Decoder([meta[0], meta[1]], 3, 2, 20, 5, 0.3)
    logits = decoder.prefill([[5] * 3, [4] * 20, [3] * 7])
    for temperature, top_p in ((0.0, 1.0), (0.7, 1.0), (0.7, 0.9)):
        logits = decoder.step(sample(logits, temperature, top_p))
    assert logits.shape == (6, 512) and logits.device.type == "meta"
    with pytest.raises(RuntimeError):
        bool((logits > 0).any())


# --- logits


def test_logits_are_made_in_one_way(monkeypatch):
    """bfloat16 products: sampling reads the logits that scoring reads, in float32, bit for bit on the CPU."""
    model, _ = pair(raw_config(), seed=2)
    model.matmul_dtype = torch.bfloat16
    made = []
    usual = logprobs.head_logits

    def spy(hidden, weight):
        made.append((hidden.detach(), weight.dtype, usual(hidden, weight)))
        return made[-1][2]

    monkeypatch.setattr(rlhf.generate, "head_logits", spy)
    monkeypatch.setattr(logprobs, "head_logits", spy)
    responses, _ = generate(model, PROMPTS[:1], 1, 3, temperature=0)
    token_stats(model, pack(PROMPTS[:1], responses, max_positions=128))
    sampled, scored = made[:-1], made[-1]
    assert len(sampled) == len(responses[0][0]) > 1
    assert all(dtype == torch.bfloat16 and z.dtype == torch.float32 for _, dtype, z in made)
    assert torch.equal(usual(scored[0], model.embed_out.weight.to(torch.bfloat16)), scored[2])
    first = sampled[0][0][:1], scored[0][:1]  # hidden states of the first token: packed alike
    assert (first[0] - first[1]).abs().max() < 1e-5
    assert (sampled[0][2][0] - scored[2][0]).abs().max() < 1e-5


def test_logits_of_bfloat16_products_are_never_rounded_on_cuda():
    """On fake CUDA tensors: no (m, V) of bfloat16 exists between the product and its float32 result."""
    with FakeTensorMode(), torch.no_grad():
        hidden = torch.empty(4, 64, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(512, 64, device="cuda", dtype=torch.bfloat16)
        z = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        assert z.dtype == torch.float32 and z.shape == (4, 512)
        assert (hidden @ weight.t()).dtype == torch.bfloat16  # the twin
    seen = []

    class Weight:
        """Says of itself what `head_logits` asks a CUDA weight."""
        is_cuda, dtype, device, T = True, torch.bfloat16, torch.device("cpu"), "transposed"

    class Hidden:
        def to(self, dtype):
            return dtype

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "mm", lambda *args, **options: seen.append((args, options)))
        head_logits(Hidden(), Weight())
    assert seen == [((torch.bfloat16, "transposed"), {"out_dtype": torch.float32})]


# --- a decoder, its cache and its recorded step serve all calls of equal shape


def stand_in(step):
    """A recorded step: replays read the tensors that the step reads, and write its one result."""
    out = step()

    def replay():
        return out.copy_(step())

    return replay


def stale(step):
    """The twin: what a graph does whose inputs are new tensors at every step."""
    out = step()
    return lambda: out


@pytest.mark.parametrize("mixture", [0.0, 0.4])
def test_replayed_steps_are_the_plain_ones(monkeypatch, mixture):
    model, other = pair(raw_config(), seed=2)[0], pair(raw_config(), seed=3)[0]
    options = dict(reference=other, mixture=mixture, temperature=0.7)

    def run(batch: int) -> list:
        generator = torch.Generator().manual_seed(1)
        return generate_all(model, PROMPTS, 2, 6, batch=batch, generator=generator, **options)[0]

    expected = run(2)
    recordings = []
    monkeypatch.setattr(rlhf.generate, "records", lambda device: True)
    monkeypatch.setattr(rlhf.generate, "recorded", lambda step: recordings.append(1) or stand_in(step))
    assert run(2) == expected
    assert len(recordings) == 2  # batches of 2, 2 and 1 prompts
    monkeypatch.setattr(rlhf.generate, "recorded", stale)
    assert run(2) != expected


def test_a_decoder_forgets_the_call_before(monkeypatch):
    model, _ = pair(raw_config(), seed=2)
    batches = [PROMPTS[:2], PROMPTS[3:], PROMPTS[1:3]]  # a short prompt after the longest
    expected = [generate(model, some, 2, 6, temperature=0)[0] for some in batches]

    def shared() -> list:
        decoder = make_decoder(model, PROMPTS, 2, 2, 6)
        return [generate(model, some, 2, 6, temperature=0, decoder=decoder)[0] for some in batches]

    assert shared() == expected
    monkeypatch.setattr(Cache, "set_lengths", lambda self, lengths: None)
    assert shared() != expected


def test_a_step_that_cannot_be_recorded_names_the_switch(monkeypatch):
    class Broken:
        def __init__(self, graph):
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", Broken)
    with pytest.raises(RunError, match="CUDA graph .operation not permitted.*--plain does without"):
        rlhf.generate.recorded(lambda: None)


# --- attention: both paths on the CPU, and what the kernel is told


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
def test_both_attentions_are_one_function(monkeypatch):
    model, _ = pair(raw_config(), seed=2)
    prompts, responses = random_groups([[5, 3, 1], [2, 7, 4]])
    row = pack(prompts, responses, max_positions=128, multiple=128)
    with torch.no_grad():
        by_groups = token_stats(model, row).logprobs
        monkeypatch.setattr(Groups, "attend", lambda self, layer, q, k, v: self.flex_attend(q, k, v))
        by_flex = token_stats(model, row).logprobs
        assert (by_groups - by_flex).abs().max() < 1e-4
        merged = [(start, P, [sum(lengths)]) for start, P, lengths in row.segments]
        row._block_mask = block_mask(merged, len(row.ids), row.ids.device)
        assert (token_stats(model, row).logprobs - by_groups).abs().max() > WIDE  # responses see each other


@pytest.mark.parametrize("D", [32, 64, 80, 96, 128, 256])
def test_blocks_of_the_kernel_divide_those_of_the_mask(D):
    options = fast.flex_options(256, D)
    assert options["IS_DIVISIBLE"] and not fast.flex_options(200, D)["IS_DIVISIBLE"]
    blocks = {name[-2:]: value for name, value in options.items() if "BLOCK" in name}
    assert bool(blocks) == (D == 256)
    assert all(groups.FLEX_BLOCK % value == 0 for value in blocks.values())
    if blocks:  # asserted by torch's backward kernel
        assert blocks["N1"] % blocks["M1"] == 0 and blocks["M2"] % blocks["N2"] == 0


# --- the switch


def test_plain_leaves_out_every_fast_path(plain, tiny, monkeypatch):
    compiled, taken = [], []
    monkeypatch.setattr(Groups, "flex_attend", lambda *args: taken.append("flex"))
    monkeypatch.setattr(groups, "group_attention", lambda *args: taken.append("groups"))
    monkeypatch.setattr("rlhf.common.compile_layers", lambda model: compiled.append(model))
    monkeypatch.setattr("rlhf.common.compile_kernels", lambda: None)
    cuda = torch.device("cuda")
    options = dict(data_dir=f"{tiny.root}/data", revision="main", device=torch.device("cpu"), dtype="float32")
    for switched in (False, True):
        setup(1, "cpu", switched)
        load_model(f"{tiny.root}/policy", compiled=True, **options)
        assert rlhf.generate.records(cuda) == (not switched)
        assert not rlhf.generate.records(torch.device("cpu"))

        q = SimpleNamespace(is_cuda=True, dtype=torch.float32)
        pack([[5, 6]], [[[7]]], max_positions=9).attend(0, q, None, None)
    assert taken == ["flex", "groups"]
    assert len(compiled) == 1


@dataclass
class Empty:
    """The options of a script that has none."""


def test_an_error_of_the_compiler_names_the_switch(monkeypatch, capsys):
    from torch._inductor.exc import InductorError

    def broken(cfg):
        raise InductorError(RuntimeError("Failed to find C compiler."), None)

    parser = SimpleNamespace(parse_args=lambda: Empty())
    monkeypatch.setattr(config, "parser", lambda *args: parser)
    with pytest.raises(SystemExit) as stopped:
        config.command_line(broken, Empty)
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and "Failed to find C compiler" in said and "--plain" in said
