"""The cache through its one door: a state machine against a plain model, and the rules that it must not get wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from kvloom.engine.cache import HOLE, BlockTable, CacheManager, GroupSpec, Match, Storage, bytes_per_token
from kvloom.engine.cache.prefix import Domain, DomainFactory

SIZE = 4
FACTORY = DomainFactory("model", "fp32", secret=b"s" * 32)


def make_cache(blocks: int = 8) -> CacheManager:
    return CacheManager(Storage(GroupSpec.everything(2, 1), blocks, SIZE, 8, torch.float32))


def domain(tenant: str = "a", salt: str = "") -> Domain:
    return FACTORY.domain(tenant, salt)


def fill(cache: CacheManager, tokens: list[int], tenant: str = "a") -> BlockTable:
    """A request that computed all its tokens."""
    table = cache.open(domain(tenant))
    cache.adopt(table, cache.match(table, tokens), len(tokens))
    assert cache.reserve(table, len(tokens))
    cache.commit(table, tokens, len(tokens))
    return table


def hit(cache: CacheManager, tokens: list[int], tenant: str = "a", salt: str = "") -> int:
    table = cache.open(domain(tenant, salt))
    match = cache.match(table, tokens)
    cache.drop(match)
    cache.close(table)
    cache.check()
    return match.tokens


def test_storage_has_the_documented_shape_and_size() -> None:
    spec = GroupSpec("retrieval", ((0, 2), (), (1,)))
    storage = Storage(spec, 5, SIZE, 8, torch.bfloat16)
    assert [layer.k.shape for layer in storage.layers] == [(5, 2, SIZE, 8), (5, 0, SIZE, 8), (5, 1, SIZE, 8)]
    assert bytes_per_token(spec, 8, torch.bfloat16) * SIZE * 5 == sum(t.nbytes for layer in storage.layers for t in layer)


def test_a_prefix_is_found_and_leaves_one_token_to_compute() -> None:
    cache = make_cache()
    cache.close(fill(cache, list(range(8))))
    assert hit(cache, [*range(8), 99]) == 8
    assert hit(cache, list(range(8))) == 4  # all eight are known, but one must be computed
    assert hit(cache, [*range(4), 77, 5, 6, 7, 8]) == 4
    assert hit(cache, [1, *range(7)]) == 0


def test_generated_tokens_and_partly_computed_requests_are_reusable() -> None:
    cache = make_cache()
    table = cache.open(domain())
    tokens = list(range(6))
    cache.reserve(table, 6)
    cache.commit(table, tokens, 6)
    tokens += [6, 7, 8]  # generated
    cache.reserve(table, 9)
    cache.commit(table, tokens, 8)
    cache.close(table)  # aborted here
    assert hit(cache, [*range(9), 1]) == 8


def test_tenants_salts_and_private_requests_do_not_share() -> None:
    cache = make_cache()
    tokens = list(range(8))
    cache.close(fill(cache, tokens))
    assert hit(cache, [*tokens, 1], tenant="b") == 0
    assert hit(cache, [*tokens, 1], salt="x") == 0
    private = cache.open(domain(), publishes=False, looks_up=False)
    assert cache.match(private, [*tokens, 1]).tokens == 0
    cache.reserve(private, 8)
    cache.commit(private, [5] * 8, 8)
    assert hit(cache, [5] * 8 + [1]) == 0


def test_domain_parts_cannot_run_together() -> None:
    assert FACTORY.domain("ab", "c") != FACTORY.domain("a", "bc")
    assert FACTORY.domain("a", "b") == FACTORY.domain("a", "b")
    assert DomainFactory("model", "fp32").domain("a", "").key != DomainFactory("model", "fp32").domain("a", "").key


def test_colliding_keys_are_told_apart_by_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache()
    monkeypatch.setattr("kvloom.engine.cache.prefix.Chain.extend", lambda self, tokens, n: self.keys.extend([b"k"] * n))
    cache.close(fill(cache, [1, 2, 3, 4]))
    assert hit(cache, [1, 2, 3, 4, 5]) == 4
    assert hit(cache, [9, 9, 9, 9, 5]) == 0


def test_eviction_is_least_recently_used_and_takes_the_end_of_a_chain_first() -> None:
    cache = make_cache(blocks=4)
    cache.close(fill(cache, list(range(8))))
    cache.close(fill(cache, list(range(100, 108))))
    assert hit(cache, [*range(8), 1]) == 8  # touched: now the younger of the two
    assert cache.evict(1) == 1
    assert hit(cache, [*range(100, 108), 1]) == 4
    assert hit(cache, [*range(8), 1]) == 8
    assert cache.evict() == 3
    assert cache.pool.free == 4


def test_a_pinned_match_survives_pressure() -> None:
    cache = make_cache(blocks=3)
    cache.close(fill(cache, list(range(8))))
    table = cache.open(domain())
    match = cache.match(table, [*range(8), 1])
    other = cache.open(domain())
    assert not cache.reserve(other, 2 * SIZE)
    assert cache.reserve(other, SIZE)
    cache.adopt(table, match, 9)
    cache.check()
    assert list(table.blocks) == list(match.blocks)


def test_reserve_is_all_or_nothing_and_keeps_what_it_is_told_to() -> None:
    cache = make_cache(blocks=4)
    table = cache.open(domain())
    assert not cache.reserve(table, 3 * SIZE, keep_free=2)
    assert not table.blocks
    assert cache.reserve(table, 2 * SIZE, keep_free=2)
    assert not cache.reserve(table, 5 * SIZE)
    assert cache.reserve(table, 2 * SIZE - 1)  # already there
    cache.check()


def test_tallies_follow_the_tenant() -> None:
    cache = make_cache()
    a, b = fill(cache, list(range(8)), "a"), fill(cache, list(range(5)), "b")
    assert (cache.pool.in_use_by["a"], cache.pool.in_use_by["b"]) == (2, 2)
    cache.close(a)
    cache.close(b)
    assert (cache.pool.cached_by["a"], cache.pool.cached_by["b"]) == (2, 1)
    cache.check()


@pytest.mark.parametrize("break_it", ["leak", "double", "tally", "index"])
def test_check_can_fail(break_it: str) -> None:
    cache = make_cache()
    table = fill(cache, list(range(8)))
    if break_it == "leak":
        table.blocks.pop()
    elif break_it == "double":
        cache.pool._free.append(table.blocks[0])
    elif break_it == "tally":
        cache.pool.in_use_by["a"] += 1
    else:
        cache.index._keys.pop(table.blocks[0])
    with pytest.raises(AssertionError):
        cache.check()


def two_groups(first: int = 8, second: int = 8) -> CacheManager:
    specs = (GroupSpec("retrieval", ((0,),)), GroupSpec("local", ((1, 2),)))
    return CacheManager(*(Storage(spec, n, SIZE, 8, torch.float32) for spec, n in zip(specs, (first, second))))


def test_a_prefix_is_found_as_far_as_every_group_holds_it() -> None:
    cache = two_groups()
    tokens = list(range(16))
    table = fill(cache, tokens)
    cache.forget(table, 1, 1, 3)
    assert list(table.parts[1])[1:3] == [HOLE, HOLE] and HOLE not in table.blocks
    assert (cache.groups[0].pool.in_use, cache.groups[1].pool.in_use, cache.groups[1].pool.cached) == (4, 2, 2)
    assert cache.bytes_in_use == 4 * cache.groups[0].storage.block_bytes + 2 * cache.groups[1].storage.block_bytes
    assert hit(cache, [*tokens, 1]) == 16, "what was forgotten can be found until its memory is wanted"
    other = cache.open(domain())
    cache.reserve(other, 6 * SIZE - 4 * SIZE + 1 + SIZE)  # 4 blocks: the free ones
    assert hit(cache, [*tokens, 1]) == 16
    cache.close(other)
    cache.groups[1].pool.evict(1)
    assert hit(cache, [*tokens, 1]) in (4, 8), "the local group has lost one of blocks 1 and 2"
    cache.close(table)
    cache.check()


def test_a_group_without_room_refuses_for_all() -> None:
    cache = two_groups(first=8, second=3)
    table = cache.open(domain())
    assert (cache.longest, cache.capacity_tokens, cache.available) == (12, 32, 3)
    assert not cache.reserve(table, 16)
    assert [len(part) for part in table.parts] == [0, 0]
    assert cache.reserve(table, 12)
    cache.forget(table, 1, 0, 2)
    assert cache.reserve(table, 20), "what was given back is room for more"
    cache.close(table)
    assert cache.available == 3
    cache.check()


class CacheMachine(RuleBasedStateMachine):
    """Requests of two tenants over a two-letter alphabet come, grow, are preempted and end, in any order."""

    tables = Bundle("tables")
    matches = Bundle("matches")

    def __init__(self) -> None:
        super().__init__()
        self.cache = self.make()
        self.tokens: dict[BlockTable, list[int]] = {}
        self.computed: dict[BlockTable, int] = {}
        self.content: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}  # (group, block) -> tenant, tokens to its end

    def make(self) -> CacheManager:
        return make_cache(blocks=6)

    @rule(target=tables, tenant=st.sampled_from("ab"), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14))
    def open(self, tenant: str, tokens: list[int]) -> BlockTable:
        table = self.cache.open(domain(tenant))
        self.tokens[table], self.computed[table] = tokens, 0
        return table

    @rule(target=matches, table=tables)
    def match(self, table: BlockTable) -> tuple[BlockTable, Match]:
        match = self.cache.match(table, self.tokens[table])
        assert match.tokens < len(self.tokens[table])
        for group, blocks in enumerate(match.parts):
            for i, block in enumerate(blocks):  # whoever wrote the block had exactly this text, and the same tenant
                text = tuple(self.tokens[table][: (i + 1) * SIZE])
                assert self.content[group, block] == (table.chain.domain.tenant, text)
        return table, match

    @rule(pair=consumes(matches), adopt=st.booleans())
    def use(self, pair: tuple[BlockTable, Match], adopt: bool) -> None:
        table, match = pair
        if adopt and not table.blocks and table in self.tokens:
            self.cache.adopt(table, match, len(self.tokens[table]))
            self.computed[table] = match.tokens
        else:
            self.cache.drop(match)

    @rule(table=tables, more=st.integers(1, 6))
    def grow(self, table: BlockTable, more: int) -> None:
        end = min(self.computed[table] + more, len(self.tokens[table]))
        before, room = len(table.blocks), self.cache.available
        if not self.cache.reserve(table, end):
            assert len(table.blocks) == before and self.cache.missing(table, end) > room
            return
        for group, part in enumerate(table.parts):
            for i, block in enumerate(part):
                if (i + 1) * SIZE > self.computed[table]:  # written now, perhaps over something evicted
                    self.content[group, block] = (table.chain.domain.tenant, tuple(self.tokens[table][: (i + 1) * SIZE]))
        self.computed[table] = end
        self.cache.commit(table, self.tokens[table], end)

    @rule(table=tables, token=st.integers(0, 1))
    def generate(self, table: BlockTable, token: int) -> None:
        self.tokens[table].append(token)

    @rule(table=tables)
    def preempt(self, table: BlockTable) -> None:
        self.cache.release(table)
        self.computed[table] = 0

    @rule(table=consumes(tables))
    def close(self, table: BlockTable) -> None:
        self.cache.close(table)
        del self.tokens[table]

    @rule(count=st.integers(0, 3))
    def evict(self, count: int) -> None:
        self.cache.evict(count)

    @invariant()
    def balanced(self) -> None:
        self.cache.check()


class GroupsMachine(CacheMachine):
    """The same over two head groups of different size, of which the second forgets what lies before a window."""

    def make(self) -> CacheManager:
        return CacheManager(*(Storage(GroupSpec(n, ((0,),)), b, SIZE, 8, torch.float32) for n, b in (("all", 6), ("few", 5))))

    @rule(table=CacheMachine.tables, last=st.integers(0, 3))
    def forget(self, table: BlockTable, last: int) -> None:
        last = min(last, self.computed[table] // SIZE)
        held = self.cache.groups[1].pool.in_use
        gone = sum(block != HOLE for block in table.parts[1][1:last])
        self.cache.forget(table, 1, 1, max(1, last)) if last > 1 else None
        assert HOLE not in table.parts[0] and all(block == HOLE for block in table.parts[1][1:last])
        assert held - gone <= self.cache.groups[1].pool.in_use <= held


GroupsMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestGroupsMachine = GroupsMachine.TestCase
CacheMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestCacheMachine = CacheMachine.TestCase
