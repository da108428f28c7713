"""The notations in which models call functions: what stands between a mark that opens calls and the one that closes them.

Each reads from a `Source` and tells a `Collector`. A call is one once its name and the beginning of its arguments are read;
MalformedError before that means there is none, and what was read is text. One whose arguments break off later keeps what was
right of them, and the rest is text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvloom.server.answers import json_text, python_text
from kvloom.server.answers.events import Collector
from kvloom.server.answers.source import CutError, MalformedError, Reading, Source

MAX_NAME = 256
_MOST_BETWEEN = 16
"""Blanks and marks between two calls."""
Schemas = Mapping[str, Mapping[str, Any]]
"""Parameters by function, as JSON schemas."""


@dataclass(slots=True)
class Calling:
    """What a notation reads from and writes to."""

    source: Source
    out: Collector
    schemas: Schemas
    known_only: bool = False
    """Whether only the functions that were offered can be called: where nothing marks a call."""
    _held: list[str] = field(default_factory=list)
    _name: str | None = None
    _begun: bool = False

    def begin(self) -> None:
        """A call may follow."""
        if self.source.taken is None:
            self.source.taken = []
        self._held, self._name, self._begun = [], None, False

    def named(self, name: str) -> None:
        """Its name is known. Raises MalformedError for one that nobody offered, where nothing else marks a call."""
        if not name or len(name) > MAX_NAME or (self.known_only and name not in self.schemas):
            raise MalformedError
        self._name = name
        self._pass_on()

    def arguments(self, text: str) -> None:
        """A piece of its arguments, as JSON."""
        if self._begun:
            self.out.arguments(text)
        else:
            self._held.append(text)
            self._pass_on()

    def end(self) -> None:
        """It is complete. Raises MalformedError if it has no name."""
        if self._name is None:
            raise MalformedError
        if not "".join(self._held) and not self._begun:
            self._held = ["{}"]
        self._pass_on()
        self.out.close()

    def _pass_on(self) -> None:
        held = "".join(self._held)
        if not self._begun and self._name is not None and len(held.strip()) > 1:
            self._begun = True
            self.source.taken = None
            self.out.start(self._name)
            self.out.arguments(held)


Notation = Callable[[Calling], Reading]


def json_object(calling: Calling) -> Reading:
    """`{"name": ..., "arguments": {...}}`, with `parameters` as another name of the arguments, in any order."""
    source = calling.source
    yield from source.require("{")
    while True:
        yield from source.blanks()
        key = yield from json_text.string(source)
        yield from source.blanks()
        yield from source.require(":")
        yield from source.blanks()
        if key == "name":
            calling.named((yield from json_text.string(source)))
        elif key in ("arguments", "parameters"):
            yield from _arguments(calling)
        else:
            yield from json_text.value(source, lambda text: None)
        yield from source.blanks()
        end = yield from source.literal(["}", ","])
        if end is None:
            raise CutError if source.ended and not source.rest else MalformedError
        if end == "}":
            calling.end()
            return


def json_objects(calling: Calling) -> Reading:
    """One such object, or a list of them, or several behind each other, between commas or semicolons."""
    source = calling.source
    yield from source.blanks()
    listed = yield from source.literal(["["])
    while True:
        yield from source.blanks()
        if listed and (yield from source.literal(["]"])):
            return
        calling.begin()
        yield from json_object(calling)
        if not (yield from _another(source, "]" if listed else None)):
            return


def _another(source: Source, end: str | None) -> Generator[None, None, bool]:
    """Whether another object follows. Reads what stands between them."""
    if end is not None:
        yield from source.blanks()
        return (yield from source.literal([end, ","])) == ","
    for ahead in range(_MOST_BETWEEN):
        seen = yield from source.peek(ahead + 1)
        if len(seen) <= ahead or seen[ahead] not in " \n,;":
            break
    if seen[ahead:] != "{":
        return False
    source.take(ahead)
    return True


def _arguments(calling: Calling) -> Reading:
    """An object, or a string that holds one as JSON."""
    source = calling.source
    char = yield from source.peek()
    if char == "{":
        yield from json_text.value(source, calling.arguments)
    elif char == '"':
        text = yield from json_text.string(source)
        try:
            given = json.loads(text)
        except (ValueError, RecursionError):
            raise MalformedError from None
        if not isinstance(given, dict):
            raise MalformedError
        calling.arguments(json_text.written(given) if "\\u" in text else text)
    elif char == "n":
        yield from source.require("null")
    else:
        raise MalformedError if char else CutError


def named_json(*ends: str, before: tuple[str, ...] = (), after: tuple[str, ...] = ()) -> Notation:
    """`NAME{...}`: a name up to one of `ends`, then its arguments as an object.

    before: words that may stand in front of the name; after: behind the arguments.
    """

    def read(calling: Calling) -> Reading:
        source = calling.source
        calling.begin()
        yield from source.blanks()
        if before:
            yield from source.literal(before)
        name, end = yield from source.name((*ends, "{"), MAX_NAME)
        calling.named(name)
        if end in ("{", "[CALL_ID]"):
            source.put_back(end)
        yield from _mistral_id(source)
        yield from source.blanks()
        yield from json_text.value(source, calling.arguments) if (yield from source.peek()) == "{" else _no_object(source)
        calling.end()
        if after:
            yield from source.blanks()
            yield from source.literal(after)

    return read


def _no_object(source: Source) -> Reading:
    raise CutError if source.ended and not source.rest else MalformedError
    yield


_mistral_named = named_json("[ARGS]", "[CALL_ID]")


def mistral(calling: Calling) -> Reading:
    """A list of objects, as older models write, or `NAME[ARGS]{...}`."""
    yield from calling.source.blanks()
    if (yield from calling.source.peek()) in ("[", "{"):
        yield from json_objects(calling)
    else:
        yield from _mistral_named(calling)


def _mistral_id(source: Source) -> Reading:
    """The id of a call, which some models write; the server gives ids of its own."""
    if (yield from source.literal(["[CALL_ID]"])):
        yield from source.name(["[ARGS]"], MAX_NAME)


def xml_parameters(calling: Calling) -> Reading:
    """`<function=NAME>`, then `<parameter=KEY>VALUE</parameter>` for each argument, then `</function>`. Values are read as the
    function's schema says: strings as they are, the others as JSON."""
    source = calling.source
    calling.begin()
    yield from source.blanks()
    if (yield from source.peek()) == "{":  # the same models sometimes write JSON
        yield from json_objects(calling)
        return
    yield from source.require("<function=")
    name, _ = yield from source.name([">"], MAX_NAME)
    calling.named(name)
    properties = calling.schemas.get(name, {}).get("properties")
    opened = False
    while True:
        yield from source.blanks()
        word = yield from source.literal(["<parameter=", "</function>"])
        if word is None:
            raise CutError if source.ended and "</function>".startswith(source.rest[:1]) else MalformedError
        if word == "</function>":
            break
        key, _ = yield from source.name([">"], MAX_NAME)
        schema = properties.get(key) if isinstance(properties, dict) else None
        calling.arguments((", " if opened else "{") + json.dumps(key, ensure_ascii=False) + ": ")
        opened = True
        yield from _parameter(calling, types_of(schema))
    calling.arguments("}" if opened else "{}")
    calling.end()


def _parameter(calling: Calling, types: frozenset[str]) -> Reading:
    source, ends = calling.source, ("\n</parameter>", "</parameter>")
    yield from source.literal(["\n"])
    if types == {"string"}:
        calling.arguments('"')
        found = yield from source.until(ends, lambda text: calling.arguments(json.dumps(text, ensure_ascii=False)[1:-1]))
        if found is None:
            raise CutError
        calling.arguments('"')
        return
    pieces: list[str] = []
    if (yield from source.until(ends, pieces.append)) is None:
        raise CutError
    text = "".join(pieces)
    try:
        calling.arguments(json_text.written(typed(text, types)))
    except ValueError:  # a number beyond all numbers
        calling.arguments(json.dumps(text, ensure_ascii=False))


def types_of(schema: Any) -> frozenset[str]:
    """The JSON types that a schema allows; empty where it does not say."""
    if not isinstance(schema, Mapping):
        return frozenset()
    named = schema.get("type")
    found = {named} if isinstance(named, str) else set(filter(lambda item: isinstance(item, str), named or ()))
    for key in ("anyOf", "oneOf"):
        for choice in schema.get(key) or () if isinstance(schema.get(key), list) else ():
            found |= types_of(choice)
    if not found and isinstance(schema.get("enum"), list):
        found = {"string"} if all(isinstance(item, str) for item in schema["enum"]) else set()
    return frozenset(found)


def typed(text: str, types: frozenset[str]) -> Any:
    """A value that was written without quotes, as one of these types if it can be one, else as a string."""
    try:
        found = json.loads(text, parse_constant=lambda word: text)
    except (ValueError, RecursionError):
        found = {"True": True, "False": False, "None": None}.get(text.strip(), text)
    kinds = {bool: {"boolean"}, int: {"integer", "number"}, float: {"number"}, str: {"string"}, list: {"array"},
             dict: {"object"}, type(None): {"null"}}[type(found)]  # fmt: skip
    return found if (kinds & types or not types) and not (isinstance(found, str) and "string" in types) else text


def python_calls(calling: Calling) -> Reading:
    """`[f(a=1, b="x"), g()]`."""
    source = calling.source
    yield from source.blanks()
    yield from source.require("[")
    while True:
        calling.begin()
        yield from source.blanks()
        name, _ = yield from source.name(["("], MAX_NAME)
        calling.named(name)
        opened = False
        while True:
            yield from source.blanks()
            if (yield from source.literal([")"])):
                break
            key, _ = yield from source.name(["="], MAX_NAME)
            given = yield from python_text.value(source)
            yield from source.blanks()
            end = yield from source.peek()
            if end not in (",", ")") or not end:
                raise MalformedError if end else CutError
            pair = json.dumps(key, ensure_ascii=False) + ": " + json_text.written(given)
            calling.arguments((", " if opened else "{") + pair)
            opened = True
            yield from source.literal([","])
        calling.arguments("}" if opened else "{}")
        calling.end()
        yield from source.blanks()
        if (yield from source.literal([",", "]"])) != ",":
            return
