"""Blocks of one head group: who holds them, which may be reused, and how much of them one owner may keep findable.

    free      holds nothing
    in use    referenced by at least one table or match
    cached    referenced by none, but published: its tokens can still be found

A block is in exactly one of these. Knows nothing of tokens or keys; the prefix index tells it what is published. Which cached
block goes first, and whose, is the business of `eviction`.

A quota bounds an owner's findable blocks. Publishing beyond it evicts the owner's own cached blocks, least recently used first;
those that its requests still use may exceed it, and are dropped as soon as they are released.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from kvloom.engine.cache.eviction import STRANGER_TURNOVERS, KeptItems


class Claim(NamedTuple):
    """What an owner may keep in the cache."""

    weight: float = 1.0
    """Its share of the cached blocks when memory is wanted, relative to the weights of others; > 0."""
    quota: int | None = None
    """Most findable blocks; None for no bound."""


class BlockPool:
    """Reference counts and LRU order over `total` blocks. Single-threaded."""

    def __init__(self, total: int, on_evict: Callable[[int], None]) -> None:
        """`on_evict(block)` is called when a cached block is about to be given to someone else."""
        self.total = total
        self.evictions = 0
        self.claim: Callable[[str], Claim] = lambda owner: _UNBOUNDED
        """What an owner may keep. Must always say the same of an owner; set before the first block is taken."""
        self.owners: list[str] = [""] * total
        self.in_use_by: Counter[str] = Counter()
        self.cached_by: Counter[str] = Counter()
        self._findable_by: Counter[str] = Counter()
        self._changed: dict[str, int] = {}
        self._changes = 0
        self._refs = [0] * total
        self._published = bytearray(total)
        self._free = list(range(total - 1, -1, -1))
        self._cached: KeptItems[int] = KeptItems(STRANGER_TURNOVERS * total, lambda owner: self.claim(owner).weight)
        self._on_evict = on_evict

    @property
    def free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Blocks that nobody uses but that can still be found."""
        return len(self._cached)

    @property
    def available(self) -> int:
        """Blocks that `take` can give: free, or cached and evictable."""
        return len(self._free) + len(self._cached)

    @property
    def in_use(self) -> int:
        return self.total - self.available

    def references(self, block: int) -> int:
        """Tables and matches that hold a block."""
        return self._refs[block]

    def changed(self, owner: str) -> int:
        """A number that is another one whenever what can be found of this owner may have changed."""
        return self._changed.get(owner, 0)

    def take(self, count: int, owner: str) -> list[int]:
        """`count` blocks with one reference each, evicting cached ones as needed. The caller checks `available` first."""
        self._cached.touch(owner, count)
        self.evict(count - len(self._free))
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._refs[block] = 1
            self.owners[block] = owner
        self.in_use_by[owner] += count
        return blocks

    def retain(self, blocks: Iterable[int]) -> None:
        """One more reference to blocks that are in use or cached."""
        for block in blocks:
            if self._refs[block] == 0:
                owner = self.owners[block]
                self._cached.touch(owner)
                self._cached.remove(block, owner)
                _less(self.cached_by, owner)
                self.in_use_by[owner] += 1
            self._refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less, last block first: the end of a chain is evicted before what it stands on."""
        owners = set()
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block] > 0:
                continue
            owner = self.owners[block]
            _less(self.in_use_by, owner)
            if self._published[block]:
                self._cached.add(block, owner)
                self.cached_by[owner] += 1
                owners.add(owner)
            else:
                self._free.append(block)
        for owner in owners:
            self._keep_quota(owner)

    def publish(self, block: int) -> None:
        """A block in use can be found from now on, also after its last reference is gone, as far as its owner's quota goes."""
        owner = self.owners[block]
        self._published[block] = 1
        self._findable_by[owner] += 1
        self._note_change(owner)
        self._keep_quota(owner)

    def unpublish(self, block: int) -> None:
        """A block in use cannot be found any more."""
        owner = self.owners[block]
        self._published[block] = 0
        _less(self._findable_by, owner)
        self._note_change(owner)

    def evict(self, count: int) -> int:
        """Turn up to `count` cached blocks into free ones, in the order of `eviction`. Returns how many."""
        done = min(max(0, count), len(self._cached))
        for _ in range(done):
            self._evict(*self._cached.pop())
        return done

    def _keep_quota(self, owner: str) -> None:
        quota = self.claim(owner).quota
        while quota is not None and self._findable_by[owner] > quota and self.cached_by[owner]:
            self._evict(*self._cached.pop(owner))

    def _evict(self, block: int, owner: str) -> None:
        """Free a block that `_cached` has given up."""
        self._on_evict(block)
        self._published[block] = 0
        _less(self.cached_by, owner)
        _less(self._findable_by, owner)
        self._note_change(owner)
        self._free.append(block)
        self.evictions += 1

    def _note_change(self, owner: str) -> None:
        self._changes += 1
        if owner in self._findable_by:
            self._changed[owner] = self._changes
        else:  # nothing is left to be found: as if it had never been here
            self._changed.pop(owner, None)

    def check(self, references: Counter[int]) -> None:
        """Prove that the books balance, given every reference that is really held. Raises AssertionError."""
        free, cached = set(self._free), set(self._cached)
        used = {block for block in range(self.total) if self._refs[block]}
        assert len(free) == len(self._free), "a block is free twice"
        assert len(free) + len(cached) + len(used) == self.total, "free + cached + in use is not the total"
        assert free | cached | used == set(range(self.total)), "a block is in two states, or in none"
        held = {block: count for block, count in references.items() if count}
        assert held == {block: self._refs[block] for block in used}, "reference counts differ from what is held"
        assert not any(self._published[block] for block in free), "a free block can still be found"
        assert all(self._published[block] for block in cached), "a cached block cannot be found"
        findable = {block for block in range(self.total) if self._published[block]}
        for tally, blocks in ((self.in_use_by, used), (self.cached_by, cached), (self._findable_by, findable)):
            assert +tally == Counter(self.owners[block] for block in blocks), "a tenant's tally is off"
        for owner, count in self.cached_by.items():
            assert self._cached.size(owner) == count, "a tenant's cached blocks are not where they are evicted from"
            quota = self.claim(owner).quota
            assert quota is None or count <= quota, "a tenant's cached blocks exceed its quota"


_UNBOUNDED = Claim()


def _less(tally: Counter[str], owner: str) -> None:
    """One less. Whoever has nothing is forgotten: owners may be many."""
    if tally[owner] == 1:
        del tally[owner]
    else:
        tally[owner] -= 1
