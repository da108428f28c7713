"""CUDA graphs: `interface.Graph` of a GPU, whatever queues the calls there.

All graphs of a device take what is made while they are captured from one pool: a replay may write over what another's has left
there, which nobody reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from kvloom.kernels.graph import CaptureError

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
            failed = self._captured(graph, calls)
        usual.wait_stream(self._stream)
        if failed is not None:
            _shared.cache_clear()  # the pool may still be said to be in use: later graphs get another
            raise CaptureError(failed, result) from failed
        self._pieces.append(graph)
        return result

    def _captured(self, graph: torch.cuda.CUDAGraph, calls: Callable[[], object]) -> Exception | None:
        """Capture them. Returns what has prevented it."""
        try:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        except Exception as error:
            return error
        failed: Exception | None = None
        try:
            calls()
        except Exception as error:
            failed = error
        try:
            graph.capture_end()
        except Exception as error:
            failed = failed or error
        return failed

    def replay(self, piece: int, rows: int) -> None:
        """See the contract. rows: as many as were captured."""
        self._pieces[piece].replay()
