"""Chat messages to text, through the model's own Jinja template.

Owns what a template is given: its own inputs, which a request cannot overwrite; messages, whose content comes in the form that
the template reads (`content_form`); the request's variables. Where it runs, and what it may not do, is `sandbox`'s business.

The rendered text is encoded with `add_special_tokens=False`: the template writes bos itself.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import meta

from kvloom.engine.errors import InvalidRequestError, ModelError
from kvloom.engine.text import sandbox
from kvloom.engine.text.content_form import ContentForms, find_forms, is_part
from kvloom.engine.text.tokenizer import Tokenizer
from kvloom.engine.text.tool_form import ToolForm, find_form, prepared

RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "bos_token",
                      "eos_token", "tokenize", "chat_template", "return_tensors", "return_dict", "self", "super", "loop",
                      "caller", "varargs", "kwargs"})  # fmt: skip
"""Names that a request's template variables may not set, beside those of the helpers that templates call."""
PROBE_SECONDS = 1.0

_CONTINUE_MARK = "kvloom-continue-final-message"

log = logging.getLogger("kvloom.engine")


class ChatTemplate:
    """One compiled template. Immutable, cheap to render, safe to use from several threads."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        """Raises ModelError if the template is no valid Jinja."""
        environment = sandbox.environment()
        try:
            self._template = environment.from_string(source)
            self.variables = frozenset(meta.find_undeclared_variables(environment.parse(source)))
            """Names that it reads and does not set."""
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelError(f"the model's chat template is broken: {error}; give another chat template") from error
        self._reserved = RESERVED | environment.globals.keys()
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

    @functools.cached_property
    def forms(self) -> ContentForms:
        """Which forms of content it reads, by role."""
        with sandbox.time_limit(PROBE_SECONDS):
            return find_forms(lambda messages: self._run(self._inputs(messages, add_generation_prompt=False)))

    @functools.cached_property
    def tool_form(self) -> ToolForm:
        """What it reads of tools."""

        def render(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> str:
            given = [_plain(message, i, self.forms) for i, message in enumerate(messages)]
            return self._run(self._inputs(given, add_generation_prompt=False, tools=tools))

        with sandbox.time_limit(PROBE_SECONDS):
            return find_form(render)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text to encode (with `add_special_tokens=False`).

        `messages` have `role`, and `content` as a string, None or a list of {"type": "text", "text": ...} parts. A template
        that reads only strings gets parts joined by newlines, as in vLLM; one that reads only parts gets a string as a part.
        Tools, calls (`tool_calls`, with arguments as an object or as JSON text) and results (the role `tool`) come in the form
        that the template reads, or as text where it reads none (`tool_form`). Other fields reach the template as they are.
        `continue_final_message` leaves the last message open, so that the model goes on writing it.
        `variables` are the request's `chat_template_kwargs`.

        Raises InvalidRequestError for messages the template refuses, and for output or time beyond the bounds.
        """
        if not messages:
            raise InvalidRequestError("messages is empty; give at least one message", param="messages")
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "add_generation_prompt and continue_final_message are both true; set one of them to false",
                param="continue_final_message",
            )
        for i, message in enumerate(messages):
            _check_content(message.get("content"), f"messages[{i}]")
        if tools or any(message.get("tool_calls") or message.get("role") == "tool" for message in messages):
            shows = self.tool_form.tools
            messages, tools = prepared(messages, None if shows else tools, self.tool_form), tools if shows else None
        given = [_plain(message, i, self.forms) for i, message in enumerate(messages)]
        if continue_final_message:
            given[-1] = _marked(given[-1])
        inputs = self._inputs(given, add_generation_prompt=add_generation_prompt, tools=tools)
        with sandbox.time_limit(sandbox.MAX_SECONDS):
            text = self._run({**self._checked(variables or {}), **inputs})
        return _cut_at_mark(text) if continue_final_message else text

    def _inputs(
        self, messages: Sequence[Any], *, add_generation_prompt: bool, tools: Sequence[Any] | None = None
    ) -> dict[str, Any]:
        return {
            "messages": messages,
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._tokens,
        }

    def _run(self, inputs: Mapping[str, Any]) -> str:
        """The text. What goes wrong in a template is told in words of our own, but for what the template itself says."""
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(inputs):
                pieces.append(piece)
                size += len(piece)
                if size > sandbox.MAX_CHARACTERS:
                    raise sandbox.too_much(f"made more than {sandbox.MAX_CHARACTERS} characters")
                sandbox.tick()
        except InvalidRequestError:
            raise
        except sandbox.TemplateRefusal as refusal:
            raise InvalidRequestError(f"the chat template refuses these messages: {refusal}", param="messages") from None
        except Exception as error:  # a template can fail in as many ways as Python
            log.debug("the chat template failed: %s: %.200r", type(error).__name__, str(error))
            raise InvalidRequestError(
                "the chat template cannot render these messages; check roles, their order, and chat_template_kwargs",
                param="messages",
            ) from None
        return "".join(pieces)

    def _checked(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        for name in variables:
            if name in self._reserved or name.startswith("kvloom_") or not name.isidentifier():
                raise InvalidRequestError(
                    f"chat_template_kwargs may not set {name[:64]!r}; it sets the template's own variables, such as "
                    "enable_thinking",
                    param="chat_template_kwargs",
                )
        return dict(variables)


def template_of(tokenizer: Tokenizer) -> ChatTemplate:
    """The template of a `Tokenizer`. Raises InvalidRequestError if its model has none."""
    if tokenizer.chat_template is None:
        raise InvalidRequestError(
            "this model has no chat template, so it cannot answer chat requests; use /v1/completions with a plain prompt, or "
            "put a chat_template.jinja into the model's folder",
            param="messages",
        )
    bos, eos = tokenizer.bos_id, next(iter(tokenizer.eos_ids), None)
    return _compiled(tokenizer.chat_template, tokenizer.special_text(bos), tokenizer.special_text(eos))


@functools.lru_cache(maxsize=16)
def _compiled(source: str, bos_token: str, eos_token: str) -> ChatTemplate:
    return ChatTemplate(source, bos_token=bos_token, eos_token=eos_token)


def _plain(message: Mapping[str, Any], index: int, forms: ContentForms) -> dict[str, Any]:
    """A message with its content in a form that the template reads (or None, for an assistant's tool calls)."""
    param = f"messages[{index}]"
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise InvalidRequestError(f"{param} has no role; give for instance 'user'", param=param)
    return {**message, "content": forms.shaped(role, content)}


def _check_content(content: Any, param: str) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, Sequence):
        raise InvalidRequestError(f"{param}.content is neither a string nor a list of text parts", param=param)
    for part in content:
        if not is_part(part):
            kind = part.get("type") if isinstance(part, Mapping) else None
            raise InvalidRequestError(
                f"{param}.content has a part of type {kind!r}; this model reads text parts only", param=param
            )


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if not content:
        raise InvalidRequestError("the final message to continue has no content", param="messages")
    if isinstance(content, str):
        return {**message, "content": content + _CONTINUE_MARK}
    last = {**content[-1], "text": content[-1]["text"] + _CONTINUE_MARK}
    return {**message, "content": [*content[:-1], last]}


def _cut_at_mark(text: str) -> str:
    """The text up to the end of the final message."""
    cut = text.rfind(_CONTINUE_MARK)
    if cut < 0:
        raise InvalidRequestError("the chat template leaves the final message out, so it cannot be continued", param="messages")
    return text[:cut]
