"""Reading a streamed answer into a record.

Runs once per chunk beside the server under test, on the same cores more often than not: one clock reading per piece that the
network gave, one `json.loads` per event, and nothing else.
"""

from __future__ import annotations

import json
import time
from typing import Any

import aiohttp

from kvloom.loadtest.client.record import Record

DATA = b"data:"
DONE = b"[DONE]"


async def read(content: aiohttp.StreamReader, record: Record) -> None:
    """Take a stream down to its end. Raises aiohttp's errors, and ValueError for what is no JSON object."""
    parts: list[str] = []
    rest, done = b"", False
    try:
        while piece := await content.readany():
            now = time.perf_counter()
            if record.first_byte is None:
                record.first_byte = now
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                done = _line(line, record, parts, now) or done
        done = _line(rest, record, parts, time.perf_counter()) or done
    finally:
        record.text = "".join(parts)
        if record.tokens_from != "usage":
            record.output_tokens = len(record.chunks)
    if record.error is None and not done and record.finish_reason is None:
        record.fail("stream", "the stream ended without a finish_reason" if record.chunks else "the stream ended without text")


def _line(line: bytes, record: Record, parts: list[str], now: float) -> bool:
    """Take one line down; true for the mark of the end. Anything but data is a comment, or an event's name."""
    if not line.startswith(DATA):
        return False
    payload = line[len(DATA) :].strip()
    if payload == DONE:
        return True
    event = json.loads(payload)
    if not isinstance(event, dict):
        raise ValueError(f"an event is no JSON object: {payload[:80]!r}")
    _event(event, record, parts, now)
    return False


def _event(event: dict[str, Any], record: Record, parts: list[str], now: float) -> None:
    if event.get("error") or event.get("object") == "error":
        record.fail("stream", message_of(event))
        return
    for choice in event.get("choices") or ():
        if reason := choice.get("finish_reason"):
            record.finish_reason = reason
        if text := choice.get("text") or _delta_text(choice.get("delta")):
            record.last = now
            record.chunks.append(now)
            parts.append(text)
    if usage := event.get("usage"):
        _usage(usage, record)


def _delta_text(delta: dict[str, Any] | None) -> str | None:
    """Text of a chat chunk; thinking counts, since the reader sees it come."""
    if not delta:
        return None
    return delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")


def _usage(usage: dict[str, Any], record: Record) -> None:
    record.prompt_tokens = usage.get("prompt_tokens") or 0
    if usage.get("completion_tokens") is not None:
        record.output_tokens, record.tokens_from = usage["completion_tokens"], "usage"
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    record.cached_tokens = record.cached_tokens if cached is None else cached
    record.kv = usage.get("kv") or record.kv


def message_of(body: Any) -> str:
    """The message of an error body, in any of the shapes that servers use."""
    if not isinstance(body, dict):
        return str(body)
    error = body.get("error") or body
    found = (error.get("message") or error.get("detail") or error) if isinstance(error, dict) else error
    return " ".join(str(found).split())
