"""The only door to blocks. Everybody else holds a `BlockTable` and asks.

    A request's tokens, in blocks.   [0, hit)            mapped from the index by `match`, shared, read-only
                                     [hit, computed)     own, full or filling; full ones are published by `commit`
                                     [computed, slots)   reserved, to be written
                                     [slots, known)      not yet reserved

    open -> match -> adopt | drop -> reserve* -> commit* -> release

Which call changes what: `match` pins blocks (they cannot be evicted) and changes nothing else; `adopt` hands the pins to the
table; `reserve` takes blocks, evicting cached ones; `commit` makes full blocks findable; `release` gives all back, and what
was published stays cached. `check` proves after any of them that the books balance.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvloom.engine.cache.pool import BlockPool
from kvloom.engine.cache.storage import Storage
from kvloom.engine.reuse.prefix import Chain, Domain, PrefixIndex


@dataclass(slots=True, eq=False)
class BlockTable:
    """One request's blocks in one cache, in sequence order. Append-only between `open` and `release`."""

    chain: Chain
    publishes: bool = True
    """Whether its full blocks may be found by others."""
    looks_up: bool = True
    """Whether it may begin with blocks of others."""
    align: int = 1
    """What it begins with, and what it publishes, ends at a multiple of this many tokens."""
    blocks: array[int] = field(default_factory=lambda: array("i"))
    published: int = 0
    """Blocks in front that are findable or known to be duplicates of findable ones."""


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """A reusable prefix, pinned until it is adopted or dropped."""

    blocks: tuple[int, ...]
    tokens: int
    """len(blocks) * block_size, always less than the tokens that were looked up."""


class CacheManager:
    """Blocks of one head group: pool, exact prefix index and tables."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.block_size = storage.block_size
        self.index = PrefixIndex(storage.block_size)
        self.pool = BlockPool(storage.blocks, self.index.remove)
        self.query_tokens = 0
        self.hit_tokens = 0
        self._tables: set[BlockTable] = set()
        self._matches: set[Match] = set()

    @property
    def capacity_tokens(self) -> int:
        return self.pool.total * self.block_size

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` positions take."""
        return -(-tokens // self.block_size)

    def open(self, domain: Domain, *, publishes: bool = True, looks_up: bool = True, align: int = 1) -> BlockTable:
        """An empty table."""
        table = BlockTable(Chain(domain, self.block_size), publishes, looks_up, align)
        self._tables.add(table)
        return table

    def match(self, table: BlockTable, tokens: Sequence[int]) -> Match:
        """The longest findable prefix of `tokens`, pinned, leaving at least one token to compute."""
        blocks = self.index.match(table.chain, tokens, len(tokens) - 1) if table.looks_up else []
        step = math.lcm(table.align, self.block_size) // self.block_size
        del blocks[len(blocks) // step * step :]
        self.pool.retain(blocks)
        match = Match(tuple(blocks), len(blocks) * self.block_size)
        self._matches.add(match)
        return match

    def drop(self, match: Match) -> None:
        """Unpin a match that is not used."""
        self._matches.remove(match)
        self.pool.release(match.blocks)

    def adopt(self, table: BlockTable, match: Match, looked_up: int) -> None:
        """Make a match the beginning of an empty table. `looked_up` tokens count as queried."""
        assert not table.blocks, "only an empty table can adopt a prefix"
        self._matches.remove(match)
        table.blocks.extend(match.blocks)
        table.published = len(match.blocks)
        if table.looks_up:
            self.query_tokens += looked_up
            self.hit_tokens += match.tokens

    def missing(self, table: BlockTable, tokens: int) -> int:
        """Blocks the table lacks for `tokens` positions."""
        return max(0, self.blocks_for(tokens) - len(table.blocks))

    def reserve(self, table: BlockTable, tokens: int, *, keep_free: int = 0) -> bool:
        """Grow the table to hold `tokens` positions: all or nothing. False if that would leave fewer than `keep_free`."""
        count = self.missing(table, tokens)
        if count > 0:
            if self.pool.available - count < keep_free:
                return False
            table.blocks.extend(self.pool.take(count, table.chain.domain.tenant))
        return True

    def commit(self, table: BlockTable, tokens: Sequence[int], computed: int) -> None:
        """The KV of tokens[0:computed] is stored and final: publish the full blocks among it."""
        if not table.publishes:
            return
        for i in range(table.published, computed // table.align * table.align // self.block_size):
            if self.index.publish(table.chain, i, tokens, table.blocks[i]):
                self.pool.publish(table.blocks[i])
            table.published = i + 1

    def release(self, table: BlockTable) -> None:
        """Give all blocks back; the table is empty and may be used again."""
        self.pool.release(table.blocks)
        table.blocks = array("i")
        table.published = 0

    def close(self, table: BlockTable) -> None:
        """Release, and forget the table."""
        self.release(table)
        self._tables.remove(table)

    def evict(self, blocks: int | None = None) -> int:
        """Forget cached prefixes, least recently used first (all of them by default). Returns blocks freed."""
        return self.pool.evict(self.pool.total if blocks is None else blocks)

    def check(self) -> None:
        """Prove free + cached + in use = total, per tenant too, and that every reference has a holder.

        Raises AssertionError naming what is off. Costs time in proportion to the number of blocks: for tests and idle time.
        """
        held: Counter[int] = Counter()
        for table in self._tables:
            held.update(table.blocks)
        for match in self._matches:
            held.update(match.blocks)
        self.pool.check(held)
        self.index.check()
        assert all(len(set(table.blocks)) == len(table.blocks) for table in self._tables), "a table holds a block twice"
