"""One step of RazorAttention's view mode: where windows begin, what is added to the sums, and which heads see what."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvloom.engine.retention.compensation import Compensation, Leaving
from kvloom.engine.selection.base import Layer, RowsInStep, Selector
from kvloom.engine.selection.batch import Batch, Ints
from kvloom.engine.state import NO_STATE
from kvloom.kernels.interface import Folded

if TYPE_CHECKING:
    from kvloom.engine.selection.razor_view import RazorView


class RazorViewStep:
    """Decode rows, one per request. Local heads see sinks and their window, all others everything or by another method."""

    def __init__(self, method: RazorView, batch: Batch) -> None:
        self._method, self._batch = method, batch
        beyond = method.inner is not None and batch.stops.min() > method.inner.budget  # else none is: see `levels`
        self._inner = _decoding(method.inner, batch) if beyond else None
        self._whole = None if beyond else batch.seen("whole", torch.zeros_like(batch.stop))
        self.program: Hashable = 0 if self._inner is None else self._inner.program
        """The other method's, whose programs are none of 0."""
        drafts = np.array([request.drafts for request in batch.requests], np.int32)
        begins = method.window.begin(batch.stops - drafts, batch.geometry.block_size).astype(np.int32)
        sinks = batch.sinks(np.where(begins > 0, method.window.sinks, 0))
        self._local = batch.seen("local", batch.tensor("begins", begins), sinks)
        self._sums = None if method.state is None else _Sums(method.state, batch, begins)

    def attend(self, layer: Layer, out: Tensor, heads: Tensor | None = None, lse: Tensor | None = None) -> None:
        """See `RowsInStep`."""
        assert heads is None, "its heads are those of a layer"
        method, batch, index = self._method, self._batch, layer.layer
        some = method.any_local[index]
        whole, local = (method.retrieval_heads[index], method.local_heads[index]) if some else (None, None)
        if self._whole is not None and method.any_retrieval[index]:
            batch.attend(layer, self._whole, out, heads=whole, lse=lse)
        if self._inner is not None:
            self._inner.attend(layer, out, whole, lse)
        if not some:
            return
        folded = None if self._sums is None else self._sums.grown(layer)
        if lse is not None:  # who asks wants that of what was read
            batch.kernels.attend(
                layer.q, layer.kv, self._local[layer.heads], scale=batch.geometry.scale, out=out, heads=local, lse=lse
            )
        batch.attend(layer, self._local, out, heads=local, folded=folded)

    def finish(self) -> None:
        """See `RowsInStep`."""
        if self._inner is not None:
            self._inner.finish()


class _Sums:
    """What is dropped up to where windows begin: sums that grow in every layer, and what rows see of them."""

    def __init__(self, state: Compensation, batch: Batch, begins: Ints) -> None:
        self._state, self._batch = state, batch
        self._at, self._dropped = batch.at(state), batch.tensor("dropped", state.dropped(begins))
        added = state.advance(batch.requests, begins)
        first, last = batch.tensor("first", added), batch.tensor("last", begins)
        leaving = batch.tensor("leaving", torch.where(first < last, self._at, NO_STATE))
        most = int((begins - added).max(initial=0))
        self._leaving = Leaving(batch.tables, batch.table, first, last, leaving, most)

    def grown(self, layer: Layer) -> Folded:
        """Add what leaves windows."""
        words = self._batch.states.words
        self._state.fold(self._batch.kernels, words, layer.layer, layer.kv, self._leaving)
        return self._state.folded(words, layer.layer, self._at, self._dropped)


def _decoding(inner: Selector | None, batch: Batch) -> RowsInStep:
    """The same rows, as the retrieval heads' own method reads them."""
    assert inner is not None
    return inner.decode(replace(batch, name=f"{batch.name} inner"))
