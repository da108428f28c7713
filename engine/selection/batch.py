"""A batch: the rows of one step that one selector decides for, and what it needs to make its kernel calls.

    run   consecutive rows of one request that share a list and the beginning of their tail
          decode: one row        sparse prefill: a grid cell        seeding: the last chunk of a prompt

Index arrays are numpy's on the host, where a step is prepared, and int32 tensors where it runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.engine.client import MethodStats
from kvloom.engine.device import CPU, staged
from kvloom.engine.requests.state import NO_STATE, StateMemory
from kvloom.engine.requests.traits import Layer, Record
from kvloom.engine.selection.geometry import Geometry
from kvloom.kernels.interface import Kernels, Lists, Plan, PoolHow, Rows

if TYPE_CHECKING:
    from kvloom.engine.requests.request import Request

Ints = npt.NDArray[np.int32]
Plans = Mapping[int, Plan]
"""Of the same rows, by the number of KV heads that a layer has (`Geometry.counts`)."""


class Scratch:
    """Work space that is kept between layers and steps, by name. One user at a time per name.

    What is taken under a name lies where it lay the last time, unless more was wanted than ever before.
    """

    def __init__(self, device: torch.device = CPU) -> None:
        self.device = device
        self._buffers: dict[str, Tensor] = {}
        self.plans: dict[str, dict[int, Plan]] = {}
        """Made anew in their place in every step."""
        self.moves = 0
        """How often something came to lie elsewhere."""

    def take(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A contiguous tensor of this shape; its contents are whatever was there."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
            with torch.inference_mode(False):
                buffer = self._buffers[name] = torch.empty(size + size // 4, dtype=dtype, device=self.device)
            self.moves += 1
        return buffer[:size].view(shape)


@dataclass(slots=True, eq=False, kw_only=True)
class Batch:
    """Runs of one selector in one step."""

    requests: Sequence[Request]
    """Of every run."""
    counts: Ints
    """[runs]: rows of every run."""
    begins: Ints
    """[runs]: position of a run's first row."""
    tables: Tensor
    """[requests, max_blocks] int32: the step's block tables."""
    of: Ints
    """[runs]: row of `tables`."""
    read: Tensor
    """[rows] int64: positions that a row has seen so far, summed over KV heads and layers."""
    kernels: Kernels
    geometry: Geometry
    scratch: Scratch
    states: StateMemory
    stats: MethodStats
    name: str = ""
    """Tells the work space of a step's batches apart."""
    padding: int = 0
    """Rows behind those of the runs, of decode rows alone: they see nothing (`kernels.interface`, padding)."""

    stops: Ints = field(init=False)
    """[runs]: position after a run's last row: all that is known there."""
    rows: int = field(init=False)
    """All rows of the batch."""
    stop: Tensor = field(init=False)
    """[runs, and padding] int32: `stops` as a tensor, and `of` as another."""
    table: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.stops, self.rows = self.begins + self.counts, int(self.counts.sum()) + self.padding
        self.stop, self.table = self.column("stop", self.stops), self.column("table", self.of)

    def tensor(self, name: str, values: Any) -> Tensor:
        """An int32 tensor of these values, where one of that name was in the last step."""
        found = values if isinstance(values, Tensor) else staged(np.array(values, np.int32), self.scratch.device)
        return self.ints(name, *found.shape).copy_(found, non_blocking=True)

    def column(self, name: str, values: npt.NDArray[Any], fill: int = 0) -> Tensor:
        """The same of values [runs, ...], with `fill` for padding."""
        behind = np.full((self.padding, *values.shape[1:]), fill)
        return self.tensor(name, np.concatenate([values, behind]) if self.padding else values)

    def ints(self, name: str, *shape: int) -> Tensor:
        """An int32 tensor with anything in it, the same throughout the step."""
        return self.scratch.take(f"{self.name} {name}", *shape, dtype=torch.int32)

    def at(self, record: Record) -> Tensor:
        """[runs, and padding] int32: where the requests' records begin in `states.words`."""
        found = self.states.at(record, self.requests)
        assert (found != NO_STATE).all(), "a request has no state, but is longer than what needs none"
        return self.column("at", found, NO_STATE)

    def floats(self, name: str, values: Tensor) -> Tensor:
        """An fp32 tensor of these values, where one of that name was in the last step."""
        return self.scratch.take(f"{self.name} {name}", *values.shape).copy_(values)

    def plan(self, name: str, rows: Rows, lists: Mapping[int, Lists] | None = None, counts: Sequence[int] = ()) -> Plans:
        """What kernels need to know of these rows, in the place of the last step's plans of that name.

        lists: in place of the rows', by KV heads of a layer; counts: of those alone."""
        geometry, plans = self.geometry, self.scratch.plans.setdefault(f"{self.name} {name}", {})
        for heads in counts or geometry.counts:
            own = rows if lists is None else rows._replace(lists=lists[heads])
            plans[heads] = self.kernels.plan(own, heads * geometry.group, heads, geometry.head_dim, plans.get(heads))
        return plans

    def seen(self, name: str, start: npt.NDArray[Any], lists: Lists | None = None, counts: Sequence[int] = ()) -> Plans:
        """Decode rows that see lists, and everything from `start` on. start: [runs]; counts: see `plan`."""
        begin = self.column(f"{name} start", start)
        return self.plan(name, Rows(self.tables, self.table, begin, self.stop, lists), counts=counts)

    def sinks(self, counts: npt.NDArray[np.integer]) -> Lists:
        """Lists of the first positions, so many of them for every decode row."""
        most = self.tensor("sink positions", np.arange(max(1, int(counts.max()))))
        at = self.ints("sinks at", self.rows, 1).zero_()
        return Lists(most, at, self.column("sinks", counts[:, None]))

    def span(self, name: str, first: Any, last: Any) -> Span:
        """Candidates [first, last) of decode rows. There is work space for more of them than there are, so that it stays as it
        is for many steps."""
        first, last = (np.broadcast_to(np.asarray(end, np.int32), len(self.stops)) for end in (first, last))
        span = self.spans(name, self.table, first, last)
        span = replace(span, width=max(256, 1 << (span.width - 1).bit_length()) + 16)
        self.reserve(span.width)
        return span

    def reserve(self, width: int) -> None:
        """Make room for logits and rankings of all rows beforehand: replayed calls write where they lay when captured."""
        most, group = self.geometry.counts[-1], self.geometry.group
        self.scratch.take("logits", self.rows, most * group, width)
        self.scratch.take("ranking", self.rows, most, width)

    def spans(self, name: str, table: Tensor, first: Ints, last: Ints) -> Span:
        """Candidates [first, last) of queries of these rows of `tables`."""
        begin, end = self.column(f"{name} first", first), self.column(f"{name} last", last)
        return Span(
            self.plan(name, Rows(self.tables, table, begin, end)), begin, end, self.column(f"{name} columns", last - first),
            self.ints(f"{name} zeros", len(begin)).zero_(), max(1, int((last - first).max(initial=0))),
        )  # fmt: skip

    def attend(self, layer: Layer, plans: Plans, out: Tensor, **more: Any) -> None:
        """Attention over what plans say. more: of `Kernels.attend`."""
        plan = plans[layer.heads]
        self.kernels.attend(layer.q, layer.kv, plan, scale=self.geometry.scale, out=out, read=self.read, **more)

    def logits(self, q: Tensor, width: int) -> Tensor:
        """[rows, query heads, width] fp32 with anything in it, for queries q [rows, query heads, head_dim]."""
        return self.scratch.take("logits", *q.shape[:2], width)

    def score(self, layer: Layer, span: Span, scale: float | None = None, active: Tensor | None = None) -> Tensor:
        """Query-key products of candidates: [rows, query heads, width] fp32, column 0 at the first one. Reads K alone.

        scale: 1 / sqrt(head_dim) unless given. active: see `Kernels.score`.
        """
        out, plan = self.logits(layer.q, span.width), span.plans[layer.heads]
        scale = self.geometry.scale if scale is None else scale
        return self.kernels.score(layer.q, layer.kv, plan, scale=scale, out=out, active=active)

    def rank(
        self, logits: Tensor, first: Tensor, last: Tensor, groups: int, *, how: PoolHow, window: int = 1,
        active: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Softmax over columns [first, last) per query head, pooled over each of `groups` head groups: see `Kernels.pool`.

        Returns [rows, groups, columns of logits] fp32 (scratch), column 0 at `first`.
        """
        out = self.scratch.take("ranking", logits.shape[0], groups, logits.shape[2])
        return self.kernels.pool(logits, first, last, groups, how=how, window=window, out=out, active=active)


@dataclass(frozen=True, slots=True)
class Span:
    """Candidates of some rows: positions [first, last) of each."""

    plans: Plans
    first: Tensor
    """[rows] int32"""
    last: Tensor
    """[rows] int32"""
    columns: Tensor
    """[rows] int32: how many there are."""
    zeros: Tensor
    """[rows] int32"""
    width: int
    """At least that of the longest."""
