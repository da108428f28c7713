"""Answers on the wire, for chat and completions alike: streamed chunks and whole bodies.

The two endpoints differ in names and in where the text goes; `Format` holds the difference. A text chunk is written from a
prefix that is made once per completion, since a busy server writes about a thousand of them a second.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from json.encoder import encode_basestring_ascii as quote
from typing import Any, NamedTuple

from kvloom.engine.requests.request import RequestOutput, TokenLogprob
from kvloom.server.answers.events import CallArguments, CallStart, Content, Event, Reasoning
from kvloom.server.errors import sse_error
from kvloom.server.pieces import Finish, Piece
from kvloom.server.sse import DONE
from kvloom.server.token_ids import TokenIds
from kvloom.server.usage import UsageTotals

LogprobWriter = Callable[[int, Sequence[int], Sequence[TokenLogprob]], dict[str, Any]]
"""(completion, tokens, log-probabilities) -> the `logprobs` object of its next chunk, or of the whole."""


class Format(NamedTuple):
    """How chat or completions write their answers."""

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


class Envelope(NamedTuple):
    """What every chunk and every body of one answer repeats."""

    id: str
    created: int
    """Seconds since 1970."""
    model: str


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


class ChunkWriter:
    """Turns outputs into events. No event has empty text, but for the opening one and the last of a completion."""

    def __init__(
        self, form: Format, envelope: Envelope, usage: UsageTotals, *, logprobs: LogprobWriter | None, include_usage: bool,
        continuous_usage: bool, ids: TokenIds | None = None, mixed: bool = False,
    ) -> None:  # fmt: skip
        """ids: what chunks tell of token ids, if they do; mixed: whether there may be more in the text than content."""
        self._ids = ids
        self._form, self._usage, self._logprobs = form, usage, logprobs
        self._mixed = mixed
        self._include_usage, self._continuous = include_usage, continuous_usage
        self._head = (
            f'data: {{"id":{quote(envelope.id)},"object":{quote(form.chunk_object)},'
            f'"created":{envelope.created},"model":{quote(envelope.model)},"choices":['
        )
        self._plain_end = ',"usage":null}\n\n' if include_usage else "}\n\n"
        self._text_end = f'{form.text_close},"logprobs":null,"finish_reason":null}}]{self._plain_end}'
        self._plain = logprobs is None and not continuous_usage and ids is None
        self._text_heads: dict[int, str] = {}
        self._held: dict[int, tuple[list[int], list[TokenLogprob]]] = {}

    def write(self, piece: Piece) -> bytes:
        """The events of one piece, possibly none."""
        index, output = piece.completion, piece.output
        if self._ids is not None:
            self._ids.note(index, output.tokens)
        if self._mixed:
            return self._apart(piece).encode()
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

    def error(self, error: Exception) -> bytes:
        """An error that ends a stream which has begun."""
        return sse_error(error) + DONE

    def _apart(self, piece: Piece) -> str:
        """A chunk for each thing that an output holds, and one for its end."""
        index, output, events, finish = piece
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


def whole_body(
    form: Format, envelope: Envelope, choices: Sequence[dict[str, Any]], usage: UsageTotals, **more: Any
) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    return {
        "id": envelope.id,
        "object": form.object,
        "created": envelope.created,
        "model": envelope.model,
        "choices": list(choices),
        "usage": usage.body(),
        **more,
    }
