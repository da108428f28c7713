"""Bodies of POST /tokenize and /detokenize, with vLLM's field names."""

from __future__ import annotations

from pydantic import Field, model_validator

from kvloom.server.schema.chat_messages import MAX_MESSAGES, Message
from kvloom.server.schema.common import StrictBody, Text, TokenId
from kvloom.server.schema.conversation import ConversationFields
from kvloom.server.schema.problem import problem
from kvloom.server.schema.unsupported import PROMPT, refuse


class TokenizeBody(ConversationFields, StrictBody):
    """A prompt or a conversation to count and tokenize."""

    model: str | None = Field(None, max_length=1024)
    prompt: Text | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_input(self) -> TokenizeBody:
        refuse(self.model_extra, PROMPT)
        if (self.prompt is None) == (self.messages is None):
            raise problem("prompt", "give either prompt or messages")
        return self


class DetokenizeBody(StrictBody):
    """Tokens to turn into text."""

    model: str | None = Field(None, max_length=1024)
    tokens: list[TokenId] = Field(max_length=1_000_000)
