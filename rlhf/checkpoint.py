"""The optimizer's state on disk, and back: the same file, however many ranks wrote it or read it."""

from pathlib import Path

import torch
from safetensors import safe_open

from rlhf.config import UserError
from rlhf.dist import on_first, parameters
from rlhf.files import checksum
from rlhf.model import NeoX
from rlhf.pretrained import check_found, load_tensors, load_weights, read_json, weight_files


def check_whole(checkpoint: Path) -> None:
    """Raises UserError unless every file has the checksum that it was written with."""
    sums = checkpoint / "checksums.json"
    if not sums.exists():  # of a version without them
        return
    for name, expected in read_json(sums).items():
        file = checkpoint / name
        if not file.exists() or checksum(file) != expected:
            raise UserError(f"{file}: damaged (its checksum is another than when it was written)")


def restore(
    checkpoints: list[Path], model: NeoX, optimizer: torch.optim.Optimizer, generator: torch.Generator | None,
    critic: NeoX | None,
) -> int:
    """Loads the newest checkpoint; returns its step."""
    newest = checkpoints[0]
    try:
        on_first(lambda: check_whole(newest))
        load_weights(model, newest)
        state = load_state(newest, model, optimizer, critic)
    except UserError as error:
        advice = "it was the only one: start anew with --overwrite"
        if len(checkpoints) > 1:
            advice = f"remove {newest} to go on from {checkpoints[1].name}"
        raise UserError(f"{error}; {advice}") from error
    if generator is not None:
        try:
            generator.set_state(state["generator"])
        except (RuntimeError, KeyError) as error:  # a CPU's and a GPU's generators have nothing in common
            raise UserError(f"{newest} was written on another kind of device: its samples cannot be "
                            f"continued on {generator.device}; give the --device of its start") from error
    return int(state["step"])


def state_tensors(
    model: NeoX, optimizer: torch.optim.Optimizer, critic: NeoX | None,
) -> dict[str, torch.Tensor]:
    """What optimizer.safetensors holds: the critic's weights, and Adam's state by the parameters' names."""
    weights = critic_weights(critic)
    out = dict(weights)
    for name, parameter in (parameters(model) | weights).items():
        for key, value in optimizer.state[parameter].items():
            out[f"{name}.{key}"] = value.view(1) if value.dim() == 0 else value  # Adam's count of steps
    return out


def critic_weights(critic: NeoX | None) -> dict[str, torch.Tensor]:
    return {f"critic.{name}": weight for name, weight in parameters(critic).items()} if critic else {}


def load_state(
    checkpoint: Path, model: NeoX, optimizer: torch.optim.Optimizer, critic: NeoX | None,
) -> dict[str, torch.Tensor]:
    """Fills what `state_tensors` names and sets torch's generator; returns the rest, the step among it."""
    for parameter in [p for group in optimizer.param_groups for p in group["params"]]:
        moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    files = weight_files(checkpoint, "optimizer")
    missing, others = load_tensors(state_tensors(model, optimizer, critic), files)
    without = {name.removesuffix(".step") for name in missing if name.endswith(".step")}
    missing -= {f"{name}.{key}" for name in without for key in ("step", "exp_avg", "exp_avg_sq")}
    for name, parameter in (parameters(model) | critic_weights(critic)).items():
        if name in without:  # it never had a gradient
            optimizer.state[parameter].clear()
    check_found(checkpoint, missing | ({"step", "rng"} - others.keys()))
    rest = {}
    for key, file in others.items():
        with safe_open(file, "pt") as tensors:
            rest[key] = tensors.get_tensor(key)
    try:
        torch.set_rng_state(rest["rng"])
        int(rest["step"])
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{files[0]}: not readable ({error})") from error
    return rest
