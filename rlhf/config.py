"""A frozen dataclass becomes the command line of a script.

    @dataclass(frozen=True, kw_only=True)
    class Config:
        # optimization
        lr: float = 3e-6                 # peak learning rate

    if __name__ == "__main__":
        command_line(main, Config)

gives `python script.py --lr=1e-6`. The comment behind a field is its `--help` text; a comment line that is
indented further than the fields continues it. One at their indentation is the title of the block below it.
Types: str, int, float, bool, Literal[...] and `float | None`. A field without a default is required.
A number must be finite, and in its range (RANGES): an option means the same in every script.
"""

import argparse
import dataclasses
import inspect
import re
import sys
import types
import typing

import pyarrow as pa
from safetensors import SafetensorError
from tqdm import tqdm

FIELD = re.compile(r"^    (\w+)\s*:\s*[^#]*?(?:#\s*(.*))?$")
SECTION = re.compile(r"^    # ?(\S.*)$")
CONTINUED = re.compile(r"^    (?:#  +| +# *)(\S.*)$")


# What a number may be: a square bracket includes the end, a round one leaves it out.
RANGES = {
    # optimization
    "lr": "[0, inf)",
    "warmup": "[0, 1]",
    "batch_size": "[1, inf)",
    "epochs": "(0, inf)",
    "weight_decay": "[0, inf)",
    "adam_eps": "(0, inf)",
    "max_grad_norm": "[0, inf)",
    # losses and rewards
    "beta": "(0, inf)",
    "gamma": "[0, inf)",
    "gamma_beta_ratio": "[0, inf)",
    "alpha": "(-inf, inf)",
    "delta": "[0, inf)",
    "tau": "(0, inf)",
    "sft_coef": "[0, inf)",
    "r_max": "(0, inf]",
    "top_k": "[1, inf)",
    "label_smoothing": "[0, 0.5]",
    "missing_eos_penalty": "[0, inf)",
    "invalid_logprob_fill": "(-inf, inf)",
    # sampling
    "k": "[1, inf)",
    "episodes": "[1, inf)",
    "ppo_epochs": "[1, inf)",
    "clip": "(0, inf)",
    "clip_high": "(0, inf)",
    "lam": "[0, 1]",
    "kl_coef": "[0, inf)",
    "vf_coef": "[0, inf)",
    "value_clip": "(0, inf)",
    "mixture": "[0, 1]",
    "opponent": "[0, 1]",
    "explore": "(-inf, inf)",
    "round_updates": "[0, inf)",
    "reset_share": "[0, 1]",
    "entropy_target": "[0, inf)",
    "entropy_rate": "(0, inf)",
    "accept": "[2, inf)",
    "gap": "[0, inf)",
    "temperature": "[0, inf)",
    "sample_temperature": "[0, inf)",
    "top_p": "(0, 1]",
    "response_tokens": "[0, inf)",
    "samples": "[1, inf)",
    "rollout_prompts": "[1, inf)",
    # rows
    "train_rows": "[0, inf)",
    "center_rows": "[0, inf)",
    "eval_rows": "[0, inf)",
    "agreement_rows": "[0, inf)",
    "html_rows": "[0, inf)",
    "rows": "[0, inf)",
    "n": "[0, inf)",
    "limit": "[0, inf)",
    "max_prompt_tokens": "[1, inf)",
    "prompt_tokens": "[1, inf)",
    "validation_share": "(0, 1)",
    "posts": "[1, inf)",
    "pairs": "[1, inf)",
    "rankings": "[1, inf)",
    "validation": "[1, inf)",
    "test": "[1, inf)",
    # how often, how much at a time
    "eval_every": "[0, inf)",
    "samples_every": "[0, inf)",
    "save_every": "[0, inf)",
    "keep": "[0, inf)",
    "micro_batch_tokens": "[1, inf)",
    "seed": "[0, 2147483647]",
    "rank_timeout": "(0, inf)",
    # judge
    "judge_concurrency": "[1, 1000]",
    "judge_timeout": "(0, inf)",
    "judge_max_tokens": "[1, inf)",
    "judge_max_requests": "[0, inf)",
    "judge_max_cost": "[0, inf)",
    "judge_price_in": "[-1, inf)",
    "judge_price_out": "[-1, inf)",
    # pictures
    "prompt": "[1, inf)",
    "columns": "[1, inf)",
    "smooth": "[1, inf)",
}


class UserError(Exception):
    """Something the user can mend: bad option, missing file, wrong size. One clear line; exit code 2."""


class RunError(Exception):
    """A run that failed midway, e.g. a loss that is no longer finite. One clear line; exit code 1."""


def check_ranges(config) -> None:
    """Raises UserError for a number that is not finite or not in its range. None, "not given", passes."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        wanted = RANGES.get(field.name, "(-inf, inf)")
        if not inside(value, wanted):
            raise UserError(f"--{field.name}={value} must be {in_words(wanted)}")


def in_words(wanted: str) -> str:
    """in_words("(0, 1]") is "above 0 and at most 1"."""
    low, high = wanted[1:-1].split(", ")
    words = [("at least " if wanted[0] == "[" else "above ") + low] if low != "-inf" else []
    words += [("at most " if wanted[-1] == "]" else "below ") + high] if high != "inf" else []
    return " and ".join(words) or "a finite number"


def inside(value: float, wanted: str) -> bool:
    """inside(0, "(0, 1]") is False: the round bracket leaves the end out. nan is in nothing."""
    low, high = map(float, wanted[1:-1].split(","))
    above = value >= low if wanted[0] == "[" else value > low
    below = value <= high if wanted[-1] == "]" else value < high
    return above and below


def field_help(cls: type) -> dict[str, tuple[str, str]]:
    """{field: (section, help)}, read from the comments in the source of `cls`."""
    section, field, help_of = "options", "", {}
    for line in inspect.getsource(cls).splitlines():
        if match := SECTION.match(line):
            section = match[1]
        elif (match := CONTINUED.match(line)) and field:
            help_of[field] = (section, f"{help_of[field][1]} {match[1]}".strip())
        elif (match := FIELD.match(line)) and match[1] in cls.__dataclass_fields__:
            field = match[1]
            help_of[field] = (section, match[2] or "")
    return help_of


def boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def parser(cls: type, description: str | None, epilog: str = "") -> argparse.ArgumentParser:
    """An argparse parser with one `--option` per field of the dataclass `cls`; unknown options and values are
    errors (exit code 2)."""
    out = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    help_of = field_help(cls)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        section, text = help_of[field.name]
        required = field.default is dataclasses.MISSING
        default = None if required else field.default
        text += " (required)" if required else f" [{default}]"
        kind = hints[field.name]
        extra = {}
        if typing.get_origin(kind) is types.UnionType:  # "float | None": the help text explains None
            kind = typing.get_args(kind)[0]
        if typing.get_origin(kind) is typing.Literal:
            extra["choices"] = typing.get_args(kind)
            kind = type(extra["choices"][0])
        elif kind is bool:
            kind = boolean
            extra = {"nargs": "?", "const": True, "metavar": "true|false"}
        else:
            extra["metavar"] = kind.__name__
        group = groups.setdefault(section, out.add_argument_group(section))
        if field.name in RANGES and kind in (int, float):
            text += f" {in_words(RANGES[field.name])}"
        extra |= {"type": kind, "required": required, "default": default, "help": text.replace("%", "%%")}
        group.add_argument(f"--{field.name}", **extra)
    return out


def command_line(main, cls: type, epilog: str = "") -> None:
    """Parse the command line into `cls`, call `main(config)`. What goes wrong is one line, the last one on
    stderr: a UserError ends with code 2, a RunError and what the disk refuses with code 1.

    The description of --help is the docstring of main's module, `epilog` its last words.
    """
    description = sys.modules[main.__module__].__doc__
    from rlhf import dist  # which raises errors of this file

    dist.hush()
    config = cls(**vars(parser(cls, description, epilog).parse_args()))
    try:
        if dist.LAUNCHED and not hasattr(config, "rank_timeout"):
            dist.refuse("this script has no work to share between ranks: start it without torchrun")
        check_ranges(config)
        main(config)
        dist.leave()
    except UserError as error:
        stop(f"error: {error}", 2)
    except (RunError, OSError, SafetensorError, pa.ArrowException, MemoryError) as error:
        full = re.search("No space left|os error 28|Disk quota", str(error))
        hint = "; make room and run it again (with --resume where the script has it)" if full else ""
        stop(f"error: {error or type(error).__name__}{hint}", 1)
    except RuntimeError as error:
        if said := dist.lost(error):
            stop(f"error: {said}", 1)
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            stop(f"error: torch.compile failed ({error}): --plain does without it (slower)", 1)
        if not re.search("out of memory|can't allocate memory", str(error)):
            raise
        stop("error: out of memory: lower --micro_batch_tokens, --rollout_prompts or --eval_rows; "
             "a run goes on with --resume", 1)
    except KeyboardInterrupt:
        stop("interrupted; a run goes on with --resume", 130)


def stop(message: str, code: int) -> typing.NoReturn:
    for bar in list(getattr(tqdm, "_instances", [])):  # so that the message is a line of its own
        bar.close()
    from rlhf import dist

    dist.last_word(" ".join(message.split()))
    sys.exit(code)
