"""Tools as Anthropic's clients offer them, and which of them must be called."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from kvloom.server.schema.common import StrictBody, Text
from kvloom.server.schema.problem import problem
from kvloom.server.schema.tools import Function, FunctionName, Tool, check_parameters


class MessageTool(StrictBody):
    """A tool of the client's own."""

    type: Literal["custom"] = "custom"
    name: FunctionName
    description: Text | None = None
    input_schema: dict[str, Any]
    """A JSON schema of its input, which is an object."""
    input_examples: list[dict[str, Any]] = Field(default_factory=list, max_length=64)
    strict: bool = False
    """Whether the input must be valid against the schema."""
    defer_loading: bool = False
    allowed_callers: list[Text] = Field(default_factory=list, max_length=64)

    @model_validator(mode="before")
    @classmethod
    def _custom_only(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if kind not in (None, "custom"):
            what = f"tools of the type {str(kind)[:64]!r} are not served, as only their maker knows what they take"
            raise problem("type", f"{what}; describe the tool yourself, with a name and an input_schema")
        return data

    @model_validator(mode="after")
    def _loaded(self) -> MessageTool:
        if self.defer_loading:
            raise problem("defer_loading", "defer_loading is not supported: tools are not searched for; leave it out")
        if self.allowed_callers not in ([], ["direct"]):
            raise problem("allowed_callers", 'allowed_callers is not supported; only ["direct"] is')
        check_parameters(self.input_schema, "input_schema")
        return self

    def tool(self) -> Tool:
        """The tool as chats have it. Examples of its input stand beside its description, where chat templates show them."""
        more: dict[str, Any] = {"input_examples": self.input_examples} if self.input_examples else {}
        function = Function(
            name=self.name, description=self.description, parameters=self.input_schema, strict=self.strict, **more
        )
        return Tool(type="function", function=function)


class MessageToolChoice(StrictBody):
    """Whether a tool must be called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool = False
    """Whether an answer holds one call at most."""

    @model_validator(mode="before")
    @classmethod
    def _object(cls, data: Any) -> Any:
        if isinstance(data, str):
            raise ValueError('is a string; allowed: an object with a type, such as {"type": "auto"}')
        return data

    @model_validator(mode="after")
    def _named(self) -> MessageToolChoice:
        if (self.name is None) == (self.type == "tool"):
            raise problem("name", 'name says which tool must be called: give it with the type "tool", and only there')
        return self

    def choice(self) -> str | dict[str, Any]:
        """The `tool_choice` of a chat."""
        if self.name is not None:
            return {"type": "function", "function": {"name": self.name}}
        return {"any": "required"}.get(self.type, self.type)
