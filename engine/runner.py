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
from kvloom.engine.model.decoder import Decoder
from kvloom.engine.scheduling import Chunk, StepPlan
from kvloom.engine.selection import Geometry, Scratch, dense_rows
from kvloom.engine.view import Place, SparseView, arrange
from kvloom.kernels.interface import Kernels, Rows


class StepResult(NamedTuple):
    """What a step computed. Valid until the next step."""

    hidden: Tensor
    """[rows, hidden]: the last layer's output, ready for `Decoder.logits`."""
    starts: list[int]
    """First row of every chunk of the plan."""
    attended: list[float]
    """Positions that every chunk's last row read, mean over layers and KV heads."""
    exact: list[bool]
    """Whether every chunk's KV is what its prompt's rule gives: not computed by a sparse decode row."""


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
    ) -> None:
        """shadow_interval: measure covered attention mass once in so many steps with sparse decode rows; 0 for never."""
        config = decoder.config
        self._kernels, self.geometry = kernels, geometry
        self._scratch = Scratch()
        self._shadow_interval, self._sparse_steps = shadow_interval, 0
        self.decoder = decoder
        self._size = cache.block_size
        self._attention = StepAttention(kernels, cache.storage, config, decoder.rotary.cos, decoder.rotary.sin)
        self._tokens, self._positions, self._slots = (np.zeros(max_rows, np.int64) for _ in range(3))
        self._request, self._stop = (np.zeros(max_rows, np.int32) for _ in range(2))
        self._zeros = torch.zeros(max_rows, dtype=torch.int32)
        self._tables = np.zeros((max_seqs, -(-geometry.max_len // self._size)), np.int32)
        shape = (max_rows, config.q_heads, config.head_dim)
        self._q, self._out = (torch.empty(shape, dtype=decoder.dtype) for _ in range(2))

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Compute the plan's rows and store their KV."""
        chunks = plan.chunks
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
        attended, exact = view.result(chunks)
        by_chunk = {place.chunk: start for place, start in zip(places, starts)}
        return StepResult(hidden, [by_chunk[i] for i in range(len(chunks))], attended, exact)

    def _seen(self, rows: int, chunks: int) -> tuple[Tensor, Tensor, Tensor]:
        """tables, request, stop of a step's rows."""
        return (
            torch.from_numpy(self._tables[:chunks]),
            torch.from_numpy(self._request[:rows]),
            torch.from_numpy(self._stop[:rows]),
        )

    def _forward(self, visible: Rows | SparseView, rows: int, *, shadow: bool = False) -> Tensor:
        tokens, positions, slots = (torch.from_numpy(array[:rows]) for array in (self._tokens, self._positions, self._slots))
        self._attention.plan(visible, positions, slots, self._q[:rows], self._out[:rows], shadow=shadow)
        return self.decoder.forward(tokens, self._attention)

    @torch.inference_mode()
    def logits(self, result: StepResult, rows: list[int]) -> Tensor:
        """[len(rows), vocab] fp32 of some rows of a step."""
        hidden = result.hidden
        return self.decoder.logits(hidden if rows == list(range(hidden.shape[0])) else hidden[rows])

    def _fill(self, chunks: Sequence[Chunk]) -> list[int]:
        """Write tokens, positions, slots and tables into the buffers, in this order. Returns each chunk's first row."""
        starts, row, size = [], 0, self._size
        for i, chunk in enumerate(chunks):
            request, table, start, count = chunk.request, chunk.table, chunk.start, chunk.count
            blocks = np.frombuffer(table.blocks, np.int32)
            self._tables[i, : len(blocks)] = blocks
            self._request[row] = i
            starts.append(row)
            if count == 1:  # a decode: scalars beat slices
                self._tokens[row] = request.tokens[start]
                self._positions[row] = start
                self._slots[row] = int(blocks[start // size]) * size + start % size
            else:
                stop = row + count
                positions = np.arange(start, start + count)
                self._tokens[row:stop] = request.tokens[start : start + count]
                self._positions[row:stop] = positions
                self._slots[row:stop] = blocks[positions // size].astype(np.int64) * size + positions % size
                self._request[row:stop] = i
            row += count
        np.add(self._positions[:row], 1, out=self._stop[:row], casting="unsafe")
        return starts
