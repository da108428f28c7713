"""What an answer must look like, as a request asks for it: data that can be pickled, compared and hashed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvloom.engine.bounds import shown
from kvloom.engine.errors import InvalidRequestError

KINDS = ("json_schema", "json_object", "regex", "choice", "grammar", "structural_tag")
"""Fields of which a request gives exactly one."""
COMPILE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, math.inf)
"""Bounds of the histogram of how long grammars take to be compiled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """Exactly one of the fields in KINDS, and how JSON is written. Raises InvalidRequestError that names `param`."""

    json_schema: str | Mapping[str, Any] | bool | None = None
    """A JSON schema that the answer is valid against: an object or its text; kept as text."""
    json_object: bool = False
    """The answer is a JSON object, whatever is in it."""
    regex: str | None = None
    """A regular expression that the whole answer matches (Rust's `regex` syntax: no look-around, no back-references)."""
    choice: tuple[str, ...] = ()
    """The answer is one of these strings."""
    grammar: str | None = None
    """A context-free grammar with a rule `start` (Lark, as llguidance extends it) or `root` (GBNF, EBNF)."""
    structural_tag: str | Mapping[str, Any] | None = None
    """Free text in which what stands between tags is constrained: {"structures": [{"begin", "schema", "end"}], "triggers"}."""
    whitespace_pattern: str | None = None
    """Regular expression of the whitespace between the tokens of JSON; None for `schema.WHITESPACE`, which is bounded."""
    disable_any_whitespace: bool = False
    """JSON without any whitespace between its tokens."""
    disable_additional_properties: bool = False
    """Objects hold no properties but those of the schema, where it does not say."""
    param: str = field(default="structured", compare=False)
    """What errors call it: the field of the request that it came in."""

    def __post_init__(self) -> None:
        if isinstance(self.choice, list):
            if not self.choice:
                raise self.refused("choice is empty; give at least one string")
            object.__setattr__(self, "choice", tuple(self.choice))
        for name in ("json_schema", "structural_tag"):
            value = getattr(self, name)
            if isinstance(value, (Mapping, bool)):
                object.__setattr__(self, name, self._text(name, value))
        given = [name for name in KINDS if getattr(self, name) not in (None, False, ())]
        if len(given) != 1:
            raise self.refused(f"{' and '.join(given) or 'no constraint'} given; allowed: one of {', '.join(KINDS)}")
        for name in ("json_schema", "structural_tag"):
            if (value := getattr(self, name)) is not None and not isinstance(value, str):
                raise self.refused(f"{name} is {shown(value)}; allowed: an object, or its text")
        if not isinstance(self.json_object, bool):
            raise self.refused(f"json_object is {shown(self.json_object)}; allowed: true or false")
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise self.refused(f"{name} is {shown(value)}; allowed: a string")
        if getattr(self, given[0]) == "":
            raise self.refused(f"{given[0]} is empty; leave it out for any text")
        if not isinstance(self.choice, tuple) or not all(isinstance(choice, str) and choice for choice in self.choice):
            raise self.refused("choice holds something else than non-empty strings")
        try:
            for text in self._texts:
                text.encode()
        except UnicodeEncodeError:
            raise self.refused("it holds half of a surrogate pair; send valid Unicode") from None

    @property
    def _texts(self) -> tuple[str, ...]:
        texts = (self.json_schema, self.regex, *self.choice, self.grammar, self.structural_tag, self.whitespace_pattern)
        return tuple(text for text in texts if isinstance(text, str))

    @property
    def kind(self) -> str:
        """Which of KINDS it is."""
        return next(name for name in KINDS if getattr(self, name) not in (None, False, ()))

    @property
    def size(self) -> int:
        """Characters of what is to be compiled."""
        return sum(map(len, self._texts))

    def refused(self, problem: str) -> InvalidRequestError:
        """An error about this constraint, which names the field it came in."""
        return InvalidRequestError(f"{self.param}: {problem}", param=self.param)

    def _text(self, name: str, value: Any) -> str:
        try:
            return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise self.refused(f"{name} cannot be written as JSON: {error}") from None
