"""How a step's rows are ordered, and whose business they are.

    chunk   the scheduler's: a run of one request's tokens
    run     rows that share a list; a chunk is one run, a sparse prompt one per grid cell
    row     one token

Order of rows: decode rows of selection methods, prompts of selection methods, all that see everything, then looks.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple, TypeVar, cast

import numpy as np
from torch import Tensor

from kvloom.engine.device import Download
from kvloom.engine.requests.plan import Chunk
from kvloom.engine.requests.state import StateMemory
from kvloom.engine.selection.base import Selector
from kvloom.engine.selection.batch import Batch, Scratch
from kvloom.engine.selection.geometry import Geometry
from kvloom.engine.step.attention import Part
from kvloom.kernels.interface import Kernels, Spans

T = TypeVar("T")
DECODE, PROMPT, DENSE, LOOK = 0, 1, 2, 3
"""Classes of rows: decode rows beyond a method's budget, prompts that a method computes or looks at, all others, and those that
are not computed for good: the deeper they go, the sooner they come."""


class Order(NamedTuple):
    """A step's chunks in the order of rows."""

    chunks: list[Chunk]
    places: Sequence[int]
    """Of each chunk, its index in the step's plan; a range if that is the order of rows."""
    selecting: int
    """So many of them, in front, are the business of methods,"""
    looking: int
    """and so many, at the end, are computed to look at them."""
    alike: bool
    """Whether all of them are one batch of one method."""

    @property
    def single(self) -> bool:
        """Whether every chunk is one row, computed for good."""
        return not self.looking and all(chunk.count == 1 for chunk in self.chunks)

    def planned(self, found: Sequence[T]) -> list[T]:
        """What was found of each chunk, in the order of the plan."""
        if isinstance(self.places, range):
            return list(found)
        return [each for _, each in sorted(zip(self.places, found), key=lambda pair: pair[0])]


def arrange(chunks: list[Chunk]) -> Order:
    """The order of rows. Chunks with the same selector, between the same two of its levels, stand together."""
    if all(chunk.request.selector is None and chunk.look is None for chunk in chunks):
        return Order(chunks, range(len(chunks)), 0, 0, False)
    sorting = sorted((*_kind(chunk), i) for i, chunk in enumerate(chunks))
    places = [i for *_, i in sorting]
    kinds = Counter(kind for kind, *_ in sorting)
    selecting = kinds[DECODE] + kinds[PROMPT]
    alike = selecting == len(chunks) and sorting[0][:2] == sorting[-1][:2]
    return Order([chunks[i] for i in places], places, selecting, kinds[LOOK], alike)


def _kind(chunk: Chunk) -> tuple[int, tuple[int, int]]:
    """Its class, and what tells groups of that class apart."""
    selector = chunk.request.selector
    if chunk.look is not None:
        return LOOK, (-chunk.look.stop, 0)
    if selector is not None:
        if chunk.decodes:
            if chunk.request.sparse and chunk.stop > selector.budget:
                return DECODE, (id(selector), bisect.bisect_left(selector.levels, chunk.stop))
        elif selector.prompts == "sparse" or (selector.prompts == "seed" and chunk.samples):
            return PROMPT, (id(selector), 0)
    return DENSE, (0, 0)


class StepParts:
    """A step's batches of selection methods, and what came of them."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        tables: Tensor,
        read: Tensor,
        geometry: Geometry,
        kernels: Kernels,
        scratch: Scratch,
        states: StateMemory,
        padding: int = 0,
    ) -> None:
        """chunks: in the order of `arrange`, without those that see everything; tables: [chunks, max_blocks] int32;
        read: [rows of these chunks, and padding] int64, zeroed here; padding: rows behind those of one batch of decode rows."""
        self.parts: list[Part] = []
        self.rows = len(read)
        self._read = read.zero_()
        first, numbered = 0, list(enumerate(chunks))
        for i, ((kind, _), group) in enumerate(groupby(numbered, lambda pair: _kind(pair[1]))):
            members = list(group)
            selector = _selector(members[0][1])
            runs = [(of, *cut) for of, chunk in members for cut in _cut(chunk, selector.grid if kind == PROMPT else 0)]
            of, begins, counts = (np.array(column, np.int32) for column in zip(*runs))
            last = first + int(counts.sum()) + padding
            batch = Batch(
                requests=[chunks[i].request for i in of],
                counts=counts,
                begins=begins,
                tables=tables,
                of=of,
                read=read[first:last],
                kernels=kernels,
                geometry=geometry,
                scratch=scratch,
                states=states,
                stats=selector.stats,
                name=f"part {i}",
                padding=padding,
            )
            rows = selector.decode(batch) if kind == DECODE else selector.prefill(batch)
            self.parts.append(Part(first, last, selector, batch, rows, kind == DECODE))
            first = last

    def finish(self) -> Callable[[], list[int | None]]:
        """All layers are queued. Returns what waits for them, counts, and gives by row of the parts: positions seen, summed
        over KV heads and layers; None for prompts."""
        counts, told = [part.rows.finish() for part in self.parts], Download(self._read)

        def found() -> list[int | None]:
            for count in counts:
                if count is not None:
                    count()
            read: list[int] = told.read()
            return [value for part in self.parts for value in (read[part.first : part.last] if part.decodes else
                                                               [None] * (part.last - part.first))]  # fmt: skip

        return found


def spans(chunks: Sequence[Chunk], first: int, padding: int, block_size: int, *, captured: bool) -> Spans | None:
    """What the host knows of chunks that see everything, and of padding behind them; None where one has scattered positions.

    first: the row of the block tables of the first. captured: see `Spans`.
    """
    if any(chunk.positions is not None for chunk in chunks):
        return None
    blocks = [np.array(chunk.table.parts[0][: -(-chunk.stop // block_size)], np.int32) for chunk in chunks]
    none = np.zeros(0, np.int32)
    return Spans(
        first, [chunk.count for chunk in chunks] + [1] * padding, [chunk.stop for chunk in chunks] + [0] * padding,
        blocks + [none] * padding, block_size, captured,
    )  # fmt: skip


class Seen(NamedTuple):
    """What a chunk's last row saw."""

    attended: float
    """Positions, mean over layers and KV heads."""
    everything: bool
    """Whether the chunk is anything but a decode row that saw less than all there was."""


def count(chunk: Chunk, read: int | None, dropped: int, geometry: Geometry) -> Seen:
    """Add a decode row to its method's statistics. read: positions over the layers and KV heads that methods decide for, None
    for everything; dropped: the same of all others, positions that it did not see."""
    selector, heads = chunk.request.selector, geometry.layers * geometry.kv_heads
    if selector is None or not chunk.decodes or not chunk.request.sparse:
        return Seen(chunk.stop - dropped / heads, not dropped)
    unread = dropped if read is None else dropped + chunk.stop * sum(map(len, geometry.heads)) - read
    attended, whole = (chunk.stop * heads - unread) / geometry.kv_heads, chunk.stop * geometry.layers
    selector.stats.decode_rows += 1
    selector.stats.attended += attended
    selector.stats.held += whole
    return Seen(attended / geometry.layers, not unread)


def _selector(chunk: Chunk) -> Selector:
    assert chunk.request.selector is not None
    return cast(Selector, chunk.request.selector)  # what requests have is what `policies` made


def _cut(chunk: Chunk, grid: int) -> list[tuple[int, int]]:
    """A chunk's runs, as (first position, rows): one, or one per grid cell of a sparse prompt."""
    if not grid:
        return [(chunk.start, chunk.count)]
    ends = [*range((chunk.start // grid + 1) * grid, chunk.stop, grid), chunk.stop]
    return [(begin, end - begin) for begin, end in zip([chunk.start, *ends], ends)]
