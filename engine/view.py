"""What all rows of a step see, when selection methods are among them: the arrays that their batches write.

    chunk   the scheduler's: a run of one request's tokens
    run     rows that share a list; a chunk is one run, a sparse prompt one per grid cell
    row     one token

Order of rows: decode rows of methods that ask for logits, of other methods, of none; then prompts. So logits are only written
for the first rows of a step, however long the prompts behind them are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvloom.engine.scheduling.plan import Chunk
from kvloom.engine.selection.base import Geometry, LayerHook, Selector
from kvloom.engine.selection.batch import Batch, Ints, Scratch
from kvloom.kernels.interface import Kernels, Lists, Rows


class Place(NamedTuple):
    """How a chunk is computed; sorts into the order of rows."""

    rank: int
    """0: decode with logits, 1: decode of another method, 2: decode without one, 3: prompt of a method, 4: other rows."""
    group: int
    """Chunks with the same selector stand together."""
    chunk: int
    """Index in the step's plan."""

    @property
    def selects(self) -> bool:
        return self.rank in (0, 1, 3)


def arrange(chunks: Sequence[Chunk]) -> list[Place]:
    """The order of rows."""
    places = []
    for i, chunk in enumerate(chunks):
        selector = chunk.request.selector
        if chunk.decodes:
            if selector is None or not chunk.request.sparse:
                places.append(Place(2, 0, i))
            else:
                places.append(Place(0 if selector.emits else 1, id(selector), i))
        elif selector is not None and (selector.prompts == "sparse" or (selector.prompts == "seed" and chunk.samples)):
            places.append(Place(3, id(selector), i))
        else:
            places.append(Place(4, 0, i))
    return sorted(places)


class SparseView:
    """One step's visibility. Made by the runner, written by batches, read by `attention`."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        places: Sequence[Place],
        tables: Tensor,
        request: Tensor,
        stop: Tensor,
        geometry: Geometry,
        kernels: Kernels,
        scratch: Scratch,
    ) -> None:
        """tables: [chunks, max_blocks], request, stop: [rows], all int32 and in the order of `places`."""
        self._tables, self._request, self._stop = tables, request, stop
        self._places = places
        cuts = [_cut(chunks[place.chunk], place) for place in places]
        self.chunk_runs = np.cumsum([0, *map(len, cuts)])
        """Runs of the chunk at place i: [chunk_runs[i], chunk_runs[i + 1])."""
        table, begins, counts = (np.array(column, np.int32) for column in zip(
            *((i, begin, count) for i, cut in enumerate(cuts) for begin, count in cut)))  # fmt: skip
        runs = len(counts)
        self._counts: Ints = counts
        self._single = runs == len(request)
        self._start = np.zeros((runs, geometry.kv_heads), np.int32)
        self._offsets = np.zeros((runs, geometry.kv_heads), np.int32)
        self._lengths = np.zeros((runs, geometry.kv_heads), np.int32)
        self.batches: list[Batch] = []
        self.hooks: list[LayerHook] = []
        row_of = np.concatenate([[0], np.cumsum(counts)])
        spans = list(_spans(places))
        sizes = [self._size(places[lo], chunks, self.chunk_runs[hi] - self.chunk_runs[lo]) for lo, hi in spans]
        self._positions = scratch.take("positions", max(1, sum(sizes)), dtype=torch.int32)
        base = 0
        for (lo, hi), size in zip(spans, sizes):
            first, last = int(self.chunk_runs[lo]), int(self.chunk_runs[hi])
            selector = _selector(chunks[places[lo].chunk])
            here = slice(first, last)
            batch = Batch(
                requests=[chunks[places[i].chunk].request for i in table[here]],
                first_row=int(row_of[first]),
                counts=counts[here],
                begins=begins[here],
                stops=begins[here] + counts[here],
                tables=tables,
                table=table[here],
                start=self._start[here],
                offsets=self._offsets[here],
                lengths=self._lengths[here],
                lists=self._positions[base : base + size].view(last - first, selector.heads, selector.width),
                base=base,
                kernels=kernels,
                geometry=geometry,
                scratch=scratch,
                stats=selector.stats,
                decodes=places[lo].rank < 3,
            )
            base += size
            self.batches.append(batch)
            self.hooks.append(selector.decode(batch) if batch.decodes else selector.prefill(batch))
        self.spans = spans
        """Places of every batch: [lo, hi)."""

    @property
    def changed(self) -> bool:
        """Whether what is seen may have changed since `seen` was last called."""
        return any(batch.changed for batch in self.batches)

    def seen(self) -> bytes:
        """What every row sees now, as a key: equal keys, equal rows. Nothing has `changed` then."""
        for batch in self.batches:
            batch.changed = False
        return b"".join((self._start.tobytes(), self._offsets.tobytes(), self._lengths.tobytes()))

    def rows(self) -> Rows:
        """What every row sees now."""
        lists = Lists(self._positions, self._by_row(self._offsets), self._by_row(self._lengths))
        start = self._start if any(batch.per_head for batch in self.batches) else self._start[:, 0]
        return Rows(self._tables, self._request, self._by_row(start), self._stop, lists)

    def result(self, chunks: Sequence[Chunk]) -> tuple[list[float], list[bool]]:
        """After the step, for every chunk of the plan: positions its last row read (mean over layers and KV heads), and if it
        is a decode row, whether it saw everything in all layers. Adds to the methods' statistics."""
        attended, whole = [float(chunk.stop) for chunk in chunks], [True] * len(chunks)
        for batch, (lo, hi) in zip(self.batches, self.spans):
            if not batch.decodes:
                continue
            layers = batch.geometry.layers
            batch.stats.decode_rows += batch.runs
            batch.stats.attended += float(batch.attended.sum())
            batch.stats.held += int(batch.stops.sum()) * layers
            for place, seen, partial in zip(self._places[lo:hi], batch.attended, batch.partial):
                attended[place.chunk], whole[place.chunk] = float(seen) / layers, not partial
        return attended, whole

    def _by_row(self, array: Ints) -> Tensor:
        """A copy: a plan reads it until the next one is made, while hooks write the original."""
        return torch.from_numpy(array.copy() if self._single else np.repeat(array, self._counts, axis=0))

    def _size(self, place: Place, chunks: Sequence[Chunk], runs: int) -> int:
        selector = _selector(chunks[place.chunk])
        return int(runs) * selector.heads * selector.width


def _selector(chunk: Chunk) -> Selector:
    assert chunk.request.selector is not None
    return chunk.request.selector


def _spans(places: Sequence[Place]) -> list[tuple[int, int]]:
    """Stretches of places with one selector and rank."""
    spans: list[tuple[int, int]] = []
    for i, place in enumerate(places):
        if not place.selects:
            continue
        if spans and spans[-1][1] == i and places[i - 1][:2] == place[:2]:
            spans[-1] = (spans[-1][0], i + 1)
        else:
            spans.append((i, i + 1))
    return spans


def _cut(chunk: Chunk, place: Place) -> list[tuple[int, int]]:
    """A chunk's runs, as (first position, rows): one, or one per grid cell of a sparse prompt."""
    grid = _selector(chunk).grid if place.rank == 3 else 0
    if not grid:
        return [(chunk.start, chunk.count)]
    ends = [*range((chunk.start // grid + 1) * grid, chunk.stop, grid), chunk.stop]
    return [(begin, end - begin) for begin, end in zip([chunk.start, *ends], ends)]
