"""Reading what others wrote: JSON objects, typed fields, and errors that name the file.

Whatever a model's files hold, reading them ends in a value of the type that was asked for or in a ModelError.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvloom.engine.errors import ModelError

_INTEGERS = 1 << 63  # what 64 bits hold; arithmetic with more could leave the range of floating point


@contextlib.contextmanager
def naming(path: object) -> Iterator[None]:
    """What goes wrong inside with files becomes, or stays, a ModelError that names the path."""
    try:
        yield
    except ModelError as error:
        if str(path) in str(error):
            raise
        raise ModelError(f"{path}: {error}") from error
    except OSError as error:
        raise ModelError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelError if there is none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{path} cannot be read as JSON: {reason}; fetch the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}; a JSON object is needed")
    return value


def read_json_if_there(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty if there is no such file. Raises ModelError if it is broken."""
    return read_json(path) if path.exists() else {}


class Fields:
    """Named values with their types checked. A value of None is as good as none.

    `where` stands in front of a field's name in errors, such as "config.json: ".
    """

    def __init__(self, values: Mapping[str, Any], where: str = "", prefix: str = "") -> None:
        """prefix: what every name begins with in `values`."""
        self._values, self._where, self._prefix = values, where, prefix

    def get(self, name: str, default: Any = None) -> Any:
        """The value as it stands."""
        value = self._values.get(self._prefix + name)
        return default if value is None else value

    def is_null(self, name: str) -> bool:
        """Whether the value is there, and None: said to be none rather than left out."""
        return self._values.get(self._prefix + name, ...) is None

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number. Raises ModelError for anything else, or if there is neither value nor default."""
        return _integer(self.get(name, default), self._label(name))

    def integer_or_none(self, name: str) -> int | None:
        """A whole number, None if there is no value."""
        return None if self.get(name) is None else self.integer(name)

    def integers(self, name: str) -> list[int]:
        """A whole number or a list of some; empty if there is no value."""
        value = self.get(name, [])
        return [_integer(entry, self._label(name)) for entry in (value if isinstance(value, list) else [value])]

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.get(name, default)
        plain = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not plain or not -1e300 < value < 1e300 or not math.isfinite(value):
            raise ModelError(f"{self._label(name)} is {shown(value)}; a finite number is needed")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ModelError(f"{self._label(name)} is {shown(value)}; true or false is needed")
        return value

    def text(self, name: str) -> str | None:
        """A string, None if there is no value."""
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise ModelError(f"{self._label(name)} is {shown(value)}; a string is needed")
        return value

    def array(self, name: str, *kinds: type) -> Sequence[Any] | None:
        """A list whose entries are all of one of the kinds, None if there is no value."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not set(map(type, value)) <= set(kinds):
            raise ModelError(f"{self._label(name)} is {shown(value)}; a list of {kinds[0].__name__} is needed")
        return value

    def _label(self, name: str) -> str:
        return f"{self._where}{self._prefix}{name}"


def _integer(value: Any, label: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -_INTEGERS <= value < 2 * _INTEGERS:
        raise ModelError(f"{label} is {shown(value)}; a whole number is needed")
    return value


def shown(value: Any) -> str:
    """A value for an error's text: not a whole vocabulary."""
    if isinstance(value, int) and abs(value) >> 128:
        return f"a number of {value.bit_length()} bits"
    text = repr(value[:100] if isinstance(value, (list, str)) else value)
    return text if len(text) <= 200 else text[:200] + "..."
