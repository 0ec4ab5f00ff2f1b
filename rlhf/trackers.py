"""The lines of metrics.jsonl, also for Weights & Biases (--wandb=PROJECT) and TensorBoard (--tensorboard).

Both packages are optional. A resumed run continues where it was: the W&B run has its id in out_dir.
"""

import importlib
import secrets
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rlhf.config import UserError
from rlhf.files import write_file

Write = Callable[[int, dict[str, float]], None]


def open_wandb(config, step: int) -> Write:
    import wandb

    file = Path(config.out_dir) / "wandb_id"
    if not file.exists():
        write_file(file, secrets.token_hex(8))
    run = wandb.init(
        project=config.wandb, name=config.out_dir, dir=config.out_dir, id=file.read_text(), resume="allow",
        config=asdict(config),
    )
    return lambda step, numbers: run.log(numbers, step=step)


def open_tensorboard(config, step: int) -> Write:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(f"{config.out_dir}/tensorboard", purge_step=step)

    def write(step: int, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)
        writer.flush()

    return write


TRACKERS = {  # option: the module that it needs, how it is opened
    "wandb": ("wandb", open_wandb),
    "tensorboard": ("torch.utils.tensorboard", open_tensorboard),
}


class Trackers:
    """Trackers(config)(step, metrics) writes to those that the config names. They are opened at the first
    line, when the run has its directory."""

    def __init__(self, config):
        self.config = config
        self.writes = None
        self.names = [name for name in TRACKERS if getattr(config, name, None)]
        for name in self.names:
            try:
                importlib.import_module(TRACKERS[name][0])
            except ImportError as error:
                raise UserError(f"--{name} needs a package: pip install {name} ({error})") from error

    def __call__(self, step: int, metrics: dict[str, float | None]) -> None:
        if self.writes is None:
            self.writes = [TRACKERS[name][1](self.config, step) for name in self.names]
        numbers = {key: value for key, value in metrics.items() if value is not None}
        for write in self.writes:
            write(step, numbers)
