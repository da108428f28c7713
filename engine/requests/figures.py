"""Figures that an engine tells of itself, declared once: in the dataclass that holds them, with kind, help, names and sum.

    evicted_blocks: int = counter("Cached blocks given up for other requests.", "kv_evicted_blocks", kv="evicted_blocks")

`server.metrics` and `server.routes.kv` read the declarations and name no figure themselves. `merged` adds what two replicas
tell; it is associative (floats up to rounding), and a dataclass made without arguments changes nothing. `counted` is what is
left of an engine that has ended.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

T = TypeVar("T")
Kind = Literal["counter", "gauge", "histogram"]
Merge = Callable[[Any, Any], Any]


class Figure(NamedTuple):
    """What is declared of a figure beside its name and type."""

    kind: Kind
    help: str
    """One sentence: what is counted. Seconds, bytes and tokens are in the name."""
    metric: str | None = ""
    """Its name on /metrics behind the prefix: "" is the field's own, None where it is not told there."""
    kv: str = ""
    """Its place in /v1/kv, keys joined by dots; "" where it is not told there."""
    by: tuple[str, ...] = ()
    """Of a mapping: the label on /metrics of every part of a key."""
    keys: tuple[str, ...] = ()
    """Of a mapping: keys that /metrics tells before they happen."""
    bounds: tuple[float, ...] = ()
    """Of a histogram: upper bounds of its buckets. Entry [i] counts what is at most bounds[i] and above the bound before."""
    total: str = ""
    """Of a histogram: the field beside it that holds what all counted values sum up to; "" where nobody sums them."""
    of: type | None = None
    """The dataclass of figures that it holds, once or per key; `metric` is in front of their names, then."""
    merge: Merge = operator.add
    """How the figures of two replicas make one."""


def each(a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
    """Two lists of the same length, entry by entry."""
    return [x + y for x, y in zip(a, b, strict=True)]


def table(a: Mapping[Any, Any], b: Mapping[Any, Any], merge: Merge = operator.add) -> Any:
    """Two mappings, key by key; what only one has stays as it is."""
    made: Any = type(a)
    return made({**a, **b, **{key: merge(a[key], b[key]) for key in a.keys() & b.keys()}})


def merged(a: T, b: T) -> T:
    """Two dataclasses of the same figures, each added as it says."""
    kind: Any = a.__class__
    merges = [(field.name, field.metadata["figure"].merge) for field in dataclasses.fields(kind)]
    made: T = kind(**{name: merge(getattr(a, name), getattr(b, name)) for name, merge in merges})
    return made


def counted(stats: T) -> T:
    """What remains of the figures of an engine that is no more: its counters."""
    kind: Any = stats.__class__
    kept = {}
    for field in dataclasses.fields(kind):
        figure, value = field.metadata["figure"], getattr(stats, field.name)
        if figure.of is not None:
            kept[field.name] = {key: counted(one) for key, one in value.items()} if figure.by else counted(value)
        elif figure.kind != "gauge":
            kept[field.name] = value
    made: T = kind(**kept)
    return made


def _field(figure: Figure, default: Any) -> Any:
    given: Any = {"default_factory": default} if callable(default) else {"default": default}
    return dataclasses.field(**given, metadata={"figure": figure})


def counter(help: str, metric: str | None = "", *, default: Any = 0, **more: Any) -> Any:
    """What only grows. default: 0, or what makes an empty mapping."""
    return _field(Figure("counter", help, metric, **({"merge": table} if callable(default) else {}) | more), default)


def gauge(help: str, metric: str | None = "", *, default: Any = 0, **more: Any) -> Any:
    """What is so now. Added over replicas unless `merge` says otherwise."""
    return _field(Figure("gauge", help, metric, **more), default)


def histogram(help: str, bounds: Sequence[float], metric: str | None = "", **more: Any) -> Any:
    """Counts between bounds: a list."""
    figure = Figure("histogram", help, metric, bounds=tuple(bounds), merge=each, **more)
    return _field(figure, lambda: [0] * len(bounds))


def note(help: str, *, merge: Merge, default: Any = "", **more: Any) -> Any:
    """What is no number, and so not on /metrics."""
    return _field(Figure("gauge", help, None, merge=merge, **more), default)


def nested(of: type, name: str, *, by: tuple[str, ...] = (), kv: str = "") -> Any:
    """Figures of their own dataclass; with `by`, a mapping of them."""
    figure = Figure("gauge", "", name, kv, by, of=of, merge=table if by else merged)
    return _field(figure, dict if by else of)


class Derived(property):
    """A figure that is read off others."""

    figure: Figure


def derived(kind: Kind, help: str, read: Callable[[Any], Any], metric: str | None = "", **more: Any) -> Any:
    """What `read` makes of the other figures."""
    made = Derived(read)
    made.figure = Figure(kind, help, metric, **more)
    return made


def ratio(part: str, whole: str, help: str, *, kv: str, empty: float | None = None) -> Any:
    """One figure over another, `empty` before there is anything to divide by."""
    return derived(
        "gauge", help, lambda s: getattr(s, part) / getattr(s, whole) if getattr(s, whole) else empty, metric=None, kv=kv
    )


@functools.cache
def declared(cls: Any) -> Mapping[str, Figure]:
    """Every figure of a dataclass by name: fields, then what is derived of them."""
    fields = {field.name: field.metadata["figure"] for field in dataclasses.fields(cls)}
    return fields | {name: value.figure for name, value in vars(cls).items() if isinstance(value, Derived)}


def told(stats: Any, prefix: str = "") -> Iterator[tuple[str, Figure, Any]]:
    """(name, figure, value) of all that is told on /metrics: of a histogram (counts, sum or None)."""
    for name, figure in declared(stats.__class__).items():
        if figure.metric is None:
            continue
        where, value = prefix + (figure.metric or name), getattr(stats, name)
        if figure.kind == "histogram":
            yield where, figure, (value, getattr(stats, figure.total) if figure.total else None)
        elif figure.of is None:
            yield where, figure, value
        elif figure.by:
            for inner, one in declared(figure.of).items():
                if one.metric is not None:
                    held = {key: getattr(part, inner) for key, part in value.items()}
                    if one.by:  # a mapping in every part
                        held = {(key, own): number for key, part in held.items() for own, number in part.items()}
                    yield f"{where}_{one.metric or inner}", one._replace(by=(*figure.by, *one.by), keys=()), held
        else:
            yield from told(value, f"{where}_")


def placed(stats: Any) -> dict[str, Any]:
    """What /v1/kv tells, every figure in its place."""
    body: dict[str, Any] = {}
    for name, figure in declared(stats.__class__).items():
        if figure.kv:
            *way, key = figure.kv.split(".")
            at = body
            for step in way:
                at = at.setdefault(step, {})
            at[key] = _plain(getattr(stats, name))
    return body


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return placed(value) if dataclasses.is_dataclass(value) else value
