"""One step's attention over several head groups: each has its own KV, block tables and view of what rows see.

The projection comes with the groups side by side (`model.heads`), so a group's queries, keys and values are a view of it, and
its output goes to its own columns. Rows of a group differ from another's only in where they begin: behind what the group has
forgotten, with its sinks in front and one more position that stands for the forgotten ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from kvloom.engine.cache import HeadGroup
from kvloom.engine.model.config import ModelConfig
from kvloom.kernels.interface import Folded, Kernels, Plan, Rows


class GroupRows(NamedTuple):
    """One group's side of a step."""

    rows: Rows
    slots: Tensor
    """[rows] int64: where each row's KV goes."""


class GroupedAttention:
    """`LayerAttention` of `model.decoder` over several head groups."""

    def __init__(self, kernels: Kernels, groups: Sequence[HeadGroup], config: ModelConfig, cos: Tensor, sin: Tensor) -> None:
        """cos, sin: [max_position, rotary/2] fp32."""
        self._kernels, self._groups, self._config = kernels, groups, config
        self._cos, self._sin = cos, sin
        self._scale = config.head_dim**-0.5
        self._share = config.q_heads // config.kv_heads
        self._shapes = [(index, n) for index, group in enumerate(groups) for n in {*map(len, group.storage.spec.heads)} if n]
        self._plans: dict[tuple[int, int], Plan] = {}
        """By group and KV heads of a layer: made anew in their place, where captured calls look for them."""

    def plan(
        self, groups: Sequence[GroupRows], positions: Tensor, q: Tensor, out: Tensor, folded: Callable[[int], Folded] | None
    ) -> None:
        """Set the step up. positions: [rows] int64; q, out: [rows, q_heads, head_dim] contiguous work space; folded: by layer,
        what stands for what the last group has forgotten."""
        self._rows, self._positions, self._folded = groups, positions, folded
        self._q, self._out, self._flat = q.flatten(), out, out.view(out.shape[0], -1)
        for index, heads in self._shapes:
            q_heads, into = heads * self._share, self._plans.get((index, heads))
            self._plans[index, heads] = self._kernels.plan(groups[index].rows, q_heads, heads, self._config.head_dim, into)

    def __call__(self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        """qkv: [rows, (q_heads + 2 kv_heads) * head_dim], group after group -> [rows, q_heads * head_dim], valid until the
        next call."""
        rows, dim, column, head = qkv.shape[0], self._config.head_dim, 0, 0
        for index, group in enumerate(self._groups):
            kv_heads = len(group.storage.spec.heads[layer])
            if not kv_heads:
                continue
            q_heads = kv_heads * self._share
            width = (q_heads + 2 * kv_heads) * dim
            q = self._q[: rows * q_heads * dim].view(rows, q_heads, dim)
            self._kernels.rotate_store(
                qkv[:, column : column + width], self._cos, self._sin, self._positions, group.storage.layers[layer],
                self._rows[index].slots, q, q_norm, k_norm, self._config.rms_eps,
            )  # fmt: skip
            self._attend(layer, index, q, self._out[:, head : head + q_heads])
            column, head = column + width, head + q_heads
        return self._flat

    def _attend(self, layer: int, index: int, q: Tensor, out: Tensor) -> None:
        """One group's rows: q, out [rows, q_heads of the group, head_dim]."""
        kernels, kv = self._kernels, self._groups[index].storage.layers[layer]
        plan = self._plans[index, kv.k.shape[1]]
        last = index == len(self._groups) - 1
        folded = self._folded(layer) if self._folded is not None and last else None
        kernels.attend(q, kv, plan, scale=self._scale, out=out, folded=folded)
