"""Cuts and fingerprints depend on content alone; winnowing is the published rule."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.engine.cache.prefix import Domain
from kvloom.engine.reuse.kvshare.chunks import LEAST, MASK, MOST, WINDOW, WINDOWS, cut, fingerprints, window_hashes
from kvloom.engine.reuse.kvshare.popularity import LEAST as WORTH
from kvloom.engine.reuse.kvshare.popularity import MOST as AT_ONCE
from kvloom.engine.reuse.kvshare.popularity import Popularity

Ints = npt.NDArray[np.int32]
RUN = WINDOW + WINDOWS - 1
SMALL = st.lists(st.integers(0, 2), max_size=150).map(lambda tokens: np.array(tokens, np.int32))
DOMAIN, OTHER = Domain(b"one", "one"), Domain(b"other", "other")


def text(seed: int, length: int) -> Ints:
    return np.random.default_rng(seed).integers(3, 40_000, length).astype(np.int32)


# Hashes and fingerprints -----------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None, derandomize=True)
@given(SMALL)
def test_windows_have_one_hash_exactly_if_their_tokens_are_equal(tokens: Ints) -> None:
    hashes = window_hashes(tokens)
    windows = [tokens[i : i + WINDOW].tobytes() for i in range(len(tokens) - WINDOW + 1)]
    assert len(hashes) == len(windows)
    assert len(set(hashes.tolist())) == len(set(windows)) == len(set(zip(windows, hashes.tolist())))


def test_hashes_know_no_position() -> None:
    document = text(1, 500)
    moved = np.concatenate([text(2, 8000), document])
    assert np.array_equal(window_hashes(moved)[8000:], window_hashes(document))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(SMALL)
def test_fingerprints_are_the_rightmost_minima(tokens: Ints) -> None:
    hashes = window_hashes(tokens).tolist()
    groups = [range(i, i + WINDOWS) for i in range(len(hashes) - WINDOWS + 1)] or ([range(len(hashes))] if hashes else [])
    expected = sorted({min(group, key=lambda i: (hashes[i], -i)) for group in groups})
    offsets, values = fingerprints(tokens)
    assert offsets.tolist() == expected and values.tolist() == [hashes[i] for i in expected]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(SMALL, SMALL, st.lists(st.integers(0, 2), min_size=RUN, max_size=RUN), SMALL, SMALL)
def test_a_common_run_shares_a_fingerprint_at_one_place(a: Ints, b: Ints, run: list[int], c: Ints, d: Ints) -> None:
    common = np.array(run, np.int32)
    places = []
    for before, after in ((a, b), (c, d)):
        offsets, values = fingerprints(np.concatenate([before, common, after]))
        places.append(set(zip((offsets - len(before)).tolist(), values.tolist())))
    assert any(0 <= offset <= RUN - WINDOW for offset, _ in places[0] & places[1])


@pytest.mark.parametrize(("length", "count"), [(0, 0), (WINDOW - 1, 0), (WINDOW, 1), (RUN, 1)])
def test_short_texts(length: int, count: int) -> None:
    assert [len(part) for part in fingerprints(text(1, length))] == [count, count]


def test_about_two_of_seventeen_windows_are_chosen() -> None:
    offsets, _ = fingerprints(text(1, 20_000))
    assert len(offsets) / 20_000 == pytest.approx(2 / (WINDOWS + 1), rel=0.05)  # Schleimer et al., section 3.2
    assert np.diff(offsets).max() <= WINDOWS


# Cuts ------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(0, 1500), st.integers(1, 40_000), st.lists(st.integers(0, 1499), max_size=6))
def test_spans_cover_all_but_barriers_and_short_ends(seed: int, length: int, vocabulary: int, walls: list[int]) -> None:
    tokens = np.random.default_rng(seed).integers(0, vocabulary, length).astype(np.int32)
    barriers = np.zeros(length, bool)
    barriers[[wall for wall in walls if wall < length]] = True
    spans = cut(tokens, barriers=barriers)
    covered = np.zeros(length, int)
    for first, last in spans:
        assert LEAST <= last - first <= MOST
        covered[first:last] += 1
    assert not covered[barriers].any() and covered.max(initial=0) <= 1
    left = np.flatnonzero((covered == 0) & ~barriers)
    for stretch in np.split(left, np.flatnonzero(np.diff(left) > 1) + 1):
        if len(stretch):
            behind = int(stretch[-1]) + 1
            assert len(stretch) < LEAST and (behind == length or barriers[behind])


def test_spans_are_about_as_long_as_promised() -> None:
    spans = cut(text(1, 100_000), barriers=None)
    assert np.mean([last - first for first, last in spans]) == pytest.approx(LEAST + MASK + 1, rel=0.1)


@pytest.mark.parametrize("before", [1, 17, 100, 1003])
def test_a_document_is_cut_alike_at_any_offset(before: int) -> None:
    document = text(1, 3000)
    alone = {last for _, last in cut(document)}
    moved = {last - before for _, last in cut(np.concatenate([text(2, before), document, text(3, 500)]))}
    met = min(alone & moved)
    assert met < 1000
    assert {at for at in alone if met <= at < 3000 - MOST} == {at for at in moved if met <= at < 3000 - MOST}


def test_an_edit_changes_cuts_nearby_only() -> None:
    document = text(1, 4000)
    edited = document.copy()
    edited[2000:2003] = 1
    before, after = ({last for _, last in cut(tokens)} for tokens in (document, edited))
    assert all(1900 < at < 3000 for at in before ^ after)
    assert len(before & after) > 30


def test_equal_tokens_are_cut_by_length() -> None:
    windows = {token: int(window_hashes(np.full(WINDOW, token, np.int32))[0]) & MASK for token in range(1000)}
    never, always = next(t for t in windows if windows[t]), next(t for t in windows if not windows[t])
    assert [last - first for first, last in cut(np.full(1000, never, np.int32))] == [MOST, MOST, MOST, 1000 - 3 * MOST]
    assert [last - first for first, last in cut(np.full(100, always, np.int32))] == [LEAST, LEAST, LEAST]


# What is seen again ----------------------------------------------------------------------------------------------------------


def test_a_request_counts_once() -> None:
    seen, chunk = Popularity(), text(1, 64)
    assert [seen.see(DOMAIN, chunk, request, 0.0) for request in ("a", "a", "b", "b", "c")] == [1, 1, 2, 2, 3]
    assert seen.see(OTHER, chunk, "d", 0.0) == 1 and seen.see(DOMAIN, text(2, 64), "d", 0.0) == 1


def test_sightings_decay() -> None:
    seen, chunk = Popularity(half_life=10.0), text(1, 64)
    seen.see(DOMAIN, chunk, "a", 0.0)
    assert seen.see(DOMAIN, chunk, "b", 20.0) == pytest.approx(1.25)
    assert seen.see(DOMAIN, chunk, "c", 30.0) == pytest.approx(1.625)


def test_the_least_recently_seen_is_forgotten() -> None:
    seen = Popularity(capacity=2)
    for number, request in ((1, "a"), (2, "a"), (1, "b"), (3, "b")):
        seen.see(DOMAIN, text(number, 64), request, 0.0)
    assert len(seen) == 2
    assert seen.see(DOMAIN, text(1, 64), "c", 0.0) == 3 and seen.see(DOMAIN, text(2, 64), "c", 0.0) == 1


def test_second_sight_joins_neighbours() -> None:
    seen, document = Popularity(), text(1, 900)
    spans = cut(document)
    assert seen.second_sight(DOMAIN, document, spans, "a", 0.0) == []
    assert seen.second_sight(DOMAIN, document, spans, "a", 1.0) == []  # the same request
    assert seen.second_sight(OTHER, document, spans, "b", 1.0) == []
    edited = document.copy()
    first, last = spans[len(spans) // 2]
    edited[first + 1] = 1
    found = seen.second_sight(DOMAIN, edited, spans, "b", 1.0)
    assert found == [(spans[0][0], first), (last, spans[-1][1])]


def test_second_sight_is_bounded_both_ways() -> None:
    seen, document = Popularity(), text(1, 3000)
    spans = [(start, start + 40) for start in range(0, 2960, 40)] + [(2960, 2999)]
    for request in "ab":
        found = seen.second_sight(DOMAIN, document, spans, request, 0.0)
    assert [last - first for first, last in found] == [1000, 1000, 999] and AT_ONCE < 1000 + 40
    alone = [(0, 40), (50, 50 + WORTH), (200, 240)]
    for request in "cd":
        found = seen.second_sight(OTHER, document, alone, request, 0.0)
    assert found == [(50, 50 + WORTH)]
    assert seen.second_sight(OTHER, document, alone, "e", 1e6) == []  # long ago is as good as never
