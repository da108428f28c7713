"""The engines that are fuzzed: every order, small steps and large ones, small caches, every default that a server may have."""

from __future__ import annotations

import functools
from typing import Any

from kvloom.kernels import load

_SHARE = (
    '{"verified": true, "min_match": 32, "min_reusable": 48, "min_gain": -1, "shadow_share": 0.3, "reject_above": %s, '
    '"shadow_kl": 1000, "shadow_top1": 0}'
)

SETTINGS: tuple[dict[str, Any], ...] = (
    {"scheduler": "cache_aware", "block_size": 4, "kv_memory": 48 * 1024, "max_batched_tokens": 64, "max_num_seqs": 16,
     "step_time_ms": 1},
    {"scheduler": "priority", "block_size": 16, "kv_memory": 192 * 1024, "max_batched_tokens": 256, "max_num_seqs": 32},
    {"scheduler": "fcfs", "block_size": 1, "kv_memory": 44 * 1024, "max_batched_tokens": 8, "max_num_seqs": 24},
    {"scheduler": "cache_aware", "reuse": "approx", "block_size": 8, "kv_memory": 64 * 1024, "max_batched_tokens": 32,
     "step_time_ms": 0},
    {"scheduler": "fcfs", "retention": "razor", "retention_options": '{"induction_share": 0.3, "echo_share": 0.1, "least": 8}',
     "kv_memory": 192 * 1024, "block_size": 4, "max_num_seqs": 8},
    {"scheduler": "fcfs", "selection": "recycled", "budget": 16, "selection_options": '{"stride": 3}', "draft": True,
     "draft_tokens": 16, "kv_memory": 44 * 1024, "block_size": 4, "max_batched_tokens": 8, "max_num_seqs": 4},
    {"scheduler": "priority", "selection": "token_select", "budget": 16, "kv_memory": 48 * 1024, "block_size": 2,
     "selection_options": '{"prefill_budget": 24, "chunk": 16}', "max_batched_tokens": 48, "max_num_seqs": 16},
    {"scheduler": "fcfs", "reuse": "off", "block_size": 32, "kv_memory": 96 * 1024, "max_batched_tokens": 1, "max_num_seqs": 4},
)  # fmt: skip
"""Settings of `EngineConfig` by name."""


@functools.cache
def _multiplies_codes() -> bool:
    """Whether the native back end can be had here."""
    return load().quantized is not None


def complete(number: int) -> dict[str, Any]:
    """The settings of one engine, ready for `LLM`."""
    found = {"dtype": "fp32", "segment_memory": 64 * 1024, "threads": 1, **SETTINGS[number % len(SETTINGS)]}
    if (number + number // len(SETTINGS)) % 2 and _multiplies_codes():
        found["weights"] = "int8"  # whose steps are captured
    if "retention" not in found:
        found["kvshare_options"] = _SHARE % (0 if number % 3 == 1 else 10)  # which rejects everything, or next to nothing
    return found
