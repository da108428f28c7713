"""Every field that clients know from OpenAI, vLLM, SGLang and llama.cpp is one of three, so that none that changes an answer is
ignored:

    served    a field of the body's class: validated, and it does what it says
    hint      in `HINTS`: accepted with any value, since whatever it says the answer is the same
    refused   in `unsupported`: a 400 that names it, unless its value asks for nothing

What nobody of these defines is accepted, ignored, and logged once. docs/fields.md is this table by the servers' own lists.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel

from kvloom.server.schema.unsupported import UNSUPPORTED

log = logging.getLogger("kvloom.server")

Standing = Literal["served", "hint", "refused"]

MOST_UNKNOWN = 256
"""Names of unknown fields that are logged in all: clients choose them."""
LONGEST_NAME = 64


def _same(why: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), why)


HINTS: Mapping[str, str] = {
    **_same("names the request or its user", "user metadata safety_identifier request_id rid session_id custom_labels"),
    **_same("nothing is stored, and there is one tier", "store service_tier"),
    **_same("prefixes are cached by themselves; cache_salt keeps them apart",
            "prompt_cache_key prompt_cache_options prompt_cache_retention cache_prompt n_cache_reuse id_slot"),
    **_same("only speed: what is guessed is verified", "prediction ngram_corpus_id speculative.n_max speculative.n_min "
            "speculative.p_min speculative.type speculative.ngram_size_n speculative.ngram_size_m speculative.ngram_min_hits"),
    **_same("says who computes it", "routed_dp_rank data_parallel_rank disagg_prefill_dp_rank backend_sampling "
            "guided_decoding_backend"),
    **_same("how a stream is cut and kept open, not what is in it", "stream_interval sse_ping_interval stream_reasoning"),
    **_same("figures beside the answer; usage and /metrics have them", "timings_per_token return_progress verbose "
            "return_cached_tokens_details"),
    **_same("of images and sound, of which there are none", "mm_payload return_mm_kwargs images_config max_dynamic_patch "
            "min_dynamic_patch use_audio_in_video"),
    **_same("belongs to another field, which is refused where it switches something on", "dry_base dry_allowed_length "
            "dry_penalty_last_n dry_sequence_breakers xtc_threshold mirostat_tau mirostat_eta dynatemp_exponent adaptive_decay "
            "routed_experts_prompt_start routed_experts_start_len grammar_type reasoning_budget_message "
            "reasoning_budget_start_tag reasoning_budget_end_tag reasoning_budget_end_tags"),
    **_same("a context is never shifted: it ends the answer", "n_keep n_discard"),
    **_same("special tokens are not joined by spaces", "spaces_between_special_tokens"),
    **_same("of /render, which there is not", "return_token_offsets"),
    **_same("calls are read wherever tools are offered", "parallel_tool_calls parse_tool_calls"),
}  # fmt: skip
"""Fields that change no answer, and why."""

_logged: set[str] = set()


def standing(name: str, body: type[BaseModel]) -> Standing | None:
    """What a field is to an endpoint with such bodies; None if nobody knows it."""
    if name in body.model_fields:
        return "served"
    hints, unsupported = getattr(body, "hints", HINTS), getattr(body, "unsupported", UNSUPPORTED)
    return "hint" if name in hints else "refused" if name in unsupported else None


def log_unknown(name: str) -> None:
    """Say once that a field is ignored, of at most MOST_UNKNOWN names."""
    name = name[:LONGEST_NAME]
    if name not in _logged and len(_logged) < MOST_UNKNOWN:
        _logged.add(name)
        log.info("requests hold the field %r, which nobody knows; it is ignored", name)
