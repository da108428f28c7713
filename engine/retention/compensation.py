"""The compensation token: one position that stands for all that local heads have dropped.

    out = (N e^(q.k') v' + sum e^(q.k) v) / (N e^(q.k') + sum e^(q.k))      sums over the kept, k', v' means over the N dropped

(RazorAttention, arXiv 2407.15891, section 3.3; scores scaled as attention's are.) So it is a one-token attention state with
the logit q.k' + ln N, merged with the state of what is kept. By Jensen's inequality its mass is at most the true one. Keys are
those of the cache, rotated: as positions differ, the fast-turning pairs of k' cancel.

Sums run in fp32 and grow as the window moves on; nothing is read twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.kernels.interface import Kernels, PagedKV

if TYPE_CHECKING:
    from kvloom.engine.request import Request

_PIECE = 64
"""Blocks that are gathered at once."""


class Compensation:
    """Sums of dropped K and V of all open requests, indexed by slot. Grows by doubling."""

    def __init__(self, layers: int, kv_heads: int | Sequence[int], group: int, head_dim: int, dtype: torch.dtype) -> None:
        """kv_heads: in every layer, or of each; group: query heads per KV head; dtype: the model's."""
        self._heads = [kv_heads] * layers if isinstance(kv_heads, int) else list(kv_heads)
        self._group, self._dim, self._dtype = group, head_dim, dtype
        self._slots: dict[Request, int] = {}
        self._free: list[int] = []
        self._allocate(0)

    @property
    def bytes_per_request(self) -> int:
        heads = sum(self._heads)
        return 8 + heads * self._dim * (2 * 4 + self._group * (4 + self._dtype.itemsize))

    def open(self, request: Request) -> None:
        """Give a request a slot in which nothing is folded."""
        if not self._free:
            self._grow()
        slot = self._slots[request] = self._free.pop()
        self.forget(np.array([slot]))

    def close(self, request: Request) -> None:
        """Take the slot back."""
        self._free.append(self._slots.pop(request))

    def slots(self, requests: Sequence[Request]) -> npt.NDArray[np.int64]:
        """[len(requests)]"""
        return np.array([self._slots[request] for request in requests], np.int64)

    def forget(self, slots: npt.NDArray[np.int64]) -> None:
        """Nothing is folded there any more."""
        self._count[slots] = self._to[slots] = 0
        for sums in self._sums:
            sums[torch.from_numpy(slots)] = 0.0

    def dropped_to(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """[len(slots)]: the position behind the last one that is folded, 0 where none is."""
        found: npt.NDArray[np.int32] = self._to[slots]
        return found

    def fold(self, slot: int, layers: Sequence[PagedKV], table: npt.NDArray[np.int32], first: int, last: int) -> None:
        """Add positions [first, last) of every layer. table: block ids in sequence order."""
        size = layers[0].k.shape[2]
        self._count[slot] += last - first
        self._to[slot] = last
        for begin in range(first // size, -(-last // size), _PIECE):
            end = min(begin + _PIECE, -(-last // size))
            blocks = torch.from_numpy(table[begin:end].astype(np.int64))
            inside = slice(max(first - begin * size, 0), min(last, end * size) - begin * size)
            for layer, kv in enumerate(layers):
                if self._heads[layer]:
                    for which, cache in enumerate(kv):
                        rows = cache[blocks].transpose(0, 1).flatten(1, 2)[:, inside]
                        self._sums[layer][slot, which] += rows.sum(dim=1, dtype=torch.float32)
        for layer, heads in enumerate(self._heads):
            if heads:
                means = (self._sums[layer][slot] / float(self._count[slot])).repeat_interleave(self._group, dim=1)
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
        """Merge the token into an attention state in place; rows whose slot has nothing folded stay as they are.

        q, out: [rows, q_heads, head_dim]; lse: [rows, q_heads] fp32; heads_mask: [kv_heads] bool, the heads that have one.
        """
        which = torch.from_numpy(slots)
        with np.errstate(divide="ignore"):
            count = torch.from_numpy(np.log(self._count[slots]).astype(np.float32))
        logit = (q.float() * self._keys[layer][which]).sum(dim=-1).mul_(scale).add_(count[:, None])
        if heads_mask is not None:
            logit.masked_fill_(~heads_mask.repeat_interleave(self._group), float("-inf"))
        kernels.merge(out, lse, self._values[layer][which], logit)

    def _allocate(self, capacity: int) -> None:
        dim, group = self._dim, self._group
        self._count = np.zeros(capacity, np.int64)
        self._to = np.zeros(capacity, np.int32)
        self._sums = [torch.zeros(capacity, 2, heads, dim) for heads in self._heads]
        """Per layer [slots, K and V, kv_heads, head_dim] fp32."""
        self._keys = [torch.zeros(capacity, heads * group, dim) for heads in self._heads]
        """Mean keys per query head, fp32."""
        self._values = [torch.zeros(capacity, heads * group, dim, dtype=self._dtype) for heads in self._heads]
        """Mean values per query head, in the model's dtype."""

    def _grow(self) -> None:
        count, to, before = self._count, self._to, len(self._count)
        tensors = [*self._sums, *self._keys, *self._values]
        with torch.inference_mode(False):
            self._allocate(max(4, 2 * before))
        self._count[:before], self._to[:before] = count, to
        for tensor, kept in zip([*self._sums, *self._keys, *self._values], tensors):
            tensor[:before] = kept
        self._free.extend(range(len(self._count) - 1, before - 1, -1))
