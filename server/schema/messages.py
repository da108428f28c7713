"""Bodies of POST /v1/messages and /v1/messages/count_tokens: Anthropic's fields, beside kvloom's own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from kvloom.server.schema.chat_messages import MAX_MESSAGES
from kvloom.server.schema.common import MAX_INT, CommonBody, StrictBody, Text
from kvloom.server.schema.conversation import TemplateVariables
from kvloom.server.schema.message_blocks import (
    MAX_BLOCKS,
    Block,
    TextBlock,
    TextContent,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
    blocks_of,
)
from kvloom.server.schema.message_fields import MESSAGE_HINTS, MESSAGE_UNSUPPORTED
from kvloom.server.schema.message_tools import MessageTool, MessageToolChoice
from kvloom.server.schema.problem import problem
from kvloom.server.schema.tools import MAX_CALLS, MAX_TOOLS
from kvloom.server.schema.unsupported import Refusal


class Thinking(StrictBody):
    """Whether the model thinks before it answers."""

    type: Literal["enabled", "disabled", "adaptive"]
    """adaptive leaves it to the model's chat template."""
    budget_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    """For chat templates that read a thinking_budget; others leave it to the model how long it thinks."""
    display: Literal["summarized", "omitted"] = "summarized"
    """Whether the answer tells its thoughts, in full, or that there were some: in empty blocks."""


class OutputFormat(StrictBody):
    """What an answer must look like."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(StrictBody):
    """How an answer is written."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    """For chat templates that read a reasoning_effort; others know no degrees of it."""
    format: OutputFormat | None = None

    @model_validator(mode="after")
    def _whole(self) -> OutputConfig:
        for name in self.model_extra or {}:
            raise problem(name[:64], f"output_config.{name[:64]} is not supported; allowed: effort, format")
        return self


class MessagesFields(CommonBody):
    """A conversation to count, or to continue."""

    hints: ClassVar[Mapping[str, str]] = MESSAGE_HINTS
    unsupported: ClassVar[Mapping[str, Refusal]] = MESSAGE_UNSUPPORTED

    max_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    messages: list[Turn] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: TextContent = ""
    tools: list[MessageTool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: MessageToolChoice = MessageToolChoice(type="auto")
    thinking: Thinking = Thinking.model_validate({"type": "adaptive"})
    output_config: OutputConfig = OutputConfig()
    output_format: OutputFormat | None = None
    """An older name of output_config.format."""
    stop_sequences: list[Text] = Field(default_factory=list)
    temperature: Annotated[float, Field(ge=0, le=1)] = 1.0
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict, max_length=16)
    """Variables of the model's chat template: kvloom's own."""

    @field_validator("max_tokens", mode="before")
    @classmethod
    def _one_at_least(cls, value: Any) -> Any:
        if type(value) is int and value == 0:  # asks Anthropic to put the prompt into its cache
            raise ValueError("is 0; allowed: 1 or more; ask for one token to have the prompt in the cache")
        return value

    @field_validator("tools")
    @classmethod
    def _different(cls, value: list[MessageTool]) -> list[MessageTool]:
        names = [tool.name for tool in value]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"offer {twice!r} twice; give every tool a name of its own")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        choice, names = self.tool_choice, [tool.name for tool in self.tools]
        if choice.type == "any" and not names:
            raise problem("tool_choice", 'tool_choice is "any", but no tools are given; give tools')
        if choice.name is not None and choice.name not in names:
            given = ", ".join(names)[:200] or "none are given"
            raise problem("tool_choice", f"tool_choice names {choice.name[:64]!r}, which is not among the tools: {given}")
        results = 0
        for i, run in self.runs:
            results += sum(isinstance(block, ToolResultBlock) for block in run)
            calls = sum(isinstance(block, ToolUseBlock) for block in run)
            if len(run) > MAX_BLOCKS or calls > MAX_CALLS:
                what = f"{len(run)} blocks stand there in one turn, {calls} of them calls"
                raise problem(f"messages[{i}].content", f"{what}; allowed: {MAX_BLOCKS}, and {MAX_CALLS} calls")
        if results + len(self.messages) > MAX_MESSAGES:
            raise problem("messages", f"{results} results in {len(self.messages)} messages; allowed: {MAX_MESSAGES} together")
        last = self.messages[-1]
        if last.role == "assistant" and any(isinstance(block, ToolUseBlock) for block in last.blocks):
            raise problem("messages", "the last message calls tools; add a message with their results (tool_result)")
        if self.output_config.format is not None and self.output_format is not None:
            raise problem("output_format", "output_format and output_config.format say the same; give one")
        return self

    @property
    def runs(self) -> Iterator[tuple[int, list[Block]]]:
        """Neighbouring messages of one role are one turn: where each begins, and its blocks."""
        begin = 0
        for _, turns in itertools.groupby(self.messages, key=lambda turn: turn.role):
            joined = list(turns)
            yield begin, [block for turn in joined for block in turn.blocks]
            begin += len(joined)

    @property
    def omits_thoughts(self) -> bool:
        """Whether the answer only tells that there were thoughts."""
        return self.thinking.display == "omitted"

    @property
    def system_blocks(self) -> list[TextBlock]:
        """The system prompt, in blocks."""
        return blocks_of(self.system)

    @property
    def wanted(self) -> OutputFormat | None:
        """What the answer must look like."""
        return self.output_config.format or self.output_format

    @property
    def names(self) -> dict[str, str]:
        """What these fields are in a chat -> what they are called here."""
        wanted = "output_format" if self.output_config.format is None else "output_config.format"
        return {"stop": "stop_sequences"} | ({} if self.wanted is None else {"response_format": wanted})


class MessagesBody(MessagesFields):
    """A conversation to continue."""

    max_tokens: int = Field(ge=1, le=MAX_INT)
    """Most tokens of the answer. More than the context has room for is no error: then its end ends the answer."""

    @model_validator(mode="after")
    def _least(self) -> Self:
        for name, least in {"min_tokens": self.min_tokens, "forced_tokens": len(self.forced_tokens)}.items():
            if least > self.max_tokens:
                raise problem(name, f"{name} asks for {least} tokens, but max_tokens is {self.max_tokens}; raise max_tokens")
        return self
