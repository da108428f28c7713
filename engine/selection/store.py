"""Lists that outlive a step: the per-request, per-layer state of methods that reuse a selection in later steps.

    slot      one running request's place in the arrays; reused after `close`
    list      positions chosen at some step, all below `tail`; from `tail` on everything is visible

so at any later length n a row sees (sinks) + list + [tail, n): tokens generated since the selection are never invisible.
Positions are logical, so a sequence may also become shorter (rejected drafts) down to `tail`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.engine.slots import Indices, Slots

if TYPE_CHECKING:
    from kvloom.engine.request import Request

NONE = np.int32(2**31 - 1)
"""In `tail`: no list has been made."""


class ListStore:
    """State of the running requests of one selector, indexed [slot, layer]."""

    def __init__(self, layers: int, heads: int, width: int, query_size: int) -> None:
        """width: most positions per list; query_size: floats of the query kept with a list, 0 for none."""
        self._shape = (layers, heads, width, query_size)
        self.slots_held = Slots(self._move)
        self._allocate(0)

    @property
    def bytes_per_request(self) -> int:
        """Memory of one slot."""
        layers, heads, width, query_size = self._shape
        return layers * 4 * (heads * width + heads + 2 + query_size)

    @property
    def bytes(self) -> int:
        """Memory of all arrays, counted from them."""
        return sum(array.nbytes for array in (self.lists, self.counts, self.tail, self.made, self.query))

    def open(self, request: Request) -> None:
        """Give a request a slot without lists."""
        self.forget(np.array([self.slots_held.open(request)]))

    def close(self, request: Request) -> None:
        """Take the slot back."""
        self.slots_held.close(request)

    def slots(self, requests: Sequence[Request]) -> npt.NDArray[np.int64]:
        """[len(requests)], `NO_SLOT` for requests that never need a list: what is read with it is to be masked."""
        return self.slots_held.of(requests)

    def forget(self, slots: npt.NDArray[np.int64]) -> None:
        """These requests have no lists any more."""
        self.tail[slots] = NONE
        self.counts[slots] = 0

    def usable(self, slots: npt.NDArray[np.int64], layer: int, stops: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """Whether each has a list whose tail begins below its length."""
        found: npt.NDArray[np.bool_] = self.tail[slots, layer] < stops
        return found

    def _allocate(self, capacity: int) -> None:
        layers, heads, width, query_size = self._shape
        self.lists: Tensor = torch.zeros(capacity, layers, heads, width, dtype=torch.int32)
        """[slots, layers, heads, width]: ascending positions; entries past `counts` are meaningless."""
        self.counts = np.zeros((capacity, layers, heads), np.int32)
        self.tail = np.full((capacity, layers), NONE, np.int32)
        """Everything from here on is visible; `NONE` without a list."""
        self.made = np.zeros((capacity, layers), np.int32)
        """Known tokens when the list was made."""
        self.query = np.zeros((capacity, layers, query_size), np.float32)
        """The query that it was made for, flattened."""

    def _move(self, kept: Indices, capacity: int) -> None:
        lists, old = self.lists, (self.counts, self.tail, self.made, self.query)
        with torch.inference_mode(False):
            self._allocate(capacity)
        self.lists[: len(kept)] = lists[torch.from_numpy(kept)]
        for array, before in zip((self.counts, self.tail, self.made, self.query), old):
            array[: len(kept)] = before[kept]
