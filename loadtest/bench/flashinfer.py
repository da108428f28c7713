"""FlashInfer's attention in the place of a back end's, where that is installed: decode rows and one prompt's chunk, dense."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvloom.kernels import PagedKV, Rows

WORKSPACE = 256 << 20
"""Bytes that FlashInfer asks for."""


def installed() -> bool:
    """Whether there is anything to compare with."""
    return importlib.util.find_spec("flashinfer") is not None


@dataclass(slots=True)
class FlashInferPlan:
    """Rows that see all of their requests up to their own position. wrapper: planned at the first use, which knows dtypes."""

    rows: Rows
    q_heads: int
    kv_heads: int
    head_dim: int
    wrapper: Any = None


class FlashInfer:
    """`plan` and `attend` of `kernels.interface.Kernels`; nothing else of it."""

    name = "flashinfer"

    def __init__(self, device: torch.device) -> None:
        self._workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)

    def plan(self, rows: Rows, q_heads: int, kv_heads: int, head_dim: int) -> FlashInferPlan:
        return FlashInferPlan(rows, q_heads, kv_heads, head_dim)

    def attend(self, q: Tensor, kv: PagedKV, plan: FlashInferPlan, *, scale: float, out: Tensor) -> Tensor:
        """See the contract; scale: 1 / sqrt(head_dim)."""
        if plan.wrapper is None:
            plan.wrapper = self._planned(plan, q.dtype, kv.k.shape[2])
        return out.copy_(plan.wrapper.run(q, tuple(kv)))

    def _planned(self, plan: FlashInferPlan, dtype: torch.dtype, page: int) -> Any:
        import flashinfer

        rows, heads = plan.rows, (plan.q_heads, plan.kv_heads, plan.head_dim, page)
        requests = rows.tables.shape[0]
        ends = rows.stop if requests == rows.size else rows.stop[-1:]
        pages = (ends + page - 1) // page
        starts = torch.nn.functional.pad(pages.cumsum(0), (1, 0)).int()
        indices = torch.cat([table[:count] for table, count in zip(rows.tables, pages.tolist())])
        held = (starts, indices, ends - (pages - 1) * page)
        types = {"q_data_type": dtype, "kv_data_type": dtype}
        if requests == rows.size:
            made = flashinfer.BatchDecodeWithPagedKVCacheWrapper(self._workspace, "HND", use_tensor_cores=True)
            made.plan(*held, *heads, **types)
            return made
        made = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "HND")
        made.plan(rows.stop.new_tensor([0, rows.size]), *held, *heads, causal=True, **types)
        return made
