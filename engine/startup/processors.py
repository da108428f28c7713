"""How many cores this process may use: its affinity, and the quota of its control group."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from kvloom.engine.startup.cgroups import granted_cores


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
    return Processors(cores, granted_cores())
