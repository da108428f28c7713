"""The back end for GPUs: every operation of `interface` as Triton kernels, which their interpreter also runs on a CPU.

Element types, strides and shapes are checked here; contents of index tensors are trusted, as the contract says. No operation
reads a tensor's value on the host, or makes a tensor: calls may be captured in CUDA graphs. Plans and `sample` make scratch,
which all operations share, as they follow each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.kernels.checks import fp32, index, same_dtype, strides
from kvloom.kernels.counters import Counters
from kvloom.kernels.cuda_graph import CudaGraph
from kvloom.kernels.interface import Allowed, Folded, PagedKV, Plan, PoolHow, Rows
from kvloom.kernels.quantized import QuantizedLinears
from kvloom.kernels.reference import check_folded, check_folding, check_sample, forbidden
from kvloom.kernels.triton import attention, choose, sampling, topk
from kvloom.kernels.triton import fold as folding
from kvloom.kernels.triton import rows as by_row
from kvloom.kernels.triton.linear import TritonQuantized
from kvloom.kernels.triton.numbers import INTERPRETED, power_of_2
from kvloom.kernels.triton.plan import LARGEST_BLOCK, PROGRAMS, TOGETHER, TritonPlan, check_rows, cut, launch, scratch_size

COUNTERS = 32
"""Places among which counting is spread."""
SCRATCH = 1 << 22
"""Numbers that there are room for at least."""
SAMPLE_SCRATCH = 1 << 24
"""Most numbers that are asked for when tokens are drawn: 64 MiB."""


def load(device: str) -> TritonKernels:
    """Kernels for a CUDA device, or under the interpreter for "cpu". Raises ValueError where they cannot run."""
    if device == "cpu" and not INTERPRETED.value:
        raise ValueError("the triton back end runs on cuda; on cpu only in its interpreter, with TRITON_INTERPRET=1 set")
    return TritonKernels(device)


class TritonKernels:
    """`interface.Kernels` in Triton, on one device and one stream."""

    name = "triton"
    build = ""
    paths = ""
    dense: str | None = None

    # What needs nothing of this object: see the contract.
    store, rotate, rotate_store = staticmethod(by_row.store), staticmethod(by_row.rotate), staticmethod(by_row.rotate_store)
    add_rms_norm, silu_mul = staticmethod(by_row.add_rms_norm), staticmethod(by_row.silu_mul)
    renew = staticmethod(choose.renew)

    def __init__(self, device: str) -> None:
        self.quantized: QuantizedLinears | None = TritonQuantized(device)
        self._totals = torch.zeros(COUNTERS, 5, dtype=torch.int64, device=device)
        self._scratches = [torch.empty(SCRATCH, device=device)]
        """The last is the largest, and in use; calls that were captured with others still write there."""

    @property
    def _scratch(self) -> Tensor:
        return self._scratches[-1]

    @property
    def counters(self) -> Counters:
        """As of now: waits for the device. Calls that are replayed count too."""
        return Counters(*self._totals.sum(0).tolist())

    def graph(self) -> CudaGraph | None:
        """See the contract: of the device; None in the interpreter."""
        return None if INTERPRETED.value else CudaGraph(self._totals.device)

    # Attention ---------------------------------------------------------------------------------------------------

    def plan(self, rows: Rows, q_heads: int, kv_heads: int, head_dim: int, into: Plan | None = None) -> TritonPlan:
        """See the contract. Scratch is as large as any number of rows may need. All that calls read of a plan lies in its rows'
        own tensors, unless there are more rows than requests."""
        check_rows(rows, q_heads, kv_heads, head_dim)
        group = q_heads // max(1, kv_heads)
        tiles = cut(rows, group, head_dim)
        self._reserve(scratch_size(rows, group) * (head_dim + attention.STATS.value))
        return TritonPlan(rows, q_heads, kv_heads, head_dim, tiles, self._scratch)

    def _reserve(self, size: int) -> None:
        """Have scratch of so many numbers."""
        if len(self._scratch) < size:
            self._scratches.append(torch.empty(max(size, 2 * len(self._scratch)), device=self._totals.device))

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
        lists = rows.lists
        listed = {
            "offsets": None if lists is None else lists.offsets,
            "lengths": None if lists is None else lists.lengths,
            "list_row": 0 if lists is None else lists.lengths.shape[1],
            "list_head": 0 if lists is None or lists.lengths.shape[1] == 1 else 1,
        }
        by_head = rows.start.ndim == 2
        common = {
            "q": q, "q_row": strides(q)[0], "q_head": q.stride(1), "request": rows.request, "start": rows.start,
            "start_row": rows.start.stride(0), "start_head": int(by_head and rows.start.shape[1] > 1), "stop": rows.stop,
            **listed, "rows": rows.size, "heads": heads, "out": out, "out_row": 0 if out is None else strides(out)[0],
            "out_head": 0 if out is None else out.stride(1), "lse": lse, "lse_row": 0 if lse is None else lse.stride(0),
            "partial": plan.scratch, "words": None if folded is None else folded.words,
            "at": None if folded is None else folded.at, "counts": None if folded is None else folded.counts, "scale": scale,
            "KV_HEADS": plan.kv_heads, "GROUP": plan.group, "DIM": plan.head_dim, "BLOCK_D": max(16, power_of_2(plan.head_dim)),
        }  # fmt: skip
        own = {
            "k": kv.k, "k_block": strides(kv.k)[0], "k_head": kv.k.stride(1), "k_token": kv.k.stride(2), "v": kv.v,
            "v_block": strides(kv.v)[0], "v_head": kv.v.stride(1), "v_token": kv.v.stride(2), "tables": rows.tables,
            "tables_row": rows.tables.stride(0), "active": active, "logits": logits, "read": read, "totals": self._totals,
            "positions": None if lists is None else lists.positions if positions is None else positions,
            "logits_row": 0 if logits is None else logits.stride(0), "logits_head": 0 if logits is None else logits.stride(1),
            "logit_rows": 0 if logits is None else len(logits), "width": 0 if logits is None else logits.shape[2],
            "BLOCK_SIZE": block, "COUNTERS": COUNTERS,
        }  # fmt: skip
        for tiles in plan.tiles:
            how = launch(tiles, rows.tables.shape[1] * block, plan.group, plan.head_dim, kv.k.element_size(),
                         lists=lists is not None, logits=out is not None and logits is not None)  # fmt: skip
            at = {"tiles": tiles.count, "first": tiles.first, "last": tiles.last, "TILE": how.tile, "PARTS": how.parts,
                  "least": how.least, "splits": how.splits, "PROGRAMS": PROGRAMS, "FEWEST": how.fewest}  # fmt: skip
            each = how.parts * plan.kv_heads
            together = tiles.most if tiles.last is None else max(1, TOGETHER // (how.queries * each))
            for skip in range(0, tiles.most, together):
                pairs = min(together, tiles.most - skip) * each
                programs = pairs * how.splits
                merged = pairs if tiles.last is not None else min(pairs, PROGRAMS // how.fewest)
                attention.attend[(programs if tiles.last is not None else max(pairs, min(programs, PROGRAMS)),)](
                    **common, **own, **at, skip=skip, BLOCK_M=max(16, power_of_2(how.queries)), BLOCK_N=how.block_n,
                    num_warps=how.warps, num_stages=how.stages, maxnreg=how.registers,
                )  # fmt: skip
                if out is not None and (how.splits > 1 or (folded is not None and tiles.last is not None)):
                    attention.merge[(merged * how.queries,)](**common, **at, skip=skip, AT_ONCE=1 if INTERPRETED.value else 8,
                                                    num_warps=1)  # fmt: skip

    def fold(self, kv: PagedKV, tables: Tensor, request: Tensor, first: Tensor, last: Tensor, words: Tensor, at: Tensor, *,
             origin: int, most: int) -> None:  # fmt: skip
        """See the contract."""
        check_folding(kv, tables, words, (request, first, last, at))
        same_dtype(kv.k, kv.v)
        _block_size(kv)
        if len(at) and kv.k.shape[1]:
            sums, scratch = words.view(torch.float32), self._scratch.view(torch.float64)
            folding.fold(kv, tables, request, first, last, sums, at, scratch, origin=origin, most=most)

    # Choosing ----------------------------------------------------------------------------------------------------

    def pool(self, logits: Tensor, first: Tensor, last: Tensor, groups: int, *, how: PoolHow, window: int, out: Tensor,
             active: Tensor | None = None) -> Tensor:  # fmt: skip
        """See the contract."""
        return choose.pool(logits, first, last, groups, self._scratch, how=how, window=window, out=out, active=active)

    def select(self, scores: Tensor, lengths: Tensor, k: int, *, offset: Tensor | None = None,
               out: tuple[Tensor, Tensor | None] | None = None,
               at: Tensor | None = None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """See the contract."""
        return topk.select(scores, lengths, k, self._scratch.view(torch.int32), offset=offset, out=out, at=at)

    # Sampling ----------------------------------------------------------------------------------------------------

    def sample(self, logits: Tensor, how: Tensor, out: Tensor, allowed: Allowed | None = None) -> Tensor:
        """See the contract. Scratch is made for as many rows as come, up to SAMPLE_SCRATCH; masks take a copy of the logits."""
        check_sample(logits, how, out, allowed)
        if allowed is not None:
            logits = logits.masked_fill(forbidden(allowed, logits.shape[1]), -torch.inf)
        self._reserve(min(SAMPLE_SCRATCH, len(logits) * sampling.scratch_size(logits.shape[-1])))
        return sampling.sample(logits, how, out, self._scratch.view(torch.int32))


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
