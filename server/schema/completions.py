"""Body of POST /v1/completions, and the four forms of its prompt."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from kvloom.engine.requests.sampling import MAX_LOGPROBS, SamplingDefaults, SamplingParams
from kvloom.server.schema.common import MAX_INT, GenerationBody, Text, TokenId
from kvloom.server.schema.problem import problem

MAX_PROMPTS = 1024
"""Prompts, and completions over all prompts, in one request."""
DEFAULT_MAX_TOKENS = 16

TokenIds = Annotated[list[TokenId], Field(min_length=1)]


def _form(value: Any) -> str:
    """Which form a prompt has, so that an error speaks of that form only. The brackets keep it out of error paths."""
    if not isinstance(value, list):
        return "<text>"
    first = value[0] if value else ""
    return "<texts>" if isinstance(first, str) else "<token id lists>" if isinstance(first, list) else "<token ids>"


Prompt = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS), Tag("<texts>")]
    | Annotated[TokenIds, Tag("<token ids>")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS), Tag("<token id lists>")],
    Discriminator(_form),
]


class CompletionBody(GenerationBody):
    """Text or tokens to continue."""

    prompt: Prompt
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(None, ge=0, le=MAX_INT)
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _completion_rules(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != self.n:
            raise problem("best_of", f"best_of is {self.best_of} and n is {self.n}; allowed: best_of equal to n, or none")
        if self.token_limit == 0 and not self.echo:
            raise problem("max_tokens", "max_tokens is 0 without echo; allowed: 1 or more")
        if len(self.prompts()) * self.n > MAX_PROMPTS:
            count = f"{len(self.prompts())} prompts with n = {self.n}"
            raise problem("n", f"{count}; allowed: {MAX_PROMPTS} completions in one request")
        return self

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list, whichever form they came in."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt

    @property
    def told_logprobs(self) -> int:
        """Alternatives to tell per token, at most; those of an echoed prompt are as many as `logprobs`."""
        return max(len(self.logprob_token_ids), self.logprobs or 0)

    @property
    def echo_only(self) -> bool:
        """max_tokens 0: only the prompt is wanted. The engine generates one token all the same, which is dropped."""
        return self.token_limit == 0

    def params(self, defaults: SamplingDefaults) -> SamplingParams:
        """Sampling parameters; `defaults` are the model's own. Raises InvalidRequestError."""
        limit = None if self.token_limit is None else max(1, self.token_limit)
        echoed = self.logprobs if self.echo else None
        return self.sampling(
            defaults,
            max_tokens=limit,
            default_tokens=DEFAULT_MAX_TOKENS,
            logprobs=self.logprobs,
            prompt_logprobs=echoed if self.prompt_logprobs is None else max(self.prompt_logprobs, echoed or 0),
        )
