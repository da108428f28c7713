"""The runner: turns a step's plan into tensors and runs the model.

One flat batch, no padding: row r is one token of one request, with a position, a slot and a visible range. Buffers are made
once for the largest step; a step uses their front.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvloom.engine.attention import StepAttention
from kvloom.engine.cache import CacheManager
from kvloom.engine.head_groups import Folded, GroupedAttention, GroupRows
from kvloom.engine.model.decoder import Decoder
from kvloom.engine.retention.razor import Razor
from kvloom.engine.scheduling import Chunk, StepPlan
from kvloom.engine.selection import Geometry, Scratch, dense_rows
from kvloom.engine.view import Place, SparseView, arrange
from kvloom.kernels.interface import Kernels, Lists, Rows


class StepResult(NamedTuple):
    """What a step computed. Valid until the next step."""

    hidden: Tensor
    """[rows, hidden]: the last layer's output, ready for `Decoder.logits`."""
    starts: list[int]
    """First row of every chunk of the plan."""
    attended: list[float]
    """Positions that every chunk's last row read, mean over layers and KV heads."""
    saw_everything: list[bool]
    """Of every chunk, whether it is anything but a decode row that read less than all there was."""


class Runner:
    """Runs steps of one model over one cache."""

    def __init__(
        self,
        decoder: Decoder,
        cache: CacheManager,
        kernels: Kernels,
        geometry: Geometry,
        *,
        max_rows: int,
        max_seqs: int,
        shadow_interval: int = 0,
        retention: Razor | None = None,
    ) -> None:
        """shadow_interval: measure covered attention mass once in so many steps with sparse decode rows; 0 for never.
        retention: what gives blocks of the cache's second head group back; None if there is one group."""
        config = decoder.config
        self._kernels, self.geometry = kernels, geometry
        self._scratch = Scratch()
        self._shadow_interval, self._sparse_steps = shadow_interval, 0
        self.decoder = decoder
        self._size = cache.block_size
        self._attention = StepAttention(kernels, cache.storage, config, decoder.rotary.cos, decoder.rotary.sin)
        self._retention = retention
        self._grouped = GroupedAttention(kernels, cache.groups, config, decoder.rotary.cos, decoder.rotary.sin)
        self._tokens, self._positions = (np.zeros(max_rows, np.int64) for _ in range(2))
        self._slots = [np.zeros(max_rows, np.int64) for _ in cache.groups]
        self._request, self._stop = (np.zeros(max_rows, np.int32) for _ in range(2))
        self._zeros = torch.zeros(max_rows, dtype=torch.int32)
        self._tables = [np.zeros((2 * max_seqs, -(-geometry.max_len // self._size)), np.int32) for _ in cache.groups]
        shape = (max_rows, config.q_heads, config.head_dim)
        self._q, self._out = (torch.empty(shape, dtype=decoder.dtype) for _ in range(2))

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Compute the plan's rows and store their KV."""
        chunks = plan.chunks
        if self._retention is not None:
            return self._run_grouped(chunks, self._retention)
        if any(chunk.request.selector is not None for chunk in chunks):
            places = arrange(chunks)
            if any(place.selects for place in places):
                return self._run_selecting(chunks, places)
        starts = self._fill(chunks)
        visible = dense_rows(*self._seen(plan.rows, len(chunks)), self._zeros[: plan.rows])
        hidden = self._forward(visible, plan.rows)
        return StepResult(hidden, starts, [float(chunk.stop) for chunk in chunks], [True] * len(chunks))

    def _run_selecting(self, chunks: list[Chunk], places: list[Place]) -> StepResult:
        """The same, with selection methods among the rows."""
        rows = sum(chunk.count for chunk in chunks)
        starts = self._fill([chunks[place.chunk] for place in places])
        seen = self._seen(rows, len(chunks))
        view = SparseView(chunks, places, *seen, self.geometry, self._kernels, self._scratch)
        shadow = False
        if self._shadow_interval and any(batch.decodes for batch in view.batches):
            self._sparse_steps += 1
            shadow = self._sparse_steps % self._shadow_interval == 0
        hidden = self._forward(view, rows, shadow=shadow)
        attended, whole = view.result(chunks)
        by_chunk = {place.chunk: start for place, start in zip(places, starts)}
        return StepResult(hidden, [by_chunk[i] for i in range(len(chunks))], attended, whole)

    def _run_grouped(self, chunks: list[Chunk], retention: Razor) -> StepResult:
        """The same over two head groups, one of which may have forgotten the middle of sequences."""
        starts, count = self._fill(chunks), [chunk.count for chunk in chunks]
        rows = sum(count)
        requests = [chunk.request for chunk in chunks]
        begins = retention.begins(requests, [chunk.table for chunk in chunks], self._size)
        begin = torch.from_numpy(np.repeat(begins, count))
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
        folded, behind = None, begins.nonzero()[0]
        if retention.state is not None and len(behind):
            front = behind[-1] + 1  # chunks in front: single decode rows, all or nearly all with something folded
            folded = Folded(retention.state, np.repeat(retention.state.slots(requests[:front]), count[:front]))
        tokens, positions = torch.from_numpy(self._tokens[:rows]), torch.from_numpy(self._positions[:rows])
        self._grouped.plan(groups, positions, self._q[:rows], self._out[:rows], folded)
        hidden = self.decoder.forward(tokens, self._grouped, "full" if folded is None else "piecewise")
        local = 1.0 - retention.classes.share
        hidden_tokens = np.maximum(0, begins - retention.window.sinks) * local
        return StepResult(
            hidden, starts, [chunk.stop - float(h) for chunk, h in zip(chunks, hidden_tokens)], [not begin for begin in begins]
        )

    def _seen(self, rows: int, chunks: int, group: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """tables, request, stop of a step's rows."""
        return (
            torch.from_numpy(self._tables[group][:chunks]),
            torch.from_numpy(self._request[:rows]),
            torch.from_numpy(self._stop[:rows]),
        )

    def _forward(self, visible: Rows | SparseView, rows: int, *, shadow: bool = False) -> Tensor:
        tokens, positions, slots = (torch.from_numpy(array[:rows]) for array in (self._tokens, self._positions, self._slots[0]))
        self._attention.plan(visible, positions, slots, self._q[:rows], self._out[:rows], shadow=shadow)
        return self.decoder.forward(tokens, self._attention, "full" if isinstance(visible, Rows) else "piecewise")

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
