"""Blocks of one head group: who holds them, which may be reused, which goes first.

    free      holds nothing
    in use    referenced by at least one table or match
    cached    referenced by none, but published: its tokens can still be found

A block is in exactly one of these. Knows nothing of tokens or keys; the prefix index tells it what is published.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence


class BlockPool:
    """Reference counts and LRU order over `total` blocks. Single-threaded."""

    def __init__(self, total: int, on_evict: Callable[[int], None]) -> None:
        """`on_evict(block)` is called when a cached block is about to be given to someone else."""
        self.total = total
        self.evictions = 0
        self.owners: list[str] = [""] * total
        self.in_use_by: Counter[str] = Counter()
        self.cached_by: Counter[str] = Counter()
        self._refs = [0] * total
        self._published = bytearray(total)
        self._free = list(range(total - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
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

    def take(self, count: int, owner: str) -> list[int]:
        """`count` blocks with one reference each, evicting cached ones as needed. The caller checks `available` first."""
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
                del self._cached[block]
                self.cached_by[self.owners[block]] -= 1
                self.in_use_by[self.owners[block]] += 1
            self._refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less, last block first: the end of a chain is evicted before what it stands on."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block] > 0:
                continue
            self.in_use_by[self.owners[block]] -= 1
            if self._published[block]:
                self._cached[block] = None
                self.cached_by[self.owners[block]] += 1
            else:
                self._free.append(block)

    def publish(self, block: int) -> None:
        """A block in use can be found from now on, also after its last reference is gone."""
        self._published[block] = 1

    def evict(self, count: int) -> int:
        """Turn up to `count` cached blocks into free ones, least recently used first. Returns how many."""
        done = 0
        while done < count and self._cached:
            block, _ = self._cached.popitem(last=False)
            self._on_evict(block)
            self._published[block] = 0
            self.cached_by[self.owners[block]] -= 1
            self._free.append(block)
            done += 1
        self.evictions += done
        return done

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
        for tally, blocks in ((self.in_use_by, used), (self.cached_by, cached)):
            assert +tally == Counter(self.owners[block] for block in blocks), "a tenant's tally is off"
