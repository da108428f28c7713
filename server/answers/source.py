"""Text that comes in pieces, for parsers that read as if it were all there.

A parser is a generator: where it needs more text it yields, and is resumed once there is more or the text has ended. Whatever
the pieces, it sees the same characters and decides the same, since every decision waits until no further piece could change it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

Reading = Generator[None, None, None]
"""A parser, or a part of one, that returns nothing."""


class MalformedError(Exception):
    """What began like a call is none."""


class CutError(Exception):
    """The text ended inside a call."""


class Source:
    """What has come and is not read yet."""

    def __init__(self) -> None:
        self.rest = ""
        self.ended = False
        self.taken: list[str] | None = None
        """What was read since a call began, in case it is none."""

    def feed(self, text: str) -> None:
        """More text."""
        self.rest += text

    def take(self, count: int) -> str:
        """Read so many characters, which are there."""
        text, self.rest = self.rest[:count], self.rest[count:]
        if self.taken is not None:
            self.taken.append(text)
        return text

    def put_back(self, text: str) -> None:
        """Unread what was just taken."""
        self.rest = text + self.rest
        if self.taken:
            self.taken[-1] = self.taken[-1].removesuffix(text)

    def peek(self, count: int = 1) -> Generator[None, None, str]:
        """The next characters, fewer only where the text ends."""
        while len(self.rest) < count and not self.ended:
            yield
        return self.rest[:count]

    def blanks(self) -> Generator[None, None, str]:
        """Read white space, if there is any."""
        read = ""
        while True:
            read += self.take(len(self.rest) - len(self.rest.lstrip()))
            if self.rest or self.ended:
                return read
            yield

    def literal(self, words: Sequence[str]) -> Generator[None, None, str | None]:
        """Read the longest of the words that the text goes on with; None if it goes on otherwise."""
        for word in sorted(words, key=len, reverse=True):
            while len(self.rest) < len(word) and word.startswith(self.rest) and not self.ended:
                yield
            if self.rest.startswith(word):
                return self.take(len(word))
        return None

    def require(self, word: str) -> Reading:
        """Read this word. Raises MalformedError, or CutError where the text ends in it."""
        if (yield from self.literal([word])) is None:
            raise CutError if self.ended and word.startswith(self.rest) else MalformedError

    def until(self, marks: Sequence[str], emit: Callable[[str], None]) -> Generator[None, None, str | None]:
        """Read up to the first of the marks and over it. Text before it is emitted as soon as no mark can begin in it. Returns
        the mark, or None where the text ends without one."""
        while True:
            found = min(((at, -len(mark), mark) for mark in marks if (at := self.rest.find(mark)) >= 0), default=None)
            certain = len(self.rest) if self.ended else len(self.rest) - _open_end(self.rest, marks)
            if found is not None and found[0] < certain:
                if found[0]:
                    emit(self.take(found[0]))
                return self.take(len(found[2]))
            if certain:
                emit(self.take(certain))
            if self.ended:
                return None
            yield

    def name(self, ends: Sequence[str], longest: int) -> Generator[None, None, tuple[str, str]]:
        """Read a name up to one of the marks and over it: (name, mark). Raises MalformedError for one that is empty, too long
        or of several lines, CutError where the text ends."""
        while True:
            found = min(((at, -len(end), end) for end in ends if (at := self.rest.find(end)) >= 0), default=None)
            held = 0 if self.ended else _open_end(self.rest, ends)
            before = self.rest[: len(self.rest) - held if found is None else found[0]]
            if len(before.strip()) > longest or "\n" in before.strip():
                raise MalformedError
            if found is not None and (self.ended or found[0] < len(self.rest) - held):
                name = self.take(found[0]).strip()
                if not name:
                    raise MalformedError
                return name, self.take(len(found[2]))
            if self.ended:
                raise CutError
            yield


def _open_end(text: str, marks: Sequence[str]) -> int:
    """Characters at the end of the text that may begin a mark."""
    longest = max(map(len, marks), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        tail = text[-size:]
        if any(len(mark) > size and mark.startswith(tail) for mark in marks):
            return size
    return 0
