"""`interface.Graph` of this back end: the argument structures of captured calls, which csrc/graph.cpp passes again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from .library import CALL, Function, Library
from .plan import NativePlan

T = TypeVar("T")


class NativeGraph:
    """Pieces of captured calls. What they point to is kept by whoever captured them, but for their plans."""

    of_device = False

    def __init__(self, library: Library) -> None:
        self._library = library
        self._pieces: list[Piece] = []

    def piece(self, calls: Callable[[], T]) -> T:
        """See the contract."""
        piece = Piece()
        self._library.capture = piece
        try:
            result = calls()
        finally:
            self._library.capture = None
        piece.close()
        self._pieces.append(piece)
        return result

    def replay(self, piece: int, rows: int) -> None:
        """See the contract."""
        found = self._pieces[piece]
        for plan in found.plans:
            if plan.rows.size != rows:
                raise ValueError(f"{rows} rows are replayed, but the plan of a captured call has {plan.rows.size}")
        self._library.replay(found.at, found.calls, rows)


class Piece:
    """Calls, and the plans that they use."""

    def __init__(self) -> None:
        self.plans: set[NativePlan] = set()
        self._made: list[tuple[Function, bytes]] = []

    def add(self, function: Function, packed: bytes) -> None:
        """A call has been made with these arguments."""
        self._made.append((function, packed))

    def close(self) -> None:
        """Lay the structures out where they stay."""
        self._arguments = np.frombuffer(b"".join(packed for _, packed in self._made), np.int64).copy()
        at, calls = self._arguments.ctypes.data, []
        for function, packed in self._made:
            rows_at = function.layout.rows_at
            calls.append(CALL.struct.pack(function.address, at, at + rows_at if rows_at >= 0 else 0))
            at += len(packed)
        self.calls = len(calls)
        self._table = np.frombuffer(b"".join(calls), np.int64).copy()
        self.at = int(self._table.ctypes.data)
        """The address of the first."""
        del self._made
