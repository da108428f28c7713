"""Fields that clients know from OpenAI or vLLM and that kvloom does not serve.

Ignoring one would give an answer that is not what was asked for, so each is refused by name, unless its value asks for
nothing. Hints that do not change the form of an answer (`metadata`, `store`, `service_tier`, ...) are not listed: they are
ignored like unknown fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kvloom.server.schema.problem import problem


class Refusal(NamedTuple):
    """When a field asks for nothing, and what to say when it does ask."""

    harmless: Callable[[Any], bool]
    advice: str = "leave it out"

    def check(self, name: str, value: Any) -> None:
        """Raises a validation error that names the field if `value` asks for what is not served."""
        if not self.harmless(value):
            raise problem(name, f"{name} is not supported; {self.advice}")


def _empty(value: Any) -> bool:
    return value in (None, False, 0, "", [], {})


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


def _plain_text(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") == "text"


_EMPTY = Refusal(_empty)
_CONSTRAINED = Refusal(_empty, "output cannot be constrained to a grammar yet; leave it out")
_TOOLS = Refusal(_empty, "tool calls are not served yet; leave it out")

UNSUPPORTED: Mapping[str, Refusal] = {
    "tools": _TOOLS,
    "functions": _TOOLS,
    "tool_choice": Refusal(_one_of("none", "auto"), "tool calls are not served yet; leave it out"),
    "function_call": Refusal(_one_of("none", "auto"), "tool calls are not served yet; leave it out"),
    "response_format": Refusal(_plain_text, 'only {"type": "text"} is'),
    "structured_outputs": _CONSTRAINED,
    "guided_json": _CONSTRAINED,
    "guided_regex": _CONSTRAINED,
    "guided_choice": _CONSTRAINED,
    "guided_grammar": _CONSTRAINED,
    "structural_tag": _CONSTRAINED,
    "logits_processors": _EMPTY,
    "logits_processor": _EMPTY,
    "custom_logit_processor": _EMPTY,
    "allowed_token_ids": _EMPTY,
    "bad_words": _EMPTY,
    "use_beam_search": _EMPTY,
    "length_penalty": Refusal(_one_of(1, 1.0)),
    "suffix": Refusal(_empty, "models here only continue a prompt; leave it out"),
    "audio": _EMPTY,
    "modalities": Refusal(_one_of(["text"], []), 'only ["text"] is'),
    "mm_processor_kwargs": _EMPTY,
    "prediction": _EMPTY,
    "web_search_options": _EMPTY,
    "prompt_embeds": _EMPTY,
    "truncate_prompt_tokens": _EMPTY,
    "chat_template": Refusal(_empty, "the model's own template is used; leave it out"),
    "documents": _EMPTY,
    "return_token_ids": _EMPTY,
    "return_tokens_as_token_ids": _EMPTY,
    "lora_path": _EMPTY,
    "kv_transfer_params": _EMPTY,
}
