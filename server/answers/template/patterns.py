"""Regular expressions that a checkpoint brings: of any shape, so each search has a bound of time.

The module `regex` says what transformers says: its syntax, and where a match could still begin or grow with more text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import regex

SEARCH_SECONDS = 0.02
"""Of the processor, for one search: a thousand times what it usually takes."""
LONGEST = 2000
"""Characters of an expression or of a literal."""
MOST_LITERALS = 32


class TooSlowError(Exception):
    """A search took too long."""


class Found(NamedTuple):
    """Where a mark stands, and what its named groups caught."""

    start: int
    end: int
    groups: dict[str, str]


class Mark:
    """What opens or closes a region: one of a few literals, or an expression."""

    def __init__(self, literals: list[str], pattern: str | None = None) -> None:
        """One of both is given. Raises ValueError for an expression that is none."""
        source = pattern if pattern is not None else "|".join(map(regex.escape, sorted(literals, key=len, reverse=True)))
        try:
            self._compiled: Any = regex.compile(source, regex.DOTALL)
        except (regex.error, RecursionError, OverflowError) as error:
            raise ValueError(f"is no regular expression: {error}") from None
        self._literal = pattern is None
        self._grows = any(one != other and other.startswith(one) for one in literals for other in literals)
        self.groups = frozenset(self._compiled.groupindex)

    def search(self, text: str, begin: int, *, ended: bool) -> tuple[Found | None, int]:
        """The first place from `begin` on, and the place from which on more text may change that: the text's length for none.
        ended: whether there will be no more. Raises TooSlowError."""
        try:
            found = self._compiled.search(text, begin, partial=not ended, timeout=SEARCH_SECONDS)
            if found is None:
                return None, len(text)
            if not ended and (found.partial or self._may_change(text, found)):
                return None, found.start()
        except TimeoutError:
            raise TooSlowError from None
        groups = {key: value for key, value in found.groupdict().items() if value is not None}
        return Found(found.start(), found.end(), groups), len(text)

    def all(self, text: str) -> Iterator[dict[str, str]]:
        """The named groups of all places. Raises TooSlowError."""
        try:
            for found in self._compiled.finditer(text, timeout=SEARCH_SECONDS):
                yield {key: value for key, value in found.groupdict().items() if value is not None}
        except TimeoutError:
            raise TooSlowError from None

    def last(self, text: str) -> int:
        """The end of the last place, -1 for none. Raises TooSlowError."""
        try:
            return max((found.end() for found in self._compiled.finditer(text, timeout=SEARCH_SECONDS)), default=-1)
        except TimeoutError:
            raise TooSlowError from None

    def _may_change(self, text: str, found: Any) -> bool:
        if found.end() == len(text):
            return not self._literal or self._grows
        if self._literal:
            return False
        longer = self._compiled.match(text + "\0", found.start(), timeout=SEARCH_SECONDS)  # `$` and the like lean on the end
        return longer is None or longer.span() != found.span() or longer.groupdict() != found.groupdict()
