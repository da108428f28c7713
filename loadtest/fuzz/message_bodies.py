"""Random bodies for /v1/messages: histories with calls, results and thoughts, tools, everything that may be asked, mostly of a
right form; and what the model is made to say: marks, calls and crumbs."""

from __future__ import annotations

import json
import random
from typing import Any

from kvloom.loadtest.fuzz.chats import NAMES, WORDS, value

TEXTS = ("Say hello.", "weather in Bonn?", *WORDS)
KINDS = {"system": ("text",), "user": ("text", "text", "tool_result"),
         "assistant": ("text", "text", "tool_use", "thinking", "redacted_thinking")}  # fmt: skip
ODD = 0.03
"""Of blocks, messages and fields that are something else than they should be."""


def text_block(draw: random.Random) -> dict[str, Any]:
    """Text, now and then with what clients put beside it."""
    hint = {"cache_control": {"type": "ephemeral"}} if draw.random() < 0.2 else {}
    return {"type": "text", "text": draw.choice(TEXTS), **hint}


def content(draw: random.Random, *kinds: str) -> Any:
    """A string or blocks."""
    if draw.random() < 0.4:
        return draw.choice(TEXTS)
    return [block(draw, draw.choice(kinds)) for _ in range(draw.randint(0 if draw.random() < ODD else 1, 4))]


def block(draw: random.Random, kind: str) -> Any:
    """One block."""
    name = draw.choice(("call_1", "call_2", "toolu_3"))
    given = {draw.choice(("city", "days", *WORDS)): value(draw) for _ in range(draw.randrange(3))}
    made: dict[str, Any] = {
        "text": lambda: text_block(draw),
        "thinking": lambda: {"type": "thinking", "thinking": draw.choice(TEXTS), "signature": draw.choice(("", "s"))},
        "redacted_thinking": lambda: {"type": "redacted_thinking", "data": "x"},
        "tool_use": lambda: {"type": "tool_use", "id": name, "name": draw.choice(NAMES), "input": given},
        "tool_result": lambda: {
            "type": "tool_result", "tool_use_id": name, "content": content(draw, "text"), "is_error": draw.random() < 0.3},
    }[kind]()  # fmt: skip
    if draw.random() < ODD:
        name = draw.choice(("type", "text", "content", "input", "tool_use_id", "id", "name"))
        made[name] = draw.choice((value(draw), "image", "document", "x" * 2000))
    return made


def turn(draw: random.Random) -> dict[str, Any]:
    """One message."""
    role = draw.choice(("user", "user", "user", "assistant", "assistant", "system"))
    made = {"role": role, "content": content(draw, *KINDS[role])}
    if draw.random() < ODD:
        made[draw.choice(("role", "content"))] = value(draw)
    return made


def tools(draw: random.Random) -> list[Any]:
    """Tools that are offered."""
    schemas: tuple[Any, ...] = (
        {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        {"type": "object", "properties": {"days": {"type": "integer"}}, "additionalProperties": False},
        {"type": "object", "properties": value(draw)},
        {},
    )
    made = [{"name": name, "description": draw.choice(TEXTS), "input_schema": draw.choice(schemas)}
            for name in draw.sample(NAMES, draw.randint(1, 3))]  # fmt: skip
    if draw.random() < 0.1:
        odd: tuple[dict[str, Any], ...] = ({"type": "bash_20250124"}, {"defer_loading": True}, {"input_schema": value(draw)})
        draw.choice(made).update(draw.choice(({"strict": True}, {"input_examples": [{"city": "Ulm"}]}, *odd)))
    return made


def body(draw: random.Random) -> dict[str, Any]:
    """A whole request."""
    made: dict[str, Any] = {
        "messages": [turn(draw) for _ in range(draw.randint(1, 6))],
        "max_tokens": 10**6 if draw.random() < 0.01 else draw.choice((1, 2, 5, 20, 60)),
        "stream": draw.random() < 0.6,
    }
    if made["messages"][-1].get("role") == "assistant" and draw.random() < 0.7:
        made["messages"].append({"role": "user", "content": content(draw, *KINDS["user"])})
    schema = {"type": "json_schema", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}
    maybe: dict[str, Any] = {
        "tools": tools(draw),
        "tool_choice": {"type": draw.choice(("auto", "any", "none", "tool")), "disable_parallel_tool_use": draw.random() < 0.5},
        "system": content(draw, "text"),
        "stop_sequences": [draw.choice(("e", "</tool", " ", "Bonn"))],
        "temperature": draw.choice((0, 0.5, 1)),
        "top_k": draw.choice((1, 5)),
        "top_p": draw.choice((0.1, 1)),
        "thinking": {
            "type": draw.choice(("enabled", "adaptive", "disabled")),
            "display": draw.choice(("summarized", "omitted")),
        },
        "output_config": draw.choice(({"effort": "low"}, {"format": schema}, {"effort": "high", "format": schema})),
        "metadata": {"user_id": "u"},
        "kv": draw.choice(({"explain": True}, {"selection": "recycled", "budget": 16}, {"reuse": "off"}, {"share": "none"})),
        "seed": draw.randrange(9),
        "cache_salt": draw.choice(("a", "b")),
    }
    for name, given in maybe.items():
        if draw.random() < (0.5 if name == "tools" else 0.15):
            made[name] = given
    if made.get("tool_choice", {}).get("type") == "tool":
        made["tool_choice"]["name"] = draw.choice(NAMES)
    if draw.random() < 0.01:
        made["messages"] *= draw.choice((600, 1500, 5000))
    if draw.random() < 0.1:
        made[draw.choice((*maybe, "messages", "max_tokens", "stream"))] = value(draw)
    return made


def answer(draw: random.Random) -> str:
    """What a model that was trained to could write: thoughts, text and whole calls."""
    call = {"name": draw.choice(NAMES), "arguments": {draw.choice(("city", "days")): value(draw)}}
    parts = (f"<tool_call>\n{json.dumps(call)}\n</tool_call>", draw.choice(TEXTS), "\n")
    thoughts = f"<think>{draw.choice(TEXTS)}</think>" if draw.random() < 0.4 else ""
    return thoughts + "".join(draw.choices(parts, k=draw.randint(0, 5)))
