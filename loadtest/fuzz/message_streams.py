"""Reads streams of /v1/messages strictly, as the order of events is promised, and puts the message together."""

from __future__ import annotations

import json
from typing import Any

from pydantic_core import from_json


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, data) of every event. Asserts that nothing else is there."""
    found = []
    for block in text.split("\n\n")[:-1]:
        first, second = block.split("\n")
        name, data = first.removeprefix("event: "), json.loads(second.removeprefix("data: "))
        assert first == f"event: {name}" and data["type"] == name, block
        found.append((name, data))
    assert text.endswith("\n\n")
    return found


def message_of(text: str) -> dict[str, Any]:
    """The message of a stream that ended well. Asserts that every event stands where it may."""
    events = [data for name, data in events_of(text) if name != "ping"]
    assert events[0]["type"] == "message_start" and events[-1]["type"] == "message_stop"
    assert [data["type"] for data in events].count("message_delta") == 1 and events[-2]["type"] == "message_delta"
    message, opened = events[0]["message"], None
    assert message["content"] == [] and message["stop_reason"] is None
    for data in events[1:-2]:
        if data["type"] == "content_block_start":
            assert opened is None and data["index"] == len(message["content"])
            opened, pieces = data["content_block"], ""
            message["content"].append(opened)
            continue
        assert opened is not None and data["index"] == len(message["content"]) - 1
        if data["type"] == "content_block_stop":
            if opened["type"] == "tool_use":
                opened["input"] = from_json(pieces or "{}", allow_partial=True)  # a call may be cut
            opened = None
            continue
        match data["delta"]:
            case {"type": "text_delta", "text": piece} if opened["type"] == "text":
                opened["text"] += piece
            case {"type": "thinking_delta", "thinking": piece} if opened["type"] == "thinking":
                opened["thinking"] += piece
            case {"type": "signature_delta", "signature": piece} if opened["type"] == "thinking":
                opened["signature"] = piece
            case {"type": "input_json_delta", "partial_json": piece} if opened["type"] == "tool_use":
                pieces += piece
            case delta:
                raise AssertionError(delta)
    assert opened is None
    message |= events[-2]["delta"]
    message["usage"] |= events[-2]["usage"]
    return message
