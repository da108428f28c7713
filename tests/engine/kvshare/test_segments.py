"""The segment store: who is charged, who has to go, and that its index never lies."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from kvloom.engine.cache.prefix import Domain
from kvloom.engine.reuse.kvshare import chunks
from kvloom.engine.reuse.kvshare.chunks import fingerprints
from kvloom.engine.reuse.kvshare.segment import Segment
from kvloom.engine.reuse.kvshare.segments import MOST_CANDIDATES, MOST_REPEATS, REJECTIONS, SegmentStore

Ints = npt.NDArray[np.int32]
TENANTS = {name: Domain(f"own {name}".encode(), name) for name in ("alice", "bob")}
ALICE, BOB, PUBLIC = TENANTS["alice"], TENANTS["bob"], Domain(b"public", "", shared=True)


def text(seed: int, length: int = 64) -> Ints:
    return np.random.default_rng(seed).integers(3, 40_000, length).astype(np.int32)


def segment(tokens: Ints, domain: Domain = ALICE, *, owner: str = "alice", isolated: bool = False, donor: int = 1) -> Segment:
    """8 bytes per token."""
    k, v = (torch.zeros(2, len(tokens), 1, 1, dtype=torch.float16) for _ in range(2))
    return Segment(domain=domain, tokens=tokens, k=k, v=v, position=0, donor=donor, isolated=isolated, owner=owner)


def found(store: SegmentStore, tokens: Ints, domain: Domain = ALICE) -> set[Segment]:
    """Segments that any fingerprint of the tokens leads to."""
    return {s for value in fingerprints(tokens)[1].tolist() for s, _ in store.candidates(domain, value)}


def test_a_segment_is_found_by_its_windows() -> None:
    store, own = SegmentStore(10_000), segment(text(1))
    assert store.add(own) and len(store) == 1 and list(store) == [own]
    for offset, value in zip(*(part.tolist() for part in fingerprints(own.tokens))):
        assert store.candidates(ALICE, value) == [(own, offset)]
    assert store.candidates(BOB, value) == () and store.candidates(PUBLIC, value) == ()
    assert store.bytes == own.nbytes == 512 and store.bytes_by == {"alice": 512}
    store.check()


def test_known_means_these_tokens_in_this_domain() -> None:
    store = SegmentStore(10_000)
    store.add(segment(text(1)))
    assert store.known(ALICE, text(1))
    assert not store.known(BOB, text(1)) and not store.known(ALICE, text(1)[:-1]) and not store.known(ALICE, text(2))
    assert not store.add(segment(text(1), donor=2)) and len(store) == 1


@pytest.mark.parametrize("domain", [BOB, PUBLIC])
def test_in_context_segments_stay_at_home(domain: Domain) -> None:
    store = SegmentStore(10_000)
    with pytest.raises(ValueError, match="in the context of a prompt" if domain.shared else "in its owner's domain"):
        store.add(segment(text(1), domain))
    assert len(store) == 0 and store.bytes == 0 and not store.known(domain, text(1))
    if domain.shared:
        assert store.add(segment(text(1), domain, isolated=True))
    else:
        with pytest.raises(ValueError, match="in its owner's domain"):
            store.add(segment(text(1), domain, isolated=True))
    store.check()


def test_compiled_alone_replaces_in_context_and_not_the_other_way_round() -> None:
    store, first, second = SegmentStore(10_000), segment(text(1)), segment(text(1), isolated=True, donor=2)
    store.add(first)
    assert store.known(ALICE, text(1)) and not store.known(ALICE, text(1), isolated=True)
    assert store.add(second) and list(store) == [second] and found(store, text(1)) == {second}
    assert store.known(ALICE, text(1), isolated=True)
    assert not store.add(segment(text(1), donor=3)) and not store.add(segment(text(1), isolated=True, donor=4))
    assert store.evictions == 0
    store.check()


def test_a_segment_that_does_not_fit_replaces_nothing() -> None:
    store = SegmentStore(520)
    store.add(segment(text(1)))
    bigger = segment(text(1), isolated=True)
    bigger.k = torch.zeros(4, 64, 1, 1, dtype=torch.float16)
    assert not store.add(bigger) and store.known(ALICE, text(1)) and len(store) == 1
    assert not store.add(segment(text(2, 66))) and store.evictions == 0


def test_the_least_recently_used_goes_first() -> None:
    store = SegmentStore(3 * 512)
    first, second, third, fourth = (segment(text(number)) for number in range(4))
    assert store.add(first) and store.add(second) and store.add(third)
    store.touch(first)
    assert store.add(fourth)
    assert list(store) == [third, first, fourth] and store.evictions == 1 and first.uses == 1
    assert not found(store, second.tokens)
    store.touch(second)  # gone: no effect
    assert list(store) == [third, first, fourth] and second.uses == 0
    store.check()


def test_who_stores_beyond_a_quota_loses_own_segments_only() -> None:
    store = SegmentStore(100_000, {"alice": 2 * 512, "bob": None}.get)
    others = [segment(text(number), BOB, owner="bob") for number in range(4)]
    own = [segment(text(number)) for number in range(4)]
    for pair in zip(others, own):
        assert all(store.add(one) for one in pair)
    assert list(store) == [*others[:3], own[2], others[3], own[3]]
    assert store.bytes_by == {"alice": 1024, "bob": 2048} and store.evictions == 2
    assert not store.add(segment(text(9, 129))) and len(store) == 6  # larger than the quota
    store.check()


def test_who_floods_the_store_loses_what_it_flooded_it_with() -> None:
    weights = {"operator": 1.0, "alice": 2.0, "mallory": 1.0}
    store = SegmentStore(8 * 512, weight=weights.__getitem__)
    ours = [segment(text(number), PUBLIC, owner="operator", isolated=True) for number in range(2)]
    hers = [segment(text(number)) for number in range(10, 14)]
    for one in (*ours, *hers):
        store.add(one)
    flood = [segment(text(number), Domain(b"own mallory", "mallory"), owner="mallory") for number in range(100, 200)]
    assert all(store.add(one) for one in flood)
    assert list(store) == [*ours, *hers, *flood[-2:]]  # a quarter, a half, a quarter
    assert all(store.add(segment(text(number))) for number in range(20, 30))
    assert store.bytes_by == {"operator": 1024, "alice": 2048, "mallory": 1024}
    store.check()


def test_what_several_left_stays_for_the_others() -> None:
    store = SegmentStore(100_000, {"alice": None, "bob": 600, "carol": None}.get)
    first, other = (segment(text(number), PUBLIC, isolated=True) for number in (1, 2))
    for one in (first, other):
        store.add(one)
        store.claim(one, "bob")
        store.claim(one, "carol")
        store.claim(one, "bob")
    assert first.heirs == ["bob", "carol"] and store.bytes_by == {"alice": 1024}
    assert store.purge("alice") == 2
    assert store.bytes_by == {"bob": 512, "carol": 512}  # bob has room for one
    store.check()
    assert store.purge("carol") == 1 and list(store) == [first] and store.purge("bob") == 1 and not len(store)
    store.check()


def test_use_counts_within_a_quota_too() -> None:
    store = SegmentStore(100_000, lambda owner: 2 * 512)
    first, second, third = (segment(text(number)) for number in range(3))
    store.add(first)
    store.add(second)
    store.touch(first)
    store.add(third)
    assert list(store) == [first, third]


def test_a_quota_of_nothing() -> None:
    store = SegmentStore(100_000, lambda owner: 0)
    assert not store.add(segment(text(1))) and len(store) == 0


def test_the_third_rejection_removes() -> None:
    store, own = SegmentStore(10_000), segment(text(1))
    store.add(own)
    for count in range(1, REJECTIONS):
        store.reject(own)
        assert own.rejections == count and own in list(store)
    store.reject(own)
    assert len(store) == 0 and not found(store, own.tokens) and store.bytes_by == {}
    store.reject(own)  # another request held it meanwhile
    store.check()


def test_purge_takes_what_an_owner_left_anywhere() -> None:
    store = SegmentStore(100_000)
    kept = segment(text(1), BOB, owner="bob")
    for one in (segment(text(1)), segment(text(2), PUBLIC, isolated=True), kept):
        store.add(one)
    assert store.purge("alice") == 2 and store.purge("alice") == 0 and store.purge("nobody") == 0
    assert list(store) == [kept] and store.bytes_by == {"bob": 512}
    assert not found(store, text(2), PUBLIC)
    store.check()


def test_places_of_a_fingerprint_are_bounded_and_the_last_used_stay() -> None:
    store, common = SegmentStore(100_000), text(0, 40)
    donors = [segment(np.concatenate([common, text(number)]), donor=number) for number in range(1, MOST_CANDIDATES + 3)]
    for donor in donors[:MOST_CANDIDATES]:
        store.add(donor)
    store.touch(donors[0])
    for donor in donors[MOST_CANDIDATES:]:
        store.add(donor)
    (value,) = {int(value) for value in fingerprints(common)[1][:1]}
    assert [s.donor for s, _ in store.candidates(ALICE, value)] == [10, 9, 1, 8, 7, 6, 5, 4]
    assert donors[1] in found(store, donors[1].tokens)  # by its other windows
    store.check()


def test_text_that_repeats_itself_takes_few_places() -> None:
    store, other = SegmentStore(100_000), segment(np.full(60, 7, np.int32), donor=1)
    store.add(other)
    own = segment(np.full(200, 7, np.int32), donor=2)
    store.add(own)
    offsets, values = fingerprints(own.tokens)
    places = store.candidates(ALICE, int(values[0]))
    assert places[:MOST_REPEATS] == [(own, offset) for offset in offsets[:MOST_REPEATS].tolist()]  # the first ones
    assert {s for s, _ in places} == {own, other} and len(places) == 2 * MOST_REPEATS
    store.remove(own)
    assert {s for s, _ in store.candidates(ALICE, int(values[0]))} == {other}
    store.check()


def test_the_version_counts_what_can_be_found() -> None:
    store, own = SegmentStore(10_000), segment(text(1))
    versions = [store.version]
    for change in (store.add, store.remove, store.add):
        change(own)
        versions.append(store.version)
    assert len(set(versions)) == 4
    store.touch(own)
    store.add(segment(text(1)))  # known
    assert store.version == versions[-1]


def test_colliding_hashes_mix_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "window_hashes", lambda tokens: np.full(max(0, len(tokens) - 15), 5, np.uint64))
    store = SegmentStore(100_000)
    own = [segment(text(number), donor=number) for number in range(10)]
    assert all(store.add(one) for one in own)
    assert all(store.known(ALICE, one.tokens) for one in own) and not store.known(ALICE, text(99))
    assert len(store.candidates(ALICE, 5)) == MOST_CANDIDATES
    store.check()
    for one in own:
        store.remove(one)
    assert store.candidates(ALICE, 5) == () and store.bytes == 0
    store.check()


def test_check_notices() -> None:
    store, own = SegmentStore(10_000), segment(text(1))
    store.add(own)
    own.isolated, own.owner = False, "bob"
    with pytest.raises(AssertionError):
        store.check()


class Store(RuleBasedStateMachine):
    """Against a list in the order of use, of which the owner with most loses first."""

    segments = Bundle("segments")
    CAPACITY, QUOTA = 2000, {"alice": 1200, "bob": None}

    def __init__(self) -> None:
        super().__init__()
        self.store = SegmentStore(self.CAPACITY, self.QUOTA.get)
        self.model: list[Segment] = []  # least recently used first
        self.gone: list[Segment] = []

    @rule(
        target=segments,
        number=st.integers(0, 3),  # few texts, so that the same ones meet
        length=st.integers(32, 90),
        owner=st.sampled_from(["alice", "bob"]),
        public=st.booleans(),
        isolated=st.booleans(),
    )
    def add(self, number: int, length: int, owner: str, public: bool, isolated: bool) -> Segment:
        length -= length % 29  # 29 or 58 or 87
        domain = PUBLIC if public else TENANTS[owner]
        new = segment(text(number, length), domain, owner=owner, isolated=isolated)
        if public and not isolated:
            with pytest.raises(ValueError):
                self.store.add(new)
            return new
        same = [s for s in self.model if s.domain == domain and np.array_equal(s.tokens, new.tokens)]
        expected = not any(s.isolated or not isolated for s in same)
        assert self.store.add(new) is expected
        if expected:
            self._forget(*same)
            if owner == "alice":
                while sum(s.nbytes for s in self.model if s.owner == owner) + new.nbytes > 1200:
                    self._forget(next(s for s in self.model if s.owner == owner))
            while sum(s.nbytes for s in self.model) + new.nbytes > self.CAPACITY:
                by = Counter({name: sum(s.nbytes for s in self.model if s.owner == name) for name in TENANTS})
                loser = min((name for name in by if by[name]), key=lambda name: (-by[name], name))
                loser = owner if by[owner] and by[owner] + new.nbytes >= by[loser] else loser
                self._forget(next(s for s in self.model if s.owner == loser))
            self.model.append(new)
        return new

    @rule(one=segments)
    def touch(self, one: Segment) -> None:
        self.store.touch(one)
        if one in self.model:
            self.model.remove(one)
            self.model.append(one)

    @rule(one=segments)
    def reject(self, one: Segment) -> None:
        self.store.reject(one)
        if one.rejections >= REJECTIONS:
            self._forget(one)

    @rule(one=consumes(segments))
    def remove(self, one: Segment) -> None:
        self.store.remove(one)
        self._forget(one)

    @rule(target=segments, owner=st.sampled_from(["alice", "bob", "nobody"]))
    def purge(self, owner: str) -> object:
        owned = [s for s in self.model if s.owner == owner]
        assert self.store.purge(owner) == len(owned)
        self._forget(*owned)
        return multiple()

    def _forget(self, *segments: Segment) -> None:
        self.gone += segments
        self.model = [s for s in self.model if s not in segments]

    @invariant()
    def agrees(self) -> None:
        self.store.check()
        assert list(self.store) == self.model
        assert self.store.bytes == sum(s.nbytes for s in self.model)
        for one in self.model:
            assert self.store.known(one.domain, one.tokens)
        for one in self.gone[-8:]:
            assert one in self.model or (one not in self.store and one not in found(self.store, one.tokens, one.domain))


Store.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)
TestStore = Store.TestCase
