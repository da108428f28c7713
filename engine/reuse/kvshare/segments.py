"""Donors of KV: segments of text with their keys and values, in a store that is bounded in bytes.

    segment    a span of tokens as one computation saw it: in the context of a prompt, or alone
    domain     inside which it is found. In an owner's own: by fingerprint, any part of it. In a shared one: only what was
               computed alone, and only in chains from the beginning of what was computed (`chains`)
    quota      bytes of one owner: who stores beyond it loses its own least recently used segments, nobody else's
    eviction   charged to owners by weight (`cache.eviction`): who floods the store loses what it flooded it with

A fingerprint only says where to look: whoever finds a candidate compares tokens.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from kvloom.engine.cache.eviction import STRANGER_TURNOVERS, KeptItems
from kvloom.engine.cache.prefix import Domain
from kvloom.engine.reuse.kvshare.chains import Chains
from kvloom.engine.reuse.kvshare.chunks import fingerprints
from kvloom.engine.reuse.kvshare.segment import START, Segment

MOST_CANDIDATES = 8
"""Places kept per domain and fingerprint; the least recently used is forgotten there."""
MOST_REPEATS = 2
"""Places that one segment has of them: text that repeats itself must not crowd out others, nor make a search long."""
MOST_HEIRS = 16
"""Owners that are remembered of one segment beside the one that is charged."""
REJECTIONS = 3
"""Deviation rejections after which a segment goes."""

Key = tuple[bytes, int]


class SegmentStore:
    """All segments of an engine. Single-threaded."""

    def __init__(
        self,
        capacity: int,
        quota: Callable[[str], int | None] = lambda owner: None,
        weight: Callable[[str], float] = lambda owner: 1.0,
    ) -> None:
        """capacity: bytes of all segments; quota: of an owner's, None for no bound; weight: of an owner's share, > 0."""
        self.capacity, self.bytes, self.evictions = capacity, 0, 0
        self.version = 0
        """Counts changes of what can be found."""
        self.bytes_by: Counter[str] = Counter()
        self.chains = Chains()
        """What tenants find of each other."""
        self._quota = quota
        self._segments: OrderedDict[Segment, list[Key]] = OrderedDict()  # least recently used first
        self._kept: KeptItems[Segment] = KeptItems(STRANGER_TURNOVERS * capacity, weight)
        self._index: dict[Key, list[tuple[Segment, int]]] = {}
        self._known: dict[tuple[bytes, bytes, bytes], Segment] = {}

    def __len__(self) -> int:
        return len(self._segments)

    def __iter__(self) -> Iterator[Segment]:
        return iter(self._segments)

    def known(
        self, domain: Domain, tokens: npt.NDArray[np.int32], *, isolated: bool = False, before: bytes = START
    ) -> Segment | None:
        """The segment of exactly these tokens, if there is one. isolated: only one that was computed alone counts; before: in a
        shared domain, what it must have stood behind."""
        segment = self._known.get((domain.key, before, tokens.tobytes()))
        return segment if segment is not None and (segment.isolated or not isolated) else None

    def add(self, segment: Segment) -> bool:
        """Store it, evicting if there is no room. False if it is known already, or larger than what may be freed.

        One that was computed alone takes the place of one of the same tokens that was computed in context.
        Raises ValueError for a segment in another tenant's domain, and for one in a shared domain that was computed in context.
        """
        if segment.domain.shared and not segment.isolated:
            raise ValueError("a segment that was computed in the context of a prompt may only be found by that prompt's tenant")
        if not segment.domain.shared and segment.domain.tenant != segment.owner:
            raise ValueError("a segment may only be left in its owner's domain, or in a shared one")
        known = self._known.get(_name(segment))
        if known is not None and (known.isolated or not segment.isolated):
            return False
        if not self._fits(segment):
            return False
        if known is not None:
            self.remove(known)
        self._make_room(segment)
        self._known[_name(segment)] = segment
        self.version += 1
        self._segments[segment] = self._indexed(segment)
        self.bytes += segment.nbytes
        self._charge(segment)
        self._kept.touch(segment.owner, segment.nbytes)
        return True

    def claim(self, segment: Segment, owner: str) -> None:
        """The owner left what is there already: in a shared domain it stays for this owner when the one that is charged gives
        it up."""
        if segment.domain.shared:
            self.renew(segment)
            if owner not in (segment.owner, *segment.heirs) and len(segment.heirs) < MOST_HEIRS:
                segment.heirs.append(owner)

    def _charge(self, segment: Segment) -> None:
        self._kept.add(segment, segment.owner, segment.nbytes)
        self.bytes_by[segment.owner] += segment.nbytes

    def _discharge(self, segment: Segment) -> None:
        self._kept.remove(segment, segment.owner)
        self.bytes_by[segment.owner] -= segment.nbytes
        if not self.bytes_by[segment.owner]:
            del self.bytes_by[segment.owner]

    def _indexed(self, segment: Segment) -> list[Key]:
        """Make it findable. Returns its keys."""
        if segment.domain.shared:
            self.chains.add(segment)
            return []
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

        Of an owner's own domain. Tokens are for the caller to compare.
        """
        return self._index.get((domain.key, fingerprint), ())[::-1]

    def touch(self, segment: Segment) -> None:
        """It has been used."""
        if segment in self._segments:
            segment.uses += 1
            self.renew(segment)

    def renew(self, segment: Segment) -> None:
        """It is to go after all others of its owner, if it is there."""
        if segment not in self._segments:
            return
        self._segments.move_to_end(segment)
        self._kept.renew(segment, segment.owner)
        if segment.domain.shared:
            self.chains.touch(segment)
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
        if segment.domain.shared:
            self.chains.remove(segment)
        for key in keys:
            entries = [entry for entry in self._index.get(key, ()) if entry[0] is not segment]
            if entries:
                self._index[key] = entries
            else:
                self._index.pop(key, None)
        self.version += 1
        del self._known[_name(segment)]
        self._discharge(segment)
        self.bytes -= segment.nbytes

    def purge(self, owner: str) -> int:
        """Forget everything of an owner; what others left as well is theirs from now on. Returns how many segments."""
        gone = self._kept.of(owner)
        for segment in self._segments:
            if owner in segment.heirs:
                segment.heirs.remove(owner)
        for segment in gone:
            self._give_up(segment)
        return len(gone)

    def clear(self) -> int:
        """Forget everything. Returns how many segments."""
        gone = list(self._segments)
        for segment in gone:
            self.remove(segment)
        return len(gone)

    def _give_up(self, segment: Segment) -> None:
        """Its owner keeps it no more: the next one that left the same and has room for it does, or nobody."""
        while segment.heirs:
            heir = segment.heirs.pop(0)
            quota = self._quota(heir)
            if quota is None or self.bytes_by[heir] + segment.nbytes <= quota:
                self._discharge(segment)
                segment.owner = heir
                self._charge(segment)
                return
        self.remove(segment)

    def _fits(self, segment: Segment) -> bool:
        quota = self._quota(segment.owner)
        return segment.nbytes <= (self.capacity if quota is None else min(quota, self.capacity))

    def _make_room(self, segment: Segment) -> None:
        owner, size = segment.owner, segment.nbytes
        quota = self._quota(owner)
        while quota is not None and self.bytes_by[owner] + size > quota:
            self._evict(self._kept.next_of(owner))
        while self.bytes + size > self.capacity:
            loser = self._kept.next_owner()
            if self._kept.size(owner) and self._kept.burden(owner, size) >= self._kept.burden(loser):
                loser = owner  # it would be the one that is most above its share
            self._evict(self._kept.next_of(loser))

    def _evict(self, segment: Segment) -> None:
        self.evictions += 1
        self._give_up(segment)

    def check(self) -> None:
        """Prove that bytes and index agree with the segments. Raises AssertionError."""
        assert self.bytes == sum(segment.nbytes for segment in self._segments) <= self.capacity, "bytes are off"
        by: Counter[str] = Counter()
        for segment in self._segments:
            by[segment.owner] += segment.nbytes
        assert by == self.bytes_by, "an owner's bytes are off"
        assert set(self._known.values()) == set(self._segments), "a segment is known that is not there, or the other way round"
        assert all(name == _name(segment) for name, segment in self._known.items()), "a segment is known by another name"
        for key, entries in self._index.items():
            assert 0 < len(entries) <= MOST_CANDIDATES, "the index keeps too many places, or an empty list"
            assert all(key in self._segments.get(s, ()) for s, _ in entries), "the index names a segment that is gone"
        owned = [segment for owner in self.bytes_by for segment in self._kept.of(owner)]
        assert len(owned) == len(self._segments) == len(self._kept), "a segment has no owner, or two"
        for owner, amount in self.bytes_by.items():
            assert all(s.owner == owner and s in self._segments for s in self._kept.of(owner)), "a segment has another's owner"
            assert self._kept.size(owner) == amount, "an owner's bytes are not what is evicted from"
        assert all(s.domain.shared or s.domain.tenant == s.owner for s in self._segments), "a segment lies in another's domain"
        assert all(s.isolated or not s.domain.shared for s in self._segments), "in-context KV crossed a tenant boundary"
        self.chains.check({segment for segment in self._segments if segment.domain.shared})


def _name(segment: Segment) -> tuple[bytes, bytes, bytes]:
    return segment.domain.key, segment.before, segment.tokens.tobytes()
