"""A batch: the runs of one step that one selector decides for, and what each of them sees.

    run   consecutive rows of one request that share a list and the beginning of their tail
          decode: one row        sparse prefill: a grid cell        seeding: the last chunk of a prompt

    row at position p sees    list (positions < start, one per KV head)    followed by    [start, p]

Tails of a run begin at the same position for all KV heads, unless a hook sets `per_head`. A hook writes `start`, `lengths` and
`lists` through the methods here; the step reads them when the layer attends. All arrays are views of the step's own, so nothing
is copied per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.engine.selection.base import Geometry, MethodStats
from kvloom.kernels.interface import Kernels, PagedKV, PoolHow, Rows

if TYPE_CHECKING:
    from kvloom.engine.request import Request

Ints = npt.NDArray[np.int32]
Which = npt.NDArray[np.int64] | slice
EVERY = slice(None)


class Scratch:
    """Work space for logits and rankings, kept between layers and steps. One user at a time per name."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A contiguous tensor of this shape; its contents are whatever was there."""
        size = int(np.prod(shape))
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
            with torch.inference_mode(False):
                buffer = self._buffers[name] = torch.empty(size + size // 4, dtype=dtype)
        return buffer[:size].view(shape)


@dataclass(slots=True, eq=False, kw_only=True)
class Batch:
    """Runs of one selector in one step. Index arrays are int32; `which` selects runs (indices or a slice)."""

    requests: Sequence[Request]
    """Of every run."""
    first_row: int
    """The batch's rows are [first_row, first_row + rows) of the step."""
    counts: Ints
    """[runs]: rows of every run."""
    begins: Ints
    """[runs]: position of a run's first row."""
    stops: Ints
    """[runs]: position after a run's last row: all that is known there."""
    tables: Tensor
    """[requests, max_blocks] int32: the step's block tables."""
    table: Ints
    """[runs]: row of `tables`."""
    start: Ints
    """[runs, kv_heads]: where tails begin."""
    offsets: Ints
    """[runs, kv_heads]: where lists begin in the step's positions."""
    lengths: Ints
    """[runs, kv_heads]: entries of lists."""
    lists: Tensor
    """[runs, heads, width] int32: room for the lists; head 0 is every KV head's when heads is 1."""
    base: int
    """Offset of `lists` in the step's positions."""
    kernels: Kernels
    geometry: Geometry
    scratch: Scratch
    stats: MethodStats
    decodes: bool
    """Whether these are decode rows: one per run."""

    changed: bool = True
    """Whether what is seen has changed since the last layer (contents of lists alone do not count)."""
    emits: bool = False
    """Whether this layer's logits are wanted; reset before every layer."""
    per_head: bool = False
    """Whether tails of one run may begin at different positions for different KV heads."""
    wants_lse: bool = False
    """Whether a hook wants `lse` in `after`."""
    lse: Tensor | None = None
    """[rows, q_heads] fp32, natural log: of what was seen in this layer, if `wants_lse`. A hook that merges more into `out`
    may write it. Valid during `after`."""
    rows: int = field(init=False)
    """All rows of the batch."""
    attended: npt.NDArray[np.float64] = field(init=False)
    """[runs]: positions read by a run's last row so far, mean over KV heads, summed over layers."""
    seen: npt.NDArray[np.float64] = field(init=False)
    """[runs]: the same in the last layer."""
    partial: npt.NDArray[np.bool_] = field(init=False)
    """[runs]: whether a run saw less than everything in some layer."""

    def __post_init__(self) -> None:
        self.rows = int(self.counts.sum())
        self.attended, self.seen = np.zeros(len(self.counts)), np.zeros(len(self.counts))
        self.partial = np.zeros(len(self.counts), np.bool_)
        self.see_all()
        self.own_lists()

    @property
    def runs(self) -> int:
        return len(self.counts)

    def own_lists(self) -> None:
        """Every run reads its own lists, each KV head the list of its own head."""
        _, heads, width = self.lists.shape
        runs = np.arange(self.runs, dtype=np.int32)[:, None] * np.int32(heads * width) + np.int32(self.base)
        columns = np.arange(self.geometry.kv_heads, dtype=np.int32) * np.int32(width if heads > 1 else 0)
        self.offsets[:] = runs + columns
        self.changed = True

    def see_all(self, which: Which = EVERY) -> None:
        """These runs see everything."""
        self.start[which] = 0
        self.lengths[which] = 0
        self.changed = True

    def see(self, which: Which, start: Any, lengths: Any) -> None:
        """These runs see their lists, then tails from `start`.

        start: a number or [selected], or with `per_head` [selected, kv_heads]
        lengths: a number, [selected, 1] or [selected, kv_heads]
        """
        self.start[which] = start[:, None] if np.ndim(start) == 1 else start
        self.lengths[which] = lengths
        self.changed = True

    def score(self, q: Tensor, kv: PagedKV, table: Ints, first: Ints, last: Ints, scale: float, name: str = "logits") -> Tensor:
        """Query-key products over positions [first, last): one row per query, without reading V.

        q: [n, q_heads, head_dim]; table: [n] rows of `tables`. Returns [n, q_heads, width] fp32 (scratch), column 0 at `first`.
        """
        geometry = self.geometry
        rows = Rows(self.tables, _tensor(table), _tensor(first), _tensor(last))
        plan = self.kernels.plan(rows, geometry.q_heads, geometry.kv_heads, geometry.head_dim)
        width = max(1, int((last - first).max(initial=0)))
        out = self.scratch.take(name, len(first), geometry.q_heads, width)
        return self.kernels.score(q, kv, plan, scale=scale, out=out)

    def rank(self, logits: Tensor, first: Ints, last: Ints, groups: int, *, how: PoolHow, window: int = 1) -> Tensor:
        """Softmax over columns [first, last) per query head, pooled over each of `groups` head groups: see `Kernels.pool`.

        Returns [n, groups, width] fp32 (scratch), column 0 at `first`.
        """
        width = max(1, int((last - first).max(initial=0)))
        out = self.scratch.take("ranking", logits.shape[0], groups, width)
        return self.kernels.pool(logits, _tensor(first), _tensor(last), groups, how=how, window=window, out=out)

    def count_layer(self) -> None:
        """Called once per layer, after `before`: what the last row of every run reads."""
        if self.changed:
            self.seen = self.stops + (self.lengths - self.start).sum(axis=1) / self.geometry.kv_heads
            self.partial |= self.seen < self.stops
        self.attended += self.seen

    def sees_less(self) -> npt.NDArray[np.bool_]:
        """[runs]: whether a run sees something, but not everything, in the layer that was counted last."""
        less: npt.NDArray[np.bool_] = (self.seen < self.stops) & (self.seen > 0)
        return less

    def everything(self) -> Rows:
        """The batch's rows with everything visible. Decode batches only."""
        return Rows(self.tables, _tensor(self.table), torch.zeros(self.runs, dtype=torch.int32), _tensor(self.stops))


def _tensor(array: Ints) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.int32))
