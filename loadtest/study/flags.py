"""Command lines of measurements: flags that several share, settings as dataclasses become flags, an error is one line."""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from kvloom.engine.errors import ConfigError, KVLoomError
from kvloom.engine.settings.options import Option, option_fields, parse_value
from kvloom.server.exit_codes import FAILED, INTERRUPTED, USAGE_ERROR

__all__ = ["FAILED", "INTERRUPTED", "USAGE_ERROR"]

N = TypeVar("N")


class BenchError(KVLoomError):
    """A measurement that could not be made; says why in one line."""


class Parser(argparse.ArgumentParser):
    """Tells of an error in one line: the usage of a command with many flags would hide it."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: {message}; see {self.prog} --help\n")


def parser(prog: str, about: str | None, *, allow_abbrev: bool = False) -> argparse.ArgumentParser:
    """A parser whose description is the first line of a module's docstring."""
    first = (about or "").split("\n")[0]
    return argparse.ArgumentParser(prog=f"kvloom {prog}", description=first, allow_abbrev=allow_abbrev)


def need(*packages: str) -> None:
    """Find out before measuring whether what will be needed is installed. Raises ModuleNotFoundError for the first that is not.

    The command line says in one line how to install it.
    """
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"{name} is not installed", name=name)


def count(text: str) -> int:
    """A whole number of 1 or more, for argparse."""
    try:
        (number,) = numbers(text, "")
    except (ConfigError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more") from None
    return number


def listed(
    flag: str, text: str, kind: Callable[[str], N], fits: Callable[[N], bool], allowed: str, most: float = math.inf
) -> list[N]:
    """Up to `most` values separated by commas. Raises ConfigError saying what is allowed unless all are of a kind and fit."""
    try:
        found = [kind(part) for part in text.split(",")]
    except (ValueError, OverflowError):
        found = []
    if not 0 < len(found) <= most or not all(map(fits, found)):
        raise ConfigError(f"{flag} is {text!r}; allowed: {allowed}, separated by commas")
    return found


def numbers(text: str, flag: str) -> list[int]:
    """Positive whole numbers separated by commas. Raises ConfigError."""
    return listed(flag, text, int, lambda number: number >= 1, "whole numbers of 1 or more")


def add(made: Any, *flags: tuple[str, Any, str], kind: Callable[[str], Any] = count) -> None:
    """Flags of (name, default, what it is); the help tells the default, too."""
    for name, default, text in flags:
        told = f"{text} (default: %(default)s)" if text else "default: %(default)s"
        made.add_argument(f"--{name}", type=kind, default=default, help=told)


def add_model(made: Any) -> None:
    """Which model is measured."""
    made.add_argument("model", nargs="?", default="smollm2")


def add_engine(made: Any, *, kv_memory: str = "4GiB", leave_out: Iterable[str] = ()) -> None:
    """How the engine that is measured holds a model: settings of `kvloom serve`, read by `runner.engine`."""
    settings = {"dtype": "bf16", "weights": "auto", "backend": "auto", "kv-memory": kv_memory}
    add(made, *((name, default, "as in kvloom serve") for name, default in settings.items() if name not in leave_out), kind=str)
    if "threads" not in leave_out:
        made.add_argument("--threads", type=count, help="compute threads (default: one per core)")


def add_outputs(made: Any, *, rows: str = "write rows into this file", table: str = "write the table into this file") -> None:
    """Where results go."""
    if rows:
        made.add_argument("--json", type=Path, help=rows)
    made.add_argument("--markdown", type=Path, help=table)
    add_publish(made)


def add_publish(made: Any) -> None:
    """A result file for the documents (`loadtest.figures`)."""
    made.add_argument("--publish", type=Path, metavar="FILE", help="also write docs/figures/NAME.json, the documents' source")


def add_resume(made: Any, text: str = "keep the rows that --json holds already for the same settings") -> None:
    """Whether an earlier run goes on."""
    made.add_argument("--resume", action="store_true", help=text)


def seconds_of(text: str, unit: str = "s") -> float:
    """A time such as 500ms, 30s, 2m or 1h; `unit` is that of a plain number. Raises ValueError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ms|s|m|h|)", text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no time; write 500ms, 30s, 2m or 1h")
    return float(found[1]) * {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}[found[2] or unit]


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
    given = {o: getattr(arguments, o.name) for o in option_fields(options) if hasattr(arguments, o.name)}
    return options(**{o.name: value if o.type is bool else parse_value(o, value) for o, value in given.items()})


def _help(option: Option) -> str:
    default = "" if option.default is None or option.default == "" else f" (default: {option.default})"
    return (option.help + default).replace("%", "%%")


def complain(problem: object, code: int) -> int:
    """One line on stderr; returns the exit code."""
    print(f"kvloom: {' '.join(str(problem).split())}", file=sys.stderr)
    return code
