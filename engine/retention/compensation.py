"""The compensation token: one position that stands for all that local heads have dropped.

    out = (N e^(q.k') v' + sum e^(q.k) v) / (N e^(q.k') + sum e^(q.k))      sums over the kept, k', v' means over the N dropped

(RazorAttention, arXiv 2407.15891, section 3.3; scores scaled as attention's are.) So it is a one-token attention state with
the logit q.k' + ln N, merged with the state of what is kept. By Jensen's inequality its mass is at most the true one. Keys are
those of the cache, rotated: as positions differ, the fast-turning pairs of k' cancel.

Sums run in fp32 and grow as the window moves on; nothing is read twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.engine.slots import NO_SLOT, Indices, Slots
from kvloom.kernels.interface import Kernels, PagedKV

if TYPE_CHECKING:
    from kvloom.engine.request import Request

_PIECE = 64
"""Blocks that are gathered at once."""


class Compensation:
    """Sums of dropped K and V of the running requests, indexed by slot."""

    def __init__(self, layers: int, kv_heads: int | Sequence[int], group: int, head_dim: int, dtype: torch.dtype) -> None:
        """kv_heads: in every layer, or of each; group: query heads per KV head; dtype: of mean values."""
        self._heads = [kv_heads] * layers if isinstance(kv_heads, int) else list(kv_heads)
        self._group, self._dim, self._dtype = group, head_dim, dtype
        self.slots_held = Slots(self._move)
        self._allocate(0)

    @property
    def bytes_per_request(self) -> int:
        """Memory of one slot."""
        heads = sum(self._heads)
        return 16 + heads * self._dim * (2 * 4 + self._group * (4 + self._dtype.itemsize))

    @property
    def bytes(self) -> int:
        """Memory of all arrays, counted from them."""
        arrays, tensors = self._state()
        return sum(array.nbytes for array in arrays) + sum(tensor.nbytes for tensor in tensors)

    def open(self, request: Request) -> None:
        """Give a request a slot in which nothing is folded."""
        self.forget(np.array([self.slots_held.open(request)]))

    def close(self, request: Request) -> None:
        """Take the slot back."""
        self.slots_held.close(request)

    def slots(self, requests: Sequence[Request]) -> npt.NDArray[np.int64]:
        """[len(requests)], `NO_SLOT` for requests that never drop anything."""
        return self.slots_held.of(requests)

    def forget(self, slots: npt.NDArray[np.int64]) -> None:
        """Nothing is folded there any more."""
        self._count[slots] = self._to[slots] = 0
        self._biases.clear()
        which = torch.from_numpy(slots)
        self._log_count[which] = -torch.inf
        for sums in self._sums:
            sums[which] = 0.0

    def dropped_to(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """[len(slots)]: the position behind the last one that is folded, 0 where none is."""
        if not self.slots_held.capacity:
            return np.zeros(len(slots), np.int32)
        found: npt.NDArray[np.int32] = np.where(slots == NO_SLOT, np.int32(0), self._to[slots])
        return found

    def fold(self, slot: int, layers: Sequence[PagedKV], table: npt.NDArray[np.int32], first: int, last: int) -> None:
        """Add positions [first, last) of every layer. table: block ids in sequence order."""
        self.advance(slot, first, last)
        for layer, kv in enumerate(layers):
            self.add(layer, slot, kv, table, first, last)

    def advance(self, slot: int, first: int, last: int) -> None:
        """Say that positions [first, last) are folded too: `add` must follow for a layer before that layer merges again."""
        self._count[slot] += last - first
        self._to[slot] = last
        self._log_count[slot] = math.log(self._count[slot])
        self._biases.clear()

    def add(self, layer: int, slot: int, kv: PagedKV, table: npt.NDArray[np.int32], first: int, last: int) -> None:
        """Add positions [first, last) of one layer; they have been counted by `advance`."""
        if not self._heads[layer]:
            return
        size, sums = kv.k.shape[2], self._sums[layer][slot]
        end = -(-last // size)
        for begin in range(first // size, end, _PIECE):
            stop = min(begin + _PIECE, end)
            blocks = torch.from_numpy(table[begin:stop].astype(np.int64))
            for total, cache in zip(sums, kv):
                piece = cache[blocks]  # a copy
                piece[0, :, : max(0, first - begin * size)] = 0.0
                piece[-1, :, size - max(0, stop * size - last) :] = 0.0
                total += piece.sum(dim=(0, 2), dtype=torch.float32)
        means = (sums / float(self._count[slot])).repeat_interleave(self._group, dim=1)
        self._keys[layer][slot], self._values[layer][slot] = means[0], means[1].to(self._dtype)

    def merge(
        self,
        kernels: Kernels,
        layer: int,
        q: Tensor,
        slots: npt.NDArray[np.int64],
        out: Tensor,
        lse: Tensor,
        scale: float,
        heads_mask: Tensor | None = None,
    ) -> None:
        """Merge the token into an attention state in place; rows whose slot has nothing folded stay as they are, to the bit.

        q, out: [rows, q_heads, head_dim], of any row stride; lse: [rows, q_heads] fp32, contiguous;
        heads_mask: [kv_heads] bool, the heads that have a token (by default all).
        """
        which = torch.from_numpy(np.maximum(slots, 0))
        products = torch.mul(q, self._keys[layer].index_select(0, which)).sum(dim=-1)  # fp32, whatever q is
        logit = torch.add(self._bias(slots, q.shape[1], heads_mask), products, alpha=scale)
        values = self._values[layer].index_select(0, which)
        values = values if values.dtype == out.dtype else values.to(out.dtype)
        if out.is_contiguous():
            kernels.merge(out, lse, values, logit)
        else:
            merged = out.contiguous()
            kernels.merge(merged, lse, values, logit)
            out.copy_(merged)

    def _bias(self, slots: npt.NDArray[np.int64], heads: int, mask: Tensor | None) -> Tensor:
        """[rows, heads] fp32: ln N of every row, -inf for heads without a token. The same for many layers of a step."""
        key = (slots.tobytes(), heads, mask)  # a tensor is its own key
        found = self._biases.get(key)
        if found is None:
            found = self._log_count[torch.from_numpy(slots)][:, None].expand(-1, heads).clone()
            found[torch.from_numpy(slots == NO_SLOT)] = -torch.inf
            if mask is not None:
                found.unflatten(1, (-1, self._group)).masked_fill_(~mask[:, None], -torch.inf)
            self._biases[key] = found
        return found

    def _allocate(self, capacity: int) -> None:
        self._biases: dict[tuple[bytes, int, Tensor | None], Tensor] = {}
        """Of the rows that were merged since anything was folded or forgotten."""
        dim, group = self._dim, self._group
        self._count = np.zeros(capacity, np.int64)
        self._to = np.zeros(capacity, np.int32)
        self._log_count = torch.full((capacity,), -torch.inf)
        """ln N, -inf where nothing is folded."""
        self._sums = [torch.zeros(capacity, 2, heads, dim) for heads in self._heads]
        """Per layer [slots, K and V, kv_heads, head_dim] fp32."""
        self._keys = [torch.zeros(capacity, heads * group, dim) for heads in self._heads]
        """Mean keys per query head, fp32."""
        self._values = [torch.zeros(capacity, heads * group, dim, dtype=self._dtype) for heads in self._heads]
        """Mean values per query head."""

    def _move(self, kept: Indices, capacity: int) -> None:
        arrays, tensors = self._state()
        with torch.inference_mode(False):
            self._allocate(capacity)
        new_arrays, new_tensors = self._state()
        for array, old_array in zip(new_arrays, arrays):
            array[: len(kept)] = old_array[kept]
        for tensor, old_tensor in zip(new_tensors, tensors):
            tensor[: len(kept)] = old_tensor[torch.from_numpy(kept)]

    def _state(self) -> tuple[list[npt.NDArray[np.generic]], list[Tensor]]:
        """Everything that is indexed by slot."""
        return [self._count, self._to], [self._log_count, *self._sums, *self._keys, *self._values]
