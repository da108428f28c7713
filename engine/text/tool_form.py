"""What a chat template does with tools: whether it shows them, calls of them and their results, and in which form it reads
arguments. It is asked, as for the form of content: a short conversation is rendered.

A template that leaves any of it out gets it as plain text, in the words that Hermes and Qwen models are trained on: the tools
behind the system prompt, calls in the assistant's text, results in a user's turn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from kvloom.engine.errors import InvalidRequestError

_FUNCTION, _KEY, _VALUE, _RESULT = "kvloomfunction", "kvloomkey", "kvloomvalue", "kvloomresult"
_CALL_ID, _LONG_ID = "kvloomid9", "call_kvloomlongid"
"""Some templates (Mistral's) allow exactly nine letters and digits."""
_TOOL = {
    "type": "function",
    "function": {
        "name": _FUNCTION,
        "description": "Asks.",
        "parameters": {
            "type": "object",
            "properties": {_KEY: {"type": "string", "description": "A word."}},
            "required": [_KEY],
        },
    },
}

Messages = Sequence[Mapping[str, Any]]


class ToolForm(NamedTuple):
    """What a template reads of tools."""

    tools: bool
    """Whether it shows tools; else they are told of in plain text."""
    calls: bool
    """Whether it shows calls and their results; else they are written as plain text."""
    arguments: type
    """Of a call, in the form that comes out as JSON: dict, or str."""
    system: bool
    """Whether there may be a message of the system."""
    short_ids: bool = False
    """Whether ids of calls must be nine letters and digits."""


def find_form(render: Callable[[Messages, Sequence[Any] | None], str]) -> ToolForm:
    """Ask a template. `render` raises InvalidRequestError for messages that it refuses."""

    def tried(messages: Messages, tools: Sequence[Any] | None = None) -> str:
        try:
            return render(messages, tools)
        except InvalidRequestError:
            return ""

    user = {"role": "user", "content": "kvloomasks"}
    system = "kvloomsystem" in tried([{"role": "system", "content": "kvloomsystem"}, user])
    tools = _FUNCTION in tried([user], [_TOOL])
    for form in (dict, str):
        text = tried(_exchange(user, form), [_TOOL])
        told = text.rpartition("kvloomasks")[2]
        mangled = f"'{_KEY}'" in told or f'\\"{_KEY}' in told
        if all(word in told for word in (_FUNCTION, _KEY, _VALUE, _RESULT)) and not mangled:
            return ToolForm(tools, True, form, system, short_ids=not tried(_exchange(user, form, _LONG_ID), [_TOOL]))
    return ToolForm(tools, False, dict, system)


def _exchange(user: Mapping[str, Any], form: type, name: str = _CALL_ID) -> list[Mapping[str, Any]]:
    arguments: Any = {_KEY: _VALUE} if form is dict else json.dumps({_KEY: _VALUE})
    call = {"id": name, "type": "function", "function": {"name": _FUNCTION, "arguments": arguments}}
    return [
        user,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": _RESULT, "tool_call_id": name, "name": _FUNCTION},
    ]


def prepared(messages: Messages, tools: Sequence[Mapping[str, Any]] | None, form: ToolForm) -> list[dict[str, Any]]:
    """The messages as a template of this form reads them: calls' arguments as objects or strings, or what it shows none of as
    text. `tools` are those that it does not show."""
    given = [_as_read(message, form) for message in messages] if form.calls else _texts(messages)
    return _introduced(given, instructions(tools), form.system) if tools else given


def _texts(messages: Messages) -> list[dict[str, Any]]:
    """Calls and results as text; results behind each other are one turn, since some templates want turns to alternate."""
    found: list[dict[str, Any]] = []
    for message in messages:
        written = _as_text(message)
        answers = message.get("role") == "tool"
        if answers and found and found[-1].get("answers"):
            found[-1]["content"] += "\n" + written["content"]
        else:
            found.append({**written, "answers": True} if answers else written)
    for message in found:
        message.pop("answers", None)
    return found


def instructions(tools: Sequence[Mapping[str, Any]]) -> str:
    """What a model is told of tools whose template does not show them."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{listed}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML "
        'tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def _as_read(message: Mapping[str, Any], form: ToolForm) -> dict[str, Any]:
    made = dict(message)
    if calls := made.get("tool_calls"):
        made["tool_calls"] = [{**call, "function": _function(call["function"], form.arguments)} for call in calls]
    if form.short_ids:
        for call in made.get("tool_calls") or ():
            call["id"] = _short(call.get("id", ""))
        if "tool_call_id" in made:
            made["tool_call_id"] = _short(made["tool_call_id"])
    return made


def _short(name: str) -> str:
    """An id of nine letters and digits: itself, if it is one, else always the same for the same id."""
    fits = len(name) == 9 and name.isascii() and name.isalnum()
    return name if fits else hashlib.blake2b(name.encode(), digest_size=8).hexdigest()[:9]


def _function(function: Mapping[str, Any], form: type) -> dict[str, Any]:
    given = function.get("arguments", "")
    if form is dict:
        given = _read(given)
    elif not isinstance(given, str):
        given = json.dumps(given, ensure_ascii=False)
    return {**function, "arguments": given}


def _read(given: Any) -> Any:
    """Arguments as an object; what a model wrote that is none stays as it is, since nothing else would say the same."""
    if not isinstance(given, str):
        return given
    try:
        found = json.loads(given or "{}")
    except (ValueError, RecursionError):
        return given
    return found if isinstance(found, dict) else given


def _as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
    text = _text(message.get("content"))
    if message.get("role") == "tool":
        return {"role": "user", "content": f"<tool_response>\n{text}\n</tool_response>"}
    calls = [_call_text(call["function"]) for call in message.get("tool_calls") or ()]
    return {**plain, "content": "\n".join([*([text] if text else []), *calls])} if calls else plain


def _call_text(function: Mapping[str, Any]) -> str:
    call = {"name": function["name"], "arguments": _read(function.get("arguments", ""))}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def _introduced(messages: list[dict[str, Any]], text: str, system: bool) -> list[dict[str, Any]]:
    """With the tools behind the system prompt, or in front of the first turn where a template knows no system prompt."""
    first = messages[0]
    if first.get("role") == "system":
        return [{**first, "content": f"{_text(first.get('content'))}\n\n{text}"}, *messages[1:]]
    if system:
        return [{"role": "system", "content": text}, *messages]
    return [{**first, "content": f"{text}\n\n{_text(first.get('content'))}"}, *messages[1:]]


def _text(content: Any) -> str:
    """Content as a string: parts are joined by newlines."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part["text"] for part in content)
