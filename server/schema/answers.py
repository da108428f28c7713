"""What answers look like, for /openapi.json alone: answers are written by hand (`server.replies`), as a busy server writes a
thousand chunks a second. Tests hold real answers to these models, without a field more; the description leaves room for more.

A field with a default may be absent.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length", "tool_calls"]


class Answer(BaseModel):
    """No field but these, which is for tests and not for clients to rely on."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=lambda schema: schema.pop("additionalProperties", None))


def absent(text: str = "") -> Any:
    """A field that is only there where it was asked for, or has something to tell. text: what it is."""
    return Field(default_factory=lambda: None, description=text or None)


class PromptTokensDetails(Answer):
    """What became of the prompt's tokens."""

    cached_tokens: int
    """Found in the cache: an exact prefix."""
    cache_write_tokens: int
    """Computed, and kept from now on for later prompts with the same beginning."""


class CompletionTokensDetails(Answer):
    """What the generated tokens are."""

    reasoning_tokens: int


class KVUsage(Answer):
    """With `kv` in the request: what its KV was made of and what was read of it."""

    cached_tokens: int
    reused_tokens: int
    recomputed_tokens: int
    attended_tokens: int
    held_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    preemptions: int
    explain: dict[str, Any] | list[dict[str, Any]] = absent("With kv.explain: what was reused and why no more.")
    resumed: Literal["exact", "approximate"] = absent(
        "Where a replica took it up from one that was lost: how the rest compares."
    )


class Usage(Answer):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails = absent()
    kv: KVUsage = absent()


class Logprob(Answer):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(Logprob):
    """One with the likeliest beside it."""

    top_logprobs: list[Logprob]


class ChatLogprobs(Answer):
    """One entry per generated token."""

    content: list[ChatLogprob]
    refusal: None


class CompletionLogprobs(Answer):
    """Parallel lists, one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class RankedLogprob(Answer):
    """Of a prompt's token."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, RankedLogprob] | None]
"""Per prompt token, from its id and those of the likeliest."""


class CalledFunction(Answer):
    """In a stream, the name comes first and arguments piece by piece."""

    name: str = absent()
    arguments: str


class ToolCall(Answer):
    """A call of a tool."""

    index: int = absent("Of the call among those of its choice, in streams.")
    id: str = absent()
    type: Literal["function"] = absent()
    function: CalledFunction


class ChatMessage(Answer):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str = absent()
    reasoning: str = absent("The same as `reasoning_content`, under its newer name.")
    tool_calls: list[ToolCall] = absent()


class Delta(Answer):
    """What a chunk adds to a message."""

    role: Literal["assistant"] = absent()
    content: str = absent()
    reasoning_content: str = absent()
    reasoning: str = absent()
    tool_calls: list[ToolCall] = absent()


class ChatChoice(Answer):
    """One completion."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    token_ids: list[int] = absent()


class ChatChunkChoice(Answer):
    """What a chunk tells of one completion."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    token_ids: list[int] = absent()


class ChatCompletion(Answer):
    """An answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs = absent()
    prompt_token_ids: list[int] = absent()


class ChatChunk(Answer):
    """An event of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] = absent()


class CompletionChoice(Answer):
    """One completion, or what a chunk adds to it: then without a finish_reason until its last."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs = absent()
    token_ids: list[int] = absent()
    prompt_token_ids: list[int] = absent()


class Completion(Answer):
    """An answer of /v1/completions, or an event of a streamed one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ModelCard(Answer):
    """A served model."""

    id: str
    object: Literal["model"]
    type: Literal["model"]
    display_name: str
    created: int
    created_at: str
    lifecycle: Literal["active"]
    owned_by: str
    root: str
    max_model_len: int
    default_sampling: dict[str, float | int]


class ModelList(Answer):
    """The served model, once for each of its names."""

    object: Literal["list"]
    data: list[ModelCard]
    first_id: str
    last_id: str
    has_more: Literal[False]


class Tokenized(Answer):
    """Tokens of a prompt."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Answer):
    """Text of tokens."""

    prompt: str


class TokenizerInfo(Answer):
    """Names of tokenizer_config.json."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    model_max_length: int
    chat_template: str | None


class KVState(Answer):
    """The KV cache; of a tenant among others what does not depend on them. Other figures go by their own names."""

    model_config = ConfigDict(extra="allow")

    capacity_tokens: int
    block_size: int
    blocks: dict[str, dict[str, int]]
    hit_rate: float | None
    tenants: dict[str, dict[str, Any]]


class Segments(Answer):
    """What was compiled of texts; counts are of what is new."""

    object: Literal["kv.segments"]
    scope: str
    given_tokens: int
    segments: int
    tokens: int
    bytes: int


class SegmentsDeleted(Answer):
    """How many segments were forgotten."""

    object: Literal["kv.segments"]
    deleted: int


class Run(Answer):
    """A part of a prompt that would be reused: tokens [start, stop)."""

    start: int
    stop: int
    donor: Literal["context", "isolated"]
    scope: str
    shift: int
    pieces: int
    text: str


class Broken(Answer):
    """Where a run ended, and why."""

    position: int
    reason: str


class Dropped(Answer):
    """What was found and not taken."""

    start: int
    stop: int
    reason: str


class Explanation(Answer):
    """What a prompt would reuse now."""

    prompt_tokens: int
    cached_tokens: int
    runs: list[Run] = absent()
    broken: list[Broken] = absent()
    dropped: list[Dropped] = absent()
    replica: str = absent("With several: the one where the prompt would go, which was asked.")


class Reset(Answer):
    """How much KV was forgotten."""

    object: Literal["kv.reset"]
    blocks: int
    segments: int


class Load(Answer):
    """Requests that run or wait."""

    server_load: int


class Version(Answer):
    """Of kvloom."""

    version: str
