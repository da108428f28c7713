"""Finding what of a prompt donors have: maximal runs of equal tokens, at any offset, from several donors.

    window     its fingerprint leads to candidates; tokens are compared and the match grows to both sides
    piece      a part of one segment that lies in the prompt
    run        pieces of one donor that touch and move by one shift: in the prompt as they were there
    choice     longest run first; what overlaps a longer one is trimmed

Never across a barrier (special tokens: roles, tools), never outside the range that was asked for.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from kvloom.engine.reuse.kvshare.chunks import WINDOW, fingerprints
from kvloom.engine.reuse.kvshare.segments import Segment, SegmentStore
from kvloom.engine.reuse.prefix import Domain

Ints = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]
Dropped = tuple[int, int, str]
NEAR = WINDOW
"""Most tokens between two runs of one donor and shift for the shorter one to count as going on: an edit, a special token."""
Reason = Literal["tokens differ", "segment ends", "special token", "range ends", "overlap"]


class Piece(NamedTuple):
    """Rows [source, source + length) of a segment, at prompt positions from target on."""

    segment: Segment
    source: int
    target: int
    length: int

    @property
    def stop(self) -> int:
        """One past the last prompt position."""
        return self.target + self.length

    @property
    def shift(self) -> int:
        """By how many positions its keys must be turned."""
        return self.target - self.source - self.segment.position

    def within(self, start: int, stop: int) -> Piece | None:
        """The part inside prompt positions [start, stop), if any."""
        first, last = max(start, self.target), min(stop, self.stop)
        if first >= last:
            return None
        return Piece(self.segment, self.source + first - self.target, first, last - first)


class Run(NamedTuple):
    """Neighbouring pieces of one donor with one shift."""

    pieces: tuple[Piece, ...]

    @property
    def start(self) -> int:
        return self.pieces[0].target

    @property
    def stop(self) -> int:
        return self.pieces[-1].stop

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def shift(self) -> int:
        return self.pieces[0].shift

    @property
    def isolated(self) -> bool:
        return self.pieces[0].segment.isolated

    @property
    def domain(self) -> Domain:
        return self.pieces[0].segment.domain

    def within(self, start: int, stop: int) -> Run | None:
        """The part inside prompt positions [start, stop), if any."""
        parts = tuple(part for piece in self.pieces if (part := piece.within(start, stop)) is not None)
        return Run(parts) if parts else None


class Broken(NamedTuple):
    """Where a run ended, and why."""

    position: int
    reason: Reason


class Match(NamedTuple):
    """What was found."""

    runs: tuple[Run, ...]
    """Ascending, not overlapping."""
    broken: tuple[Broken, ...]
    """Both ends of every run."""
    dropped: tuple[Dropped, ...]
    """(start, stop, why) of runs that were not taken."""

    def check(self, tokens: Ints) -> None:
        """Prove that every piece lies where its tokens are. Raises AssertionError."""
        for run in self.runs:
            for piece in run.pieces:
                own = piece.segment.tokens[piece.source : piece.source + piece.length]
                assert np.array_equal(own, tokens[piece.target : piece.stop]), "a piece lies at other tokens"
                assert piece.shift == run.shift and piece.segment.donor == run.pieces[0].segment.donor, "a run is mixed"
            assert all(a.stop == b.target for a, b in zip(run.pieces, run.pieces[1:])), "a run has a hole"
        assert all(a.stop <= b.start for a, b in zip(self.runs, self.runs[1:])), "runs overlap"


def find(
    store: SegmentStore,
    tokens: Ints,
    begin: int,
    end: int,
    domains: Sequence[Domain],
    *,
    min_match: int = 64,
    short_match: int = 32,
    barriers: Bools | None = None,
) -> Match:
    """Runs of tokens[begin:end] that segments of these domains hold, searched in their order.

    min_match: shortest run; short_match: shortest one within NEAR tokens of another run of its donor and shift.
    """
    walls = np.zeros(len(tokens), bool) if barriers is None else barriers
    pieces = _pieces(store, tokens, begin, end, domains, walls)
    chosen, dropped = _choose(_joined(pieces), min_match, short_match)
    broken = [Broken(at, why) for run in chosen for at, why in _ends(run, tokens, begin, end, walls)]
    return Match(tuple(chosen), tuple(broken), tuple(dropped))


def _pieces(store: SegmentStore, tokens: Ints, begin: int, end: int, domains: Sequence[Domain], walls: Bools) -> list[Piece]:
    """Every maximal piece that a chosen window leads to, once.

    A window that lies in a piece is not looked for again in that piece's segment: what else it leads to there lies in the
    piece, too, or another window leads to it. So text that repeats itself is tiled, not matched at every shift.
    """
    found: list[Piece] = []
    reached: dict[tuple[int, int], int] = {}  # (segment, where it would begin) -> first prompt position not looked at
    tiled: dict[int, int] = {}  # segment -> end of its last piece
    for at, value in zip(*(values.tolist() for values in fingerprints(tokens[begin:end]))):
        at += begin
        for domain in domains:
            for segment, offset in store.candidates(domain, value):
                line = (id(segment), at - offset)
                if reached.get(line, 0) > at or tiled.get(id(segment), 0) >= at + WINDOW:
                    continue
                piece = _grown(segment, offset, tokens, at, begin, end, walls)
                if piece is not None:
                    reached[line] = piece.stop
                    tiled[id(segment)] = max(piece.stop, tiled.get(id(segment), 0))
                    found.append(piece)
    return found


def _grown(segment: Segment, offset: int, tokens: Ints, at: int, begin: int, end: int, walls: Bools) -> Piece | None:
    """The longest piece around a window; None if the window itself differs."""
    back = min(offset, at - begin)
    ahead = min(len(segment.tokens) - offset, end - at)
    first = at - back
    same = (segment.tokens[offset - back : offset + ahead] == tokens[first : at + ahead]) & ~walls[first : at + ahead]
    if ahead < WINDOW or not same[back : back + WINDOW].all():
        return None
    breaks = np.flatnonzero(~same)
    i = int(np.searchsorted(breaks, back))
    low = int(breaks[i - 1]) + 1 if i else 0
    high = int(breaks[i]) if i < len(breaks) else len(same)
    return Piece(segment, offset - back + low, first + low, high - low)


def _joined(pieces: Sequence[Piece]) -> Iterator[Run]:
    """Runs of pieces of one donor and shift that touch. A piece that overlaps its neighbour is trimmed."""
    order = sorted(pieces, key=lambda piece: (piece.segment.donor, piece.segment.domain.key, piece.shift, piece.target))
    run: list[Piece] = []
    for piece in order:
        last = run[-1] if run else None
        if last is not None and _alike(last, piece) and piece.target <= last.stop:
            rest = piece.within(last.stop, piece.stop)
            run += [rest] if rest is not None else []
            continue
        if run:
            yield Run(tuple(run))
        run = [piece]
    if run:
        yield Run(tuple(run))


def _alike(a: Piece, b: Piece) -> bool:
    return a.segment.donor == b.segment.donor and a.segment.domain.key == b.segment.domain.key and a.shift == b.shift


def _rank(run: Run) -> tuple[float, ...]:
    """Longest first; then compiled alone, the smaller deviation, the newer donor."""
    deviation = max(piece.segment.deviation for piece in run.pieces)
    return (-run.length, not run.isolated, deviation, -run.pieces[0].segment.donor, run.start)


class _Choice:
    """Runs that were taken, ascending and disjoint."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self._starts: list[int] = []

    def take(self, run: Run) -> None:
        i = bisect.bisect(self._starts, run.start)
        self.runs.insert(i, run)
        self._starts.insert(i, run.start)

    def around(self, start: int, stop: int) -> list[Run]:
        """Those that overlap positions [start, stop)."""
        first = bisect.bisect(self._starts, start)
        first -= first > 0 and self.runs[first - 1].stop > start
        return self.runs[first : bisect.bisect_left(self._starts, stop)]

    def outside(self, run: Run) -> list[Run]:
        """The parts of a run that none of them covers."""
        taken = self.around(run.start, run.stop)
        starts, stops = [run.start, *(other.stop for other in taken)], [*(other.start for other in taken), run.stop]
        return [part for start, stop in zip(starts, stops) if (part := run.within(start, stop)) is not None]

    def continues(self, run: Run) -> bool:
        """Whether it goes on where another of its donor and shift left off, or the other way round."""
        near = self.around(run.start - NEAR - 1, run.stop + NEAR + 1)
        return any(_alike(run.pieces[0], other.pieces[0]) for other in near)


def _choose(runs: Iterable[Run], min_match: int, short_match: int) -> tuple[list[Run], list[Dropped]]:
    """Greedy, best first; short ones last, as they need a longer one beside them."""
    choice, number = _Choice(), itertools.count()
    waiting = [(_rank(run), next(number), run) for run in runs]
    heapq.heapify(waiting)
    dropped: set[Dropped] = set()
    short: list[Run] = []
    while waiting:
        run = heapq.heappop(waiting)[2]
        parts = choice.outside(run)
        if parts != [run]:
            if not parts:
                dropped.add((run.start, run.stop, "overlap"))
            for part in parts:
                heapq.heappush(waiting, (_rank(part), next(number), part))
        elif run.length >= min_match:
            choice.take(run)
        else:
            short.append(run)
    dropped |= _lengthen(choice, short, short_match)
    return choice.runs, sorted(dropped)


def _lengthen(choice: _Choice, short: Sequence[Run], least: int) -> set[Dropped]:
    """Take short runs, best first, that continue one that was taken, be it one of themselves. Returns what is left."""
    while True:
        run = next((run for run in short if run.length >= least and choice.continues(run)), None)
        if run is None:
            return {(run.start, run.stop, "shorter than min_match") for run in short}
        choice.take(run)
        short = [part for other in short for part in choice.outside(other)]


def _ends(run: Run, tokens: Ints, begin: int, end: int, walls: Bools) -> Iterator[tuple[int, Reason]]:
    """Why a run does not go on at either side."""
    first, last = run.pieces[0], run.pieces[-1]
    for at, outside, source, piece in (
        (run.start, run.start - 1, first.source - 1, first),
        (run.stop, run.stop, last.source + last.length, last),
    ):
        if not begin <= outside < end:
            yield at, "range ends"
        elif walls[outside]:
            yield at, "special token"
        elif not 0 <= source < len(piece.segment.tokens):
            yield at, "segment ends"
        elif piece.segment.tokens[source] != tokens[outside]:
            yield at, "tokens differ"
        else:  # it does go on, under a run that was preferred
            yield at, "overlap"
