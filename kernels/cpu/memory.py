"""Memory that attention needs beside its inputs, kept from step to step: pages that are touched once stay warm."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_LINE = 64  # bytes: vectors do not straddle cache lines, threads do not share one


def _aligned(array: NDArray[np.generic]) -> int:
    """The first multiple of a cache line at or behind the start of the array."""
    return -(-array.ctypes.data // _LINE) * _LINE


class Memory:
    """Grows on demand, never shrinks. What was handed out before a growth stays valid while its arrays are referenced."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._next = np.zeros(_LINE, np.int64)
        self._scratch = np.zeros(0, np.float32)
        self._parts = np.zeros(0, np.float32)
        self._done = np.zeros(0, np.int64)

    def reserve(self, scratch: int, parts: int, units: int) -> tuple[int, int, int, int, int, tuple[object, ...]]:
        """Room for scratch fp32 elements per thread, parts in all, and one counter per unit.

        Returns addresses of the scratch, its size per thread (elements), the parts, the unit counters (0 at rest), the task
        counter, and the arrays to hold on to.
        """
        size = -(-scratch // 16) * 16
        if len(self._scratch) < size * self._threads + 16:
            self._scratch = np.zeros(size * self._threads + 16, np.float32)
        if len(self._parts) < parts + 16:
            self._parts = np.zeros(parts + parts // 4 + 16, np.float32)
        if len(self._done) < units:
            self._done = np.zeros(2 * units, np.int64)
        held = (self._scratch, self._parts, self._done, self._next)
        done, following = self._done.ctypes.data, _aligned(self._next)
        return _aligned(self._scratch), size, _aligned(self._parts), done, following, held
