"""Which format a model's answers are read in: what the operator says, else what its chat template asks for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from kvloom.engine.constraint.options import StructuredOutput
from kvloom.engine.errors import KVLoomError
from kvloom.engine.text.chat_template import template_of
from kvloom.server.answers.formats import (
    CALL_ALIASES,
    CALL_FORMATS,
    FALLBACK,
    REASONING_ALIASES,
    REASONING_FORMATS,
    CallFormat,
    ReasoningFormat,
    call_format,
    reasoning_format,
)
from kvloom.server.answers.grammar import MOST_CALLS, GrammarWriter, Thoughts, content_rule
from kvloom.server.answers.reader import Expected
from kvloom.server.answers.template.spec import ResponseTemplate, load
from kvloom.server.schema.chat import ChatBody
from kvloom.server.schema.tools import NamedChoice

log = logging.getLogger("kvloom.server")

AUTO = "auto"
NONE = "none"


class AnswerFormats(NamedTuple):
    """How answers of the served model are read."""

    calls: CallFormat
    reasoning: ReasoningFormat | None
    template: ResponseTemplate | None = None
    """The checkpoint's own, which is taken where no grammar says what is written."""

    def expected(self, body: ChatBody, prompt_end: str, *, constrained: bool = False) -> Expected | None:
        """What to look for in the answers to a chat; None for nothing but content. prompt_end: the prompt's last characters;
        constrained: whether the body asks for content that a grammar constrains."""
        apart = body.separate_reasoning and body.reasoning_format != "none"
        reasoning = self.reasoning if apart else None
        tools = body.offered
        free = not constrained and not must_call(body) and not any(tool.function.strict for tool in tools)
        template = self.template if free else None
        if reasoning is None and not tools and template is None:
            return None
        return Expected(
            template=template,
            apart=apart,
            prompt_end=prompt_end,
            calls=self.calls if tools else None,
            reasoning=reasoning,
            thinking=reasoning is not None and self._thinks(prompt_end),
            tell_reasoning=body.include_reasoning,
            schemas={tool.function.name: tool.function.parameters or {} for tool in tools},
            bare=self.calls.mostly_bare or not any(tool.function.strict for tool in tools),
            most_calls=None if body.parallel_tool_calls else 1,
            forced=must_call(body),
        )

    def constraint(
        self, body: ChatBody, tokenizer: Any, prompt_end: str, asked: StructuredOutput | None
    ) -> StructuredOutput | None:
        """What the answers to a chat must look like; None for anything.

        Where it must call functions, calls; else what the body asks for (`asked`) or calls, behind thoughts; calls of strict
        functions are as their schemas say. `asked` comes back as it is where that cannot be said together (a regular
        expression, a grammar, calls that are bare JSON): then there are neither thoughts nor calls.
        """
        tools = body.offered
        writer = GrammarWriter(self.calls, lambda text: special_id(tokenizer, text), tokenizer.chat_template or "")
        thoughts = Thoughts(self.reasoning, self._thinks(prompt_end))
        most = MOST_CALLS if body.parallel_tool_calls else 1
        if isinstance(body.tool_choice, NamedChoice):
            named, most = body.tool_choice.function.name, 1
            tools = [tool for tool in tools if tool.function.name == named]
        if must_call(body):
            return StructuredOutput(grammar=writer.forced(tools, most=most, thoughts=thoughts), param="tool_choice")
        if asked is not None:
            content = content_rule(asked)
            bare_json = self.calls.mostly_bare and "{" in self.calls.bare  # which no lexer tells from other JSON in time
            if content is None or (tools and bare_json):
                return asked
            return StructuredOutput(grammar=writer.either(tools, content, most=most, thoughts=thoughts), param=asked.param)
        if any(tool.function.strict for tool in tools):
            return StructuredOutput(grammar=writer.guarded(tools, thoughts), param="tools")
        return None

    def _thinks(self, prompt_end: str) -> bool:
        """Whether a prompt opened the model's thoughts."""
        return self.reasoning is not None and prompt_end.rstrip().endswith(self.reasoning.open)


def must_call(body: ChatBody) -> bool:
    """Whether the answers to a chat are calls and nothing else."""
    return body.tool_choice not in ("auto", "none")


def formats_of(tokenizer: Any, tool_call_parser: str = AUTO, reasoning_parser: str = AUTO) -> AnswerFormats:
    """The formats of a model, where a parser is `auto` by its tokenizer's chat template, and its response template where both
    are. Raises ModelError for a response template that says nothing."""
    source = tokenizer.chat_template
    given = tokenizer.response_template if tool_call_parser == reasoning_parser == AUTO else None
    special = [tokenizer.special_text(token) for token in tokenizer.special_ids]
    template = None if given is None else load(given, special)
    name = CALL_ALIASES.get(tool_call_parser, tool_call_parser)
    calls = CALL_FORMATS[name] if name != AUTO else _call_format(tokenizer, warns=template is None)
    name = REASONING_ALIASES.get(reasoning_parser, reasoning_parser)
    reasoning = None if name == NONE else REASONING_FORMATS[name] if name != AUTO else reasoning_format(source)
    return AnswerFormats(calls, reasoning, template)


def _call_format(tokenizer: Any, *, warns: bool) -> CallFormat:
    """What the template asks for; the fallback's where it shows no tools, and so the fallback's words ask."""
    fallback = CALL_FORMATS[FALLBACK]
    try:
        if not template_of(tokenizer).tool_form.tools:
            return fallback
    except KVLoomError:  # it has none, or one that does not run: chats are refused anyway
        return fallback
    found = call_format(tokenizer.chat_template)
    if found is None and warns:
        log.warning(
            "the chat template shows tools, but asks for calls in a format that is not known; they are read as %s; "
            "--tool-call-parser says otherwise", FALLBACK,
        )  # fmt: skip
    return found or fallback


def shown_tokens(tokenizer: Any, expected: Expected) -> tuple[int, ...]:
    """Special tokens that must be text for their marks to be found."""
    marks: Sequence[str] = ()
    if expected.calls is not None:
        marks = expected.calls.marks
    if expected.reasoning is not None:
        marks = (*marks, expected.reasoning.open, expected.reasoning.close)
    if expected.template is not None:
        marks = expected.template.marks
    found = (special_id(tokenizer, mark) for mark in marks)
    return tuple(sorted(token for token in found if token is not None))


def special_id(tokenizer: Any, text: str) -> int | None:
    """The special token of this text, if there is one."""
    token: int | None = tokenizer.backend.token_to_id(text)
    return token if token is not None and tokenizer.is_special(token) else None
