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
class Choice:
    """One completion, collected."""

    text: str = ""
    """The content, or the whole text where nothing else was looked for."""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: Finish | None = None
    stop_reason: int | str | None = None

    def add(self, piece: Piece) -> None:
        """Append one piece."""
        for event in piece.events:
            self._add(event)
        output = piece.output
        self.tokens.extend(output.tokens)
        self.logprobs.extend(output.logprobs)
        self.prompt_logprobs = self.prompt_logprobs or output.prompt_logprobs
        self.finish_reason = piece.finish_reason
        self.stop_reason = output.stop_reason

    def message(self) -> dict[str, Any]:
        """The `message` of a chat."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text if self.text or not self.calls else None}
        if self.reasoning:
            message |= {"reasoning_content": self.reasoning, "reasoning": self.reasoning}
        if self.calls:
            message["tool_calls"] = self.calls
        return message

    def _add(self, event: Event) -> None:
        match event:
            case Content(text):
                self.text += text
            case Reasoning(text):
                self.reasoning += text
            case CallStart(_, name_id, name):
                self.calls.append({"id": name_id, "type": "function", "function": {"name": name, "arguments": ""}})
            case CallArguments(index, text):
                self.calls[index]["function"]["arguments"] += text
