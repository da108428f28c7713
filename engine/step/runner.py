"""The runner: turns a step's plan into tensors and runs the model.

One flat batch: row r is one token of one request, with a position, a slot and a visible range. Buffers are made once for the
largest step; a step uses their front. Nothing is padded, but where steps are captured for one number of rows each (CUDA
graphs): there a step of single rows is made as large as the next of `capture_sizes`.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvloom.engine.cache import CacheManager
from kvloom.engine.device import Front, Mirror, upload
from kvloom.engine.model.decoder import Decoder
from kvloom.engine.requests.state import StateMemory
from kvloom.engine.retention.base import KEPT, Retention
from kvloom.engine.scheduling import Chunk, StepPlan
from kvloom.engine.selection import Geometry, Scratch, dense_rows
from kvloom.engine.step.attention import GroupRows, LookAt, StepAttention, replayable
from kvloom.engine.step.rows import Order, Seen, StepParts, arrange, count, spans
from kvloom.kernels.interface import Kernels, Spans


class StepResult(NamedTuple):
    """What a step computes, perhaps not yet."""

    hidden: Tensor
    """[rows, hidden]: `Decoder.forward`'s result, ready for `Decoder.logits`; valid until the next step is run."""
    starts: list[int]
    """First row of every chunk of the plan."""
    seen: Callable[[], list[Seen]]
    """Of every chunk; to be called once. Waits for the step: only then does the host know what methods chose."""


class Fed(NamedTuple):
    """Tokens of a step's rows that the host does not know yet."""

    ids: Tensor
    """[drawn] int64: of the step before, in the order of its plan, negative for nothing."""
    places: list[int]
    """Which of them, for every chunk of the plan."""


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
        self.capture_sizes = capture_sizes(min(max_rows, max_seqs))
        self._attention = StepAttention(kernels, cache.groups, config, decoder.rotary.cos, decoder.rotary.sin)
        self._retention = retention
        self._tokens, self._positions = (Mirror(max_rows, torch.int64, device) for _ in range(2))
        self._slots = [Mirror(max_rows, torch.int64, device) for _ in cache.groups]
        self._request, self._stop = (Mirror(max_rows, torch.int32, device) for _ in range(2))
        self._zeros = Front(torch.zeros(max_rows, dtype=torch.int32, device=device))
        self._kept = torch.zeros(KEPT, max_rows, dtype=torch.int32, device=device)
        self._read = torch.zeros(max_rows, dtype=torch.int64, device=device)
        blocks = (2 * max_seqs, -(-geometry.max_len // self._size))
        self._tables = [Mirror(blocks, torch.int32, device) for _ in cache.groups]
        shape = (max_rows, config.q_heads, config.head_dim)
        self._q, self._out = (Front(torch.empty(shape, dtype=decoder.dtype, device=device)) for _ in range(2))

    def run(self, plan: StepPlan, fed: Fed | None = None) -> StepResult:
        """Compute the plan's rows and store their KV. fed: their tokens, if each chunk is a row whose token is being drawn."""
        order, rows = arrange(plan.chunks), plan.rows
        return self._run(order, rows, self._padding(rows) if order.single else 0, fed)

    def capture(self, told: Callable[[int, int], None]) -> None:
        """Capture dense steps of all sizes, whose rows are padding, if steps are captured so: the largest first, in whose
        memory others find room. told: called with (graphs done, graphs in all). Raises what prevents it."""
        if not self.decoder.captures_sizes:
            return
        sizes, nothing = self.capture_sizes[::-1], arrange([])
        self._run(nothing, 0, len(self._zeros.whole))  # what grows with rows is then as large as it gets
        for done, size in enumerate(sizes):
            told(done, len(sizes))
            self._run(nothing, 0, size)
            if refused := self.decoder.refused:
                raise next(reversed(refused.values())).__cause__ or RuntimeError("a capture has failed")
        told(len(sizes), len(sizes))

    def _padding(self, rows: int) -> int:
        """Rows that a step of so many single ones lacks to be as large as one that may be captured."""
        at = bisect.bisect_left(self.capture_sizes, rows)
        return self.capture_sizes[at] - rows if self.decoder.captures_sizes and at < len(self.capture_sizes) else 0

    @torch.inference_mode()
    def _run(self, order: Order, own: int, padding: int, fed: Fed | None = None) -> StepResult:
        """own: rows but for padding."""
        chunks, starts, rows = order.chunks, self._fill(order.chunks, padding), own + padding
        tokens = self._tokens.front(rows)
        if fed is not None:
            which = upload(np.array([fed.places[place] for place in order.places]), tokens.device)
            tokens[:own] = fed.ids[which].clamp_(min=0)  # who gets no token ends, and its row counts for nothing
        tables = [mirror.front(min(len(chunks) + padding, len(mirror.host))) for mirror in self._tables]
        slots = [mirror.front(rows) for mirror in self._slots]
        request, stop = self._request.front(rows), self._stop.front(rows)
        mine = chunks[: order.selecting]
        parts = self._parts(mine, tables[0], padding if order.alike else 0) if mine else None
        looks = [LookAt(at, at + c.count, c.look) for at, c in zip(starts, chunks) if c.look is not None]
        first, last = parts.rows if parts else 0, looks[0].first if looks else rows
        captured = order.single and rows in self.capture_sizes
        known = self._spans(order, padding, captured=captured) if self._kernels.dense else None
        whole = last - first == rows
        looking = (request, stop) if whole else (request[first:last], stop[first:last])
        dense = dense_rows(tables[0], *looking, self._zeros(last - first), known)
        groups, unseen = [GroupRows(slots[0], dense, parts.parts if parts else (), looks)], [0] * len(chunks)
        if self._retention is not None:
            kept = self._retention.kept(chunks, tables[1], request, stop, self._states, self._kept[:, :rows])
            groups.append(GroupRows(slots[1], kept.rows, folded=kept.folded))
            unseen = kept.unseen
        hidden = self._forward(groups, tokens, captured=captured)
        finished = parts.finish() if parts else list

        def seen() -> list[Seen]:
            read = finished()
            found = [
                count(chunk, read[start] if start < first else None, missed, self.geometry)
                for chunk, start, missed in zip(chunks, starts, unseen)
            ]
            return order.planned(found)

        return StepResult(hidden[:own] if padding else hidden, order.planned(starts), seen)

    def _spans(self, order: Order, padding: int, *, captured: bool) -> Spans | None:
        """What the host knows of rows that see everything."""
        mine = order.chunks[order.selecting : len(order.chunks) - order.looking]
        captured = captured and not order.selecting and self.decoder.captures_sizes
        if len(order.chunks) + padding > len(self._tables[0].host) or (order.alike and order.selecting):
            return None
        return spans(mine, order.selecting, padding, self._size, captured=captured)

    def _parts(self, chunks: list[Chunk], tables: Tensor, padding: int) -> StepParts:
        """Batches of selection methods. chunks: theirs, in the order of rows."""
        read = self._read[: sum(chunk.count for chunk in chunks) + padding]
        return StepParts(chunks, tables, read, self.geometry, self._kernels, self._scratch, self._states, padding)

    def _forward(self, groups: list[GroupRows], tokens: Tensor, *, captured: bool) -> Tensor:
        """captured: whether steps of so many rows are, where that is done for one number of rows each."""
        rows, shadow = len(tokens), False
        positions = self._positions.front(rows)
        if self._shadow_interval and any(part.decodes for part in groups[0].parts):
            self._sparse_steps += 1
            shadow = self._sparse_steps % self._shadow_interval == 0
        self._attention.plan(groups, positions, self._q(rows), self._out(rows), shadow=shadow)
        if looks := groups[0].looks:
            narrows = {at.look.stop: at.first for at in reversed(looks)}  # the first of those that go no further
            return self.decoder.forward(tokens, self._attention, narrows=narrows)
        if self._scratch.moves != self._moves:
            self._moves = self._scratch.moves
            self.decoder.forget_programs()
        kind = replayable(groups[0].rows, groups[0].parts, shadow=shadow)
        if self.decoder.captures_sizes and not captured:
            kind = "none", None
        hidden = self.decoder.forward(tokens, self._attention, *kind)
        assert kind[1] is None or self._scratch.moves == self._moves, "calls were captured whose work space has moved"
        return hidden

    @torch.inference_mode()
    def logits(self, result: StepResult, rows: list[int]) -> Tensor:
        """[len(rows), vocab] fp32 of some rows of a step."""
        hidden = result.hidden
        if rows != list(range(hidden.shape[0])):
            hidden = hidden[upload(np.array(rows), hidden.device)]
        return self.decoder.logits(hidden)

    def _fill(self, chunks: Sequence[Chunk], padding: int) -> list[int]:
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
        behind = slice(row, row + padding)
        all_tokens[behind] = all_positions[behind] = self._stop.host[behind] = 0
        all_requests[behind] = np.minimum(np.arange(row, row + padding), len(self._tables[0].host) - 1)
        for slots in self._slots:
            slots.host[behind] = -1
        return starts


def capture_sizes(most: int) -> list[int]:
    """Rows of steps that are captured, up to the most of a step that decodes: as vLLM's cudagraph_capture_sizes."""
    return sorted({size for size in (1, 2, 4, *range(8, most, 8), most) if size <= most})
