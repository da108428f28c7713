"""What comes of one completion: pieces, each an output of the engine with what is in its text, and all of them collected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from kvloom.engine.requests.request import FinishReason, RequestOutput, TokenLogprob
from kvloom.server.answers.events import CallArguments, CallStart, Content, Event, Reasoning

Finish = FinishReason | Literal["tool_calls"]


class Piece(NamedTuple):
    """One output of one completion, read."""

    completion: int
    output: RequestOutput
    """Tokens, log-probabilities, usage so far; its text as the model wrote it, marks included."""
    events: Sequence[Event]
    """What its text holds; none while a mark may be beginning."""
    finish_reason: Finish | None
    """Set on the last piece of a completion."""


@dataclass(slots=True)
class Part:
    """A stretch of an answer that is all of one kind."""

    kind: type[Content] | type[Reasoning] | type[CallStart]
    id: str = ""
    name: str = ""
    """Of a call, the function's."""
    pieces: list[str] = field(default_factory=list)
    """Of its text, as they came: joined once, since an answer may be long."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of content, those of its tokens, where log-probabilities were asked for."""

    @property
    def text(self) -> str:
        """Of a call, its arguments."""
        return "".join(self.pieces)

    def call(self) -> dict[str, Any]:
        """One of the `tool_calls` of a chat."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.text}}


@dataclass(slots=True)
class Choice:
    """One completion, collected."""

    parts: list[Part] = field(default_factory=list)
    """What it holds, in the order in which it was written."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: Finish | None = None
    stop_reason: int | str | None = None
    _untold: list[TokenLogprob] = field(default_factory=list)
    """Log-probabilities of tokens that nothing is known of yet: they may be content, or a mark."""

    def add(self, piece: Piece) -> None:
        """Append one piece."""
        for event in piece.events:
            self._add(event)
        output = piece.output
        self.tokens.extend(output.tokens)
        self.logprobs.extend(output.logprobs)
        self._attribute(piece)
        self.prompt_logprobs = self.prompt_logprobs or output.prompt_logprobs
        self.finish_reason = piece.finish_reason
        self.stop_reason = output.stop_reason

    @property
    def text(self) -> str:
        """The content, or the whole text where nothing else was looked for."""
        return "".join(part.text for part in self.parts if part.kind is Content)

    def message(self) -> dict[str, Any]:
        """The `message` of a chat."""
        text, calls = self.text, [part.call() for part in self.parts if part.kind is CallStart]
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
        if reasoning := "".join(part.text for part in self.parts if part.kind is Reasoning):
            message |= {"reasoning_content": reasoning, "reasoning": reasoning}
        if calls:
            message["tool_calls"] = calls
        return message

    def _attribute(self, piece: Piece) -> None:
        """Give log-probabilities to the content that a piece brought; those of thoughts and calls alone are nobody's."""
        self._untold.extend(piece.output.logprobs)
        if not self._untold or not (piece.events or piece.finish_reason is not None):
            return
        fresh = any(isinstance(event, Content) for event in piece.events)
        last = next((part for part in reversed(self.parts) if part.kind is Content), None)
        if last is not None and (fresh or (not piece.events and last is self.parts[-1])):
            last.logprobs.extend(self._untold)
        self._untold.clear()

    def _add(self, event: Event) -> None:
        match event:
            case CallStart(_, call_id, name):
                self.parts.append(Part(CallStart, id=call_id, name=name))
            case CallArguments(_, text):
                self.parts[-1].pieces.append(text)  # nothing comes between a call's start and its arguments
            case Content(text) | Reasoning(text):
                kind = type(event)
                if not self.parts or self.parts[-1].kind is not kind:
                    self.parts.append(Part(kind))
                self.parts[-1].pieces.append(text)
