"""What stands inside a region of a response template, from text to a value: the parsers that transformers names.

A parser raises ValueError for what it cannot read: then the region is text. All take time in proportion to the text, but for an
expression of the checkpoint's, whose searches the answer's budget bounds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from kvloom.server.answers.calls import Calling, python_calls
from kvloom.server.answers.events import CallArguments, CallStart, Collector
from kvloom.server.answers.source import CutError, MalformedError, Source
from kvloom.server.answers.template.patterns import LONGEST, Budget, Mark

Parser = Callable[[str, Budget], Any]
DEEPEST = 4
"""Parsers of values within values."""
NAMES = ("text", "int", "float", "bool", "json", "xml-inline", "kv-lines", "python-call-list")

_BARE_KEY = re.compile(r'"(?:\\.|[^"\\])*+"|(?<=[{,])(\s*+)(\w++)(\s*+):', re.DOTALL)


def parser_of(name: Any, args: Any, depth: int = 0) -> Parser:
    """The parser of this name. Raises ValueError for one that there is not, or arguments of which it can make nothing; those
    that it does not know change nothing, as in transformers."""
    if name not in NAMES:
        raise ValueError(f"content is {name!r:.80}; allowed: {', '.join(NAMES)}")
    if not isinstance(args, Mapping):
        raise ValueError(f"content_args is {args!r:.80}; an object is needed")
    for key in ("strip", "unquoted_keys", "allow_non_json", "merge_duplicates"):
        if not isinstance(args.get(key, False), bool):
            raise ValueError(f"{key} is {args[key]!r:.80}; allowed: true or false")
    if name == "json":
        return _json(args)
    if name == "xml-inline":
        return _tags(args, depth)
    if name == "kv-lines":
        return _lines(args, depth)
    strip: Callable[[str], str] = str.strip if args.get("strip", True) else str
    simple: dict[str, Parser] = {
        "text": lambda text, _: strip(text),
        "int": lambda text, _: int(strip(text)),
        "float": lambda text, _: float(strip(text)),
        "bool": lambda text, _: strip(text).lower() in ("true", "1"),
        "python-call-list": lambda text, _: _calls(text),
    }
    return simple[name]


def _json(args: Mapping[str, Any]) -> Parser:
    quotes = args.get("string_delims", [])
    pairs = isinstance(quotes, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in quotes)
    if not pairs or not all(isinstance(quote, str) and 0 < len(quote) <= LONGEST for pair in quotes for quote in pair):
        raise ValueError(f"string_delims is {quotes!r:.80}; allowed: a list of pairs of strings")

    def parse(text: str, budget: Budget) -> Any:
        pieces = [text]  # every other one is a string, written as JSON
        for opens, closes in quotes:
            pieces = [piece for i, whole in enumerate(pieces)
                      for piece in ([whole] if i % 2 else _quoted(whole, opens, closes))]  # fmt: skip
        if args.get("unquoted_keys"):
            pieces = [piece if i % 2 else _BARE_KEY.sub(_with_quotes, piece) for i, piece in enumerate(pieces)]
        try:
            return json.loads("".join(pieces), parse_constant=_no_number)
        except (ValueError, RecursionError):
            if args.get("allow_non_json"):
                return text.strip() if args.get("strip", True) else text
            raise ValueError("no JSON") from None

    return parse


def _quoted(text: str, opens: str, closes: str) -> list[str]:
    """The text, with strings between these marks as JSON: every other piece."""
    pieces, at = list[str](), 0
    while (begin := text.find(opens, at)) >= 0 and (end := text.find(closes, begin + len(opens))) >= 0:
        pieces += [text[at:begin], json.dumps(text[begin + len(opens) : end])]
        at = end + len(closes)
    return [*pieces, text[at:]]


def _with_quotes(found: re.Match[str]) -> str:
    return found[0] if found[2] is None else f'{found[1]}"{found[2]}"{found[3]}:'


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


def _tags(args: Mapping[str, Any], depth: int) -> Parser:
    pattern, value, merge = args.get("tag_pattern"), _inner(args, depth), args.get("merge_duplicates", False)
    if not isinstance(pattern, str) or not 0 < len(pattern) <= LONGEST:
        raise ValueError(f"tag_pattern is {pattern!r:.80}; allowed: an expression of 1 to {LONGEST} characters")
    tag = Mark([], pattern)
    if "key" not in tag.groups:
        raise ValueError("tag_pattern has no group named `key`")

    def parse(text: str, budget: Budget) -> dict[str, Any]:
        found: dict[str, list[Any]] = {}
        for groups in tag.all(text, budget):
            found.setdefault(groups.get("key", ""), []).append(value(groups.get("value", ""), budget))
        return {key: values if merge and len(values) > 1 else values[-1] for key, values in found.items()}

    return parse


def _lines(args: Mapping[str, Any], depth: int) -> Parser:
    between, equals, value = args.get("line_sep", "\n"), args.get("kv_sep", ":"), _inner(args, depth)
    if not all(isinstance(mark, str) and 0 < len(mark) <= LONGEST for mark in (between, equals)):
        raise ValueError(f"line_sep and kv_sep are {between!r:.80} and {equals!r:.80}; allowed: strings that are not empty")
    strip: Callable[[str], str] = str.strip if args.get("strip", True) else str

    def parse(text: str, budget: Budget) -> dict[str, Any]:
        pairs = [strip(line).split(equals, 1) for line in text.split(between) if equals in strip(line)]
        return {strip(key): value(strip(given), budget) for key, given in pairs}

    return parse


def _inner(args: Mapping[str, Any], depth: int) -> Parser:
    inner = args.get("value_parser")
    if inner is None:
        return lambda text, _: text
    if depth >= DEEPEST or not isinstance(inner, Mapping) or not inner.keys() <= {"name", "args"}:
        raise ValueError(f"value_parser is {inner!r:.80}; allowed: an object of name and args, {DEEPEST} deep")
    return parser_of(inner.get("name", "text"), inner.get("args", {}), depth + 1)


def _calls(text: str) -> list[dict[str, Any]]:
    """`[f(a=1, b="x"), g()]`."""
    source, out, found = Source(), Collector(calls=True), list[dict[str, Any]]()
    source.feed(text.strip())
    source.ended = True
    try:
        for _ in python_calls(Calling(source, out, {})):
            pass
    except (MalformedError, CutError):
        raise ValueError("no list of calls") from None
    if source.rest.strip():
        raise ValueError("more than a list of calls")
    for event in out.take():
        if isinstance(event, CallStart):
            found.append({"name": event.name, "arguments": ""})
        elif isinstance(event, CallArguments):
            found[-1]["arguments"] += event.text
    return [{**call, "arguments": json.loads(call["arguments"])} for call in found]
