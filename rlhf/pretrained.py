"""Models and tokenizers from and to Hugging Face directories: config.json, model.safetensors (one file or
shards), tokenizer.json."""

import json
import math
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from rlhf.config import RunError, UserError
from rlhf.dist import FIRST, LAUNCHED, exchange, fill, full, own_rows, parameters, shard
from rlhf.model import EOS, NeoX, NeoXConfig


def resolve(path_or_id: str, revision: str = "main") -> Path:
    """A local directory with a config.json, or the local copy of a hub repository (config, tokenizer,
    safetensors), downloaded if need be."""
    path = Path(path_or_id)
    if not path.is_dir():
        path = downloaded(path_or_id, revision)
    if (path / "adapter_config.json").exists() and not has_weights(path):
        raise UserError(
            f"{path_or_id}: a LoRA adapter, not a model: merge it into its base model first, with peft's "
            "AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(DIRECTORY)"
        )
    if not (path / "config.json").exists():
        raise UserError(
            f"{path_or_id}: no config.json there "
            "(a half-written or unfinished run? look in its ckpt/ folder, or continue it with --resume)"
        )
    return path


def downloaded(hub_id: str, revision: str) -> Path:
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/", "out/")):
        raise UserError(
            f"{hub_id}: no such directory (and not a hub id like EleutherAI/pythia-1b-deduped)"
        )
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the client has a dozen error types; each means: not to be had
        said = str(error).splitlines()[0]
        raise UserError(
            f"{hub_id} (revision {revision}): not a local directory, and the hub says: {said}"
        ) from error


def has_weights(directory: Path) -> bool:
    """Are there safetensors of a model, in one file or in shards? A shard may still be missing."""
    return any((directory / f"model.safetensors{ending}").exists() for ending in ("", ".index.json"))


def check_weights(directory: Path, name: str) -> None:
    """Raises UserError, saying what to do, for a model directory without safetensors."""
    if has_weights(directory):
        return
    if any(directory.glob("pytorch_model*.bin*")):
        raise UserError(
            f"{name}: only pytorch_model.bin, which is not read here (a pickle may run code): convert it "
            "with transformers' AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(DIRECTORY) "
            "(a reward model: AutoModelForSequenceClassification)"
        )
    raise UserError(
        f"{name}: a config.json without weights (model.safetensors: missing): train_sft.py --init=scratch "
        "starts from random ones; an incomplete download or run has to be finished first; a hub repository "
        "that has only pytorch_model.bin has to be converted with transformers' save_pretrained"
    )


def check_padding(config: dict, name: str) -> None:
    """Warns of a reward model that transformers, which looks for the last token that is no padding, would
    read elsewhere."""
    if config.get("pad_token_id") == EOS:
        print(
            f"warning: {name}: its padding token is the EOS, so TRL and transformers read its score at the "
            "token before the EOS, and it may be trained so; here the score is read at the EOS",
            file=sys.stderr,
        )


def read_json(path: Path) -> dict:
    """The object that a JSON file holds; UserError for anything else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, {{...}}")
    return content


def load_weights(model: NeoX, directory: Path, skip: tuple[str, ...] = ()) -> None:
    """Copies the safetensors of `directory` (one file or a sharded index; float16, bfloat16 or float32)
    into `model`, one tensor at a time.

    Strict: a tensor missing here or there is an error, but for the mask and rotary buffers of old Pythia
    files and the names in `skip`.
    """
    wanted = {name: p for name, p in parameters(model).items() if name not in skip}
    buffers = (".attention.bias", ".masked_bias", ".rotary_emb.inv_freq")
    known = {*skip, "embed_out.weight"} if model.config.tie_word_embeddings else {*skip}
    missing, others = load_tensors(wanted, weight_files(directory))
    for key, file in others.items():
        if key not in known and not key.endswith(buffers):
            raise UserError(f"{file}: unexpected tensor {key}; is it the model that is meant?")
    check_found(directory, missing)


def load_tensors(wanted: dict[str, torch.Tensor], files: list[Path]) -> tuple[set[str], dict[str, Path]]:
    """Fills the tensors that the safetensors files have; the names that they lack, and where others are."""
    missing = set(wanted)
    others = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                keys = list(tensors.keys())
            for key in keys:
                if key in wanted:
                    copy_tensor(file, key, wanted[key])
                    missing.discard(key)
                else:
                    others[key] = file
        except UserError:
            raise
        except Exception as error:  # safetensors raises its own SafetensorError for truncated files
            raise UserError(f"{file}: not a readable safetensors file ({error}): half-written or "
                            "damaged; take another checkpoint, or download it again") from error
    return missing, others


def check_found(directory: Path, missing: set[str]) -> None:
    if missing:
        names = ", ".join(sorted(missing)[:4]) + (" ..." if len(missing) > 4 else "")
        raise UserError(f"{directory}: tensors missing from the file: {names}; is it the model meant?")


def weight_files(directory: Path, name: str = "model") -> list[Path]:
    """One file, or the shards of an index; where both lie, transformers takes the one file too."""
    index = directory / f"{name}.safetensors.index.json"
    names = [f"{name}.safetensors"]
    if index.exists() and not (directory / names[0]).exists():
        names = sorted(set(read_json(index)["weight_map"].values()))
    for file in names:
        if not (directory / file).exists():
            raise UserError(f"{directory / file}: missing: download the model again, or take another "
                            "checkpoint")
    return [directory / file for file in names]


@torch.no_grad()
def copy_tensor(file: Path, key: str, parameter: torch.Tensor) -> None:
    """The file is opened for each tensor: the pages of a mapped file count as memory of this process until it
    is closed, and that would be a second copy of the model."""
    own, rows = own_rows(parameter)
    with safe_open(file, "pt") as tensors:
        stored = tensors.get_slice(key)
        shape = stored.get_shape()
        if shape != list(parameter.shape):
            raise UserError(f"{file}: {key} has shape {shape}, config.json asks for "
                            f"{list(parameter.shape)}: one of the two is of another model")
        own.copy_(stored[rows])
    if not all_finite(own):
        raise UserError(f"{file}: {key} holds numbers that are not finite: the run diverged; "
                        "take an earlier checkpoint, or train again with a lower --lr")


@torch.no_grad()
def all_finite(tensor: torch.Tensor) -> bool:
    if not tensor.numel():  # a rank's share of a tensor with fewer rows than ranks
        return True
    low, high = tensor.aminmax()  # nan if one is; no mask as large as the tensor
    return math.isfinite(low) and math.isfinite(high)


def matmul_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """--dtype as torch has it; "auto" is bfloat16 on CUDA, float32 on the CPU."""
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def from_pretrained(
    path_or_id: str, *, revision: str = "main", head: str = "embed_out", init: str = "pretrained",
    new_head: bool = False, seed: int = 0, device: torch.device | str = "cpu", dtype: str = "auto",
    sharded: bool = False,
) -> NeoX:
    """A model from a Hugging Face directory or hub id.

    head      "embed_out" (language model) or "score" (reward model)
    init      "pretrained", or "scratch": only config.json is read, weights are drawn from `seed`
    new_head  start a reward model from a language model or from scratch: `score` is drawn from `seed`
    dtype     of matrix products, "auto", "float32" or "bfloat16". The weights are float32 in memory: in
              bfloat16 they would not move at a learning rate of 1e-6
    sharded   under torchrun each rank holds some rows of each weight (dist.py)

    Memory: the parameters are allocated once, on `device`, and filled tensor by tensor.
    Raises UserError (see `resolve`, `load_weights`).
    """
    directory = resolve(path_or_id, revision)
    raw = read_json(directory / "config.json")
    config = NeoXConfig.from_dict(raw)
    if init != "scratch":
        check_weights(directory, path_or_id)
    with torch.device("meta"):
        model = NeoX(config, head)
    model.matmul_dtype = matmul_dtype(dtype, torch.device(device))
    if sharded and LAUNCHED:
        shard(model)
    model = model.to_empty(device=device)
    if config.tie_word_embeddings and head == "embed_out":  # to_empty gives each name memory of its own
        model.embed_out.weight = model.gpt_neox.embed_in.weight
    if init == "scratch":
        fresh = NeoX(config, head).init_weights(seed)
        for name, parameter in parameters(model).items():
            fill(parameter, fresh.get_parameter(name).detach())
    else:
        if head == "score" and not new_head:
            if "ForCausalLM" in str(raw.get("architectures")):
                raise UserError(
                    f"{path_or_id}: is a language model, not a reward model (train one with train_rm.py)"
                )
            check_padding(raw, path_or_id)
        if head == "embed_out" and "ForSequenceClassification" in str(raw.get("architectures")):
            raise UserError(
                f"{path_or_id}: is a reward model, not a language model (train one with train_sft.py)"
            )
        skip = ("score.weight", "embed_out.weight") if new_head else ()
        load_weights(model, directory, skip)
    if new_head:
        std = 1 / math.sqrt(config.hidden_size + 1)
        noise = torch.randn(1, config.hidden_size, generator=torch.Generator().manual_seed(seed))
        fill(model.score.weight, noise * std)
    return model


def save_pretrained(
    model: NeoX, tokenizer: Tokenizer, directory: Path, dtype: torch.dtype = torch.float32,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes config.json, model.safetensors (sharded above `shard_bytes`) and the tokenizer: a directory
    that `transformers` opens with the same numbers. Of a sharded model all ranks send their rows."""
    tensors = parameters(model)  # a tied weight once, under its first name, as transformers does
    bad = [name for name, tensor in tensors.items() if not all_finite(own_rows(tensor)[0])]
    if bad := sum(exchange(bad), []):
        raise RunError(f"{bad[0]} holds numbers that are not finite, so it was not saved: train again "
                       "with a lower --lr")
    if FIRST:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "config.json", saved_config(model, dtype))
        save_tokenizer(tokenizer, directory, model.config.max_position_embeddings)
    save_tensors(tensors, directory, "model", dtype, shard_bytes)


def save_tensors(
    tensors: dict[str, torch.Tensor], directory: Path, name: str, dtype: torch.dtype = torch.float32,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes <name>.safetensors, or above `shard_bytes` several files and their index; floating-point numbers
    as `dtype`. The first rank writes, and holds one file at a time."""
    shards = [[]]  # names of the tensors in each
    size = 0
    for key, tensor in tensors.items():
        own = tensor.numel() * dtype.itemsize
        if size + own > shard_bytes and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += own
    files = [f"{name}.safetensors"]
    if len(shards) > 1:
        files = [f"{name}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, keys in zip(files, shards):
        copies = {}
        for key in keys:
            tensor = full(tensors[key])
            kept = dtype if tensor.is_floating_point() else tensor.dtype
            copies |= {key: tensor.to("cpu", kept).contiguous()} if FIRST else {}
        if FIRST:
            save_file(copies, directory / file, metadata={"format": "pt"})
    if len(shards) > 1 and FIRST:
        weight_map = {key: file for file, keys in zip(files, shards) for key in keys}
        total = sum(tensor.numel() * dtype.itemsize for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / f"{name}.safetensors.index.json", index)


def saved_config(model: NeoX, dtype: torch.dtype) -> dict:
    """The config.json of a model: its architecture, and which class of transformers opens it."""
    config = model.config.to_dict()
    config |= dict.fromkeys(["dtype", "torch_dtype"], str(dtype).removeprefix("torch."))
    if model.head == "embed_out":
        return config | {"architectures": ["GPTNeoXForCausalLM"]}
    labels = {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    return config | {"architectures": ["GPTNeoXForSequenceClassification"], **labels}


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def save_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """tokenizer.json and the two small files that make `AutoTokenizer.from_pretrained` open it."""
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True))  # an OSError where it fails
    end = "<|endoftext|>"
    special = {"bos_token": end, "eos_token": end, "unk_token": end, "pad_token": "<|padding|>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    write_json(directory / "tokenizer_config.json", {**config, "padding_side": "right", **special})
    write_json(directory / "special_tokens_map.json", special)


def load_tokenizer(path_or_id: str, revision: str = "main") -> Tokenizer:
    """The tokenizer.json of a model directory or hub id. Raises UserError if its EOS is not token 0, as it
    is in the GPT-NeoX tokenizer: data and samples here end in that one."""
    directory = resolve(path_or_id, revision)
    tokenizer = read_tokenizer(directory / "tokenizer.json")
    if (file := directory / "tokenizer_config.json").exists():
        eos = read_json(file).get("eos_token")
        eos = eos.get("content") if isinstance(eos, dict) else eos
        if eos is not None and (found := tokenizer.token_to_id(eos)) != EOS:
            raise UserError(
                f"{path_or_id}: its tokenizer ends a text with {eos!r} (token {found}); only models whose "
                f"EOS is token {EOS}, {tokenizer.id_to_token(EOS)!r} here, are supported (Pythia, GPT-NeoX)"
            )
    return tokenizer


def read_tokenizer(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"{file}: not a readable tokenizer ({error})") from error
