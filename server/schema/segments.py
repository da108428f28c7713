"""Bodies of POST /v1/kv/segments and /v1/kv/explain. They are kvloom's own, so unknown keys are errors, as inside `kv`."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from kvloom.server.schema.chat_messages import MAX_MESSAGES, Message
from kvloom.server.schema.common import Salt, StrictBody, Text, TokenId
from kvloom.server.schema.conversation import ConversationFields
from kvloom.server.schema.problem import problem

MAX_TEXTS = 256

TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=1_000_000)]


class OwnBody(StrictBody):
    """What both have in common."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = Field(None, max_length=1024)
    cache_salt: Salt = ""


class SegmentsBody(OwnBody):
    """Texts to compile alone, so that prompts that hold them can reuse their KV."""

    text: Text | None = Field(None, min_length=1)
    texts: list[Annotated[Text, Field(min_length=1)]] | None = Field(None, min_length=1, max_length=MAX_TEXTS)
    tokens: TokenIds | None = None
    scope: Text = Field("tenant", max_length=64)
    """Whom they are for: tenant, group or public."""

    @model_validator(mode="after")
    def _one_input(self) -> SegmentsBody:
        if sum(value is not None for value in (self.text, self.texts, self.tokens)) != 1:
            raise problem("text", "give either text, texts or tokens")
        return self


Prompt = Annotated[
    Annotated[Text, Field(min_length=1), Tag("<text>")] | Annotated[TokenIds, Tag("<token ids>")],
    Discriminator(lambda value: "<token ids>" if isinstance(value, list) else "<text>"),
]


class ExplainBody(ConversationFields, OwnBody):
    """A prompt or a conversation of which to tell what would be reused; encoded as the endpoints for generation do."""

    prompt: Prompt | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)

    @model_validator(mode="after")
    def _one_input(self) -> ExplainBody:
        if (self.prompt is None) == (self.messages is None):
            raise problem("prompt", "give either prompt or messages")
        return self
