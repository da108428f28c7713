"""Messages of a conversation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from kvloom.engine.bounds import shown
from kvloom.server.schema.common import StrictBody, Text
from kvloom.server.schema.problem import problem
from kvloom.server.schema.tools import MAX_CALLS, ToolCall
from kvloom.server.schema.unsupported import OF_MESSAGES, refuse

MAX_MESSAGES = 4096
Role = Literal["system", "developer", "user", "assistant", "tool", "function"]


class TextPart(StrictBody):
    """A piece of a message's text."""

    type: Literal["text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else "text"
        if kind not in (None, "text"):
            raise problem(
                "type", f"content of the type {shown(kind)} is not served, as this model reads text only; allowed: 'text'"
            )
        return data


def _readable(value: Any) -> Any:
    if not isinstance(value, str | list | None):
        raise ValueError(f"is {shown(value)}; allowed: a string, or a list of text parts")
    return value


def _form(value: Any) -> str:
    """Which form content has, so that an error speaks of that form only. The brackets keep it out of error paths."""
    return "<parts>" if isinstance(value, list) else "<text>"


Content = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES), Tag("<parts>")],
    Discriminator(_form),
    BeforeValidator(_readable),
]


class Message(StrictBody):
    """One turn. Content is text, or a list of text parts that the chat template's renderer joins; an assistant's may be absent.

    A turn of the role `tool` is the result of a call; `function` is OpenAI's older name of it.
    """

    role: Role
    content: Content | None = None
    name: Text | None = Field(None, max_length=256)
    reasoning_content: Text | None = None
    """What an assistant thought before this answer, for templates that repeat it; `reasoning` is another name of it."""
    reasoning: Text | None = None

    tool_calls: list[ToolCall] = Field(default_factory=list, max_length=MAX_CALLS)
    """What an assistant called."""
    tool_call_id: Text | None = Field(None, max_length=1024)
    """Of which call this is the result."""

    @model_validator(mode="after")
    def _served(self) -> Message:
        refuse(self.model_extra, OF_MESSAGES)
        if self.content is None and self.role != "assistant":
            raise problem("content", f"content is required in a message of the role {self.role!r}")
        if self.tool_calls and self.role != "assistant":
            raise problem("tool_calls", f"tool_calls stand in a message of the role {self.role!r}; only assistants call tools")
        if self.tool_call_id is not None and self.role not in ("tool", "function"):
            raise problem(
                "tool_call_id", f"tool_call_id stands in a message of the role {self.role!r}; allowed: in results (tool)"
            )
        return self

    def for_template(self) -> dict[str, Any]:
        """What a chat template sees. `developer` is OpenAI's newer name for `system`, which templates know."""
        given = self.content or ""
        content = given if isinstance(given, str) else [{"type": "text", "text": part.text} for part in given]
        thought = self.reasoning if self.reasoning_content is None else self.reasoning_content
        more = {
            "name": self.name,
            "reasoning_content": thought,
            "reasoning": thought,
            "tool_calls": [call.for_template() for call in self.tool_calls] or None,
            "tool_call_id": self.tool_call_id,
        }
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        return {"role": role, "content": content, **{key: value for key, value in more.items() if value is not None}}

    def length(self) -> int:
        """Characters of content, thought and calls."""
        content = self.content or ""
        text = len(content) if isinstance(content, str) else sum(len(part.text) for part in content)
        return text + len(self.reasoning_content or self.reasoning or "") + sum(call.length() for call in self.tool_calls)
