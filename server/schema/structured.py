"""What an answer must look like, in the words of OpenAI, vLLM, llama.cpp and SGLang. A request says it once at most."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kvloom.engine.bounds import shown
from kvloom.engine.constraint.options import StructuredOutput
from kvloom.engine.errors import InvalidRequestError

FIELDS: Mapping[str, str] = {
    "guided_json": "json_schema",
    "guided_json_object": "json_object",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "structural_tag": "structural_tag",
    "json_schema": "json_schema",
    "grammar": "grammar",
    "regex": "regex",
    "ebnf": "grammar",
}
"""Fields that are a constraint by themselves: vLLM's older ones, llama.cpp's `grammar` and `json_schema`, SGLang's."""

KEYS: Mapping[str, str] = {"json": "json_schema", **{name: name for name in ("json_object", "regex", "choice", "grammar")},
                           "structural_tag": "structural_tag"}  # fmt: skip
"""Constraints in vLLM's `structured_outputs`."""
FLAGS = ("disable_any_whitespace", "disable_additional_properties")
HINTS = ("disable_fallback", "backend")
"""Its keys that choose among libraries, of which there is one here."""

Constraint = dict[str, Any]
"""Arguments of `StructuredOutput`."""


def structured_of(body: Any) -> StructuredOutput | None:
    """The constraint in a body's fields. Raises InvalidRequestError that names the field."""
    found: list[Constraint] = []
    readers: dict[str, Callable[[str, Mapping[str, Any]], Constraint | None]] = {
        "response_format": _response_format,
        "structured_outputs": _structured_outputs,
        "guided_decoding": _structured_outputs,
    }
    for name, read in readers.items():
        if (given := getattr(body, name)) is not None and (constraint := read(name, given)) is not None:
            found.append(constraint)
    for name, kind in FIELDS.items():
        value = getattr(body, name)
        if value is not None and value is not False and not (name == "grammar" and value == ""):  # llama.cpp's own default
            found.append({kind: value, "param": name})
    if not found:
        return None
    if len(found) > 1:
        names = [str(constraint["param"]) for constraint in found]
        raise InvalidRequestError(f"{' and '.join(names)} are given, which constrain the same text; give one", names[1])
    pattern = {} if body.guided_whitespace_pattern is None else {"whitespace_pattern": body.guided_whitespace_pattern}
    return StructuredOutput(**{**pattern, **found[0]})


def _response_format(name: str, given: Mapping[str, Any]) -> Constraint | None:
    kind, schema = given.get("type"), given.get("schema")
    if kind == "text":
        return None
    if kind == "json_schema":
        described = given.get("json_schema")
        schema = described.get("schema", schema) if isinstance(described, dict) else schema
    if kind == "json_schema" or (kind == "json_object" and schema is not None):  # llama.cpp has a schema with either
        if not isinstance(schema, dict | bool):
            raise InvalidRequestError(
                f"{name}.json_schema.schema is {shown(schema)}; allowed: a JSON schema, an object", f"{name}.json_schema.schema"
            )
        return {"json_schema": schema, "param": name}
    if kind == "json_object":
        return {"json_object": True, "param": name}
    if kind == "structural_tag":
        return {"structural_tag": {key: value for key, value in given.items() if key != "type"}, "param": name}
    allowed = "text, json_object, json_schema, structural_tag"
    raise InvalidRequestError(f"{name}.type is {shown(kind)}; allowed: {allowed}", f"{name}.type")


def _structured_outputs(name: str, given: Mapping[str, Any]) -> Constraint | None:
    """vLLM's object."""
    constraints, more = [], dict[str, Any]()
    for key, value in given.items():
        if value is None or value is False or key in HINTS:
            continue
        if key in KEYS:
            constraints.append((key, value))
        elif key in FLAGS and value is True:
            more[key] = True
        elif key == "whitespace_pattern":
            more[key] = value
        else:
            allowed = ", ".join((*KEYS, *FLAGS, "whitespace_pattern"))
            raise InvalidRequestError(f"{name}.{key[:64]} is {shown(value)}; allowed keys: {allowed}", f"{name}.{key[:64]}")
    if len(constraints) > 1:
        names = " and ".join(key for key, _ in constraints)
        raise InvalidRequestError(f"{name} holds {names}, which constrain the same text; give one", name)
    if not constraints:
        if more:
            raise InvalidRequestError(f"{name} holds no constraint; give one of {', '.join(KEYS)}", name)
        return None
    key, value = constraints[0]
    return {**more, KEYS[key]: value, "param": f"{name}.{key}"}
