"""Ranges of numbers that requests and settings bring, declared beside the field: what is checked, what an error says and what
documentation says come from one place.

    stride: int = bounded(16, 0, MOST_TOKENS)
    __post_init__: `wrong(self)` names the first field whose value is of another type or out of range
"""

from __future__ import annotations

import dataclasses
import functools
import json
import numbers
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

MOST_TOKENS = 2**20
"""Tokens of the longest context that any model has; numbers of tokens beyond that mean nothing."""


class Range(NamedTuple):
    """Numbers from `low` to `high`, both included unless said otherwise."""

    low: float
    high: float
    above: bool = False
    """Whether `low` itself is excluded."""
    odd: bool = False
    """Whether only odd numbers are allowed."""
    note: str = ""
    """What some of them mean, such as "0 for never"."""

    def holds(self, value: Any) -> bool:
        """Whether a number is one of them; NaN never is."""
        return bool(
            (self.low < value if self.above else self.low <= value) and value <= self.high and (not self.odd or value % 2)
        )

    def __str__(self) -> str:
        text = f"above {self.low:g}, at most {self.high:g}" if self.above else f"{_plain(self.low)} to {_plain(self.high)}"
        return ("an odd number, " if self.odd else "") + text + (f" ({self.note})" if self.note else "")


POOLS = Range(1, 63, odd=True, note="1 for none")
"""Neighbours that scores are max-pooled over."""


def told(options: Any) -> list[tuple[str, str]]:
    """Every number of a dataclass by name, and what is allowed for it, as documentation says it."""
    found = ((field.name, range_of(field)) for field in dataclasses.fields(options))
    return [(name, str(bounds)) for name, bounds in found if bounds is not None]


class Wrong(NamedTuple):
    """A field that cannot be as it is."""

    name: str
    value: Any
    allowed: str


def bounded(default: Any, low: float | Range, high: float = 0, **more: Any) -> Any:
    """A dataclass field with a range: of the number, or of every number of a tuple."""
    bounds = low if isinstance(low, Range) else Range(low, high, **more)
    return dataclasses.field(default=default, metadata={"range": bounds})


def range_of(field: dataclasses.Field[Any]) -> Range | None:
    """The range that a field was declared with."""
    found: Range | None = field.metadata.get("range")
    return found


def wrong(options: Any) -> Wrong | None:
    """The first field of a dataclass whose value has another type than declared, or lies out of its range."""
    kinds = _kinds(options.__class__)
    for field in dataclasses.fields(options):
        value, kind, bounds = getattr(options, field.name), kinds[field.name], range_of(field)
        if value is None and type(None) in (kind, *get_args(kind)):
            continue
        if (allowed := _mismatch(value, kind, bounds)) is not None:
            return Wrong(field.name, value, allowed + (", or null" if type(None) in get_args(kind) else ""))
    return None


@functools.cache
def _kinds(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def _mismatch(value: Any, kind: Any, bounds: Range | None) -> str | None:
    """What is allowed instead of a value; None if it is all right. Types that are not named here are not looked at."""
    kind = next((part for part in get_args(kind) if part is not type(None)), kind) if type(None) in get_args(kind) else kind
    if get_origin(kind) is Literal:
        return None if value in get_args(kind) else ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        ok = isinstance(value, tuple) and _all_fit(value, get_args(kind)[0], bounds)
        return None if ok else ("a list" if bounds is None else f"a list of numbers, each {bounds}")
    if get_origin(kind) is Mapping:
        key, item = get_args(kind)
        ok = isinstance(value, Mapping) and all(
            _mismatch(k, key, None) is None and _mismatch(v, item, bounds) is None for k, v in value.items()
        )
        return None if ok else ("a mapping" if bounds is None else f"numbers from {bounds} by key")
    if kind is bool:
        return None if isinstance(value, bool) else "true or false"
    if kind is str:
        return None if isinstance(value, str) else "a string"
    if kind in (int, float):
        fits = isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
        if fits and (bounds is None or bounds.holds(value)):
            return None
        return ("" if fits or kind is float else "a whole number, ") + ("a number" if bounds is None else str(bounds))
    return None


def _all_fit(values: tuple[Any, ...], kind: Any, bounds: Range | None) -> bool:
    if kind is int and bounds is not None and not bounds.odd and set(map(type, values)) == {int}:  # quick for long lists
        return bounds.holds(min(values)) and bounds.holds(max(values))
    return all(_mismatch(item, kind, bounds) is None for item in values)


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else f"{number:g}"


def shown(value: Any) -> str:
    """A value as an error quotes it: never long, whatever a client sent. All but strings as JSON, as clients write it."""
    try:
        if isinstance(value, (str, list, tuple)):
            value = value[:80]
        text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
    except TypeError:  # a mapping of a Python caller's, which is no JSON
        text = repr(value)
    except RecursionError:
        return "something that is nested too deeply"
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."
