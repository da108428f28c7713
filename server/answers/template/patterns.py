"""Regular expressions that a checkpoint brings: of any shape, so what their searches take in one answer is bounded.

The module `regex` says what transformers says: its syntax, and where a match could still begin or grow with more text.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import regex

SEARCH_SECONDS = 0.2
"""For one search, in time of the whole process, which is how `regex` counts: the model's threads use it up too, while this one
waits for a core. Of its own time a search has what is left of the answer's."""
ANSWER_SECONDS = 0.05
CHARACTER_SECONDS = 20e-6
"""Of the processor, for all searches in an answer: at its beginning, and for every character of it. No more than the first is
saved, so that however long an answer is, it holds nobody else up for longer."""
LONGEST = 2000
"""Characters of an expression."""
MOST_HELD = 512
"""Characters of a literal, or of what an expression finds: so many may wait for a mark to be complete."""
MOST_LITERALS = 32
MOST_REPEATS = 10_000
"""What the counts of an expression may be, multiplied with one another."""
MOST_EXPANDED = 500_000
"""The same times the expression's characters: compiling takes memory in proportion, some hundred bytes for each."""

_COUNT = re.compile(r"\{(\d*),?(\d*)\}")
_FUZZY = re.compile(r"\{(?=[^}]*[eids])[\s\deids<=+,]+(?::[^}]*)?\}")
_FLAGS = re.compile(r"\(\?[a-zA-Z01-]*[rLx][a-zA-Z01-]*[):]")


class TooSlowError(Exception):
    """Searches took too long."""


class Budget:
    """Time of the processor that the searches in one answer may take, all together."""

    def __init__(self) -> None:
        self._left = ANSWER_SECONDS

    def grow(self, characters: int) -> None:
        """The answer has so many more."""
        self._left = min(self._left + characters * CHARACTER_SECONDS, ANSWER_SECONDS)

    @contextmanager
    def search(self) -> Iterator[None]:
        """Around one search. Raises TooSlowError when nothing is left, or that one took too long."""
        if self._left <= 0:
            raise TooSlowError
        begun = time.thread_time()
        try:
            yield
        except TimeoutError:
            raise TooSlowError from None
        finally:
            self._left -= time.thread_time() - begun


class Found(NamedTuple):
    """Where a mark stands, and what its named groups caught."""

    start: int
    end: int
    groups: dict[str, str]


class Mark:
    """What opens or closes a region: one of a few literals, or an expression."""

    def __init__(self, literals: list[str], pattern: str | None = None) -> None:
        """One of both is given. Raises ValueError for an expression that is none, or that may take any amount of memory."""
        source = pattern if pattern is not None else "|".join(map(regex.escape, sorted(literals, key=len, reverse=True)))
        if pattern is not None:
            _check(pattern)
        try:
            self._compiled: Any = regex.compile(source, regex.DOTALL)
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise ValueError(f"is no regular expression: {error}") from None
        self._literals = literals
        self.groups = frozenset(self._compiled.groupindex)

    def search(self, text: str, begin: int, budget: Budget, *, ended: bool, empty: bool = True) -> tuple[Found | None, int]:
        """The first place from `begin` on, and the place from which on more text may change that: the text's length for none.
        ended: whether there will be no more. empty: whether a place without any character counts. Raises TooSlowError."""
        while begin <= len(text):
            with budget.search():
                if self._literals:
                    return self._literal(text, begin, ended)
                found = self._compiled.search(text, begin, partial=not ended, timeout=SEARCH_SECONDS)
                waits = found is not None and not ended and (found.partial or self._may_change(text, found))
            if found is None:
                break
            length = (len(text) if waits else found.end()) - found.start()
            if length <= MOST_HELD and (length or waits or empty):
                return (None, found.start()) if waits else (_found(found), len(text))
            begin = found.start() + 1
        return None, len(text)

    def all(self, text: str, budget: Budget) -> Iterator[dict[str, str]]:
        """The named groups of all places. Raises TooSlowError."""
        places = self._compiled.finditer(text, timeout=SEARCH_SECONDS)
        while True:
            with budget.search():
                found = next(places, None)
            if found is None:
                return
            yield _found(found).groups

    def last(self, text: str, budget: Budget) -> int:
        """The end of the last place, -1 for none. Raises TooSlowError."""
        with budget.search():
            return max((found.end() for found in self._compiled.finditer(text, timeout=SEARCH_SECONDS)), default=-1)

    def _literal(self, text: str, begin: int, ended: bool) -> tuple[Found | None, int]:
        found = self._compiled.search(text, begin)
        waits = len(text)
        if not ended:  # an end that may become a literal, which goes before all that begin within it
            ends = ((one, at) for one in self._literals for at in range(max(begin, len(text) - len(one) + 1), len(text)))
            waits = min((at for one, at in ends if one.startswith(text[at:])), default=waits)
        return (None, waits) if found is None or found.start() >= waits else (_found(found), len(text))

    def _may_change(self, text: str, found: Any) -> bool:
        if found.end() == len(text):
            return True
        longer = self._compiled.match(text + "\0", found.start(), timeout=SEARCH_SECONDS)  # `$` and the like lean on the end
        return longer is None or longer.span() != found.span() or longer.groupdict() != found.groupdict()


def _found(found: Any) -> Found:
    return Found(found.start(), found.end(), {key: value for key, value in found.groupdict().items() if value is not None})


def _check(pattern: str) -> None:
    """Raises ValueError for an expression that takes too much memory, or whose matches begin elsewhere than they are found."""
    escaped, bare = re.findall(r"\\(.)", pattern, re.DOTALL), re.sub(r"\\.", "", pattern, flags=re.DOTALL)
    refused = [r"\K"] if "K" in escaped else _FLAGS.search(bare) or _FUZZY.search(bare)
    if refused:
        raise ValueError(f"has {refused[0]:.80}; not allowed: \\K, the flags r, L and x, and fuzzy matching like {{e<=1}}")
    repeats = math.prod(max(1, *(int(count or 0) for count in counts)) for counts in _COUNT.findall(bare))
    if repeats > (most := min(MOST_REPEATS, MOST_EXPANDED // len(pattern))):
        raise ValueError(f"has counts like {{3,5}} that are, multiplied, more than {most}, the most at its length")
