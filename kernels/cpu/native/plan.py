"""A step's plan as the C++ side holds it: tiles, tasks and folds (csrc/plan.h). Freed with the object."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.kernels.interface import Lists, Rows

from .library import ROWS, Library


@dataclass(slots=True, weakref_slot=True, eq=False)
class NativePlan:
    """One Rows, ready to run. Keeps its tensors alive: the C++ side reads them on every call."""

    rows: Rows
    q_heads: int
    kv_heads: int
    head_dim: int
    handle: int
    packed: bytes
    """What the C++ side was told of the rows."""


def make_plan(
    library: Library, rows: Rows, q_heads: int, kv_heads: int, head_dim: int, threads: int, into: NativePlan | None
) -> NativePlan:
    """Plans `rows`; in the place of `into`, if given. Raises ValueError for tensors that the C++ side cannot read."""
    if q_heads % kv_heads:
        raise ValueError(f"q_heads must be a multiple of kv_heads; got {q_heads} and {kv_heads}")
    if into is not None and (into.q_heads, into.kv_heads, into.head_dim) != (q_heads, kv_heads, head_dim):
        raise ValueError(
            f"a plan for {into.q_heads} and {into.kv_heads} heads of {into.head_dim} cannot be made anew for others"
        )
    if into is not None and _same(rows, into.rows):  # as in most decode steps: their contents alone are new
        library.plan(into.packed, into.handle)
        into.rows = rows
        return into
    for name in ("tables", "request", "start", "stop"):
        _check(name, getattr(rows, name))
    start_heads = rows.start.shape[1] if rows.start.ndim == 2 else 1
    if start_heads not in (1, kv_heads):
        raise ValueError(f"start must have one column or {kv_heads}, got {tuple(rows.start.shape)}")
    positions, offsets, lengths, list_heads = _list_pointers(rows.lists, kv_heads)
    most = 0
    if rows.most is not None:
        _check("most", rows.most)
        if rows.most.shape != (rows.size,):
            raise ValueError(f"most must have {rows.size} elements; got {tuple(rows.most.shape)}")
        most = rows.most.data_ptr()
    packed = ROWS.struct.pack(
        rows.tables.data_ptr(), rows.request.data_ptr(), rows.start.data_ptr(), rows.stop.data_ptr(),
        positions, offsets, lengths, most, rows.tables.stride(0),
        rows.size, start_heads, list_heads, q_heads, kv_heads, head_dim, threads,
    )  # fmt: skip
    handle = library.plan(packed, 0 if into is None else into.handle)
    if into is not None:
        into.rows, into.packed = rows, packed
        return into
    plan = NativePlan(rows, q_heads, kv_heads, head_dim, handle, packed)
    weakref.finalize(plan, library.plan_free, handle).atexit = False
    return plan


def _same(rows: Rows, others: Rows) -> bool:
    """Whether both are the same tensors, without lists."""
    alike = rows.tables is others.tables and rows.request is others.request and rows.start is others.start
    return alike and rows.stop is others.stop and rows.lists is others.lists is None and rows.most is others.most is None


def _list_pointers(lists: Lists | None, kv_heads: int) -> tuple[int, int, int, int]:
    if lists is None:
        return 0, 0, 0, 0
    for name in ("positions", "offsets", "lengths"):
        _check(f"lists.{name}", getattr(lists, name))
    heads = lists.lengths.shape[1]
    if heads not in (1, kv_heads) or lists.offsets.shape != lists.lengths.shape:
        raise ValueError(f"lists must have one column or {kv_heads}, got lengths {tuple(lists.lengths.shape)}")
    return lists.positions.data_ptr(), lists.offsets.data_ptr(), lists.lengths.data_ptr(), heads


def _check(name: str, tensor: Tensor) -> None:
    if tensor.dtype is not torch.int32 or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous int32, got {tensor.dtype} with strides {tensor.stride()}")
