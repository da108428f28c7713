"""Chat messages to text, through the model's own Jinja template.

A template comes with the model's files and is treated as hostile: it runs in Jinja's immutable sandbox and cannot reach
Python's internals; a range holds at most `MAX_RANGE` numbers, and output and running time are bounded (looked at after every
piece of output and every turn of a loop, so one single expression can still be slow). Request fields can set only template
variables that are not the template's own inputs.

The rendered text is encoded with `add_special_tokens=False`: the template writes bos itself.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvloom.engine.errors import InvalidRequestError, ModelError
from kvloom.engine.text.tokenizer import Tokenizer

MAX_RANGE = 10_000
MAX_CHARACTERS = 16_000_000
MAX_SECONDS = 5.0
RESERVED = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "bos_token",
        "eos_token",
        "tokenize",
        "chat_template",
        "return_tensors",
        "return_dict",
        "raise_exception",
        "strftime_now",
        "range",
    }
)
"""Names that a request's template variables may not set."""

_CONTINUE_MARK = "kvloom-continue-final-message"


class ChatTemplate:
    """One compiled template. Immutable, cheap to render, safe to use from several threads."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        """Raises ModelError if the template is no valid Jinja."""
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the model's chat template is broken: {error}; give another chat template") from error
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

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

        `messages` have `role`, and `content` as a string, None or a list of {"type": "text", "text": ...} parts, which are
        joined by newlines as vLLM does; other fields (name, tool_calls, ...) reach the template as they are.
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
        plain = [_plain(message, i) for i, message in enumerate(messages)]
        if continue_final_message:
            plain[-1] = _marked(plain[-1])
        text = self._run(
            messages=plain,
            tools=list(tools) if tools else None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **_checked(variables or {}),
            **self._tokens,
        )
        return _cut_at_mark(text) if continue_final_message else text

    def _run(self, **context: Any) -> str:
        deadline = _Deadline()
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(**context, kvloom_tick=deadline.check):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_CHARACTERS:
                    raise InvalidRequestError(f"the chat template made more than {MAX_CHARACTERS} characters; send less text")
                deadline.check()
        except InvalidRequestError:  # a ValueError, too
            raise
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise InvalidRequestError(f"the chat template refuses these messages: {error}", param="messages") from error
        except RecursionError:
            raise InvalidRequestError("the chat template recurses too deeply over these messages", param="messages") from None
        return "".join(pieces)


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


class _Deadline:
    """Raises once the time is over."""

    def __init__(self) -> None:
        self._end = time.monotonic() + MAX_SECONDS

    def check(self) -> str:
        if time.monotonic() > self._end:
            raise InvalidRequestError(f"the chat template ran longer than {MAX_SECONDS:g} s; send less text")
        return ""


class _GenerationBlocks(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is just text."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with loops that watch the time and without the shortest ways to use up memory."""

    intercepted_binops = frozenset({"*", "**"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Puts a call of `kvloom_tick` at the head of every loop's body."""
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            tick = nodes.Call(nodes.Name("kvloom_tick", "load"), [], [], None, None)
            loop.body.insert(0, nodes.Output([tick]).set_lineno(loop.lineno))
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("powers are not allowed in chat templates")
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, Sequence) and isinstance(count, int) and len(sequence) * count > MAX_CHARACTERS:
                raise SecurityError("a repetition in the chat template is too long")
        return super().call_binop(context, operator, left, right)


class _Namespace(jinja2.utils.Namespace):
    """Without names that begin with an underscore, which could stand for Python's own."""

    def __init__(*args: Any, **values: Any) -> None:  # as in Jinja: a template may write namespace(self=...)
        self, *rest = args
        values = dict(*rest, **values)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: str) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace in the chat template may not hold {name!r}")


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlocks])
    environment.filters["tojson"] = _tojson
    del environment.filters["center"]  # pads to any width
    environment.globals = {
        "range": _short_range,
        "namespace": _Namespace,
        "dict": lambda *pairs, **values: dict(*pairs, **values),  # not the class: its methods change what they are given
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON for a prompt: without the HTML escapes of Jinja's own filter, as in transformers."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _short_range(*bounds: int) -> range:
    numbers = range(*bounds)
    if len(numbers) > MAX_RANGE:
        raise SecurityError(f"range over more than {MAX_RANGE} numbers in the chat template")
    return numbers


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _checked(variables: Mapping[str, Any]) -> dict[str, Any]:
    for name in variables:
        if name in RESERVED or name.startswith("kvloom_") or not name.isidentifier():
            raise InvalidRequestError(
                f"chat_template_kwargs may not set {name!r}; it sets the template's own variables, such as enable_thinking",
                param="chat_template_kwargs",
            )
    return dict(variables)


def _plain(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A message with its content as a string (or None, for an assistant's tool calls)."""
    param = f"messages[{index}]"
    if not isinstance(message.get("role"), str):
        raise InvalidRequestError(f"{param} has no role; give for instance 'user'", param=param)
    return {**message, "content": _joined(message.get("content"), param)}


def _joined(content: Any, param: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise InvalidRequestError(f"{param}.content is neither a string nor a list of text parts", param=param)
    texts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise InvalidRequestError(
                f"{param}.content has a part of type {kind!r}; this model reads text parts only", param=param
            )
        texts.append(text)
    return "\n".join(texts)


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if not content:
        raise InvalidRequestError("the final message to continue has no content", param="messages")
    return {**message, "content": content + _CONTINUE_MARK}


def _cut_at_mark(text: str) -> str:
    """The text up to the end of the final message."""
    cut = text.rfind(_CONTINUE_MARK)
    if cut < 0:
        raise InvalidRequestError("the chat template leaves the final message out, so it cannot be continued", param="messages")
    return text[:cut]
