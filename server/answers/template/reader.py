"""One completion's text, read region by region as a response template says.

Text of the content and of thoughts is told as it comes, but for an end that may yet turn out to be a mark; a call once its
region is over. Promises what `AnswerReader` promises: text which is no call stays in the content, nothing a model writes is an
error, and with literals for marks what is told does not depend on the pieces in which a text came. An expression is asked about
what has come: where one of its alternatives begins within another, or looks around itself, pieces may be read otherwise than
the whole. Where expressions take too long, the rest of that answer is content.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from kvloom.engine.requests.request import FinishReason, RequestOutput
from kvloom.server.answers import json_text
from kvloom.server.answers.calls import MAX_NAME, typed, types_of
from kvloom.server.answers.events import Collector, Content, Event, Reasoning, make_call_id
from kvloom.server.answers.reader import Expected
from kvloom.server.answers.template.patterns import Budget, Found, TooSlowError
from kvloom.server.answers.template.spec import MOST_FIELDS, Region, ResponseTemplate, Role

log = logging.getLogger("kvloom.server")

MOST_BODY = 1 << 20
"""Characters of a call's region; beyond, it is text."""
_BEHIND = 256
"""Characters that were read and are kept, for expressions that look back."""
_PIECE = 256
"""Characters that are read at a time: what waits is searched with every step."""


class _Call(NamedTuple):
    name: str
    arguments: str


class TemplateReader:
    """Makes events of one completion's outputs."""

    def __init__(self, expected: Expected, template: ResponseTemplate) -> None:
        self._expected, self._template = expected, template
        length = None if expected.calls is None else expected.calls.call_id_length
        self._make_call_id = lambda: make_call_id(length)
        self._out = self._collector()
        self._text, self._at, self._own = "", 0, 0
        """What has come, up to where it is read, and from where on it is the answer's and not the prompt's."""
        self._budget = Budget()
        self._region: Region | None = template.outside
        self._groups: dict[str, str] = {}
        self._mark = ""
        """Of a call, what opened it."""
        self._body: list[str] = []
        self._size = 0
        """Of a call, what stands inside, and how many characters that are."""
        self._unsaid = 0
        """Characters of a call, its mark included, that the prompt says: they are of the call, but not of the answer's text."""
        self._blanks, self._begun = "", False
        """Blanks that are text once some follows, and whether the region has had any."""
        self._before, self._raw = "", False
        """Such blanks before the region, and whether it turned out to be text like that before and behind it."""
        self._told: set[str] = set()
        """Regions that had text."""
        self._given_up = False
        self._waiting = 0
        """Tokens of what waits and stands in no thoughts."""
        self.reasoning_tokens = 0
        """Tokens of the thoughts so far, their marks included."""
        self._prompted(expected.prompt_end)

    def read(self, output: RequestOutput) -> list[Event]:
        """The events of one output; of the last one, all that were still waiting."""
        before = self._role == "reasoning"
        events = self.push(output.text, ended=output.finish_reason is not None)
        if before or self._role == "reasoning":
            self.reasoning_tokens += len(output.tokens) + self._waiting
            self._waiting = 0
        else:
            self._waiting = self._waiting + len(output.tokens) if self._at < len(self._text) else 0
        return events

    def push(self, text: str, *, ended: bool = False) -> list[Event]:
        """The events of more text."""
        for at in range(0, len(text), _PIECE):
            piece = text[at : at + _PIECE]
            self._text += piece
            self._budget.grow(len(piece))
            self._advance(ended=False)
        if ended:
            self._advance(ended=True)
            self._close("")
        hidden = () if self._expected.tell_reasoning else (Reasoning,)
        return [event for event in self._out.take() if not isinstance(event, hidden)]

    @property
    def complete(self) -> bool:
        """Whether the answer has all the calls it may have, so that what the model goes on with is not wanted."""
        most = self._expected.most_calls
        return most is not None and self._out.calls >= most

    @property
    def counted_reasoning(self) -> int | None:
        """Tokens of thoughts so far; None where they are not told apart."""
        return self.reasoning_tokens if self._expected.apart and self._template.reasons else None

    def finish_reason(self, reason: FinishReason | None) -> FinishReason | Literal["tool_calls"] | None:
        """What is told of how it ended: `tool_calls` where a model that stopped left calls."""
        return "tool_calls" if reason == "stop" and self._out.calls else reason

    # Regions ------------------------------------------------------------------------------------------------------------

    @property
    def _role(self) -> Role:
        """What the text that comes now is of the answer."""
        if self._given_up:
            return "content"
        role = "" if self._region is None else self._region.role
        wanted = self._expected.apart if role == "reasoning" else self._expected.calls is not None
        return role if role == "content" or wanted else "content" if role else ""

    def _prompted(self, prompt_end: str) -> None:
        """Begin in the region that the prompt leaves open. What it says itself is not part of the answer."""
        try:
            begin = self._template.start.last(prompt_end, self._budget)
        except TooSlowError:
            begin = -1
        if begin < 0:
            return
        self._text = prompt_end[begin:]
        self._budget.grow(len(self._text))
        self._advance(ended=False)
        self._own = len(self._text)
        self._out, self._blanks, self._before = self._collector(), "", ""
        self._told.clear()
        if self._role == "calls":
            self._unsaid = len(self._mark) + self._size + self._own - self._at

    def _collector(self) -> Collector:
        expected = self._expected
        return Collector(calls=expected.calls is not None, most_calls=expected.most_calls, call_id=self._make_call_id)

    def _advance(self, *, ended: bool) -> None:
        still = 0
        while not self._given_up:
            try:
                found, region, certain = self._next(ended)
            except TooSlowError:
                self._give_up()
                break
            if found is None:
                self._add(self._slice(certain))
                self._at = max(self._at, certain)
                break
            self._add(self._slice(found.start))
            still = still + 1 if found.end == self._at else 0
            if still > MOST_FIELDS:  # regions without any text, one after the other, for ever
                self._give_up()
            if self._given_up:
                self._at = found.start
                break
            self._at = found.start
            mark, self._at = self._slice(found.end), found.end
            if region is not None:
                self._close("")
                self._open(region, found, mark)
            else:
                self._groups |= found.groups
                self._close(mark)
        if self._given_up:
            self._add(self._slice(len(self._text)))
            self._at = len(self._text)
        if (read := self._at - _BEHIND) > _BEHIND:
            self._text, self._at, self._own = self._text[read:], _BEHIND, max(0, self._own - read)

    def _slice(self, end: int) -> str:
        """What is read up to there, without what the prompt says of text."""
        return self._text[self._at if self._role == "calls" else max(self._at, self._own) : end]

    def _next(self, ended: bool) -> tuple[Found | None, Region | None, int]:
        """The next mark, the region that it opens, if it opens one; without a mark, up to where the text is certain."""
        best: tuple[tuple[int, int, bool], Found, Region | None] | None = None
        certain = len(self._text)
        for region in self._watched():
            mark = region.closes if region is self._region else region.opens
            if mark is None:
                continue
            empty = region is not self._template.outside or region is not self._region  # or it would end before it begins
            found, waits = mark.search(self._text, self._at, self._budget, ended=ended, empty=empty)
            certain = min(certain, waits)
            if found is not None:
                key = (found.start, found.start - found.end, region is self._region)
                if best is None or key < best[0]:
                    best = key, found, None if region is self._region else region
        if best is not None and (best[1].start < certain or ended):
            return best[1], best[2], certain
        return None, None, certain

    def _watched(self) -> Iterator[Region]:
        """Regions whose marks matter now: inside of one, its own."""
        if self._region is not None and self._region is not self._template.outside:
            yield self._region
        else:
            yield from self._template.regions

    def _open(self, region: Region, found: Found, mark: str) -> None:
        self._region, self._groups = region, dict(found.groups)
        if self._role == "calls":
            self._mark = mark
        elif region.role == "calls" or (region.role == "reasoning" and not self._expected.apart):
            self._add(mark)  # nobody asked for it to be told apart

    def _add(self, text: str) -> None:
        """Text of the region that is open."""
        role, region = self._role, self._region
        if not text or not role:
            return
        if role == "calls":
            self._body.append(text)
            self._size += len(text)
            if self._size > MOST_BODY:
                self._give_up()
            return
        if region is None or self._given_up or role != region.role:
            self._as_text(text)
            return
        if region.strip:
            text = self._blanks + text if self._begun else text.lstrip()
            kept = text.rstrip()
            text, self._blanks = kept, text[len(kept) :]
        if not text:
            return
        if not self._begun and region.name in self._told:
            text = ("\n" if region.join is None else region.join) + text
        self._begun = True
        self._told.add(region.name)
        self._say(role, text)

    def _as_text(self, text: str) -> None:
        """Text of a region that nobody wants told apart, or that says nothing."""
        self._say("content", self._before + text)
        self._before, self._raw = "", True

    def _say(self, role: Role, text: str) -> None:
        self._out.text(Reasoning(text) if role == "reasoning" else Content(text))

    def _close(self, mark: str) -> None:
        """The region that is open is over."""
        region, role = self._region, self._role
        if role == "calls" and (self._mark or self._body) and region is not None:
            calls = self._calls(region)
            if calls is None:
                self._as_text((self._mark + "".join(self._body) + mark)[self._unsaid :])
            for call in calls or ():
                self._out.start(call.name)
                self._out.arguments(call.arguments)
                self._out.close()
        elif region is not None and role != region.role:
            self._add(mark)
        self._region, self._groups, self._mark, self._body, self._size = self._template.outside, {}, "", [], 0
        self._unsaid = 0
        self._before = self._blanks if region is self._template.outside else ""
        self._blanks, self._begun, self._raw = "", self._raw, False

    def _give_up(self) -> None:
        log.warning("the rest of an answer is not read by the response template: an expression takes too long or leads "
                    "nowhere, or a call has more than %d characters", MOST_BODY)  # fmt: skip
        held, self._mark, self._body = self._mark + "".join(self._body), "", []
        self._given_up = True
        held, self._blanks = self._blanks + held[self._unsaid :], ""
        self._as_text(held)

    # Calls --------------------------------------------------------------------------------------------------------------

    def _calls(self, region: Region) -> list[_Call] | None:
        """What is called in a region; None if that is nothing."""
        try:
            found = region.value("".join(self._body), self._groups, self._budget)
            calls = [self._call(item) for item in (found if isinstance(found, list) else [found])]
        except (ValueError, RecursionError, TooSlowError):
            return None
        return calls or None

    def _call(self, item: Any) -> _Call:
        """Raises ValueError if it is no call."""
        function = item.get("function", item) if isinstance(item, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
            raise ValueError("no name")
        name = json.loads(json_text.written(name))  # without halves of surrogate pairs
        given = function.get("arguments", function.get("parameters"))
        given = json.loads(given or "{}") if isinstance(given, str) else {} if given is None else given
        if not isinstance(given, dict):
            raise ValueError("arguments are no object")
        schema = self._expected.schemas.get(name, {}).get("properties")
        properties: Mapping[str, Any] = schema if isinstance(schema, Mapping) else {}
        said = {key: _as_said(value, properties.get(key)) for key, value in given.items()}
        if _deeper(said, json_text.MAX_DEPTH):
            raise ValueError("arguments are nested too deeply")
        return _Call(name, json_text.written(said))


def _deeper(value: Any, levels: int) -> bool:
    """Whether more objects and lists than that stand within one another."""
    if not isinstance(value, (dict, list)):
        return False
    return levels == 0 or any(_deeper(item, levels - 1) for item in (value.values() if isinstance(value, dict) else value))


def _as_said(value: Any, schema: Any) -> Any:
    """A string that a parameter's schema says is something else, as that."""
    types = types_of(schema)
    if not types:
        return value
    if isinstance(value, list) and "array" not in types:
        return [typed(item, types) if isinstance(item, str) else item for item in value]
    return typed(value, types) if isinstance(value, str) else value
