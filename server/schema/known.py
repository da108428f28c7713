"""The fields that other servers define for generating text, as their own sources list them, and what becomes of each here.

python -m kvloom.server.schema.known     prints docs/fields.md
"""

from __future__ import annotations

from typing import NamedTuple

from kvloom.server.schema.chat import ChatBody
from kvloom.server.schema.common import CommonBody
from kvloom.server.schema.completions import CompletionBody
from kvloom.server.schema.fields import standing
from kvloom.server.schema.responses import ResponsesBody


class Known(NamedTuple):
    """What one server takes."""

    name: str
    version: str
    source: str
    """Where it says so."""
    chat: frozenset[str]
    completions: frozenset[str]
    responses: frozenset[str]

    @property
    def all(self) -> frozenset[str]:
        """For any endpoint."""
        return self.chat | self.completions | self.responses


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LLAMA_CPP_CHAT = _names(
    "adaptive_decay adaptive_target add_generation_prompt backend_sampling cache_prompt chat_format chat_parser "
    "chat_template_kwargs continue_final_message dry_allowed_length dry_base dry_multiplier dry_penalty_last_n "
    "dry_sequence_breakers dynatemp_exponent dynatemp_range echo frequency_penalty generation_prompt grammar "
    "grammar_lazy grammar_triggers grammar_type id_slot ignore_eos json_schema logit_bias logprobs lora "
    "max_completion_tokens max_tokens message_delimiters messages min_keep min_p mirostat mirostat_eta "
    "mirostat_tau model n n_cache_reuse n_cmpl n_discard n_indent n_keep n_predict n_probs parallel_tool_calls "
    "parse_tool_calls post_sampling_probs presence_penalty preserved_tokens reasoning_budget_end_tag "
    "reasoning_budget_end_tags reasoning_budget_message reasoning_budget_start_tag reasoning_budget_tokens "
    "reasoning_control reasoning_effort reasoning_format repeat_last_n repeat_penalty response_fields "
    "response_format return_progress return_tokens samplers seed speculative.n_max speculative.n_min "
    "speculative.ngram_min_hits speculative.ngram_size_m speculative.ngram_size_n speculative.p_min "
    "speculative.type sse_ping_interval stop stream stream_options t_max_predict_ms temperature "
    "thinking_budget_tokens timings_per_token tool_choice tools top_k top_logprobs top_n_sigma top_p typical_p "
    "verbose xtc_probability xtc_threshold"
)

KNOWN = (
    Known(
        "OpenAI",
        "openai-python 3.57.0",
        "CompletionCreateParams of types/chat/completion_create_params.py and types/completion_create_params.py, "
        "ResponseCreateParamsBase of types/responses/response_create_params.py",
        _names(
            "audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens "
            "messages metadata modalities model moderation n parallel_tool_calls prediction presence_penalty "
            "prompt_cache_key prompt_cache_options prompt_cache_retention reasoning_effort response_format "
            "safety_identifier seed service_tier stop store stream stream_options temperature tool_choice tools "
            "top_logprobs top_p user verbosity web_search_options"
        ),
        _names(
            "best_of echo frequency_penalty logit_bias logprobs max_tokens model n presence_penalty prompt seed stop "
            "stream stream_options suffix temperature top_p user"
        ),
        _names(
            "access_programs background background_options context_management conversation image include input "
            "instructions max_output_tokens max_tool_calls metadata model moderation parallel_tool_calls "
            "previous_response_id prompt prompt_cache_key prompt_cache_options prompt_cache_retention reasoning "
            "safety_identifier service_tier store stream stream_options temperature text tool_choice tools top_logprobs "
            "top_p truncation user"
        ),
    ),
    Known(
        "vLLM",
        "0.32.0",
        "vllm/entrypoints/openai/chat_completion/protocol.py, completion/protocol.py and responses/protocol.py",
        _names(
            "add_generation_prompt add_special_tokens allowed_token_ids bad_words cache_salt chat_template "
            "chat_template_kwargs continue_final_message documents ec_transfer_params echo frequency_penalty ignore_eos "
            "include_reasoning include_stop_str_in_output kv_transfer_params length_penalty logit_bias "
            "logprob_token_ids logprobs max_completion_tokens max_tokens media_io_kwargs messages min_p min_tokens "
            "mm_payload mm_processor_kwargs model n parallel_tool_calls presence_penalty priority prompt_logprobs "
            "reasoning_effort repetition_detection repetition_penalty request_id response_format return_mm_kwargs "
            "return_prompt_text return_token_ids return_token_offsets return_tokens_as_token_ids "
            "routed_experts_prompt_start seed session_id skip_special_tokens spaces_between_special_tokens stop "
            "stop_token_ids stream stream_interval stream_options structured_outputs temperature thinking_token_budget "
            "tool_choice tools top_k top_logprobs top_p truncate_prompt_tokens truncation_side use_beam_search user "
            "vllm_xargs watermarking"
        ),
        _names(
            "add_special_tokens allowed_token_ids bad_words cache_salt ec_transfer_params echo frequency_penalty "
            "ignore_eos include_stop_str_in_output kv_transfer_params length_penalty logit_bias logprob_token_ids "
            "logprobs max_tokens min_p min_tokens mm_payload model n presence_penalty priority prompt prompt_embeds "
            "prompt_logprobs repetition_detection repetition_penalty request_id response_format return_mm_kwargs "
            "return_token_ids return_token_offsets return_tokens_as_token_ids routed_experts_prompt_start seed "
            "session_id skip_special_tokens spaces_between_special_tokens stop stop_token_ids stream stream_interval "
            "stream_options structured_outputs suffix temperature thinking_token_budget top_k top_p "
            "truncate_prompt_tokens truncation_side use_beam_search user vllm_xargs watermarking"
        ),
        _names(
            "background cache_salt chat_template_kwargs ec_transfer_params enable_response_messages frequency_penalty "
            "ignore_eos include include_reasoning include_stop_str_in_output input instructions kv_transfer_params "
            "logit_bias max_output_tokens max_tool_calls media_io_kwargs metadata min_p mm_payload mm_processor_kwargs "
            "model parallel_tool_calls presence_penalty previous_input_messages previous_response_id priority prompt "
            "prompt_cache_key reasoning repetition_penalty request_id return_mm_kwargs seed service_tier session_id "
            "skip_special_tokens stop stop_token_ids store stream structured_outputs temperature text tool_choice tools "
            "top_k top_logprobs top_p truncation user vllm_xargs watermarking"
        ),
    ),
    Known(
        "SGLang",
        "commit 004c82e07d87",
        "python/sglang/srt/entrypoints/openai/protocol.py",
        _names(
            "bootstrap_host bootstrap_port bootstrap_room cache_salt chat_template_kwargs continue_final_message "
            "custom_logit_processor custom_params data_parallel_rank disagg_prefill_dp_rank ebnf extra_key "
            "frequency_penalty ignore_eos images_config input_ids logit_bias logprobs lora_path max_completion_tokens "
            "max_dynamic_patch max_tokens messages min_dynamic_patch min_p min_tokens model n ngram_corpus_id "
            "no_stop_trim parallel_tool_calls presence_penalty priority reasoning reasoning_effort regex "
            "repetition_penalty response_format return_cached_tokens_details return_hidden_states return_meta_info "
            "return_prompt_token_ids return_routed_experts return_token_ids rid routed_dp_rank routed_experts_start_len "
            "seed separate_reasoning session_id session_params skip_special_tokens stop stop_regex stop_token_ids "
            "stream stream_options stream_reasoning task temperature tool_choice tools top_k top_logprobs top_p "
            "use_audio_in_video user"
        ),
        _names(
            "best_of bootstrap_host bootstrap_port bootstrap_room cache_salt custom_labels custom_logit_processor "
            "custom_params data_parallel_rank disagg_prefill_dp_rank ebnf echo extra_key frequency_penalty ignore_eos "
            "images_config json_schema logit_bias logprobs lora_path max_tokens min_p min_tokens model n "
            "ngram_corpus_id no_stop_trim presence_penalty priority prompt regex repetition_penalty response_format "
            "return_cached_tokens_details return_hidden_states return_routed_experts return_token_ids rid "
            "routed_dp_rank routed_experts_start_len seed session_id session_params skip_special_tokens stop stop_regex "
            "stop_token_ids stream stream_options suffix temperature top_k top_p user"
        ),
        _names(
            "background cache_salt chat_template_kwargs extra_key frequency_penalty include input instructions "
            "max_output_tokens max_tool_calls metadata min_p model ngram_corpus_id parallel_tool_calls presence_penalty "
            "previous_response_id priority reasoning repetition_penalty request_id service_tier session_id stop store "
            "stream temperature text tool_choice tools top_k top_logprobs top_p truncation user"
        ),
    ),
    Known(
        "llama.cpp",
        "b11434",
        "tools/server/server-schema.cpp, server-common.cpp and server-context.cpp",
        _LLAMA_CPP_CHAT,
        _names(
            "adaptive_decay adaptive_target backend_sampling best_of cache_prompt chat_format chat_parser "
            "continue_final_message dry_allowed_length dry_base dry_multiplier dry_penalty_last_n dry_sequence_breakers "
            "dynatemp_exponent dynatemp_range echo frequency_penalty generation_prompt grammar grammar_lazy "
            "grammar_triggers grammar_type id_slot ignore_eos json_schema logit_bias logprobs lora "
            "max_completion_tokens max_tokens message_delimiters min_keep min_p mirostat mirostat_eta mirostat_tau "
            "model n n_cache_reuse n_cmpl n_discard n_indent n_keep n_predict n_probs parse_tool_calls "
            "post_sampling_probs presence_penalty preserved_tokens prompt reasoning_budget_end_tag "
            "reasoning_budget_end_tags reasoning_budget_message reasoning_budget_start_tag reasoning_budget_tokens "
            "reasoning_control reasoning_format repeat_last_n repeat_penalty response_fields return_progress "
            "return_tokens samplers seed speculative.n_max speculative.n_min speculative.ngram_min_hits "
            "speculative.ngram_size_m speculative.ngram_size_n speculative.p_min speculative.type sse_ping_interval "
            "stop stream stream_options suffix t_max_predict_ms temperature timings_per_token top_k top_n_sigma top_p "
            "typical_p verbose xtc_probability xtc_threshold"
        ),
        _LLAMA_CPP_CHAT - {"messages"} | _names("input instructions max_output_tokens previous_response_id"),  # handed on to it
    ),
)


def bodies() -> dict[str, type[CommonBody]]:
    """The endpoints and their bodies."""
    return {"chat": ChatBody, "completions": CompletionBody, "responses": ResponsesBody}


def document() -> str:
    """The table in Markdown."""
    names = sorted(set().union(*(known.all for known in KNOWN)))
    return _HEAD.format(sources="\n".join(f"- {k.name}: {k.version}, {k.source}" for k in KNOWN)) + "".join(map(_row, names))


_HEAD = """# Fields of requests

Every field that OpenAI, vLLM, SGLang and llama.cpp define for chats, completions and responses is *served*, a *hint* (accepted,
and the answer is the same whatever it says), or *refused*: a 400 that names it, unless its value asks for nothing. A dash is
where none of them defines it for that endpoint. Fields that nobody defines are accepted, ignored, and logged once. Ranges are
in [the server's documentation](server.md#ranges).

The lists are those of

{sources}

| field | chat | completions | responses | defined by | |
|---|---|---|---|---|---|
"""


def _row(name: str) -> str:
    cells = {body: _standing(name, endpoint, body) for endpoint, body in bodies().items()}
    who = ", ".join(known.name for known in KNOWN if name in known.all)
    hints = [body.hints[name] for body, cell in cells.items() if cell == "hint"]
    advice = [body.unsupported[name].advice for body, cell in cells.items() if cell == "refused"]
    return f"| `{name}` | {' | '.join(cells.values())} | {who} | {'; or '.join(dict.fromkeys(hints + advice))} |\n"


def _standing(name: str, endpoint: str, body: type[CommonBody]) -> str:
    if name not in body.model_fields and not any(name in getattr(known, endpoint) for known in KNOWN):
        return "-"
    return standing(name, body) or "unknown"


if __name__ == "__main__":
    print(document(), end="")
