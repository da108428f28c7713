"""Finding what of a prompt donors have: maximal runs of equal tokens, at any offset, from several donors.

    window     its fingerprint leads to candidates; tokens are compared and the match grows to both sides
    piece      a part of one segment that lies in the prompt
    run        pieces of one donor that touch and move by one shift: in the prompt as they were there
    chain      in a shared domain, where tenants find what others sent: a run from the very beginning of what was computed
               alone, so that every row's whole context lies in the prompt, too (`chains`); it may end anywhere
    choice     longest run first; what overlaps a longer one is trimmed, a chain at its end only

Never across a barrier (special tokens: roles, tools), never outside the range that was asked for, and never more work than
`work` allows: then what was found so far is what there is.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import operator
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from kvloom.engine.cache.prefix import Domain
from kvloom.engine.reuse.kvshare.chunks import WINDOW, fingerprints, window_hashes
from kvloom.engine.reuse.kvshare.periodic import periodic
from kvloom.engine.reuse.kvshare.segment import START, Segment, link
from kvloom.engine.reuse.kvshare.segments import SegmentStore
from kvloom.engine.reuse.kvshare.work import Work

Ints = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]
Dropped = tuple[int, int, str]
MOST_RUNS = 1024
"""Runs that are chosen among, the longest ones: a prompt of 32,768 tokens holds 512 that could be taken side by side."""
MOST_HANDLED = 16384
"""Pieces that are handled while choosing, counted with every run that is looked at again."""
NEAR = WINDOW
"""Most tokens between two runs of one donor and shift for the shorter one to count as going on: an edit, a special token."""
_target, _start, _stop = (operator.attrgetter(name) for name in ("target", "start", "stop"))
Reason = Literal["tokens differ", "segment ends", "special token", "range ends", "overlap", "periodic"]


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
        """The part inside prompt positions [start, stop), if any. A chain without its beginning is nothing."""
        if self.domain.shared and start > self.start:
            return None
        near = self.pieces[bisect.bisect(self.pieces, start, key=_stop) : bisect.bisect_left(self.pieces, stop, key=_target)]
        parts = tuple(part for piece in near if (part := piece.within(start, stop)) is not None)
        return Run(parts) if parts else None

    def check(self, tokens: Ints) -> None:
        """Prove that every piece lies where its tokens are, and that a chain is one. Raises AssertionError."""
        for piece in self.pieces:
            own = piece.segment.tokens[piece.source : piece.source + piece.length]
            assert np.array_equal(own, tokens[piece.target : piece.stop]), "a piece lies at other tokens"
            assert piece.shift == self.shift and piece.segment.domain == self.domain, "a run is mixed"
        assert all(a.stop == b.target for a, b in zip(self.pieces, self.pieces[1:])), "a run has a hole"
        if not self.domain.shared:
            assert len({piece.segment.donor for piece in self.pieces}) == 1, "a run is mixed"
            return
        before = START
        for piece in self.pieces:  # from the prompt's own tokens: what every row was computed behind lies in the prompt
            assert piece.segment.isolated and piece.source == 0, "another tenant's KV is used without its beginning"
            assert piece.segment.before == before, "another tenant's KV is used without what it was computed behind"
            assert piece is self.pieces[-1] or piece.length == len(piece.segment.tokens), "a chain has a hole"
            before = link(self.domain, before, tokens[piece.target : piece.stop])


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
        """Prove that every run is what it claims to be (`Run.check`), and alone where it is. Raises AssertionError."""
        for run in self.runs:
            run.check(tokens)
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
    runs: list[Run] = []
    for domain in domains:
        if domain.shared:
            runs += _chains(store, tokens, begin, end, domain, walls)
        else:
            runs += _joined(_pieces(store, tokens, begin, end, domain, walls))
    repeats = np.zeros(len(tokens), bool)
    if runs:
        repeats[begin:end] = periodic(tokens[begin:end])
    told, runs = _without(runs, repeats)
    chosen, dropped = _choose(runs, min_match, short_match)
    broken = [Broken(at, why) for run in chosen for at, why in _ends(run, tokens, begin, end, walls, repeats)]
    return Match(tuple(chosen), tuple(broken), tuple(sorted({*told, *dropped})))


def _without(runs: Sequence[Run], repeats: Bools) -> tuple[set[Dropped], list[Run]]:
    """Runs without the positions of text that repeats itself, and what that took from them."""
    told: set[Dropped] = set()
    edges = np.flatnonzero(np.diff(repeats.astype(np.int8), prepend=0, append=0)).tolist()
    if not edges:
        return told, list(runs)
    left: list[Run] = []
    for run in runs:
        near = edges[max(0, bisect.bisect(edges, run.start) // 2 * 2 - 2) : bisect.bisect_left(edges, run.stop) + 1]
        near = near[: len(near) // 2 * 2]
        spans = [(max(a, run.start), min(b, run.stop)) for a, b in zip(near[::2], near[1::2]) if a < run.stop and b > run.start]
        told |= {(start, stop, "periodic") for start, stop in spans}
        bounds = zip([run.start, *(stop for _, stop in spans)], [*(start for start, _ in spans), run.stop])
        left += [part for start, stop in bounds if start < stop and (part := run.within(start, stop)) is not None]
    return told, left


def _chains(store: SegmentStore, tokens: Ints, begin: int, end: int, domain: Domain, walls: Bools) -> list[Run]:
    """The longest run from every place where a chain of a shared domain begins; none that lies in one before it."""
    work, runs, reached = Work(), [], begin
    hashes = window_hashes(tokens[begin:end])
    stops = np.append(np.flatnonzero(walls[begin:end]), end - begin)
    for start in store.chains.starts(domain, hashes):
        work.reach(start)
        stop = int(stops[np.searchsorted(stops, start)])
        found = store.chains.follow(domain, tokens[begin + start : begin + stop], hashes[start : stop - WINDOW + 1], work)
        at, pieces = begin + start, []
        for segment, length in found:
            pieces.append(Piece(segment, 0, at, length))
            at += length
        if pieces and at > reached:
            runs.append(Run(tuple(pieces)))
            reached = at
    return runs


def _pieces(store: SegmentStore, tokens: Ints, begin: int, end: int, domain: Domain, walls: Bools) -> list[Piece]:
    """Of the segments of an owner's own domain every maximal piece that a chosen window leads to, once.

    A window that lies in a piece is not looked for again in that piece's segment: what else it leads to there lies in the
    piece, too, or another window leads to it. So text that repeats itself is tiled, not matched at every shift.
    """
    found, work = list[Piece](), Work()
    reached: dict[tuple[int, int], int] = {}  # (segment, where it would begin) -> first prompt position not looked at
    tiled: dict[int, int] = {}  # segment -> end of its last piece
    for at, value in zip(*(values.tolist() for values in fingerprints(tokens[begin:end]))):
        work.reach(at)
        at += begin
        for segment, offset in store.candidates(domain, value):
            line = (id(segment), at - offset)
            if reached.get(line, 0) > at or tiled.get(id(segment), 0) >= at + WINDOW or not work.allows(len(segment.tokens)):
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


def _line(run: Run) -> tuple[Hashable, ...]:
    """What runs have in common that may continue each other."""
    piece = run.pieces[0]
    return piece.segment.donor, piece.segment.domain.key, piece.shift


def _alike(a: Piece, b: Piece) -> bool:
    return a.segment.donor == b.segment.donor and a.segment.domain.key == b.segment.domain.key and a.shift == b.shift


def _rank(run: Run) -> tuple[float, ...]:
    """Longest first; then one's own, compiled alone, the smaller deviation, the newer donor."""
    deviation = max(piece.segment.deviation for piece in run.pieces)
    return (-run.length, run.domain.shared, not run.isolated, deviation, -run.pieces[0].segment.donor, run.start)


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
    choice, number, handled = _Choice(), itertools.count(), 0
    ranked = heapq.nsmallest(MOST_RUNS + 1, ((_rank(run), next(number), run) for run in runs))
    waiting = ranked[:MOST_RUNS]
    dropped: set[Dropped] = {(run.start, run.stop, "too many") for *_, run in ranked[MOST_RUNS:]}
    short: list[Run] = []
    while waiting:
        run = heapq.heappop(waiting)[2]
        handled += len(run.pieces)
        if handled > MOST_HANDLED:
            dropped |= {(run.start, run.stop, "too many")}
            break
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
    lines: dict[tuple[Hashable, ...], list[Run]] = {}
    for run in sorted(short, key=_start):
        lines.setdefault(_line(run), []).append(run)
    number = itertools.count()
    waiting = [(_rank(run), next(number), run) for run in short if run.length >= least and choice.continues(run)]
    heapq.heapify(waiting)
    asked, left = {id(run) for *_, run in waiting}, {id(run): run for run in short}
    while waiting:
        run = heapq.heappop(waiting)[2]
        left.pop(id(run), None)
        parts = choice.outside(run)
        if parts != [run]:
            left.update((id(part), part) for part in parts)
            again = [part for part in parts if part.length >= least and choice.continues(part)]
        else:
            choice.take(run)
            again = [other for other in _beside(run, lines[_line(run)]) if other.length >= least and id(other) not in asked]
            asked |= {id(other) for other in again}
        for one in again:
            heapq.heappush(waiting, (_rank(one), next(number), one))
    return {(part.start, part.stop, "shorter than min_match") for run in left.values() for part in choice.outside(run)}


def _beside(run: Run, line: Sequence[Run]) -> Sequence[Run]:
    """Runs of one line, ascending and disjoint, that a run of it goes on at, at either side."""
    first = bisect.bisect_left(line, run.start - NEAR, key=_stop)
    return line[first : bisect.bisect(line, run.stop + NEAR, key=_start)]


def _ends(run: Run, tokens: Ints, begin: int, end: int, walls: Bools, repeats: Bools) -> Iterator[tuple[int, Reason]]:
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
        elif repeats[outside]:
            yield at, "periodic"
        else:  # it does go on, under a run that was preferred
            yield at, "overlap"
