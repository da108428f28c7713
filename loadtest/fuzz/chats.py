"""Random chats with tools through everything that reads them: no error but the caller's own, no hang, the same in pieces.

    python -m kvloom.loadtest.fuzz.chats [--requests N] [--seed S] [--url http://127.0.0.1:8000 --model NAME]

A case is a chat template put together from what real templates do (and from what hostile ones could), a body with tools and a
history of calls, some of it malformed, and an answer made of marks and crumbs. The body is validated, the template rendered,
the answer read whole and in pieces. With --url bodies go to a server instead: every answer is 200 or 400, in time.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import ValidationError

from kvloom.engine.errors import InvalidRequestError, ModelError
from kvloom.engine.text.chat_template import ChatTemplate
from kvloom.server.answers.events import CallArguments, CallStart, Event
from kvloom.server.answers.formats import CALL_FORMATS, REASONING_FORMATS
from kvloom.server.answers.reader import Expected
from kvloom.server.answers.readers import reader_of
from kvloom.server.answers.template.spec import load
from kvloom.server.schema.chat import ChatBody

SECONDS = 12.0
"""For one case: a template's probes and a rendering have bounds of their own."""
NAMES = ("look", "list_all", "a.b", "mcp:x/y")
WORDS = ("Bonn", "", " ", "\n", "{}", "[", "]", '"', "<tool_call>", "</think>", "é🦊", "{{ 7 * 7 }}", "x" * 300, "\x00")
_EACH = "{% for m in messages %}"
_CALLS = _EACH + "{% for c in m.tool_calls or [] %}"
_END = "{% endfor %}"
PARTS = (
    "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}",
    _EACH + "{{ m.role }}:{{ m.content }}\n" + _END,
    _CALLS + "<tool_call>{{ c.function.arguments | tojson }}" + _END + _END,
    _CALLS + "[TOOL_CALLS]{{ c.function.name + c.function.arguments }}" + _END + _END,
    _CALLS + "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}" + _END + _END,
    _EACH + "{% for p in m.content %}{{ p.text }}{% endfor %}" + _END,
    _EACH + "{% set c = m.content.split('</think>')[-1].lstrip() %}{{ c }}{{ m.reasoning_content or '' }}" + _END,
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}",
    _EACH + "{% if m.tool_call_id and m.tool_call_id | length != 9 %}{{ raise_exception('id') }}{% endif %}" + _END,
    "{% for t in tools %}{{ t.function.parameters.properties | items | list }}{% endfor %}",
    "{{ messages | tojson(indent=4) }}",
    "{{ tools[0].function.name.x.y }}",
    "{{ messages[-1].content.nonsense() }}",
    "{% if add_generation_prompt %}assistant:{% if enable_thinking %}<think>\n{% endif %}{% endif %}",
    "{% if %}",
    "{{ 1 / 0 }}",
)
HOSTILE = (
    "{% set n = namespace(x='a') %}{% for i in range(9999) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
)
"""Seldom drawn, since they take all the time there is."""
READ_BY = tuple(
    load({"start_anchor": "assistant", "fields": fields}, ())
    for fields in (
        {
            "content": {},
            "thinking": {"open_pattern": r"^\s*<think>", "close_pattern": r"\s*</think>\s*"},
            "tool_calls": {"open": ["<tool_call>", "[TOOL_CALLS]"], "close_pattern": "</tool_call>|[,;]", "content": "json"},
        },
        {
            "content": {"open_pattern": "^|</function>", "close_pattern": "(?=<function)", "content_args": {"strip": False}},
            "tool_calls": {"open_pattern": r"<function=(?P<name>\w*)>?", "close": "</function>", "content": "xml-inline",
                           "content_args": {"tag_pattern": r"<parameter=(?P<key>\w+)>(?P<value>.*?)</parameter>"},
                           "transform": {"function": {"name": "{name}", "arguments": "{content}"}}},
        },
        {"reasoning": {"open": "<"}, "tool_calls": {"open": "[", "close": "]", "content": "python-call-list"}},
    )
)  # fmt: skip
"""Response templates of checkpoints."""


def template(draw: random.Random) -> str:
    """A chat template's source."""
    hostile = [draw.choice(HOSTILE)] if draw.random() < 0.005 else []
    return "".join([*draw.choices(PARTS, k=draw.randint(1, 4)), *hostile])


def value(draw: random.Random, depth: int = 0) -> Any:
    """Something that JSON can say."""
    kind = draw.randrange(5 if depth > 3 else 7)
    if kind == 5:
        return [value(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind == 6:
        return {draw.choice(WORDS): value(draw, depth + 1) for _ in range(draw.randrange(4))}
    return (None, draw.random() < 0.5, draw.randint(-(2**70), 2**70), draw.uniform(-1e9, 1e9), draw.choice(WORDS))[kind]


def _call(draw: random.Random) -> dict[str, Any]:
    given = {draw.choice(("city", "days", *WORDS)): value(draw) for _ in range(draw.randrange(4))}
    arguments = draw.choice((given, json.dumps(given), json.dumps(given)[:-1], draw.choice(WORDS), json.dumps(value(draw))))
    return {"id": draw.choice(("call_1", "abcdefghi", "")), "type": "function",
            "function": {"name": draw.choice(NAMES), "arguments": arguments}}  # fmt: skip


def message(draw: random.Random) -> dict[str, Any]:
    """A turn, mostly of a right form."""
    role = draw.choice(("system", "user", "user", "assistant", "assistant", "tool", "tool", "developer", "function"))
    text = draw.choice(WORDS)
    made: dict[str, Any] = {"role": role, "content": draw.choice((text, text, [{"type": "text", "text": text}]))}
    if role == "assistant":
        made["content"] = draw.choice((text, None))
        made["tool_calls"] = [_call(draw) for _ in range(draw.randrange(3))]
        if draw.random() < 0.3:
            made["reasoning_content"] = draw.choice(WORDS)
    if role in ("tool", "function"):
        made["tool_call_id"] = draw.choice(("call_1", "abcdefghi", ""))
    if draw.random() < 0.05:
        made[draw.choice(("content", "role", "tool_calls", "tool_call_id", "name"))] = value(draw)
    return made


def body(draw: random.Random) -> dict[str, Any]:
    """A chat with tools, mostly of a right form."""
    days = {"type": draw.choice(("integer", ["number", "null"]))}
    schemas: tuple[Any, ...] = (
        {"type": "object", "properties": {"city": {"type": "string"}, "days": days}},
        {"type": "object", "properties": value(draw)},
        None,
        {},
    )
    tools = [
        {
            "type": "function",
            "function": {"name": name, "description": draw.choice(WORDS), "parameters": draw.choice(schemas)},
        }
        for name in draw.sample(NAMES, draw.randrange(1, 4))
    ]
    made: dict[str, Any] = {
        "messages": [message(draw) for _ in range(draw.randint(1, 6))],
        "tools": tools,
        "tool_choice": draw.choice(("auto", "auto", "auto", "none")),
        "parallel_tool_calls": draw.random() < 0.7,
        "chat_template_kwargs": draw.choice(({}, {"enable_thinking": True}, {"x": "y"})),
    }
    if draw.random() < 0.1:
        made[draw.choice(("messages", "tools", "tool_choice", "reasoning_effort", "chat_template_kwargs"))] = value(draw)
    return made


def answer(draw: random.Random) -> str:
    """What a model could write: calls in some format, whole, cut and mixed with crumbs."""
    marks = [mark for form in CALL_FORMATS.values() for mark in form.marks]
    thoughts = [mark for form in REASONING_FORMATS.values() for mark in (form.open, form.close)]
    call = json.dumps({"name": draw.choice(NAMES), "arguments": {"city": value(draw)}})
    pieces = (*WORDS, *marks, *thoughts, call, call[: draw.randrange(len(call))], "look(city='x')", "<function=look>",
              "<parameter=city>", "</parameter>", "</function>", "look", "{", "}", ",", ";", "\\", "```json\n")  # fmt: skip
    return "".join(draw.choices(pieces, k=draw.randint(0, 20)))


def attempt(draw: random.Random) -> str:
    """One case; says how far it came. Raises what nobody expects."""
    source = template(draw)
    try:
        checked = ChatBody.model_validate(body(draw))
    except ValidationError:
        return "refused by the schema"
    except InvalidRequestError:
        return "refused by the schema"
    read_both_ways(draw, checked)
    try:
        compiled = ChatTemplate(source)
    except ModelError:
        return "no template"
    conversation = checked.conversation(checked.messages)
    try:
        compiled.render(
            [one.for_template() for one in conversation.messages],
            tools=[tool.for_template() for tool in conversation.tools],
            variables=conversation.variables,
        )
    except InvalidRequestError:
        return "refused by the template"
    return "rendered"


def read_both_ways(draw: random.Random, checked: ChatBody) -> None:
    """Read an answer whole and in pieces. Raises AssertionError where that differs."""
    text = answer(draw)
    expected = Expected(
        calls=draw.choice((None, *CALL_FORMATS.values())),
        reasoning=draw.choice((None, *REASONING_FORMATS.values())),
        schemas={tool.function.name: tool.function.parameters or {} for tool in checked.tools},
        most_calls=None if checked.parallel_tool_calls else 1,
        template=draw.choice((None, *READ_BY)),
        apart=draw.random() < 0.8,
        prompt_end=draw.choice(("", "assistant\n<think>\n", "assistant\n")),
    )
    cuts = sorted(draw.randint(0, len(text)) for _ in range(draw.randrange(8)))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)])]
    whole, apart = told(expected, [text]), told(expected, pieces)
    assert whole == apart, (expected, text, pieces)


def told(expected: Expected, pieces: Sequence[str]) -> list[tuple[str, ...]]:
    """The events of a text that comes in pieces, neighbours of a kind joined, without ids."""
    reader, found = reader_of(expected), list[tuple[str, ...]]()
    events: list[Event] = [event for piece in pieces for event in reader.push(piece)] + reader.push("", ended=True)
    for event in events:
        if isinstance(event, CallStart):
            found.append(("call", event.name))
            continue
        kind = f"arguments {event.call}" if isinstance(event, CallArguments) else type(event).__name__
        if found and found[-1][0] == kind:
            found[-1] = (kind, found[-1][1] + event.text)
        else:
            found.append((kind, event.text))
    return found


def send(url: str, model: str, draw: random.Random) -> str:
    """One body to a server; says the status. Raises AssertionError for one that is neither 200 nor 400."""
    data = json.dumps({**body(draw), "model": model, "max_tokens": draw.randint(1, 24), "stream": draw.random() < 0.5}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            text = reply.read().decode()
            assert "error" not in text.partition('"choices"')[0], text[:300]
            return "200"
    except urllib.error.HTTPError as error:
        assert error.code == 400, (error.code, error.read()[:300], data)
        return "400"


def run(attempt: Callable[[random.Random], str], requests: int, seed: int, seconds: float = SECONDS) -> Counter[str]:
    """So many cases; how they ended. Raises AssertionError naming the seed of the case that went wrong or took too long."""
    ends: Counter[str] = Counter()
    for number in range(requests):
        began = time.monotonic()
        try:
            ends[attempt(random.Random(f"{seed} {number}"))] += 1
        except Exception as error:
            raise AssertionError(f"case {number} of seed {seed}: {type(error).__name__}: {error}") from error
        took = time.monotonic() - began
        assert took < seconds, f"case {number} of seed {seed} took {took:.1f} s"
    return ends


def main(argv: Sequence[str] | None = None) -> int:
    """Run; prints how cases ended."""
    made = argparse.ArgumentParser(prog="python -m kvloom.loadtest.fuzz.chats", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--requests", type=int, default=2000, help="cases (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--url", help="a server to send the bodies to")
    made.add_argument("--model", default="smollm2", help="its name there (default: %(default)s)")
    args = made.parse_args(argv)
    one = attempt if args.url is None else lambda draw: send(args.url.rstrip("/"), args.model, draw)
    ends = run(one, args.requests, args.seed, SECONDS if args.url is None else 120)
    print(", ".join(f"{count} {end}" for end, count in ends.most_common()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
