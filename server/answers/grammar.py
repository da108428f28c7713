"""Grammars of answers that must call functions, in each format: what the model writes is then always read as calls whose
arguments are valid against the functions' schemas.

    tool_choice required, or a name      thoughts, if the model has any, then one call or more
    strict functions, tool_choice auto   any text; what stands behind a mark that opens a call is a call
    a schema for the content             thoughts, then JSON that is valid against it, or calls

The grammars are llguidance's dialect of Lark. Marks that are special tokens of the model go by their ids, others are text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvloom.engine.constraint.grammar import SEPARATORS
from kvloom.engine.constraint.options import StructuredOutput
from kvloom.server.answers.calls import types_of
from kvloom.server.answers.formats import CallFormat, ReasoningFormat
from kvloom.server.schema.tools import Tool

MOST_CALLS = 8
"""In an answer that must call: a small model would not find the end."""
_SPACING = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
"""JSON as models are shown it in their templates."""


class Thoughts(NamedTuple):
    """What may stand in front of an answer."""

    form: ReasoningFormat | None
    open: bool
    """Whether the prompt opened them."""


@dataclass(slots=True)
class GrammarWriter:
    """Puts a grammar together."""

    form: CallFormat
    token_id: Callable[[str], int | None]
    """Id of a special token, by its text; None for any other text."""
    template: str = ""
    _rules: list[str] = field(default_factory=list)

    def forced(self, tools: Sequence[Tool], *, most: int, thoughts: Thoughts) -> str:
        """An answer of 1 to `most` calls, behind thoughts."""
        self._rules.append(f"start: {self._thoughts(thoughts)}calls")
        self._calls(_CALLS[self.form.name](self, tools), most)
        return self._written()

    def either(self, tools: Sequence[Tool], content: str, *, most: int, thoughts: Thoughts) -> str:
        """An answer of this content, or of 1 to `most` calls if there are tools, behind thoughts."""
        self._rules.append(f"start: {self._thoughts(thoughts)}{'(calls | content)' if tools else 'content'}")
        self._rules.append(f"content: {content}")
        if tools:
            self._calls(_CALLS[self.form.name](self, tools), most)
        return self._written()

    def guarded(self, tools: Sequence[Tool], thoughts: Thoughts) -> str:
        """Any text behind thoughts, in which every mark that opens calls is followed by them. Where models mostly call without
        a mark, an answer that begins like a call is one."""
        calls = _CALLS[self.form.name](self, tools)
        opens = self.form.wraps[0] if self.form.wraps else self.form.opens[0]
        mark, special = self.mark(opens), self.token_id(opens)
        if self.form.mostly_bare:
            self._rules.append(f"start: {self._thoughts(thoughts)}({mark}? calls | PLAIN)")
            self._rules.append("PLAIN: /[ \\n]*([^ \\n{\\[](?s:.*))?/")
            self._calls(calls, MOST_CALLS)
            return self._written()
        if calls.call.startswith(mark):
            body = calls.call.removeprefix(mark)
        else:
            self._calls(_Calls(calls.call, calls.before.removeprefix(mark), calls.between, calls.after), MOST_CALLS)
            body = "calls"
        self._rules.append(f"start: {self._thoughts(thoughts)}(before {body})* TEXT")
        self._rules.append(f"before: TEXT {mark}" if special is not None else f"before[lazy]: TEXT {mark}")
        return self._written()

    def _calls(self, calls: _Calls, most: int) -> None:
        more = f" ({calls.between} call){{0,{most - 1}}}" if most > 1 else ""
        self._rules.append(f"calls: {calls.before} call{more} {calls.after}")
        self._rules.append(f"call: {calls.call}")

    def mark(self, text: str) -> str:
        """A mark in a rule."""
        special = self.token_id(text)
        return _quoted(text) if special is None else f"<[{special}]>"

    def rule(self, body: str) -> str:
        """A new rule; returns its name."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name

    def lazy(self, body: str) -> str:
        """A new rule for text up to the first end that fits; returns its name."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}[lazy]: {body}")
        return name

    def arguments(self, tool: Tool) -> str:
        """A rule for an object that is valid against a function's schema."""
        return self.json(schema_of(tool), tool)

    def json(self, schema: Mapping[str, Any], tool: Tool) -> str:
        """A rule for JSON. Keywords of schemas that grammars cannot express are refused where the function is strict."""
        guidance = {**_SPACING, **({} if tool.function.strict else {"lenient": True})}
        return self.rule("%json " + json.dumps({**schema, "x-guidance": guidance}, allow_nan=False))

    def _thoughts(self, expected: Thoughts) -> str:
        form = expected.form
        if form is None:
            return ""
        close = self.token_id(form.close)
        if close is None:
            thoughts = self.lazy(f"TEXT {_quoted(form.close)}")
        else:
            thoughts = self.rule(f"TEXT <[{close}]>")
        return f"{thoughts} BLANKS " if expected.open else f"(BLANKS {self.mark(form.open)} {thoughts} BLANKS)? "

    def _written(self) -> str:
        start = next(rule for rule in self._rules if rule.startswith("start:"))
        others = [rule for rule in self._rules if rule is not start]
        return "\n".join([start, *others, "TEXT: /(?s:.*)/", "BLANKS: /[ \\n]{0,4}/"])


@dataclass(frozen=True, slots=True)
class _Calls:
    """The parts of an answer of calls, as bodies of rules."""

    call: str
    before: str = '""'
    between: str = '"\\n"'
    after: str = '""'


def content_rule(asked: StructuredOutput) -> str | None:
    """The body of a rule for what a request asks its content to look like; None for what cannot be part of a grammar."""
    if asked.whitespace_pattern is not None or asked.disable_any_whitespace or asked.disable_additional_properties:
        return None
    if asked.choice:
        return _either([_quoted(choice) for choice in asked.choice])
    try:
        schema = {"type": "object"} if asked.json_object else json.loads(str(asked.json_schema))
    except (ValueError, RecursionError):  # it is not JSON, or none is asked for
        return None
    return "%json " + json.dumps({"x-guidance": SEPARATORS, **schema}) if isinstance(schema, dict) else None


def _quoted(text: str) -> str:
    return json.dumps(text)


def schema_of(tool: Tool) -> dict[str, Any]:
    """The schema of a function's arguments: any object, if it has none."""
    return {"type": "object", **(tool.function.parameters or {})}


def _either(bodies: Sequence[str]) -> str:
    return "(" + " | ".join(bodies) + ")"


def _objects(writer: GrammarWriter, tools: Sequence[Tool], key: str) -> str:
    """`{"name": ..., KEY: {...}}` for one of the functions."""
    heads = [_quoted(f'{{"name": {json.dumps(tool.function.name)}, "{key}": ') for tool in tools]
    return _either([f'{head} {writer.arguments(tool)} "}}"' for head, tool in zip(heads, tools, strict=True)])


def _hermes(writer: GrammarWriter, tools: Sequence[Tool]) -> _Calls:
    opens, closes = writer.mark("<tool_call>"), writer.mark("</tool_call>")
    return _Calls(f'{opens} "\\n" {_objects(writer, tools, "arguments")} "\\n" {closes}')


def _llama3_json(writer: GrammarWriter, tools: Sequence[Tool]) -> _Calls:
    return _Calls(_objects(writer, tools, "parameters"), between='"; "')


def _mistral(writer: GrammarWriter, tools: Sequence[Tool]) -> _Calls:
    opens = writer.mark("[TOOL_CALLS]")
    if writer.token_id("[ARGS]") is None:
        return _Calls(_objects(writer, tools, "arguments"), before=f'{opens} "["', between='", "', after='"]"')
    bodies = [f"{_quoted(tool.function.name)} {writer.mark('[ARGS]')} {writer.arguments(tool)}" for tool in tools]
    return _Calls(f"{opens} {_either(bodies)}", between='""')


def _deepseek(writer: GrammarWriter, tools: Sequence[Tool]) -> _Calls:
    separator = writer.mark("<｜tool▁sep｜>")
    fenced = "```json" in writer.template
    head, middle, tail = (f'"function" {separator}', '"\\n```json\\n"', '"\\n```"') if fenced else ('""', separator, '""')
    bodies = [f"{head} {_quoted(tool.function.name)} {middle} {writer.arguments(tool)} {tail}" for tool in tools]
    return _Calls(
        f"{writer.mark('<｜tool▁call▁begin｜>')} {_either(bodies)} {writer.mark('<｜tool▁call▁end｜>')}",
        before=writer.mark("<｜tool▁calls▁begin｜>"),
        between='"\\n"' if fenced else '""',
        after=writer.mark("<｜tool▁calls▁end｜>"),
    )


def _properties(tool: Tool) -> list[tuple[str, dict[str, Any], bool]]:
    """(name, schema that stands alone, whether it is required) of each argument."""
    schema = _standing_alone(schema_of(tool))
    given, required = schema.get("properties"), schema.get("required")
    shared: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    return [
        (name, {**(own if isinstance(own, dict) else {}), **shared}, isinstance(required, list) and name in required)
        for name, own in (given.items() if isinstance(given, dict) else ())
    ]


_REFERENCE = re.compile(r'"\$ref": "#(?!/\$defs/|/definitions/)')
"""To something in the same document that its parts do not bring with them."""


def _standing_alone(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with all of itself among its definitions, to which references to its other parts lead."""
    text = json.dumps(schema, allow_nan=False)
    if not _REFERENCE.search(text):
        return schema
    moved: dict[str, Any] = json.loads(text.replace('"$ref": "#', '"$ref": "#/$defs/(whole)'))
    return {**moved, "$defs": {"(whole)": moved}}


def _qwen_coder(writer: GrammarWriter, tools: Sequence[Tool]) -> _Calls:
    bodies = []
    for tool in tools:
        parameters = []
        for name, schema, required in _properties(tool):
            body = f"{_quoted(f'<parameter={name}>' + chr(10))} {_xml_value(writer, schema, tool)}"
            parameters.append(body if required else f"({body})?")
        bodies.append(f"{_quoted(f'<function={tool.function.name}>' + chr(10))} {' '.join(parameters)}")
    opens, closes = writer.mark("<tool_call>"), writer.mark("</tool_call>")
    return _Calls(f'{opens} "\\n" {_either(bodies)} "</function>\\n" {closes}')


def _xml_value(writer: GrammarWriter, schema: dict[str, Any], tool: Tool) -> str:
    """A value and the mark behind it: strings as they are, the others as JSON."""
    end = "\n</parameter>\n"
    if types_of(schema) != {"string"}:
        return f"{writer.json(schema, tool)} {_quoted(end)}"
    words = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(words, list):
        return _either([_quoted(str(word)) for word in words]) + f" {_quoted(end)}"
    return f'{writer.lazy("TEXT " + _quoted(end.strip()))} "\\n"'


def _pythonic(writer: GrammarWriter, tools: Sequence[Tool]) -> _Calls:
    bodies = [f'{_quoted(tool.function.name + "(")} {_keywords(writer, tool)} ")"' for tool in tools]
    return _Calls(_either(bodies), before='"["', between='", "', after='"]"')


def _keywords(writer: GrammarWriter, tool: Tool) -> str:
    """`a=1, b=2`, in the order of the schema; what is not required may be left out."""
    first = more = '""'
    for name, schema, required in reversed(_properties(tool)):
        pair = f"{_quoted(name + '=')} {writer.json(schema, tool)}"
        begun, later = f"{pair} {more}", f'", " {pair} {more}'
        first = writer.rule(begun if required else f"{begun} | {first}")
        more = writer.rule(later if required else f"{later} | {more}")
    return first


_CALLS: Mapping[str, Callable[[GrammarWriter, Sequence[Tool]], _Calls]] = {
    "deepseek": _deepseek,
    "hermes": _hermes,
    "llama3_json": _llama3_json,
    "mistral": _mistral,
    "pythonic": _pythonic,
    "qwen_coder": _qwen_coder,
}
"""By the name of a `CallFormat`."""
