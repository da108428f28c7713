"""The formats of tool calls and of thoughts: which marks a model writes, and what stands between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvloom.server.answers.calls import Notation, json_objects, mistral, named_json, python_calls, xml_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFormat:
    """How a family of models calls functions."""

    name: str
    opens: tuple[str, ...] = ()
    """Marks behind which a call stands."""
    closes: tuple[str, ...] = ()
    """Marks that may stand behind it."""
    wraps: tuple[str, ...] = ()
    """Marks around all calls, which are no text."""
    notation: Notation
    bare: tuple[str, ...] = ()
    """How a call may begin without a mark, at the beginning of an answer; only functions that were offered are called so."""
    mostly_bare: bool = False
    """Whether that is the rule rather than a slip."""
    found_by: tuple[tuple[str, ...], ...] = ()
    """A chat template that holds all words of one of these asks for this format."""
    call_id_length: int | None = None
    """Letters and digits of a call's id, for templates that allow nothing else."""
    inner: tuple[str, ...] = ()
    """Further marks that the notation reads."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Every mark that may be a special token."""
        return (*self.opens, *self.closes, *self.wraps, *self.inner)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningFormat:
    """How a family of models marks what it thinks before it answers."""

    name: str
    open: str
    close: str


_DEEPSEEK_SEPARATOR = "<｜tool▁sep｜>"
_JSON_STARTS = ("{", "[{", "```json\n{", "```json\n[{", "```\n{")

CALL_FORMATS: Mapping[str, CallFormat] = {
    form.name: form
    for form in (  # in the order in which templates are looked at
        CallFormat(
            name="deepseek",
            opens=("<｜tool▁call▁begin｜>",),
            closes=("<｜tool▁call▁end｜>",),
            wraps=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
            notation=named_json("\n```json", _DEEPSEEK_SEPARATOR, before=("function" + _DEEPSEEK_SEPARATOR,), after=("```",)),
            inner=(_DEEPSEEK_SEPARATOR,),
            found_by=(("<｜tool▁call▁begin｜>",), ("<｜tool▁calls▁begin｜>",)),
        ),
        CallFormat(
            name="mistral",
            opens=("[TOOL_CALLS]",),
            notation=mistral,
            found_by=(("[TOOL_CALLS]",),),
            inner=("[ARGS]", "[CALL_ID]"),
            call_id_length=9,
        ),
        CallFormat(
            name="qwen_coder",
            opens=("<tool_call>", "<function="),
            closes=("</tool_call>",),
            notation=xml_parameters,
            found_by=(("<function=", "<parameter="),),
        ),
        CallFormat(
            name="hermes",
            opens=("<tool_call>",),
            closes=("</tool_call>",),
            notation=json_objects,
            bare=_JSON_STARTS,
            found_by=(("<tool_call>",),),
        ),
        CallFormat(
            name="pythonic",
            opens=("<|python_start|>",),
            closes=("<|python_end|>",),
            notation=python_calls,
            bare=("[",),
            mostly_bare=True,
            found_by=(("func_name1(params_name1=",), ("<|python_start|>",)),
        ),
        CallFormat(
            name="llama3_json",
            opens=("<|python_tag|>",),
            notation=json_objects,
            bare=("{",),
            mostly_bare=True,
            found_by=(("<|python_tag|>",), ("ipython", '"parameters":')),
        ),
    )
}
REASONING_FORMATS: Mapping[str, ReasoningFormat] = {
    form.name: form
    for form in (
        ReasoningFormat(name="think", open="<think>", close="</think>"),
        ReasoningFormat(name="mistral", open="[THINK]", close="[/THINK]"),
        ReasoningFormat(name="thought", open="<thought>", close="</thought>"),
        ReasoningFormat(name="seed_oss", open="<seed:think>", close="</seed:think>"),
        ReasoningFormat(name="cohere", open="<|START_THINKING|>", close="<|END_THINKING|>"),
    )
}
FALLBACK = "hermes"
"""What a model is asked to write whose template knows no tools."""

CALL_ALIASES = {"qwen25": "hermes", "qwen2_5": "hermes", "qwen3_coder": "qwen_coder", "qwen3_xml": "qwen_coder",
                "llama4_pythonic": "pythonic", "llama3": "llama3_json", "llama4_json": "llama3_json", "deepseek_v3": "deepseek",
                "deepseekv3": "deepseek", "deepseek_v31": "deepseek", "deepseekv31": "deepseek"}  # fmt: skip
REASONING_ALIASES = {"deepseek_r1": "think", "deepseek-r1": "think", "qwen3": "think", "deepseek_v3": "think"}
"""Names of the same in vLLM and SGLang."""


def call_format(template: str | None) -> CallFormat | None:
    """The format that a chat template asks for, by its words; None if none is known."""
    for form in CALL_FORMATS.values():
        if any(all(word in (template or "") for word in words) for words in form.found_by):
            return form
    return None


def reasoning_format(template: str | None) -> ReasoningFormat | None:
    """The marks of thoughts in a chat template."""
    return next((form for form in REASONING_FORMATS.values() if form.close in (template or "")), None)
