"""The runner: turns a step's plan into tensors and runs the model.

One flat batch, no padding: row r is one token of one request, with a position, a slot and a visible range. Buffers are made
once for the largest step; a step uses their front.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvloom.engine.cache import CacheManager
from kvloom.engine.device import Mirror, upload
from kvloom.engine.model.decoder import Decoder
from kvloom.engine.requests.state import StateMemory
from kvloom.engine.retention.base import Retention
from kvloom.engine.scheduling import Chunk, StepPlan
from kvloom.engine.selection import Geometry, Scratch, dense_rows
from kvloom.engine.step.attention import GroupRows, LookAt, StepAttention, replayable
from kvloom.engine.step.rows import Seen, StepParts, arrange, count
from kvloom.kernels.interface import Kernels


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
        retention: Retention | None = None,
    ) -> None:
        """states: what selection and retention remember of requests. shadow_interval: measure covered attention mass once in
        so many steps with sparse decode rows; 0 for never. retention: what gives blocks of the cache's second head group back;
        None if there is one group."""
        config = decoder.config
        self._kernels, self.geometry, self._states = kernels, geometry, states
        device = decoder.device
        self._scratch, self._moves = Scratch(device), 0
        self._shadow_interval, self._sparse_steps = shadow_interval, 0
        self.decoder = decoder
        self._size = cache.block_size
        self._attention = StepAttention(kernels, cache.groups, config, decoder.rotary.cos, decoder.rotary.sin)
        self._retention = retention
        self._tokens, self._positions = (Mirror(max_rows, torch.int64, device) for _ in range(2))
        self._slots = [Mirror(max_rows, torch.int64, device) for _ in cache.groups]
        self._request, self._stop = (Mirror(max_rows, torch.int32, device) for _ in range(2))
        self._zeros = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._folds = torch.zeros(2, max_rows, dtype=torch.int32, device=device)
        self._read = torch.zeros(max_rows, dtype=torch.int64, device=device)
        blocks = (2 * max_seqs, -(-geometry.max_len // self._size))
        self._tables = [Mirror(blocks, torch.int32, device) for _ in cache.groups]
        shape = (max_rows, config.q_heads, config.head_dim)
        self._q, self._out = (torch.empty(shape, dtype=decoder.dtype, device=device) for _ in range(2))

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Compute the plan's rows and store their KV."""
        order, rows = arrange(plan.chunks), plan.rows
        chunks, starts = order.chunks, self._fill(order.chunks)
        tables = [mirror.front(len(chunks)) for mirror in self._tables]
        slots = [mirror.front(rows) for mirror in self._slots]
        request, stop = self._request.front(rows), self._stop.front(rows)
        parts = self._parts(chunks[: order.selecting], tables[0]) if order.selecting else None
        looks = [LookAt(at, at + c.count, c.look) for at, c in zip(starts, chunks) if c.look is not None]
        first, last = parts.rows if parts else 0, looks[0].first if looks else rows
        dense = dense_rows(tables[0], request[first:last], stop[first:last], self._zeros[: last - first])
        groups, unseen = [GroupRows(slots[0], dense, parts.parts if parts else (), looks)], [0] * len(chunks)
        if self._retention is not None:
            kept = self._retention.kept(chunks, tables[1], request, stop, self._states, self._folds[:, :rows])
            groups.append(GroupRows(slots[1], kept.rows, folded=kept.folded))
            unseen = kept.unseen
        hidden = self._forward(groups, rows)

        def seen() -> list[Seen]:
            read = parts.finish() if parts else []
            found = [
                count(chunk, read[start] if start < first else None, missed, self.geometry)
                for chunk, start, missed in zip(chunks, starts, unseen)
            ]
            return order.planned(found)

        return StepResult(hidden, order.planned(starts), seen)

    def _parts(self, chunks: list[Chunk], tables: Tensor) -> StepParts:
        """Batches of selection methods. chunks: theirs, in the order of rows."""
        read = self._read[: sum(chunk.count for chunk in chunks)]
        return StepParts(chunks, tables, read, self.geometry, self._kernels, self._scratch, self._states)

    def _forward(self, groups: list[GroupRows], rows: int) -> Tensor:
        tokens, positions = self._tokens.front(rows), self._positions.front(rows)
        shadow = False
        if self._shadow_interval and any(part.decodes for part in groups[0].parts):
            self._sparse_steps += 1
            shadow = self._sparse_steps % self._shadow_interval == 0
        self._attention.plan(groups, positions, self._q[:rows], self._out[:rows], shadow=shadow)
        if looks := groups[0].looks:
            narrows = {at.look.stop: at.first for at in reversed(looks)}  # the first of those that go no further
            return self.decoder.forward(tokens, self._attention, narrows=narrows)
        if self._scratch.moves != self._moves:
            self._moves = self._scratch.moves
            self.decoder.forget_programs()
        hidden = self.decoder.forward(
            tokens, self._attention, *(kind := replayable(groups[0].rows, groups[0].parts, shadow=shadow))
        )
        assert kind[1] is None or self._scratch.moves == self._moves, "calls were captured whose work space has moved"
        return hidden

    @torch.inference_mode()
    def logits(self, result: StepResult, rows: list[int]) -> Tensor:
        """[len(rows), vocab] fp32 of some rows of a step."""
        hidden = result.hidden
        if rows != list(range(hidden.shape[0])):
            hidden = hidden[upload(np.array(rows), hidden.device)]
        return self.decoder.logits(hidden)

    def _fill(self, chunks: Sequence[Chunk]) -> list[int]:
        """Write tokens, positions, slots and tables into the buffers, in this order. Returns each chunk's first row."""
        starts, row, size = [], 0, self._size
        all_tokens, all_positions, all_requests = self._tokens.host, self._positions.host, self._request.host
        for i, chunk in enumerate(chunks):
            request, start, count, scattered = chunk.request, chunk.start, chunk.count, chunk.positions
            all_requests[row] = i
            starts.append(row)
            if count == 1:  # a decode: scalars beat slices
                all_tokens[row] = request.tokens[start]
                all_positions[row] = start
            else:
                stop = row + count
                positions = np.arange(start, start + count) if scattered is None else scattered
                all_positions[row:stop] = positions
                known = request.tokens
                all_tokens[row:stop] = (
                    known[start : start + count] if scattered is None else [known[position] for position in scattered]
                )
                all_requests[row:stop] = i
            for part, tables, slots in zip(chunk.table.parts, self._tables, self._slots):
                blocks = np.frombuffer(part, np.int32)
                tables.host[i, : len(blocks)] = blocks
                if count == 1:
                    slots.host[row] = int(blocks[start // size]) * size + start % size
                else:
                    slots.host[row:stop] = blocks[positions // size].astype(np.int64) * size + positions % size
            row += count
        np.add(all_positions[:row], 1, out=self._stop.host[:row], casting="unsafe")
        return starts
