"""One completion's text, read as it comes.

Promises that the events of a text do not depend on the pieces in which it came, that a call's events are its start and then its
arguments in order, that text which is no call stays in the content, and that nothing a model writes is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from kvloom.engine.requests.request import FinishReason, RequestOutput
from kvloom.server.answers.calls import Calling, Schemas
from kvloom.server.answers.events import Collector, Content, Event, Reasoning, make_call_id
from kvloom.server.answers.formats import CallFormat, ReasoningFormat
from kvloom.server.answers.source import CutError, MalformedError, Reading, Source
from kvloom.server.answers.template.spec import ResponseTemplate

_PIECE = 256
"""Characters that are read at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What to look for in the answers to one request."""

    calls: CallFormat | None = None
    reasoning: ReasoningFormat | None = None
    thinking: bool = False
    """Whether the prompt itself opened the thoughts."""
    tell_reasoning: bool = True
    """Whether thoughts are told of, or left out."""
    schemas: Schemas = field(default_factory=dict)
    """Parameters of the functions that were offered."""
    bare: bool = True
    """Whether calls may stand without a mark at the beginning, where the format knows that."""
    most_calls: int | None = None
    """The answer is over behind so many calls."""
    template: ResponseTemplate | None = None
    """The checkpoint's own, in whose place `reasoning` and the format of `calls` are not looked at (`TemplateReader`)."""
    apart: bool = True
    """Whether thoughts that the template finds come apart from the content."""
    prompt_end: str = ""
    """The prompt's last characters, in which the template may say that something has begun."""
    forced: bool = False
    """Whether a grammar leaves no room for content, so that what looks like some is a call that `max_tokens` has cut."""


class AnswerReader:
    """Makes events of one completion's outputs."""

    def __init__(self, expected: Expected) -> None:
        self._expected = expected
        length = None if expected.calls is None else expected.calls.call_id_length
        self._out = Collector(
            calls=expected.calls is not None, most_calls=expected.most_calls, call_id=lambda: make_call_id(length)
        )
        self._source = Source()
        self._thinking = expected.thinking
        self._undecided = 0
        """Tokens until it was known that there are thoughts: the mark that opens them may be several."""
        self.reasoning_tokens = 0
        """Tokens of the thoughts so far, their marks included."""
        self._parser = self._answer()
        next(self._parser, None)

    def read(self, output: RequestOutput) -> list[Event]:
        """The events of one output; of the last one, all that were still waiting."""
        before = self._thinking
        events = self.push(output.text, ended=output.finish_reason is not None)
        self._undecided += 0 if before else len(output.tokens)
        if before or self._thinking:
            self.reasoning_tokens += len(output.tokens) if before else self._undecided
        return events

    def push(self, text: str, *, ended: bool = False) -> list[Event]:
        """The events of more text."""
        for at in range(0, len(text), _PIECE):  # what waits is copied with every step
            self._source.feed(text[at : at + _PIECE])
            next(self._parser, None)
        if ended:
            self._source.ended = True
            next(self._parser, None)
            self._out.finish(self._thinking)
        hidden = (() if self._expected.tell_reasoning else (Reasoning,)) + ((Content,) if self._expected.forced else ())
        return [event for event in self._out.take() if not isinstance(event, hidden)]

    @property
    def complete(self) -> bool:
        """Whether the answer has all the calls it may have, so that what the model goes on with is not wanted. Where a grammar
        says what it writes, it ends by itself."""
        most, out = self._expected.most_calls, self._out
        return most is not None and out.calls >= most and not out.open and not self._expected.forced

    @property
    def counted_reasoning(self) -> int | None:
        """Tokens of thoughts so far; None where they are not told apart."""
        return None if self._expected.reasoning is None else self.reasoning_tokens

    def finish_reason(self, reason: FinishReason | None) -> FinishReason | Literal["tool_calls"] | None:
        """What is told of how it ended: `tool_calls` where a model that stopped left calls, all of them whole."""
        return "tool_calls" if reason == "stop" and self._out.calls and not self._out.open else reason

    def _answer(self) -> Reading:
        form = self._expected.reasoning
        if form is not None:
            yield from self._thoughts(form)
        if self._expected.calls is None:
            yield from self._source.until((), self._out.content)
        else:
            yield from self._calls(self._expected.calls)

    def _thoughts(self, form: ReasoningFormat) -> Reading:
        source, out = self._source, self._out
        if not self._thinking:
            blanks = yield from source.blanks()
            self._thinking = (yield from source.literal([form.open])) is not None
            if not self._thinking:
                out.content(blanks)
                return
        else:  # some models write the mark again
            blanks = yield from source.blanks()
            if (yield from source.literal([form.open])) is None:
                source.put_back(blanks)
        out.begin_reasoning()
        if (yield from source.until([form.close], out.reasoning)) is not None:
            out.end_reasoning()
            self._thinking = False

    def _calls(self, form: CallFormat) -> Reading:
        source, out = self._source, self._out
        if form.bare and self._expected.bare:
            yield from self._bare(form)
        while True:
            mark = yield from source.until((*form.opens, *form.wraps), out.content)
            if mark is None:
                return
            if mark in form.opens:
                if mark == "<function=":  # the notation reads it itself
                    source.put_back(mark)
                    mark = ""
                yield from self._section(form, mark, known_only=False)

    def _bare(self, form: CallFormat) -> Reading:
        """Calls without a mark, at the beginning."""
        source, out = self._source, self._out
        out.content((yield from source.blanks()))
        start = yield from source.literal(form.bare)
        if start is None:
            return
        opening = start.rstrip("{[")
        source.put_back(start.removeprefix(opening))
        yield from self._section(form, opening, known_only=True)
        if opening and out.calls and not out.open:
            yield from self._closed(["```"])

    def _closed(self, marks: Sequence[str]) -> Reading:
        """The mark behind calls, if there is one, be it cut; else blanks there are text."""
        source = self._source
        blanks = yield from source.blanks()
        if (yield from source.literal(marks)) is None:
            if source.ended and any(mark.startswith(source.rest) for mark in marks):
                source.take(len(source.rest))
            self._out.content(blanks)

    def _section(self, form: CallFormat, mark: str, *, known_only: bool) -> Reading:
        source, out = self._source, self._out
        source.taken = [mark]
        try:
            yield from form.notation(Calling(source, out, self._expected.schemas, known_only))
            taken, source.taken = None, None
            yield from self._closed(form.closes)
        except (MalformedError, CutError) as error:
            taken, source.taken = source.taken, None
            if taken is not None:
                out.content("".join(taken))
            elif isinstance(error, CutError):
                source.take(len(source.rest))  # the beginning of a word whose end nobody knows
            if isinstance(error, MalformedError):
                out.close()
