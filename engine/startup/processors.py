"""How many cores this process may use: its affinity, and the quota of its control group."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Processors:
    """`cores` this process may run on, and the time on them that its control group grants, in cores; infinite: all of it."""

    cores: int
    quota: float = math.inf

    @property
    def threads(self) -> int:
        """Threads to compute with: as many as the quota feeds all the time, at least one.

        One thread more than that would be stopped for a part of every period, and the others would wait for it.
        """
        return max(1, min(self.cores, math.floor(min(self.quota, self.cores))))

    def __str__(self) -> str:
        cores = f"{self.cores} core{'s' * (self.cores > 1)}"
        return cores if self.quota >= self.cores else f"{cores}, of which the control group grants {self.quota:.3g}"


def processors() -> Processors:
    """Of this process, now."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Processors(cores, quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))


def quota(groups: Path, mounted: Path) -> float:
    """Cores that control groups (version 1 or 2) grant, the least of the process's own group and those around it.

    groups: a file like /proc/self/cgroup; mounted: where control groups are. Infinite where there is no limit, or no telling.
    """
    try:
        lines = groups.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return math.inf
    found = math.inf
    for line in lines:
        _, _, named = line.partition(":")
        controllers, _, path = named.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        roots = (mounted / "cpu", mounted / controllers) if controllers else (mounted, mounted / "unified")  # version 1, 2
        found = min(found, *(_granted(folder) for root in roots for folder in _upwards(root, path)))
    return found


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """The group's folder and those around it, up to the root: all that a container sees where it sees no path of its own."""
    folder = root / path.lstrip("/")
    while folder != root and root in folder.parents:
        yield folder
        folder = folder.parent
    yield root


def _granted(folder: Path) -> float:
    try:
        if (both := folder / "cpu.max").exists():  # version 2: "max 100000", or the quota and its period
            granted, period = both.read_text().split()
        else:
            granted, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return math.inf if granted in ("max", "-1") else int(granted) / int(period)
    except (OSError, ValueError, ArithmeticError):
        return math.inf
