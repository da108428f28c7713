"""One step's attention: where the decoder's layers meet the KV cache.

The decoder hands over a layer's fused projection; this rotates, stores and attends. What rows see is made once per step: rows
that see everything are planned once and attended to in one call, and every batch of a selection method attends to its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvloom.engine.cache import Storage
from kvloom.engine.model.config import ModelConfig
from kvloom.engine.model.decoder import GraphMode
from kvloom.engine.scheduling.plan import Look
from kvloom.engine.selection.base import Layer, RowsInStep, Selector
from kvloom.engine.selection.batch import Batch, Scratch
from kvloom.kernels.interface import Kernels, Plan, Rows


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
    """`LayerAttention` of `model.decoder` over one head group that holds every head."""

    def __init__(self, kernels: Kernels, storage: Storage, config: ModelConfig, cos: Tensor, sin: Tensor) -> None:
        """cos, sin: [max_position, rotary/2] fp32."""
        self._kernels = kernels
        self._storage = storage
        self._config = config
        self._cos, self._sin = cos, sin
        self._scale = config.head_dim**-0.5
        self._scratch = Scratch()
        self._parts: Sequence[Part] = ()
        self._dense: Plan | None = None
        """Made anew in its place in every step, where captured calls look for it."""

    def plan(
        self, dense: Rows, parts: Sequence[Part], positions: Tensor, slots: Tensor, q: Tensor, out: Tensor, *,
        shadow: bool = False, looks: Sequence[LookAt] = (),
    ) -> None:  # fmt: skip
        """Set the step up. dense: rows behind those of all parts, perhaps none; looks: behind those; positions, slots: [rows]
        int64 of all; q, out: [rows, q_heads, head_dim] work space.

        shadow: measure, beside what selection methods read, how much attention mass a dense step would have found there.
        """
        config = self._config
        self._positions, self._slots = positions, slots
        self._q, self._out, self._flat = q, out, out.view(out.shape[0], -1)
        self._parts, self._looks, self._shadow = parts, looks, shadow
        first = parts[-1].last if parts else 0
        self._seeing_all = slice(first, first + dense.size)
        self._any_dense = dense.size > 0
        if self._any_dense:
            self._dense = self._kernels.plan(dense, config.q_heads, config.kv_heads, config.head_dim, self._dense)

    def __call__(self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        """qkv: [rows, (q_heads + 2 kv_heads) * head_dim] -> [rows, q_heads * head_dim], valid until the next call. Rows that
        did not get so far are behind all others."""
        kernels, kv, rows = self._kernels, self._storage.layers[layer], qkv.shape[0]
        kernels.rotate_store(
            qkv, self._cos, self._sin, self._positions[:rows], kv, self._slots[:rows], self._q[:rows], q_norm, k_norm,
            self._config.rms_eps,
        )  # fmt: skip
        for part in self._parts:
            of, out = Layer(layer, self._q[part.first : part.last], kv), self._out[part.first : part.last]
            if self._shadow and part.decodes:
                self._cover(part, of, out)
            else:
                part.rows.attend(of, out)
        if self._any_dense:
            assert self._dense is not None
            at = self._seeing_all
            kernels.attend(self._q[at], kv, self._dense, scale=self._scale, out=self._out[at])
        for first, last, look in self._looks:
            if layer < look.stop:
                look.attend(Layer(layer, self._q[first:last], kv), self._out[first:last])
        return self._flat[:rows]

    def _cover(self, part: Part, layer: Layer, out: Tensor) -> None:
        """Attend, and measure the covered mass of rows that see less than everything: exp(lse of what was read - lse of
        everything), mean over heads."""
        batch = part.batch
        lse, everything = (self._scratch.take(name, batch.rows, self._config.q_heads) for name in ("lse", "everything"))
        before = batch.read.clone()
        part.rows.attend(layer, out, None, lse.fill_(torch.nan))
        seen = (batch.read - before) / self._config.kv_heads
        plan = batch.seen("everything", torch.zeros_like(batch.stop))
        self._kernels.attend(layer.q, layer.kv, plan, scale=self._scale, out=torch.empty_like(out), lse=everything)
        mass = (lse - everything).exp().mean(dim=1)[(seen < batch.stop) & ~lse.isnan().any(dim=1)]
        batch.stats.mass += float(mass.sum())
        batch.stats.mass_samples += len(mass)
