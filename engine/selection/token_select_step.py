"""One step of TokenSelect: who votes, who uses a list again, and what is read. `token_select` has the paper.

DecodeStep   decode rows: Selection Cache (Algorithm 1), vote, lists that outlive the step
PromptStep   cells of sparse prompts: one list per cell, by the mean of its queries
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.engine.selection.base import Layer
from kvloom.engine.selection.batch import EVERY, Batch, Ints
from kvloom.engine.selection.token_select_positions import Indices, Reindexed, TurnBack, neutral_query, neutral_scores
from kvloom.kernels.interface import PagedKV

if TYPE_CHECKING:
    from kvloom.engine.selection.token_select import Split, TokenSelect

MOST_LOGITS = 1 << 22
"""Scores that are made at once: a prompt of small cells has many queries, and work space is kept."""

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]


class DecodeStep:
    """`LayerHook` of decode rows, one per request."""

    def __init__(self, method: TokenSelect, batch: Batch) -> None:
        self.method, self.batch = method, batch
        self.long: Bools = batch.stops > method.budget
        self.any_long = bool(self.long.any())
        if not self.any_long:
            return
        store = method.store
        self.slots = store.slots(batch.requests)
        self._first_list = torch.from_numpy(np.maximum(self.slots, 0) * batch.geometry.layers)
        tails, made = store.tail[self.slots].T, store.made[self.slots].T
        self._usable: Bools = self.long & (tails < batch.stops) & (batch.stops - made <= method.max_gap)
        """[layers, runs]: rows with a list that is young enough."""
        self._tails = np.where(self.long, tails, np.int32(0))
        """[layers, runs]: where tails begin, once this step's selections are made."""
        self._lengths = np.where(self.long, np.int32(method.split.width), np.int32(0))[:, None]
        self._shown: Ints | None = None
        (self._long_runs,) = self.long.nonzero()
        self._turn_back = TurnBack(batch.begins, batch.geometry.inv_freq)
        self._reindexed: Reindexed | None = None
        if method.reindexed:
            batch.see(self._long_runs, batch.stops[self._long_runs], 0)

    def before(self, layer: Layer) -> None:
        if not self.any_long:
            return
        batch, at = self.batch, layer.layer
        query = self._query(layer) if self.method.compares else None
        hits = self._hits(at, query)
        (misses,) = (self.long & ~hits).nonzero()
        if len(misses):
            self._select(layer, misses)
            if query is not None:
                self.method.store.query[self.slots[misses], at] = query[misses]
        torch.index_select(self.method.store.lists.flatten(0, 1)[:, 0], 0, self._first_list + at, out=self._room())
        if not self.method.reindexed and (self._shown is None or not np.array_equal(self._shown, self._tails[at])):
            self._shown = self._tails[at]
            batch.see(EVERY, self._shown, self._lengths)
        batch.stats.selections += len(misses)
        batch.stats.reused += len(self._long_runs) - len(misses)

    def after(self, layer: Layer, logits: Tensor | None, out: Tensor) -> None:
        """Re-indexed positions: attend to copies of what was chosen."""
        if not self.any_long or not self.method.reindexed:
            return
        batch, runs, starts = self.batch, self._long_runs, self._tails[layer.layer][self._long_runs]
        if self._reindexed is None or not np.array_equal(self._reindexed.starts, starts):
            self._reindexed = Reindexed(batch, runs, starts, self.method.split.width, layer.kv.k.shape[2])
        self._reindexed.attend(layer, out)
        batch.attended[runs] += self._reindexed.counts

    def _room(self) -> Tensor:
        return self.batch.lists[:, 0, : self.method.split.width]

    def _query(self, layer: Layer) -> Floats:
        """Queries turned back to position 0, at unit length, all heads in one vector: [runs, q_heads * head_dim].

        Where a query stands does not count: what it asks of far tokens hardly depends on it, and lists are used longer.
        """
        flat: Floats = self._turn_back(layer.q).flatten(1).numpy()
        lengths = np.sqrt(np.vecdot(flat, flat))
        unit: Floats = np.divide(flat, np.maximum(lengths, 1e-30)[:, None], dtype=np.float32)
        return unit

    def _hits(self, at: int, query: Floats | None) -> Bools:
        """[runs]: whose list is used again."""
        usable = self._usable[at]
        if query is None:
            return usable if self.method.options.theta <= 1.0 else np.zeros_like(usable)
        if not usable.any():
            return usable
        cosines = np.vecdot(query, self.method.store.query[self.slots, at])
        hits: Bools = usable & (cosines >= self.method.options.theta)
        return hits

    def _select(self, layer: Layer, misses: Indices) -> None:
        """New lists for some rows, kept and shown."""
        method, batch, at = self.method, self.batch, layer.layer
        stops, slots = batch.stops[misses], self.slots[misses]
        q = layer.q if len(misses) == batch.runs else layer.q[torch.from_numpy(misses)]
        lists = vote(method, batch, method.split, q, layer.kv, batch.table[misses], stops - 1)
        tails = stops - np.int32(method.split.local)
        store = method.store
        store.lists[torch.from_numpy(slots), at, 0] = lists
        store.counts[slots, at] = method.split.width
        store.tail[slots, at] = self._tails[at, misses] = tails
        store.made[slots, at] = stops


class PromptStep:
    """`LayerHook` of sparse prompts, a run per cell."""

    def __init__(self, method: TokenSelect, batch: Batch) -> None:
        assert method.prompt is not None, "prompts are dense"
        self.method, self.batch, self.split = method, batch, method.prompt
        (self.runs,) = (batch.begins >= self.split.budget).nonzero()
        if not len(self.runs):
            return
        begins = batch.begins[self.runs]
        starts = begins + np.int32(1 - self.split.local)
        self._reindexed: Reindexed | None = None
        if method.reindexed:  # rows see only their own cell here, and are written anew in `after`
            batch.see(self.runs, begins, 0)
        else:
            batch.see(self.runs, starts, self.split.width)
        self._rows = np.cumsum(batch.counts) - batch.counts
        self._begins, self._starts, self._which = begins, starts, torch.from_numpy(self.runs)

    def before(self, layer: Layer) -> None:
        if not len(self.runs):
            return
        batch = self.batch
        lists = vote(self.method, batch, self.split, self._means(layer.q), layer.kv, batch.table[self.runs], self._begins)
        batch.lists[self._which, 0, : self.split.width] = lists
        batch.stats.selections += len(self.runs)

    def after(self, layer: Layer, logits: Tensor | None, out: Tensor) -> None:
        if not len(self.runs) or not self.method.reindexed:
            return
        if self._reindexed is None:
            self._reindexed = Reindexed(self.batch, self.runs, self._starts, self.split.width, layer.kv.k.shape[2])
        self._reindexed.attend(layer, out)

    def _means(self, q: Tensor) -> Tensor:
        """Mean queries of the sparse cells: [sparse runs, q_heads, head_dim] in the model's dtype."""
        sums = np.add.reduceat(q.float().numpy(), self._rows, axis=0)[self.runs]
        return torch.from_numpy(sums / self.batch.counts[self.runs, None, None].astype(np.float32)).to(q.dtype)


def vote(method: TokenSelect, batch: Batch, split: Split, q: Tensor, kv: PagedKV, table: Ints, positions: Ints) -> Tensor:
    """Sinks and the k candidates with most votes (Eq. 7): [queries, width] int32 (scratch), ascending.

    q: [queries, q_heads, head_dim], each at its position p: candidates are [n_init, p + 1 - n_local), more than k of them.
    """
    lists = batch.scratch.take("lists", len(table), split.width, dtype=torch.int32)
    lists[:, : split.sinks] = torch.arange(split.sinks, dtype=torch.int32)
    at_once = max(1, MOST_LOGITS // (q.shape[1] * max(1, int(positions.max(initial=0)))))
    for first in range(0, len(table), at_once):
        part = slice(first, first + at_once)
        _vote(method, batch, split, q[part], kv, table[part], positions[part], lists[part, split.sinks :])
    return lists


def _vote(
    method: TokenSelect, batch: Batch, split: Split, q: Tensor, kv: PagedKV, table: Ints, positions: Ints, chosen: Tensor
) -> None:
    """The same for as many queries as there is work space for. chosen: [queries, k], written."""
    first, last = np.full(len(table), split.sinks, np.int32), positions + np.int32(1 - split.local)
    if method.reindexed:
        q = neutral_query(batch, q, positions, split.local)
        logits = neutral_scores(batch, method.turn_back(), q, kv, table, first, last, method.scale)
    else:
        logits = batch.score(q, kv, table, first, last, method.scale)
    columns = last - first
    ranking = batch.rank(logits, np.zeros_like(columns), columns, 1, how="sum", window=method.options.pool)
    counts = batch.scratch.take("counts", len(table), dtype=torch.int32)
    batch.kernels.select(
        ranking[:, 0], torch.from_numpy(columns), split.chosen, offset=torch.from_numpy(first), out=(chosen, counts)
    )
