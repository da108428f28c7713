"""Constraints for the fuzzer: schemas, expressions and grammars, drawn piece by piece; some impossible, some no such thing."""

from __future__ import annotations

import json
import random
from typing import Any

NAMES = ("a", "b", "long name", "é", "x-guidance", "$ref", '"', "\ud800", "")
PATTERNS = ("^[a-c]{1,3}$", "a|b", "(a|aa)*b", "[^a]", "(?=a)", "(", "\\\\d+", ".{0,200}x", "((a{0,50}){0,50}){0,50}", "")
RULES = (
    '"a"', "/[a-z]+/", "x", "(x | y)*", '"b" x "c"', "%json {}", "<|end|>", "<nope>", "x{2,1}", "x{0,99}", "", "(", "x x x | "
)  # fmt: skip
GBNF = ('"a"', "[a-z]+", "x", "( x | y )*", '"b" x', "[", "x{1,3}", "", "root")
KEYWORDS: tuple[tuple[str, Any], ...] = (
    ("minLength", 2), ("maxLength", 4), ("minItems", 1), ("maxItems", 3), ("minItems", 10**9), ("uniqueItems", True),
    ("not", {}), ("format", "date"), ("format", "colour"), ("multipleOf", 3), ("minimum", -5), ("maximum", 10**40),
    ("additionalProperties", False), ("required", ["a"]), ("required", 5), ("$ref", "#"), ("$ref", "#/nope"),
    ("$ref", "http://x/y"), ("const", None), ("minProperties", 1), ("type", "nothing"), ("type", ["string", "null"]),
    ("x-guidance", {"whitespace_flexible": True}), ("x-guidance", 5), ("if", {}),
)  # fmt: skip
ODD: tuple[dict[str, Any], ...] = (
    {}, {"regex": "a", "choice": ("b",)}, {"json_schema": 5}, {"json_object": 1}, {"grammar": "start: " + "(" * 9000},
    {"json_schema": '{"items":' * 9000}, {"regex": "a" * 600_000},
)  # fmt: skip


def constraint(source: random.Random) -> dict[str, Any]:
    """Arguments of `StructuredOutput`, mostly of one that there is."""
    kind = source.choice(["json_schema"] * 4 + ["regex", "choice", "grammar", "gbnf", "json_object", "structural_tag", "odd"])
    more: dict[str, Any] = {}
    if source.random() < 0.1:
        more = source.choice([{"disable_any_whitespace": True}, {"disable_additional_properties": True},
                              {"whitespace_pattern": source.choice(PATTERNS)}])  # fmt: skip
    if kind == "json_schema":
        made = schema(source, 3)
        return {**more, "json_schema": _damaged(source, json.dumps(made)) if source.random() < 0.1 else made}
    if kind == "regex":
        return {"regex": "".join(source.choice(PATTERNS) for _ in range(source.randint(1, 3)))}
    if kind == "choice":
        words = ("yes", "no", "a|b", "\n", "é", "<|end|>", "")
        return {"choice": tuple(source.choice(words) for _ in range(source.randint(0, 4)))}
    if kind == "grammar":
        return {"grammar": f"start: {source.choice(RULES)}\nx: {source.choice(RULES)}\ny: {source.choice(RULES)}"}
    if kind == "gbnf":
        return {"grammar": f"root ::= {source.choice(GBNF)}\nx ::= {source.choice(GBNF)}\ny ::= {source.choice(GBNF)}\n"}
    if kind == "structural_tag":
        begin = source.choice(("<f>", "<|end|>f", ""))
        tags = {"structures": [{"begin": begin, "schema": schema(source, 1), "end": source.choice(("</f>", ""))}],
                "triggers": [source.choice(("<f", "<|end|>", "<g"))]}  # fmt: skip
        return {**more, "structural_tag": tags}
    if kind == "odd":
        return source.choice(ODD)
    return {**more, "json_object": True}


def schema(source: random.Random, depth: int) -> Any:
    """A schema of at most so many levels."""
    made: dict[str, Any] = {}
    kind = source.choice(["object", "array", "string", "integer", "number", "boolean", "null", "enum", "any", "anyOf"])
    if kind == "object" and depth:
        names = source.sample(NAMES, source.randint(0, 3))
        made = {"type": "object", "properties": {name: schema(source, depth - 1) for name in names},
                "required": source.sample(names, source.randint(0, len(names)))}  # fmt: skip
    elif kind == "array" and depth:
        made = {"type": "array", "items": schema(source, depth - 1), "maxItems": source.randint(0, 3)}
    elif kind == "string":
        made = {"type": "string", **({"pattern": source.choice(PATTERNS)} if source.random() < 0.3 else {"maxLength": 3})}
    elif kind == "enum":
        made = {"enum": source.choice([["a", 1, None], [], [{"a": [1]}], ["\ud800"]])}
    elif kind == "anyOf" and depth:
        word = source.choice(("anyOf", "anyOf", "oneOf", "allOf"))
        made = {word: [schema(source, depth - 1) for _ in range(source.randint(0, 3))]}
    elif kind in ("integer", "number", "boolean", "null"):
        made = {"type": kind}
    for name, value in source.sample(KEYWORDS, source.choice((0, 0, 0, 1, 2))):
        made[name] = value
    return made if source.random() < 0.97 else source.choice((True, False, 5, [], "x"))


def _damaged(source: random.Random, text: str) -> str:
    at = source.randrange(len(text))
    return text[:at] + source.choice(("", "}", '"', "\x00", ",")) + text[at + 1 :]
