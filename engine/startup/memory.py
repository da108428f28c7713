"""How much memory this process may still take."""

from __future__ import annotations

import logging

import torch

from kvloom.engine.device import CPU, memory_of
from kvloom.engine.errors import ConfigError
from kvloom.engine.startup.available import MIB, available_memory, size

log = logging.getLogger("kvloom.engine")

SEGMENT_PART = 2
STATE_PART = 8
"""By default, segments of approximate reuse and selection state may take these parts of the KV cache's memory, beside it."""


def check_kv_memory(asked: int, segments: int, selection: int, device: torch.device = CPU, steps: int = 0) -> None:
    """Compare a KV cache with what its device has left, the model being loaded; bytes.

    segments, selection, steps: most that approximate reuse, selection methods and steps may take beside it, as they come.
    Raises ConfigError if the cache alone does not fit, and warns if all of it does not.
    """
    free = available_memory() if device.type == "cpu" else memory_of(device).free
    total = asked + segments + selection + steps
    if total <= free:
        return
    parts = f"{size(asked)} for the KV cache, up to {size(segments)} for segments and {size(selection)} for selection state"
    parts += f", with {size(steps)} for steps" * bool(steps)
    most = max(0, int((free - steps) * asked / (total - steps) / MIB))
    found = f"{parts} make {size(total)}, and {size(free)} are free; give about {most}MiB"
    if asked > free:
        where = "this machine" if device.type == "cpu" else str(device)
        raise ConfigError(f"kv_memory does not fit {where} with the model loaded: {found}, or leave it out")
    log.warning("memory can run out when all of it is in use: %s, or lower segment_memory or selection_memory", found)
