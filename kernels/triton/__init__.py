"""The back end for GPUs: every operation of `interface` as Triton kernels, which their interpreter also runs on a CPU.

Element types, strides and shapes are checked here; contents of index tensors are trusted, as the contract says. No operation
reads a tensor's value on the host: calls may be captured in CUDA graphs. Plans make
scratch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.kernels.checks import fp32, index, same_dtype, strides
from kvloom.kernels.cuda_graph import CudaGraph
from kvloom.kernels.interface import Counters, Folded, PagedKV, Plan, Rows
from kvloom.kernels.quantized import QuantizedLinears
from kvloom.kernels.reference import check_folded, check_folding
from kvloom.kernels.triton import attention, choose, sampling
from kvloom.kernels.triton import rows as by_row
from kvloom.kernels.triton.linear import TritonQuantized
from kvloom.kernels.triton.numbers import INTERPRETED, power_of_2
from kvloom.kernels.triton.plan import (
    LARGEST_BLOCK,
    PROGRAMS,
    SPLIT,
    TritonPlan,
    check_rows,
    cut,
    partial_queries,
    splits,
)

COUNTERS = 32
"""Places among which counting is spread."""


def load(device: str) -> TritonKernels:
    """Kernels for a CUDA device, or under the interpreter for "cpu". Raises ValueError where they cannot run."""
    if device == "cpu" and not INTERPRETED.value:
        raise ValueError("the triton back end runs on cuda; on cpu only in its interpreter, with TRITON_INTERPRET=1 set")
    return TritonKernels(device)


class TritonKernels:
    """`interface.Kernels` in Triton, on one device and one stream."""

    name = "triton"

    # What needs nothing of this object: see the contract.
    store, rotate, rotate_store = staticmethod(by_row.store), staticmethod(by_row.rotate), staticmethod(by_row.rotate_store)
    add_rms_norm, silu_mul = staticmethod(by_row.add_rms_norm), staticmethod(by_row.silu_mul)
    pool, select, renew = staticmethod(choose.pool), staticmethod(choose.select), staticmethod(choose.renew)
    sample = staticmethod(sampling.sample)

    def __init__(self, device: str) -> None:
        self.quantized: QuantizedLinears | None = TritonQuantized(device)
        self._totals = torch.zeros(COUNTERS, 5, dtype=torch.int64, device=device)
        self._scratch = [torch.empty(0, device=device)]
        """The last is the largest; calls that were captured with others still write there."""

    @property
    def counters(self) -> Counters:
        """As of now: waits for the device. Calls that are replayed count too."""
        return Counters(*self._totals.sum(0).tolist())

    def graph(self) -> CudaGraph | None:
        """See the contract: of the device; None in the interpreter."""
        return None if INTERPRETED.value else CudaGraph(self._totals.device)

    # Attention ---------------------------------------------------------------------------------------------------

    def plan(self, rows: Rows, q_heads: int, kv_heads: int, head_dim: int, into: Plan | None = None) -> TritonPlan:
        """See the contract. Scratch is made here, and only grows. All that calls read of a plan lies in its rows' own tensors,
        unless there are more rows than requests."""
        check_rows(rows, q_heads, kv_heads, head_dim)
        tiles = cut(rows, q_heads // kv_heads, head_dim)
        queries = partial_queries(tiles, kv_heads, q_heads // max(1, kv_heads))
        size = queries * splits(rows, LARGEST_BLOCK) * (head_dim + 2)  # sums, a maximum and a total
        if len(self._scratch[-1]) < size:
            self._scratch.append(torch.empty(max(size, 2 * len(self._scratch[-1])), device=self._totals.device))
        return TritonPlan(rows, q_heads, kv_heads, head_dim, tiles, queries, self._scratch[-1])

    def attend(self, q: Tensor, kv: PagedKV, plan: Plan, *, scale: float, out: Tensor, lse: Tensor | None = None,
               logits: Tensor | None = None, positions: Tensor | None = None, heads: Tensor | None = None,
               read: Tensor | None = None, folded: Folded | None = None) -> Tensor:  # fmt: skip
        """See the contract."""
        same_dtype(q, out, kv.k, kv.v)
        if folded is not None:
            check_folded(folded, q.shape[0])
            folded = folded._replace(words=folded.words.view(torch.float32))
        for tensor, wanted, dtype in ((heads, kv.k.shape[1], torch.int32), (read, q.shape[0], torch.int64)):
            _check_each(tensor, wanted, dtype)
        self._run(q, kv, plan, scale, out, lse, logits, positions, heads, None, read, folded)
        return out

    def score(self, q: Tensor, kv: PagedKV, plan: Plan, *, scale: float, out: Tensor, active: Tensor | None = None) -> Tensor:
        """See the contract."""
        same_dtype(q, kv.k)
        _check_each(active, q.shape[0], torch.int32)
        self._run(q, kv, plan, scale, None, None, out, None, None, active, None, None)
        return out

    def _run(self, q: Tensor, kv: PagedKV, plan: Plan, scale: float, out: Tensor | None, lse: Tensor | None,
             logits: Tensor | None, positions: Tensor | None, heads: Tensor | None, active: Tensor | None,
             read: Tensor | None, folded: Folded | None) -> None:  # fmt: skip
        plan = _own(plan)
        expected, rows = (plan.rows.size, plan.q_heads, plan.head_dim), plan.rows
        if q.shape != expected or kv.k.shape[1:] != (plan.kv_heads, kv.k.shape[2], plan.head_dim) or kv.k.shape != kv.v.shape:
            raise ValueError(f"plan is for q {expected} and {plan.kv_heads} KV heads, got q {tuple(q.shape)}, "
                             f"K {tuple(kv.k.shape)} and V {tuple(kv.v.shape)}")  # fmt: skip
        block = _block_size(kv)
        for tensor in (lse, logits):
            if tensor is not None:
                fp32(tensor)
        if positions is not None:
            index(positions, torch.int32)
        if rows.size == 0 or plan.kv_heads == 0:
            return
        lists, most_splits = rows.lists, splits(rows, block)
        listed = {
            "offsets": None if lists is None else lists.offsets,
            "lengths": None if lists is None else lists.lengths,
            "list_row": 0 if lists is None else lists.lengths.shape[1],
            "list_head": 0 if lists is None or lists.lengths.shape[1] == 1 else 1,
        }
        by_head, block_d = rows.start.ndim == 2, max(16, power_of_2(plan.head_dim))
        common = {
            "q": q, "q_row": strides(q)[0], "q_head": q.stride(1), "request": rows.request, "start": rows.start,
            "start_row": rows.start.stride(0), "start_head": int(by_head and rows.start.shape[1] > 1), "stop": rows.stop,
            **listed, "rows": rows.size, "heads": heads, "out": out, "out_row": 0 if out is None else strides(out)[0],
            "out_head": 0 if out is None else out.stride(1), "lse": lse, "lse_row": 0 if lse is None else lse.stride(0),
            "words": None if folded is None else folded.words, "at": None if folded is None else folded.at,
            "counts": None if folded is None else folded.counts, "scale": scale, "KV_HEADS": plan.kv_heads,
            "GROUP": plan.group, "DIM": plan.head_dim, "SPLIT": SPLIT, "SPLITS": most_splits, "PROGRAMS": PROGRAMS,
            "BLOCK_D": block_d,
        }  # fmt: skip
        own = {
            "k": kv.k, "k_block": strides(kv.k)[0], "k_head": kv.k.stride(1), "k_token": kv.k.stride(2), "v": kv.v,
            "v_block": strides(kv.v)[0], "v_head": kv.v.stride(1), "v_token": kv.v.stride(2), "tables": rows.tables,
            "tables_row": rows.tables.stride(0), "active": active, "logits": logits, "read": read, "totals": self._totals,
            "positions": None if lists is None else lists.positions if positions is None else positions,
            "logits_row": 0 if logits is None else logits.stride(0), "logits_head": 0 if logits is None else logits.stride(1),
            "logit_rows": 0 if logits is None else len(logits), "width": 0 if logits is None else logits.shape[2],
            "BLOCK_SIZE": block, "COUNTERS": COUNTERS,
            "BLOCK_N": 128 if INTERPRETED.value else min(64, max(16, 16384 // (block_d * kv.k.element_size()))),
        }  # fmt: skip
        sums, stats = plan.scratch, plan.scratch[plan.queries * most_splits * plan.head_dim :]
        for tiles in plan.tiles:
            at = {"tiles": tiles.count, "first": tiles.first, "last": tiles.last, "TILE": tiles.size}
            pairs, programs = tiles.most * plan.kv_heads, PROGRAMS // tiles.size
            queries = power_of_2(tiles.size * plan.group)
            attention.attend[(max(pairs, min(pairs * most_splits, programs)),)](
                **common,
                **own,
                **at,
                sums_out=sums,
                stats_out=stats,
                BLOCK_M=max(16, queries),
                num_warps=8 if tiles.size > 1 else 4,
                num_stages=2 if q.element_size() == 4 else 3,
            )
            if out is not None and most_splits > 1:
                attention.merge[(min(pairs, programs // 2) * tiles.size * plan.group,)](
                    **common, **at, sums_in=sums, stats_in=stats, AT_ONCE=8, num_warps=1
                )

    def fold(self, kv: PagedKV, tables: Tensor, request: Tensor, first: Tensor, last: Tensor, words: Tensor, at: Tensor, *,
             origin: int, most: int) -> None:  # fmt: skip
        """See the contract."""
        check_folding(kv, tables, words, (request, first, last, at))
        same_dtype(kv.k, kv.v)
        block, (_, heads, _, dim) = _block_size(kv), kv.k.shape
        if len(at) and heads:
            attention.fold[len(at), heads, 2](
                kv.k, *strides(kv.k)[:3], kv.v, *strides(kv.v)[:3], tables, tables.stride(0), request, first, last,
                words.view(torch.float32), at, origin, KV_HEADS=heads, DIM=dim, BLOCK_SIZE=block, BLOCK_N=power_of_2(block),
                BLOCK_D=power_of_2(dim),
            )  # fmt: skip


def _own(plan: Plan) -> TritonPlan:
    if not isinstance(plan, TritonPlan):
        raise TypeError(f"plan was made by another back end: {type(plan).__name__}; use this one's plan()")
    return plan


def _block_size(kv: PagedKV) -> int:
    size = kv.k.shape[2]
    if not 1 <= size <= LARGEST_BLOCK:
        raise ValueError(f"block size is {size}; the triton back end takes up to {LARGEST_BLOCK}")
    return size


def _check_each(tensor: Tensor | None, size: int, dtype: torch.dtype) -> None:
    """Raises unless it is so many integers, or none are wanted."""
    if tensor is not None:
        index(tensor, dtype)
        if tensor.shape != (size,):
            raise ValueError(f"must have {size} elements; got {tuple(tensor.shape)}")
