"""Values in Python's notation out of a text that comes in pieces: what pythonic tool calls are made of.

Nothing is evaluated. Numbers, strings, True, False, None (and JSON's spelling of these), lists, tuples and dictionaries are
read, and nothing else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Generator
from typing import Any

from kvloom.server.answers.source import CutError, MalformedError, Source

MAX_DEPTH = 64
_WORD = re.compile(r"[-+.\w]*")
_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)
_LONGEST_WORD = 400
_CONSTANTS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""}
_CODES = {"x": 2, "u": 4, "U": 8}


def value(source: Source, depth: int = 0) -> Generator[None, None, Any]:
    """Read one value. Raises MalformedError and CutError."""
    yield from source.blanks()
    char = yield from source.peek()
    if not char:
        raise CutError
    if char in "'\"":
        return (yield from _string(source))
    if char not in "[({":
        return (yield from _word(source))
    if depth >= MAX_DEPTH:
        raise MalformedError
    source.take(1)
    if char == "{":
        return dict((yield from _items(source, "}", depth, pairs=True)))
    return (yield from _items(source, "]" if char == "[" else ")", depth, pairs=False))


def _items(source: Source, end: str, depth: int, *, pairs: bool) -> Generator[None, None, list[Any]]:
    found: list[Any] = []
    while True:
        yield from source.blanks()
        if (yield from source.literal([end])):
            return found
        item = yield from value(source, depth + 1)
        if pairs:
            yield from source.blanks()
            yield from source.require(":")
            item = (item if isinstance(item, str) else str(item), (yield from value(source, depth + 1)))
        found.append(item)
        yield from source.blanks()
        if (yield from source.literal([","])) is None:
            yield from source.require(end)
            return found


def _string(source: Source) -> Generator[None, None, str]:
    quote = yield from source.literal(["'''", '"""', "'", '"'])
    assert quote is not None
    pieces: list[str] = []
    while True:
        found = yield from source.until([quote, "\\"], pieces.append)
        if found is None:
            raise CutError
        if found == quote:
            return "".join(pieces)
        char = yield from source.peek()
        if not char:
            raise CutError
        source.take(1)
        pieces.append((yield from _code(source, char)) if char in _CODES else _ESCAPES.get(char, _unknown(char)))


def _unknown(char: str) -> str:
    return char if char in "\\'\"" else "\\" + char


def _code(source: Source, kind: str) -> Generator[None, None, str]:
    digits = yield from source.peek(_CODES[kind])
    if len(digits) < _CODES[kind]:
        raise CutError
    try:
        char = chr(int(digits, 16))
        char.encode()
    except (ValueError, OverflowError):
        raise MalformedError from None
    source.take(len(digits))
    return char


def _word(source: Source) -> Generator[None, None, Any]:
    while (found := _WORD.match(source.rest)) and found.end() == len(source.rest) <= _LONGEST_WORD and not source.ended:
        yield
    word = found.group() if found else ""
    if source.ended and len(word) == len(source.rest):
        raise CutError
    if word in _CONSTANTS:
        result: Any = _CONSTANTS[word]
    elif len(word) <= _LONGEST_WORD and _NUMBER.fullmatch(word):
        whole = word.lstrip("+-").isdigit()
        result = int(word) if whole else float(word)
        if not whole and not math.isfinite(result):
            raise MalformedError
    else:
        raise MalformedError
    source.take(len(word))
    return result
