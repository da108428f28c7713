"""Donors of KV: segments of text with their keys and values, in a store that is bounded in bytes and searched by fingerprint.

    segment    a span of tokens as one computation saw it: in the context of a prompt, or alone
    domain     inside which it is found; segments that were computed in context belong to their owner's domain alone
    quota      bytes of one owner: who stores beyond it loses its own least recently used segments, nobody else's

A fingerprint only says where to look: whoever finds a candidate compares tokens.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kvloom.engine.reuse.kvshare.chunks import fingerprints
from kvloom.engine.reuse.prefix import Domain

MOST_CANDIDATES = 8
"""Places kept per domain and fingerprint; the least recently used is forgotten there."""
MOST_REPEATS = 2
"""Places that one segment has of them: text that repeats itself must not crowd out others, nor make a search long."""
REJECTIONS = 3
"""Deviation rejections after which a segment goes."""

Key = tuple[bytes, int]


@dataclass(slots=True, eq=False, kw_only=True)
class Segment:
    """KV of a span of tokens, private to the store: requests copy from it."""

    domain: Domain
    tokens: npt.NDArray[np.int32]
    """[len]"""
    k: Tensor
    """[layers, len, kv_heads, head_dim], rotated for positions [position, position + len)."""
    v: Tensor
    position: int
    donor: int
    """What computed it: segments of one donor stand beside each other in one context."""
    isolated: bool
    """Computed alone: the only kind that may be found outside its owner's domain."""
    owner: str
    """Tenant that is charged."""
    uses: int = 0
    deviation: float = 0.0
    """Moving mean of the relative deviation seen when it was reused."""
    rejections: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.k.nbytes + self.v.nbytes


class SegmentStore:
    """All segments of an engine. Single-threaded."""

    def __init__(self, capacity: int, quota: Callable[[str], int | None] = lambda owner: None) -> None:
        """capacity: bytes of all segments; quota: of an owner's, None for no bound."""
        self.capacity, self.bytes, self.evictions = capacity, 0, 0
        self.version = 0
        """Counts changes of what can be found."""
        self.bytes_by: Counter[str] = Counter()
        self._quota = quota
        self._segments: OrderedDict[Segment, list[Key]] = OrderedDict()  # least recently used first
        self._owned: defaultdict[str, OrderedDict[Segment, None]] = defaultdict(OrderedDict)
        self._index: dict[Key, list[tuple[Segment, int]]] = {}
        self._known: dict[tuple[bytes, bytes], Segment] = {}

    def __len__(self) -> int:
        return len(self._segments)

    def __iter__(self) -> Iterator[Segment]:
        return iter(self._segments)

    def known(self, domain: Domain, tokens: npt.NDArray[np.int32], *, isolated: bool = False) -> bool:
        """Whether a segment of exactly these tokens is there. isolated: whether only one that was computed alone counts."""
        segment = self._known.get((domain.key, tokens.tobytes()))
        return segment is not None and (segment.isolated or not isolated)

    def add(self, segment: Segment) -> bool:
        """Store it, evicting if there is no room. False if it is known already, or larger than what may be freed.

        One that was computed alone takes the place of one of the same tokens that was computed in context.
        Raises ValueError for a segment that was computed in context and is offered to another domain than its owner's.
        """
        if not segment.isolated and segment.domain.tenant != segment.owner:
            raise ValueError("a segment that was computed in the context of a prompt may only be found by that prompt's tenant")
        if self.known(segment.domain, segment.tokens, isolated=segment.isolated) or not self._fits(segment):
            return False
        name = (segment.domain.key, segment.tokens.tobytes())
        if name in self._known:
            self.remove(self._known[name])
        self._make_room(segment)
        self._known[name] = segment
        self.version += 1
        self._segments[segment] = self._indexed(segment)
        self._owned[segment.owner][segment] = None
        self.bytes += segment.nbytes
        self.bytes_by[segment.owner] += segment.nbytes
        return True

    def _indexed(self, segment: Segment) -> list[Key]:
        """Make it findable. Returns its keys."""
        places: defaultdict[Key, list[int]] = defaultdict(list)
        for offset, value in zip(*fingerprints(segment.tokens)):
            places[segment.domain.key, int(value)].append(int(offset))
        for key, offsets in places.items():
            entries = self._index.setdefault(key, [])
            entries += [(segment, offset) for offset in reversed(offsets[:MOST_REPEATS])]
            del entries[:-MOST_CANDIDATES]
        return list(places)

    def candidates(self, domain: Domain, fingerprint: int) -> Sequence[tuple[Segment, int]]:
        """Segments with a window of that hash, last used first, and where in them, the first such place first.

        Tokens are for the caller to compare.
        """
        return self._index.get((domain.key, fingerprint), ())[::-1]

    def touch(self, segment: Segment) -> None:
        """It has been used."""
        if segment in self._segments:
            segment.uses += 1
            self._segments.move_to_end(segment)
            self._owned[segment.owner].move_to_end(segment)
            for key in self._segments[segment]:
                self._index.get(key, []).sort(key=lambda entry: entry[0] is segment)  # stable: its own go last

    def reject(self, segment: Segment) -> None:
        """It was found, but its KV deviated too far: the third time it goes."""
        segment.rejections += 1
        if segment.rejections >= REJECTIONS:
            self.remove(segment)

    def remove(self, segment: Segment) -> None:
        """Forget it, if it is there."""
        keys = self._segments.pop(segment, None)
        if keys is None:
            return
        for key in keys:
            entries = [entry for entry in self._index.get(key, ()) if entry[0] is not segment]
            if entries:
                self._index[key] = entries
            else:
                self._index.pop(key, None)
        self.version += 1
        del self._known[segment.domain.key, segment.tokens.tobytes()]
        del self._owned[segment.owner][segment]
        if not self._owned[segment.owner]:
            del self._owned[segment.owner]
        self.bytes -= segment.nbytes
        self.bytes_by[segment.owner] -= segment.nbytes
        if not self.bytes_by[segment.owner]:
            del self.bytes_by[segment.owner]

    def purge(self, owner: str) -> int:
        """Forget everything of an owner. Returns how many segments."""
        gone = list(self._owned.get(owner, ()))
        for segment in gone:
            self.remove(segment)
        return len(gone)

    def _fits(self, segment: Segment) -> bool:
        quota = self._quota(segment.owner)
        return segment.nbytes <= (self.capacity if quota is None else min(quota, self.capacity))

    def _make_room(self, segment: Segment) -> None:
        quota, size = self._quota(segment.owner), segment.nbytes
        while quota is not None and self.bytes_by[segment.owner] + size > quota:
            self._evict(next(iter(self._owned[segment.owner])))
        while self.bytes + size > self.capacity:
            self._evict(next(iter(self._segments)))

    def _evict(self, segment: Segment) -> None:
        self.evictions += 1
        self.remove(segment)

    def check(self) -> None:
        """Prove that bytes and index agree with the segments. Raises AssertionError."""
        assert self.bytes == sum(segment.nbytes for segment in self._segments) <= self.capacity, "bytes are off"
        by: Counter[str] = Counter()
        for segment in self._segments:
            by[segment.owner] += segment.nbytes
        assert by == self.bytes_by, "an owner's bytes are off"
        assert set(self._known.values()) == set(self._segments), "a segment is known that is not there, or the other way round"
        for key, entries in self._index.items():
            assert 0 < len(entries) <= MOST_CANDIDATES, "the index keeps too many places, or an empty list"
            assert all(key in self._segments.get(s, ()) for s, _ in entries), "the index names a segment that is gone"
        owned = [(owner, segment) for owner, segments in self._owned.items() for segment in segments]
        assert len(owned) == len(self._segments) and all(s.owner == owner and s in self._segments for owner, s in owned), (
            "a segment has no owner, or another's"
        )
        assert all(s.isolated or s.domain.tenant == s.owner for s in self._segments), "in-context KV crossed a tenant boundary"
