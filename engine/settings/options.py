"""One setting: what it is called, how its value is written, and what it may be.

`option_fields` reads the docstrings behind a dataclass's fields, so that there is one place where a setting is described.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from kvloom.engine.errors import ConfigError
from kvloom.engine.settings.former import value_now

Tokens = Annotated[int, "TOKENS"]
Count = Annotated[int, "N"]
Size = Annotated[int, "SIZE"]
"""Bytes; written as 4GiB, 512MiB, or a plain number."""
Milliseconds = Annotated[int, "MS"]
Part = Annotated[float, "PART"]
JSONText = Annotated[str, "JSON"]
FilePath = Annotated[str, "FILE"]
Name = Annotated[str, "NAME"]
Names = Annotated[tuple[str, ...], "NAME"]
"""What a setting's value is, as the command line's help shows it."""

_NAMES_ELSEWHERE = {
    "dtype": {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32", "auto": "bf16"},
    "attention_backend": {"TRITON_ATTN": "triton", "FLASHINFER": "flashinfer", "FLASH_ATTN": "flash_attn"},
}
"""By setting, other servers' names of its values."""


class Option(NamedTuple):
    """One setting: its name, type as written, default and help."""

    name: str
    type: Any
    default: Any
    help: str
    unit: str
    """What a value is, in capitals: TOKENS, SIZE, FILE; VALUE where nothing better is known."""
    secret: bool
    """Whether its value is never shown: the field is left out of the dataclass's repr."""


@functools.cache
def option_fields(cls: Any) -> tuple[Option, ...]:
    """The settings of a dataclass with the docstrings that follow its fields, also where it has them from another."""
    docs: dict[str, str] = {}
    for base in (base for base in reversed(cls.__mro__) if "__dataclass_fields__" in vars(base)):
        tree = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for node, after in zip(tree.body, tree.body[1:]):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
                docs[node.target.id] = inspect.cleandoc(str(ast.literal_eval(after.value)))
    hints, marked = get_type_hints(cls), get_type_hints(cls, include_extras=True)
    return tuple(
        Option(f.name, hints[f.name], f.default, docs[f.name], _unit(marked[f.name]), not f.repr)
        for f in dataclasses.fields(cls)
    )


def _unit(hint: Any) -> str:
    """The unit in an annotation such as Annotated[int, "TOKENS"] | None."""
    parts = (hint, *get_args(hint))
    return next((part.__metadata__[0] for part in parts if get_origin(part) is Annotated), "VALUE")


def json_object(name: str, text: str | None, example: str) -> dict[str, Any]:
    """A setting that is written as a JSON object; nothing for None. Raises ConfigError."""
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"{name} is {text!r}, which is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{name} is {text!r}; allowed: a JSON object such as {example}")
    return found


_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?)?B?\s*$", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """4GiB, 512MiB, 1.5G (powers of 1024 with or without the i), or a plain number of bytes."""
    if isinstance(text, int):
        return text
    match = _SIZE.match(text)
    if match is None:
        raise ConfigError(f"{text!r} is not a size; write for instance 4GiB, 512MiB or a number of bytes")
    return int(float(match[1]) * 1024 ** " KMGT".index((match[2] or " ")[0].upper()))


def parse_value(option: Option, value: Any) -> Any:
    """A value from the command line, YAML or Python in the option's type. Raises ConfigError."""
    kinds = [t for t in getattr(option.type, "__args__", (option.type,)) if t is not type(None)]
    optional = type(None) in getattr(option.type, "__args__", ())
    if value is None and optional:
        return None
    if option.unit == "SIZE":
        return parse_bytes(value)
    if tuple[str, ...] == option.type:
        return tuple(_split(option.name, value))
    if all(isinstance(kind, str) for kind in kinds):  # Literal["a", "b"]
        value = _NAMES_ELSEWHERE.get(option.name, {}).get(value, value)
        value = value_now(option.name, value)
        if value not in kinds:
            raise ConfigError(f"{option.name} is {value!r}; allowed: {', '.join(kinds)}")
        return value
    kind = kinds[0]
    allowed = {int: "a whole number", float: "a number", str: "text"}.get(kind, kind.__name__)
    if kind is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{option.name} is {value!r}; allowed: true or false")
        return value
    if isinstance(value, bool) or not isinstance(value, (str, kind, int) if kind is float else (str, kind)):
        shown = f"a {type(value).__name__}" if option.secret else repr(value)
        raise ConfigError(f"{option.name} is {shown}; allowed: {allowed}")
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(f"{option.name} is {value!r}; allowed: {allowed}") from None


def _split(name: str, value: Any) -> Iterator[str]:
    """Texts in a list, or in one text with commas. Raises ConfigError."""
    for item in [value] if isinstance(value, str) else value or ():
        if not isinstance(item, str):
            raise ConfigError(f"{name} holds {item!r}; allowed: text (quote it in YAML)")
        yield from (part.strip() for part in item.split(","))
