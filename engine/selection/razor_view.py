"""RazorAttention (arXiv 2407.15891, ICLR 2025), view mode: all KV is kept, and most heads read little of it.

    retrieval heads     induction and echo heads, found once per model (`kvloom calibrate razor`): everything, or what another
                        selection method lets them see (option `retrieval`)
    local heads         N0 sinks, the last max(S0, N / C) positions, and the compensation token: one attention state for all
                        positions between, key k' and value v' their means, logit q.k' + ln N_d (section 3.3)

A decode row of a local head sees      [0, sinks)     then     [begin, N)       with [sinks, begin) in the compensation token

Means are running fp32 sums per layer and KV head (`retention.compensation`); what leaves the window is added once, in whole
blocks: the window is up to a block longer than the paper's. Evict mode (`--retention razor`) computes the same, and keeps less.

Departures, and why:

- Prompts are computed densely, as in the paper, but nothing is dropped afterwards: prompt KV is shared like any other, and
  requests of this method stand beside others of any kind.
- S0 is 256 and not 4000, as in the authors' own deployment: at 8k tokens, the paper's would drop little.
- A drafting row's window ends at the verified tokens: what is drafted and may be taken back is never added to a sum.
- Retrieval heads may read by another method with its default options, in the request's budget. It chooses as it always does,
  for all heads; local heads then look elsewhere.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kvloom.engine.calibration import HeadClasses
from kvloom.engine.device import upload
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.requests.state import NO_STATE
from kvloom.engine.requests.stats import MethodStats
from kvloom.engine.requests.traits import Layer, Record
from kvloom.engine.retention.compensation import Compensation, Leaving
from kvloom.engine.retention.window import RazorHeads
from kvloom.engine.selection.base import EVERYWHERE, Counting, Method, RowsInStep, Selector, check_fields, refuse
from kvloom.engine.selection.batch import Batch, Ints
from kvloom.engine.selection.geometry import Geometry
from kvloom.kernels.interface import Folded, Kernels

NAME = "razor_view"


@dataclass(frozen=True, slots=True, kw_only=True)
class RazorViewOptions(RazorHeads):
    """Options of razor_view."""

    retrieval: str | None = None
    """The selection method by which retrieval heads read, with its default options and the request's budget. None: they read
    everything, and there is no budget."""

    def __post_init__(self) -> None:
        check_fields(self, NAME)

    def takes_budget(self) -> bool:
        """Whether a budget means anything."""
        return self.retrieval is not None


class RazorView:
    """`Selector`: tails and lists that differ by KV head, and sums of what local heads do not read."""

    emits = False
    prompts: Literal["dense", "seed", "sparse"] = "dense"
    grid = tail = 0
    dense_until = EVERYWHERE
    domain = ""
    whole = "it says itself which heads those are; leave it out, and the others read what it would let them read"

    def __init__(
        self, options: RazorViewOptions, budget: int, geometry: Geometry, kernels: Kernels, methods: Mapping[str, Method]
    ) -> None:
        """methods: by which retrieval heads may choose, by name; this one may be among them."""
        classes = head_classes(options, geometry)
        self.options, self.window = options, options.window
        self.inner = _inner(options.retrieval, budget, geometry, kernels, methods)
        whole = options.sinks + options.min_window
        self.budget = whole if self.inner is None else min(whole, self.inner.budget)
        self.levels: tuple[int, ...] = () if self.inner is None else (self.inner.budget,)
        layers, kv_heads = range(classes.layers), torch.arange(geometry.kv_heads, dtype=torch.int32, device=geometry.device)
        local = (np.isin(np.arange(geometry.kv_heads), classes.local(layer)) for layer in layers)
        self.local = [upload(heads, geometry.device) for heads in local]
        """[layers] of [kv_heads] bool: local heads."""
        self.any_local = [bool(classes.local(layer)) for layer in layers]
        self.any_retrieval = [bool(heads) for heads in classes.retrieval]
        """[layers]: whether there are heads of that kind."""
        none = torch.full_like(kv_heads, -1)
        self.local_heads = [torch.where(local, kv_heads, none) for local in self.local]
        """[layers] of [kv_heads] int32, for `Kernels.attend`."""
        self.retrieval_heads = [torch.where(local, none, kv_heads) for local in self.local]
        self.stats = MethodStats()
        self.state = (
            Compensation(geometry.layers, geometry.kv_heads, geometry.head_dim, options.sinks) if options.compensation else None
        )
        own: tuple[Record, ...] = () if self.state is None else (self.state,)
        self.records: tuple[Record, ...] = (*own, *(() if self.inner is None else self.inner.records))

    def decode(self, batch: Batch) -> RazorViewStep:
        return RazorViewStep(self, batch)

    def prefill(self, batch: Batch) -> RazorViewStep:
        raise AssertionError("prompts are dense")


def head_classes(options: RazorViewOptions, geometry: Geometry) -> HeadClasses:
    """The model's retrieval and local heads. Raises InvalidRequestError if it has no calibration."""
    found = options.classes(geometry.model_key)
    if found is None:
        raise InvalidRequestError(
            "kv.selection is razor_view, but this model has no RazorAttention calibration; run kvloom calibrate razor MODEL "
            "first, or choose another method",
            param="kv.selection",
        )
    return found


def _inner(
    name: str | None, budget: int, geometry: Geometry, kernels: Kernels, methods: Mapping[str, Method]
) -> Selector | None:
    """The method of the retrieval heads. It must leave prompts alone, and choose without looking at a layer's own logits:
    local heads have none. Raises InvalidRequestError."""
    if name is None:
        return None
    others = [other for other in methods if other != NAME]
    if name not in others:
        raise refuse(NAME, "retrieval", name, f"null (everything), {', '.join(others)}")
    method = methods[name]
    inner = method.make(method.options(), budget, geometry, kernels)
    if inner.prompts != "dense" or inner.emits:
        raise refuse(NAME, "retrieval", name, "methods that compute prompts densely and choose before they attend")
    return inner


class RazorViewStep:
    """Decode rows, one per request. Local heads see sinks and their window, all others everything or by another method."""

    def __init__(self, method: RazorView, batch: Batch) -> None:
        self._method, self._batch = method, batch
        beyond = method.inner is not None and batch.stops.min() > method.inner.budget  # else none is: see `levels`
        self._inner = _decoding(method.inner, batch) if beyond else None
        self._whole = None if beyond else batch.seen("whole", np.zeros_like(batch.stops))
        self.program: Hashable = 0 if self._inner is None else self._inner.program
        """The other method's, whose programs are none of 0."""
        drafts = np.array([request.drafts for request in batch.requests], np.int32)
        begins = method.window.begin(batch.stops - drafts, batch.geometry.block_size).astype(np.int32)
        sinks = batch.sinks(np.where(begins > 0, method.window.sinks, 0))
        self._local = batch.seen("local", begins, sinks)
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

    def finish(self) -> Counting | None:
        """See `RowsInStep`."""
        return None if self._inner is None else self._inner.finish()


class _Sums:
    """What is dropped up to where windows begin: sums that grow in every layer, and what rows see of them."""

    def __init__(self, state: Compensation, batch: Batch, begins: Ints) -> None:
        self._state, self._batch = state, batch
        self._at, self._dropped = batch.at(state), batch.column("dropped", state.dropped(begins))
        added = state.advance(batch.requests, begins)
        first, last = batch.column("first", added), batch.column("last", begins)
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
