"""The back end itself: argument checks, addresses and strides; all arithmetic is in csrc/.

Every method is one C++ call that releases the interpreter lock and runs on the library's own threads (csrc/parallel.h). Memory
safety rests on three checks made here: element types agree, innermost strides are 1, shapes agree. Contents of index tensors
(tables, slots, positions) are trusted, as the contract says.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvloom.kernels.checks import fp32, index, same_dtype, strides
from kvloom.kernels.counters import Counters
from kvloom.kernels.interface import COMPARES, Allowed, Folded, PagedKV, Plan, PoolHow, Renewal, Rows
from kvloom.kernels.quantized import QuantizedLinears
from kvloom.kernels.reference import check_folded, check_folding, check_pool, check_renewal, check_sample

from .build import build
from .compiler import Progress
from .graph import NativeGraph
from .library import DTYPES, Library
from .plan import NativePlan, make_plan
from .quantized import NativeQuantized
from .variants import tiles_note


def load(threads: int | None = None, *, generic: bool = False, progress: Progress | None = None) -> NativeKernels:
    """This machine's native back end. threads: of a call, the calling one among them; torch's number unless given.

    generic: the build without processor-specific code, for tests. Raises NativeUnavailable with the reason, or ValueError if
    $KVLOOM_NATIVE names what cannot run here.
    """
    built = build(generic=generic, progress=progress)
    made = NativeKernels(Library(built.path, built.paths), threads or torch.get_num_threads(), str(built))
    if note := tiles_note():
        made.paths = f"{made.paths}; {note}"
    return made


_EVERY = 2**62
"""Rows of a captured call that want logits, however many there are when it is replayed."""


class NativeKernels:
    """`kernels.interface.Kernels` in C++. Safe to use from several threads; counters are then approximate."""

    name = "native"
    dense: str | None = None

    def __init__(self, library: Library, threads: int, build: str = "") -> None:
        self.library = library
        self.build = build
        self.paths = str(library.paths)
        self.threads = threads
        self._totals = np.zeros(5, np.int64)
        self.quantized: QuantizedLinears | None = NativeQuantized(self)

    @property
    def counters(self) -> Counters:
        """As of now; the C++ side adds to them, in calls that are replayed too."""
        return Counters(*self._totals.tolist())

    def graph(self) -> NativeGraph:
        """See the contract."""
        return NativeGraph(self.library)

    # Attention ---------------------------------------------------------------------------------------------------

    def store(self, k: Tensor, v: Tensor, kv: PagedKV, slots: Tensor) -> None:
        """See the contract. k, v: any strides whose last is 1."""
        rows, heads, dim = k.shape
        same_dtype(k, v, kv.k, kv.v)
        index(slots, torch.int64)
        k_strides, v_strides = strides(k), strides(v)
        item = k.element_size()
        self.library.store(
            k.data_ptr(), k_strides[0], k_strides[1], v.data_ptr(), v_strides[0], v_strides[1],
            *_paged(kv), slots.data_ptr(), rows, dim * item, heads, item, self.threads,
        )  # fmt: skip

    def plan(self, rows: Rows, q_heads: int, kv_heads: int, head_dim: int, into: Plan | None = None) -> NativePlan:
        """See the contract. Rows of one request that follow each other, each seeing at least what the one before saw,
        share a tile."""
        if into is not None and not isinstance(into, NativePlan):
            raise TypeError(f"plan was made by another back end: {type(into).__name__}; use this one's plan()")
        return make_plan(self.library, rows, q_heads, kv_heads, head_dim, self.threads, into)

    def attend(self, q: Tensor, kv: PagedKV, plan: Plan, *, scale: float, out: Tensor, lse: Tensor | None = None,
               logits: Tensor | None = None, positions: Tensor | None = None, heads: Tensor | None = None,
               read: Tensor | None = None, folded: Folded | None = None) -> Tensor:  # fmt: skip
        """See the contract."""
        same_dtype(q, out, kv.k, kv.v)
        out_row, out_head, _ = strides(out)
        listed = 0 if positions is None else _int32(positions)
        sums = (0, 0, 0)
        if folded is not None:
            check_folded(folded, q.shape[0])
            sums = (folded.words.data_ptr(), folded.at.data_ptr(), folded.counts.data_ptr())
        further = (0, _ints(heads, kv.k.shape[1]), listed, _ints(read, q.shape[0], torch.int64), *sums)
        self._run(q, kv, plan, scale, (out.data_ptr(), out_row, out_head), lse, logits, further)
        return out

    def fold(self, kv: PagedKV, tables: Tensor, request: Tensor, first: Tensor, last: Tensor, words: Tensor, at: Tensor, *,
             origin: int, most: int) -> None:  # fmt: skip
        """See the contract. One thread adds up a head's keys or values of a row."""
        check_folding(kv, tables, words, (request, first, last, at))
        same_dtype(kv.k, kv.v)
        _, heads, _, dim = kv.k.shape
        self.library.fold(
            *_paged(kv), tables.data_ptr(), tables.stride(0), request.data_ptr(), first.data_ptr(), last.data_ptr(),
            at.data_ptr(), words.data_ptr(), len(at), heads, dim, origin, DTYPES[kv.k.dtype], self.threads,
        )  # fmt: skip

    def score(self, q: Tensor, kv: PagedKV, plan: Plan, *, scale: float, out: Tensor, active: Tensor | None = None) -> Tensor:
        """See the contract."""
        same_dtype(q, kv.k, kv.v)
        self._run(q, kv, plan, scale, (0, 0, 0), None, out, (_ints(active, q.shape[0]), *(0,) * 6))
        return out

    def _run(self, q: Tensor, kv: PagedKV, plan: Plan, scale: float, out: tuple[int, int, int],
             lse: Tensor | None, logits: Tensor | None, further: tuple[int, ...]) -> None:  # fmt: skip
        if not isinstance(plan, NativePlan):
            raise TypeError(f"plan was made by another back end: {type(plan).__name__}; use this one's plan()")
        expected = (plan.rows.size, plan.q_heads, plan.head_dim)
        if q.shape != expected or kv.k.shape[3] != plan.head_dim:
            raise ValueError(f"plan is for q {expected}, got q {tuple(q.shape)} and K {tuple(kv.k.shape)}")
        if scale <= 0:
            raise ValueError(f"scale must be positive; got {scale}")
        q_row, q_head, _ = strides(q)
        lse_at = (0, 0) if lse is None else (_fp32(lse), strides(lse)[0])
        logits_at: tuple[int, ...] = (0,) * 5
        if logits is not None:
            wanted = _EVERY if len(logits) == q.shape[0] else len(logits)
            logits_at = (_fp32(logits), wanted, *strides(logits)[:2], logits.shape[2])
        self.library.attend(q.data_ptr(), q_row, q_head, *out, *lse_at, *logits_at, *_paged(kv), plan.handle, *further,
                            self._totals.ctypes.data, scale, DTYPES[q.dtype])  # fmt: skip
        if (piece := self.library.capture) is not None:
            piece.plans.add(plan)

    def pool(self, logits: Tensor, first: Tensor, last: Tensor, groups: int, *,
             how: PoolHow, window: int, out: Tensor, active: Tensor | None = None) -> Tensor:  # fmt: skip
        """See the contract."""
        check_pool(logits, groups, how, window)
        index(first, torch.int32)
        index(last, torch.int32)
        rows, q_heads, _ = logits.shape
        if not (first.shape == last.shape == (rows,) and out.shape[:2] == (rows, groups)):
            raise ValueError(
                f"logits are {tuple(logits.shape)} in {groups} groups, but first is {tuple(first.shape)}, last "
                f"{tuple(last.shape)} and out {tuple(out.shape)}; they must have one row each"
            )
        self.library.pool(
            _fp32(logits), *logits.stride()[:2], first.data_ptr(), last.data_ptr(),
            _ints(active, rows), _fp32(out), *out.stride()[:2], rows,
            q_heads, groups, window, how == "max", self.threads,
        )  # fmt: skip
        return out

    def select(self, scores: Tensor, lengths: Tensor, k: int, *, offset: Tensor | None = None,
               out: tuple[Tensor, Tensor | None] | None = None,
               at: Tensor | None = None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """See the contract. NaN is not ordered meaningfully."""
        rows, heads = scores.shape[0], 1 if scores.ndim == 2 else scores.shape[1]
        index(lengths, torch.int32)
        if offset is not None:
            index(offset, torch.int32)
        shape = (*scores.shape[:-1], k)
        columns, counts = out or (torch.empty(shape, dtype=torch.int32), torch.empty(shape[:-1], dtype=torch.int32))
        if counts is not None:
            index(counts, torch.int32)
        if (
            columns.dtype is not torch.int32
            or columns.shape != (shape if at is None else shape[1:])
            or (counts is not None and counts.shape != shape[:-1])
        ):
            raise ValueError(f"out must be int32 {list(shape)} and {list(shape[:-1])}; got {columns.dtype} "
                             f"{tuple(columns.shape)} and {None if counts is None else tuple(counts.shape)}")  # fmt: skip
        steps = (*((0,) if at is not None else ()), *strides(columns)[:-1], *((0,) if scores.ndim == 2 else ()))
        self.library.select(
            _fp32(scores), scores.stride(0), 0 if scores.ndim == 2 else scores.stride(1), lengths.data_ptr(),
            0 if offset is None else offset.data_ptr(), columns.data_ptr(), _ints(at, rows), *steps,
            0 if counts is None else counts.data_ptr(), rows, heads, k, self.threads,
        )  # fmt: skip
        return columns, counts

    def renew(self, q: Tensor, words: Tensor, at: Tensor, stop: Tensor, due: Tensor, how: Renewal,
              angles: tuple[Tensor, Tensor] | None, active: Tensor, start: Tensor, lengths: Tensor,
              counts: Tensor) -> None:  # fmt: skip
        """See the contract."""
        check_renewal(q, how, (at, stop, due, active, start), words, lengths, counts)
        q_row, q_head, _ = strides(q)
        cos, sin, rotary = (0, 0, 0) if angles is None else (_fp32(angles[0]), _fp32(angles[1]), 2 * angles[0].shape[1])
        self.library.renew(
            q.data_ptr(), q_row, q_head, cos, sin, words.data_ptr(), at.data_ptr(), stop.data_ptr(), due.data_ptr(),
            active.data_ptr(), start.data_ptr(), lengths.data_ptr(), counts.data_ptr(), q.shape[0], how.tail, how.query,
            q.shape[1], q.shape[2], rotary, COMPARES.index(how.compare), how.recent, how.most, how.width, lengths.shape[1],
            how.dense,
            DTYPES[q.dtype], how.threshold,
        )  # fmt: skip

    def rotate(self, k: Tensor, delta: Tensor, inv_freq: Tensor, out: Tensor) -> Tensor:
        """See the contract. `out` may be `k`."""
        rows, heads, dim = k.shape
        same_dtype(k, out)
        index(delta, torch.int32)
        (k_row, k_head, _), (out_row, out_head, _) = strides(k), strides(out)
        self.library.rotate(
            k.data_ptr(), k_row, k_head, out.data_ptr(), out_row, out_head, delta.data_ptr(), _fp32(inv_freq),
            rows, heads, dim, 2 * inv_freq.shape[0], DTYPES[k.dtype], self.threads,
        )  # fmt: skip
        return out

    # Sampling ---------------------------------------------------------------------------------------------------

    def sample(self, logits: Tensor, how: Tensor, out: Tensor, allowed: Allowed | None = None) -> Tensor:
        """See the contract."""
        check_sample(logits, how, out, allowed)
        masks = (0, 0, 0) if allowed is None else (allowed.bits.data_ptr(), allowed.bits.stride(0), allowed.rows.data_ptr())
        self.library.sample(
            _fp32(logits), logits.stride(0), how.data_ptr(), out.data_ptr(), *masks, *logits.shape, self.threads
        )  # fmt: skip
        return out

    # Layer ------------------------------------------------------------------------------------------------------

    def add_rms_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> Tensor:
        """See the contract. weight: any dtype of the three."""
        rows, hidden = x.shape
        if x.dtype is not torch.float32:
            same_dtype(x, out)
        if delta is not None:
            same_dtype(delta, out)
        delta_at = (0, 0) if delta is None else (delta.data_ptr(), strides(delta)[0])
        self.library.add_rms_norm(
            x.data_ptr(), strides(x)[0], *delta_at, weight.data_ptr(), out.data_ptr(), strides(out)[0], rows, hidden,
            eps, DTYPES[x.dtype], DTYPES[weight.dtype], DTYPES[out.dtype], self.threads,
        )  # fmt: skip
        return out

    def rotate_store(self, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, kv: PagedKV, slots: Tensor, q: Tensor,
                     q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 0.0) -> Tensor:  # fmt: skip
        """See the contract. A row whose slot is -1 gets its q and stores nothing."""
        rows, q_heads, dim = q.shape
        same_dtype(qkv, q, kv.k, kv.v)
        index(positions, torch.int64)
        index(slots, torch.int64)
        q_row, q_head, _ = strides(q)
        norm = q_norm if q_norm is not None else k_norm
        if q_norm is not None and k_norm is not None:
            same_dtype(q_norm, k_norm)
        self.library.rotate_store(
            qkv.data_ptr(), strides(qkv)[0], _fp32(cos), _fp32(sin), strides(cos)[0], positions.data_ptr(),
            slots.data_ptr(), *_paged(kv), q.data_ptr(), q_row, q_head,
            0 if q_norm is None else q_norm.data_ptr(), 0 if k_norm is None else k_norm.data_ptr(), rows,
            q_heads, kv.k.shape[1], dim, 2 * cos.shape[1], eps,
            0 if norm is None else DTYPES[norm.dtype], DTYPES[q.dtype], self.threads,
        )  # fmt: skip
        return q

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> Tensor:
        """See the contract."""
        rows, intermediate = out.shape
        same_dtype(gate_up, out)
        self.library.silu_mul(
            gate_up.data_ptr(), strides(gate_up)[0], out.data_ptr(), strides(out)[0], rows, intermediate,
            DTYPES[out.dtype], self.threads,
        )  # fmt: skip
        return out


def _fp32(tensor: Tensor) -> int:
    fp32(tensor)
    return tensor.data_ptr()


def _ints(tensor: Tensor | None, size: int, dtype: torch.dtype = torch.int32) -> int:
    """The address of that many integers; 0 for none."""
    if tensor is None:
        return 0
    index(tensor, dtype)
    if tensor.shape != (size,):
        raise ValueError(f"must have {size} elements; got {tuple(tensor.shape)}")
    return tensor.data_ptr()


def _int32(tensor: Tensor) -> int:
    index(tensor, torch.int32)
    return tensor.data_ptr()


def _paged(kv: PagedKV) -> tuple[int, ...]:
    """Addresses and strides of both tensors, and the block size."""
    k, v = kv
    return (k.data_ptr(), *strides(k)[:3], v.data_ptr(), *strides(v)[:3], k.shape[2])
