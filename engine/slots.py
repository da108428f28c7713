"""Places of requests in arrays: state that outlives a step, of selection methods and of retention.

slot    an index that belongs to one request from `open` to `close`, or until slots are handed out anew by `resize`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from kvloom.engine.request import Request

Indices = npt.NDArray[np.int64]

NO_SLOT = -1
"""Of a request that needs no state."""


class Slots:
    """Hands out slots, and has arrays made anew for another number of them."""

    def __init__(self, move: Callable[[Indices, int], None]) -> None:
        """move(kept, capacity): called when arrays must have room for `capacity` slots, of which the first are to hold what
        the slots `kept` held."""
        self._move = move
        self._held: dict[Request, int] = {}
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._held)

    @property
    def capacity(self) -> int:
        """Slots that there are."""
        return len(self._held) + len(self._free)

    @property
    def free(self) -> int:
        """Slots that nobody has."""
        return len(self._free)

    def open(self, request: Request) -> int:
        """A slot for a request. Its contents are whatever was there."""
        if not self._free:
            self.resize(grown(len(self._held)))
        slot = self._held[request] = self._free.pop()
        return slot

    def close(self, request: Request) -> None:
        """Take the slot back."""
        self._free.append(self._held.pop(request))

    def resize(self, capacity: int) -> None:
        """Have as many slots, at least those that are held. Everybody's slot may be another one afterwards."""
        assert capacity >= len(self._held), "slots that are held cannot be given up"
        self._move(np.fromiter(self._held.values(), np.int64, len(self._held)), capacity)
        self._held = {request: slot for slot, request in enumerate(self._held)}
        self._free = list(range(capacity - 1, len(self._held) - 1, -1))

    def of(self, requests: Sequence[Request]) -> Indices:
        """[len(requests)], `NO_SLOT` for those that have none."""
        return np.array([self._held.get(request, NO_SLOT) for request in requests], np.int64)


def grown(slots: int) -> int:
    """The next capacity of arrays whose slots are all taken: half as many more."""
    return slots + max(1, slots // 2)


class Slab(Protocol):
    """Arrays with a slot per request (`ListStore`, `Compensation`)."""

    slots_held: Slots
    """Who has which slot."""

    @property
    def bytes_per_request(self) -> int:
        """Memory of one slot."""
        ...

    @property
    def bytes(self) -> int:
        """Memory of all arrays, counted from them."""
        ...

    def open(self, request: Request) -> None:
        """Give a request a slot with empty state."""
        ...

    def close(self, request: Request) -> None:
        """Take the slot back."""
        ...
