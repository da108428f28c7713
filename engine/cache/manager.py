"""The only door to blocks. Everybody else holds a `BlockTable` and asks.

    A request's tokens, in blocks.   [0, hit)            mapped from the index by `match`, shared, read-only
                                     [hit, computed)     own, full or filling; full ones are published by `commit`
                                     [computed, slots)   reserved, to be written
                                     [slots, known)      not yet reserved

    open -> match -> adopt | drop -> reserve* -> commit* -> forget* -> release

Which call changes what: `match` pins blocks (they cannot be evicted) and changes nothing else; `adopt` hands the pins to the
table; `reserve` takes blocks, evicting cached ones; `commit` makes full blocks findable; `forget` gives back the blocks of a
head group that will not be read again; `retract` takes a commit back; `release` gives all back, and what was published stays
cached. `check` proves after any of them that the books balance.

Head groups each have a storage, a pool and an index of their own. A request begins with what all of them can find, and grows
in all of them at once; they differ only in what is forgotten.
"""

from __future__ import annotations

import functools
import math
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvloom.engine.cache.pool import BlockPool, Claim
from kvloom.engine.cache.prefix import Chain, Domain, PrefixIndex
from kvloom.engine.cache.storage import Storage

_CLAIMS = 4096
"""Claims that are remembered: asked for with every block, and tenants may be many."""

HOLE = -1
"""In a table: a block that was given back because its head group reads it no more."""


class Claimant(Protocol):
    """What a tenant may keep in the cache (`engine.requests.tenants.Tenant`)."""

    @property
    def weight(self) -> float:
        """Its share of the cached blocks when memory is wanted, relative to other tenants; > 0."""
        ...

    @property
    def cache_bytes(self) -> int | None:
        """Most bytes of findable KV; None for no bound."""
        ...


@dataclass(slots=True, eq=False)
class BlockTable:
    """One request's blocks in one cache, in sequence order. Append-only between `open` and `release`, but for `HOLE`s."""

    chain: Chain
    groups: int = 1
    publishes: bool = True
    """Whether its full blocks may be found by others."""
    looks_up: bool = True
    """Whether it may begin with blocks of others."""
    align: int = 1
    """What it begins with, and what it publishes, ends at a multiple of this many tokens."""
    leaves: int = 1
    """Tokens at the end, at least, that are not looked up."""
    parts: list[array[int]] = field(init=False)
    """Block ids per head group, equally many."""
    published: int = 0
    """Blocks in front that are findable or known to be duplicates of findable ones."""
    forgotten: int = 0
    """Blocks in front of which a head group may have holes."""

    def __post_init__(self) -> None:
        self.parts = [array("i") for _ in range(self.groups)]

    @property
    def blocks(self) -> array[int]:
        """Of the first head group, which never forgets."""
        return self.parts[0]


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """A reusable prefix, pinned until it is adopted or dropped."""

    parts: tuple[tuple[int, ...], ...]
    """Block ids per head group, equally many."""
    tokens: int
    """Blocks * block_size, always less than the tokens that were looked up."""

    @property
    def blocks(self) -> tuple[int, ...]:
        """Of the first head group."""
        return self.parts[0]


class HeadGroup:
    """Tensors, blocks and index of one head group."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.index = PrefixIndex(storage.block_size)
        self.pool = BlockPool(storage.blocks, self.index.remove)

    @property
    def bytes_in_use(self) -> int:
        """Memory of the blocks that requests hold."""
        return self.pool.in_use * self.storage.block_bytes


class CacheManager:
    """Tables over the blocks of one or several head groups."""

    def __init__(self, *storages: Storage) -> None:
        """Storages of equal block size; the first group keeps whole sequences."""
        self.groups = tuple(HeadGroup(storage) for storage in storages)
        self.block_size = storages[0].block_size
        self.query_tokens = 0
        self.hit_tokens = 0
        self._tables: set[BlockTable] = set()
        self._matches: set[Match] = set()

    @property
    def storage(self) -> Storage:
        """Of the first head group."""
        return self.groups[0].storage

    @property
    def pool(self) -> BlockPool:
        """Of the first head group."""
        return self.groups[0].pool

    @property
    def index(self) -> PrefixIndex:
        """Of the first head group."""
        return self.groups[0].index

    @property
    def capacity_tokens(self) -> int:
        """Tokens that the group which keeps whole sequences has room for."""
        return self.pool.total * self.block_size

    @property
    def longest(self) -> int:
        """Tokens of the longest request there is room for: a prompt is held whole by every group while it is computed."""
        return min(group.pool.total for group in self.groups) * self.block_size

    @property
    def available(self) -> int:
        """Blocks that every group can give."""
        return min(group.pool.available for group in self.groups)

    def freed_by(self, tables: Sequence[BlockTable]) -> int:
        """Blocks that every group could give beyond `available` if these tables were released together."""
        if not tables:
            return 0
        able = []
        for i, group in enumerate(self.groups):
            held = Counter(block for table in tables for block in table.parts[i] if block != HOLE)
            able.append(group.pool.available + sum(group.pool.references(block) == count for block, count in held.items()))
        return min(able) - self.available

    @property
    def bytes(self) -> int:
        """Memory of all blocks."""
        return sum(group.storage.block_bytes * group.pool.total for group in self.groups)

    @property
    def bytes_in_use(self) -> int:
        """Memory of the blocks that requests hold."""
        return sum(group.bytes_in_use for group in self.groups)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` positions take."""
        return -(-tokens // self.block_size)

    def open(
        self, domain: Domain, *, publishes: bool = True, looks_up: bool = True, align: int = 1, leaves: int = 1
    ) -> BlockTable:
        """An empty table."""
        table = BlockTable(Chain(domain, self.block_size), len(self.groups), publishes, looks_up, align, leaves)
        self._tables.add(table)
        return table

    def limit(self, tenant: Callable[[str], Claimant]) -> None:
        """Bound what tenants may keep findable. `tenant` must always say the same of a name; call before anything is opened.

        Bytes are spread over the head groups in proportion to their memory, so that all run out at the same length.
        """
        for group in self.groups:
            group.pool.claim = functools.lru_cache(_CLAIMS)(functools.partial(_claim, tenant, group.pool.total, self.bytes))

    def epoch(self, tenant: str) -> tuple[int, ...]:
        """Something that is another thing whenever a `peek` of this tenant may have changed. Others do not move it."""
        return tuple(group.pool.changed(tenant) for group in self.groups)

    def peek(self, table: BlockTable, tokens: Sequence[int]) -> int:
        """Tokens that `match` would find. Pins nothing, counts nothing, makes nothing more recently used."""
        return len(self._find(table, tokens)[0]) * self.block_size

    def held(self, domain: Domain, tokens: Sequence[int]) -> int:
        """Tokens at the beginning that can be found now in every group, less than all. Reads the index alone: from any thread,
        while others change it, the answer is that of some moment."""
        chain, limit = Chain(domain, self.block_size), len(tokens) - 1
        return min(len(group.index.match(chain, tokens, limit)) for group in self.groups) * self.block_size

    def match(self, table: BlockTable, tokens: Sequence[int]) -> Match:
        """The longest findable prefix of `tokens`, pinned, leaving at least `BlockTable.leaves` tokens to compute."""
        found = self._find(table, tokens)
        match = Match(tuple(map(tuple, found)), len(found[0]) * self.block_size)
        for group, blocks in zip(self.groups, match.parts):
            group.pool.retain(blocks)
        self._matches.add(match)
        return match

    def _find(self, table: BlockTable, tokens: Sequence[int]) -> list[list[int]]:
        limit = max(0, len(tokens) - table.leaves) if table.looks_up else 0
        found = [group.index.match(table.chain, tokens, limit) for group in self.groups]
        step = math.lcm(table.align, self.block_size) // self.block_size
        count = min(map(len, found)) // step * step
        return [blocks[:count] for blocks in found]

    def drop(self, match: Match) -> None:
        """Unpin a match that is not used."""
        self._matches.remove(match)
        for group, blocks in zip(self.groups, match.parts):
            group.pool.release(blocks)

    def adopt(self, table: BlockTable, match: Match, looked_up: int) -> None:
        """Make a match the beginning of an empty table. `looked_up` tokens count as queried, and the match among them as found;
        0 counts neither, for tokens that are computed again."""
        assert not table.blocks, "only an empty table can adopt a prefix"
        self._matches.remove(match)
        for part, blocks in zip(table.parts, match.parts):
            part.extend(blocks)
        table.published = len(match.blocks)
        if table.looks_up:
            self.query_tokens += looked_up
            self.hit_tokens += min(match.tokens, looked_up)

    def missing(self, table: BlockTable, tokens: int) -> int:
        """Blocks the table lacks for `tokens` positions."""
        return max(0, self.blocks_for(tokens) - len(table.blocks))

    def reserve(self, table: BlockTable, tokens: int, *, keep_free: int = 0) -> bool:
        """Grow the table to hold `tokens` positions: all or nothing. False if that would leave fewer than `keep_free`."""
        count = self.missing(table, tokens)
        if count > 0:
            if self.available - count < keep_free:
                return False
            for group, part in zip(self.groups, table.parts):
                part.extend(group.pool.take(count, table.chain.domain.tenant))
        return True

    def commit(self, table: BlockTable, tokens: Sequence[int], computed: int) -> int:
        """The KV of tokens[0:computed] is stored and final: publish the full blocks among it. Returns how many are new: nobody
        could find them before."""
        new = 0
        if not table.publishes:
            return new
        for i in range(table.published, computed // table.align * table.align // self.block_size):
            for group, part in zip(self.groups, table.parts):
                if part[i] != HOLE and group.index.publish(table.chain, i, tokens, part[i]):
                    group.pool.publish(part[i])
                    new += group is self.groups[0]
            table.published = i + 1
        return new

    def retract(self, table: BlockTable, computed: int) -> None:
        """Only tokens[0:computed] are stored, though more was committed: what is behind cannot be found any more."""
        first = computed // self.block_size
        for group, part in zip(self.groups, table.parts):
            for block in part[first : table.published]:
                if block != HOLE and group.index.holds(block):
                    group.index.remove(block)
                    group.pool.unpublish(block)
        table.published = min(table.published, first)

    def forget(self, table: BlockTable, group: int, first: int, last: int) -> None:
        """Give back blocks [first, last) of a group that keeps no whole sequences. What was published stays findable until
        its memory is wanted; the table has holes there."""
        assert group > 0, "the first group keeps whole sequences"
        part = table.parts[group]
        self.groups[group].pool.release([block for block in part[first:last] if block != HOLE])
        part[first:last] = array("i", [HOLE] * (last - first))
        table.forgotten = max(table.forgotten, last)

    def release(self, table: BlockTable) -> None:
        """Give all blocks back; the table is empty and may be used again."""
        for i, group in enumerate(self.groups):
            group.pool.release([block for block in table.parts[i] if block != HOLE])
            table.parts[i] = array("i")
        table.published = table.forgotten = 0

    def close(self, table: BlockTable) -> None:
        """Release, and forget the table."""
        self.release(table)
        self._tables.remove(table)

    def evict(self, blocks: int | None = None) -> int:
        """Forget cached prefixes (all of them by default), in the order of `eviction`. Returns blocks freed in all groups."""
        return sum(group.pool.evict(group.pool.total if blocks is None else blocks) for group in self.groups)

    def check(self) -> None:
        """Prove free + cached + in use = total, per tenant too, and that every reference has a holder.

        Raises AssertionError naming what is off. Costs time in proportion to the number of blocks: for tests and idle time.
        """
        for i, group in enumerate(self.groups):
            held: Counter[int] = Counter()
            for table in self._tables:
                held.update(block for block in table.parts[i] if block != HOLE)
            for match in self._matches:
                held.update(match.parts[i])
            group.pool.check(held)
            group.index.check()
        for table in self._tables:
            assert len(set(map(len, table.parts))) == 1, "a table's groups differ in length"
            for part in table.parts:
                assert HOLE not in part[table.forgotten :], "a block is missing behind what was forgotten"
                blocks = [block for block in part if block != HOLE]
                assert len(set(blocks)) == len(blocks), "a table holds a block twice"
            assert HOLE not in table.blocks, "the first group has a hole"


def _claim(tenant: Callable[[str], Claimant], blocks: int, total_bytes: int, name: str) -> Claim:
    """A tenant's claim in a pool of `blocks`, of a cache of `total_bytes`."""
    found = tenant(name)
    return Claim(found.weight, None if found.cache_bytes is None else blocks * found.cache_bytes // total_bytes)
