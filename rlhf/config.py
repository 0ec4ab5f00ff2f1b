"""A frozen dataclass becomes the command line of a script.

    @dataclass(frozen=True, kw_only=True)
    class Config:
        # optimization
        lr: float = 3e-6                 # peak learning rate

    if __name__ == "__main__":
        command_line(main, Config)

gives `python script.py --lr=1e-6`. The comment behind a field is its `--help` text; a comment line that is indented
further than the fields continues it. A comment line at their indentation is the title of the block below it.
Types: str, int, float, bool, Literal[...] and `float | None`. A field without a default is required.
"""

import argparse
import dataclasses
import inspect
import re
import sys
import types
import typing

FIELD = re.compile(r"^    (\w+)\s*:\s*[^#]*?(?:#\s*(.*))?$")
SECTION = re.compile(r"^    # ?(\S.*)$")
CONTINUED = re.compile(r"^    (?:#  +| +# *)(\S.*)$")


class UserError(Exception):
    """Something the user can mend: bad option, missing file, wrong size. One clear line; the script ends with exit code 2."""


class RunError(Exception):
    """A run that failed midway, e.g. a loss that is no longer finite. One clear line; the script ends with exit code 1."""


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
    """An argparse parser with one `--option` per field of the dataclass `cls`; unknown options and values are errors (exit code 2)."""
    out = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    help_of, hints = field_help(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        section, text = help_of[field.name]
        required = field.default is dataclasses.MISSING
        text = (text + (" (required)" if required else f" [{field.default}]")).replace("%", "%%")
        kind, extra = hints[field.name], {}
        if typing.get_origin(kind) is types.UnionType:  # "float | None": None is the default that the help text explains
            kind = typing.get_args(kind)[0]
        if typing.get_origin(kind) is typing.Literal:
            extra["choices"], kind = typing.get_args(kind), type(typing.get_args(kind)[0])
        if kind is bool:
            kind, extra = boolean, {"nargs": "?", "const": True, "metavar": "true|false"}
        elif "choices" not in extra:
            extra["metavar"] = kind.__name__
        group = groups.setdefault(section, out.add_argument_group(section))
        group.add_argument(f"--{field.name}", type=kind, required=required, help=text, default=None if required else field.default, **extra)
    return out


def command_line(main, cls: type, epilog: str = "") -> None:
    """Parse the command line into `cls`, call `main(config)`; UserError ends with code 2, RunError with code 1.

    The description of --help is the docstring of main's module, `epilog` its last words.
    """
    description = sys.modules[main.__module__].__doc__
    config = cls(**vars(parser(cls, description, epilog).parse_args()))
    try:
        main(config)
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        print("interrupted; continue with --resume", file=sys.stderr)
        sys.exit(130)
