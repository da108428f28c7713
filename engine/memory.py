"""How much memory this process may still take."""

from __future__ import annotations

import os
from pathlib import Path

MIB, GIB = 1 << 20, 1 << 30


def available_memory() -> int:
    """Bytes that can be allocated without swapping: the system's figure, or the control group's if that is less."""
    return min(_system(), _group(Path("/sys/fs/cgroup")))


def _system() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _group(root: Path) -> int:
    """What the control group has left (version 2 files); a huge number if there is no limit."""
    try:
        limit, used = ((root / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return int(limit) - int(used)
    except (OSError, ValueError):  # no control group, or "max"
        return 1 << 62


def default_kv_memory() -> int:
    """A quarter of what is available, at most 4 GiB."""
    return min(4 * GIB, available_memory() // 4)
