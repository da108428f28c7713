"""Quotas of cached blocks, and who loses them under pressure: eviction is charged to the owner."""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.engine.cache import BlockTable, CacheManager, GroupSpec, Storage
from kvloom.engine.cache.eviction import KeptItems
from kvloom.engine.cache.pool import STRANGER_TURNOVERS
from kvloom.engine.cache.prefix import DomainFactory

SIZE = 4
DOMAINS = DomainFactory("model", secret=b"s" * 32)


@dataclass(frozen=True)
class Claimant:
    """What a tenant may keep."""

    weight: float = 1.0
    cache_bytes: int | None = None


def make(blocks: int, *, weights: dict[str, float] | None = None, quotas: dict[str, int] | None = None) -> CacheManager:
    """A cache of one group. quotas: in blocks."""
    cache = CacheManager(Storage(GroupSpec.everything(1, 1), blocks, SIZE, 8, torch.float32))
    size = cache.storage.block_bytes
    claims = {
        name: Claimant((weights or {}).get(name, 1.0), quotas[name] * size if name in (quotas or {}) else None)
        for name in {*(weights or {}), *(quotas or {})}
    }
    cache.limit(lambda name: claims.get(name, Claimant()))
    return cache


def fill(cache: CacheManager, tenant: str, first: int, blocks: int) -> BlockTable:
    """A request that computed `blocks` blocks of text nobody else has."""
    tokens = list(range(first, first + blocks * SIZE))
    table = cache.open(DOMAINS.domain(tenant, ""))
    assert cache.reserve(table, len(tokens))
    cache.commit(table, tokens, len(tokens))
    cache.check()
    return table


def found(cache: CacheManager, tenant: str, first: int, blocks: int) -> int:
    """Blocks of such a text that can be found."""
    table = cache.open(DOMAINS.domain(tenant, ""))
    count = cache.peek(table, [*range(first, first + blocks * SIZE), 1]) // SIZE
    cache.close(table)
    return count


def test_publishing_beyond_the_quota_evicts_the_tenants_own_oldest() -> None:
    cache = make(16, quotas={"a": 4})
    cache.close(fill(cache, "b", 5000, 2))
    cache.close(fill(cache, "a", 0, 3))
    cache.close(fill(cache, "a", 1000, 3))
    assert (cache.pool.cached_by["a"], cache.pool.cached_by["b"]) == (4, 2)
    assert (found(cache, "a", 0, 3), found(cache, "a", 1000, 3), found(cache, "b", 5000, 2)) == (1, 3, 2)
    assert cache.pool.free == 10, "evicted although there was room"


def test_what_requests_use_may_exceed_the_quota_until_it_is_released() -> None:
    cache = make(16, quotas={"a": 2})
    table = fill(cache, "a", 0, 6)
    assert found(cache, "a", 0, 6) == 6
    cache.close(table)
    assert (cache.pool.cached_by["a"], found(cache, "a", 0, 6)) == (2, 2), "the end of the chain went first"
    nothing = make(8, quotas={"a": 0})
    nothing.close(fill(nothing, "a", 0, 3))
    assert (nothing.pool.cached, nothing.pool.free) == (0, 8)


def test_a_quota_in_bytes_is_spread_over_head_groups() -> None:
    specs = (GroupSpec("all", ((0,),)), GroupSpec("few", ((1, 2),)))
    cache = CacheManager(*(Storage(spec, n, SIZE, 8, torch.float32) for spec, n in zip(specs, (20, 10))))
    total = sum(group.storage.block_bytes * group.pool.total for group in cache.groups)
    cache.limit(lambda name: Claimant(cache_bytes=total // 2))
    assert [group.pool.claim("a").quota for group in cache.groups] == [10, 5]
    cache.close(fill(cache, "a", 0, 8))
    assert [group.pool.cached for group in cache.groups] == [8, 5]
    cache.check()


def test_who_floods_the_cache_loses_its_own() -> None:
    cache = make(20)
    cache.close(fill(cache, "calm", 0, 5))
    for i in range(12):
        cache.close(fill(cache, "flood", 1000 * (i + 1), 5))
    assert found(cache, "calm", 0, 5) == 5, "the least recently used by far, but within its share"
    assert cache.pool.cached_by["flood"] == 15


def test_weights_shift_the_share() -> None:
    cache = make(24, weights={"a": 2.0, "b": 1.0})
    for i in range(12):
        cache.close(fill(cache, "a", 10_000 + 100 * i, 2))
        cache.close(fill(cache, "b", 50_000 + 100 * i, 2))
    assert cache.pool.cached == 24 and abs(cache.pool.cached_by["b"] - 8) <= 1


def test_who_stays_away_while_the_pool_is_turned_over_has_no_claim() -> None:
    cache = make(10)
    cache.close(fill(cache, "gone", 0, 4))
    for i in range(STRANGER_TURNOVERS * 10 // 4):
        cache.close(fill(cache, "here", 1000 * (i + 1), 4))
    assert cache.pool.cached_by["gone"] >= 3
    for i in range(1000, 1002):
        cache.close(fill(cache, "here", 1000 * (i + 1), 4))
    assert (cache.pool.cached_by["gone"], cache.pool.cached_by["here"]) == (0, 10)
    assert "gone" not in cache.pool.cached_by and cache.epoch("gone") == (0,), "nor is it remembered"


def test_one_tenant_alone_is_least_recently_used() -> None:
    cache = make(6)
    for first in (0, 100, 200):
        cache.close(fill(cache, "", first, 2))
    table = cache.open(DOMAINS.domain("", ""))
    cache.drop(cache.match(table, [*range(8), 1]))
    cache.evict(2)
    assert [found(cache, "", first, 2) for first in (0, 100, 200)] == [2, 0, 2]


def test_the_epoch_moves_with_what_a_tenant_can_find_and_not_with_others() -> None:
    cache = make(8)
    before = cache.epoch("a")
    cache.close(fill(cache, "b", 0, 2))
    assert cache.epoch("a") == before
    cache.close(fill(cache, "a", 0, 2))
    filled = cache.epoch("a")
    assert filled != before
    cache.pool.evict(4)
    assert cache.epoch("a") != filled
    again = cache.epoch("a")
    cache.close(fill(cache, "a", 0, 2))
    assert cache.epoch("a") not in (again, filled)


class Plain:
    """What `eviction` says, written down without a thought for speed."""

    def __init__(self, turnover: int, weights: dict[str, float]) -> None:
        self.turnover, self.weights, self.turn = turnover, weights, 0
        self.blocks: dict[str, list[int]] = {}
        self.touched: OrderedDict[str, int] = OrderedDict()

    def touch(self, owner: str, taken: int) -> None:
        self.turn += taken
        if self.blocks.get(owner):
            self.touched[owner] = self.turn
            self.touched.move_to_end(owner)

    def victims(self) -> set[str]:
        owners = [owner for owner in self.touched if self.blocks.get(owner)]
        if self.turn - self.touched[owners[0]] > self.turnover:
            return {owners[0]}
        fullest = max(len(self.blocks[owner]) / self.weights[owner] for owner in owners)
        return {owner for owner in owners if len(self.blocks[owner]) / self.weights[owner] == fullest}


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["add", "add", "use", "pop", "own", "touch"]), st.integers(0, 3)), max_size=120))
def test_the_choice_is_the_one_that_is_written_down(steps: list[tuple[str, int]]) -> None:
    weights = {"0": 1.0, "1": 2.0, "2": 0.5, "3": 1.0}
    real, plain = KeptItems(6, weights.__getitem__), Plain(6, weights)
    fresh = iter(range(1000))
    for what, number in steps:
        owner = str(number)
        mine = plain.blocks.setdefault(owner, [])
        if what == "add":
            block = next(fresh)
            real.add(block, owner)
            mine.append(block)
            plain.touch(owner, 0)
        elif what == "touch":
            real.touch(owner, number)
            plain.touch(owner, number)
        elif what == "use" and mine:
            real.remove(mine.pop(len(mine) // 2), owner)
        elif what == "own" and mine:
            assert real.pop(owner) == (mine.pop(0), owner)
        elif what == "pop" and len(real):
            expected = plain.victims()
            block, whose = real.pop()
            assert whose in expected and block == plain.blocks[whose].pop(0)
        for name in [name for name in plain.touched if not plain.blocks[name]]:
            del plain.touched[name]
        assert sorted(real) == sorted(block for blocks in plain.blocks.values() for block in blocks)
        assert len(real) == sum(map(len, plain.blocks.values()))


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False), st.dictionaries(st.sampled_from("abc"), st.integers(0, 5), max_size=3))
def test_books_balance_and_quotas_hold_whatever_happens(rng: random.Random, quotas: dict[str, int]) -> None:
    cache = make(10, weights={"a": 2.0}, quotas=quotas)
    open_tables: list[tuple[BlockTable, list[int]]] = []
    for _ in range(60):
        if open_tables and rng.random() < 0.5:
            table, tokens = open_tables.pop(rng.randrange(len(open_tables)))
            cache.close(table)
        else:
            tokens = [rng.randrange(2) for _ in range(rng.randint(1, 16))]
            table = cache.open(DOMAINS.domain(rng.choice("abc"), ""))
            cache.adopt(table, cache.match(table, tokens), len(tokens))
            if cache.reserve(table, len(tokens)):
                cache.commit(table, tokens, len(tokens))
            open_tables.append((table, tokens))
        cache.check()
        assert all(cache.pool.cached_by[name] <= quota for name, quota in quotas.items())


def test_check_sees_a_quota_that_is_broken() -> None:
    cache = make(8, quotas={"a": 2})
    cache.close(fill(cache, "a", 0, 2))
    cache.limit(lambda name: Claimant(cache_bytes=0))
    with pytest.raises(AssertionError, match="quota"):
        cache.check()
