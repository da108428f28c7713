"""One step's attention: where the decoder's layers meet the KV cache.

The decoder hands over a layer's fused projection; this rotates, stores and attends. Rows and slots are made once per step by
the runner, planned once, and used by every layer.
"""

from __future__ import annotations

from torch import Tensor

from kvloom.engine.cache import Storage
from kvloom.engine.model.config import ModelConfig
from kvloom.kernels.interface import Kernels, Rows


class StepAttention:
    """`LayerAttention` of `model.decoder` over one head group that holds every head."""

    def __init__(self, kernels: Kernels, storage: Storage, config: ModelConfig, cos: Tensor, sin: Tensor) -> None:
        """cos, sin: [max_position, rotary/2] fp32."""
        self._kernels = kernels
        self._storage = storage
        self._config = config
        self._cos, self._sin = cos, sin
        self._scale = config.head_dim**-0.5

    def plan(self, rows: Rows, positions: Tensor, slots: Tensor, q: Tensor, out: Tensor) -> None:
        """Set the step up. positions, slots: [rows] int64; q, out: [rows, q_heads, head_dim] work space."""
        config = self._config
        self._plan = self._kernels.plan(rows, config.q_heads, config.kv_heads, config.head_dim)
        self._positions, self._slots = positions, slots
        self._q, self._out = q, out
        self._flat = out.view(out.shape[0], -1)

    def __call__(self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        """qkv: [rows, (q_heads + 2 kv_heads) * head_dim] -> [rows, q_heads * head_dim], valid until the next call."""
        kernels, kv = self._kernels, self._storage.layers[layer]
        kernels.rotate_store(
            qkv, self._cos, self._sin, self._positions, kv, self._slots, self._q, q_norm, k_norm, self._config.rms_eps
        )
        kernels.attend(self._q, kv, self._plan, scale=self._scale, out=self._out)
        return self._flat
