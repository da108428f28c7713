"""One step of TokenSelect: who votes, who uses a list again, and what is read. `token_select` has the paper.

DecodeStep   decode rows: Selection Cache (Algorithm 1), vote, lists that outlive the step
ReindexedStep   the same with positions of the release (`token_select_positions`)
PromptStep   cells of sparse prompts: one list per cell, by the mean of its queries
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvloom.engine.selection.base import Layer
from kvloom.engine.selection.batch import Batch, Ints, Plans
from kvloom.engine.selection.lists import Renewed
from kvloom.engine.selection.token_select_positions import Reindexed, neutral_query, neutral_scores
from kvloom.kernels.interface import Lists, Rows

if TYPE_CHECKING:
    from kvloom.engine.selection.token_select import Split, TokenSelect

MOST_LOGITS = 1 << 22
"""Scores that are made at once: a prompt of small cells has many queries, and work space is kept."""


class DecodeStep:
    """Decode rows, one per request."""

    def __init__(self, method: TokenSelect, batch: Batch) -> None:
        self._method, self._batch = method, batch
        self._rows = Renewed(batch, method.lists, method.renewal, _angles(batch), shared=True)
        self._due = batch.tensor("due", np.full(batch.rows, method.due))
        self._span = batch.span("candidates", method.split.sinks, batch.stops - method.split.local)
        self.program = self._span.width

    def attend(self, layer: Layer, out: Tensor, heads: Tensor | None = None, lse: Tensor | None = None) -> None:
        """See `RowsInStep`."""
        method, batch, rows, span = self._method, self._batch, self._rows, self._span
        words = rows.renew(layer, self._due)
        logits = batch.score(layer, span, method.scale, rows.active)
        ranking = batch.rank(logits, span.zeros, span.columns, 1, how="sum", window=method.options.pool, active=rows.active)
        method.lists.select(batch, words, ranking, span, rows.active)
        batch.attend(layer, rows.plans, out, positions=words, heads=heads, lse=lse)

    def finish(self) -> None:
        """See `RowsInStep`."""
        self._rows.finish()


class ReindexedStep:
    """The same with re-indexed positions: chooses by scores of turned keys, and attends to turned copies of what it chose.

    Copies are cut to what a step reads, so their shapes depend on which rows renew: the host asks for that in every layer.
    """

    program = None

    def __init__(self, method: TokenSelect, batch: Batch) -> None:
        self._method, self._batch = method, batch
        self._rows = Renewed(batch, method.lists, method.renewal, _angles(batch), shared=True)
        self._due = batch.tensor("due", np.full(batch.rows, method.due))
        self._reindexed: Reindexed | None = None

    def attend(self, layer: Layer, out: Tensor, heads: Tensor | None = None, lse: Tensor | None = None) -> None:
        """See `RowsInStep`."""
        assert heads is None, "re-indexed positions are for all heads of a layer"
        method, batch, rows = self._method, self._batch, self._rows
        words = rows.renew(layer, self._due)
        at = method.lists.offsets(rows.at, 1)[:, 0].long()
        lists = words[at[:, None] + torch.arange(method.split.width)]
        misses = (rows.active >= 0).nonzero()[:, 0]
        if len(misses):
            which = misses.numpy()
            lists[misses] = vote(method, batch, method.split, layer._replace(q=layer.q[misses]), batch.of[which],
                                 batch.stops[which] - 1)  # fmt: skip
            words[at[misses, None] + torch.arange(method.split.width)] = lists[misses]
        starts = rows.start.numpy()
        if self._reindexed is None or not np.array_equal(self._reindexed.starts, starts):
            self._reindexed = Reindexed(batch, np.arange(batch.rows), starts, method.split.width, layer.kv.k.shape[2])
        self._reindexed.attend(layer, lists, out, batch.read)

    def finish(self) -> None:
        """See `RowsInStep`."""
        self._rows.finish()


class PromptStep:
    """Sparse prompts, a run per cell. Cells that begin within the budget see everything."""

    program = None

    def __init__(self, method: TokenSelect, batch: Batch) -> None:
        assert method.prompt is not None, "prompts are dense"
        self._method, self._batch, self._split = method, batch, method.prompt
        sparse = batch.begins >= self._split.budget
        (self._runs,) = sparse.nonzero()
        self._first_rows = np.cumsum(batch.counts) - batch.counts
        self._begins = batch.begins[self._runs]
        self._starts = self._begins + np.int32(1 - self._split.local)
        if method.reindexed:  # rows of sparse cells see only their own cell at first, and are written anew
            start, lengths = np.where(sparse, batch.begins, 0), np.zeros_like(batch.begins)
        else:
            start = np.where(sparse, batch.begins + np.int32(1 - self._split.local), 0)
            lengths = np.where(sparse, np.int32(self._split.width), 0)
        self._lists = batch.ints("prompt lists", len(batch.counts), self._split.width)
        self._which = torch.from_numpy(self._runs)
        self._reindexed: Reindexed | None = None
        self._plans = self._planned(start, lengths)

    def attend(self, layer: Layer, out: Tensor, heads: Tensor | None = None, lse: Tensor | None = None) -> None:
        """See `RowsInStep`."""
        batch = self._batch
        lists = None
        if len(self._runs):
            means = layer._replace(q=self._means(layer.q))
            lists = vote(self._method, batch, self._split, means, batch.of[self._runs], self._begins)
            self._lists[self._which] = lists
        batch.attend(layer, self._plans, out, heads=heads, lse=lse)
        if lists is None or not self._method.reindexed:
            return
        if self._reindexed is None:
            self._reindexed = Reindexed(batch, self._runs, self._starts, self._split.width, layer.kv.k.shape[2])
        self._reindexed.attend(layer, lists, out)

    def finish(self) -> None:
        """See `RowsInStep`."""
        self._batch.stats.selections += len(self._runs) * self._batch.geometry.own_layers

    def _planned(self, start: Ints, lengths: Ints) -> Plans:
        """Rows of a run share its list and start. start, lengths: [runs]."""
        batch, width = self._batch, self._split.width
        run = np.repeat(np.arange(len(batch.counts)), batch.counts)
        stop = batch.begins[run] + np.arange(batch.rows) - self._first_rows[run] + 1
        table, starts, stops, offsets, counts = (
            batch.tensor(f"rows' {name}", values)
            for name, values in (("table", batch.of[run]), ("start", start[run]), ("stop", stop),
                                 ("offsets", run[:, None] * width), ("lengths", lengths[run][:, None]))
        )  # fmt: skip
        return batch.plan("prompt", Rows(batch.tables, table, starts, stops, Lists(self._lists.flatten(), offsets, counts)))

    def _means(self, q: Tensor) -> Tensor:
        """Mean queries of the sparse cells: [sparse runs, q_heads, head_dim] in the model's dtype."""
        sums = np.add.reduceat(q.float().numpy(), self._first_rows, axis=0)[self._runs]
        return torch.from_numpy(sums / self._batch.counts[self._runs, None, None].astype(np.float32)).to(q.dtype)


def _angles(batch: Batch) -> tuple[Tensor, Tensor]:
    """cos, sin [rows, rotary/2] fp32 of decode rows' positions."""
    turns = (batch.stop.double() - 1.0)[:, None] * batch.geometry.inv_freq.double()
    return batch.floats("cos", turns.cos()), batch.floats("sin", turns.sin())


def vote(method: TokenSelect, batch: Batch, split: Split, layer: Layer, of: Ints, positions: Ints) -> Tensor:
    """Sinks and the k candidates with most votes (Eq. 7): [queries, width] int32 (scratch), ascending.

    layer.q: [queries, q_heads, head_dim], each at its position p: candidates are [n_init, p + 1 - n_local), more than k of
    them. of: [queries] rows of `tables`.
    """
    lists = batch.ints("votes", len(of), split.width)
    lists[:, : split.sinks] = torch.arange(split.sinks, dtype=torch.int32)
    at_once = max(1, MOST_LOGITS // (layer.q.shape[1] * max(1, int(positions.max(initial=0)))))
    for first in range(0, len(of), at_once):
        part = slice(first, first + at_once)
        _vote(method, batch, split, layer._replace(q=layer.q[part]), of[part], positions[part], lists[part, split.sinks :])
    return lists


def _vote(method: TokenSelect, batch: Batch, split: Split, layer: Layer, of: Ints, positions: Ints, chosen: Tensor) -> None:
    """The same for as many queries as there is work space for. chosen: [queries, k], written."""
    first, last = np.full(len(of), split.sinks, np.int32), positions + np.int32(1 - split.local)
    if method.reindexed:
        q = neutral_query(batch, layer.q, positions, split.local)
        logits = neutral_scores(batch, method.turn_back(), q, layer.kv, of, first, last, method.scale)
        begin, columns = torch.from_numpy(first), torch.from_numpy(last - first)
        zeros = torch.zeros_like(begin)
    else:
        span = batch.spans("votes", batch.tensor("votes of", of), first, last)
        logits = batch.score(layer, span, method.scale)
        begin, columns, zeros = span.first, span.columns, span.zeros
    ranking = batch.rank(logits, zeros, columns, 1, how="sum", window=method.options.pool)
    batch.kernels.select(ranking[:, 0], columns, split.chosen, offset=begin, out=(chosen, None))
