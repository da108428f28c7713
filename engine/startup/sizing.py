"""How much memory the KV cache gets, and what is beside it; and both, made.

On a CPU what methods and segments may take comes on top of the cache; on a GPU all of it shares what `gpu_memory` leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from kvloom.engine.cache import CacheManager, GroupSpec, Storage, bytes_per_token
from kvloom.engine.cache.storage import ALLOCATION_ERRORS
from kvloom.engine.calibration import store as calibrations
from kvloom.engine.config import EngineConfig
from kvloom.engine.errors import ConfigError
from kvloom.engine.model.load import LoadedModel
from kvloom.engine.requests.state import StateMemory
from kvloom.engine.retention import Retention
from kvloom.engine.reuse.kvshare.options import GATE, ShareOptions
from kvloom.engine.startup.available import MIB, default_kv_memory
from kvloom.engine.startup.gpu_memory import UTILIZATION, kv_memory, step_memory
from kvloom.engine.startup.memory import SEGMENT_PART, STATE_PART, check_kv_memory


def make_cache(
    config: EngineConfig, loaded: LoadedModel, retention: Retention | None, sharing: ShareOptions | None
) -> CacheManager:
    """Raises ConfigError if the cache does not fit what there is, or holds less than two blocks."""
    model, dtype, device = loaded.config, loaded.decoder.dtype, loaded.decoder.device
    spec = GroupSpec.everything(model.layers, model.kv_heads)
    block = bytes_per_token(spec, model.head_dim, dtype) * config.cache.block_size
    length, memory, steps = config.model.max_model_len or model.max_position, config.cache.kv_memory, 0
    if device.type != "cpu":
        steps = step_memory(model, dtype, config.scheduler, length)
    if memory is not None:
        check_kv_memory(memory, segment_bound(config, memory, sharing, device), state_bound(config, memory), device, steps)
    elif device.type == "cpu":
        memory = default_kv_memory()
    else:
        least = block * max(2, math.ceil((config.model.max_model_len or 0) / config.cache.block_size))
        utilization = config.cache.gpu_memory_utilization or UTILIZATION
        memory = kv_memory(device, utilization, steps, least, beside(config, sharing, device))
    if retention is not None:
        return retention.make_cache(memory, length, config.cache.block_size, device)
    if memory < 2 * block:
        raise ConfigError(
            f"kv_memory is {memory} bytes, but one block of {config.cache.block_size} tokens takes {block}; "
            f"give at least {2 * block}"
        )
    return CacheManager(Storage(spec, memory // block, config.cache.block_size, model.head_dim, dtype, device))


def make_states(config: EngineConfig, kv_bytes: int, retention: Retention | None, device: torch.device) -> StateMemory:
    """Memory of what methods remember. Raises ConfigError if there cannot be so much, or it holds nothing of one request."""
    bound = state_bound(config, kv_bytes)
    try:
        states = StateMemory(bound, retention, device)
        if retention is not None and states.selection_bound < 0:
            raise ConfigError(
                f"selection_memory is {bound} bytes, but of one long request retention {retention.name} remembers "
                f"{bound - states.selection_bound}; give more"
            )
        return states
    except ALLOCATION_ERRORS:
        raise ConfigError(f"selection_memory is {bound} bytes, which cannot be allocated; lower it") from None


def share_options(config: EngineConfig, fingerprint: str) -> ShareOptions:
    """How approximate reuse works. Raises ConfigError if it is the default but no check of this model has passed."""
    options = ShareOptions.read(config.cache.kvshare_options)
    if not options.verified and calibrations.read(GATE, fingerprint) is not None:
        options = replace(options, verified=True)
    if config.cache.reuse == "approx" and not options.verified:
        raise ConfigError(
            f"reuse is approx, but nobody has checked what that does to this model's answers; run kvloom calibrate kvshare "
            f"{config.model.model} first, or say that you know with --kvshare-options '{{\"verified\": true}}'"
        )
    return options


def beside(config: EngineConfig, sharing: ShareOptions | None, device: torch.device) -> Callable[[int], int]:
    """From the bytes of a KV cache, the most that are taken beside it."""
    return lambda kv: segment_bound(config, kv, sharing, device) + state_bound(config, kv)


def state_bound(config: EngineConfig, kv_bytes: int) -> int:
    """Most bytes of what selection methods and retention remember of requests."""
    asked = config.selection.selection_memory
    return max(MIB, kv_bytes // STATE_PART) if asked is None else asked


def segment_bound(config: EngineConfig, kv_bytes: int, sharing: ShareOptions | None, device: torch.device) -> int:
    """Most bytes of segments that approximate reuse keeps: none by default on a GPU where no request may use them."""
    asked = config.cache.segment_memory
    if sharing is None or (asked is None and device.type != "cpu" and not sharing.verified):
        return 0
    return kv_bytes // SEGMENT_PART if asked is None else asked
