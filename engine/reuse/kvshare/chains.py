"""Segments that cross tenants, by what stood in front of them when they were computed.

KV holds the context it was computed in, so a segment that others may use is found only together with that context. Segments of
a shared domain form chains: the first one stood directly behind the neutral prose, each other one directly behind the one
before.

    link(1) = H(domain, START, tokens of segment 1)        link(i) = H(domain, link(i-1), tokens of segment i)

A prompt follows a chain from its first token on, as far as its own tokens go. So every row that it takes was computed behind
the prose and the very tokens that the prompt has there, whoever sent them first; who plants a text behind words of its own
plants it where only prompts with the same words look. Tenants that send the same text leave the same chain, and none hides
another's.
"""

from __future__ import annotations

import bisect
from collections import Counter, OrderedDict

import numpy as np
import numpy.typing as npt

from kvloom.engine.cache.prefix import Domain
from kvloom.engine.reuse.kvshare.chunks import LEAST, WINDOW, Hashes, window_hashes
from kvloom.engine.reuse.kvshare.segment import START, Segment, link
from kvloom.engine.reuse.kvshare.work import Work

Ints = npt.NDArray[np.int32]
ENDINGS = 4
"""Segments, last used first, that are compared token by token where no whole one continues a chain: its last part."""

_Place = tuple[bytes, bytes, int]
"""Domain key, link in front, hash of the first WINDOW tokens."""


def stretches(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of spans of a text, those that follow each other from its first token on: what a chain can hold."""
    whole: list[tuple[int, int]] = []
    for first, last in spans:
        if first != (whole[-1][1] if whole else 0):
            break
        whole.append((first, last))
    return whole


class _Fork:
    """Segments that continue a chain at one place with the same first window: by their tokens, last used last."""

    def __init__(self) -> None:
        self.segments: OrderedDict[bytes, Segment] = OrderedDict()
        self.lengths: list[int] = []
        """Of their tokens, ascending, each once."""
        self._count: Counter[int] = Counter()

    def add(self, segment: Segment) -> None:
        """One more."""
        self.segments[segment.tokens.tobytes()] = segment
        length = len(segment.tokens)
        if not self._count[length]:
            bisect.insort(self.lengths, length)
        self._count[length] += 1

    def remove(self, segment: Segment) -> None:
        """One less."""
        del self.segments[segment.tokens.tobytes()]
        length = len(segment.tokens)
        self._count[length] -= 1
        if not self._count[length]:
            self.lengths.remove(length)


class Chains:
    """The chains of all shared domains."""

    def __init__(self) -> None:
        self._forks: dict[_Place, _Fork] = {}

    def __len__(self) -> int:
        return sum(len(fork.segments) for fork in self._forks.values())

    def add(self, segment: Segment) -> None:
        """Make a segment findable behind what it stood behind."""
        self._forks.setdefault(_place(segment), _Fork()).add(segment)

    def remove(self, segment: Segment) -> None:
        """Forget it. What stood behind it is not found until the same segment is there again."""
        place = _place(segment)
        self._forks[place].remove(segment)
        if not self._forks[place].segments:
            del self._forks[place]

    def touch(self, segment: Segment) -> None:
        """It has been used."""
        self._forks[_place(segment)].segments.move_to_end(segment.tokens.tobytes())

    def starts(self, domain: Domain, hashes: Hashes) -> list[int]:
        """Windows of a prompt, by their hashes, with which a chain begins: indices, ascending."""
        return [at for at, value in enumerate(hashes.tolist()) if (domain.key, START, value) in self._forks]

    def follow(self, domain: Domain, tokens: Ints, hashes: Hashes, work: Work) -> list[tuple[Segment, int]]:
        """The longest chain whose tokens are these from the first on: its segments, and how many tokens of each.

        hashes: of the tokens' windows. All but the last segment are whole; the last may end where the tokens differ.
        """
        found: list[tuple[Segment, int]] = []
        at, before = 0, START
        while at < len(hashes) and (fork := self._forks.get((domain.key, before, int(hashes[at])))) is not None:
            whole = _whole(fork, tokens[at : at + fork.lengths[-1]], work)
            if whole is None:
                ending = _ending(fork, tokens[at:], work)
                found += [] if ending is None else [ending]
                break
            found.append((whole, len(whole.tokens)))
            at, before = at + len(whole.tokens), whole.link
        return found

    def check(self, segments: set[Segment]) -> None:
        """Prove that these are the segments of shared domains and that each is where it claims. Raises AssertionError."""
        held = [(place, key, segment) for place, fork in self._forks.items() for key, segment in fork.segments.items()]
        assert {segment for *_, segment in held} == segments and len(held) == len(segments), (
            "a chain holds what the store does not"
        )
        for place, key, segment in held:
            assert place == _place(segment) and key == segment.tokens.tobytes(), "a segment is in a chain at another place"
            assert segment.isolated and segment.link == link(segment.domain, segment.before, segment.tokens), "a link is wrong"
        for fork in self._forks.values():
            assert fork.lengths == sorted({len(s.tokens) for s in fork.segments.values()}), "a fork's lengths are off"
        where = {(segment.domain.key, segment.link): segment for segment in segments}
        for segment in segments:
            front = where.get((segment.domain.key, segment.before))
            assert front is None or segment.position == front.position + len(front.tokens), "a segment is not behind its chain"
        heads = {segment.position for segment in segments if segment.before == START}
        assert len(heads) <= 1, "chains begin behind different prose"


def _place(segment: Segment) -> _Place:
    return segment.domain.key, segment.before, int(window_hashes(segment.tokens[:WINDOW])[0])


def _whole(fork: _Fork, tokens: Ints, work: Work) -> Segment | None:
    """The longest segment that the tokens begin with."""
    for length in reversed(fork.lengths):
        if length <= len(tokens) and work.allows(length):
            segment = fork.segments.get(tokens[:length].tobytes())
            if segment is not None:
                return segment
    return None


def _ending(fork: _Fork, tokens: Ints, work: Work) -> tuple[Segment, int] | None:
    """Of the segments used last, the one that has most tokens in common with these, from the first on; and how many."""
    best: tuple[Segment, int] | None = None
    for _, segment in zip(range(ENDINGS), reversed(fork.segments.values())):
        length = min(len(segment.tokens), len(tokens))
        if not work.allows(length):
            break
        differs = np.flatnonzero(segment.tokens[:length] != tokens[:length])
        common = int(differs[0]) if len(differs) else length
        if common >= WINDOW and (best is None or common > best[1]):
            best = (segment, common)
    return best


assert LEAST >= WINDOW, "every segment has a first window"
