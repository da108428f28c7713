"""Places of open requests in arrays: state that outlives a step, of selection methods and of retention.

slot    an index that belongs to one request from `open` to `close`, then to another
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from kvloom.engine.request import Request

FIRST = 4
"""Slots that there are at the first request; then twice as many each time."""


class Slots:
    """Hands out slots, and asks for larger arrays when there are none."""

    def __init__(self, grow: Callable[[int, int], None]) -> None:
        """grow(before, after): called when arrays must have room for `after` slots and keep the first `before`."""
        self._grow = grow
        self._held: dict[Request, int] = {}
        self._free: list[int] = []
        self._capacity = 0

    def __len__(self) -> int:
        return len(self._held)

    def open(self, request: Request) -> int:
        """A slot for a request. Its contents are whatever was there."""
        if not self._free:
            before, self._capacity = self._capacity, max(FIRST, 2 * self._capacity)
            self._grow(before, self._capacity)
            self._free.extend(range(self._capacity - 1, before - 1, -1))
        slot = self._held[request] = self._free.pop()
        return slot

    def close(self, request: Request) -> None:
        """Take the slot back."""
        self._free.append(self._held.pop(request))

    def of(self, requests: Sequence[Request]) -> npt.NDArray[np.int64]:
        """[len(requests)]"""
        return np.array([self._held[request] for request in requests], np.int64)
