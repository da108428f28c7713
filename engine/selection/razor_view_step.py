"""One step of RazorAttention's view mode: where windows begin, what is added to the sums, and which heads see what.

base     what all heads would see: everything, or what the retrieval heads' own method says, on arrays of its own
batch    the same with the local heads' columns written over
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.engine.retention.compensation import Compensation
from kvloom.engine.selection.base import Layer, LayerHook, Selector
from kvloom.engine.selection.batch import Batch, Ints
from kvloom.kernels.interface import PagedKV

if TYPE_CHECKING:
    from kvloom.engine.selection.razor_view import RazorView


class Fold(NamedTuple):
    """Positions [first, last) of one request that leave the window in this step."""

    slot: int
    table: Ints
    first: int
    last: int


class RazorViewStep:
    """`LayerHook` of decode rows, one per request. Rows within the budget see everything in all layers."""

    def __init__(self, method: RazorView, batch: Batch) -> None:
        self.method, self.batch = method, batch
        self._active = bool((batch.stops > method.budget).any())
        if not self._active:
            return
        batch.per_head = True
        self._base = _base(batch, method.inner)
        self._hook: LayerHook | None = None if method.inner is None else method.inner.decode(self._base)
        room, at = batch.lists.view(-1), self._base.lists.numel()
        room[at : at + method.window.sinks] = torch.arange(method.window.sinks, dtype=torch.int32)
        self._sinks_at = np.int32(batch.base + at)
        self._shown: npt.NDArray[np.bool_] | None = None
        self._begins: Ints = np.empty((0, 1), np.int32)
        """[rows, 1]: where windows begin; empty until the first layer."""
        self._folds: list[Fold] = []

    def before(self, layer: Layer) -> None:
        if not self._active:
            return
        if not len(self._begins):
            self._begin(layer.kv)
        if self._hook is not None:
            self._hook.before(layer)
        local = self.method.local[layer.layer]
        if local is not self._shown or self._base.changed:
            self._show(local)
        if self.method.state is not None:
            for fold in self._folds:
                self.method.state.add(layer.layer, fold.slot, layer.kv, fold.table, fold.first, fold.last)
            self.batch.wants_lse = self._drops and bool(local.any())

    def after(self, layer: Layer, logits: Tensor | None, out: Tensor) -> None:
        """Merge the compensation tokens of local heads."""
        if not self._active:
            return
        if self._hook is not None:
            self._hook.after(layer, logits, out)
        batch, state = self.batch, self.method.state
        if state is not None and batch.lse is not None:
            mask, scale = self.method.masks[layer.layer], batch.geometry.scale
            state.merge(batch.kernels, layer.layer, layer.q, self._slots, out, batch.lse, scale, mask)

    def _begin(self, kv: PagedKV) -> None:
        """Where windows begin: in whole blocks, whose size is the cache's."""
        batch, method = self.batch, self.method
        drafts = np.array([request.drafts for request in batch.requests], np.int32)
        begins = method.window.begin(batch.stops - drafts, kv.k.shape[2]).astype(np.int32)
        self._begins, self._drops = begins[:, None], bool(begins.any())
        self._lengths = np.where(begins > 0, np.int32(method.window.sinks), np.int32(0))[:, None]
        if method.state is not None:
            self._slots = method.state.slots(batch.requests)
            self._folds = self._plan_folds(method.state, begins)

    def _plan_folds(self, state: Compensation, begins: Ints) -> list[Fold]:
        """What is not in the sums yet. Sums of more than what leaves the window begin anew."""
        batch, slots = self.batch, self._slots
        again = state.dropped_to(slots) > begins
        if again.any():
            state.forget(slots[again])
        folded = np.maximum(state.dropped_to(slots), np.int32(self.method.window.sinks))
        folds = []
        for run in (begins > folded).nonzero()[0].tolist():
            fold = Fold(int(slots[run]), batch.tables[int(batch.table[run])].numpy(), int(folded[run]), int(begins[run]))
            state.advance(fold.slot, fold.first, fold.last)
            folds.append(fold)
        return folds

    def _show(self, local: npt.NDArray[np.bool_]) -> None:
        """Local heads see sinks and their window, all others the base."""
        batch, base = self.batch, self._base
        batch.offsets[:] = np.where(local, self._sinks_at, base.offsets)
        batch.see(slice(None), np.where(local, self._begins, base.start), np.where(local, self._lengths, base.lengths))
        self._shown, base.changed = local, False


def _base(batch: Batch, inner: Selector | None) -> Batch:
    """The same rows with arrays of their own. Lists of the inner method lie in front of the batch's room, without gaps."""
    heads, width = (1, 0) if inner is None else (inner.heads, inner.width)
    return Batch(
        requests=batch.requests,
        first_row=batch.first_row,
        counts=batch.counts,
        begins=batch.begins,
        stops=batch.stops,
        tables=batch.tables,
        table=batch.table,
        start=np.zeros_like(batch.start),
        offsets=np.zeros_like(batch.offsets),
        lengths=np.zeros_like(batch.lengths),
        lists=batch.lists.view(-1)[: batch.runs * heads * width].view(batch.runs, heads, width),
        base=batch.base,
        kernels=batch.kernels,
        geometry=batch.geometry,
        scratch=batch.scratch,
        stats=batch.stats,
        decodes=batch.decodes,
    )
