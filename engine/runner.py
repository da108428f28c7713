"""The runner: turns a step's plan into tensors and runs the model.

One flat batch, no padding: row r is one token of one request, with a position, a slot and a visible range. Buffers are made
once for the largest step; a step uses their front.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvloom.engine.attention import LookAt, Part, StepAttention, replayable
from kvloom.engine.cache import CacheManager
from kvloom.engine.head_groups import GroupedAttention, GroupRows
from kvloom.engine.model.decoder import Decoder
from kvloom.engine.retention.razor import Razor
from kvloom.engine.scheduling import Chunk, StepPlan
from kvloom.engine.selection import Geometry, Scratch, dense_rows
from kvloom.engine.state import StateMemory
from kvloom.engine.view import DECODE, DENSE, PROMPT, Place, Seen, StepParts, arrange, count
from kvloom.kernels.interface import Kernels, Lists, Rows


class StepResult(NamedTuple):
    """What a step computed. Valid until the next step."""

    hidden: Tensor
    """[rows, hidden]: the last layer's output, ready for `Decoder.logits`."""
    starts: list[int]
    """First row of every chunk of the plan."""
    seen: Callable[[], list[Seen]]
    """Of every chunk; to be called once, when the step is over: only then does the host know what methods chose."""


class Runner:
    """Runs steps of one model over one cache."""

    def __init__(
        self,
        decoder: Decoder,
        cache: CacheManager,
        kernels: Kernels,
        geometry: Geometry,
        states: StateMemory,
        *,
        max_rows: int,
        max_seqs: int,
        shadow_interval: int = 0,
        retention: Razor | None = None,
    ) -> None:
        """states: what selection and retention remember of requests. shadow_interval: measure covered attention mass once in
        so many steps with sparse decode rows; 0 for never. retention: what gives blocks of the cache's second head group back;
        None if there is one group."""
        config = decoder.config
        self._kernels, self.geometry, self._states = kernels, geometry, states
        self._scratch, self._moves = Scratch(), 0
        self._shadow_interval, self._sparse_steps = shadow_interval, 0
        self.decoder = decoder
        self._size = cache.block_size
        self._attention = StepAttention(kernels, cache.storage, config, decoder.rotary.cos, decoder.rotary.sin)
        self._retention = retention
        self._grouped = GroupedAttention(kernels, cache.groups, config, decoder.rotary.cos, decoder.rotary.sin)
        self._tokens, self._positions = (np.zeros(max_rows, np.int64) for _ in range(2))
        self._slots = [np.zeros(max_rows, np.int64) for _ in cache.groups]
        self._request, self._stop, self._at, self._dropped = (np.zeros(max_rows, np.int32) for _ in range(4))
        self._zeros = torch.zeros(max_rows, dtype=torch.int32)
        self._read = torch.zeros(max_rows, dtype=torch.int64)
        self._tables = [np.zeros((2 * max_seqs, -(-geometry.max_len // self._size)), np.int32) for _ in cache.groups]
        shape = (max_rows, config.q_heads, config.head_dim)
        self._q, self._out = (torch.empty(shape, dtype=decoder.dtype) for _ in range(2))

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Compute the plan's rows and store their KV."""
        chunks = plan.chunks
        if self._retention is not None:
            return self._run_grouped(chunks, self._retention)
        if any(chunk.request.selector is not None or chunk.look is not None for chunk in chunks):
            places = arrange(chunks)
            if places[0].kind != DENSE or places[-1].kind != DENSE:
                return self._run_selecting(chunks, places)
        starts = self._fill(chunks)
        visible = dense_rows(*self._seen(plan.rows, len(chunks)), self._zeros[: plan.rows])
        hidden = self._forward(visible, (), plan.rows)
        return StepResult(hidden, starts, lambda: [count(chunk, None, self.geometry) for chunk in chunks])

    def _run_selecting(self, chunks: list[Chunk], places: list[Place]) -> StepResult:
        """The same, with selection methods or looks among the rows."""
        rows = sum(chunk.count for chunk in chunks)
        ordered = [chunks[place.chunk] for place in places]
        selecting = [chunks[place.chunk] for place in places if place.kind in (DECODE, PROMPT)]
        starts = self._fill(ordered)
        tables, request, stop = self._seen(rows, len(chunks))
        first = sum(chunk.count for chunk in selecting)
        step = StepParts(selecting, tables, self._read[:first], self.geometry, self._kernels, self._scratch, self._states)
        shadow = False
        if self._shadow_interval and any(part.decodes for part in step.parts):
            self._sparse_steps += 1
            shadow = self._sparse_steps % self._shadow_interval == 0
        looks = [LookAt(at, at + c.count, c.look) for at, c in zip(starts, ordered) if c.look is not None]
        last = looks[0].first if looks else rows
        visible = dense_rows(tables, request[first:last], stop[first:last], self._zeros[: last - first])
        hidden = self._forward(visible, step.parts, rows, shadow=shadow, looks=looks)
        first_rows = {place.chunk: start for place, start in zip(places, starts)}

        def seen() -> list[Seen]:
            read = step.finish()
            found = {
                place.chunk: count(chunk, read[start] if place.kind == DECODE else None, self.geometry)
                for place, chunk, start in zip(places, ordered, starts)
            }
            return [found[i] for i in range(len(chunks))]

        return StepResult(hidden, [first_rows[i] for i in range(len(chunks))], seen)

    def _run_grouped(self, chunks: list[Chunk], retention: Razor) -> StepResult:
        """The same over two head groups, one of which may have forgotten the middle of sequences."""
        starts, counts = self._fill(chunks), [chunk.count for chunk in chunks]
        rows = sum(counts)
        begins = retention.begins([chunk.table for chunk in chunks], self._size)
        begin = torch.from_numpy(np.repeat(begins, counts))
        sinks = Lists(
            torch.arange(max(1, retention.window.sinks), dtype=torch.int32),
            torch.zeros(rows, 1, dtype=torch.int32),
            torch.where(begin > 0, retention.window.sinks, 0).to(torch.int32)[:, None],
        )
        groups = []
        for group, slots in enumerate(self._slots):
            tables, request, stop = self._seen(rows, len(chunks), group)
            visible = (
                Rows(tables, request, begin, stop, sinks) if group else dense_rows(tables, request, stop, self._zeros[:rows])
            )
            groups.append(GroupRows(visible, torch.from_numpy(slots[:rows])))
        folded, state = None, retention.state
        if state is not None:
            at = self._states.at(state, [chunk.request for chunk in chunks])
            self._at[:rows], self._dropped[:rows] = np.repeat(at, counts), np.repeat(state.dropped(begins), counts)
            places, dropped = torch.from_numpy(self._at[:rows]), torch.from_numpy(self._dropped[:rows])
            folded = functools.partial(state.folded, self._states.words, at=places, dropped=dropped)
        tokens, positions = torch.from_numpy(self._tokens[:rows]), torch.from_numpy(self._positions[:rows])
        self._grouped.plan(groups, positions, self._q[:rows], self._out[:rows], folded)
        hidden = self.decoder.forward(tokens, self._grouped, "full")
        local = 1.0 - retention.classes.share
        hidden_tokens = np.maximum(0, begins - retention.window.sinks) * local
        return StepResult(
            hidden, starts, lambda: [Seen(c.stop - float(h), not b) for c, h, b in zip(chunks, hidden_tokens, begins)]
        )

    def _seen(self, rows: int, chunks: int, group: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """tables, request, stop of a step's rows."""
        return (
            torch.from_numpy(self._tables[group][:chunks]),
            torch.from_numpy(self._request[:rows]),
            torch.from_numpy(self._stop[:rows]),
        )

    def _forward(
        self, visible: Rows, parts: Sequence[Part], rows: int, *, shadow: bool = False, looks: Sequence[LookAt] = ()
    ) -> Tensor:
        tokens, positions, slots = (torch.from_numpy(array[:rows]) for array in (self._tokens, self._positions, self._slots[0]))
        self._attention.plan(visible, parts, positions, slots, self._q[:rows], self._out[:rows], shadow=shadow, looks=looks)
        if looks:
            narrows = {at.look.stop: at.first for at in reversed(looks)}  # the first of those that go no further
            return self.decoder.forward(tokens, self._attention, narrows=narrows)
        if self._scratch.moves != self._moves:
            self._moves = self._scratch.moves
            self.decoder.forget_programs()
        hidden = self.decoder.forward(tokens, self._attention, *(kind := replayable(visible, parts, shadow=shadow)))
        assert kind[1] is None or self._scratch.moves == self._moves, "calls were captured whose work space has moved"
        return hidden

    @torch.inference_mode()
    def logits(self, result: StepResult, rows: list[int]) -> Tensor:
        """[len(rows), vocab] fp32 of some rows of a step."""
        hidden = result.hidden
        return self.decoder.logits(hidden if rows == list(range(hidden.shape[0])) else hidden[rows])

    def _fill(self, chunks: Sequence[Chunk]) -> list[int]:
        """Write tokens, positions, slots and tables into the buffers, in this order. Returns each chunk's first row."""
        starts, row, size = [], 0, self._size
        for i, chunk in enumerate(chunks):
            request, start, count, scattered = chunk.request, chunk.start, chunk.count, chunk.positions
            self._request[row] = i
            starts.append(row)
            if count == 1:  # a decode: scalars beat slices
                self._tokens[row] = request.tokens[start]
                self._positions[row] = start
            else:
                stop = row + count
                positions = np.arange(start, start + count) if scattered is None else scattered
                self._positions[row:stop] = positions
                known = request.tokens
                self._tokens[row:stop] = (
                    known[start : start + count] if scattered is None else [known[position] for position in scattered]
                )
                self._request[row:stop] = i
            for part, tables, slots in zip(chunk.table.parts, self._tables, self._slots):
                blocks = np.frombuffer(part, np.int32)
                tables[i, : len(blocks)] = blocks
                if count == 1:
                    slots[row] = int(blocks[start // size]) * size + start % size
                else:
                    slots[row:stop] = blocks[positions // size].astype(np.int64) * size + positions % size
            row += count
        np.add(self._positions[:row], 1, out=self._stop[:row], casting="unsafe")
        return starts
