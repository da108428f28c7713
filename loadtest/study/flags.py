"""Command lines of measurements: settings as dataclasses become flags, and an error is one line and exit code 2."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from typing import Any, NoReturn

from kvloom.engine.config import Option, option_fields, parse_value
from kvloom.engine.errors import KVLoomError

USAGE_ERROR = 2
FAILED = 1
INTERRUPTED = 130


class BenchError(KVLoomError):
    """A measurement that could not be made; says why in one line."""


class Parser(argparse.ArgumentParser):
    """Tells of an error in one line: the usage of a command with many flags would hide it."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: {message}; see {self.prog} --help\n")


def need(*packages: str) -> None:
    """Find out before measuring whether what will be needed is installed. Raises ModuleNotFoundError for the first that is not.

    The command line says in one line how to install it.
    """
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"{name} is not installed", name=name)


_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def seconds_of(text: str, unit: str = "s") -> float:
    """A time such as 500ms, 30s, 2m or 1h; `unit` is that of a plain number. Raises ValueError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ms|s|m|h|)", text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no time; write 500ms, 30s, 2m or 1h")
    return float(found[1]) * _UNITS[found[2] or unit]


def add_options(group: Any, options: type) -> None:
    """A flag for every field of a settings dataclass. Values stay text until `options_of` reads them."""
    for option in option_fields(options):
        flag = "--" + option.name.replace("_", "-")
        common = {"dest": option.name, "default": argparse.SUPPRESS, "help": _help(option)}
        if option.type is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        else:
            group.add_argument(flag, metavar="VALUE", **common)


def options_of(options: type, arguments: argparse.Namespace) -> Any:
    """The settings that were given, the rest by default. Raises ConfigError, or ValueError if they do not go together."""
    given = {option.name: (option, getattr(arguments, option.name)) for option in option_fields(options)
             if hasattr(arguments, option.name)}  # fmt: skip
    return options(
        **{name: value if option.type is bool else parse_value(option, value) for name, (option, value) in given.items()}
    )


def _help(option: Option) -> str:
    default = "" if option.default is None or option.default == "" else f" (default: {option.default})"
    return (option.help + default).replace("%", "%%")


def complain(problem: object, code: int) -> int:
    """One line on stderr; returns the exit code."""
    print(f"kvloom: {' '.join(str(problem).split())}", file=sys.stderr)
    return code
