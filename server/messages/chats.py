"""From Anthropic's conversations to chats: the same prompt for /v1/messages and its count_tokens, and for
/v1/chat/completions where the same is said there.

    system                   a message of the role system
    text                     content; neighbouring turns of a role are one, as at Anthropic's
    thinking                 reasoning_content; redacted_thinking, which nobody here can read, is left out
    tool_use, tool_result    tool_calls, and a message of the role tool each, with the name of its call
    a last assistant's turn  is continued
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from kvloom.engine.errors import InvalidRequestError
from kvloom.server.conversations import checked_chat
from kvloom.server.schema.chat import ChatBody
from kvloom.server.schema.chat_messages import Message
from kvloom.server.schema.common import CommonBody
from kvloom.server.schema.message_blocks import Block, TextBlock, ThinkingBlock, ToolResultBlock, ToolUseBlock, blocks_of
from kvloom.server.schema.messages import MessagesFields
from kvloom.server.schema.tools import CalledFunction, ToolCall

# Messages are made without being checked again, which would take longer than reading the body. They get their tool_calls in any
# case: pydantic looks long for who makes an empty list.
_BILLING = re.compile(r"x-anthropic-billing-header:[^\n]*\n*")
"""A line that Claude Code puts in front of its system prompt. It is for Anthropic's bills and different every time: in front of
a prompt, nothing of the prompt would ever be found in the cache."""


def chat_body(body: MessagesFields, template: Collection[str], *, reasons: bool) -> ChatBody:
    """The chat that a body stands for. template: variables that the model's chat template reads; reasons: whether the model
    writes thoughts that are told apart. Raises InvalidRequestError where it is asked to think and cannot."""
    common = CommonBody.model_fields.keys() & body.model_fields_set
    said: dict[str, Any] = {name: getattr(body, name) for name in common}
    wanted = body.wanted
    if wanted is not None:
        said["response_format"] = {"type": "json_schema", "json_schema": {"schema": wanted.json_schema}}
    return checked_chat({
        **said,
        "messages": [*_system(body), *_messages(body)],
        "tools": [tool.tool() for tool in body.tools],
        "tool_choice": body.tool_choice.choice(),
        "parallel_tool_calls": not body.tool_choice.disable_parallel_tool_use,
        "stop": body.stop_sequences,
        "continue_final_message": body.messages[-1].role == "assistant",
        "chat_template_kwargs": {**_variables(body, template, reasons), **body.chat_template_kwargs},
    })  # fmt: skip


def _variables(body: MessagesFields, template: Collection[str], reasons: bool) -> dict[str, Any]:
    """What the model's chat template is told of thinking."""
    thinking, effort = body.thinking, body.output_config.effort
    switches = [name for name in ("enable_thinking", "thinking") if name in template]
    if thinking.type == "enabled" and not (switches or reasons):
        raise InvalidRequestError("thinking is enabled, but this model does not write thoughts; leave thinking out", "thinking")
    told = {} if thinking.type == "adaptive" else dict.fromkeys(switches, thinking.type == "enabled")
    given = {"thinking_budget": thinking.budget_tokens, "reasoning_effort": effort}
    return {**told, **{name: value for name, value in given.items() if value is not None and name in template}}


def _system(body: MessagesFields) -> Iterator[Message]:
    blocks = body.system_blocks
    if blocks and _BILLING.match(blocks[0].text):
        blocks = [TextBlock(type="text", text=_BILLING.sub("", blocks[0].text, count=1)), *blocks[1:]]
    blocks = [block for block in blocks if block.text]
    if blocks:
        yield _texts("system", blocks)


def _texts(role: str, blocks: Sequence[TextBlock], **more: Any) -> Message:
    """A message of one text, or of several that the chat template joins: to a chat, a block is a part of its content."""
    content: Any = blocks[0].text if len(blocks) == 1 else blocks
    return Message.model_construct(role=role, content=content, tool_calls=[], **more)


def _messages(body: MessagesFields) -> Iterator[Message]:
    names: dict[str, str] = {}
    for begin, blocks in body.runs:
        role = body.messages[begin].role
        if role == "assistant":
            names |= {block.id: block.name for block in blocks if isinstance(block, ToolUseBlock)}
            yield _assistant(blocks)
        else:
            yield from _others(role, blocks, names)


def _assistant(blocks: Sequence[Block]) -> Message:
    """Its texts are one: what was written between calls came without a break."""
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
    calls = [
        ToolCall.model_construct(id=block.id, function=CalledFunction.model_construct(name=block.name, arguments=block.input))
        for block in blocks
        if isinstance(block, ToolUseBlock)
    ]
    return Message.model_construct(
        role="assistant",
        content="".join(block.text for block in blocks if isinstance(block, TextBlock)),
        reasoning_content="\n".join(thoughts) or None,
        tool_calls=calls,
    )


def _others(role: str, blocks: Sequence[Block], names: dict[str, str]) -> Iterator[Message]:
    """Results and texts, in the order in which they stand."""
    for result, run in itertools.groupby(blocks, key=lambda block: isinstance(block, ToolResultBlock)):
        if not result:
            yield _texts(role, [block for block in run if isinstance(block, TextBlock)])
            continue
        for block in run:
            if isinstance(block, ToolResultBlock):
                yield _result(block, names.get(block.tool_use_id))


def _result(block: ToolResultBlock, name: str | None) -> Message:
    blocks = blocks_of(block.content) or blocks_of("")
    if block.is_error and not blocks[0].text.lstrip("<[ \n").lower().startswith(("error", "tool_use_error")):
        blocks = [TextBlock(type="text", text=f"Error: {blocks[0].text}"), *blocks[1:]]
    return _texts("tool", blocks, tool_call_id=block.tool_use_id, name=name)
