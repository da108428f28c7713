"""Where chat templates run. A template comes with a model's files and is treated as hostile.

It runs in Jinja's immutable sandbox, so that it cannot reach Python's internals, and every way to take time or memory is
bounded: a loop's turn, a call and a filter look at the clock; what is joined, repeated, padded, replaced or formatted is
measured before it is made. A bound that is passed ends the rendering with InvalidRequestError, since it was a request that was
rendered.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from kvloom.engine.errors import InvalidRequestError

MAX_RANGE = 10_000
MAX_CHARACTERS = 16_000_000
MAX_SECONDS = 5.0
_MAX_BITS = 256
"""Of a product of whole numbers."""
_ITEM = 100
"""Characters that an item of a list counts for, beside its own."""
_MOST_SPACE = 16
"""Characters between two items of JSON."""
_WIDTH = re.compile(r"\d{4,}|\*|\{[^{}]*\{")
"""What makes a format wide: a long number, or a width that is an argument."""
_GROWING = frozenset({"expandtabs", "indent"})
"""Filters and methods of strings that put as many spaces as a number says at many places."""
_NUMBERED = _GROWING | {"ljust", "rjust", "center", "zfill", "round"}
"""Those where a number says how much there is to do."""

_end: contextvars.ContextVar[float] = contextvars.ContextVar("end of the rendering", default=float("inf"))


class TemplateRefusal(jinja2.TemplateError):
    """What a template says with raise_exception."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Rendering inside ends with InvalidRequestError once the time is over."""
    token = _end.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _end.reset(token)


def environment() -> jinja2.Environment:
    """The sandbox, with what transformers gives to chat templates."""
    made = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlocks], finalize=_measured)
    made.filters.update({"tojson": _tojson, "replace": _replace, "join": _join})
    for name in ("center", "urlize", "xmlattr", "wordwrap", "batch", "slice"):  # pad, repeat or fill without need
        del made.filters[name]
    made.filters = {name: _guarded(name, function) for name, function in made.filters.items()}
    made.globals = {
        "range": _short_range,
        "namespace": _Namespace,
        "dict": lambda *pairs, **values: dict(*pairs, **values),  # not the class: its methods change what they are given
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return made


def too_much(what: str) -> InvalidRequestError:
    """The error for a bound that is passed."""
    return InvalidRequestError(f"the chat template {what}; send less text", param="messages")


def tick() -> str:
    """Look at the clock. Returns no text, so that it can stand anywhere in a template."""
    if time.monotonic() > _end.get():
        raise too_much("ran too long")
    return ""


# Sizes ------------------------------------------------------------------------------------------------------------------------


def _bounded(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise too_much(f"made more than {MAX_CHARACTERS} characters")


def _size(*values: Any) -> int:
    """About how many characters values have as text. Raises as soon as there are too many, however deep they share parts."""
    size, left = 0, list(values)
    while left:
        value = left.pop()
        size += _ITEM
        if isinstance(value, str | bytes):
            size += len(value)
        elif isinstance(value, Mapping):
            _bounded(size + 2 * _ITEM * len(value))
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            _bounded(size + _ITEM * len(value))
            left += value
        _bounded(size)
    return size


def _measured(value: Any) -> Any:
    """Every value that becomes text passes here."""
    _size(value)
    return value


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or a string's method that looks at the clock and at what it is given."""
    jinjas_own = 1 if hasattr(function, "jinja_pass_arg") else 0  # its context or environment comes first

    @functools.wraps(function)
    def call(*values: Any, **named: Any) -> Any:
        tick()
        size = _size(*values[jinjas_own:], *named.values())
        if name in _NUMBERED:
            number = max((abs(value) for value in (*values[1:], *named.values()) if isinstance(value, int)), default=4)
            if number > MAX_RANGE:
                raise too_much(f"gives a number above {MAX_RANGE} to {name}")
            _bounded(size * number if name in _GROWING else size + number)
        if name == "format":
            _check_format(values[0], size)
        return function(*values, **named)

    return call


def _check_format(form: Any, size: int) -> None:
    """Raises if formatting values of this size could give much more."""
    if isinstance(form, str):
        if _WIDTH.search(form):
            raise too_much("formats to a great width")
        _bounded((form.count("%") + form.count("{")) * size)


def _check_product(left: Any, right: Any) -> None:
    for value, count in ((left, right), (right, left)):
        if isinstance(count, int) and isinstance(value, str | list | tuple):
            _bounded(max(1, _size(value)) * count)
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > _MAX_BITS:
        raise too_much("makes a number that is too long")


# What Jinja runs --------------------------------------------------------------------------------------------------------------


class _Bounds(NodeTransformer):
    """Puts bounds into a template's tree: names could be overwritten by the template, attributes of the environment cannot."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.Output([_call("tick", [])]).set_lineno(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("joined", node.nodes).set_lineno(node.lineno)


def _call(name: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with bounds."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    tick = staticmethod(tick)

    @staticmethod
    def joined(*values: Any) -> str:
        """The operator ~."""
        _size(*values)
        return "".join(map(str, values))

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Where Jinja joins what a macro or a block wrote."""
        texts = list(pieces)
        _bounded(sum(map(len, texts)))
        return "".join(texts)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Bounds().visit(tree)
        tree.set_environment(self)
        return tree

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        tick()
        text = getattr(__obj, "__self__", None)
        if isinstance(text, str):
            name = __obj.__name__
            for own in ("_loop_vars", "_block_vars"):  # what Jinja hands to functions that ask for the context
                kwargs.pop(own, None)
            return _guarded(name, _METHODS.get(name) or getattr(str, name))(text, *args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def call(*values: Any, **named: Any) -> str:
            _check_format(value.__self__, _size(*values, *named.values()))
            return wrapped(*values, **named)

        return call

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise too_much("takes powers, which is not allowed")
        if operator == "+" and not isinstance(left, int | float):
            _size(left, right)
        if operator == "%" and isinstance(left, str):
            _check_format(left, _size(left, right))
        if operator == "*":
            _check_product(left, right)
        return super().call_binop(context, operator, left, right)


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    _bounded(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


@jinja2.pass_environment
def _join(environment: jinja2.Environment, parts: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
    items = list(parts) if attribute is None else list(map(make_attrgetter(environment, attribute), parts))
    _bounded(_size(items) + len(items) * len(str(d)))
    return str(d).join(map(str, items))


def _joined_by(text: str, parts: Iterable[str]) -> str:
    """The method join of a string."""
    items = list(parts)
    _bounded(_size(items) + len(items) * len(text))
    return text.join(items)


_METHODS: Mapping[str, Callable[..., Any]] = {"replace": _replace, "join": _joined_by}


class _GenerationBlocks(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is just text."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


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


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
            sort_keys: bool = False) -> str:  # fmt: skip
    """JSON for a prompt: without the HTML escapes of Jinja's own filter, as in transformers."""
    if (indent or 0) > _MOST_SPACE or sum(map(len, separators or ())) > _MOST_SPACE:
        raise too_much("writes JSON with much space in it")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _short_range(*bounds: int) -> range:
    numbers = range(*bounds)
    if len(numbers) > MAX_RANGE:
        raise too_much(f"counts over more than {MAX_RANGE} numbers")
    return numbers


def _raise_exception(message: Any) -> None:
    raise TemplateRefusal(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
