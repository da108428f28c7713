"""CUDA graphs: `interface.Graph` of a GPU, whatever queues the calls there.

All graphs of a device take what is made while they are captured from one pool: a replay may write over what another's has left
there, which nobody reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@functools.cache
def _shared(device: torch.device) -> tuple[Any, torch.cuda.Stream]:
    """The pool, and the stream on which calls are captured, which the usual one cannot be."""
    return torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)


class CudaGraph:
    """Pieces of captured calls: a CUDA graph each."""

    of_device = True

    def __init__(self, device: torch.device) -> None:
        self._pool, self._stream = _shared(device)
        self._pieces: list[torch.cuda.CUDAGraph] = []

    def piece(self, calls: Callable[[], T]) -> T:
        """See the contract: calls are made on the stream on which they are captured then, so that libraries have made what they
        keep for a stream."""
        usual, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        self._stream.wait_stream(usual)
        with torch.cuda.stream(self._stream):
            result = calls()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                calls()
            finally:
                graph.capture_end()
        usual.wait_stream(self._stream)
        self._pieces.append(graph)
        return result

    def replay(self, piece: int, rows: int) -> None:
        """See the contract. rows: as many as were captured."""
        self._pieces[piece].replay()
