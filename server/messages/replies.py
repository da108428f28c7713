"""Answers as Anthropic's clients read them: a message of content blocks, whole or as named events of a stream.

A block begins where text, thoughts or a call do, and ends where something else begins: the blocks are in the order in which the
model wrote them, and the same whether streamed or not.
"""

from __future__ import annotations

import json
from json.encoder import encode_basestring_ascii as quote
from typing import Any

from pydantic_core import from_json

from kvloom.server.answers.events import CallArguments, CallStart, Content, Event, Reasoning
from kvloom.server.field_names import Names
from kvloom.server.messages.errors import message_error
from kvloom.server.pieces import Choice, Finish, Part, Piece
from kvloom.server.respond import Job
from kvloom.server.usage import UsageTotals

SIGNATURE = "kvloom"
"""Of every block of thoughts: clients send none back without one, and nothing depends on it."""


def sse(name: str, data: str) -> str:
    """A named event."""
    return f"event: {name}\ndata: {data}\n\n"


INPUT_COUNTS = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
PING = sse("ping", '{"type":"ping"}').encode()


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def usage_body(usage: UsageTotals) -> dict[str, Any]:
    """Token counts by Anthropic's arithmetic: a prompt is what was read from the cache, what is written to it, and the rest,
    input_tokens."""
    said = usage.body()
    body: dict[str, Any] = {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens - usage.written_tokens,
        "cache_creation_input_tokens": usage.written_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
    if "completion_tokens_details" in said:
        body["output_tokens_details"] = {"thinking_tokens": said["completion_tokens_details"]["reasoning_tokens"]}
    return body | ({"kv": said["kv"]} if "kv" in said else {})


def ending(job: Job, finish: Finish | None, reason: int | str | None) -> dict[str, Any]:
    """Why an answer ended, and with which of the stop sequences."""
    if finish == "stop" and isinstance(reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": reason}
    full = job.usage.completion_tokens < (job.work.sampling.default_tokens or 0)
    cut = "model_context_window_exceeded" if full else "max_tokens"
    return {"stop_reason": {"tool_calls": "tool_use", "length": cut}.get(finish or "", "end_turn"), "stop_sequence": None}


def input_of(arguments: str) -> dict[str, Any]:
    """The input of a call. Of one that was cut, as much as came; numbers beyond all numbers become words."""
    try:
        given = json.loads(_dumps(from_json(arguments, allow_partial=True)), parse_constant=str)
    except ValueError:
        return {}
    return given if isinstance(given, dict) else {}


def _head(job: Job) -> dict[str, Any]:
    return {"id": job.envelope.id, "type": "message", "role": "assistant", "model": job.envelope.model}


def whole_message(job: Job, choice: Choice, *, omits: bool = False) -> dict[str, Any]:
    """The body of an answer that is not streamed. omits: whether blocks of thoughts are empty."""
    end = ending(job, choice.finish_reason, choice.stop_reason)
    content = [_block(part, omits) for part in choice.parts]
    return {**_head(job), "content": content, **end, "usage": usage_body(job.usage)}


def _block(part: Part, omits: bool) -> dict[str, Any]:
    """A content block, complete."""
    if part.kind is CallStart:
        return {"type": "tool_use", "id": part.id, "name": part.name, "input": input_of(part.text or "{}")}
    if part.kind is Reasoning:
        return {"type": "thinking", "thinking": "" if omits else part.text, "signature": SIGNATURE}
    return {"type": "text", "text": part.text}


_DELTAS = {"text": '"text_delta","text":', "thinking": '"thinking_delta","thinking":',
           "tool_use": '"input_json_delta","partial_json":'}  # fmt: skip


def _kind(event: Event) -> str:
    return "text" if isinstance(event, Content) else "thinking" if isinstance(event, Reasoning) else "tool_use"


def _opened(event: Event) -> dict[str, Any]:
    """A block as it begins."""
    match event:
        case Content():
            return {"type": "text", "text": ""}
        case Reasoning():
            return {"type": "thinking", "thinking": "", "signature": ""}
        case CallStart(_, call_id, name):
            return {"type": "tool_use", "id": call_id, "name": name, "input": {}}
        case CallArguments():
            raise ValueError("arguments of a call that has not begun")


class MessageWriter:
    """The stream of one message."""

    def __init__(self, job: Job, names: Names, *, omits: bool = False) -> None:
        """names: of fields, in errors; omits: whether blocks of thoughts are empty."""
        self._job, self._names, self._omits = job, names, omits
        self._input: dict[str, Any] = {}
        """Counts of the prompt as they were first told: where another engine takes a request up, they would change."""
        self._begun = False
        self._open: str | None = None
        """The type of the block that is being written."""
        self._index = -1

    def write(self, piece: Piece) -> bytes:
        """The events of one piece, possibly none."""
        finish = piece.finish_reason
        if not piece.events and finish is None:
            return b""
        events = [*map(self._event, piece.events)]
        if not self._begun:
            self._begun = True
            events.insert(0, self._start())
        if finish is not None:
            end = ending(self._job, finish, piece.output.stop_reason)
            events += [self._close(), self._data("message_delta", delta=end, usage=self._usage())]
        return "".join(events).encode()

    def end(self) -> bytes:
        """The last event."""
        return self._data("message_stop").encode()

    def error(self, error: Exception) -> bytes:
        """An error that ends a stream which has begun."""
        return sse("error", _dumps(message_error(error, self._names, self._job.headers["X-Request-Id"]))).encode()

    def _event(self, event: Event) -> str:
        kind, start = _kind(event), ""
        if isinstance(event, CallStart) or kind != self._open:
            start = self._close()
            self._open, self._index = kind, self._index + 1
            start += self._data("content_block_start", index=self._index, content_block=_opened(event))
        if isinstance(event, CallStart) or (self._omits and kind == "thinking"):
            return start
        return start + self._delta(_DELTAS[kind] + quote(event.text))

    def _close(self) -> str:
        if self._open is None:
            return ""
        signed = self._delta('"signature_delta","signature":' + quote(SIGNATURE)) if self._open == "thinking" else ""
        self._open = None
        return signed + self._data("content_block_stop", index=self._index)

    def _delta(self, delta: str) -> str:
        data = f'{{"type":"content_block_delta","index":{self._index},"delta":{{"type":{delta}}}}}'
        return sse("content_block_delta", data)

    def _start(self) -> str:
        end = {"stop_reason": None, "stop_sequence": None}
        return self._data("message_start", message={**_head(self._job), "content": [], **end, "usage": self._usage()})

    def _usage(self) -> dict[str, Any]:
        told = usage_body(self._job.usage)
        self._input = self._input or {name: told[name] for name in INPUT_COUNTS}
        return told | self._input

    def _data(self, name: str, **more: Any) -> str:
        return sse(name, _dumps({"type": name, **more}))
