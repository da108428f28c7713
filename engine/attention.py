"""One step's attention: where the decoder's layers meet the KV cache.

The decoder hands over a layer's fused projection; this rotates, stores and attends. Rows and slots are made once per step by
the runner, planned once, and used by every layer. With selection methods in the step, their hooks say before every layer what
their rows see; there is one attention call per layer all the same, and a new plan only where something has changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.engine.cache import Storage
from kvloom.engine.model.config import ModelConfig
from kvloom.engine.selection.base import Layer
from kvloom.engine.selection.batch import Scratch
from kvloom.engine.view import SparseView
from kvloom.kernels.interface import Kernels, PagedKV, Plan, Rows


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
        self._view: SparseView | None = None
        self._plan: Plan | None = None
        self._dense: Plan | None = None
        """Of steps without selection: made anew in its place, where captured calls look for it."""
        self._plans: dict[bytes, Plan] = {}
        """This step's, by what rows see: layers that see alike share one."""

    def plan(
        self, rows: Rows | SparseView, positions: Tensor, slots: Tensor, q: Tensor, out: Tensor, *, shadow: bool = False
    ) -> None:
        """Set the step up. positions, slots: [rows] int64; q, out: [rows, q_heads, head_dim] work space.

        shadow: measure, beside what selection methods read, how much attention mass a dense step would have found there.
        """
        self._positions, self._slots = positions, slots
        self._q, self._out = q, out
        if isinstance(rows, SparseView):
            self._view, self._plan, self._plans = rows, None, {}
            parts = [slice(batch.first_row, batch.first_row + batch.rows) for batch in rows.batches]
            self._parts = [(part, q[part], out[part]) for part in parts]
        else:
            self._view, self._dense = None, self._planned(rows, self._dense)
        self._flat = out.view(out.shape[0], -1)
        self._shadow = shadow

    def __call__(self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        """qkv: [rows, (q_heads + 2 kv_heads) * head_dim] -> [rows, q_heads * head_dim], valid until the next call."""
        kernels, kv = self._kernels, self._storage.layers[layer]
        kernels.rotate_store(
            qkv, self._cos, self._sin, self._positions, kv, self._slots, self._q, q_norm, k_norm, self._config.rms_eps
        )
        if self._view is None:
            assert self._dense is not None
            kernels.attend(self._q, kv, self._dense, scale=self._scale, out=self._out)
        else:
            self._select(layer, kv, self._view)
        return self._flat

    def _select(self, layer: int, kv: PagedKV, view: SparseView) -> None:
        """One layer with selection methods among the rows."""
        layers = [Layer(layer, q, kv) for _, q, _ in self._parts]
        for batch, hook, of in zip(view.batches, view.hooks, layers):
            batch.emits = False
            hook.before(of)
            batch.count_layer()
        if view.changed or not self._plans:
            seen = view.seen()
            self._plan = self._plans.get(seen)
            if self._plan is None:
                self._plan = self._plans[seen] = self._planned(view.rows())
        assert self._plan is not None
        logits = self._room_for_logits(view)
        lse = None
        if self._shadow or any(batch.wants_lse for batch in view.batches):
            lse = self._scratch.take("lse", self._q.shape[0], self._config.q_heads)
        self._kernels.attend(self._q, kv, self._plan, scale=self._scale, out=self._out, lse=lse, logits=logits)
        if self._shadow and lse is not None:
            self._cover(kv, view, lse)  # of what was read: before hooks merge anything into it
        for batch, hook, of, (rows, _, out) in zip(view.batches, view.hooks, layers, self._parts):
            batch.lse = lse[rows] if lse is not None and batch.wants_lse else None
            hook.after(of, logits[rows] if logits is not None and batch.emits else None, out)

    def _room_for_logits(self, view: SparseView) -> Tensor | None:
        """[rows that come before the last emitting one, q_heads, longest] fp32, or None. Emitting rows are the first ones."""
        emitting = [batch for batch in view.batches if batch.emits]
        if not emitting:
            return None
        rows = max(batch.first_row + batch.rows for batch in emitting)
        width = max(int(batch.stops.max()) for batch in view.batches if batch.first_row < rows)  # all of these write theirs
        return self._scratch.take("emitted", rows, self._config.q_heads, width)

    def _cover(self, kv: PagedKV, view: SparseView, lse: Tensor) -> None:
        """Covered mass of sparse decode rows: exp(lse of what was read - lse of everything), mean over heads."""
        for batch, (rows, q, read) in zip(view.batches, self._parts):
            sparse = batch.sees_less()
            if not batch.decodes or not sparse.any():
                continue
            everything, plan = torch.empty(batch.rows, self._config.q_heads), self._planned(batch.everything())
            self._kernels.attend(q, kv, plan, scale=self._scale, out=torch.empty_like(read), lse=everything)
            mass = (lse[rows] - everything).exp().mean(dim=1)[torch.from_numpy(sparse)]
            batch.stats.mass += float(mass.sum())
            batch.stats.mass_samples += len(mass)

    def _planned(self, rows: Rows, into: Plan | None = None) -> Plan:
        config = self._config
        return self._kernels.plan(rows, config.q_heads, config.kv_heads, config.head_dim, into)
