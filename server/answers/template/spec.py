"""A checkpoint's response template: what an answer is made of, and which marks stand around that."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kvloom.engine.bounds import shown
from kvloom.engine.errors import ModelError
from kvloom.server.answers.template.patterns import LONGEST, MOST_HELD, MOST_LITERALS, Budget, Mark
from kvloom.server.answers.template.values import Parser, parser_of

MOST_FIELDS = 16
DEEPEST = 16
"""Objects within a transform."""
Role = Literal["content", "reasoning", "calls", ""]
ROLES: Mapping[str, Role] = {
    "content": "content", "thinking": "reasoning", "reasoning": "reasoning", "reasoning_content": "reasoning",
    "tool_calls": "calls",
}  # fmt: skip
"""What fields of these names are of an answer; an answer has no room for others."""

_WHERE = "response_template (in tokenizer_config.json; --tool-call-parser and --reasoning-parser do without it)"
_TOP = {"version", "defaults", "fields", "start_anchor", "start_anchor_pattern"}
_KEYS = {"open", "open_pattern", "close", "close_pattern", "content", "content_args", "repeats", "join", "optional",
         "transform", "transform_each"}  # fmt: skip
_NAME = re.compile(r"\{(\w+(?:\.\w+)*)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A stretch of an answer."""

    name: str
    opens: Mark | None
    """None for what stands outside of all others."""
    closes: Mark | None
    """None if it ends with the answer."""
    parse: Parser
    strip: bool
    """Whether blanks at the ends of its text are none of it."""
    join: str | None
    """What stands between its pieces, if there are several."""
    transform: Any
    each: bool
    """Whether `transform` is of every item of a list."""

    @property
    def role(self) -> Role:
        """What it is of an answer."""
        return ROLES.get(self.name, "")

    def value(self, body: str, groups: Mapping[str, str], budget: Budget) -> Any:
        """What its text says. groups: what its marks caught. Raises ValueError if it says nothing, TooSlowError."""
        found = self.parse(body, budget)
        if self.transform is None:
            return found
        if not self.each:
            return _filled(self.transform, {**groups, "content": found})
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            raise ValueError("no list of objects")
        return [_filled(self.transform, {**groups, **item}) for item in found]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseTemplate:
    """How a model's answers are read."""

    start: Mark
    """Where in a prompt its answer begins."""
    regions: tuple[Region, ...]
    outside: Region | None
    """What stands outside of the others."""
    marks: tuple[str, ...]
    """Special tokens that it looks for, which must be text."""

    @property
    def reasons(self) -> bool:
        """Whether it tells thoughts from the rest."""
        return any(region.role == "reasoning" for region in self.regions)


def load(given: Any, special: Iterable[str]) -> ResponseTemplate:
    """The template that a checkpoint gives; special: names of its special tokens. Raises ModelError that says what is wrong."""
    try:
        return _load(given, special)
    except ValueError as error:
        raise ModelError(f"{_WHERE}: {error}") from None


def _load(given: Any, special: Iterable[str]) -> ResponseTemplate:
    if not isinstance(given, Mapping):
        raise ValueError(f"it is {shown(given)}; an object is needed")
    if given.get("version", 1) != 1:
        raise ValueError(f"version is {shown(given['version'])}; allowed: 1")
    _known(given, _TOP)
    fields = given.get("fields")
    if not isinstance(fields, Mapping) or not 0 < len(fields) <= MOST_FIELDS:
        raise ValueError(f"fields is {shown(fields)}; allowed: an object of 1 to {MOST_FIELDS} fields")
    regions = tuple(_region(name, fields[name]) for name in fields)
    outside = [region for region in regions if region.opens is None]
    if len(outside) > 1:
        raise ValueError(f"{' and '.join(region.name for region in outside)} have neither open nor open_pattern; allowed: one")
    start = _mark(given, "start_anchor")
    if start is None:
        raise ValueError("start_anchor or start_anchor_pattern is needed")
    looked_for = " ".join(_strings(fields)).replace("\\", "")  # of expressions, roughly
    marks = tuple(text for text in special if text in looked_for)
    return ResponseTemplate(start=start, regions=regions, outside=outside[0] if outside else None, marks=marks)


def _strings(value: Any) -> Iterator[str]:
    """All strings within a value; not deeper than checks allow."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


def _region(name: str, given: Any) -> Region:
    try:
        if not isinstance(given, Mapping):
            raise ValueError(f"it is {shown(given)}; an object is needed")
        _known(given, _KEYS)
        for key in ("repeats", "optional", "transform_each"):
            if not isinstance(given.get(key, False), bool):
                raise ValueError(f"{key} is {shown(given[key])}; allowed: true or false")
        join, transform, each = given.get("join"), given.get("transform"), given.get("transform_each", False)
        if join is not None and not isinstance(join, str):
            raise ValueError(f"join is {shown(join)}; allowed: a string")
        if each and transform is None:
            raise ValueError("transform_each without transform")
        _check_transform(transform)
        args = given.get("content_args", {})
        parse = parser_of(given.get("content", "text"), args)
        return Region(name=name, opens=_mark(given, "open"), closes=_mark(given, "close"), parse=parse,
                      strip=args.get("strip", True), join=join, transform=transform, each=each)  # fmt: skip
    except ValueError as error:
        raise ValueError(f"field {name[:80]}: {error}") from None


def _known(given: Mapping[str, Any], allowed: set[str]) -> None:
    if unknown := sorted(map(str, given.keys() - allowed)):
        raise ValueError(f"{', '.join(unknown)[:200]} unknown; allowed: {', '.join(sorted(allowed))}")


def _mark(given: Mapping[str, Any], name: str) -> Mark | None:
    """The mark that `name` gives as literals, or `name_pattern` as an expression."""
    literals, pattern = given.get(name), given.get(f"{name}_pattern")
    if literals is None and pattern is None:
        return None
    if literals is not None and pattern is not None:
        raise ValueError(f"{name} and {name}_pattern are both given; leave one out")
    listed: list[Any] = [pattern] if literals is None else literals if isinstance(literals, list) else [literals]
    longest = LONGEST if literals is None else MOST_HELD
    if not 0 < len(listed) <= MOST_LITERALS or not all(isinstance(one, str) and 0 < len(one) <= longest for one in listed):
        raise ValueError(f"{name} is {shown(pattern if literals is None else literals)}; allowed: a string of 1 to {longest} "
                         f"characters, or of literals {MOST_LITERALS}")  # fmt: skip
    try:
        return Mark(listed) if literals is not None else Mark([], pattern)
    except ValueError as error:
        raise ValueError(f"{name}_pattern {error}") from None


def _check_transform(transform: Any, depth: int = 0) -> None:
    if depth > DEEPEST:
        raise ValueError(f"transform is nested too deeply; allowed: {DEEPEST} levels")
    if isinstance(transform, (Mapping, list)):
        for item in transform.values() if isinstance(transform, Mapping) else transform:
            _check_transform(item, depth + 1)
    elif isinstance(transform, str) and _NAME.search(transform) and not _NAME.fullmatch(transform):
        raise ValueError(f"transform holds {shown(transform)}; a name in braces must be a string of its own")


def _filled(transform: Any, names: Mapping[str, Any]) -> Any:
    """Raises ValueError for a name that there is not."""
    if isinstance(transform, Mapping):
        return {key: _filled(item, names) for key, item in transform.items()}
    if isinstance(transform, list):
        return [_filled(item, names) for item in transform]
    found = _NAME.fullmatch(transform) if isinstance(transform, str) else None
    if found is None:
        return transform
    value: Any = names
    for key in found[1].split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f"no {found[1]}")
        value = value[key]
    return value
