"""NumbaKernels: the contract on CPU, compiled with numba.

Owns the way from tensors to addresses: checks dtypes and strides, picks the element type and the number of threads, counts.
The arithmetic is in `attention`, `layer`, `ranking` and `topk`; cutting into tasks is in `partition`. Called from one thread at
a time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba.np.ufunc.parallel import get_num_threads, set_num_threads
from torch import Tensor

from kvloom.kernels.cpu import attention, layer, ranking, topk
from kvloom.kernels.cpu.compiler import config
from kvloom.kernels.cpu.memory import Memory
from kvloom.kernels.cpu.partition import Partition, partition
from kvloom.kernels.cpu.scalar import BF16, FP16, FP32
from kvloom.kernels.cpu.vector import LANES
from kvloom.kernels.interface import Counters, PagedKV, Plan, PoolHow, QuantizedLinears, Rows
from kvloom.kernels.reference import check_pool

_KINDS: dict[torch.dtype, Any] = {torch.bfloat16: BF16, torch.float16: FP16, torch.float32: FP32}
_SERIAL_ELEMENTS = 32768  # below this, a row-wise operation is done before a second thread has woken up


@dataclass(slots=True)
class NumbaPlan:
    """A step's rows, cut into tasks; `prepared` by how many of the first rows join no tile, because they want logits."""

    rows: Rows
    q_heads: int
    kv_heads: int
    head_dim: int
    prepared: dict[int, _Prepared]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """`shape` is what the compiled code reads, at `address`; `held` keeps alive what it points to."""

    partition: Partition
    shape: np.ndarray[Any, np.dtype[np.int64]]
    address: int
    held: tuple[object, ...]


def _kind(x: Tensor, what: str) -> Any:
    kind = _KINDS.get(x.dtype)
    if kind is None:
        raise TypeError(f"{what} is {x.dtype}; the numba back end takes bfloat16, float16 or float32")
    return kind


def _same(kind: Any, what: str, *others: Tensor) -> None:
    for other in others:
        if _KINDS.get(other.dtype) is not kind:
            raise TypeError(f"{what} differ in dtype; the numba back end needs them equal, not {other.dtype} among others")


def _dense(what: str, *tensors: Tensor) -> None:
    for x in tensors:
        if not x.is_contiguous():
            raise ValueError(f"{what} must be contiguous; got strides {x.stride()} for shape {tuple(x.shape)}")


def _strides(x: Tensor, what: str) -> tuple[int, ...]:
    """All strides but the last, which must be 1 (or not matter)."""
    strides = x.stride()
    if strides[-1] != 1 and x.shape[-1] != 1:
        raise ValueError(f"{what} must have stride 1 in its last dimension; got strides {strides}")
    return strides[:-1]


def default_threads() -> int:
    """One per core this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class NumbaKernels:
    """`interface.Kernels` on CPU. threads: at most this many; the default is one per core this process may use."""

    name = "numba"
    quantized: QuantizedLinears | None = None

    def __init__(self, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}; allowed: 1 or more, or None for one per core")
        self.threads = min(threads or default_threads(), config.NUMBA_NUM_THREADS)
        self.counters = Counters()
        self._memory = Memory(self.threads)

    def _spread(self, rows: int, elements: int) -> int:
        """Threads for a row-wise operation."""
        return 1 if elements < _SERIAL_ELEMENTS else max(1, min(self.threads, rows))

    # Attention ---------------------------------------------------------------------------------------------------

    def store(self, k: Tensor, v: Tensor, kv: PagedKV, slots: Tensor) -> None:
        """Write rows into slots; see `interface.Kernels.store`."""
        kind = _kind(kv.k, "the cache")
        _same(kind, "k, v and the cache", k, v, kv.v)
        rows, heads, dim = k.shape
        strides = _strides(k, "k") + _strides(v, "v")
        layer.store_rows(k.data_ptr(), v.data_ptr(), strides, kv.k.data_ptr(), _strides(kv.k, "the K cache"), kv.v.data_ptr(),
                         _strides(kv.v, "the V cache"), kv.k.shape[2], slots.data_ptr(), rows, heads, dim, kind)  # fmt: skip

    def graph(self) -> None:
        """None: calls are made one by one."""

    def plan(self, rows: Rows, q_heads: int, kv_heads: int, head_dim: int, into: Plan | None = None) -> Plan:
        """Cut rows into tasks; see `interface.Kernels.plan`. Uses shared memory: the latest plans of one step only."""
        if q_heads % kv_heads:
            raise ValueError(f"{q_heads} query heads do not divide into {kv_heads} KV heads")
        if get_num_threads() != self.threads:  # numba keeps this per calling thread
            set_num_threads(self.threads)
        return NumbaPlan(rows, q_heads, kv_heads, head_dim, {0: self._prepare(rows, q_heads, kv_heads, head_dim, alone=0)})

    def _prepare(self, rows: Rows, q_heads: int, kv_heads: int, head_dim: int, alone: int) -> _Prepared:
        width = -(-head_dim // LANES) * LANES
        group = q_heads // kv_heads
        parted = partition(rows, q_heads, kv_heads, head_dim, width, alone)
        scratch, size, parts, done, following, held = self._memory.reserve(
            attention.scratch_size(group, width), parted.parts, len(parted.units)
        )
        threads = min(self.threads, max(1, len(parted.tasks)))
        values = (parted.units.ctypes.data, parted.tasks.ctypes.data, len(parted.tasks), following, done, parts, scratch, size,
                  threads, group, head_dim, width, 0)  # fmt: skip
        shape = np.array(values, np.int64)
        return _Prepared(parted, shape, shape.ctypes.data, held)

    def _run(self, prepared: _Prepared, plan: NumbaPlan, q: Tensor, kv: PagedKV, values: bool, out: Tensor | None,
             lse: Tensor | None, logits: Tensor | None, scale: float) -> None:  # fmt: skip
        k, v = kv
        kind = _kind(k, "the cache")
        _same(kind, "q, the cache and out", q, v, *(() if out is None else (out,)))
        prepared.shape[attention.BLOCK_SIZE] = k.shape[2]
        if lse is not None:
            _dense("lse", lse)
        logit_strides = (0, 0, 0) if logits is None else (*_strides(logits, "logits"), len(logits))
        attention.attend(
            prepared.address, plan.q_heads, q.data_ptr(), _strides(q, "q"), k.data_ptr(), _strides(k, "the K cache"),
            v.data_ptr() if values else 0, _strides(v, "the V cache"), 0 if out is None else out.data_ptr(),
            (0, 0) if out is None else _strides(out, "out"), 0 if lse is None else lse.data_ptr(),
            0 if logits is None else logits.data_ptr(), logit_strides, scale, kind,
        )  # fmt: skip

    def _prepared(self, plan: NumbaPlan, logits: Tensor | None) -> _Prepared:
        """The first rows without tiles, which hand out no logits; the others as planned."""
        alone = 0 if logits is None else len(logits)
        if alone not in plan.prepared:
            plan.prepared[alone] = self._prepare(plan.rows, plan.q_heads, plan.kv_heads, plan.head_dim, alone)
        return plan.prepared[alone]

    def attend(self, q: Tensor, kv: PagedKV, plan: Plan, *, scale: float, out: Tensor,
               lse: Tensor | None = None, logits: Tensor | None = None) -> Tensor:  # fmt: skip
        """Softmax attention; see `interface.Kernels.attend`."""
        assert isinstance(plan, NumbaPlan)
        prepared = self._prepared(plan, logits)
        self._run(prepared, plan, q, kv, True, out, lse, logits, scale)
        counts, counters = prepared.partition.counts, self.counters
        counters.rows += counts.rows
        counters.positions += counts.positions
        counters.kv_bytes += counts.kv_bytes * q.element_size()
        counters.list_kv_bytes += counts.list_kv_bytes * q.element_size()
        return out

    def score(self, q: Tensor, kv: PagedKV, plan: Plan, *, scale: float, out: Tensor) -> Tensor:
        """Query-key products; see `interface.Kernels.score`."""
        assert isinstance(plan, NumbaPlan)
        prepared = self._prepared(plan, out)
        self._run(prepared, plan, q, kv, False, None, None, out, scale)
        self.counters.score_bytes += prepared.partition.counts.score_bytes * q.element_size()
        return out

    def pool(self, logits: Tensor, first: Tensor, last: Tensor, groups: int, *,
             how: PoolHow, window: int, out: Tensor) -> Tensor:  # fmt: skip
        """From logits to rankings; see `interface.Kernels.pool`."""
        check_pool(logits, groups, how, window)
        _dense("first and last", first, last)
        rows, q_heads, _ = logits.shape
        ranking.pool(logits.data_ptr(), _strides(logits, "logits"), first.data_ptr(), last.data_ptr(), out.data_ptr(),
                     _strides(out, "out"), rows, q_heads, groups, window, how == "max")  # fmt: skip
        return out

    def select(self, scores: Tensor, lengths: Tensor, k: int, *, offset: Tensor | None = None,
               out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Top-k with ties to the lower column; see `interface.Kernels.select`."""
        rows = scores.shape[0]
        columns, counts = out or (torch.empty(rows, k, dtype=torch.int32), torch.empty(rows, dtype=torch.int32))
        if columns.dtype != torch.int32 or columns.shape != (rows, k) or counts.shape != (rows,):
            raise ValueError(f"out must be int32 [{rows}, {k}] and [{rows}]; got {columns.dtype} {tuple(columns.shape)} "
                             f"and {tuple(counts.shape)}")  # fmt: skip
        _dense("lengths, counts and offset", lengths, counts, *(() if offset is None else (offset,)))
        topk.select(scores.data_ptr(), *_strides(scores, "scores"), lengths.data_ptr(), k,
                    0 if offset is None else offset.data_ptr(), columns.data_ptr(), *_strides(columns, "columns"),
                    counts.data_ptr(), rows)  # fmt: skip
        return columns, counts

    def merge(self, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
        """Combine two states into the first; see `interface.Kernels.merge`."""
        kind = _kind(out_a, "out_a")
        _same(kind, "out_a and out_b", out_b)
        _dense("attention states", out_a, out_b, lse_a, lse_b)
        layer.merge(
            out_a.data_ptr(), lse_a.data_ptr(), out_b.data_ptr(), lse_b.data_ptr(), lse_a.numel(), out_a.shape[-1], kind
        )

    def rotate(self, k: Tensor, delta: Tensor, inv_freq: Tensor, out: Tensor) -> Tensor:
        """Shift rotary positions; see `interface.Kernels.rotate`."""
        kind = _kind(k, "k")
        _same(kind, "k and out", out)
        _dense("k, delta, inv_freq and out", k, delta, inv_freq, out)
        rows, heads, dim = k.shape
        half, threads = inv_freq.shape[0], self._spread(rows, k.numel())
        table = torch.empty(threads, 2 * half)
        layer.rotate(threads, k.data_ptr(), delta.data_ptr(), inv_freq.data_ptr(), out.data_ptr(), table.data_ptr(), rows,
                     heads, dim, half, kind)  # fmt: skip
        return out

    # Layer ------------------------------------------------------------------------------------------------------

    def add_rms_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> Tensor:
        """Residual addition and RMS norm; see `interface.Kernels.add_rms_norm`."""
        kind = _kind(out, "out")
        if delta is not None:
            _same(kind, "delta and out", delta)
            _dense("delta", delta)
        _dense("x, weight and out", x, weight, out)
        rows, hidden = x.shape
        layer.add_rms_norm(self._spread(rows, rows * hidden), x.data_ptr(), 0 if delta is None else delta.data_ptr(),
                           weight.data_ptr(), eps, out.data_ptr(), rows, hidden, _kind(x, "x"), kind,
                           _kind(weight, "weight"))  # fmt: skip
        return out

    def rotate_store(self, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, kv: PagedKV, slots: Tensor, q: Tensor,
                     q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 0.0) -> Tensor:  # fmt: skip
        """Split, normalise, rotate, store; see `interface.Kernels.rotate_store`."""
        kind = _kind(kv.k, "the cache")
        _same(kind, "qkv, q and the cache", qkv, q, kv.v)
        _dense("q, cos and sin", q, cos, sin)
        rows, q_heads, dim = q.shape
        norms = (0 if q_norm is None else q_norm.data_ptr(), 0 if k_norm is None else k_norm.data_ptr())
        norm = q_norm if q_norm is not None else k_norm
        layer.rotate_store(
            self._spread(rows, qkv.numel()), qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), positions.data_ptr(),
            kv.k.data_ptr(), _strides(kv.k, "the K cache"), kv.v.data_ptr(), _strides(kv.v, "the V cache"), kv.k.shape[2],
            slots.data_ptr(), q.data_ptr(), norms, eps, rows,
            (q_heads, kv.k.shape[1], dim, cos.shape[1], *_strides(qkv, "qkv")), kind,
            kind if norm is None else _kind(norm, "the norm weights"),
        )  # fmt: skip
        return q

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> Tensor:
        """Gated activation; see `interface.Kernels.silu_mul`."""
        kind = _kind(out, "out")
        _same(kind, "gate_up and out", gate_up)
        _dense("gate_up and out", gate_up, out)
        rows, width = out.shape
        layer.silu_mul(self._spread(rows, gate_up.numel()), gate_up.data_ptr(), out.data_ptr(), rows, width, kind)
        return out
