"""Kernels beside a library of attention, whom tests ask as they ask all others.

What the host of an engine would know of rows is read from them (`kernels.dense.spanned`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvloom.kernels import Kernels, PagedKV, Rows
from kvloom.kernels.dense import HALVES, beside, spanned


class AnyPlan(NamedTuple):
    """What a plan is made from, once K and V are known."""

    rows: Rows
    shape: tuple[int, int, int]
    own: Any


class Spanned:
    """`Kernels`: the library's where it serves, else those it stands beside."""

    def __init__(self, own: Kernels, library: str, device: torch.device) -> None:
        self._own = own
        self._beside: dict[torch.dtype, Any] = {dtype: beside(own, library, device, dtype) for dtype in HALVES}
        self.asked = 0
        """Calls that were the library's."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def plan(self, rows: Rows, q_heads: int, kv_heads: int, head_dim: int, into: object = None) -> AnyPlan:
        shape = q_heads, kv_heads, head_dim
        return AnyPlan(rows, shape, self._own.plan(rows, *shape))

    def attend(self, q: Tensor, kv: PagedKV, plan: AnyPlan, *, scale: float, out: Tensor, **more: Any) -> Tensor:
        self._own.attend(q, kv, plan.own, scale=scale, out=out, **more)
        known = spanned(plan.rows, kv.k.shape[2]) if plan.rows.size and q.dtype in self._beside else None
        if known is None or scale != plan.shape[2] ** -0.5 or more.keys() - {"lse"}:
            return out
        try:
            made = self._beside[q.dtype].plan(known, *plan.shape)
        except ValueError:  # shapes that it does not serve
            return out
        self.asked += 1
        return self._beside[q.dtype].attend(q, kv, made, scale=scale, out=out.fill_(torch.nan))

    def score(self, q: Tensor, kv: PagedKV, plan: AnyPlan, **more: Any) -> Tensor:
        return self._own.score(q, kv, plan.own, **more)
