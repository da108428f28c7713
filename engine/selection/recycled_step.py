"""One step of Recycled Attention: which layers of which rows refresh, and how a list is made. `recycled` has the paper.

Schedule       when a layer of a request is due, by the request's length alone
RecycledStep   decode rows: recycle a list, or refresh it (densely, or by scores alone)
Seeding        last rows of a prompt: the first lists
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.engine.selection.base import Layer
from kvloom.engine.selection.batch import Batch, Ints
from kvloom.engine.selection.lists import Renewed
from kvloom.kernels.interface import Rows

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

    def due(self, stops: Ints) -> Ints:
        """[layers, len(stops)]: 1 where the stride makes a layer refresh at these lengths, 2 where queries are compared."""
        checks = _multiples(stops, self.check_phase, self.check_every)
        return np.where(_multiples(stops, self.phase, self.stride), 1, np.where(checks, 2, 0)).astype(np.int32)


def _multiples(stops: Ints, phase: npt.NDArray[np.int64], every: int) -> Bools:
    if every == 0:
        return np.zeros((len(phase), len(stops)), np.bool_)
    found: Bools = (stops[None, :] + phase[:, None]) % every == 0
    return found


class RecycledStep:
    """Decode rows, one per request."""

    def __init__(self, method: Recycled, batch: Batch) -> None:
        self._method, self._batch = method, batch
        self._rows = Renewed(batch, method.lists, method.renewal)
        self._due = [batch.tensor(f"due {layer}", due) for layer, due in enumerate(method.schedule.due(batch.stops))]
        """By layer, each at a place that does not depend on how many rows there are."""
        self._span = batch.span("candidates", method.sinks, batch.stops - method.recent)
        self._width = self._span.width + method.sinks + method.recent
        batch.reserve(self._width)
        self.program = self._span.width

    def attend(self, layer: Layer, out: Tensor, heads: Tensor | None = None, lse: Tensor | None = None) -> None:
        """See `RowsInStep`."""
        method, batch, rows, span = self._method, self._batch, self._rows, self._span
        words = rows.renew(layer, self._due[layer.layer])
        if method.emits:
            logits = batch.logits(layer.q, self._width)
            batch.attend(layer, rows.plans, out, positions=words, logits=logits, heads=heads, lse=lse)
            first, last = span.first, span.last
        else:
            logits = batch.score(layer, span, active=rows.active)
            first, last = span.zeros, span.columns
        ranking = batch.rank(logits, first, last, layer.heads, how="max", window=method.options.pool, active=rows.active)
        method.lists.select(batch, words, ranking, span, rows.active)
        if not method.emits:
            batch.attend(layer, rows.plans, out, positions=words, heads=heads, lse=lse)

    def finish(self) -> None:
        """See `RowsInStep`."""
        self._rows.finish()
        self._batch.stats.refreshes += int(self._rows.counts[1])


class Seeding:
    """Prompts' last chunks: dense, and looked at. A pass that verifies drafts goes by unused."""

    program = None

    def __init__(self, method: Recycled, batch: Batch) -> None:
        self._method, self._batch = method, batch
        run = np.repeat(np.arange(len(batch.counts)), batch.counts)
        first = np.cumsum(batch.counts) - batch.counts
        stop = batch.begins[run] + np.arange(batch.rows) - first[run] + 1
        table, stops = batch.tensor("row table", batch.of[run]), batch.tensor("row stop", stop)
        self._plans = batch.plan("seeding", Rows(batch.tables, table, torch.zeros_like(stops), stops))
        self._seeds = [
            _Seed(method, batch, i, int(end))
            for i, (request, end) in enumerate(zip(batch.requests, np.cumsum(batch.counts)))
            if not request.verifying and batch.stops[i] > method.budget
        ]

    def attend(self, layer: Layer, out: Tensor, heads: Tensor | None = None, lse: Tensor | None = None) -> None:
        """See `RowsInStep`."""
        self._batch.attend(layer, self._plans, out, heads=heads, lse=lse)
        for seed in self._seeds:
            seed.make(layer)

    def finish(self) -> None:
        """See `RowsInStep`."""
        self._batch.stats.selections += len(self._seeds) * self._batch.geometry.own_layers


class _Seed:
    """One prompt's lists: the sum of its last rows' rankings. Each row scores what it sees itself."""

    def __init__(self, method: Recycled, batch: Batch, run: int, end: int) -> None:
        """run: of the batch, whose last row is end - 1."""
        self._method, self._batch = method, batch
        rows, stop = min(method.options.seed_rows, int(batch.counts[run])), int(batch.stops[run])
        self._rows = slice(end - rows, end)
        last = np.clip(np.arange(stop - rows, stop) + 1, method.sinks, stop - method.recent).astype(np.int32)
        self._columns = (last - method.sinks).tolist()
        table = batch.tensor(f"seed table {run}", np.full(rows, batch.of[run]))
        self._span = span = batch.spans(f"seed {run}", table, np.full(rows, method.sinks, np.int32), last)
        self._last = replace(span, first=span.first[-1:], columns=span.columns[-1:])
        self._kept = Renewed(_alone(batch, run), method.lists, method.renewal)
        self._due = torch.ones(1, dtype=torch.int32)

    def make(self, layer: Layer) -> None:
        """The list of a layer."""
        method, batch = self._method, self._batch
        own = layer._replace(q=layer.q[self._rows])
        span = self._span
        ranking = batch.rank(
            batch.score(own, span), span.zeros, span.columns, layer.heads, how="max", window=method.options.pool
        )
        votes = ranking[-1:]  # the last row sees the most
        for row, columns in enumerate(self._columns[:-1]):
            votes[0, :, :columns] += ranking[row, :, :columns]
        words = self._kept.renew(own._replace(q=own.q[-1:]), self._due)
        method.lists.select(batch, words, votes, self._last, self._kept.active)


def _alone(batch: Batch, run: int) -> Batch:
    """The last row of a run as a batch of its own."""
    one = slice(run, run + 1)
    return replace(
        batch,
        requests=batch.requests[run : run + 1],
        counts=np.ones(1, np.int32),
        begins=batch.stops[one] - np.int32(1),
        of=batch.of[one],
        read=batch.read[:1],
        name=f"{batch.name} run {run}",
    )
