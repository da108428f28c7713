"""Stop strings in text that arrives in pieces.

Owns how much text must wait because it may turn out to be part of a stop string. One Knuth-Morris-Pratt automaton per string,
so a character costs O(strings), whatever they look like.

The text ends at the first character that completes a stop string (of two that end there, the longer one counts). That depends
on the text alone, not on how it was cut into tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Stopped(NamedTuple):
    """What came out: text that is certain, and the stop string that ended it, if one did."""

    text: str
    stop: str | None


def _failures(word: str) -> list[int]:
    """failure[n]: length of the longest proper prefix of word[:n] that also ends it."""
    failure = [0, 0]
    for char in word[1:]:
        length = failure[-1]
        while length and word[length] != char:
            length = failure[length]
        failure.append(length + (word[length] == char))
    return failure


class _Automaton:
    """How much of one string the text so far ends with."""

    def __init__(self, word: str) -> None:
        self.word = word
        self.matched = 0
        self._failure = _failures(word)

    @property
    def open(self) -> int:
        """Characters at the end of the text that may begin the word. A complete word that was let pass is no beginning."""
        return self._failure[self.matched] if self.matched == len(self.word) else self.matched

    def step(self, char: str) -> bool:
        """Take one character; True if it completes the word."""
        self.matched = self.open
        while self.matched and self.word[self.matched] != char:
            self.matched = self._failure[self.matched]
        self.matched += self.word[self.matched] == char
        return self.matched == len(self.word)


class StopMatcher:
    """Passes text through until a stop string is complete; holds back what may become one."""

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        self._automata = [_Automaton(stop) for stop in sorted(stops, key=len, reverse=True)]
        self._include = include_stop
        self._held = ""

    def push(self, text: str, *, armed: bool = True) -> Stopped:
        """More text. While not `armed`, a stop string that completes in it is ordinary text."""
        if not self._automata:
            return Stopped(text, None)
        self._held += text
        first = len(self._held) - len(text)
        for end, char in enumerate(text, first + 1):
            complete = [automaton.word for automaton in self._automata if automaton.step(char)]
            if complete and armed:
                return self._end(complete[0], end)
        wait = max(automaton.open for automaton in self._automata)
        certain = self._held[: len(self._held) - wait]
        self._held = self._held[len(certain) :]
        return Stopped(certain, None)

    def _end(self, stop: str, end: int) -> Stopped:
        text = self._held[: end if self._include else end - len(stop)]
        self._held = ""
        return Stopped(text, stop)

    def finish(self) -> str:
        """The text held back, which no stop string needs any more."""
        held, self._held = self._held, ""
        return held
