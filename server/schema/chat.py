"""Body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from kvloom.engine.requests.sampling import MAX_LOGPROBS, SamplingDefaults, SamplingParams
from kvloom.server.schema.chat_messages import MAX_MESSAGES, Message
from kvloom.server.schema.common import MAX_INT, GenerationBody
from kvloom.server.schema.conversation import ConversationFields
from kvloom.server.schema.problem import problem


class ChatBody(ConversationFields, GenerationBody):
    """A conversation to continue."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    parallel_tool_calls: bool = True
    """Whether an answer may hold more than one call."""
    include_reasoning: bool = True
    """Whether the answer tells what the model thought."""
    separate_reasoning: bool = True
    """Whether thoughts stand apart from the content; else they stay in it, with their marks."""
    reasoning_format: Literal["auto", "none", "deepseek"] = "auto"
    """llama.cpp's name of the same: none leaves thoughts in the content."""
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _chat_rules(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise problem("top_logprobs", "top_logprobs is given without logprobs; set logprobs to true")
        return self

    @property
    def told_logprobs(self) -> int:
        """Alternatives to tell per token, at most: as many as were asked for, or those that were."""
        return len(self.logprob_token_ids) or self.top_logprobs or 0

    def params(self, defaults: SamplingDefaults) -> SamplingParams:
        """Sampling parameters; `defaults` are the model's own. Raises InvalidRequestError."""
        return self.sampling(
            defaults,
            max_tokens=self.token_limit,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            prompt_logprobs=self.prompt_logprobs,
        )
