"""Bodies of POST /v1/kv/segments and /v1/kv/explain."""

from __future__ import annotations

from pydantic import Field, model_validator

from kvloom.server.schema.chat import MAX_MESSAGES, Message
from kvloom.server.schema.common import StrictBody, Text, TokenId
from kvloom.server.schema.problem import problem

MAX_TEXTS = 256


class SegmentsBody(StrictBody):
    """Texts to compile alone, so that prompts that hold them can reuse their KV."""

    model: str | None = Field(None, max_length=1024)
    text: Text | None = Field(None, min_length=1)
    texts: list[Text] | None = Field(None, min_length=1, max_length=MAX_TEXTS)
    tokens: list[TokenId] | None = Field(None, min_length=1, max_length=1_000_000)
    scope: Text = Field("tenant", max_length=64)
    """Whom they are for: tenant, group or public."""
    cache_salt: Text = Field("", max_length=256)

    @model_validator(mode="after")
    def _one_input(self) -> SegmentsBody:
        if sum(value is not None for value in (self.text, self.texts, self.tokens)) != 1:
            raise problem("text", "give either text, texts or tokens")
        return self


class ExplainBody(StrictBody):
    """A prompt or a conversation of which to tell what would be reused."""

    model: str | None = Field(None, max_length=1024)
    prompt: Text | list[TokenId] | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    cache_salt: Text = Field("", max_length=256)

    @model_validator(mode="after")
    def _one_input(self) -> ExplainBody:
        if (self.prompt is None) == (self.messages is None):
            raise problem("prompt", "give either prompt or messages")
        return self
