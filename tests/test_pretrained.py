"""Directories of weights: ours open in transformers and theirs here, with the same numbers; and what is wrong
with a directory is said by name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from util import TOLERANCE, WIDE, error, hidden_of, logits_of, pair, raw_config, tiny_tokenizer

from rlhf.config import UserError
from rlhf.model import NeoX, NeoXConfig
from rlhf.pretrained import from_pretrained, load_tokenizer, matmul_dtype, save_pretrained

IDS = torch.randint(2, 61, (29,), generator=torch.Generator().manual_seed(6)).tolist()
TOKENIZER = tiny_tokenizer()
AUTO = {"embed_out": AutoModelForCausalLM, "score": AutoModelForSequenceClassification}
SHARD = 40_000  # bytes: the small models below have 200 to 400 KB
TEXT = "The cat  sat on <|endoftext|>the mat,\n\nand naïve Zürich 漢字 🙂 don't\t12345<|padding|> end "


def outputs(ours: NeoX) -> torch.Tensor:
    """Logits at every position, or the reward of the whole sequence."""
    with torch.no_grad():
        return logits_of(ours, IDS) if ours.head == "embed_out" else ours.scores(hidden_of(ours, IDS)[-1:])


def their_outputs(theirs) -> torch.Tensor:
    with torch.no_grad():
        return theirs(torch.tensor([IDS])).logits[0]


# --- both ways


@pytest.mark.parametrize("shard_bytes", [10**9, SHARD])
@pytest.mark.parametrize("head", ["embed_out", "score"])
@pytest.mark.parametrize("variant", ["parallel residual", "tied embeddings", "all at once"])
def test_ours_opens_in_transformers(variant, head, shard_bytes, tmp_path):
    ours, _ = pair(raw_config(variant), head)
    save_pretrained(ours, TOKENIZER, tmp_path, shard_bytes=shard_bytes)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) == 1 if shard_bytes > SHARD else len(files) > 3
    theirs, info = AUTO[head].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert theirs.dtype == torch.float32
    assert error(outputs(ours), their_outputs(theirs)) < TOLERANCE
    again = from_pretrained(str(tmp_path), head=head)
    assert again.config == ours.config and all(
        torch.equal(p, q) for p, q in zip(again.parameters(), ours.parameters(), strict=True)
    )


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("head", ["embed_out", "score"])
@pytest.mark.parametrize("variant", ["parallel residual", "tied embeddings", "all at once"])
def test_transformers_opens_here(variant, head, shards, tmp_path):
    _, theirs = pair(raw_config(variant), head)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB" if shards else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    assert error(outputs(from_pretrained(str(tmp_path), head=head)), their_outputs(theirs)) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", ["parallel residual", "tied embeddings"])
def test_half_precision_on_disk(variant, dtype, tmp_path):
    """Weights that are exact in `dtype` come back as they were, in float32; so do ours, saved in `dtype`, in
    transformers."""
    ours, theirs = pair(raw_config(variant), dtype=dtype)
    theirs.to(dtype).save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert load_file(next((tmp_path / "theirs").glob("*.safetensors"))).popitem()[1].dtype == dtype
    here = from_pretrained(str(tmp_path / "theirs"))
    assert here.gpt_neox.embed_in.weight.dtype == torch.float32 and torch.equal(outputs(here), outputs(ours))
    save_pretrained(ours, TOKENIZER, tmp_path / "ours", dtype=dtype)
    assert (
        error(
            outputs(ours),
            their_outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)),
        )
        < TOLERANCE
    )
    # what config.json says is what the file holds
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours").dtype == dtype


def test_dtype_is_that_of_the_products_and_weights_stay_float32(tmp_path):
    """A weight in bfloat16 would not move at a learning rate of 1e-6."""
    ours, _ = pair(raw_config())
    save_pretrained(ours, TOKENIZER, tmp_path)
    for dtype, expected in (
        ("auto", torch.float32),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
    ):
        model = from_pretrained(str(tmp_path), dtype=dtype)
        assert model.matmul_dtype == expected and {p.dtype for p in model.parameters()} == {torch.float32}
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), ours.parameters(), strict=True))
    assert from_pretrained(str(tmp_path)).matmul_dtype == torch.float32
    assert matmul_dtype("auto", torch.device("cuda:1")) == torch.bfloat16
    assert matmul_dtype("float32", torch.device("cuda")) == torch.float32


def test_a_tied_model_stays_tied(tmp_path):
    save_pretrained(pair(raw_config("tied embeddings"))[0], TOKENIZER, tmp_path)
    model = from_pretrained(str(tmp_path))
    assert model.embed_out.weight is model.gpt_neox.embed_in.weight
    assert "embed_out.weight" not in load_file(tmp_path / "model.safetensors")


def test_a_new_single_file_beside_old_shards_is_the_one_that_both_read(tmp_path):
    old, new = pair(raw_config(), seed=0)[0], pair(raw_config(), seed=1)[0]
    save_pretrained(old, TOKENIZER, tmp_path, shard_bytes=SHARD)
    save_pretrained(new, TOKENIZER, tmp_path)
    assert torch.equal(outputs(from_pretrained(str(tmp_path))), outputs(new))
    assert error(outputs(new), their_outputs(AutoModelForCausalLM.from_pretrained(tmp_path))) < TOLERANCE


def test_auto_tokenizer(tmp_path):
    save_pretrained(pair(raw_config())[0], TOKENIZER, tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT).ids == TOKENIZER.encode(TEXT).ids
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id, theirs.padding_side) == (
        0, 0, 1, "right",
    )
    assert theirs.decode(ours.encode("the mat, naïve 🙂").ids) == "the mat, naïve 🙂"


# --- the mean-zero rule of a reward model


def test_offset_survives_in_transformers(tmp_path):
    """Every score falls by the offset, here and, from the saved files, in transformers with a batch padded on
    the right."""
    ours, theirs = pair(raw_config(), head="score")
    rows = [IDS[:5], IDS[5:25], IDS[:29]]
    padded = torch.tensor([row + [1] * (29 - len(row)) for row in rows])

    def scores():
        with torch.no_grad():
            return torch.stack([ours.scores(hidden_of(ours, row)[-1]) for row in rows])

    before = scores()
    ours.fold_offset(3.25)
    assert error(before - 3.25, scores()) < TOLERANCE
    save_pretrained(ours, TOKENIZER, tmp_path)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert error(scores(), saved(padded, attention_mask=padded != 1).logits[:, 0]) < TOLERANCE
        # the twin: before the offset
        assert error(scores(), theirs(padded, attention_mask=padded != 1).logits[:, 0]) > WIDE


def test_reward_model_from_a_language_model(tmp_path):
    ours, _ = pair(raw_config("tied embeddings"))
    save_pretrained(ours, TOKENIZER, tmp_path)
    one, same, other = (
        from_pretrained(str(tmp_path), head="score", new_head=True, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(hidden_of(one, IDS), hidden_of(ours, IDS))
    assert torch.equal(one.score.weight, same.score.weight) and not torch.equal(
        one.score.weight, other.score.weight
    )


def test_scratch_reads_only_the_config(tmp_path):
    config = NeoXConfig.from_dict(raw_config("tied embeddings"))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    model = from_pretrained(str(tmp_path), init="scratch", seed=3)
    assert all(
        torch.equal(p, q)
        for p, q in zip(model.parameters(), NeoX(config).init_weights(3).parameters(), strict=True)
    )


def test_a_reward_model_from_scratch_has_the_head_of_one_from_a_language_model(tmp_path):
    ours, _ = pair(raw_config("tied embeddings"))
    save_pretrained(ours, TOKENIZER, tmp_path)
    options = {"head": "score", "new_head": True, "seed": 3}
    scratch, trained = (from_pretrained(str(tmp_path), init=init, **options)
                        for init in ("scratch", "pretrained"))
    assert torch.equal(scratch.score.weight, trained.score.weight)
    assert not torch.equal(scratch.gpt_neox.embed_in.weight, trained.gpt_neox.embed_in.weight)


# --- what old files hold besides, and what is wrong with broken ones


def edit(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def saved(tmp_path):
    ours, _ = pair(raw_config())
    save_pretrained(ours, TOKENIZER, tmp_path)
    return ours, tmp_path


def test_buffers_of_old_pythia_files_are_ignored(saved):
    ours, directory = saved
    for layer in range(2):
        name = f"gpt_neox.layers.{layer}.attention"
        edit(
            directory,
            lambda t, name=name: t.update(
                {
                    f"{name}.bias": torch.ones(1, 1, 128, 128).tril().bool(),
                    f"{name}.masked_bias": torch.tensor(-1e9), f"{name}.rotary_emb.inv_freq": torch.ones(2),
                }
            ),
        )
    assert torch.equal(outputs(from_pretrained(str(directory))), outputs(ours))


def truncate(directory: Path, share: float) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


BIAS = "gpt_neox.layers.1.attention.dense.bias"
EMPTY_CONFIG = {"model_type": "gpt_neox"}


@pytest.mark.parametrize(
    "breakage, named",
    [
        (lambda d: edit(d, lambda t: t.pop(BIAS)), f"missing from the file: {BIAS}"),
        (lambda d: edit(d, lambda t: t.update(extra=torch.ones(2))), "unexpected tensor extra"),
        (
            lambda d: edit(d, lambda t: t.update({BIAS: torch.ones(47)})),
            rf"{BIAS} has shape \[47\], config.json asks for \[48\]",
        ),
        (lambda d: truncate(d, 0.7), "model.safetensors: not a readable safetensors file"),
        (lambda d: truncate(d, 0), "model.safetensors: not a readable safetensors file"),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors: missing"),
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (lambda d: (d / "config.json").write_text('{"model_type":'), "config.json: cannot be read"),
        (lambda d: (d / "config.json").write_text(json.dumps(EMPTY_CONFIG)), "lacks vocab_size"),
        (
            lambda d: (d / "config.json").write_text(json.dumps(raw_config(num_hidden_layers=3))),
            "gpt_neox.layers.2",
        ),
    ],
)
def test_broken_directories(saved, breakage, named):
    breakage(saved[1])
    with pytest.raises(UserError, match=named):
        from_pretrained(str(saved[1]))


def test_missing_shard_and_broken_tokenizer(saved, tmp_path):
    ours, directory = saved
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer.json: not a readable tokenizer"):
        load_tokenizer(str(directory))
    shards = tmp_path / "shards"
    save_pretrained(ours, TOKENIZER, shards, shard_bytes=SHARD)
    lost = sorted(shards.glob("*.safetensors"))[2]
    lost.unlink()
    with pytest.raises(UserError, match=f"{lost.name}: missing"):
        from_pretrained(str(shards))


def test_wrong_kind_of_model(saved, tmp_path):
    ours, directory = saved
    with pytest.raises(UserError, match="is a language model, not a reward model"):
        from_pretrained(str(directory), head="score")
    save_pretrained(pair(raw_config(), head="score")[0], TOKENIZER, tmp_path / "rm")
    with pytest.raises(UserError, match="rm: is a reward model, not a language model"):
        from_pretrained(str(tmp_path / "rm"))


@pytest.mark.parametrize("name", ["nowhere", "out/toy/sft", "./some/where", "nobody/no-such-model"])
def test_no_such_model(name):
    with pytest.raises(UserError, match=name):
        from_pretrained(name)


# --- memory

LOADER = """
import sys
sys.path.insert(0, sys.argv[1])
from rlhf.pretrained import from_pretrained
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
from_pretrained(sys.argv[2])  # what the first call imports is no part of a model
before = peak()
model = from_pretrained(sys.argv[3])
print(peak() - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(),
    reason="no /proc: the peak memory of loading a model is not measured",
)
def test_loading_holds_one_copy(saved, tmp_path):
    """A model of 200 MB, and the most that a fresh process holds while it loads it: mapped pages of the file
    count too."""
    config = NeoXConfig(
        vocab_size=1000, hidden_size=1024, num_hidden_layers=4, num_attention_heads=8, intermediate_size=4096
    )
    save_pretrained(NeoX(config), TOKENIZER, tmp_path / "large")
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", LOADER, root, saved[1], tmp_path / "large"],
        capture_output=True,
        text=True,
        check=True,
    )
    growth, size = map(int, done.stdout.split())
    assert size > 190e6 and growth < 1.5 * size, (growth, size)
