"""Positions of TokenSelect's release: a key's place among those that are read, so that none leaves the trained length.

K is stored rotated at true positions, and attention depends on differences of positions only. So queries and tails stay as they
are, and the M keys of a list are turned to stand right in front of their tail, which begins at s:

    place in the list    0        1    ...   M - 1    |  tail
    position             s - M          ...  s - 1    |  s ... p          the release counts 0 ... M - 1, M ... M + p - s

Votes do not look at positions at all: every candidate is scored as if n_local tokens before the query (the release rotates
queries at n_local and leaves keys as they are), which needs candidates turned back to position 0.

Turned keys are copies in work space; the cache itself is not touched. V needs no turning, but is copied along.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.engine.device import upload
from kvloom.engine.requests.traits import Layer
from kvloom.engine.selection.batch import Batch, Ints, Plans
from kvloom.kernels.interface import PagedKV, Rows

Indices = npt.NDArray[np.int64]


class TurnBack:
    """Vectors as if at position 0. Its tables serve all layers, where `Kernels.rotate` would compute every angle anew."""

    def __init__(self, positions: Ints, inv_freq: Tensor) -> None:
        """positions: [n]; inv_freq: [rotary/2]"""
        angles = positions[:, None, None].astype(np.float64) * inv_freq.cpu().double().numpy()
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        self._cos, self._sin = np.concatenate([cos, cos], axis=-1), np.concatenate([sin, -sin], axis=-1)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., m, heads, head_dim], m <= n, at the first m positions. Returns fp32."""
        rows, rotary, values = x.shape[-3], self._cos.shape[-1], x.float().cpu().numpy()
        pairs = values[..., :rotary]
        swapped = pairs.reshape(*x.shape[:-1], 2, -1)[..., ::-1, :].reshape(pairs.shape)
        turned = pairs * self._cos[:rows] + swapped * self._sin[:rows]
        if rotary < x.shape[-1]:
            turned = np.concatenate([turned, values[..., rotary:]], axis=-1)
        return upload(turned, x.device)


def neutral_query(batch: Batch, q: Tensor, positions: Ints, local: int) -> Tensor:
    """Queries [n, q_heads, head_dim] that stand at `positions`, turned to position `local`: fp32."""
    delta = upload(np.int32(local) - positions, q.device)
    return batch.kernels.rotate(q.float(), delta, batch.geometry.inv_freq, q.new_empty(q.shape, dtype=torch.float32))


def neutral_scores(
    batch: Batch, turn_back: TurnBack, q: Tensor, kv: PagedKV, table: Ints, first: Ints, last: Ints, scale: float
) -> Tensor:
    """`Batch.score` with every key turned back to position 0, in fp32. A request's keys are turned once for all its queries.

    turn_back: over the positions 0, 1, 2 ... up to the end of the last block.
    """
    size = kv.k.shape[2]
    blocks = -(-int(last.max()) // size)
    tables, which = np.unique(table, return_inverse=True)
    device = batch.geometry.device
    ids = batch.tables[upload(tables, device)][:, :blocks].flatten()
    keys = torch.index_select(kv.k.transpose(1, 2), 0, ids)
    turned = _paged(turn_back(keys.view(len(tables), blocks * size, *keys.shape[2:])).flatten(0, 1), size)
    pages = torch.arange(len(ids), dtype=torch.int32, device=device).view(len(tables), blocks)
    of, begin, end = (upload(values, device) for values in (which.astype(np.int32), first, last))
    rows = Rows(pages, of, begin, end)
    out, plans = batch.logits(q, int((last - first).max())), batch.plan("neutral", rows)
    return batch.kernels.score(q, PagedKV(turned, turned), plans[turned.shape[1]], scale=scale, out=out)


class Reindexed:
    """Attention of some runs over copies of their lists and tails. Serves every layer in which tails begin at `starts`."""

    def __init__(self, batch: Batch, runs: Indices, starts: Ints, width: int, size: int) -> None:
        """runs, starts: [n]; width: entries of each run's list; size: tokens per block."""
        self.starts = starts.copy()
        self.counts = batch.stops[runs] - starts + np.int32(width)
        """[n]: positions that a run's last row reads."""
        self._batch, self._width, self._size = batch, width, size
        self._device = batch.geometry.device
        self._tables = batch.tables.cpu().numpy()[batch.of[runs]]
        self._pages = -(-int(self.counts.max()) // size)
        places = np.arange(self._pages * size, dtype=np.int32) + (starts - np.int32(width))[:, None]
        self._positions = np.minimum(places, batch.stops[runs, None] - 1)  # nobody reads what lies behind a run's end
        self._places = places[:, :width].copy()
        self._delta = np.zeros_like(places)
        ends, counts = np.cumsum(batch.counts)[runs], batch.counts[runs]
        own = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, counts)])
        self._rows = upload(own, self._device)
        self._plans = self._planned(counts)

    def attend(self, layer: Layer, lists: Tensor, out: Tensor, read: Tensor | None = None) -> None:
        """Write these runs' rows of out: [rows of the batch, q_heads, head_dim].

        lists: [n, width] int32; read: [rows of these runs] int64, see `Kernels.attend`.
        """
        batch, width = self._batch, self._width
        self._positions[:, :width] = lists.cpu().numpy()
        self._delta[:, :width] = self._places - self._positions[:, :width]
        found = np.take_along_axis(self._tables, self._positions // self._size, axis=1)
        blocks, offsets, delta = (upload(a.ravel(), self._device) for a in (found, self._positions % self._size, self._delta))
        keys, values = layer.kv.k[blocks, :, offsets], layer.kv.v[blocks, :, offsets]
        batch.kernels.rotate(keys, delta, batch.geometry.inv_freq, keys)
        kv = PagedKV(_paged(keys, self._size), _paged(values, self._size))
        q = layer.q[self._rows]
        scale = batch.geometry.scale
        out[self._rows] = batch.kernels.attend(q, kv, self._plans[layer.heads], scale=scale, out=torch.empty_like(q), read=read)

    def _planned(self, counts: Ints) -> Plans:
        """Row i of a run sees its list, and its tail up to itself."""
        runs = len(counts)
        pages = torch.arange(runs * self._pages, dtype=torch.int32, device=self._device).view(runs, self._pages)
        request = np.repeat(np.arange(runs, dtype=np.int32), counts)
        last = np.cumsum(counts, dtype=np.int32) - 1
        stop = np.repeat(self.counts - last, counts) + np.arange(len(request), dtype=np.int32)
        own, start, end = (upload(values, self._device) for values in (request, np.zeros_like(request), stop))
        rows = Rows(pages, own, start, end)
        return self._batch.plan("reindexed", rows)


def _paged(tokens: Tensor, size: int) -> Tensor:
    """[n * size, heads, head_dim] as blocks of `size` tokens."""
    return tokens.unflatten(0, (-1, size)).transpose(1, 2)
