"""The store of responses by itself: bounds, what goes first, chains that keep their beginnings, nothing of anybody else's."""

import random

import pytest

from kvloom.server.responses.store import Entry, Owner, ResponseStore

ANN, BEN = Owner("ann", "k"), Owner("ben", "k")


def put(store, owner, name, parent=None, text="x", before=()):
    """Store a response of one item and one answer."""
    items = [Entry.of({"id": f"in-{name}", "type": "message", "text": text})]
    response = {"id": name, "output": [{"id": f"out-{name}", "type": "message", "text": text}]}
    return store.put(owner, response, items, [f"in-{name}"], parent, before)


def held(store, owner, *names):
    """Which of these it has. Asking is using, so ask once."""
    return [name for name in names if store.find(owner, name) is not None]


def test_a_chain_is_a_conversation():
    store = ResponseStore(1 << 20, 10)
    assert put(store, ANN, "a") and put(store, ANN, "b", store.find(ANN, "a"))
    assert [entry.id for entry in store.find(ANN, "b").conversation()] == ["in-a", "out-a", "in-b", "out-b"]
    assert [entry.id for entry in store.find(ANN, "b").whole_input()] == ["in-a", "out-a", "in-b"]
    assert store.find_item(ANN, "out-a").data == b'{"id":"out-a","type":"message","text":"x"}'
    assert store.find_item(ANN, "out-c") is None and store.find_item(BEN, "out-a") is None and store.find(BEN, "a") is None
    store.check()


def test_the_least_recently_used_goes():
    store = ResponseStore(1 << 20, 3)
    for name in "abc":
        put(store, ANN, name)
    assert store.find_item(ANN, "in-a")  # used
    put(store, ANN, "d")
    assert held(store, ANN, *"abcd") == ["a", "c", "d"] and store.find_item(ANN, "in-b") is None
    store.check()


def test_what_is_continued_outlives_what_is_not():
    store = ResponseStore(1 << 20, 3)
    put(store, ANN, "a")
    put(store, ANN, "b")
    put(store, ANN, "c", store.find(ANN, "a"))
    put(store, ANN, "d", store.find(ANN, "c"))
    assert held(store, ANN, *"abcd") == ["a", "c", "d"]
    put(store, ANN, "e")
    assert held(store, ANN, *"ace") == ["a", "c", "e"] and held(store, ANN, "d") == []  # the end of the older conversation
    store.check()


def test_who_holds_most_gives_way_to_others():
    store = ResponseStore(40_000, 1000)
    for number in range(100):
        put(store, ANN, f"a{number}")
    size = store.size
    assert 35_000 < size <= 40_000
    assert put(store, BEN, "b") and held(store, BEN, "b") == ["b"]
    assert not put(store, BEN, "huge", text="x" * 50_000) and held(store, BEN, "b", "huge") == []
    store.check()


def test_a_deleted_response_is_kept_for_what_continues_it():
    store = ResponseStore(1 << 20, 10)
    put(store, ANN, "a")
    put(store, ANN, "b", store.find(ANN, "a"))
    assert not store.delete(BEN, "a") and store.delete(ANN, "a") and not store.delete(ANN, "a")
    assert store.find(ANN, "a") is None and store.find_item(ANN, "out-a") is None
    assert len(store.find(ANN, "b").conversation()) == 4
    store.check()
    assert store.delete(ANN, "b") and len(store) == 0 and store.size == 0
    store.check()


def test_a_response_whose_parent_has_gone_keeps_the_conversation_itself():
    store = ResponseStore(1 << 20, 10)
    put(store, ANN, "a")
    parent = store.find(ANN, "a")
    before = parent.conversation()
    store.delete(ANN, "a")
    assert put(store, ANN, "b", parent, before=before)
    assert [entry.id for entry in store.find(ANN, "b").conversation()] == ["in-a", "out-a", "in-b", "out-b"]
    store.check()


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_done_counts_fit_and_chains_are_whole(seed):
    draw = random.Random(seed)
    store, told, read = ResponseStore(90_000, 12), dict[str, list[str]](), 0
    owners = [Owner(tenant, key) for tenant in "ab" for key in "kl"]
    of = dict[str, Owner]()
    for number in range(1500):
        name, known = f"r{number}", draw.choice(list(told)[-40:] or ["r0"])
        owner = draw.choice(owners) if draw.random() < 0.2 else of.get(known, owners[0])
        match draw.randrange(9):
            case 0 | 1 | 2 | 3:
                parent = store.find(owner, known) if draw.random() < 0.7 else None
                before = [] if parent is None else parent.conversation()
                if parent is not None and draw.random() < 0.2:
                    store.delete(owner, parent.id)
                owner = owner if parent is not None else draw.choice(owners)
                if put(store, owner, name, parent, "x" * draw.choice((10, 500, 3000)), before):
                    told[name] = [entry.id for entry in before] + [f"in-{name}", f"out-{name}"]
                    of[name] = owner
            case 4:
                store.delete(owner, known)
            case 5:
                store.find_item(owner, draw.choice(("in-", "out-")) + known)
            case _:
                record = store.find(owner, known)
                assert record is None or owner == of[known]
                read += record is not None and len(told[known]) > 2
                assert record is None or [entry.id for entry in record.conversation()] == told[known]
        store.check()
    print(f"{len(store)} responses at the end; {read} conversations of several turns were read")
    assert len(store) > 5 and read > 20
