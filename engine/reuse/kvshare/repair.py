"""One request's reused KV: which positions hold it as copied, which are computed, and how far the request is exact.

    prefix          adopted blocks, exact                      [0, prefix)
    rows            computed in the prompt pass, ascending     fresh tokens, boundaries, the tail, and the top of the ranking
    stale           hold copied KV; may be refreshed while the request decodes

Every other position is one of these. The first stale position taints: what comes after it has seen approximate KV, even where
it was computed, and is never published. Only a sweep, which computes everything from there on again, in order, heals it.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvloom.engine.requests.request import Request
from kvloom.engine.reuse.kvshare.matching import Run
from kvloom.engine.reuse.kvshare.options import RepairOptions

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

NEVER = sys.maxsize
RUN = 4
"""Positions of a run for the order "runs"."""


@dataclass(slots=True, eq=False)
class Repair:
    """State of one admitted request."""

    options: RepairOptions
    prefix: int
    length: int
    """Known tokens at admission."""
    runs: tuple[Run, ...]
    rows: Ints
    stale: Ints
    """Ascending."""
    score: Floats
    """Of every stale position, 0 or more: how much it was worth to compute it."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Tokens of the prompt by what became of them: prefix, stale, ranked, boundary, tail, fresh, rejected."""
    deviation: tuple[float, ...] = ()
    """Of every run, the mean ||V' - V|| / ||V|| at the check layer, if it was measured."""
    at: int = 0
    """Rows done."""
    taint: int = NEVER
    goal: int = 0
    """Where a sweep that is under way ends, if nothing is added meanwhile."""
    refreshed: int = 0
    initial_stale: Ints = field(init=False)
    """As at the beginning."""
    mass: float = 0.0
    """Score of all stale positions at the beginning."""

    def __post_init__(self) -> None:
        self.initial_stale = self.stale
        self.taint = int(self.stale[0]) if len(self.stale) else NEVER
        self.mass = float(self.score.sum())

    @property
    def left(self) -> int:
        """Rows of the prompt pass that are still to be computed."""
        return len(self.rows) - self.at

    def next(self, count: int, *, tail_alone: bool = False) -> Ints:
        """The next rows of the prompt pass, at most `count`.

        tail_alone: the last rows, which follow each other, form a chunk of their own.
        """
        stop = min(self.at + count, len(self.rows))
        if tail_alone:
            breaks = np.flatnonzero(np.diff(self.rows) != 1)
            tail = int(breaks[-1]) + 1 if len(breaks) else 0
            if self.at < tail:
                stop = min(stop, tail)
        return self.rows[self.at : stop]

    def advance(self, count: int) -> None:
        """So many more rows of the prompt pass have been computed."""
        self.at += count

    # Refreshing in decode steps -----------------------------------------------------------------------------------------

    def due(self, count: int, computed: int) -> Ints:
        """Positions to compute again beside a decode row, ascending. computed: tokens whose KV is stored."""
        order = self.options.refresh_order
        if order == "sweep":
            if self.taint == NEVER:
                return self.stale[:0]
            self.goal = computed
            return np.arange(self.taint, min(self.taint + count, computed))
        if order == "position":
            return self.stale[:count]
        if order == "runs":
            return self._runs(count)
        best = np.argsort(-self.score, kind="stable")[:count]
        return np.sort(self.stale[best])

    def worth(self) -> float:
        """Share of the score that stale positions still hold, 0 to 1."""
        return float(self.score.sum()) / self.mass if self.mass > 0 else float(len(self.stale) > 0)

    def refresh(self, positions: Ints) -> None:
        """These have been computed again."""
        self.refreshed += len(positions)
        keep = ~np.isin(self.stale, positions)
        self.stale, self.score = self.stale[keep], self.score[keep]
        if self.options.refresh_order == "sweep":
            after = int(positions[-1]) + 1
            self.taint = NEVER if after >= self.goal else after

    def _runs(self, count: int) -> Ints:
        """Stretches of neighbours, those with the highest score first."""
        breaks = np.flatnonzero(np.diff(self.stale) != 1) + 1
        pieces = [piece for part in np.split(np.arange(len(self.stale)), breaks) for piece in _cut(part)]
        pieces.sort(key=lambda piece: -float(self.score[piece].sum()))
        chosen = np.concatenate([*pieces[: -(-count // RUN)], np.zeros(0, np.int64)])[:count].astype(np.int64)
        return np.sort(self.stale[chosen])


def repair_of(request: Request) -> Repair | None:
    """A request's, if it has one."""
    repair = request.repair
    assert repair is None or isinstance(repair, Repair)
    return repair


def _cut(part: Ints) -> list[Ints]:
    return [part[i : i + RUN] for i in range(0, len(part), RUN)]
