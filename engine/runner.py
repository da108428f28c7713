"""The runner: turns a step's plan into tensors and runs the model.

One flat batch, no padding: row r is one token of one request, with a position, a slot and a visible range. Buffers are made
once for the largest step; a step uses their front.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvloom.engine.attention import StepAttention
from kvloom.engine.cache import CacheManager
from kvloom.engine.model.decoder import Decoder
from kvloom.engine.scheduling import StepPlan
from kvloom.engine.selection import dense_rows
from kvloom.kernels.interface import Kernels


class StepResult(NamedTuple):
    """What a step computed. Valid until the next step."""

    hidden: Tensor
    """[rows, hidden]: the last layer's output, ready for `Decoder.logits`."""
    starts: list[int]
    """First row of every chunk of the plan."""


class Runner:
    """Runs steps of one model over one cache."""

    def __init__(
        self, decoder: Decoder, cache: CacheManager, kernels: Kernels, *, max_rows: int, max_seqs: int, max_len: int
    ) -> None:
        config = decoder.config
        self.decoder = decoder
        self._size = cache.block_size
        self._attention = StepAttention(kernels, cache.storage, config, decoder.rotary.cos, decoder.rotary.sin)
        self._tokens, self._positions, self._slots = (np.zeros(max_rows, np.int64) for _ in range(3))
        self._request, self._stop = (np.zeros(max_rows, np.int32) for _ in range(2))
        self._zeros = torch.zeros(max_rows, dtype=torch.int32)
        self._tables = np.zeros((max_seqs, -(-max_len // self._size)), np.int32)
        shape = (max_rows, config.q_heads, config.head_dim)
        self._q, self._out = (torch.empty(shape, dtype=decoder.dtype) for _ in range(2))

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Compute the plan's rows and store their KV."""
        starts = self._fill(plan)
        rows = plan.rows
        cut = lambda array: torch.from_numpy(array[:rows])  # noqa: E731
        positions = cut(self._positions)
        visible = dense_rows(
            torch.from_numpy(self._tables[: len(plan.chunks)]), cut(self._request), cut(self._stop), self._zeros[:rows]
        )
        self._attention.plan(visible, positions, cut(self._slots), self._q[:rows], self._out[:rows])
        return StepResult(self.decoder.forward(cut(self._tokens), self._attention), starts)

    @torch.inference_mode()
    def logits(self, result: StepResult, rows: list[int]) -> Tensor:
        """[len(rows), vocab] fp32 of some rows of a step."""
        hidden = result.hidden
        return self.decoder.logits(hidden if len(rows) == hidden.shape[0] else hidden[rows])

    def _fill(self, plan: StepPlan) -> list[int]:
        """Write the plan's tokens, positions, slots and tables into the buffers. Returns each chunk's first row."""
        starts, row, size = [], 0, self._size
        for i, chunk in enumerate(plan.chunks):
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
