"""Tools in requests: the functions that are offered, which of them must be called, and calls in earlier turns."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from kvloom.server.schema.common import StrictBody, Text
from kvloom.server.schema.problem import problem

MAX_TOOLS = 512
MAX_CALLS = 512
_NAME = re.compile(r"[\w.:/-]{1,256}", re.ASCII)
_ONLY_FUNCTIONS = 'only tools of type "function" are served'


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError("is no name; allowed: 1 to 256 letters, digits and _ - . : /")
    return text


FunctionName = Annotated[Text, AfterValidator(_name)]


def check_parameters(schema: dict[str, Any] | None, name: str) -> None:
    """Raises a validation error that names the field unless a schema is one of objects and can be written as JSON."""
    kind = (schema or {}).get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise problem(name, f'{name} must be of type object; allowed: {{"type": "object", ...}}')
    try:
        json.dumps(schema, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise problem(name, f"{name} cannot be written as JSON; leave NaN and infinities out") from None


class Function(StrictBody):
    """A function that a model may call."""

    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of its arguments, which are an object."""
    strict: bool = False
    """Whether the arguments must be valid against the schema."""

    @model_validator(mode="after")
    def _writable(self) -> Function:
        check_parameters(self.parameters, "parameters")
        return self


class Tool(StrictBody):
    """A tool that is offered."""

    type: Literal["function"]
    function: Function

    @model_validator(mode="before")
    @classmethod
    def _function_only(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("type", "function") != "function":
            raise problem("type", f"type is {str(data['type'])[:64]!r}; {_ONLY_FUNCTIONS}")
        return data

    def for_template(self) -> dict[str, Any]:
        """What a chat template sees. `strict` is no business of the model's."""
        function = self.function
        parameters = function.parameters if function.parameters is not None else {"type": "object", "properties": {}}
        more = {key: value for key, value in (function.model_extra or {}).items() if value is not None}
        return {
            "type": "function",
            "function": {
                "name": function.name,
                "description": function.description or "",
                "parameters": parameters,
                **more,
            },
        }


class NamedFunction(StrictBody):
    """A function by its name."""

    name: FunctionName


class NamedChoice(StrictBody):
    """The one function that must be called."""

    type: Literal["function"]
    function: NamedFunction


def _choice(value: Any) -> Any:
    if isinstance(value, str) and value not in ("none", "auto", "required"):
        raise ValueError(
            f'is {value[:64]!r}; allowed: none, auto, required, or {{"type": "function", "function": {{"name": ...}}}}'
        )
    if isinstance(value, dict) and value.get("type") != "function":
        raise ValueError(f"is of type {str(value.get('type'))[:64]!r}; {_ONLY_FUNCTIONS}")
    if not isinstance(value, str | dict):
        raise ValueError('must be none, auto, required, or {"type": "function", "function": {"name": ...}}')
    return NamedChoice.model_validate(value) if isinstance(value, dict) else value


ToolChoice = Annotated[
    Any,
    BeforeValidator(_choice),
    WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, NamedChoice.model_json_schema()]}),
]
"""none, auto, required, or a `NamedChoice`."""


def _arguments(value: Any) -> Any:
    if not isinstance(value, str | dict):
        raise ValueError("must be a string of JSON, or an object")
    return value


class CalledFunction(StrictBody):
    """What a model called in an earlier turn."""

    name: Text = Field(min_length=1, max_length=1024)
    arguments: Annotated[
        Any, BeforeValidator(_arguments), WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]})
    ] = ""
    """JSON text, as OpenAI sends it; an object is taken, too."""


class ToolCall(StrictBody):
    """A call in an earlier turn."""

    id: Text | None = Field(None, max_length=1024)
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """What a chat template sees."""
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {**({} if self.id is None else {"id": self.id}), "type": "function", "function": function}

    def length(self) -> int:
        """Characters of it."""
        arguments = self.function.arguments
        return 64 + len(self.function.name) + len(arguments if isinstance(arguments, str) else json.dumps(arguments))
