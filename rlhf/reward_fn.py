"""A reward of your own in place of a reward model: --reward_fn=file.py:name, a Python function

    def name(prompts: list[str], texts: list[str]) -> list[float]

of responses without their EOS; prompts[i] is the one that texts[i] answers. It is called with some prompts of
the batch at a time, all K responses to each in a row. What it returns takes the place of the reward model's
scores: the missing-EOS rule and the terms of --reward come after it. A function that compares,
--compare_fn=file.py:name of train_online.py, takes a third list, the other responses, and returns the
probability that the first response is the better one. A language model as such functions:
evaluation/judge_fn.py.
"""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rlhf.config import RunError, UserError

RewardFn = Callable[..., list[float]]  # (prompts, texts), or to compare (prompts, texts, others)


def told(error: BaseException, path: Path) -> str:
    """The error in one line, with the line of the user's file that it came from."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
    where = f" in line {lines[-1]}" if lines else ""
    return f"{type(error).__name__}{where}: {error}".replace("\n", " ")


def load_reward_fn(name: str, option: str = "reward_fn") -> RewardFn | None:
    """The function that `name`, "file.py:function", stands for; None for "". UserError if there is none."""
    if not name:
        return None
    file, _, function = name.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not function:
        raise UserError(f"--{option}={name}: expected file.py:function")
    if not path.is_file():
        raise UserError(f"--{option}={name}: no such file: {path}")
    path = path.resolve()
    sys.path.append(str(path.parent))  # for what it imports from beside it
    spec = importlib.util.spec_from_file_location(f"reward_fn_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look it up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the file is the user's: anything can happen
        raise UserError(f"--{option}={name}: {path} cannot be imported: {told(error, path)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        there = ", ".join(key for key, _ in inspect.getmembers(module, inspect.isfunction)) or "none"
        raise UserError(f"--{option}={name}: no function {function} in {path} (functions there: {there})")
    return found


def rewards_of(function: RewardFn, prompts: list[str], *texts: list[str]) -> Tensor:
    """What the function returns, (n,) float32. RunError, with a prompt, unless it is n finite numbers."""
    option = "--reward_fn" if len(texts) == 1 else "--compare_fn"
    name = f"{option}: {getattr(function, '__name__', 'the function')}"
    go_on = "mend it and continue with --resume"
    n = len(prompts)
    try:
        returned = function(list(prompts), *map(list, texts))
    except Exception as error:  # the function is the user's: anything can happen
        path = Path(inspect.getsourcefile(function) or "") if inspect.isfunction(function) else Path()
        raise RunError(
            f"{name} raised {told(error, path)}, for {n} texts, the first of them a response to "
            f"{shown(prompts[0])}; {go_on}"
        ) from error
    try:
        rewards = torch.as_tensor(returned, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise RunError(
            f"{name} returned {shown(returned)}, no list of {n} numbers, for texts of which the "
            f"first answers {shown(prompts[0])}; {go_on}"
        ) from error
    if rewards.shape != (n,):
        raise RunError(
            f"{name} returned the shape {tuple(rewards.shape)} for {n} texts, of which the first "
            f"answers {shown(prompts[0])}: one number for each text is needed; {go_on}"
        )
    possible = rewards.isfinite() if len(texts) == 1 else (rewards >= 0) & (rewards <= 1)
    if len(bad := (~possible).nonzero()):
        i = bad[0].item()
        raise RunError(
            f"{name} returned {rewards[i].item()} for the text {shown(texts[0][i])}, a response to "
            f"{shown(prompts[i])}{'' if len(texts) == 1 else ': a probability is needed'}; {go_on}"
        )
    return rewards


def shown(thing: object, most: int = 120) -> str:
    text = repr(thing)
    return text if len(text) <= most else f"{text[:most]}..."
