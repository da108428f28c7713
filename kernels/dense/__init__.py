"""Attention of rows that see everything, by a library in the place of a back end's own kernels: FlashInfer or flash-attn.

A step's host knows which rows those are (`interface.Spans`). All others, and all that a library does not hand out (logits, lse,
positions seen, a folded position), are the back end's own business. Libraries split keys by the batch that a row is in: with
them, a row's last bits depend on its neighbours.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.kernels.counters import Counters
from kvloom.kernels.interface import Kernels, PagedKV, Plan, Rows, Spans

LIBRARIES = {"flashinfer": ("flashinfer",), "flash_attn": ("flash_attn_interface", "flash_attn")}
"""Modules that are looked for, the first that is there."""
HALVES = (torch.bfloat16, torch.float16)

Attend = Callable[[Tensor, PagedKV, Tensor], None]
"""Of q and KV, into out [rows, q_heads, head_dim]. For all plans of captured steps it makes the same calls at the same
addresses."""


class Library(Protocol):
    """What computes softmax(q k^T / sqrt(head_dim)) v for rows with spans."""

    name: str
    about: str
    """The library that is installed, and its version."""

    def check(self, head_dim: int, dtype: torch.dtype, block_size: int) -> None:
        """Raises ValueError for what it does not serve."""
        ...

    def plan(self, rows: Rows, spans: Spans, q_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Attend:
        """A step's host work. Of captured steps of as many rows and KV heads, a plan takes the place of the one before."""
        ...


def installed(name: str) -> str | None:
    """The module of a library that is there."""
    return next((module for module in LIBRARIES[name] if importlib.util.find_spec(module) is not None), None)


def beside(own: Kernels, name: str, device: torch.device, dtype: torch.dtype) -> Kernels:
    """`own` kernels, and that library for rows with spans. Raises ValueError where it cannot be had."""
    if name not in LIBRARIES:
        raise ValueError(f"unknown attention library {name!r}; allowed: {', '.join(LIBRARIES)}")
    if device.type == "cpu":
        raise ValueError(f"{name} computes on a GPU, and the device is cpu")
    module = installed(name)
    if module is None:
        raise ValueError(f"none of {', '.join(LIBRARIES[name])} is installed")
    if dtype not in HALVES:
        raise ValueError(f"{name} takes bf16 and fp16, and dtype is {str(dtype).removeprefix('torch.')}")
    library: Library
    if name == "flashinfer":
        from kvloom.kernels.dense.flashinfer import FlashInfer

        library = FlashInfer(device)
    else:
        from kvloom.kernels.dense.flash_attn import FlashAttention2, FlashAttention3

        library = (FlashAttention3 if module == "flash_attn_interface" else FlashAttention2)(device)
    return cast(Kernels, Beside(own, library, device, dtype))


def send(values: Sequence[int] | npt.NDArray[np.integer], device: torch.device, dtype: npt.DTypeLike = np.int32) -> Tensor:
    """Numbers as a tensor on the device, without waiting for what is queued there."""
    made = torch.from_numpy(np.asarray(values, dtype))
    return (made.pin_memory() if device.type == "cuda" else made).to(device, non_blocking=True)


def ends(counts: Sequence[int]) -> npt.NDArray[np.int32]:
    """[n + 1]: 0, then what the first counts are together."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def spanned(rows: Rows, block_size: int) -> Rows | None:
    """The same rows with what a host that has not made them reads of them, for tests and benchmarks; None if some do not see
    everything up to their own position. Requests may come more than once, each time with a row of the tables."""
    if rows.lists is not None or rows.most is not None or bool(rows.start.any()):
        return None
    request, stop = rows.request.cpu().numpy(), rows.stop.cpu().numpy()
    begins = np.flatnonzero(np.diff(request, prepend=-1).astype(bool) | (np.diff(stop, prepend=-1) != 1) | (stop == 1))
    counts = np.diff(begins, append=len(stop))
    ends, of = stop[begins + counts - 1], request[begins]
    tables = rows.tables[torch.from_numpy(of.astype(np.int64)).to(rows.tables.device)]
    blocks = [table[: -(-end // block_size)] for table, end in zip(tables.cpu().numpy(), ends.tolist())]
    known = Spans(0, counts.tolist(), ends.tolist(), blocks, block_size)
    request = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return rows._replace(tables=tables, request=torch.from_numpy(request).to(rows.request.device), spans=known)


@dataclass(slots=True)
class DensePlan:
    """Rows with spans. own: their plan for the back end's own kernels, made when it is asked for."""

    rows: Rows
    shape: tuple[int, int, int]
    """Query heads, KV heads, head_dim."""
    own: Callable[[], Plan]
    attend: Attend
    counts: Tensor
    """[5] int64: what a call adds to `Counters`."""


class Beside:
    """`interface.Kernels`: another back end's, but for rows with spans."""

    def __init__(self, own: Kernels, library: Library, device: torch.device, dtype: torch.dtype) -> None:
        """dtype: of q, K and V where the library is asked."""
        self._own, self._library, self._device, self._dtype = own, library, device, dtype
        self.name, self.dense = own.name, library.about
        with torch.inference_mode(False):
            self._totals = torch.zeros(5, dtype=torch.int64, device=device)
        self._counts: dict[tuple[int, int, int], Tensor] = {}
        """Of captured steps, by rows and shape."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    @property
    def counters(self) -> Counters:
        """As of now: waits for the device. A chunk's keys and values are counted once."""
        more = self._totals.tolist()
        own = self._own.counters
        return replace(own, **{name: getattr(own, name) + n for name, n in zip(Counters.__dataclass_fields__, more)})

    def plan(self, rows: Rows, q_heads: int, kv_heads: int, head_dim: int, into: Plan | None = None) -> Plan:
        """See the contract. Raises ValueError for rows with spans that the library does not serve."""
        if rows.spans is None:
            return self._own.plan(rows, q_heads, kv_heads, head_dim, None if isinstance(into, DensePlan) else into)
        spans, shape = rows.spans, (q_heads, kv_heads, head_dim)
        self._library.check(head_dim, self._dtype, spans.block_size)
        attend = self._library.plan(rows, spans, *shape, self._dtype)
        own = functools.cache(lambda: self._own.plan(rows._replace(spans=None), *shape))
        return DensePlan(rows, shape, own, attend, self._counted(spans, kv_heads, head_dim))

    def attend(self, q: Tensor, kv: PagedKV, plan: Plan, *, scale: float, out: Tensor, **more: Tensor | None) -> Tensor:
        """See the contract."""
        if not isinstance(plan, DensePlan):
            return self._own.attend(q, kv, plan, scale=scale, out=out, **more)  # type: ignore[arg-type]
        q_heads, kv_heads, head_dim = plan.shape
        spans = plan.rows.spans
        assert spans is not None
        if scale != head_dim**-0.5 or any(asked is not None for asked in more.values()):
            return self._own.attend(q, kv, plan.own(), scale=scale, out=out, **more)  # type: ignore[arg-type]
        expected = ((plan.rows.size, q_heads, head_dim), (kv_heads, spans.block_size, head_dim), self._dtype)
        if (q.shape, kv.k.shape[1:], q.dtype) != expected or kv.k.dtype != kv.v.dtype or kv.k.dtype != q.dtype:
            found = tuple(q.shape), tuple(kv.k.shape[1:]), q.dtype
            raise ValueError(f"plan is for q, a block of K and a dtype {expected}; got {found}, K and V {kv.k.dtype}")
        plan.attend(q, kv, out)
        self._totals.add_(plan.counts)
        return out

    def score(self, q: Tensor, kv: PagedKV, plan: Plan, *, scale: float, out: Tensor, active: Tensor | None = None) -> Tensor:
        """See the contract."""
        return self._own.score(q, kv, plan.own() if isinstance(plan, DensePlan) else plan, scale=scale, out=out, active=active)

    def prepare(self, kv: PagedKV, q_heads: int) -> None:
        """Attend for a chunk of two rows, from whatever lies in the first block, and count nothing: a library may have to
        compile its kernels. Raises ValueError for shapes that it does not serve."""
        _, kv_heads, block_size, head_dim = kv.k.shape
        self._library.check(head_dim, self._dtype, block_size)
        zeros = torch.zeros(2, dtype=torch.int32, device=self._device)
        stop = torch.arange(1, 3, dtype=torch.int32, device=self._device)
        known = Spans(0, [2], [2], [np.zeros(-(-2 // block_size), np.int32)], block_size)
        rows = Rows(zeros.view(1, 2), zeros, zeros, stop, spans=known)
        q = torch.zeros(2, q_heads, head_dim, dtype=self._dtype, device=self._device)
        self._library.plan(rows, known, q_heads, kv_heads, head_dim, self._dtype)(q, kv, torch.empty_like(q))

    def _counted(self, spans: Spans, kv_heads: int, head_dim: int) -> Tensor:
        """What a call adds to the counters, at one address for all captured steps of as many rows."""
        counts, stops = (np.asarray(numbers, np.int64) for numbers in (spans.counts, spans.stops))
        seen = int((counts * stops - counts * (counts - 1) // 2).sum()) * kv_heads
        item = 2 * head_dim * self._dtype.itemsize
        found = [int(counts[stops > 0].sum()), seen, int(stops.sum()) * kv_heads * item, 0, 0]
        made = send(found, self._device, np.int64)
        if not spans.captured:
            return made
        key = (len(counts), kv_heads, head_dim)
        if key not in self._counts:
            with torch.inference_mode(False):
                self._counts[key] = torch.zeros(5, dtype=torch.int64, device=self._device)
        return self._counts[key].copy_(made)
