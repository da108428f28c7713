"""What becomes of fields of /v1/messages that are not served: those of Anthropic's, and those of chats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvloom.server.schema.fields import HINTS
from kvloom.server.schema.unsupported import UNSUPPORTED, Refusal


def _empty(advice: str = "leave it out") -> Refusal:
    return Refusal(lambda value: value in (None, False, 0, "", [], {}), advice)


def _instead(name: str) -> Refusal:
    return _empty(f"use {name}")


def _edits_nothing(value: Any) -> bool:
    """Whether context management keeps the conversation as it is."""
    edits = value.get("edits") if isinstance(value, dict) and value.keys() <= {"edits"} else value
    kept = [{"type": "clear_thinking_20251015", "keep": keep} for keep in ("all", {"type": "all"})]
    return edits is None or (isinstance(edits, list) and all(edit in kept for edit in edits))


_OWN_HINTS: Mapping[str, str] = {
    "cache_control": "prefixes are cached by themselves",
    "diagnostics": "says nothing to the model; kv.explain tells why a prefix was not used again",
    "inference_geo": "says who computes it",
    "speed": "there is one",
    **dict.fromkeys(("fallbacks", "fallback_credit_token"), "no answer is refused, so no other model is asked"),
    "billing_policy": "nothing is billed",
    **dict.fromkeys(("user_profile_id", "workspace_id"), "names the request or its user"),
    **dict.fromkeys(("anthropic_version", "anthropic_beta", "betas"), "there is one version"),
    "stream_options": "usage is always told",
}

_CHATS = "use /v1/chat/completions"
_PLACE = "answers here have no place for it; use /v1/chat/completions"
_THINKING = "use thinking or output_config.effort"

MESSAGE_UNSUPPORTED: Mapping[str, Refusal] = {
    **UNSUPPORTED,
    "container": _empty("there are no containers; leave it out"),
    "mcp_servers": _empty("tools that run at the server are not served; leave it out"),
    "context_management": Refusal(_edits_nothing, "conversations are sent whole; leave it out"),
    "compaction": _empty("conversations are sent whole; leave it out"),
    "thread": _empty("conversations are sent whole; leave it out"),
    "prefill": _empty("end with a message of the role assistant"),
    "n": Refusal(lambda value: value in (None, 1), "an answer is one message; use /v1/chat/completions"),
    "stop": _instead("stop_sequences"),
    "max_completion_tokens": _instead("max_tokens"),
    "parallel_tool_calls": Refusal(lambda value: value in (None, True), "use tool_choice.disable_parallel_tool_use"),
    "reasoning_effort": _empty(_THINKING),
    "include_reasoning": Refusal(lambda value: value in (None, True), "use thinking.display"),
    "separate_reasoning": Refusal(lambda value: value in (None, True), _CHATS),
    "reasoning_format": Refusal(lambda value: value in (None, "auto", "deepseek"), _CHATS),
    "continue_final_message": Refusal(lambda value: value is None, "an assistant's message at the end is continued"),
    "add_generation_prompt": Refusal(lambda value: value in (None, True), _CHATS),
    "add_special_tokens": _empty(_CHATS),
    **dict.fromkeys(
        ("logprobs", "top_logprobs", "logprob_token_ids", "prompt_logprobs", "return_token_ids",
         "return_tokens_as_token_ids"), _empty(_PLACE),
    ),
}  # fmt: skip
"""Fields that are refused where they ask for something."""

MESSAGE_HINTS: Mapping[str, str] = {
    **{name: why for name, why in HINTS.items() if name not in MESSAGE_UNSUPPORTED},
    **_OWN_HINTS,
}
"""Fields that change no answer, and why."""
