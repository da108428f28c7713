"""What answers of /v1/responses look like, for /openapi.json, as `schema.answers` does for the others."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from kvloom.server.schema.answers import Answer, ChatLogprob, CompletionTokensDetails, KVUsage, PromptTokensDetails, absent

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class InputText(Answer):
    """Text of a user or of the system."""

    type: Literal["input_text"]
    text: str


class OutputText(Answer):
    """Text of an assistant."""

    type: Literal["output_text"]
    text: str
    annotations: list[None]
    logprobs: list[ChatLogprob] = absent("Empty unless they were asked for; not in items that a client sent.")


class ReasoningText(Answer):
    """Thoughts."""

    type: Literal["reasoning_text"]
    text: str


class SummaryText(Answer):
    """A summary of thoughts, which a client sent."""

    type: Literal["summary_text"]
    text: str


class ResponseMessage(Answer):
    """A turn, or a part of one."""

    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["user", "assistant", "system", "developer"]
    content: list[InputText | OutputText]


class ResponseReasoning(Answer):
    """What an assistant thought."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus = absent()
    summary: list[SummaryText]
    content: list[ReasoningText]
    encrypted_content: None = None


class ResponseCall(Answer):
    """A call of a function."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


class ResponseCallOutput(Answer):
    """The result of a call."""

    id: str
    type: Literal["function_call_output"]
    status: ItemStatus
    call_id: str
    output: str | list[InputText]


OutputItem = Annotated[ResponseMessage | ResponseReasoning | ResponseCall, Field(discriminator="type")]
ResponseItem = Annotated[ResponseMessage | ResponseReasoning | ResponseCall | ResponseCallOutput, Field(discriminator="type")]


class ResponseUsage(Answer):
    """Token counts of a response."""

    input_tokens: int
    input_tokens_details: PromptTokensDetails
    output_tokens: int
    output_tokens_details: CompletionTokensDetails
    total_tokens: int
    kv: KVUsage = absent()


class ResponseProblem(Answer):
    """Why a response failed."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class ModelResponse(Answer):
    """A response, as it is answered and stored."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: ResponseProblem | None
    incomplete_details: dict[Literal["reason"], Literal["max_output_tokens"]] | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    prompt_cache_key: str | None
    safety_identifier: str | None
    user: str | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    presence_penalty: float
    frequency_penalty: float
    reasoning: dict[Literal["effort", "summary"], str | None]
    service_tier: Literal["default"]
    store: bool
    """Whether it is stored."""
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None


class ResponseEvent(Answer):
    """An event of a streamed response: what else it has depends on its type."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int
    response: ModelResponse = absent("As it is then, in those that begin and end a stream.")
    item: OutputItem = absent()


class ResponseItems(Answer):
    """A page of items."""

    object: Literal["list"]
    data: list[ResponseItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ResponseDeleted(Answer):
    """What was deleted."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputTokens(Answer):
    """How many tokens a response would read."""

    object: Literal["response.input_tokens"]
    input_tokens: int
