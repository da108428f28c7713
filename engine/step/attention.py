"""One step's attention: where the decoder's layers meet the KV cache, head group by head group.

The decoder hands over a layer's fused projection; this rotates, stores and attends. A projection comes with the groups side by
side (`model.heads`), so a group's queries, keys and values are a view of it, and its output goes to columns of its own.
Normally there is one group.

    group      rows
    first      those of selection methods, each batch by its own; then all that see everything, planned once, in one call; then
               those that are computed to look at them
    another    all rows by what its retention keeps for them, and a position that stands for the rest

What rows see is made once per step, and planned for every number of KV heads that a layer of the group has.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvloom.engine.cache import HeadGroup
from kvloom.engine.model.config import ModelConfig
from kvloom.engine.model.decoder import GraphMode
from kvloom.engine.requests.traits import Layer, Look
from kvloom.engine.selection.base import RowsInStep, Selector
from kvloom.engine.selection.batch import Batch, Scratch
from kvloom.kernels.interface import Folded, Kernels, Plan, Rows


class Part(NamedTuple):
    """Rows [first, last) of a step, which a selection method decides for."""

    first: int
    last: int
    selector: Selector
    batch: Batch
    rows: RowsInStep
    decodes: bool


class LookAt(NamedTuple):
    """Rows [first, last) of a step, which are computed to look at them."""

    first: int
    last: int
    look: Look


class GroupRows(NamedTuple):
    """One head group's side of a step."""

    slots: Tensor
    """[all rows] int64: where each row's KV goes."""
    rows: Rows
    """Those behind the rows of all parts, perhaps none."""
    parts: Sequence[Part] = ()
    looks: Sequence[LookAt] = ()
    """Behind all others."""
    folded: Callable[[int], Folded] | None = None
    """By layer, what stands for positions that they do not see."""

    @property
    def own(self) -> slice:
        """Where `rows` stand in the step."""
        first = self.parts[-1].last if self.parts else 0
        return slice(first, first + self.rows.size)


def replayable(dense: Rows, parts: Sequence[Part], *, shadow: bool) -> tuple[GraphMode, Hashable]:
    """How much of a step's calls may be replayed, and on what that depends: see `Decoder.forward`. Parts beside others lie
    elsewhere in every step, so only steps of one kind are replayed as a whole."""
    if not parts:
        return "full", None
    (first, *others) = parts
    if others or dense.size or shadow or first.rows.program is None:
        return "piecewise", None
    return "full", (first.selector, first.rows.program)


class StepAttention:
    """`LayerAttention` of `model.decoder`."""

    def __init__(self, kernels: Kernels, groups: Sequence[HeadGroup], config: ModelConfig, cos: Tensor, sin: Tensor) -> None:
        """cos, sin: [max_position, rotary/2] fp32."""
        self._kernels = kernels
        self._storages = [group.storage for group in groups]
        self._config = config
        self._cos, self._sin = cos, sin
        self._scale, self._group = config.head_dim**-0.5, config.q_heads // config.kv_heads
        self._scratch = Scratch(cos.device)
        self._groups: Sequence[GroupRows] = ()
        self._q = self._flat_q = self._out = self._flat_out = cos[:0]
        self._shapes = [(at, n) for at, one in enumerate(self._storages) for n in {*map(len, one.spec.heads)} if n]
        self._plans: dict[tuple[int, int], Plan] = {}
        """Of a group's `rows`, by KV heads of a layer: made anew in their place, where captured calls look for them."""

    def plan(self, groups: Sequence[GroupRows], positions: Tensor, q: Tensor, out: Tensor, *, shadow: bool = False) -> None:
        """Set the step up. positions: [rows] int64; q, out: [rows, q_heads, head_dim] contiguous work space.

        shadow: measure, beside what selection methods read, how much attention mass a dense step would have found there.
        """
        self._groups, self._positions, self._shadow = groups, positions, shadow
        if q is not self._q or out is not self._out:
            self._q, self._flat_q, self._out, self._flat_out = q, q.flatten(), out, out.view(out.shape[0], -1)
        for at, heads in self._shapes:
            if groups[at].rows.size:
                q_heads, into = heads * self._group, self._plans.get((at, heads))
                self._plans[at, heads] = self._kernels.plan(groups[at].rows, q_heads, heads, self._config.head_dim, into)

    def __call__(self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        """qkv: [rows, (q_heads + 2 kv_heads) * head_dim], group after group -> [rows, q_heads * head_dim], valid until the
        next call. Rows that did not get so far are behind all others."""
        rows, dim, column, head = qkv.shape[0], self._config.head_dim, 0, 0
        for at, (storage, group) in enumerate(zip(self._storages, self._groups)):
            kv_heads, kv = len(storage.spec.heads[layer]), storage.layers[layer]
            if not kv_heads:
                continue
            q_heads = kv_heads * self._group
            width = (q_heads + 2 * kv_heads) * dim
            q = self._flat_q[: rows * q_heads * dim].view(rows, q_heads, dim)
            self._kernels.rotate_store(
                qkv[:, column : column + width], self._cos, self._sin, self._positions[:rows], kv, group.slots[:rows], q,
                q_norm, k_norm, self._config.rms_eps,
            )  # fmt: skip
            self._attend(Layer(layer, q, kv), group, self._plans.get((at, kv_heads)), self._out[:, head : head + q_heads])
            column, head = column + width, head + q_heads
        return self._flat_out[:rows]

    def _attend(self, layer: Layer, group: GroupRows, plan: Plan | None, out: Tensor) -> None:
        """One group's rows. layer.q, out: [rows, query heads of the group, head_dim]."""
        for part in group.parts:
            of, into = layer._replace(q=layer.q[part.first : part.last]), out[part.first : part.last]
            if self._shadow and part.decodes:
                self._cover(part, of, into)
            else:
                part.rows.attend(of, into)
        if group.rows.size:
            assert plan is not None
            folded = None if group.folded is None else group.folded(layer.layer)
            self._kernels.attend(layer.q[group.own], layer.kv, plan, scale=self._scale, out=out[group.own], folded=folded)
        for first, last, look in group.looks:
            if layer.layer < look.stop:
                look.attend(layer._replace(q=layer.q[first:last]), out[first:last])

    def _cover(self, part: Part, layer: Layer, out: Tensor) -> None:
        """Attend, and measure the covered mass of rows that see less than everything: exp(lse of what was read - lse of
        everything), mean over heads."""
        batch = part.batch
        lse, everything = (self._scratch.take(name, *layer.q.shape[:2]) for name in ("lse", "everything"))
        before = batch.read.clone()
        part.rows.attend(layer, out, None, lse.fill_(torch.nan))
        seen = (batch.read - before) / layer.heads
        plan = batch.seen("everything", np.zeros_like(batch.stops), counts=(layer.heads,))[layer.heads]
        self._kernels.attend(layer.q, layer.kv, plan, scale=self._scale, out=torch.empty_like(out), lse=everything)
        mass = (lse - everything).exp().mean(dim=1)[(seen < batch.stop) & ~lse.isnan().any(dim=1)]
        batch.stats.mass += float(mass.sum())
        batch.stats.mass_samples += len(mass)
