"""Turns of Anthropic's conversations: content blocks, of which text, thoughts, calls and results are served."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, WithJsonSchema, model_validator

from kvloom.server.schema.common import StrictBody, Text
from kvloom.server.schema.problem import problem

MAX_BLOCKS = 4096
"""Of neighbouring turns of one role, which are read as one, and of one result."""


class TextBlock(StrictBody):
    """Text. Its `citations`, which a turn of another server's may have, say nothing to the model."""

    type: Literal["text"]
    text: Text


class ThinkingBlock(StrictBody):
    """What an assistant thought. Nothing depends on its signature."""

    type: Literal["thinking"]
    thinking: Text
    signature: Text = ""


class RedactedThinkingBlock(StrictBody):
    """Thoughts that another server encrypted: no model here can read them, so they are left out."""

    type: Literal["redacted_thinking"]
    data: Text


class ToolUseBlock(StrictBody):
    """A call in an assistant's turn."""

    type: Literal["tool_use"]
    id: Text = Field(min_length=1, max_length=1024)
    name: Text = Field(min_length=1, max_length=256)
    input: dict[str, Any]


_MEDIA = "this model reads text only; leave it out, or send what it says as text"
_AWAY = "tools that run at the server are not served; leave it out"
_UNSERVED = {
    "image": _MEDIA,
    "document": _MEDIA,
    "search_result": "send what it says as text",
    "tool_reference": "tools are not searched for; offer those that are needed",
    "container_upload": "there are no containers; send what it says as text",
}


def _refused(value: Any) -> Any:
    """A block of a type that is not served: an error that says what to do, where something is known of it."""
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str):
        raise ValueError("must be an object with a type, such as text")
    advice = _UNSERVED.get(kind) or (_AWAY if "tool" in kind else "leave it out")
    raise problem("type", f"blocks of the type {kind[:64]!r} are not supported here; {advice}")


Refused = Annotated[Any, BeforeValidator(_refused), WithJsonSchema({"not": {}}), Tag("<other>")]


def _kind_of(*served: str) -> Discriminator:
    """The tag of a block; the brackets keep it out of error paths."""

    def kind(value: Any) -> str:
        name = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
        return f"<{name}>" if name in served else "<other>"

    return Discriminator(kind)


def _string(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError("must be a string, or a list of blocks")
    return value


_FORM = Discriminator(lambda value: "<blocks>" if isinstance(value, list) else "<string>")
_String = Annotated[Text, BeforeValidator(_string), Tag("<string>")]
_Text = Annotated[TextBlock, Tag("<text>")]
_TextOnly = Annotated[_Text | Refused, _kind_of("text")]
TextContent = Annotated[_String | Annotated[list[_TextOnly], Field(max_length=MAX_BLOCKS), Tag("<blocks>")], _FORM]
"""A string, or blocks of text."""


class ToolResultBlock(StrictBody):
    """What a call came to, in a user's turn."""

    type: Literal["tool_result"]
    tool_use_id: Text = Field(min_length=1, max_length=1024)
    content: TextContent = ""
    is_error: bool = False


Block = TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock
_TYPES = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")
_Block = Annotated[
    _Text
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[RedactedThinkingBlock, Tag("<redacted_thinking>")]
    | Refused,
    _kind_of("text", "tool_use", "tool_result", "thinking", "redacted_thinking"),
]
Content = Annotated[_String | Annotated[list[_Block], Field(max_length=MAX_BLOCKS), Tag("<blocks>")], _FORM]
_OF_ROLES = {"system": ("text",), "user": ("text", "tool_result"),
             "assistant": ("text", "tool_use", "thinking", "redacted_thinking")}  # fmt: skip


class Turn(StrictBody):
    """One message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: Content

    @model_validator(mode="after")
    def _of_role(self) -> Turn:
        allowed = _OF_ROLES[self.role]
        if self.role != "assistant" and not self.blocks:
            raise problem("content", f"content is empty in a message of the role {self.role!r}; give it a block of text")
        for i, block in enumerate(self.blocks):
            if block.type not in allowed:
                what = f"a block of the type {block.type!r} stands in a message of the role {self.role!r}"
                raise problem(f"content[{i}].type", f"{what}; allowed there: {', '.join(allowed)}")
        return self

    @property
    def blocks(self) -> list[Block]:
        """Its content, as blocks in any case."""
        return blocks_of(self.content)


def blocks_of(content: str | list[Any]) -> list[Any]:
    """Content as blocks; a string is one of text."""
    return [TextBlock(type="text", text=content)] if isinstance(content, str) else content
