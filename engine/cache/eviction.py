"""What is kept in case it is asked for again, and what of it goes first when memory is wanted: the owner is charged.

Blocks of a pool are kept so, and segments of approximate reuse: items of a size. If all belong to one owner, the least recently
used goes first. Between owners, the next item comes from

1. an owner of whose items none was used or added while the whole memory was turned over several times: nothing of a stranger is
   worth keeping;
2. else the owner with the largest size of items for its weight, which is one over its fair share (weight over the weights of
   all who keep something) if anybody is. So who floods the memory loses what it flooded it with, not what others left there.

Within an owner the least recently used item goes first. Every operation is O(log n) amortised, in the number of operations on
owners, never in the number of items.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

_SLACK = 64

STRANGER_TURNOVERS = 16
"""An owner of whom nothing was used while the memory was turned over so often has no claim left. Many, as a flood turns it over
as well; not endless, as what nobody will ask for again would stay for good."""

Item = TypeVar("Item", bound=Hashable)


class KeptItems(Generic[Item]):
    """What may be given up, by owner, in the order in which it is."""

    def __init__(self, turnover: int, weight: Callable[[str], float]) -> None:
        """turnover: size taken from the memory after which an owner who did nothing has no claim. weight: of an owner, > 0."""
        self._turnover = turnover
        self._weight = weight
        self._items: dict[str, OrderedDict[Item, int]] = {}  # of an owner: item -> size, least recently used first
        self._size: Counter[str] = Counter()
        self._touched: OrderedDict[str, int] = OrderedDict()  # owner -> `_turn` of its last use; least recent first
        self._fullest: list[tuple[float, str, int]] = []  # heap of (-size / weight, owner, size); true or too much
        self._turn = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Item]:
        for items in self._items.values():
            yield from items

    def of(self, owner: str) -> list[Item]:
        """Items of one owner, least recently used first."""
        return list(self._items.get(owner, ()))

    def next_of(self, owner: str) -> Item:
        """The item that the owner loses next. There must be one."""
        return next(iter(self._items[owner]))

    def size(self, owner: str) -> int:
        """Size of one owner's items together."""
        return self._size.get(owner, 0)

    def burden(self, owner: str, more: int = 0) -> float:
        """Size of an owner's items for its weight, with `more` than it has."""
        return (self.size(owner) + more) / self._weight(owner)

    def touch(self, owner: str, taken: int = 0) -> None:
        """The owner does something: it takes a size of `taken` from the memory, or what it has is used again."""
        self._turn += taken
        if owner in self._items:
            self._touched[owner] = self._turn
            self._touched.move_to_end(owner)

    def add(self, item: Item, owner: str, size: int = 1) -> None:
        """Keep `item`: it is now the owner's most recently used one."""
        items = self._items.setdefault(owner, OrderedDict())
        items[item] = size
        self._size[owner] += size
        self._count += 1
        self.touch(owner)
        if len(self._fullest) > 4 * len(self._items) + _SLACK:
            self._fullest = [self._entry(name) for name in self._items]
            heapq.heapify(self._fullest)
        else:
            heapq.heappush(self._fullest, self._entry(owner))

    def renew(self, item: Item, owner: str) -> None:
        """`item` is now the owner's most recently used one."""
        self._items[owner].move_to_end(item)
        self.touch(owner)

    def remove(self, item: Item, owner: str) -> None:
        """`item` is not to be given up any more, or is gone."""
        self._removed(owner, self._items[owner].pop(item))

    def pop(self, owner: str | None = None) -> tuple[Item, str]:
        """The item to give up next, of `owner` or of all, and whose it was. There must be one."""
        if owner is None:
            owner = self.next_owner()
        item = self.next_of(owner)
        self.remove(item, owner)
        return item, owner

    def _removed(self, owner: str, size: int) -> None:
        self._count -= 1
        self._size[owner] -= size
        if not self._items[owner]:
            del self._items[owner], self._touched[owner], self._size[owner]

    def next_owner(self) -> str:
        """Who loses an item next. There must be one."""
        stranger = next(iter(self._touched))
        if len(self._touched) == 1 or self._turn - self._touched[stranger] > self._turnover:
            return stranger
        while True:
            _, owner, size = self._fullest[0]
            if size == self.size(owner):
                return owner
            # It has fewer by now, or more and an entry of its own for that.
            heapq.heappop(self._fullest)
            if 0 < self.size(owner) < size:
                heapq.heappush(self._fullest, self._entry(owner))

    def _entry(self, owner: str) -> tuple[float, str, int]:
        return -self.burden(owner), owner, self.size(owner)
