"""How much memory there is, told without torch."""

from __future__ import annotations

import os
from pathlib import Path

from kvloom.engine.startup.cgroups import free_memory

MIB, GIB = 1 << 20, 1 << 30


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
