"""What an answer is made of, in the order in which it came."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable
from typing import NamedTuple

ALPHABET = string.ascii_letters + string.digits


class Content(NamedTuple):
    """Text for the reader of the answer."""

    text: str


class Reasoning(NamedTuple):
    """Text that the model thought before it answered."""

    text: str


class CallStart(NamedTuple):
    """A call of a function begins."""

    call: int
    """How many came before it."""
    id: str
    name: str


class CallArguments(NamedTuple):
    """The next piece of a call's arguments, which together are JSON text."""

    call: int
    text: str


Event = Content | Reasoning | CallStart | CallArguments


def make_call_id(length: int | None = None) -> str:
    """A new id: `call_...`, or so many letters and digits for templates that allow nothing else."""
    letters = "".join(secrets.choice(ALPHABET) for _ in range(length or 24))
    return letters if length else f"call_{letters}"


class Collector:
    """Takes what a parser finds and makes events of it: no event is empty, neighbours of a kind are joined.

    Blanks before and behind thoughts and calls are formatting, not text, so blanks wait until it is known what follows them.
    """

    def __init__(self, *, calls: bool, most_calls: int | None = None, call_id: Callable[[], str] = make_call_id) -> None:
        """calls: whether there may be any, so that blanks at the end wait. most_calls: further ones are dropped."""
        self.calls = 0
        self.open = False
        """Whether a call has begun and not ended."""
        self._waits, self._most, self._call_id = calls, most_calls, call_id
        self._events: list[Event] = []
        self._blanks = ""
        self._after_mark = False
        """Whether nothing but blanks came since thoughts or since the beginning of them."""

    def take(self) -> list[Event]:
        """The events since the last call of this."""
        taken, self._events = self._events, []
        return taken

    def content(self, text: str) -> None:
        """Text of the answer."""
        if self._after_mark:
            text = text.lstrip()
            self._after_mark = not text
        if self._waits:
            text, self._blanks = _split(self._blanks + text)
        self._add(Content(text))

    def text(self, event: Content | Reasoning) -> None:
        """Text whose blanks somebody else has seen to."""
        self._add(event)

    def begin_reasoning(self) -> None:
        """What comes now are thoughts."""
        self._blanks, self._after_mark = "", True

    def reasoning(self, text: str) -> None:
        """Thoughts."""
        if self._after_mark:
            text = text.lstrip()
            self._after_mark = not text
        text, self._blanks = _split(self._blanks + text)
        self._add(Reasoning(text))

    def end_reasoning(self) -> None:
        """What comes now is the answer."""
        self._blanks, self._after_mark = "", True

    def start(self, name: str) -> None:
        """A call begins."""
        self._blanks, self.open = "", True
        self.calls += 1
        if not self._dropped:
            self._events.append(CallStart(self.calls - 1, self._call_id(), name))

    def arguments(self, text: str) -> None:
        """A piece of its arguments."""
        if not self._dropped:
            self._add(CallArguments(self.calls - 1, text))

    def close(self) -> None:
        """The call is complete."""
        self.open = False

    def finish(self, thinking: bool) -> None:
        """The answer is over. Blanks at its end are text, unless they stand behind thoughts or a call."""
        if not thinking and not self.calls:
            self._add(Content(self._blanks))
        self._blanks = ""

    @property
    def _dropped(self) -> bool:
        return self._most is not None and self.calls > self._most

    def _add(self, event: Content | Reasoning | CallArguments) -> None:
        if not event.text:
            return
        last = self._events[-1] if self._events else None
        if isinstance(event, CallArguments):
            if isinstance(last, CallArguments) and last.call == event.call:
                self._events[-1] = CallArguments(event.call, last.text + event.text)
                return
        elif isinstance(last, type(event)):
            self._events[-1] = type(event)(last.text + event.text)
            return
        self._events.append(event)


def _split(text: str) -> tuple[str, str]:
    """Text, and the blanks at its end."""
    kept = text.rstrip()
    return kept, text[len(kept) :]
