"""What a prompt is made of where it is a conversation: the same fields, and so the same prompt, for chats, /tokenize and
/v1/kv/explain."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, Field, WithJsonSchema, field_validator, model_validator

from kvloom.server.schema.chat_messages import Message
from kvloom.server.schema.common import Text, unicode_text
from kvloom.server.schema.problem import problem
from kvloom.server.schema.tools import MAX_TOOLS, NamedChoice, Tool, ToolChoice

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def _scalar(value: Any) -> Any:
    """Union types would tell of each of their members; this tells of the value."""
    if not isinstance(value, bool | int | float | str):
        raise ValueError("must be true, false, a number or a string")
    return unicode_text(value) if isinstance(value, str) else value


Scalar = Annotated[Any, AfterValidator(_scalar), WithJsonSchema({"type": ["boolean", "number", "string"]})]
TemplateVariables = dict[Text, Scalar]
"""Variables of the model's chat template, such as enable_thinking."""


class Conversation(NamedTuple):
    """A conversation to be written out by the model's chat template."""

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
    add_generation_prompt: bool = True
    """Whether the prompt ends with the opening of the assistant's turn."""
    continue_final_message: bool = False
    add_special_tokens: bool = False
    variables: Mapping[str, Any] = {}
    reasoning_effort: str | None = None

    def length(self) -> int:
        """Characters of it, about."""
        tools = sum(len(json.dumps(tool.for_template())) for tool in self.tools)
        return tools + sum(64 + message.length() for message in self.messages)


class ConversationFields(BaseModel):
    """Fields beside the messages that say how a conversation becomes a prompt."""

    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: ToolChoice = "auto"
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool | None = None
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict, max_length=16)
    reasoning_effort: Effort | None = None
    """How much the model thinks before it answers, for chat templates that know degrees of it, or can switch it off."""

    @field_validator("tools")
    @classmethod
    def _different(cls, value: list[Tool]) -> list[Tool]:
        names = [tool.function.name for tool in value]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"offer {twice!r} twice; give every function a name of its own")
        return value

    @model_validator(mode="after")
    def _offered(self) -> ConversationFields:
        choice = self.tool_choice
        if choice == "required" and not self.tools:
            raise problem("tool_choice", "tool_choice is 'required', but no tools are given; give tools")
        names = [tool.function.name for tool in self.tools]
        if isinstance(choice, NamedChoice) and choice.function.name not in names:
            given = ", ".join(names)[:200] or "none are given"
            raise problem(
                "tool_choice", f"tool_choice names {choice.function.name[:64]!r}, which is not among the tools: {given}"
            )
        return self

    @property
    def offered(self) -> Sequence[Tool]:
        """The tools that the model is told of: none where it must not call any."""
        return () if self.tool_choice == "none" else self.tools

    def conversation(self, messages: Sequence[Message]) -> Conversation:
        """These messages, as the fields say. The assistant's turn is opened, unless a message is to be continued."""
        opens = not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt
        return Conversation(messages, self.offered, opens, self.continue_final_message, bool(self.add_special_tokens),
                            self.chat_template_kwargs, self.reasoning_effort)  # fmt: skip
