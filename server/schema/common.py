"""What chat and completions bodies have in common: sampling fields, streaming fields, kvloom's own extension.

A null means the field's default, whatever the field: clients differ in what they send for "not set". Unknown fields are let
through, since clients send extras of their own; fields that name something known but not served here are refused
(`unsupported`). Types are strict: "5" is not 5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from kvloom.engine.bounds import shown
from kvloom.engine.requests.request import KVOptions
from kvloom.engine.requests.sampling import (
    MAX_ALLOWED_TOKENS,
    MAX_BAD_WORDS,
    MAX_CHOICES,
    MAX_LOGPROB_TOKENS,
    MAX_LOGPROBS,
    SamplingDefaults,
    SamplingParams,
)
from kvloom.server.schema.fields import HINTS, log_unknown
from kvloom.server.schema.problem import problem
from kvloom.server.schema.structured import structured_of
from kvloom.server.schema.unsupported import OF_STREAMS, UNSUPPORTED, Refusal, refuse

MAX_INT = 2**31 - 1
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def unicode_text(text: str) -> str:
    """The text. Raises ValueError if it holds half of a surrogate pair, which JSON can write and nothing can encode."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("holds half of a surrogate pair; send valid Unicode") from None
    return text


Text = Annotated[str, AfterValidator(unicode_text)]
"""A string that can be encoded: JSON can also hold halves of surrogate pairs."""


def _salt(text: str) -> str:
    if not text:
        raise ValueError("must not be empty; leave it out for no salt")
    return text


Salt = Annotated[Text, Field(max_length=256), AfterValidator(_salt)]
"""KV is shared only between requests with the same one."""

Stop = Annotated[
    list[Text],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]


class StrictBody(BaseModel):
    """Strict types, nulls dropped, unknown fields kept aside."""

    model_config = ConfigDict(strict=True, extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class StreamOptions(StrictBody):
    """What a stream tells beside text."""

    include_usage: bool = False
    """End with a chunk that has no choices but the usage of the whole request."""
    continuous_usage_stats: bool = False
    """Give the usage so far in every chunk."""

    @model_validator(mode="after")
    def _known(self) -> StreamOptions:
        for name, value in (self.model_extra or {}).items():
            OF_STREAMS.check(name, value)
        return self


class KVFields(BaseModel):
    """What this request asks of the KV cache. Unknown keys are an error: a misspelt one would silently do nothing."""

    model_config = ConfigDict(strict=True, extra="allow")

    selection: Text | None = Field(None, max_length=64)
    """What a decode step reads: dense, or the name of a selection method."""
    budget: int | None = Field(None, ge=0, le=MAX_INT)
    """Positions that a sparse decode row reads, sinks and recent tokens included."""
    draft: bool | None = None
    """Use the selection method only to draft tokens that a dense step verifies: output as if dense."""
    draft_tokens: int | None = Field(None, ge=0, le=MAX_INT)
    """Tokens per draft."""
    reuse: Text | None = Field(None, max_length=64)
    """Where KV may come from: off, exact (the same prefix), approx (KVShare: also segments of other prompts, repaired)."""
    share: Text | None = Field(None, max_length=64)
    """With reuse approx: how far what this request leaves behind may go: none, tenant, group, public."""
    kvshare: dict[str, Any] | None = None
    """With reuse approx: its own options (policy, ratio, boundary, refresh, ...)."""
    explain: bool | None = None
    """Tell in `usage.kv.explain` what was reused, from where, and why no more."""

    @model_validator(mode="after")
    def _method_options(self) -> KVFields:
        """Beside the fields above, a method's own options may stand under its name; other keys are errors."""
        extra = self.model_extra or {}
        for name, value in extra.items():
            if not isinstance(value, dict):
                known = ", ".join(type(self).model_fields)
                raise problem(
                    name[:64], f"unknown key {name[:64]!r}; allowed: {known}, or a method's name with its own options"
                )
            if name != (self.selection or name) or len(extra) > 1:
                raise problem(
                    name[:64], f"{name[:64]!r} holds options, but the selection is {shown(self.selection or list(extra))}"
                )
        return self

    def options(self) -> KVOptions:
        """The engine's form of it. Options alone choose their method."""
        name, options = next(iter((self.model_extra or {}).items()), (self.selection, {}))
        asked = {"selection": self.selection or name, "options": options, "reuse_options": self.kvshare or {}}
        return KVOptions(**{**_said(self, KVOptions), **asked})


def _said(body: BaseModel, cls: Any) -> dict[str, Any]:
    """What a body says of the fields of the engine's dataclass that go by the same name on the wire; lists become tuples."""
    said = {field.name: getattr(body, field.name) for field in dataclasses.fields(cls) if field.name in body.model_fields_set}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in said.items() if value is not None}


class CommonBody(StrictBody):
    """Fields of every endpoint that generates. Bounds that `SamplingParams` checks are left to it."""

    hints: ClassVar[Mapping[str, str]] = HINTS
    """Fields that are accepted and change nothing, and why."""
    unsupported: ClassVar[Mapping[str, Refusal]] = UNSUPPORTED
    """Fields that are refused where they ask for something."""

    model: str | None = Field(None, max_length=1024)
    min_tokens: int = Field(0, ge=0, le=MAX_INT)
    temperature: Finite = 1.0
    top_p: Finite = 1.0
    top_k: int = Field(0, ge=-1, le=MAX_INT)
    min_p: Finite = 0.0
    presence_penalty: Finite = 0.0
    frequency_penalty: Finite = 0.0
    repetition_penalty: Finite = 1.0
    logit_bias: dict[str, Finite] = Field(default_factory=dict, max_length=1024)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=256)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    allowed_token_ids: list[TokenId] | None = Field(None, max_length=MAX_ALLOWED_TOKENS)
    bad_words: list[Text] = Field(default_factory=list, max_length=MAX_BAD_WORDS)
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=MAX_INT)
    """Cut prompts to so many tokens; -1 to what the context has room for beside max_tokens."""
    truncation_side: Literal["left", "right"] = "left"
    """Where the tokens are cut off: left keeps the last ones."""
    skip_special_tokens: bool = True
    forced_tokens: list[TokenId] = Field(default_factory=list, max_length=65536)
    stream: bool = False
    kv: KVFields | None = None
    cache_salt: Salt = ""
    priority: int = Field(0, ge=-MAX_INT, le=MAX_INT)
    response_format: dict[str, Any] | None = None
    """What the answer must look like, as all fields below; `server.schema.structured` reads them."""
    structured_outputs: dict[str, Any] | None = None
    guided_decoding: dict[str, Any] | None = None
    guided_json: Any = None
    guided_json_object: bool | None = None
    guided_regex: Text | None = None
    guided_choice: list[Text] | None = None
    guided_grammar: Text | None = None
    guided_whitespace_pattern: Text | None = None
    structural_tag: Any = None
    json_schema: Any = None
    grammar: Text | None = None
    regex: Text | None = None
    ebnf: Text | None = None

    @field_validator("logit_bias")
    @classmethod
    def _bias_keys(cls, value: dict[str, float]) -> dict[str, float]:
        for key in value:
            if not (key.isascii() and key.isdigit() and len(key) <= 10):
                raise ValueError(f"key {key[:40]!r} is not a token id; allowed: decimal token ids as strings")
        return value

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.truncate_prompt_tokens == 0:
            raise problem("truncate_prompt_tokens", "truncate_prompt_tokens is 0; allowed: -1, or 1 or more")
        for name in refuse(self.model_extra, self.unsupported):
            if name not in self.hints:
                log_unknown(name)
        return self

    def kv_options(self) -> KVOptions:
        return KVOptions() if self.kv is None else self.kv.options()


class GenerationBody(CommonBody):
    """Fields of OpenAI's chats and completions alike."""

    n: int = Field(1, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=0, le=MAX_INT)
    max_completion_tokens: int | None = Field(None, ge=0, le=MAX_INT)
    stop: Stop = Field(default_factory=list)
    logprob_token_ids: list[TokenId] = Field(default_factory=list, max_length=MAX_LOGPROB_TOKENS)
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    """Call tokens token_id:N in log-probabilities."""
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise problem("stream_options", "stream_options is given without stream; set stream to true")
        if self.prompt_logprobs is not None and self.stream:
            raise problem("prompt_logprobs", "prompt_logprobs is not given in streams; set stream to false")
        return self

    @property
    def token_limit(self) -> int | None:
        """The newer name wins where a client sends both."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def sampling(
        self,
        defaults: SamplingDefaults,
        *,
        max_tokens: int | None,
        default_tokens: int | None = None,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> SamplingParams:
        """The engine's form: what the body says, and `defaults` for what it does not. Raises InvalidRequestError for a value
        out of bounds."""
        said = {**defaults.drawing(), **_said(self, SamplingParams)}
        said["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        default_tokens = defaults.limited(defaults.max_tokens if default_tokens is None else default_tokens)
        max_tokens = None if max_tokens is None else defaults.limited(max_tokens)
        decided = {
            "max_tokens": max_tokens,
            "default_tokens": default_tokens,
            "logprobs": logprobs,
            "structured": structured_of(self),
        }
        return SamplingParams(**{**said, **decided, "prompt_logprobs": prompt_logprobs})
