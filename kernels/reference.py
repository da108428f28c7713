"""Every operation in plain torch, one row and one head at a time: what all other back ends are tested against.

Arithmetic is fp32, or fp64 where the inputs are fp64 (an oracle for tests; storage in fp64 is not part of the contract).
Runs on any device. Slow on purpose: each function reads as its definition.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.kernels.interface import Counters, PagedKV, Plan, QuantizedLinears, Rows


def wide(x: Tensor) -> Tensor:
    """x in the precision of the arithmetic."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass(slots=True)
class ReferencePlan:
    """`positions[row][kv head]`: the positions that are seen, in order."""

    rows: Rows
    positions: list[list[Tensor]]


def visible(rows: Rows, kv_heads: int) -> list[list[Tensor]]:
    """Positions each row sees for each KV head, list first, then tail: int64 tensors."""
    seen = []
    for row in range(rows.size):
        tail = torch.arange(int(rows.start[row]), int(rows.stop[row]), device=rows.start.device)
        heads = []
        for head in range(kv_heads):
            if rows.lists is None:
                heads.append(tail)
                continue
            column = head if rows.lists.offsets.shape[1] > 1 else 0
            offset, length = int(rows.lists.offsets[row, column]), int(rows.lists.lengths[row, column])
            heads.append(torch.cat([rows.lists.positions[offset : offset + length].long(), tail]))
        seen.append(heads)
    return seen


def gather(cache: Tensor, table: Tensor, positions: Tensor, head: int) -> Tensor:
    """Rows of a cache [blocks, heads, block_size, head_dim] at logical positions: [positions, head_dim]."""
    block_size = cache.shape[2]
    return cache[table[positions // block_size].long(), head, positions % block_size]


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + rotary/2) of x [..., head_dim] by angles whose cos and sin are [..., rotary/2]."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    x = wide(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * wide(weight)


class ReferenceKernels:
    """`interface.Kernels` in plain torch."""

    name = "reference"
    quantized: QuantizedLinears | None = None

    def __init__(self) -> None:
        self.counters = Counters()

    def store(self, k: Tensor, v: Tensor, kv: PagedKV, slots: Tensor) -> None:
        """Write rows into slots; see `interface.Kernels.store`."""
        kept = slots >= 0
        block, offset = slots[kept] // kv.k.shape[2], slots[kept] % kv.k.shape[2]
        kv.k[block, :, offset] = k[kept].to(kv.k.dtype)
        kv.v[block, :, offset] = v[kept].to(kv.v.dtype)

    def plan(self, rows: Rows, q_heads: int, kv_heads: int, head_dim: int) -> Plan:
        """List the positions of every row and head."""
        return ReferencePlan(rows, visible(rows, kv_heads))

    def attend(self, q: Tensor, kv: PagedKV, plan: Plan, *, scale: float, out: Tensor,
               lse: Tensor | None = None, logits: Tensor | None = None) -> Tensor:  # fmt: skip
        """Softmax attention; see `interface.Kernels.attend`."""
        assert isinstance(plan, ReferencePlan)
        group = q.shape[1] // kv.k.shape[1]
        for row, heads in enumerate(plan.positions):
            table = plan.rows.tables[int(plan.rows.request[row])]
            for q_head in range(q.shape[1]):
                positions = heads[q_head // group]
                keys = wide(gather(kv.k, table, positions, q_head // group))
                values = wide(gather(kv.v, table, positions, q_head // group))
                products = keys @ wide(q[row, q_head]) * scale
                out[row, q_head] = (torch.softmax(products, 0) @ values).to(out.dtype)
                if lse is not None:
                    lse[row, q_head] = torch.logsumexp(products, 0)
                if logits is not None:
                    logits[row, q_head, : len(positions)] = products.to(logits.dtype)
        self._count(kv, plan, scores_only=False)
        return out

    def score(self, q: Tensor, kv: PagedKV, plan: Plan, *, scale: float, out: Tensor) -> Tensor:
        """Query-key products; see `interface.Kernels.score`."""
        assert isinstance(plan, ReferencePlan)
        group = q.shape[1] // kv.k.shape[1]
        for row, heads in enumerate(plan.positions):
            table = plan.rows.tables[int(plan.rows.request[row])]
            for q_head in range(q.shape[1]):
                keys = wide(gather(kv.k, table, heads[q_head // group], q_head // group))
                out[row, q_head, : len(keys)] = (keys @ wide(q[row, q_head]) * scale).to(out.dtype)
        self._count(kv, plan, scores_only=True)
        return out

    def _count(self, kv: PagedKV, plan: ReferencePlan, scores_only: bool) -> None:
        seen = sum(len(positions) for heads in plan.positions for positions in heads)
        key_bytes = seen * kv.k.shape[3] * kv.k.element_size()
        if scores_only:
            self.counters.score_bytes += key_bytes
        else:
            self.counters.rows += plan.rows.size
            self.counters.positions += seen
            self.counters.kv_bytes += 2 * key_bytes

    def select(self, scores: Tensor, lengths: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Top-k with ties to the lower column; see `interface.Kernels.select`."""
        columns = torch.full((scores.shape[0], k), -1, dtype=torch.int32, device=scores.device)
        for row, length in enumerate(lengths.tolist()):
            order = torch.sort(scores[row, :length], descending=True, stable=True).indices[:k]
            columns[row, : len(order)] = order.sort().values
        return columns, lengths.clamp(max=k)

    def merge(self, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
        """Combine two states into the first; see `interface.Kernels.merge`."""
        total = torch.logaddexp(lse_a, lse_b)
        empty = total == -torch.inf
        weight_a = torch.where(empty, 1.0, torch.exp(lse_a - total))[..., None]
        weight_b = torch.where(empty, 0.0, torch.exp(lse_b - total))[..., None]
        out_a.copy_(wide(out_a) * weight_a + wide(out_b) * weight_b)
        lse_a.copy_(total)

    def rotate(self, k: Tensor, delta: Tensor, inv_freq: Tensor, out: Tensor) -> Tensor:
        """Shift rotary positions; see `interface.Kernels.rotate`. Angles in fp64: a long shift must not lose its phase."""
        angles = delta[:, None, None].double() * inv_freq.double()
        cos, sin = angles.cos().to(wide(k).dtype), angles.sin().to(wide(k).dtype)
        return out.copy_(turn(wide(k), cos, sin))

    def add_rms_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> Tensor:
        """Residual addition and RMS norm; see `interface.Kernels.add_rms_norm`."""
        if delta is not None:
            x.copy_(wide(x) + wide(delta))
        return out.copy_(rms_norm(x, weight, eps))

    def rotate_store(self, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, kv: PagedKV, slots: Tensor, q: Tensor,
                     q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 0.0) -> Tensor:  # fmt: skip
        """Split, normalise, rotate, store; see `interface.Kernels.rotate_store`."""
        q_heads, kv_heads = q.shape[1], kv.k.shape[1]
        heads = wide(qkv).view(qkv.shape[0], q_heads + 2 * kv_heads, -1)
        queries, keys, values = heads.split([q_heads, kv_heads, kv_heads], dim=1)
        if q_norm is not None:
            queries = rms_norm(queries, q_norm, eps)
        if k_norm is not None:
            keys = rms_norm(keys, k_norm, eps)
        c, s = cos[positions][:, None], sin[positions][:, None]
        self.store(turn(keys, c, s), values, kv, slots)
        return q.copy_(turn(queries, c, s))

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> Tensor:
        """Gated activation; see `interface.Kernels.silu_mul`."""
        gate, up = wide(gate_up).chunk(2, dim=-1)
        return out.copy_(torch.nn.functional.silu(gate) * up)
