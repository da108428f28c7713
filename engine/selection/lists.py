"""Lists that outlive a step: the per-request, per-layer state of methods that use a selection again in later steps.

    list      positions chosen at some step, all below `tail`; from `tail` on everything is visible

so at any later length n a row sees (sinks) + list + [tail, n): tokens generated since the selection are never invisible.
Positions are logical, so a sequence may also become shorter (rejected drafts) down to `tail`.

Which rows make their lists anew in a layer is decided where the tensors are (`Kernels.renew`), and what is chosen goes into a
request's record at once. The host learns of it when the step is over, from counts.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from kvloom.engine.device import Download
from kvloom.engine.requests.traits import Layer
from kvloom.engine.selection.base import Counting
from kvloom.engine.selection.batch import Batch, Span
from kvloom.kernels.interface import NO_LIST, Compare, Lists, Renewal, Rows


class KeptLists:
    """`Record` of a request: for every layer a word for `tail`, its lists, and the query that they were made for."""

    def __init__(self, lists: Sequence[int], width: int, sinks: int, query: Sequence[int]) -> None:
        """lists, query: [layers], lists and floats, 0 for none; width: positions of a list, of which the first `sinks` are
        always 0, 1, 2 and so on."""
        self.width, self.sinks = width, sinks
        self._lists = lists
        words = [1 + count * width + floats if count else 0 for count, floats in zip(lists, query)]
        self._begins = [0, *accumulate(words)]

    @property
    def words(self) -> int:
        """See `Record`."""
        return self._begins[-1]

    def opened(self, request: Hashable, words: Tensor) -> None:
        """There are no lists."""
        for begin, count in zip(self._begins, self._lists):
            if count:
                words[begin] = NO_LIST
                lists = words[begin + 1 : begin + 1 + count * self.width].view(count, self.width)
                lists[:, : self.sinks] = torch.arange(self.sinks, dtype=torch.int32, device=words.device)

    def closed(self, request: Hashable) -> None:
        """See `Record`."""

    def of_layer(self, words: Tensor, layer: int) -> Tensor:
        """The words of all requests, begun so that a layer's state lies where the first one's would."""
        return words[self._begins[layer] :]

    def offsets(self, at: Tensor, lists: int) -> Tensor:
        """[len(at), lists] int32: where the lists of records begin, of a layer with so many."""
        return at[:, None] + (torch.arange(lists, dtype=torch.int32, device=at.device) * self.width + 1)

    def chosen(self, words: Tensor, lists: int) -> Tensor:
        """[lists, width - sinks]: where a record at 0 keeps what was chosen. words: `of_layer`."""
        shape, begin = (lists, self.width - self.sinks), words.storage_offset() + 1 + self.sinks
        return words.as_strided(shape, (self.width, 1), begin)

    def renewal(
        self, *, recent: int, most: int = NO_LIST, compare: Compare = "none", threshold: float = 0.0, dense: bool = False
    ) -> Renewal:
        """When they are renewed, and what is seen then; its `query` is that of a layer without lists."""
        return Renewal(0, 1, self.width, recent, min(most, NO_LIST), compare, threshold, dense)

    def select(self, batch: Batch, words: Tensor, ranking: Tensor, span: Span, at: Tensor) -> None:
        """Write the best candidates into records. ranking: [rows, lists, columns], column 0 at `span.first`; at: [rows] int32,
        where records begin, negative for rows that choose nothing."""
        batch.kernels.select(
            ranking, span.columns, self.width - self.sinks, offset=span.first, at=at,
            out=(self.chosen(words, ranking.shape[1]), None),
        )  # fmt: skip


class Renewed:
    """Decode rows of one step that read lists of their own, one row per request."""

    def __init__(
        self, batch: Batch, lists: KeptLists, how: Renewal, angles: tuple[Tensor, Tensor] | None = None, *, shared: bool = False
    ) -> None:
        """angles: see `Kernels.renew`; shared: the heads of a layer have one list, instead of each its own. A row sees no more
        than its list, and the tokens since that it may have."""
        self._batch, self._lists, self._angles = batch, lists, angles
        self.at = batch.at(lists)
        """[rows] int32: where records begin."""
        self.active, self.start = batch.ints("active", batch.rows), batch.ints("start", batch.rows)
        """[rows] int32: where records of rows that renew in this layer begin, -1 for all others; and where tails begin."""
        self.counts = batch.scratch.take(f"{batch.name} counts", 3, dtype=torch.int64).zero_()
        """Rows that made lists, those of them that had one, and rows that used theirs again; over all layers."""
        self._seen: dict[int, Lists] = {}
        self._how: dict[int, Renewal] = {}
        for heads in batch.geometry.counts:
            count = 1 if shared else heads
            offsets = batch.tensor(f"offsets {count}", lists.offsets(self.at, count))
            self._seen[heads] = Lists(batch.states.words, offsets, batch.ints(f"lengths {count}", batch.rows, count))
            self._how[heads] = how._replace(query=how.query + count * how.width)
        whole = np.iinfo(np.int32).max if how.dense else how.width + how.recent + how.most
        most = batch.column("most", np.minimum(batch.stops, np.int64(whole)))
        self.plans = batch.plan(
            "renewed", Rows(batch.tables, batch.table, self.start, batch.stop, None, most), lists=self._seen
        )

    def renew(self, layer: Layer, due: Tensor) -> Tensor:
        """Decide who renews in this layer. due: [rows] int32, see `Kernels.renew`. Returns `KeptLists.of_layer`."""
        words = self._lists.of_layer(self._batch.states.words, layer.layer)
        self._batch.kernels.renew(
            layer.q, words, self.at, self._batch.stop, due, self._how[layer.heads], self._angles, self.active, self.start,
            self._seen[layer.heads].lengths, self.counts,
        )  # fmt: skip
        return words

    def finish(self, *, refreshes: bool = False) -> Counting:
        """Count lists made and used again; and, if such are `refreshes`, those made by rows that had one."""
        found, stats = Download(self.counts), self._batch.stats

        def count() -> None:
            made, renewed, reused = found.read()
            stats.selections += made
            stats.refreshes += renewed if refreshes else 0
            stats.reused += reused

        return count
