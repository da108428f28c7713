"""What answers of /v1/messages look like, for /openapi.json alone, as `answers` is of the others."""

from __future__ import annotations

from typing import Any, Literal

from kvloom.server.schema.answers import Answer, KVUsage, absent

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class Block(Answer):
    """A block of an answer; which fields it has depends on its type."""

    type: Literal["text", "thinking", "tool_use"]
    text: str = absent()
    thinking: str = absent()
    signature: str = absent()
    id: str = absent()
    name: str = absent()
    input: dict[str, Any] = absent()


class OutputTokensDetails(Answer):
    """What the generated tokens are."""

    thinking_tokens: int


class MessageUsage(Answer):
    """Token counts: a prompt is the three counts of input together."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokensDetails = absent()
    kv: KVUsage = absent()


class Ending(Answer):
    """Why an answer ended."""

    stop_reason: StopReason | None
    stop_sequence: str | None


class MessageAnswer(Ending):
    """An answer of /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Block]
    usage: MessageUsage


class Delta(Answer):
    """A piece of a block, or why the answer ended."""

    type: Literal["text_delta", "thinking_delta", "signature_delta", "input_json_delta"] = absent()
    text: str = absent()
    thinking: str = absent()
    signature: str = absent()
    partial_json: str = absent()
    stop_reason: StopReason = absent()
    stop_sequence: str | None = None


class MessageEvent(Answer):
    """The data of an event of a streamed message; its name is its type."""

    type: Literal["message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta",
                  "message_stop", "ping"]  # fmt: skip
    message: MessageAnswer = absent()
    index: int = absent()
    content_block: Block = absent()
    delta: Delta = absent()
    usage: MessageUsage = absent()


class TokenCount(Answer):
    """An answer of /v1/messages/count_tokens."""

    input_tokens: int
