"""Matching: what is found is equal, what is equal is found, and nothing takes long."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.engine.cache.prefix import Domain
from kvloom.engine.reuse.kvshare import chunks, matching
from kvloom.engine.reuse.kvshare.chunks import WINDOW, WINDOWS, cut
from kvloom.engine.reuse.kvshare.matching import NEAR, Broken, Match, Piece, Run, find
from kvloom.engine.reuse.kvshare.segment import Segment
from kvloom.engine.reuse.kvshare.segments import SegmentStore
from kvloom.engine.reuse.kvshare.work import AT_ONCE, PER_TOKEN, Work

Ints = npt.NDArray[np.int32]
OWN, GROUP, PUBLIC, FOREIGN = (Domain(name.encode(), name) for name in ("own", "group", "public", "foreign"))
RUN = WINDOW + WINDOWS - 1
"""Tokens of the shortest run that is always found."""


def text(seed: int, length: int) -> Ints:
    return np.random.default_rng(seed).integers(3, 40_000, length).astype(np.int32)


def add(
    store: SegmentStore,
    tokens: Ints,
    domain: Domain = OWN,
    *,
    donor: int = 1,
    position: int = 0,
    isolated: bool = False,
    before: bytes = b"",
) -> Segment:
    """One segment."""
    k, v = (torch.zeros(1, len(tokens), 1, 1, dtype=torch.float16) for _ in range(2))
    own = Segment(
        domain=domain, tokens=tokens, k=k, v=v, position=position, donor=donor, isolated=isolated,
        owner=domain.tenant, before=before,
    )  # fmt: skip
    assert store.add(own)
    return own


def leave(store: SegmentStore, tokens: Ints, *, donor: int = 1, begin: int = 0) -> None:
    """A whole prompt, in context. begin: its first position that is stored."""
    for first, last in cut(tokens[begin:]):
        if not store.known(OWN, tokens[begin + first : begin + last]):
            add(store, tokens[begin + first : begin + last], donor=donor, position=begin + first)


def look(store: SegmentStore, tokens: Ints, *, begin: int = 0, end: int | None = None, **options: object) -> Match:
    """Find in one's own domain, and check what was found."""
    match = find(store, tokens, begin, len(tokens) if end is None else end, [OWN], **options)  # type: ignore[arg-type]
    match.check(tokens)
    return match


def spans(match: Match) -> list[tuple[int, int]]:
    return [(run.start, run.stop) for run in match.runs]


def join(*parts: Ints) -> Ints:
    return np.concatenate(parts)


@pytest.fixture
def store() -> SegmentStore:
    return SegmentStore(1 << 24)


# What is found ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 1, 15, 16, 17, 63, 100, 1000])
def test_a_document_is_found_at_any_offset(store: SegmentStore, before: int) -> None:
    document = text(1, 1500)
    leave(store, join(text(2, 77), document, text(3, 300)), donor=5)
    prompt = join(text(4, before), document, text(5, 200))
    (run,) = look(store, prompt).runs
    assert run.start - before < RUN and before + 1500 - run.stop < RUN
    assert run.shift == before - 77 and not run.isolated and run.domain == OWN and len(run.pieces) > 5


def test_nothing_is_found_where_nothing_is(store: SegmentStore) -> None:
    assert look(store, text(1, 500)) == Match((), (), ())
    leave(store, text(2, 1000))
    assert look(store, text(1, 500)) == Match((), (), ())
    assert look(store, text(1, 0)) == Match((), (), ()) and look(store, text(2, 1000), begin=300, end=300) == Match((), (), ())


def test_shuffled_documents_of_several_donors(store: SegmentStore) -> None:
    documents = [text(number, 400) for number in range(6)]
    for donor, document in enumerate(documents):
        leave(store, join(text(100 + donor, 50 * donor), document, text(200, 100)), donor=donor)
    order = [4, 0, 5, 2]
    prompt = join(text(300, 120), *(join(documents[i], text(400 + i, 40)) for i in order), text(500, 90))
    runs = look(store, prompt).runs
    assert [run.pieces[0].segment.donor for run in runs] == order
    for place, (i, run) in enumerate(zip(order, runs)):
        start = 120 + 440 * place
        assert run.start - start < RUN and start + 400 - run.stop < RUN
        assert run.shift == start - 50 * i


def test_neighbouring_segments_of_one_donor_are_one_run(store: SegmentStore) -> None:
    document = text(1, 300)
    for first in (0, 100, 200):
        add(store, document[first : first + 100], donor=3, position=40 + first)
    (run,) = look(store, join(text(2, 10), document, text(3, 10))).runs
    assert [(piece.source, piece.target, piece.length) for piece in run.pieces] == [(0, 10, 100), (0, 110, 100), (0, 210, 100)]
    assert (run.start, run.stop, run.length, run.shift) == (10, 310, 300, -30)


def test_segments_that_stood_elsewhere_are_runs_of_their_own(store: SegmentStore) -> None:
    document = text(1, 200)
    add(store, document[:100], donor=3, position=0)
    add(store, document[100:], donor=3, position=150)  # one donor, another shift
    match = look(store, document)
    assert spans(match) == [(0, 100), (100, 200)] and [run.shift for run in match.runs] == [0, -50]
    other = SegmentStore(1 << 24)
    add(other, document[:100], donor=3, position=0)
    add(other, document[100:], donor=4, position=100)  # another donor, one shift
    assert spans(look(other, document)) == [(0, 100), (100, 200)]


def test_a_hole_between_segments(store: SegmentStore) -> None:
    document = text(1, 300)
    add(store, document[:100])
    add(store, document[200:], position=200)
    match = look(store, document)
    assert spans(match) == [(0, 100), (200, 300)]
    assert match.broken == (
        Broken(0, "range ends"), Broken(100, "segment ends"), Broken(200, "segment ends"), Broken(300, "range ends")
    )  # fmt: skip


@pytest.mark.parametrize("shape", ["replaced", "inserted", "deleted"])
def test_two_runs_around_an_edit(store: SegmentStore, shape: str) -> None:
    document = text(1, 200)
    add(store, document)
    new, behind = {"replaced": (3, 103), "inserted": (3, 100), "deleted": (0, 103)}[shape]
    match = look(store, join(document[:100], np.full(new, 1, np.int32), document[behind:]))
    assert spans(match) == [(0, 100), (100 + new, 300 + new - behind)]
    assert [run.shift for run in match.runs] == [0, 100 + new - behind]
    assert match.broken[1:3] == (Broken(100, "tokens differ"), Broken(100 + new, "tokens differ"))


def test_never_outside_the_range(store: SegmentStore) -> None:
    document = text(1, 200)
    add(store, document)
    match = look(store, document, begin=30, end=170)
    assert spans(match) == [(30, 170)] and {broken.reason for broken in match.broken} == {"range ends"}
    assert match.runs[0].pieces[0].source == 30


def test_never_across_a_barrier(store: SegmentStore) -> None:
    document = text(1, 250)
    document[[100, 170]] = 0
    add(store, document)  # as an upload might hold them
    match = look(store, document, barriers=document == 0)
    assert spans(match) == [(0, 100), (101, 170), (171, 250)]
    assert [broken.reason for broken in match.broken[1:5]] == ["special token"] * 4
    assert spans(look(store, document)) == [(0, 250)]


# Which are taken -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "found"), [(63, False), (64, True)])
def test_short_runs_are_dropped(store: SegmentStore, length: int, found: bool) -> None:
    document = text(1, 200)
    add(store, document)
    match = look(store, join(text(2, 50), document[70 : 70 + length], text(3, 50)))
    assert spans(match) == ([(50, 50 + length)] if found else [])
    assert match.dropped == (() if found else ((50, 50 + length, "shorter than min_match"),))
    assert look(store, join(text(2, 50), document[70 : 70 + length], text(3, 50)), min_match=length).runs


@pytest.mark.parametrize(
    ("gap", "length", "found"), [(1, 32, True), (NEAR, 32, True), (NEAR + 1, 32, False), (1, 31, False), (NEAR + 1, 64, True)]
)
@pytest.mark.parametrize("side", ["behind", "in front"])
def test_shorter_runs_may_continue_a_donor(store: SegmentStore, gap: int, length: int, found: bool, side: str) -> None:
    document = text(1, 256)
    add(store, document)
    first, last = (80, 80 + gap) if side == "behind" else (length, length + gap)
    document = document.copy()
    document[first:last] = 1
    prompt = join(document[: last + length] if side == "behind" else document[: last + 80], text(2, 50))
    expected = [(0, first), (last, last + (length if side == "behind" else 80))]
    short = expected[1 if side == "behind" else 0]
    match = look(store, prompt)
    assert spans(match) == (expected if found else [one for one in expected if one != short])
    assert match.dropped == (() if found else ((*short, "shorter than min_match"),))


def test_shorter_runs_continue_each_other_but_not_another_shift(store: SegmentStore) -> None:
    document = text(1, 256)
    add(store, document)
    edited = document.copy()
    edited[[100, 140, 185]] = 1  # runs of 100, 39, 44, 70
    assert spans(look(store, edited)) == [(0, 100), (101, 140), (141, 185), (186, 256)]
    chain = join(edited[:140], edited[140:185], text(2, 50))  # the longer of two short ones lies further away
    assert spans(look(store, chain)) == [(0, 100), (101, 140), (141, 185)]
    moved = join(edited[:101], np.full(1, 1, np.int32), edited[101:140], text(2, 50))
    assert spans(look(store, moved)) == [(0, 100)]


def test_overlaps_are_trimmed_off_the_shorter(store: SegmentStore) -> None:
    document = text(1, 400)
    add(store, document[:200], donor=1)
    add(store, document[150:290], donor=2, position=150)  # 140, of which 90 are left
    add(store, document[250:335], donor=3, position=250)  # 85, of which 45 are left
    match = look(store, document)
    assert spans(match) == [(0, 200), (200, 290)]
    assert [run.pieces[0].segment.donor for run in match.runs] == [1, 2] and match.runs[1].pieces[0].source == 50
    assert Broken(200, "segment ends") in match.broken and Broken(200, "overlap") in match.broken
    assert match.dropped == ((290, 335, "shorter than min_match"),)


def test_a_run_inside_another_is_dropped(store: SegmentStore) -> None:
    document = text(1, 250)
    add(store, document, donor=1)
    add(store, document[50:150], donor=2)
    match = look(store, document)
    assert spans(match) == [(0, 250)] and match.dropped == ((50, 150, "overlap"),)


def test_a_longer_run_may_split_one_of_several_pieces(store: SegmentStore) -> None:
    document = text(1, 700)
    for first in range(0, 700, 100):
        add(store, document[first : first + 100], donor=1, position=first)
    middle = join(text(2, 150), document[:150])  # the prompt's own order
    add(store, document[:250][50:250], donor=2)
    match = look(store, join(document, middle))
    assert spans(match)[0] == (0, 700) and match.runs[0].pieces[0].segment.donor == 1
    assert spans(match)[1:] == [(850, 1000)]


def test_of_equal_runs_the_better_is_taken(store: SegmentStore) -> None:
    document = text(1, 100)
    context, alone = add(store, document, OWN, donor=9), add(store, document, PUBLIC, donor=1, isolated=True)
    newer = add(store, document, GROUP, donor=2, isolated=True)

    def taken() -> Segment:
        (run,) = find(store, document, 0, 100, [OWN, GROUP, PUBLIC]).runs
        return run.pieces[0].segment

    assert taken() is newer  # compiled alone, and then the later one
    newer.deviation, alone.deviation = 0.2, 0.1  # context has none
    assert taken() is alone  # the smaller deviation before the later one
    store.remove(alone)
    store.remove(newer)
    assert taken() is context
    longer = add(store, join(document, text(2, 1)), GROUP, donor=3, isolated=True)
    (run,) = find(store, join(document, text(2, 1)), 0, 101, [OWN, GROUP]).runs
    assert run.pieces[0].segment is longer and not longer.uses  # to find is not to use


# Scopes ----------------------------------------------------------------------------------------------------------------------


def test_only_the_domains_that_are_asked(store: SegmentStore) -> None:
    document = text(1, 100)
    add(store, document, FOREIGN)
    add(store, document, PUBLIC, isolated=True)
    assert find(store, document, 0, 100, [OWN, GROUP]) == Match((), (), ())
    (run,) = find(store, document, 0, 100, [OWN, GROUP, PUBLIC]).runs
    assert run.isolated and run.domain == PUBLIC


def test_domains_are_one_by_their_key_not_by_their_tenant(store: SegmentStore) -> None:
    document = text(1, 100)
    add(store, document)
    assert find(store, document, 0, 100, [Domain(b"salted", OWN.tenant)]) == Match((), (), ())


# Against brute force ---------------------------------------------------------------------------------------------------------


def equal_stretches(
    segment: Segment, tokens: Ints, begin: int, end: int, walls: npt.NDArray[np.bool_]
) -> list[tuple[int, int]]:
    """Every maximal stretch of tokens[begin:end] that the segment holds, at any shift."""
    found = []
    for shift in range(begin - len(segment.tokens) + 1, end):
        first, last = max(begin, shift), min(end, shift + len(segment.tokens))
        same = (segment.tokens[first - shift : last - shift] == tokens[first:last]) & ~walls[first:last]
        at = first
        for equal, group in itertools.groupby(same.tolist()):
            length = len(list(group))
            if equal:
                found.append((at, at + length))
            at += length
    return found


PARTS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 250), st.integers(1, 160)), min_size=1, max_size=7)


def built(parts: Sequence[tuple[int, int, int]], number: int) -> Ints:
    """Parts of three documents and, for the fourth, of nothing that occurs elsewhere."""
    documents = [text(seed, 410) for seed in range(3)]
    return join(*(
        text(1000 * number + i, length) if which == 3 else documents[which][first : first + length]
        for i, (which, first, length) in enumerate(parts)
    ))  # fmt: skip


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.lists(PARTS, min_size=1, max_size=3),
    PARTS,
    st.integers(0, 40),
    st.integers(0, 40),
    st.sets(st.integers(0, 900), max_size=3),
)
def test_all_that_is_long_enough_is_covered(
    donors: list[list[tuple[int, int, int]]], parts: list[tuple[int, int, int]], begin: int, tail: int, walls: set[int]
) -> None:
    store, prompt = SegmentStore(1 << 24), built(parts, 99)
    for number, donor in enumerate(donors):
        leave(store, built(donor, number), donor=number, begin=number)
    end = max(begin, len(prompt) - tail)
    barriers = np.zeros(len(prompt), bool)
    barriers[[wall for wall in walls if wall < len(prompt)]] = True
    match = look(store, prompt, begin=begin, end=end, barriers=barriers)
    covered = np.zeros(len(prompt), bool)
    for run in match.runs:
        assert begin <= run.start < run.stop <= end and not barriers[run.start : run.stop].any() and run.length >= 32
        covered[run.start : run.stop] = True
    for segment in store:
        for first, last in equal_stretches(segment, prompt, begin, end, barriers):
            left = [len(list(group)) for free, group in itertools.groupby(~covered[first:last]) if free]
            assert last - first < 64 or max(left, default=0) < 64


REPEATING = st.lists(st.lists(st.integers(0, 2), min_size=32, max_size=120), min_size=1, max_size=4)
CUTS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 80), st.integers(1, 120)), max_size=4)


@settings(max_examples=75, deadline=None, derandomize=True)
@pytest.mark.parametrize("repeats", [True, False])
@given(REPEATING, st.lists(st.integers(0, 2), max_size=300), CUTS)
def test_what_is_found_is_equal_even_in_text_that_repeats(
    repeats: bool, donors: list[list[int]], noise: list[int], parts: list[tuple[int, int, int]]
) -> None:
    store = SegmentStore(1 << 24)
    for number, donor in enumerate(donors):
        tokens = np.array(donor, np.int32)
        if not store.known(OWN, tokens):
            add(store, tokens, donor=number % 2, position=7 * number)
    prompt = np.array(
        [*noise, *(t for i, first, length in parts for t in donors[i % len(donors)][first : first + length])], np.int32
    )
    with pytest.MonkeyPatch.context() as patch:
        if repeats:
            patch.setattr(matching, "periodic", lambda tokens: np.zeros(len(tokens), bool))
        match = look(store, prompt, min_match=24, short_match=17, barriers=prompt == 3)  # `look` compares tokens
    assert all(run.length >= 17 for run in match.runs)
    assert len(match.broken) == 2 * len(match.runs)
    for run, (left, right) in zip(match.runs, zip(match.broken[::2], match.broken[1::2])):
        assert (left.position, right.position) == (run.start, run.stop)


def test_colliding_hashes_are_not_believed(store: SegmentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "window_hashes", lambda tokens: np.full(max(0, len(tokens) - WINDOW + 1), 5, np.uint64))
    document = text(1, 120)
    add(store, text(2, 120), donor=1)
    own = add(store, document, donor=2)
    assert look(store, text(3, 400)) == Match((), (), ())
    (run,) = look(store, join(text(3, 80), document, text(4, 80))).runs
    assert run.pieces == (Piece(own, 0, 80, 120),)


@pytest.mark.parametrize("period", [1, 2, 3, 16, 50])
def test_text_that_repeats_itself_takes_bounded_work(store: SegmentStore, monkeypatch: pytest.MonkeyPatch, period: int) -> None:
    tokens = np.resize(text(1, period), 4096).astype(np.int32)
    for donor in range(12):
        add(store, tokens[: 256 - donor], donor=donor)
    calls = {"_grown": 0, "_rank": 0}

    def counted(name: str) -> None:
        original = getattr(matching, name)

        def wrapper(*arguments: object) -> object:
            calls[name] += 1
            return original(*arguments)

        monkeypatch.setattr(matching, name, wrapper)

    counted("_grown")
    counted("_rank")
    monkeypatch.setattr(matching, "periodic", lambda tokens: np.zeros(len(tokens), bool))
    match = look(store, tokens)
    tiles = 4096 // (256 - 12 - period - WINDOWS) + 1
    assert sum(run.length for run in match.runs) > 0.75 * 4096
    assert calls["_grown"] <= 3 * 8 * tiles and calls["_rank"] <= 9 * 8 * tiles
    assert len(match.dropped) <= 8 * tiles


@pytest.mark.parametrize("domain", [OWN, PUBLIC._replace(shared=True)])
def test_text_that_repeats_itself_is_not_reused(store: SegmentStore, domain: Domain) -> None:
    document = join(text(1, 100), np.full(120, 9, np.int32), text(2, 130))
    before = b""
    for first, last in cut(document):
        own = add(store, document[first:last], domain, position=first, isolated=domain.shared, before=before)
        before = own.link
    prompt = join(text(3, 20), document, text(4, 20))
    match = find(store, prompt, 0, len(prompt), [domain])
    match.check(prompt)
    first, *rest = spans(match)
    assert first == (20, 118), "a window of few different tokens holds two others as well"
    assert rest == [] if domain.shared else [(242, max(stop for _, stop in rest))]
    assert (118, 242, "periodic") in match.dropped and Broken(118, "periodic") in match.broken


def crafted(kind: str, count: int) -> tuple[SegmentStore, Ints, Domain]:
    """A store that a client made to be searched for long, and the prompt to search it with."""
    store, source = SegmentStore(1 << 28), np.random.default_rng(5)
    prompt = source.integers(3, 4000, 4096).astype(np.int32)
    if kind == "repeats":  # few different windows, in many donors
        prompt = np.resize(source.integers(3, 5, 700), 4096).astype(np.int32)
    domain = PUBLIC._replace(shared=True) if kind in ("starts", "forks") else OWN
    for donor in range(count):
        at = donor * 7 % 3800
        part = prompt[at : at + int(source.integers(40, 256))].copy()
        if kind == "edits":  # pieces that break every 34 tokens
            part[::34] = source.integers(5000, 9000, len(part[::34]))
        if kind == "forks":  # one first window, every length, other ends
            part = join(prompt[:16], source.integers(3, 4000, 16 + donor % 224).astype(np.int32))
        if kind != "starts" or len(part) > 32:
            tokens = part.astype(np.int32)
            if store.known(domain, tokens) is None:
                add(store, tokens, domain, donor=donor, position=donor * 3, isolated=domain.shared)
    return store, prompt, domain


@pytest.mark.parametrize("kind", ["pieces", "repeats", "edits", "starts", "forks"])
def test_a_look_up_does_bounded_work(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, prompt, domain = crafted(kind, 1500)
    counts = {"compared": 0, "handled": 0}
    compare, rank = Work.allows, matching._rank

    def allows(self: Work, tokens: int) -> bool:
        allowed = compare(self, tokens)
        counts["compared"] += max(tokens, 32) if allowed else 0
        return allowed

    def ranked(run: Run) -> tuple[float, ...]:
        counts["handled"] += len(run.pieces)
        return rank(run)

    monkeypatch.setattr(Work, "allows", allows)
    monkeypatch.setattr(matching, "_rank", ranked)
    match = find(store, prompt, 0, len(prompt), [domain], min_match=32, short_match=16)
    match.check(prompt)
    assert counts["compared"] <= AT_ONCE + PER_TOKEN * len(prompt)
    assert counts["handled"] <= 3 * (matching.MOST_HANDLED + AT_ONCE + PER_TOKEN * len(prompt) // 32)


def test_what_is_spent_on_one_place_is_not_taken_from_another(store: SegmentStore) -> None:
    document, domain = text(1, 200), PUBLIC._replace(shared=True)
    prompt = join(np.resize(text(2, 70), 3000), document).astype(np.int32)
    for donor in range(900):
        part = join(prompt[donor % 60 : donor % 60 + 20 + donor % 200], text(donor, 12))
        add(store, part, domain, donor=donor, isolated=True)
    before = b""
    for first, last in cut(document):
        before = add(store, document[first:last], domain, donor=1000, position=first, isolated=True, before=before).link
    match = find(store, prompt, 0, len(prompt), [domain])
    match.check(prompt)
    assert spans(match)[-1] == (3000, 3200)


def test_check_notices() -> None:
    store, document = SegmentStore(1 << 24), text(1, 100)
    piece = Piece(add(store, document), 0, 0, 100)
    good = Match((Run((piece,)),), (), ())
    good.check(document)
    wrong = [
        (Run((piece._replace(target=1),)),),
        (Run((piece._replace(source=1, length=99),)),),
        (Run((piece,)), Run((piece,))),
        (Run((piece._replace(length=50), Piece(piece.segment, 60, 60, 40))),),
    ]
    for runs in wrong:
        with pytest.raises(AssertionError):
            Match(runs, (), ()).check(join(document, text(2, 9)))
