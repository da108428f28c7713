"""One step of Recycled Attention: which layers of which rows refresh, and how a list is made. `recycled` has the paper.

Schedule       when a layer of a request is due, by the request's length alone
RecycledStep   decode rows: recycle a list, or refresh it (densely, or by scores alone)
Seeding        last rows of a prompt: the first lists
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.engine.selection.base import Layer
from kvloom.engine.selection.batch import EVERY, Batch, Ints
from kvloom.engine.selection.recycled_query import Floats, similarity, summary

if TYPE_CHECKING:
    from kvloom.engine.selection.recycled import Recycled

Bools = npt.NDArray[np.bool_]


class Schedule(NamedTuple):
    """Due lengths: layer l at every N with (N + phase[l]) % stride == 0; the same for comparing queries."""

    stride: int
    """0: never."""
    check_every: int
    """0: never."""
    phase: npt.NDArray[np.int64]
    """[layers]"""
    check_phase: npt.NDArray[np.int64]

    @classmethod
    def of(cls, stride: int, check_every: int, layers: int, *, stagger: bool) -> Schedule:
        """Spread the layers evenly over a stride, so that every step has the same share of due ones."""
        order = np.arange(layers) if stagger else np.zeros(layers, np.int64)
        return cls(stride, check_every, order * max(1, stride) // layers, order * max(1, check_every) // layers)

    def due(self, stops: Ints) -> Bools:
        """[layers, len(stops)]: whether the stride makes a layer refresh at these lengths."""
        return _multiples(stops, self.phase, self.stride)

    def checks(self, stops: Ints) -> Bools:
        """[layers, len(stops)]: whether queries are compared."""
        return _multiples(stops, self.check_phase, self.check_every)


def _multiples(stops: Ints, phase: npt.NDArray[np.int64], every: int) -> Bools:
    if every == 0:
        return np.zeros((len(phase), len(stops)), np.bool_)
    found: Bools = (stops[None, :] + phase[:, None]) % every == 0
    return found


class RecycledStep:
    """`LayerHook` of decode rows, one per request."""

    def __init__(self, method: Recycled, batch: Batch) -> None:
        self.method, self.batch = method, batch
        self.slots = method.store.slots(batch.requests)
        long: Bools = batch.stops > method.budget
        self._active = bool(long.any())
        if not self._active:  # nobody need have a slot
            return
        tails = method.store.tail[self.slots].T
        have: Bools = tails < batch.stops
        self._refreshes: Bools = long & (method.schedule.due(batch.stops) | ~have)
        """[layers, rows]: which rows refresh; known beforehand but for what the comparison of queries adds."""
        recycles: Bools = long & ~self._refreshes
        self._compares: Bools = recycles & method.schedule.checks(batch.stops)
        self._start = np.where(recycles, tails, 0).astype(np.int32)
        self._lengths = np.where(recycles, method.width, 0).astype(np.int32)
        self._any_refreshes: Bools = np.asarray(self._refreshes.any(axis=1))
        self._any_compares: Bools = np.asarray(self._compares.any(axis=1))
        self._shown = b""
        """What rows see now: start and length of each, as bytes."""
        self._kept = method.store.lists.view(-1, method.heads * method.width).numpy()
        self._room = batch.lists.view(batch.runs, -1).numpy()
        self._first_list = self.slots * len(tails)
        batch.stats.refreshes += int((self._refreshes & have).sum())
        batch.stats.reused += int(recycles.sum())

    def before(self, layer: Layer) -> None:
        if not self._active:
            return
        at, method = layer.layer, self.method
        queries = None
        if self._any_compares[at] or (self._any_refreshes[at] and method.schedule.check_every):
            queries = summary(layer.q, method.options.compare)
        if self._any_compares[at] and queries is not None:
            self._compare(at, queries)
        self._show(at)
        if self._any_refreshes[at]:
            (rows,) = self._refreshes[at].nonzero()
            self.batch.stats.selections += len(rows)
            if queries is not None:
                method.store.query[self.slots[rows], at] = queries[rows].reshape(len(rows), -1)
            if method.options.refresh == "score":
                self._refresh_by_score(layer, rows)
            else:
                self.batch.emits = True

    def after(self, layer: Layer, logits: Tensor | None, out: Tensor) -> None:
        if logits is None:
            return
        batch, method, which = self.batch, self.method, self._refreshes[layer.layer]
        (rows,) = which.nonzero()
        first = np.where(which, method.sinks, 0).astype(np.int32)  # a row that recycles has no candidates
        last = np.where(which, batch.stops - method.recent, 0).astype(np.int32)
        ranking = batch.rank(logits, first, last, method.heads, how="max", window=method.options.pool)
        made = choose(method, batch, ranking, first, last)
        remember(method, layer.layer, self.slots[rows], made[torch.from_numpy(rows)], batch.stops[rows])

    def _show(self, at: int) -> None:
        """Rows that recycle see their lists, all others everything."""
        start, lengths = self._start[at], self._lengths[at]
        shown = start.tobytes() + lengths.tobytes()
        if shown != self._shown:  # neighbouring layers often agree, and a plan can stay
            self._shown = shown
            self.batch.see(EVERY, start, lengths[:, None])
        if lengths.any():
            np.take(self._kept, self._first_list + at, axis=0, out=self._room, mode="clip")  # "raise" copies twice

    def _compare(self, at: int, queries: Floats) -> None:
        """Refresh rows whose query is no longer like that of their last refresh."""
        options = self.method.options
        cosines = similarity(queries, self.method.store.query[self.slots, at])
        moved = self._compares[at] & (cosines <= options.similarity)
        if moved.any():
            self._refreshes[at] |= moved
            self._start[at, moved] = self._lengths[at, moved] = 0
            self._any_refreshes[at] = True
            self.batch.stats.refreshes += int(moved.sum())
            self.batch.stats.reused -= int(moved.sum())

    def _refresh_by_score(self, layer: Layer, rows: npt.NDArray[np.int64]) -> None:
        """Read the keys alone, and see the new lists at once."""
        batch, method = self.batch, self.method
        stops = batch.stops[rows]
        first, last = np.full(len(rows), method.sinks, np.int32), stops - np.int32(method.recent)
        ranking = ranked(method, batch, layer, torch.from_numpy(rows), batch.table[rows], first, last)
        made = choose(method, batch, ranking, first, last)
        batch.lists[torch.from_numpy(rows)] = made
        batch.see(rows, last, method.width)
        self._shown = b""
        remember(method, layer.layer, self.slots[rows], made, stops)


class Seeding:
    """`LayerHook` of prompts' last chunks: dense, and looked at. A pass that verifies drafts goes by unused."""

    def __init__(self, method: Recycled, batch: Batch) -> None:
        self.method, self.batch = method, batch
        self.slots = method.store.slots(batch.requests)
        ends = np.cumsum(batch.counts).tolist()
        self._runs = [
            (run, end)
            for run, (request, end) in enumerate(zip(batch.requests, ends))
            if not request.verifying and batch.stops[run] > method.budget
        ]

    def before(self, layer: Layer) -> None: ...

    def after(self, layer: Layer, logits: Tensor | None, out: Tensor) -> None:
        for run, end in self._runs:
            self._seed(layer, run, end)

    def _seed(self, layer: Layer, run: int, end: int) -> None:
        """One run's list: the sum of its last rows' rankings. Each row scores what it sees itself."""
        batch, method = self.batch, self.method
        rows = min(method.options.seed_rows, int(batch.counts[run]))
        stop, slot = int(batch.stops[run]), self.slots[run : run + 1]
        first = np.full(rows, method.sinks, np.int32)
        last = np.clip(np.arange(stop - rows, stop, dtype=np.int32) + 1, method.sinks, stop - method.recent)
        table = np.full(rows, batch.table[run], np.int32)
        ranking = ranked(method, batch, layer, slice(end - rows, end), table, first, last)
        votes = ranking[-1:]  # the last row sees the most
        for row, columns in enumerate((last - first)[:-1].tolist()):
            votes[0, :, :columns] += ranking[row, :, :columns]
        made = choose(method, batch, votes, first[-1:], last[-1:])
        remember(method, layer.layer, slot, made, batch.stops[run : run + 1])
        if method.schedule.check_every:
            query = summary(layer.q[end - 1 : end], method.options.compare)
            method.store.query[slot, layer.layer] = query.reshape(1, -1)
        batch.stats.selections += 1


def ranked(method: Recycled, batch: Batch, layer: Layer, rows: Tensor | slice, table: Ints, first: Ints, last: Ints) -> Tensor:
    """Scores of candidates [first, last) for some rows, from K alone: [rows, heads, columns], column 0 at `first`."""
    logits = batch.score(layer.q[rows], layer.kv, table, first, last, batch.geometry.scale)
    columns = last - first
    return batch.rank(logits, np.zeros_like(columns), columns, method.heads, how="max", window=method.options.pool)


def choose(method: Recycled, batch: Batch, ranking: Tensor, first: Ints, last: Ints) -> Tensor:
    """Sinks and the best candidates of each row and KV head: [rows, heads, width] int32 (scratch), ascending.

    ranking: [rows, heads, columns], column 0 at `first`. A row without candidates gets a list without meaning.
    """
    rows, heads = ranking.shape[:2]
    lists = batch.scratch.take("lists", rows * heads, method.width, dtype=torch.int32)
    lists[:, : method.sinks] = torch.from_numpy(method.sink_positions)
    counts = batch.scratch.take("counts", rows * heads, dtype=torch.int32)
    lengths, offset = (torch.from_numpy(np.repeat(array, heads)) for array in (last - first, first))
    batch.kernels.select(
        ranking.view(rows * heads, -1), lengths, method.chosen, offset=offset, out=(lists[:, method.sinks :], counts)
    )
    return lists.view(rows, heads, method.width)


def remember(method: Recycled, layer: int, slots: npt.NDArray[np.int64], lists: Tensor, stops: Ints) -> None:
    """Keep new lists: lists [rows, heads, width], made with `stops` tokens known."""
    store = method.store
    store.lists[torch.from_numpy(slots), layer] = lists
    store.counts[slots, layer] = method.width
    store.tail[slots, layer] = stops - method.recent
    store.made[slots, layer] = stops
