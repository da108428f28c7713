"""One step of RazorAttention's view mode: where windows begin, what is added to the sums, and which heads see what."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvloom.engine.request import Request
from kvloom.engine.retention.compensation import Compensation, Tokens
from kvloom.engine.selection.base import Layer, RowsInStep, Selector
from kvloom.engine.selection.batch import Batch, Ints
from kvloom.kernels.interface import Plan

if TYPE_CHECKING:
    from kvloom.engine.selection.razor_view import RazorView


class Fold(NamedTuple):
    """Positions [first, last) of one request that leave the window in this step."""

    at: int
    """Where its sums begin."""
    table: Tensor
    first: int
    last: int


class RazorViewStep:
    """Decode rows, one per request. Local heads see sinks and their window, all others everything or by another method."""

    program = None

    def __init__(self, method: RazorView, batch: Batch) -> None:
        self._method, self._batch = method, batch
        beyond = method.inner is not None and batch.stops.min() > method.inner.budget  # else none is: see `levels`
        self._inner = _decoding(method.inner, batch) if beyond else None
        self._whole = None if beyond else batch.seen("whole", torch.zeros_like(batch.stop))
        self._local: Plan | None = None
        self._folds: list[Fold] = []
        self._tokens: Tokens | None = None
        self._lse: Tensor | None = None

    def attend(self, layer: Layer, out: Tensor, heads: Tensor | None = None, lse: Tensor | None = None) -> None:
        """See `RowsInStep`."""
        assert heads is None, "its heads are those of a layer"
        method, batch, index = self._method, self._batch, layer.layer
        local = self._local if self._local is not None else self._begin(layer.kv.k.shape[2])
        if method.state is not None:
            for at, table, first, last in self._folds:
                method.state.add(batch.states.words, at, index, layer.kv, table, first, last)
        some = method.any_local[index]
        own = self._lse if some else None
        lse = own if lse is None else lse
        whole = method.retrieval_heads[index] if some else None
        if self._whole is not None and method.any_retrieval[index]:
            batch.attend(layer, self._whole, out, heads=whole, lse=lse)
        if self._inner is not None:
            self._inner.attend(layer, out, whole, lse)
        if not some:
            return
        batch.attend(layer, local, out, heads=method.local_heads[index], lse=lse)
        if self._tokens is not None and own is not None and lse is not None:
            merged = own if lse is own else own.copy_(lse)  # who asks wants that of what was read
            self._tokens.merge(batch.kernels, index, layer.q, out, merged, batch.geometry.scale, method.local[index])

    def finish(self) -> None:
        """See `RowsInStep`."""
        if self._inner is not None:
            self._inner.finish()

    def _begin(self, block_size: int) -> Plan:
        """Where windows begin: in whole blocks, whose size is the cache's."""
        batch, method = self._batch, self._method
        drafts = np.array([request.drafts for request in batch.requests], np.int32)
        begins = method.window.begin(batch.stops - drafts, block_size).astype(np.int32)
        sinks = batch.sinks(np.where(begins > 0, method.window.sinks, 0))
        if method.state is not None and begins.any():
            at = batch.states.at(method.state, batch.requests)
            self._folds = _folds(method.state, batch, at, begins)
            self._tokens = method.state.tokens(batch.states.words, at, begins)
            self._lse = batch.scratch.take("razor lse", batch.rows, batch.geometry.q_heads)
        self._local = batch.seen("local", batch.tensor("begins", begins), sinks)
        return self._local


def _decoding(inner: Selector | None, batch: Batch) -> RowsInStep:
    """The same rows, as the retrieval heads' own method reads them."""
    assert inner is not None
    return inner.decode(replace(batch, name=f"{batch.name} inner"))


def _folds(state: Compensation, batch: Batch, at: Ints, begins: Ints) -> list[Fold]:
    """What is not in the sums yet. Sums of more than what leaves the window begin anew."""
    folds = []
    folded = state.to(batch.requests)
    for run in (begins != folded).nonzero()[0].tolist():
        request: Request = batch.requests[run]
        if folded[run] > begins[run]:
            state.forget(request)
        if begins[run]:
            first = state.advance(request, int(begins[run]))
            folds.append(Fold(int(at[run]), batch.tables[int(batch.of[run])], first, int(begins[run])))
    return folds
