"""Fields that clients know from other servers (OpenAI, vLLM, SGLang, llama.cpp, TGI, Ollama, Dynamo) and kvloom does not serve.

Ignoring one would give an answer that is not what was asked for, so each is refused by name, unless its value asks for
nothing. What asks for nothing differs: an empty list of tools is no tools, but an empty JSON schema means "any JSON". Fields
that change no answer are in `fields.HINTS`.
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


def _never(value: Any) -> bool:
    return value is None


def _empty(value: Any) -> bool:
    return value in (None, False, 0, "", [], {})


def _hollow(value: Any) -> bool:
    """Nothing, or an object that sets nothing."""
    return _empty(value) or (isinstance(value, dict) and all(item is None for item in value.values()))


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


def _same(refusal: Refusal, names: str) -> dict[str, Refusal]:
    return dict.fromkeys(names.split(), refusal)


def _instead(harmless: Callable[[Any], bool] = _never, **names: str) -> dict[str, Refusal]:
    """Other servers' names of what is served here under another one."""
    return {name: Refusal(harmless, f"use {known}") for name, known in names.items()}


_GRAMMAR = "use response_format or structured_outputs"
_TOOLS = Refusal(_empty, "tools are called in chats; use /v1/chat/completions")
_CHOICE = Refusal(_one_of("none", "auto"), "tools are called in chats; use /v1/chat/completions")
_NESTED = Refusal(_hollow, "put its fields beside the others, in the body itself")
_TEMPLATE = "a variable of the model's chat template goes into chat_template_kwargs"

CONSTRAINTS: Mapping[str, Refusal] = {
    **_same(Refusal(_never, _GRAMMAR), "choice json_object format"),
    "stop_regex": Refusal(_never),
    **_same(Refusal(_empty, _GRAMMAR), "grammar_lazy grammar_triggers"),
}
"""What the output must look like."""

SAMPLING: Mapping[str, Refusal] = {
    **_same(
        Refusal(_empty),
        "stop_words logits_processors logits_processor custom_logit_processor custom_params samplers "
        "use_beam_search watermark mirostat dry_multiplier xtc_probability dynatemp_range top_a "
        "smoothing_factor no_repeat_ngram_size repetition_ngram_size penalty_alpha epsilon_cutoff eta_cutoff min_keep "
        "t_max_predict_ms max_repetition_pattern_size min_repetition_pattern_size repetition_min_count repetition_detection "
        "ban_eos_token custom_token_bans negative_prompt input_prefix input_suffix input_extra n_indent "
        "adaptive_target watermarking chat_parser message_delimiters reasoning_control",
    ),
    **_same(Refusal(_one_of(1)), "length_penalty typical_p typ_p tfs tfs_z num_beams guidance_scale cfg_scale best_of "
            "encoder_repetition_penalty"),
    "top_n_sigma": Refusal(_one_of(-1, 0)),
    "repeat_last_n": Refusal(_one_of(-1, 64), "penalties count all tokens; leave it out"),  # 64 is llama.cpp's own default
    "t_max_prompt_ms": Refusal(_one_of(-1, 0)),
    "extra_key": Refusal(_empty, "use cache_salt"),
    "no_stop_trim": Refusal(_empty, "use include_stop_str_in_output"),
    "do_sample": Refusal(_one_of(True), "use temperature 0 for greedy decoding"),
    **_instead(max_new_tokens="max_tokens", n_predict="max_tokens", num_predict="max_tokens", max_output_tokens="max_tokens",
               max_length="max_tokens", max_tokens_to_sample="max_tokens", min_new_tokens="min_tokens", min_length="min_tokens",
               random_seed="seed", sampling_seed="seed"),
    **_instead(_empty, stop_sequences="stop", n_probs="logprobs", top_n_tokens="logprobs"),
    **_instead(_one_of(1), repeat_penalty="repetition_penalty", num_return_sequences="n", n_cmpl="n"),
}  # fmt: skip
"""How tokens are chosen, and when to end."""

PROMPT: Mapping[str, Refusal] = {
    "suffix": Refusal(_empty, "models here only continue a prompt; leave it out"),
    "chat_template": Refusal(_empty, "the model's own template is used; leave it out"),
    "system": Refusal(_empty, "send a message with the role system"),
    **_same(Refusal(_empty), "documents mm_processor_kwargs media_io_kwargs image_data video_data audio_data multi_modal_data "
            "images videos audios prompt_embeds input_embeds multimodal_data lora lora_path lora_request adapter_id "
            "adapter_name adapters session_params kv_transfer_params ec_transfer_params task bootstrap_host bootstrap_port "
            "bootstrap_room generation_prompt preserved_tokens chat_format"),
    **_same(Refusal(_never), "input_ids prompt_token_ids"),
    **_instead(_never, truncate="truncate_prompt_tokens", truncation="truncate_prompt_tokens"),
    **_instead(_empty, inputs="prompt"),
    **_same(Refusal(_never, _TEMPLATE), "reasoning_effort enable_thinking thinking_budget thinking_token_budget "
            "thinking_budget_tokens reasoning_budget reasoning_budget_tokens"),
    **_same(Refusal(_hollow, _TEMPLATE), "reasoning thinking"),
}  # fmt: skip
"""What the model is given to read."""

ANSWER: Mapping[str, Refusal] = {
    "tools": _TOOLS,
    "tool_choice": _CHOICE,
    "functions": Refusal(_empty, "use tools"),
    "function_call": Refusal(_one_of("none", "auto"), "use tool_choice"),
    "modalities": Refusal(_one_of(["text"], []), 'only ["text"] is'),
    "web_search_options": Refusal(_never),  # an empty object switches it on
    "verbosity": Refusal(_one_of("medium")),
    "include_reasoning": Refusal(_one_of(True)),
    "reasoning_format": Refusal(_one_of("none")),
    **_same(Refusal(_empty), "audio moderation enable_search plugins separate_reasoning return_hidden_states "
            "return_routed_experts return_full_text decoder_input_details details post_sampling_probs response_fields "
            "return_meta_info return_prompt_text"),
    **_instead(_empty, return_tokens="return_token_ids", return_prompt_token_ids="return_token_ids"),
    "top_logprobs": Refusal(_empty, "completions tell as many as logprobs says; use logprobs"),
    "echo": Refusal(_empty, "use /v1/completions"),
    "continue_final_message": Refusal(_empty, "messages are continued by /v1/chat/completions"),
}  # fmt: skip
"""What the answer holds."""

NESTED: Mapping[str, Refusal] = {
    "vllm_xargs": Refusal(_hollow),
    **_same(_NESTED, "extra_body extra_args nvext sampling_params parameters options generation_config generationConfig"),
}
"""Objects with fields of their own."""

UNSUPPORTED: Mapping[str, Refusal] = {**CONSTRAINTS, **SAMPLING, **PROMPT, **ANSWER, **NESTED}

_OWN_ADVICE = {
    "use max_tokens": "use max_output_tokens",
    "use logprobs": 'use include ["message.output_text.logprobs"]',
    "use return_token_ids": "use /v1/chat/completions",
    "use prompt": "use input",
    "use n": "a response is one answer; leave it out",
    "send a message with the role system": "use instructions",
}
_IN_CHATS = "use /v1/chat/completions"
OF_RESPONSES: Mapping[str, Refusal] = {
    **{name: Refusal(refusal.harmless, _OWN_ADVICE[refusal.advice])
       for name, refusal in UNSUPPORTED.items() if refusal.advice in _OWN_ADVICE},
    "background": Refusal(_empty, "a response ends with its client's connection; leave it out, and stream"),
    **_same(Refusal(_hollow), "background_options access_programs moderation"),
    "conversation": Refusal(_never, "use previous_response_id, or send the items"),
    "prompt": Refusal(_never, "templates of prompts are not stored here; send instructions and input"),
    "context_management": Refusal(_empty, "nothing is compacted; use truncation"),
    **_instead(_never, max_tokens="max_output_tokens", max_completion_tokens="max_output_tokens", messages="input",
               reasoning_effort="reasoning.effort", previous_input_messages="input", previous_response="previous_response_id"),
    **_instead(_empty, logprobs='include ["message.output_text.logprobs"]'),
    "verbosity": Refusal(_one_of("medium")),
    "n": Refusal(_one_of(1), "a response is one answer; leave it out"),
    **_same(Refusal(_never, _IN_CHATS), "prompt_logprobs"),
    **_same(Refusal(_empty, _IN_CHATS), "return_token_ids add_special_tokens"),
    **_same(Refusal(_one_of(True), _IN_CHATS), "add_generation_prompt separate_reasoning"),
    "reasoning_format": Refusal(_one_of("auto", "deepseek"), _IN_CHATS),
    "enable_response_messages": Refusal(_empty),
}  # fmt: skip
"""Fields of /v1/responses alone, and of chats that it does not have."""

OF_STREAMS: Refusal = Refusal(_empty, "allowed: include_usage, continuous_usage_stats")
"""Any other key of `stream_options`."""

OF_MESSAGES: Mapping[str, Refusal] = {
    "function_call": Refusal(_empty, "use tool_calls"),
    "prefix": Refusal(_empty, "set continue_final_message to true"),
    **_same(Refusal(_empty, "this model reads text only; leave it out"), "audio images image videos audios files"),
}
"""Fields of a message."""


def refuse(given: Mapping[str, Any] | None, table: Mapping[str, Refusal]) -> list[str]:
    """Raises a validation error for a field that asks for what is not served. Returns the names that nobody knows."""
    unknown = []
    for name, value in (given or {}).items():
        if name in table:
            table[name].check(name, value)
        else:
            unknown.append(name)
    return unknown
