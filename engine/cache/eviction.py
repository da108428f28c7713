"""Cached blocks, and which of them goes first when memory is wanted: eviction is charged to the owner.

A pool whose blocks all belong to one owner is plain least-recently-used. Between owners, the next block comes from

1. an owner who has done nothing while the whole pool was turned over several times: nothing of a stranger is worth keeping;
2. else the owner with the most cached blocks for its weight, which is one over its fair share (weight over the weights of all
   who have something cached) if anybody is. So who floods the cache loses what it flooded with, not what others left there.

Within an owner the least recently used block goes first. Every operation is O(log n) amortised, in the number of operations on
owners, never in the number of blocks.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator

_SLACK = 64


class CachedBlocks:
    """Blocks nobody uses, by owner, in the order in which they are given up."""

    def __init__(self, turnover: int, weight: Callable[[str], float]) -> None:
        """turnover: blocks taken from the pool after which an owner who did nothing has no claim. weight: of an owner, > 0."""
        self._turnover = turnover
        self._weight = weight
        self._blocks: dict[str, OrderedDict[int, None]] = {}  # of an owner: least recently used first
        self._touched: OrderedDict[str, int] = OrderedDict()  # owner -> `_turn` of its last use; least recent first
        self._fullest: list[tuple[float, str, int]] = []  # heap of (-blocks / weight, owner, blocks); true or too much
        self._turn = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        for blocks in self._blocks.values():
            yield from blocks

    def count(self, owner: str) -> int:
        """Blocks of one owner."""
        return len(self._blocks.get(owner, ()))

    def touch(self, owner: str, taken: int = 0) -> None:
        """The owner does something: it takes `taken` blocks from the pool, or uses again what it has."""
        self._turn += taken
        if owner in self._blocks:
            self._touched[owner] = self._turn
            self._touched.move_to_end(owner)

    def add(self, block: int, owner: str) -> None:
        """Nobody uses `block` any more; it is now the owner's most recently used one."""
        blocks = self._blocks.setdefault(owner, OrderedDict())
        blocks[block] = None
        self._count += 1
        self.touch(owner)
        if len(self._fullest) > 4 * len(self._blocks) + _SLACK:
            self._fullest = [self._entry(name) for name in self._blocks]
            heapq.heapify(self._fullest)
        else:
            heapq.heappush(self._fullest, self._entry(owner))

    def remove(self, block: int, owner: str) -> None:
        """`block` is used again."""
        del self._blocks[owner][block]
        self._removed(owner)

    def pop(self, owner: str | None = None) -> tuple[int, str]:
        """The block to give up next, of `owner` or of all, and whose it was. There must be one."""
        if owner is None:
            owner = self._next_owner()
        block, _ = self._blocks[owner].popitem(last=False)
        self._removed(owner)
        return block, owner

    def _removed(self, owner: str) -> None:
        self._count -= 1
        if not self._blocks[owner]:
            del self._blocks[owner], self._touched[owner]

    def _next_owner(self) -> str:
        stranger = next(iter(self._touched))
        if len(self._touched) == 1 or self._turn - self._touched[stranger] > self._turnover:
            return stranger
        while True:
            _, owner, count = self._fullest[0]
            if count == self.count(owner):
                return owner
            # It has fewer by now, or more and an entry of its own for that.
            heapq.heappop(self._fullest)
            if 0 < self.count(owner) < count:
                heapq.heappush(self._fullest, self._entry(owner))

    def _entry(self, owner: str) -> tuple[float, str, int]:
        count = self.count(owner)
        return -count / self._weight(owner), owner, count
