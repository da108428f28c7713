"""Bodies of POST /tokenize and /detokenize, with vLLM's field names."""

from __future__ import annotations

from pydantic import Field, model_validator

from kvloom.server.schema.chat import MAX_MESSAGES, Message, TemplateVariables
from kvloom.server.schema.common import StrictBody, Text, TokenId
from kvloom.server.schema.problem import problem
from kvloom.server.schema.unsupported import PROMPT, UNSUPPORTED, refuse


class TokenizeBody(StrictBody):
    """A prompt or a conversation to count and tokenize."""

    model: str | None = Field(None, max_length=1024)
    prompt: Text | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict, max_length=16)
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_input(self) -> TokenizeBody:
        refuse(self.model_extra, {**PROMPT, "tools": UNSUPPORTED["tools"]})
        if (self.prompt is None) == (self.messages is None):
            raise problem("prompt", "give either prompt or messages")
        return self

    @property
    def opens_turn(self) -> bool:
        """Whether the prompt ends with the opening of the assistant's turn, by the rule of chats."""
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt


class DetokenizeBody(StrictBody):
    """Tokens to turn into text."""

    model: str | None = Field(None, max_length=1024)
    tokens: list[TokenId] = Field(max_length=1_000_000)
