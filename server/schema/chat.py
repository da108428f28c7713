"""Body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, WithJsonSchema, model_validator

from kvloom.engine.requests.request import MAX_LOGPROBS, SamplingDefaults, SamplingParams
from kvloom.server.schema.common import GenerationBody, StrictBody, Text, unicode_text
from kvloom.server.schema.problem import problem
from kvloom.server.schema.unsupported import OF_MESSAGES, refuse

MAX_MESSAGES = 4096
Role = Literal["system", "developer", "user", "assistant"]


class TextPart(StrictBody):
    """A piece of a message's text."""

    type: Literal["text"]
    text: Text


def _form(value: Any) -> str:
    """Which form content has, so that an error speaks of that form only. The brackets keep it out of error paths."""
    return "<parts>" if isinstance(value, list) else "<text>"


Content = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES), Tag("<parts>")],
    Discriminator(_form),
]


class Message(StrictBody):
    """One turn. Content is text, or a list of text parts that the chat template's renderer joins."""

    role: Role
    content: Content
    name: Text | None = Field(None, max_length=256)
    reasoning_content: Text | None = None
    """What an assistant thought before this answer, for templates that repeat it; `reasoning` is another name of it."""
    reasoning: Text | None = None

    @model_validator(mode="after")
    def _served(self) -> Message:
        refuse(self.model_extra, OF_MESSAGES)
        return self

    def for_template(self) -> dict[str, Any]:
        """What a chat template sees. `developer` is OpenAI's newer name for `system`, which templates know."""
        content = self.content if isinstance(self.content, str) else [{"type": "text", "text": p.text} for p in self.content]
        thought = self.reasoning if self.reasoning_content is None else self.reasoning_content
        more = {"name": self.name, "reasoning_content": thought, "reasoning": thought}
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content, **{key: value for key, value in more.items() if value is not None}}

    def length(self) -> int:
        """Characters of content and thought."""
        content = len(self.content) if isinstance(self.content, str) else sum(len(part.text) for part in self.content)
        return content + len(self.reasoning_content or self.reasoning or "")


def _scalar(value: Any) -> Any:
    """Union types would tell of each of their members; this tells of the value."""
    if not isinstance(value, bool | int | float | str):
        raise ValueError("must be true, false, a number or a string")
    return unicode_text(value) if isinstance(value, str) else value


Scalar = Annotated[Any, AfterValidator(_scalar), WithJsonSchema({"type": ["boolean", "number", "string"]})]
TemplateVariables = dict[Text, Scalar]
"""Variables of the model's chat template, such as enable_thinking."""


class ChatBody(GenerationBody):
    """A conversation to continue."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict, max_length=16)

    @model_validator(mode="after")
    def _chat_rules(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise problem("top_logprobs", "top_logprobs is given without logprobs; set logprobs to true")
        if self.token_limit == 0:
            raise problem("max_tokens", "max_tokens must be 1 or more")
        return self

    @property
    def told_logprobs(self) -> int:
        """Alternatives to tell per token, at most: as many as were asked for, or those that were."""
        return len(self.logprob_token_ids) or self.top_logprobs or 0

    @property
    def opens_turn(self) -> bool:
        """Whether the prompt ends with the opening of the assistant's turn: by default, unless a message is to be continued."""
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt

    def params(self, defaults: SamplingDefaults) -> SamplingParams:
        """Sampling parameters; `defaults` are the model's own. Raises InvalidRequestError."""
        return self.sampling(
            defaults,
            max_tokens=self.token_limit,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            prompt_logprobs=self.prompt_logprobs,
        )
