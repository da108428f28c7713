"""From what a request asks for to a grammar that llguidance compiles, and the bounds of both.

JSON is written on one line, with or without one space after `:` and `,`: with whitespace as schemas allow it, a small model can
write newlines until its tokens are used up.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Collection
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from kvloom.engine.bounds import shown
from kvloom.engine.constraint.options import StructuredOutput

if TYPE_CHECKING:
    import llguidance

SEPARATORS = {"whitespace_flexible": False, "key_separator": ": ?", "item_separator": ", ?"}
"""How JSON is written unless a request says otherwise: regular expressions, as llguidance takes them."""
MOST_ITEMS = 20_000
"""Sum of all minItems and maxItems: a grammar has a symbol for every item that is counted, which takes 10 microseconds."""
MOST_MULTIPLE = 10_000
"""Least common multiple of all multipleOf, without decimal point and the noughts at their ends: a lexer has a state for every
remainder, each of which takes some 10 microseconds at once, in a call that nothing can end."""
MOST_GBNF = 32 * 1024
"""Characters of a GBNF grammar, which is translated with the interpreter's lock held: 3 ms per KiB."""
TOO_DEEP = "recursion limit exceeded"

_ITEMS = re.compile(r'"(?:min|max)Items"\s*:\s*([0-9.eE+]+)')
_MULTIPLE = re.compile(r'"multipleOf"\s*:\s*([0-9][0-9.eE+-]*)')
_ESCAPE = re.compile(r"\\u00([2-7][0-9a-fA-F])")
_METACHARACTERS = re.compile(r"[\\.+*?()|\[\]{}^$#&~/-]")


@functools.cache
def limits() -> llguidance.LLParserLimits:
    """What a grammar may take to be compiled, and a token of it: beyond, llguidance gives up. Its own defaults allow a token to
    take seconds, and a lexer half a gigabyte; and end an answer where an object may have 500 properties next."""
    import llguidance

    return llguidance.LLParserLimits(
        step_max_items=10_000, max_items_in_row=10_000, step_lexer_fuel=200_000, max_lexer_states=50_000,
        max_grammar_size=500_000, verbose_errors=False,
    )  # fmt: skip


def grammar_of(asked: StructuredOutput, special: Collection[str] = ()) -> str:
    """The grammar, which may still turn out to be none. special: names of special tokens.

    Raises InvalidRequestError naming what is not allowed.
    """
    from llguidance import LLMatcher

    kind = asked.kind
    if kind in ("json_schema", "grammar", "structural_tag"):
        _check_numbers(asked, str(getattr(asked, kind)))
    if kind == "json_object":
        return _schema(asked, '{"type":"object"}')
    if kind == "json_schema":
        return _schema(asked, str(asked.json_schema))
    if kind == "regex":
        return LLMatcher.grammar_from_regex(str(asked.regex))
    if kind == "choice":
        return LLMatcher.grammar_from_regex("|".join(f"({_literal(choice)})" for choice in asked.choice))
    if kind == "structural_tag":
        return _tagged(asked, special)
    return LLMatcher.grammar_from_lark(_lark(asked, str(asked.grammar)))


def problem(message: str) -> str:
    """What llguidance says of a grammar, as a client is told: without pictures of where and lists of states."""
    if message.startswith("NoExtensionBias"):
        return "nothing satisfies it"
    if TOO_DEEP in message:
        return f"nested too deeply ({message}); allowed: about 120 levels"
    lines = [line.strip() for line in message.split("<state>")[0].replace("<non-verbose/>", "").splitlines()]
    told = " ".join(line for line in lines if line and not re.match(r"\d+ \||\^+$", line))
    return told[:400] or "it cannot be compiled"


def _schema(asked: StructuredOutput, text: str) -> str:
    """A schema with its options, which one of its own key `x-guidance` overrides."""
    text = _closed(asked, text) if asked.disable_additional_properties else text.strip()
    if text.startswith("{"):
        rest = text[1:].lstrip()
        text = f'{{"x-guidance":{json.dumps(_options(asked))}{"" if rest.startswith("}") else ","}{rest}'
    return f'{{"grammars":[{{"json_schema":{text}}}]}}'


def _options(asked: StructuredOutput) -> dict[str, Any]:
    if asked.whitespace_pattern is not None:
        return {"whitespace_pattern": asked.whitespace_pattern}
    return {"whitespace_flexible": False} if asked.disable_any_whitespace else SEPARATORS


def _closed(asked: StructuredOutput, text: str) -> str:
    """The schema, whose objects hold no other properties than those it names, where it does not say."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise asked.refused(f"the schema is no JSON: {error}") from None
    left = [schema]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            left.extend(item.values())
            if "properties" in item or "patternProperties" in item:
                item.setdefault("additionalProperties", False)
        elif isinstance(item, list):
            left.extend(item)
    return json.dumps(schema)


def _check_numbers(asked: StructuredOutput, text: str) -> None:
    """Raises InvalidRequestError if arrays have so many items, or numbers so many remainders, that a grammar of them is not
    compiled in time."""
    plain = _ESCAPE.sub(lambda found: chr(int(found[1], 16)), text) if "\\u00" in text else text
    total = 0.0
    for number in _ITEMS.findall(plain):
        try:
            total += float(number)
        except ValueError:  # no number: llguidance says so
            continue
    if total > MOST_ITEMS:
        raise asked.refused(f"minItems and maxItems add up to {total:g}; allowed: {MOST_ITEMS} over the whole schema")
    multiple = 1
    for number in _MULTIPLE.findall(plain):
        multiple = math.lcm(multiple, _significand(number))
        if multiple > MOST_MULTIPLE:
            raise asked.refused(
                f"multipleOf {number[:32]} makes too many remainders; allowed: {MOST_MULTIPLE} as the least common "
                "multiple of all multipleOf of a schema, without decimal points and the noughts at their ends"
            )


def _significand(number: str) -> int:
    """The digits of a number that is no zero, without a point and noughts at either end; 1 for what is no number."""
    try:
        digits = "".join(map(str, Decimal(number[:400]).as_tuple().digits)).strip("0")
    except ArithmeticError:
        return 1
    return int(digits[:64] or 1)


def _literal(text: str) -> str:
    return _METACHARACTERS.sub(lambda found: "\\" + found[0], text)


def _lark(asked: StructuredOutput, text: str) -> str:
    """The grammar in Lark's form."""
    if "::=" not in text:
        return text
    if len(text) > MOST_GBNF:
        raise asked.refused(f"the GBNF grammar has {len(text)} characters; allowed: {MOST_GBNF}; write it in Lark's form")
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(text))
    except Exception as error:  # of a parser that raises what it likes
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise asked.refused(f"the GBNF grammar cannot be read: {reason[:200]}") from None


def _tagged(asked: StructuredOutput, special: Collection[str]) -> str:
    """Text in which what stands between tags is constrained, as vLLM reads structural tags for llguidance."""
    from llguidance import LLMatcher, StructTag

    try:
        given = json.loads(str(asked.structural_tag))
        if isinstance(given, dict) and "format" in given:
            raise asked.refused("structural_tag has the key format, which is not served; give structures and triggers")
        triggers = [str(trigger) for trigger in given["triggers"]]
        tags = []
        for structure in given["structures"]:
            begin, schema = str(structure["begin"]), structure["schema"]
            trigger = next((trigger for trigger in triggers if trigger and begin.startswith(trigger)), None)
            if trigger is None:
                raise asked.refused(f"no trigger begins {shown(begin)}; give one of its beginnings in triggers")
            if not isinstance(schema, dict):
                raise asked.refused(f"the schema of {shown(begin)} is {shown(schema)}; allowed: an object")
            options = _options(asked)
            tags.append(
                StructTag(trigger=trigger, begin=begin, grammar={"x-guidance": options, **schema}, end=str(structure["end"]))
            )
        if not tags:
            raise asked.refused("structures is empty; give at least one")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if getattr(error, "param", None) is not None:
            raise
        wanted = '{"structures": [{"begin", "schema", "end"}], "triggers": [...]}'
        raise asked.refused(f"structural_tag cannot be read ({error!r:.100}); allowed: {wanted}") from None
    return LLMatcher.grammar_from_lark(StructTag.to_grammar(tags, assume_special=all(tag.trigger in special for tag in tags)))
