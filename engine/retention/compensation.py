"""The compensation token: one position that stands for all that local heads have dropped.

    out = (N e^(q.k') v' + sum e^(q.k) v) / (N e^(q.k') + sum e^(q.k))      sums over the kept, k', v' means over the N dropped

(RazorAttention, arXiv 2407.15891, section 3.3; scores scaled as attention's are.) So it is one more position that rows
see, with the logit q.k' + ln N (`kernels.Folded`). By Jensen's inequality its mass is at most the true one. Keys are those of
the cache, rotated: as positions differ, the fast-turning pairs of k' cancel.

A request's record holds sums of dropped K and V in fp32, which grow as the window moves on (`Kernels.fold`); nothing is read
twice. What is dropped is always [sinks, to), and the host knows `to`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kvloom.kernels.interface import Folded, Kernels, PagedKV

if TYPE_CHECKING:
    from kvloom.engine.requests.request import Request

Ints = npt.NDArray[np.int32]


class Leaving(NamedTuple):
    """Positions that leave windows in a step, a row for each request; all tensors int32, as `Kernels.fold` takes them."""

    tables: Tensor
    """[requests, max_blocks]"""
    request: Tensor
    """[n]: row of `tables`."""
    first: Tensor
    last: Tensor
    """[n]: what leaves is [first, last)."""
    at: Tensor
    """[n]: where a request's record begins; negative, and nothing is added to it."""
    most: int
    """At least the largest last - first."""


class Compensation:
    """`Record` of a request: for every layer sums of K and V, [2, kv_heads, head_dim] fp32; and up to where they reach."""

    def __init__(self, layers: int, kv_heads: int | Sequence[int], head_dim: int, sinks: int) -> None:
        """kv_heads: in every layer, or of each; sinks: first positions, never dropped."""
        heads = [kv_heads] * layers if isinstance(kv_heads, int) else kv_heads
        self._sinks = sinks
        self._begins = [0, *np.cumsum([2 * n * head_dim for n in heads]).tolist()]
        self._to: dict[Hashable, int] = {}

    @property
    def words(self) -> int:
        """See `Record`."""
        return int(self._begins[-1])

    def opened(self, request: Hashable, words: Tensor) -> None:
        """Nothing is folded: the first `fold` clears the sums."""
        self._to[request] = 0

    def closed(self, request: Hashable) -> None:
        """See `Record`."""
        self._to.pop(request, None)

    def advance(self, requests: Sequence[Request], to: Ints) -> Ints:
        """Say that of these requests all that is dropped, [sinks, to), is in the sums; nothing, where `to` is 0.

        Returns [len(requests)]: from where `fold` must add positions up to `to`, in every layer; not below `to` if there are
        none. Sums that hold more begin anew.
        """
        known = np.array([self._to[request] for request in requests], np.int32)
        self._to.update(zip(requests, to.tolist()))
        return np.maximum(np.where(known > to, 0, known), np.int32(self._sinks))

    def dropped(self, to: Ints) -> Ints:
        """How many positions are, up to `to`: N."""
        return np.maximum(to - np.int32(self._sinks), 0)

    def fold(self, kernels: Kernels, words: Tensor, layer: int, kv: PagedKV, leaving: Leaving) -> None:
        """Add what leaves windows to a layer's sums. words: of all requests."""
        own = words[self._begins[layer] :]
        kernels.fold(kv, *leaving[:4], own, leaving.at, origin=self._sinks, most=leaving.most)

    def folded(self, words: Tensor, layer: int, at: Tensor, dropped: Tensor) -> Folded:
        """The tokens of rows in a layer. at: [rows] int32, where records begin; dropped: [rows] int32, see above."""
        return Folded(words[self._begins[layer] :], at, dropped)
