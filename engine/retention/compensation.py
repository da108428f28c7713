"""The compensation token: one position that stands for all that local heads have dropped.

    out = (N e^(q.k') v' + sum e^(q.k) v) / (N e^(q.k') + sum e^(q.k))      sums over the kept, k', v' means over the N dropped

(RazorAttention, arXiv 2407.15891, section 3.3; scores scaled as attention's are.) So it is a one-token attention state with
the logit q.k' + ln N, merged with the state of what is kept. By Jensen's inequality its mass is at most the true one. Keys are
those of the cache, rotated: as positions differ, the fast-turning pairs of k' cancel.

A request's record holds sums of dropped K and V in fp32, which grow as the window moves on; nothing is read twice. What is
dropped is always [sinks, to), and the host knows `to`.
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

Ints = npt.NDArray[np.int32]

_PIECE = 64
"""Blocks that are gathered at once."""


class Compensation:
    """`Record` of a request: for every layer sums of K and V, [2, kv_heads, head_dim] fp32."""

    def __init__(self, layers: int, kv_heads: int | Sequence[int], group: int, head_dim: int, sinks: int) -> None:
        """kv_heads: in every layer, or of each; group: query heads per KV head; sinks: first positions, never dropped."""
        self._heads = [kv_heads] * layers if isinstance(kv_heads, int) else list(kv_heads)
        self._group, self._dim, self._sinks = group, head_dim, sinks
        ends = np.cumsum([2 * heads * head_dim for heads in self._heads])
        self._begins = [0, *ends.tolist()]
        self._to: dict[Request, int] = {}

    @property
    def words(self) -> int:
        """See `Record`."""
        return self._begins[-1]

    def opened(self, request: Request, words: Tensor) -> None:
        """Nothing is folded."""
        self._to[request] = 0  # `add` clears the sums

    def closed(self, request: Request) -> None:
        """See `Record`."""
        self._to.pop(request, None)

    def to(self, requests: Sequence[Request]) -> Ints:
        """[len(requests)]: the position behind the last one that is folded, 0 where none is."""
        return np.array([self._to.get(request, 0) for request in requests], np.int32)

    def forget(self, request: Request) -> None:
        """Nothing is folded any more."""
        self._to[request] = 0

    def advance(self, request: Request, to: int) -> int:
        """Say that everything up to `to` is folded: `add` must follow in every layer, from the position that is returned."""
        first = max(self._to[request], self._sinks)
        self._to[request] = to
        return first

    def add(self, words: Tensor, at: int, layer: int, kv: PagedKV, table: Tensor, first: int, last: int) -> None:
        """Add positions [first, last) of one layer. words: of all requests; at: where the request's record begins;
        table: block ids in sequence order."""
        heads, size, begin = self._heads[layer], kv.k.shape[2], at + self._begins[layer]
        if not heads:
            return
        sums = words[begin : begin + 2 * heads * self._dim].view(torch.float32).view(2, heads, self._dim)
        if first <= self._sinks:
            sums.zero_()
        for block in range(first // size, -(-last // size), _PIECE):
            stop = min(block + _PIECE, -(-last // size))
            blocks = table[block:stop].long()
            for total, cache in zip(sums, kv):
                piece = cache[blocks]  # a copy
                piece[0, :, : max(0, first - block * size)] = 0.0
                piece[-1, :, size - max(0, stop * size - last) :] = 0.0
                total += piece.sum(dim=(0, 2), dtype=torch.float32)

    def fold(self, words: Tensor, at: int, layers: Sequence[PagedKV], request: Request, table: Tensor, to: int) -> None:
        """Add what is not in the sums yet, up to `to`, in every layer."""
        first = self.advance(request, to)
        for layer, kv in enumerate(layers):
            self.add(words, at, layer, kv, table, first, to)

    def tokens(self, words: Tensor, at: Ints, to: Ints) -> Tokens:
        """What `merge` needs of rows. at: [rows], where records begin; to: [rows], what is folded, 0 for rows without."""
        dropped = np.maximum(to - np.int32(self._sinks), 0).astype(np.float32)
        return Tokens(self, words, torch.from_numpy(np.maximum(at, 0)), torch.from_numpy(dropped))


class Tokens:
    """Compensation tokens of some rows in one step."""

    def __init__(self, state: Compensation, words: Tensor, at: Tensor, dropped: Tensor) -> None:
        self._state, self._floats, self._at = state, words.view(torch.float32), at.long()
        self.rows = len(at)
        self._counts = dropped.clamp(min=1.0)[:, None, None, None]
        self._none = (dropped == 0)[:, None, None, None]
        self._bias = dropped.log()[:, None]
        """[rows, 1]: ln N, -inf where nothing is dropped."""

    def merge(
        self, kernels: Kernels, layer: int, q: Tensor, out: Tensor, lse: Tensor, scale: float, mask: Tensor | None = None
    ) -> None:
        """Merge the tokens into an attention state in place; rows that dropped nothing stay as they are, to the bit.

        q, out: [rows, q_heads, head_dim], of any row stride; lse: [rows, q_heads] fp32, contiguous;
        mask: [kv_heads] bool, the heads that have a token (by default all).
        """
        state = self._state
        heads, begin = state._heads[layer], state._begins[layer]
        where = self._at[:, None] + torch.arange(begin, begin + 2 * heads * state._dim)
        means = self._floats[where].view(-1, 2, heads, state._dim) / self._counts
        means.masked_fill_(self._none, 0.0)  # there may be anything
        keys, values = means.repeat_interleave(state._group, dim=2).unbind(1)
        logit = torch.add(self._bias, torch.mul(q, keys).sum(dim=-1), alpha=scale)  # fp32, whatever q is
        if mask is not None:
            logit.unflatten(1, (-1, state._group)).masked_fill_(~mask[:, None], -torch.inf)
        merged = out if out.is_contiguous() else out.contiguous()
        kernels.merge(merged, lse, values.to(out.dtype).contiguous(), logit)
        if merged is not out:
            out.copy_(merged)
