"""Body of POST /v1/responses, and the chat that it stands for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from kvloom.engine.requests.sampling import MAX_LOGPROB_TOKENS, MAX_LOGPROBS
from kvloom.server.schema.chat import ChatBody
from kvloom.server.schema.common import MAX_INT, CommonBody, Stop, StrictBody, Text, TokenId
from kvloom.server.schema.conversation import Effort, TemplateVariables
from kvloom.server.schema.fields import HINTS
from kvloom.server.schema.items import MAX_ID, Input
from kvloom.server.schema.problem import problem
from kvloom.server.schema.tools import MAX_TOOLS, Function, FunctionName
from kvloom.server.schema.unsupported import OF_RESPONSES, UNSUPPORTED, Refusal

MAX_LABEL = 1024
"""Characters of the names that the answer repeats."""
LOGPROBS = "message.output_text.logprobs"
Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
"""What a request may ask to be told beside. All but log-probabilities are of things that no answer here holds: thoughts are
told openly, in the content of their item."""
_ONLY_FUNCTIONS = 'only tools of type "function" are served'


def _writable(value: Any, name: str) -> None:
    """Raises a validation error unless an answer can repeat this."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        what = "leave NaN, infinities and halves of surrogate pairs out"
        raise problem(name, f"{name} cannot be written as JSON; {what}") from None


class _Closed(StrictBody):
    """An object with no other keys than its own."""

    model_config = ConfigDict(strict=True, extra="forbid")


class ResponseTool(Function):
    """A function that a model may call. `strict` is false where it is left out."""

    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _served(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("type", "function") != "function":
            raise problem("type", f"type is {str(data['type'])[:64]!r}; {_ONLY_FUNCTIONS}")
        for name, harmless in {
            "allowed_callers": (None, [], ["direct"]),
            "defer_loading": (None, False),
            "async": (None, False),
        }.items():
            if data.get(name) not in harmless:
                raise problem(name, f"{name} is not supported; leave it out")
        unasked = ("allowed_callers", "defer_loading", "async", "output_schema")
        return {key: value for key, value in data.items() if key not in unasked}

    @model_validator(mode="after")
    def _repeatable(self) -> ResponseTool:
        _writable(self.parameters, "parameters")
        return self

    def for_chat(self) -> dict[str, Any]:
        """It, as a chat offers it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters, "strict": self.strict}
        return {"type": "function", "function": {**function, **(self.model_extra or {})}}

    def told(self) -> dict[str, Any]:
        """It, as the answer repeats it."""
        return {"type": "function", "name": self.name, "description": self.description, "parameters": self.parameters,
                "strict": self.strict}  # fmt: skip


class NamedFunction(StrictBody):
    """A function by its name."""

    type: Literal["function"]
    name: FunctionName

    def told(self) -> dict[str, Any]:
        """It, as the answer repeats it."""
        return {"type": self.type, "name": self.name}


class AllowedTools(_Closed):
    """Some of the tools, which alone are offered."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedFunction] = Field(min_length=1, max_length=MAX_TOOLS)

    def told(self) -> dict[str, Any]:
        """It, as the answer repeats it."""
        return {"type": self.type, "mode": self.mode, "tools": [tool.told() for tool in self.tools]}


def _choice(value: Any) -> Any:
    if isinstance(value, str):
        if value not in ("none", "auto", "required"):
            raise ValueError(f'is {value[:64]!r}; allowed: none, auto, required, or {{"type": "function", "name": ...}}')
        return value
    if not isinstance(value, dict):
        raise ValueError('must be none, auto, required, or {"type": "function", "name": ...}')
    if value.get("type") == "allowed_tools":
        return AllowedTools.model_validate(value)
    if value.get("type") != "function":
        raise ValueError(f"is of type {str(value.get('type'))[:64]!r}; allowed: function, allowed_tools")
    return NamedFunction.model_validate(value)


_CHOICES = [{"enum": ["none", "auto", "required"]}, NamedFunction.model_json_schema(), {"type": "object"}]
ToolChoice = Annotated[Any, BeforeValidator(_choice), WithJsonSchema({"anyOf": _CHOICES})]
"""none, auto, required, a `NamedFunction` or `AllowedTools`."""


class ReasoningOptions(_Closed):
    """How a model thinks before it answers."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    """The older name of it."""
    context: Literal["auto", "current_turn", "all_turns"] = "auto"
    mode: Literal["standard", "pro"] = "standard"

    @model_validator(mode="after")
    def _served(self) -> ReasoningOptions:
        for name in ("summary", "generate_summary"):
            if getattr(self, name) not in (None, "auto"):
                raise problem(name, f"{name} is not supported, since thoughts are told in full; leave it out, or say auto")
        if self.context != "auto":
            raise problem("context", "context is not supported: the model's chat template decides; leave it out, or say auto")
        if self.mode != "standard":
            raise problem("mode", "mode is not supported; leave it out, or say standard")
        return self


class TextFormat(_Closed):
    """What the text must look like."""

    type: Literal["text", "json_object", "json_schema"]
    name: Text | None = Field(None, max_length=1024)
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _with_schema(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            need = "needs a schema" if self.schema_ is None else "takes no schema; say json_schema"
            raise problem("schema", f"type {self.type} {need}")
        _writable(self.schema_, "schema")
        return self

    def told(self) -> dict[str, Any]:
        """It, as the answer repeats it."""
        if self.type != "json_schema":
            return {"type": self.type}
        return {"type": self.type, "name": self.name, "description": self.description, "schema": self.schema_,
                "strict": self.strict}  # fmt: skip


class TextOptions(_Closed):
    """Of the text of an answer."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] = "medium"

    @model_validator(mode="after")
    def _served(self) -> TextOptions:
        if self.verbosity != "medium":
            raise problem("verbosity", "verbosity is not supported; leave it out, or say medium")
        return self


class ResponseStreamOptions(_Closed):
    """What a stream tells beside. Usage is always told."""

    include_obfuscation: bool = False
    include_usage: bool = True

    @model_validator(mode="after")
    def _served(self) -> ResponseStreamOptions:
        if self.include_obfuscation:
            raise problem(
                "include_obfuscation", "include_obfuscation is not supported: events are as long as their text; leave it out"
            )
        return self


class PromptCacheOptions(_Closed):
    """How prefixes are cached: by themselves, so that only what changes the answer matters."""

    mode: Text | None = None
    ttl: Text | None = None
    comparison_response_id: Text | None = None
    prewarm: bool = False

    @model_validator(mode="after")
    def _served(self) -> PromptCacheOptions:
        if self.prewarm:
            raise problem("prewarm", "prewarm is not supported; leave it out, and ask for one token instead")
        if self.comparison_response_id:
            raise problem("comparison_response_id", 'comparison_response_id is not supported; use "kv": {"explain": true}')
        return self


ECHOED = ("max_tool_calls", "prompt_cache_key", "safety_identifier", "user")
"""Fields that the answer repeats, and that change nothing else of it."""


CHAT_NAMES = {"max_tokens": "max_output_tokens", "messages": "input", "prompt": "input", "response_format": "text.format",
              "reasoning_effort": "reasoning.effort"}  # fmt: skip


class ResponsesBody(CommonBody):
    """A response to create."""

    hints: ClassVar[Mapping[str, str]] = {
        **{name: why for name, why in HINTS.items() if name not in ("store", "metadata", "parallel_tool_calls", *ECHOED)},
        "image": "of images and sound, of which there are none",
    }
    unsupported: ClassVar[Mapping[str, Refusal]] = {**UNSUPPORTED, **OF_RESPONSES}

    input: Input
    instructions: Text | None = None
    """What the system says, in front of everything. It is of this request alone, whatever it continues."""
    previous_response_id: Text | None = Field(None, min_length=1, max_length=MAX_ID)
    """The stored response that this one continues."""
    store: bool = True
    """Whether the response can be retrieved and continued."""
    metadata: dict[Text, Text] = Field(default_factory=dict, max_length=16)
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    tools: list[ResponseTool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    reasoning: ReasoningOptions | None = None
    include_reasoning: bool = True
    """Whether the answer tells what the model thought."""
    text: TextOptions | None = None
    truncation: Literal["auto", "disabled"] = "disabled"
    """auto: where a conversation is longer than the context, its oldest turns are left out."""
    include: list[Includable] = Field(default_factory=list, max_length=64)
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    logprob_token_ids: list[TokenId] = Field(default_factory=list, max_length=MAX_LOGPROB_TOKENS)
    return_tokens_as_token_ids: bool = False
    """Call tokens token_id:N in log-probabilities."""
    stop: Stop = Field(default_factory=list)
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict, max_length=16)
    stream_options: ResponseStreamOptions | None = None
    prompt_cache_options: PromptCacheOptions | None = None
    max_tool_calls: int | None = Field(None, ge=0, le=MAX_INT)
    """Of built-in tools, of which there are none."""
    prompt_cache_key: Text | None = Field(None, max_length=MAX_LABEL)
    safety_identifier: Text | None = Field(None, max_length=MAX_LABEL)
    user: Text | None = Field(None, max_length=MAX_LABEL)

    @property
    def echoed(self) -> dict[str, Any]:
        """What the answer repeats as it was sent."""
        return {name: getattr(self, name) for name in ECHOED}

    @model_validator(mode="after")
    def _together(self) -> ResponsesBody:
        if self.stream_options is not None and not self.stream:
            raise problem("stream_options", "stream_options is given without stream; set stream to true")
        if (self.top_logprobs or self.logprob_token_ids) and not self.logprobs:
            name = "top_logprobs" if self.top_logprobs else "logprob_token_ids"
            raise problem(name, f'{name} is given without include; set include to ["{LOGPROBS}"]')
        if self.truncation == "auto" and self.truncate_prompt_tokens is not None:
            raise problem("truncate_prompt_tokens", "truncate_prompt_tokens and truncation auto both shorten prompts; give one")
        for key, value in self.metadata.items():
            if len(key) > 64 or len(value) > 512:
                raise problem("metadata", "metadata holds a key or a value that is too long; allowed: 64 and 512 characters")
        if self.response_format is not None and self.format is not None:
            raise problem("text", "text.format and response_format are given, which constrain the same text; give one")
        allowed = self.tool_choice.tools if isinstance(self.tool_choice, AllowedTools) else []
        if unknown := {tool.name for tool in allowed} - {tool.name for tool in self.tools}:
            raise problem("tool_choice", f"tool_choice names {min(unknown)[:64]!r}, which is not among the tools")
        return self

    @property
    def logprobs(self) -> bool:
        """Whether log-probabilities of the text are told."""
        return LOGPROBS in self.include

    @property
    def format(self) -> TextFormat | None:
        """What the text must look like, if that is said here."""
        return None if self.text is None else self.text.format

    @property
    def names(self) -> dict[str, str]:
        """What fields of a chat are called here, but for a response_format that was given as such."""
        given = self.response_format is not None
        return {name: own for name, own in CHAT_NAMES.items() if not (given and name == "response_format")}

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Fields of the same request as a chat that continues these messages."""
        shared = (self.model_fields_set & ChatBody.model_fields.keys()) - {
            "tools",
            "tool_choice",
            "top_logprobs",
            "stream_options",
        }
        said = {name: getattr(self, name) for name in shared}
        said |= {"messages": list(messages), "max_tokens": self.max_output_tokens, **self._tools()}
        if self.logprobs:
            said |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        if self.reasoning is not None:
            said["reasoning_effort"] = self.reasoning.effort
        if self.format is not None:
            said["response_format"] = {"type": self.format.type, "json_schema": {"schema": self.format.schema_}}
        return said

    def _tools(self) -> dict[str, Any]:
        tools, choice = self.tools, self.tool_choice
        if isinstance(choice, AllowedTools):
            allowed = {tool.name for tool in choice.tools}
            tools, choice = [tool for tool in tools if tool.name in allowed], choice.mode
        elif isinstance(choice, NamedFunction):
            choice = {"type": "function", "function": {"name": choice.name}}
        return {"tools": [tool.for_chat() for tool in tools], "tool_choice": choice}
