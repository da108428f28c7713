"""Answers on the wire, for chat and completions alike: streamed chunks and whole bodies.

The two endpoints differ in names and in where the text goes; `Format` holds the difference. A text chunk is written from a
prefix that is made once per completion, since a busy server writes about a thousand of them a second.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii as quote
from typing import Any, Literal, NamedTuple

from kvloom.engine.requests.request import FinishReason, RequestOutput, TokenLogprob
from kvloom.server.answers.events import CallArguments, CallStart, Content, Event, Reasoning
from kvloom.server.answers.reader import AnswerReader
from kvloom.server.sse import DONE
from kvloom.server.token_ids import TokenIds
from kvloom.server.usage import UsageTotals

Finish = FinishReason | Literal["tool_calls"]
LogprobWriter = Callable[[int, Sequence[int], Sequence[TokenLogprob]], dict[str, Any]]
"""(completion, tokens, log-probabilities) -> the `logprobs` object of its next chunk, or of the whole."""


class Format(NamedTuple):
    """How one endpoint writes its answers."""

    id_prefix: str
    object: str
    chunk_object: str
    text_open: str
    """JSON before a chunk's text."""
    text_close: str
    no_text: str
    """JSON in the place of text in a chunk that has none."""
    opening: str
    """JSON of a completion's first chunk, sent with its first token; empty for none."""


CHAT = Format("chatcmpl-", "chat.completion", "chat.completion.chunk", '"delta":{"content":', "}", '"delta":{}',
              '"delta":{"role":"assistant","content":""}')  # fmt: skip
COMPLETION = Format("cmpl-", "text_completion", "text_completion", '"text":', "", '"text":""', "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What every chunk and every body of one answer repeats."""

    format: Format
    id: str
    created: int
    model: str


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


class ChunkWriter:
    """Turns outputs into events. No event has empty text, but for the opening one and the last of a completion."""

    def __init__(
        self, envelope: Envelope, usage: UsageTotals, *, logprobs: LogprobWriter | None, include_usage: bool,
        continuous_usage: bool, ids: TokenIds | None = None, readers: Sequence[AnswerReader] = (),
    ) -> None:  # fmt: skip
        """ids: what chunks tell of token ids, if they do; readers: of each completion, where there is more in its text than
        content."""
        form = envelope.format
        self._ids = ids
        self._form, self._usage, self._logprobs = form, usage, logprobs
        self._readers = readers
        self._include_usage, self._continuous = include_usage, continuous_usage
        self._head = (
            f'data: {{"id":{quote(form.id_prefix + envelope.id)},"object":{quote(form.chunk_object)},'
            f'"created":{envelope.created},"model":{quote(envelope.model)},"choices":['
        )
        self._plain_end = ',"usage":null}\n\n' if include_usage else "}\n\n"
        self._text_end = f'{form.text_close},"logprobs":null,"finish_reason":null}}]{self._plain_end}'
        self._plain = logprobs is None and not continuous_usage and ids is None
        self._text_heads: dict[int, str] = {}
        self._held: dict[int, tuple[list[int], list[TokenLogprob]]] = {}

    def write(self, index: int, output: RequestOutput) -> bytes:
        """The events of one output, possibly none."""
        if self._ids is not None:
            self._ids.note(index, output.tokens)
        if self._readers:
            return self._read(index, self._readers[index], output).encode()
        self._usage.update(index, output.usage)
        text_head = self._text_heads.get(index)
        opening = ""
        if text_head is None:
            text_head = self._text_heads[index] = f'{self._head}{{"index":{index},{self._form.text_open}'
            if self._form.opening:
                opening = self._choice(index, self._form.opening, "null", None, None)
        if output.text and self._plain and output.finish_reason is None:
            return (opening + text_head + quote(output.text) + self._text_end).encode()
        return (opening + self._full(index, output)).encode()

    def end(self) -> bytes:
        """The usage chunk, if it was asked for, and the end mark."""
        if not self._include_usage:
            return DONE
        return f'{self._head}],"usage":{_dumps(self._usage.body())}}}\n\n'.encode() + DONE

    def _read(self, index: int, reader: AnswerReader, output: RequestOutput) -> str:
        """A chunk for each thing that an output holds, and one for its end."""
        events = reader.read(output)
        self._usage.update(index, output.usage, reader.counted_reasoning)
        finish = reader.finish_reason(output.finish_reason)
        written = self._logprobs_of(index, output, wait=not events and finish is None)
        if not events and finish is None:
            return ""
        opening = index not in self._text_heads and bool(self._form.opening)
        self._text_heads[index] = ""
        chunks = [self._choice(index, self._form.opening, "null", None, None)] if opening else []
        for event in events:
            chunks.append(self._choice(index, f'"delta":{_dumps(delta_of(event))}', written, None, None))
            written = "null"
        if finish is not None:
            chunks.append(self._choice(index, self._form.no_text, written, finish, output.stop_reason))
        return "".join(chunks)

    def _logprobs_of(self, index: int, output: RequestOutput, *, wait: bool) -> str:
        """Log-probabilities that wait for a chunk, as JSON; with `wait` they go on waiting."""
        tokens, logprobs = self._held.setdefault(index, ([], []))
        if self._logprobs is None:
            return "null"
        tokens.extend(output.tokens)
        logprobs.extend(output.logprobs)
        if wait or not logprobs:
            return "null"
        self._held[index] = ([], [])
        return _dumps(self._logprobs(index, tokens, logprobs))

    def _full(self, index: int, output: RequestOutput) -> str:
        """A chunk with everything that it may have; log-probabilities wait for the text they belong to."""
        empty = not output.text and output.finish_reason is None
        written = self._logprobs_of(index, output, wait=empty)
        if empty:
            return ""
        text = f"{self._form.text_open}{quote(output.text)}{self._form.text_close}" if output.text else self._form.no_text
        return self._choice(index, text, written, output.finish_reason, output.stop_reason)

    def _choice(self, index: int, text: str, logprobs: str, finish: Finish | None, reason: int | str | None) -> str:
        ending = "" if finish is None else f',"stop_reason":{_dumps(reason)}'
        usage = f',"usage":{_dumps(self._usage.body())}}}\n\n' if self._continuous else self._plain_end
        opening = bool(self._form.opening) and text == self._form.opening
        inside, behind = ("", "") if self._ids is None else self._ids.chunk(index, opening=opening)
        choice = f'{{"index":{index},{text},"logprobs":{logprobs},"finish_reason":{_dumps(finish)}{ending}{inside}}}'
        return f"{self._head}{choice}]{behind}{usage}"


def delta_of(event: Event) -> dict[str, Any]:
    """The `delta` of a chat's chunk for one event."""
    match event:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning_content": text, "reasoning": text}
        case CallStart(index, name_id, name):
            call = {"index": index, "id": name_id, "type": "function", "function": {"name": name, "arguments": ""}}
            return {"tool_calls": [call]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


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

    def add(self, output: RequestOutput, reader: AnswerReader | None = None) -> None:
        """Append one output."""
        if reader is None:
            self.text += output.text
        else:
            for event in reader.read(output):
                self._add(event)
        self.tokens.extend(output.tokens)
        self.logprobs.extend(output.logprobs)
        self.prompt_logprobs = self.prompt_logprobs or output.prompt_logprobs
        finish = output.finish_reason
        self.finish_reason = finish if reader is None else reader.finish_reason(finish)
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


def whole_body(envelope: Envelope, choices: Sequence[dict[str, Any]], usage: UsageTotals, **more: Any) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    form = envelope.format
    return {
        "id": form.id_prefix + envelope.id,
        "object": form.object,
        "created": envelope.created,
        "model": envelope.model,
        "choices": list(choices),
        "usage": usage.body(),
        **more,
    }
