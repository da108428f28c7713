"""Responses that can be retrieved and continued: in memory, bounded in number and in bytes, each its owner's alone.

A response that continues another keeps only its own items; the conversation is the chain of them. Whenever a response is used,
so is all that it continues, and that counts as used later than it: so the least recently used of an owner is always one that
nothing continues, and no chain ever loses its beginning. Each owner may have so many responses; bytes are bounded over all
owners, and who holds most gives up its least recently used one.

A deleted response is found by nobody. What it held stays, and is counted, for as long as a stored response continues it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_OF_RESPONSE, _OF_ENTRY = 2048, 512
"""Bytes that are counted for Python's objects beside the JSON."""


class Owner(NamedTuple):
    """Whose responses they are."""

    tenant: str
    key: str
    """A digest of the API key; empty where none is needed."""


class Entry(NamedTuple):
    """An item as JSON: only those that are needed are ever read."""

    id: str
    data: bytes

    @classmethod
    def of(cls, item: Mapping[str, Any]) -> Entry:
        """Write an item."""
        return cls(str(item["id"]), _dumps(item))


@dataclass(slots=True, eq=False)
class Record:
    """A stored response."""

    id: str
    head: bytes
    """JSON of the response but for its output."""
    input: tuple[Entry, ...]
    output: tuple[Entry, ...]
    made: frozenset[str]
    """Ids of items that can be referred to."""
    parent: Record | None
    """What it continues."""
    children: int = 0
    deleted: bool = False

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Input and output."""
        return self.input + self.output

    @property
    def size(self) -> int:
        """Bytes that it counts for."""
        return _OF_RESPONSE + len(self.head) + sum(_OF_ENTRY + len(entry.data) for entry in self.entries)

    @property
    def response(self) -> bytes:
        """JSON of the response."""
        return self.head[:-1] + b',"output":' + listed(self.output) + b"}"

    def chain(self) -> Iterator[Record]:
        """It, what it continues, and so on."""
        record: Record | None = self
        while record is not None:
            yield record
            record = record.parent

    def conversation(self) -> list[Entry]:
        """All items up to its own output."""
        return [entry for record in reversed(list(self.chain())) for entry in record.entries]

    def whole_input(self) -> list[Entry]:
        """All items that it answered."""
        return [*([] if self.parent is None else self.parent.conversation()), *self.input]


def listed(entries: Sequence[Entry]) -> bytes:
    """JSON of a list of items."""
    return b"[" + b",".join(entry.data for entry in entries) + b"]"


@dataclass(slots=True)
class _Shelf:
    """One owner's."""

    records: dict[str, Record] = field(default_factory=dict)
    """Least recently used first."""
    items: dict[str, tuple[Record, Entry]] = field(default_factory=dict)
    """By their ids."""
    size: int = 0


class ResponseStore:
    """All stored responses of a server."""

    def __init__(self, capacity: int, most: int) -> None:
        """capacity: bytes over all owners, 0 to store none; most: responses of one owner."""
        self._capacity, self._most = capacity, most
        self._shelves: dict[Owner, _Shelf] = {}
        self.size = 0
        """Bytes that are counted."""

    def __len__(self) -> int:
        return sum(len(shelf.records) for shelf in self._shelves.values())

    @property
    def enabled(self) -> bool:
        """Whether anything is stored."""
        return self._capacity > 0

    def find(self, owner: Owner, response_id: str) -> Record | None:
        """A response of this owner's, which is used by that."""
        shelf = self._shelves.get(owner)
        record = None if shelf is None else shelf.records.get(response_id)
        if shelf is None or record is None or record.deleted:
            return None
        _use(shelf, record)
        return record

    def find_item(self, owner: Owner, item_id: str) -> Entry | None:
        """An item that one of this owner's responses holds. Its response is used by that."""
        shelf = self._shelves.get(owner)
        record, entry = (None, None) if shelf is None else shelf.items.get(item_id, (None, None))
        if shelf is None or record is None or record.deleted:
            return None
        _use(shelf, record)
        return entry

    def put(self, owner: Owner, response: Mapping[str, Any], items: Sequence[Entry], made: Collection[str],
            parent: Record | None, before: Sequence[Entry]) -> bool:  # fmt: skip
        """Store a response; whether it was.

        items: of its input. made: ids of those that this server named; the output's are, too. parent: what it continues, and
        before: the items of that, which it keeps itself if its parent has gone meanwhile.
        """
        if not self.enabled:
            return False
        shelf = self._shelves.setdefault(owner, _Shelf())
        if parent is not None and shelf.records.get(parent.id) is not parent:
            parent, items = None, [*before, *items]
        head = _dumps({key: value for key, value in response.items() if key != "output"})
        output = tuple(map(Entry.of, response["output"]))
        names = frozenset(made) | {entry.id for entry in output}
        record = Record(response["id"], head, tuple(items), output, names, parent)
        if parent is not None:
            parent.children += 1
        shelf.records[record.id] = record
        shelf.items.update({entry.id: (record, entry) for entry in record.entries if entry.id in names})
        self._count(shelf, record.size)
        _use(shelf, record)
        while len(shelf.records) > self._most:
            self._forget_oldest(owner)
        while self.size > self._capacity:
            self._forget_oldest(max(self._shelves, key=lambda name: self._shelves[name].size))
        held = self._shelves.get(owner)
        return held is not None and record.id in held.records

    def delete(self, owner: Owner, response_id: str) -> bool:
        """Delete a response of this owner's; whether there was one."""
        record = self.find(owner, response_id)
        if record is None:
            return False
        record.deleted = True
        if not record.children:
            self._forget(owner, record)
        return True

    def check(self) -> None:
        """Raises AssertionError where counts do not fit what is held."""
        for owner, shelf in self._shelves.items():
            held = shelf.records.values()
            assert held and len(held) <= self._most and shelf.size == sum(record.size for record in held), owner
            assert shelf.items.keys() == {name for record in held for name in record.made}
            children = {record.id: 0 for record in held}
            for record in held:
                if record.parent is not None:
                    assert shelf.records[record.parent.id] is record.parent
                    children[record.parent.id] += 1
            assert all(record.children == children[record.id] for record in held)
            assert all(record.children for record in held if record.deleted)
            assert not next(iter(held)).children
        assert self.size == sum(shelf.size for shelf in self._shelves.values()) <= self._capacity

    def _forget_oldest(self, owner: Owner) -> None:
        self._forget(owner, next(iter(self._shelves[owner].records.values())))

    def _forget(self, owner: Owner, last: Record) -> None:
        """Forget a response that nothing continues, and deleted ones that nothing continues any more."""
        shelf = self._shelves[owner]
        record: Record | None = last
        while record is not None and not record.children and (record is last or record.deleted):
            del shelf.records[record.id]
            for name in record.made:
                del shelf.items[name]
            self._count(shelf, -record.size)
            record = record.parent
            if record is not None:
                record.children -= 1
        if not shelf.records:
            del self._shelves[owner]

    def _count(self, shelf: _Shelf, size: int) -> None:
        shelf.size += size
        self.size += size


def _use(shelf: _Shelf, record: Record) -> None:
    for used in record.chain():
        shelf.records[used.id] = shelf.records.pop(used.id)


def _dumps(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
