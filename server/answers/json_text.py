"""One JSON value out of a text that comes in pieces.

Every piece is passed on as soon as it is certain, so that what is passed on is the beginning of JSON at any time. Small
mistakes of small models are mended on the way, since they change no meaning: line ends and tabs inside strings, backslashes
that escape nothing, halves of surrogate pairs, and Python's True, False and None.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator
from typing import Any

from kvloom.server.answers.source import CutError, MalformedError, Reading, Source

MAX_DEPTH = 128
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_BLANK = re.compile(r"[^ \t\n\r]")
"""White space that JSON does not allow."""
_WORD = re.compile(r"[-+.\w]*")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?", re.ASCII)
_WORDS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}
_HEX = re.compile(r"[0-9a-fA-F]{4}")
_SURROGATE = re.compile(r"[dD][89a-fA-F][0-9a-fA-F]{2}")
_PAIR = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_CUT_PAIR = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}(\\(u([dD]([c-fC-F][0-9a-fA-F]?)?)?)?)?")
_LONGEST_NUMBER = 400

Emit = Callable[[str], None]


def value(source: Source, emit: Emit) -> Reading:
    """Read one value. Raises MalformedError where it is no JSON, CutError where the text ends."""
    closers: list[str] = []
    while True:
        char = yield from _next(source, emit)
        if char in "{[" and char:
            if len(closers) >= MAX_DEPTH:
                raise MalformedError
            emit(source.take(1))
            closers.append("}" if char == "{" else "]")
            if (yield from _next(source, emit)) != closers[-1]:
                if closers[-1] == "}":
                    yield from _key(source, emit)
                continue
            emit(source.take(1))
            closers.pop()
        else:
            yield from (_string(source, emit) if char == '"' else _word(source, emit))
        while closers:
            char = yield from _next(source, emit)
            if char == closers[-1]:
                emit(source.take(1))
                closers.pop()
                continue
            if char != ",":
                raise MalformedError
            emit(source.take(1))
            yield from _next(source, emit)
            if closers[-1] == "}":
                yield from _key(source, emit)
            break
        if not closers:
            return


def written(value: Any) -> str:
    """A value as JSON. Halves of surrogate pairs, which escapes can say, become one character together, and U+FFFD alone."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def string(source: Source) -> Generator[None, None, str]:
    """Read a string and return what it says. Raises MalformedError and CutError."""
    pieces: list[str] = []
    if (yield from source.peek()) != '"':
        raise CutError if source.ended and not source.rest else MalformedError
    yield from _string(source, pieces.append)
    return str(json.loads("".join(pieces)))


def _next(source: Source, emit: Emit) -> Generator[None, None, str]:
    """Pass blanks on and look at the next character. Raises CutError at the end of the text."""
    emit(_BLANK.sub(" ", (yield from source.blanks())))
    char: str = yield from source.peek()
    if not char:
        raise CutError
    return char


def _key(source: Source, emit: Emit) -> Reading:
    if (yield from source.peek()) != '"':
        raise MalformedError
    yield from _string(source, emit)
    if (yield from _next(source, emit)) != ":":
        raise MalformedError
    emit(source.take(1))


def _string(source: Source, emit: Emit) -> Reading:
    emit(source.take(1))
    while True:
        if plain := _PLAIN.match(source.rest):
            emit(source.take(plain.end()))
        char = yield from source.peek()
        if not char:
            raise CutError
        if char == '"':
            emit(source.take(1))
            return
        if char == "\\":
            yield from _escape(source, emit)
        elif char < " ":
            emit(json.dumps(source.take(1))[1:-1])


def _escape(source: Source, emit: Emit) -> Reading:
    two = yield from source.peek(2)
    if len(two) < 2:
        raise CutError
    if two[1] == "u":
        six = yield from source.peek(6)
        if _SURROGATE.fullmatch(six, 2):
            yield from _pair(source, emit)
            return
        if _HEX.fullmatch(six, 2):
            emit(source.take(6))
            return
        if len(six) < 6:
            raise CutError
    elif two[1] in '"\\/bfnrt':
        emit(source.take(2))
        return
    source.take(1)
    if two[1] != "'":
        emit("\\\\")


def _pair(source: Source, emit: Emit) -> Reading:
    """An escaped half of a surrogate pair, with the other half; alone it is no character, and no JSON for strict readers."""
    both = yield from source.peek(12)
    if _PAIR.fullmatch(both):
        emit(source.take(12))
        return
    if len(both) < 12 and _CUT_PAIR.fullmatch(both):
        raise CutError
    source.take(6)
    emit("\\ufffd")


def _word(source: Source, emit: Emit) -> Reading:
    while (found := _WORD.match(source.rest)) and found.end() == len(source.rest) <= _LONGEST_NUMBER and not source.ended:
        yield
    word = found.group() if found else ""
    if source.ended and len(word) == len(source.rest):  # nobody knows whether it is whole
        raise CutError
    if word not in _WORDS and (len(word) > _LONGEST_NUMBER or not _NUMBER.fullmatch(word)):
        raise MalformedError
    source.take(len(word))
    emit(_WORDS.get(word, word))
