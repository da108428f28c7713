"""`interface.Graph` of this back end: the argument structures of captured calls, which csrc/graph.cpp passes again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from kvloom.kernels.interface import Counters

from .library import CALL, Function, Library
from .plan import NativePlan


@dataclass(frozen=True, slots=True)
class Attended:
    """An attention call, as counters see it."""

    plan: NativePlan
    item: int
    """Bytes of an element of K and V."""
    reads_values: bool

    def add_to(self, counters: Counters, times: int = 1) -> None:
        """Add the call, as often as it was made."""
        plan, item = self.plan, self.item * times
        key_bytes = plan.tile_positions * plan.head_dim * item
        if not self.reads_values:
            counters.score_bytes += key_bytes
            return
        counters.rows += plan.rows.size * times
        counters.positions += plan.positions * times
        counters.kv_bytes += 2 * key_bytes
        counters.list_kv_bytes += 2 * plan.tile_listed * plan.head_dim * item


class NativeGraph:
    """Pieces of captured calls. What they point to is kept by whoever captured them, but for their plans."""

    def __init__(self, library: Library, counters: Counters) -> None:
        self._library, self._counters = library, counters
        self._pieces: list[Piece] = []

    @contextmanager
    def piece(self) -> Iterator[None]:
        """See the contract."""
        piece = Piece()
        self._library.capture = piece
        try:
            yield
        finally:
            self._library.capture = None
        piece.close()
        self._pieces.append(piece)

    def replay(self, piece: int, rows: int) -> None:
        """See the contract."""
        found = self._pieces[piece]
        for attended, times in found.attends.items():
            if attended.plan.rows.size != rows:
                raise ValueError(f"{rows} rows are replayed, but the plan of a captured call has {attended.plan.rows.size}")
            attended.add_to(self._counters, times)
        self._library.replay(found.table.ctypes.data, found.calls, rows)


class Piece:
    """Calls, and what they have added to counters."""

    def __init__(self) -> None:
        self.attends: Counter[Attended] = Counter()
        self._made: list[tuple[Function, bytes]] = []

    def add(self, function: Function, packed: bytes) -> None:
        """A call has been made with these arguments."""
        self._made.append((function, packed))

    def attended(self, attended: Attended) -> None:
        """One of them was that."""
        self.attends[attended] += 1

    def close(self) -> None:
        """Lay the structures out where they stay."""
        self._arguments = np.frombuffer(b"".join(packed for _, packed in self._made), np.int64).copy()
        at, calls = self._arguments.ctypes.data, []
        for function, packed in self._made:
            rows_at = function.layout.rows_at
            calls.append(CALL.struct.pack(function.address, at, at + rows_at if rows_at >= 0 else 0))
            at += len(packed)
        self.calls = len(calls)
        self.table = np.frombuffer(b"".join(calls), np.int64).copy()
        del self._made
