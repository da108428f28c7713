"""How much memory this process may still take."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from kvloom.engine.errors import ConfigError
from kvloom.engine.startup.cgroups import free_memory

if TYPE_CHECKING:
    import torch  # who only asks how much there is does without

log = logging.getLogger("kvloom.engine")

MIB, GIB = 1 << 20, 1 << 30
SEGMENT_PART = 2
STATE_PART = 8
"""By default, segments of approximate reuse and selection state may take these parts of the KV cache's memory, beside it."""


def available_memory() -> int:
    """Bytes that can be allocated without swapping: the system's figure, or the control groups' if that is less."""
    return int(min(_system(), free_memory()))


def _system() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def default_kv_memory() -> int:
    """A CPU's KV cache: a quarter of what is available, at most 4 GiB. A GPU's: `gpu_memory.kv_memory`."""
    return min(4 * GIB, available_memory() // 4)


def size(count: int) -> str:
    """Bytes as people read them: 1.5 GiB, 300 MiB, 23,040 bytes."""
    if count < MIB:
        return f"{count:,} bytes"
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / MIB:,.0f} MiB"


def check_kv_memory(asked: int, segments: int, selection: int, device: torch.device, steps: int = 0) -> None:
    """Compare a KV cache with what its device has left, the model being loaded; bytes.

    segments, selection, steps: most that approximate reuse, selection methods and steps may take beside it, as they come.
    Raises ConfigError if the cache alone does not fit, and warns if all of it does not.
    """
    from kvloom.engine.device import memory_of

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
