"""Where prompts go: what is remembered is bounded and right whatever happens, and what is chosen is what the module says."""

from __future__ import annotations

import random
from array import array
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvloom.deploy.placement import DECODE_TOKENS, GUARD, Placement
from kvloom.deploy.prompt_keys import CHUNK, Prompt

NAMES = [f"replica-{i}" for i in range(5)]
SECRET = b"s" * 32


def tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(50_000), k=count)


def placement(*names: str, seed: int = 0, capacity: int = 100_000) -> Placement:
    made = Placement(SECRET, seed)
    made.update(dict.fromkeys(names, capacity))
    return made


def chosen(where: Placement, prompt: Prompt) -> tuple[str, str]:
    found = where.choose(prompt)
    assert found is not None
    return found.replica, found.reason


class Anything(RuleBasedStateMachine):
    """Requests, reports and replicas in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.placement = Placement(SECRET, 0)
        self.capacities: dict[str, int] = {}
        self.number = 0
        self.last = self.prompt(1, 1, 2, 0)

    def prompt(self, tenant: int, text: int, chunks: int, segments: int) -> Prompt:
        keys = tuple(1000 * tenant + 100 * text + i for i in range(chunks))
        return Prompt(CHUNK * chunks + 10, keys, tuple((10_000 + 7 * text + i, 20 + i) for i in range(segments)))

    @rule(replicas=st.dictionaries(st.sampled_from(NAMES), st.sampled_from([CHUNK, 300, 2000])))
    def update(self, replicas: dict[str, int]) -> None:
        self.placement.update(replicas)
        self.capacities = replicas

    @rule(tenant=st.integers(1, 2), text=st.integers(0, 3), chunks=st.integers(0, 9), segments=st.integers(0, 4),
          name=st.sampled_from([*NAMES, "stranger"]))  # fmt: skip
    def place(self, tenant: int, text: int, chunks: int, segments: int, name: str) -> None:
        self.last = self.prompt(tenant, text, chunks, segments)
        self.placement.placed(str(self.number), self.last, name)
        self.number += 1

    @rule(back=st.integers(1, 6), name=st.sampled_from(NAMES))
    def place_elsewhere(self, back: int, name: str) -> None:
        self.placement.placed(str(self.number - back), self.last, name)

    @rule(back=st.integers(1, 6), found=st.integers(0, 600))
    def begin(self, back: int, found: int) -> None:
        self.placement.began(str(self.number - back), found)

    @rule(back=st.integers(1, 6))
    def end(self, back: int) -> None:
        self.placement.ended(str(self.number - back))

    @rule(name=st.sampled_from([*NAMES, "stranger"]), waits=st.integers(0, 9999), fronts=st.integers(0, 9))
    def report(self, name: str, waits: int, fronts: int) -> None:
        self.placement.report(name, waits, fronts)

    @rule(name=st.sampled_from([*NAMES, "stranger", None]))
    def forget(self, name: str | None) -> None:
        self.placement.forget(name)
        if name is None:
            assert not self.placement.keys

    @rule(among=st.none() | st.sets(st.sampled_from([*NAMES, "stranger"])))
    def choose(self, among: set[str] | None) -> None:
        found = self.placement.choose(self.last, among)
        there = self.capacities.keys() & (self.capacities if among is None else among)
        assert (found is None) == (not there)
        if found is not None:
            assert found.replica in there
            assert found.hit == self.placement._hit(self.last, self.placement._at(self.placement._slots[found.replica]))

    @rule()
    def end_all(self) -> None:
        for number in range(-6, self.number + 1):
            self.placement.ended(str(number))
        for name in self.capacities:
            self.placement.report(name, 0.0)
            assert self.placement.waits(name) == 0

    @invariant()
    def is_bounded_and_agrees(self) -> None:
        made = self.placement
        assert set(made.names) == self.capacities.keys()
        assert set(made._owners) == set(made._slots.values()) and len(made._owners) == len(made._ring)
        assert all(placed.slot in made._slots.values() for placed in made._placed.values())
        held: dict[int, int] = {}
        hits = made._hits(self.last)
        for name, slot in made._slots.items():
            replica = made._at(slot)
            assert replica.tokens == sum(replica.held.values()) <= self.capacities[name] == replica.capacity
            mine = [placed for placed in made._placed.values() if placed.slot == slot]
            assert replica.own == sum(placed.waits for placed in mine) >= 0
            assert replica.tells == sum(placed.tells for placed in mine) >= replica.own
            assert made.waits(name) >= replica.own
            assert hits[slot] == made._hit(self.last, replica)
            for key in replica.held:
                held[key] = held.get(key, 0) | 1 << slot
        assert held == made._holders
        assert made.keys == sum(mask.bit_count() for mask in held.values())


Anything.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestAnything = Anything.TestCase


def test_tenants_and_salts_share_no_keys() -> None:
    made, text = placement(), tokens(640)
    whose = [("", ""), ("a", ""), ("", "a"), ("a", "b"), ("ab", ""), ("", "ab"), ("b", "a"), ("1:a", ""), ("1", ":a")]
    prompts = [made.prompt(text, tenant, salt, segments=True) for tenant, salt in whose]
    keys = [key for prompt in prompts for key in prompt.prefixes]
    assert len(set(keys)) == len(keys) == 10 * len(whose)
    by_tenant = {tenant: {key for key, _ in prompt.segments} for (tenant, _), prompt in zip(whose, prompts)}
    assert all(by_tenant.values())
    assert sum(map(len, by_tenant.values())) == len(set().union(*by_tenant.values()))


def test_keys_are_those_of_the_secret_and_of_what_stands_in_front() -> None:
    text = tokens(640)
    one, same, other = Placement(SECRET), Placement(SECRET), Placement(b"another")
    assert one.prompt(text) == same.prompt(array("i", text).tobytes())
    assert not set(one.prompt(text).prefixes) & set(other.prompt(text).prefixes)
    changed = one.prompt([*text[:200], text[200] + 1, *text[201:]]).prefixes
    assert changed[:3] == one.prompt(text).prefixes[:3]
    assert not set(changed[3:]) & set(one.prompt(text).prefixes)


def test_segments_are_found_wherever_they_stand() -> None:
    made, document = placement(), tokens(1000, seed=1)
    alone = made.prompt(document, segments=True).segments
    behind = made.prompt([*tokens(333, seed=2), *document], segments=True).segments
    assert len(alone) > 3
    assert set(alone) <= set(behind)


def test_what_is_held_is_where_a_prompt_goes_and_the_guard_spills() -> None:
    made = placement(*NAMES)
    prompt = made.prompt(tokens(640))
    made.placed("first", prompt, NAMES[2])
    made.ended("first")
    assert chosen(made, prompt) == (NAMES[2], "affinity")
    made.report(NAMES[2], GUARD * 640)
    assert chosen(made, prompt) == (NAMES[2], "affinity")
    made.report(NAMES[2], GUARD * 640 + 1)
    name, reason = chosen(made, prompt)
    assert reason == "guard" and name != NAMES[2]


def test_prompts_that_are_held_whole_do_not_queue_up_where_they_are_while_others_idle() -> None:
    made = placement("a", "b")
    prompt = made.prompt(tokens(640))
    went = []
    for number in range(200):
        went.append(chosen(made, prompt)[0])
        made.placed(str(number), prompt, went[-1])
    assert went[:40] == 40 * went[:1]
    assert went.count(went[0]) < 150


def test_a_small_hit_does_not_decide() -> None:
    made = placement(*NAMES)
    made.placed("first", made.prompt(tokens(CHUNK)), NAMES[2])
    longer = made.prompt([*tokens(CHUNK), *tokens(20 * CHUNK, seed=1)])
    assert chosen(made, longer)[1] == "hash"


def test_draws_among_equals_are_random() -> None:
    made = placement(*NAMES)
    prompt = made.prompt(tokens(640))
    for name in NAMES[:3]:
        made.placed(name, prompt, name)
        made.ended(name)
    found = Counter(chosen(made, prompt)[0] for _ in range(300))
    assert set(found) == set(NAMES[:3]) and min(found.values()) > 50
    short = made.prompt(tokens(10))
    assert len({chosen(made, short)[0] for _ in range(300)}) == len(NAMES)


def test_fronts_that_know_nothing_of_each_other_agree_and_a_loss_moves_only_what_was_there() -> None:
    fronts = [placement(*order, seed=seed) for seed, order in enumerate((NAMES, NAMES[::-1]))]
    prompts = [fronts[0].prompt(tokens(300, seed)) for seed in range(200)]
    before = [chosen(fronts[0], prompt) for prompt in prompts]
    assert before == [chosen(fronts[1], prompt) for prompt in prompts]
    assert {reason for _, reason in before} == {"hash"} and {name for name, _ in before} == set(NAMES)
    fronts[0].update(dict.fromkeys(NAMES[1:]))
    after = [chosen(fronts[0], prompt)[0] for prompt in prompts]
    assert all(new == old for new, (old, _) in zip(after, before) if old != NAMES[0]) and NAMES[0] not in after


def test_hashing_passes_by_what_is_loaded() -> None:
    made = placement(*NAMES)
    prompt = made.prompt(tokens(300))
    first, _ = chosen(made, prompt)
    made.report(first, 5000)
    second, reason = chosen(made, prompt)
    assert second != first and reason == "hash"
    assert second == chosen(placement(*[name for name in NAMES if name != first]), prompt)[0]


@pytest.mark.parametrize(("fronts", "counts"), [(1, 672), (10, 6720)])
def test_other_fronts_are_taken_to_do_as_this_one_until_the_next_report(fronts: int, counts: int) -> None:
    made = placement("a", "b")
    made.report("a", 1000, fronts)
    assert made.waits("a") == 1000
    made.placed("x", made.prompt(tokens(640)), "a")
    assert made.waits("a") == 1000 + counts
    made.report("a", 672, fronts)  # that was ours: nothing is left of the others
    assert made.waits("a") == 672
    made.began("x", 0)
    assert made.waits("a") == DECODE_TOKENS
    made.ended("x")
    assert made.waits("a") == 0
    made.update(dict.fromkeys("abc"))
    made.placed("y", made.prompt(tokens(640)), "c")
    assert made.waits("c") == counts, "a new one has as many fronts as the others"


def test_an_idle_replica_is_not_where_all_fronts_send_all() -> None:
    fronts = [placement(*NAMES, seed=seed) for seed in range(10)]
    draw, found = random.Random(0), Counter[str]()
    for front in fronts:
        for name in NAMES:
            front.report(name, 0 if name == NAMES[0] else 2000, len(fronts))
    for number in range(300):
        front = fronts[number % len(fronts)]
        prompt = Prompt(200, tuple(draw.getrandbits(64) for _ in range(3)))
        name, _ = chosen(front, prompt)
        front.placed(str(number), prompt, name)
        found[name] += 1
    assert found[NAMES[0]] < 100


def test_an_answer_that_found_little_corrects_what_is_thought_to_be_held() -> None:
    made = placement(*NAMES)
    for number in range(10):
        made.placed(str(number), made.prompt(tokens(640, seed=number)), NAMES[0])
    assert made.keys == 100
    made.placed("again", made.prompt(tokens(640, seed=5)), NAMES[0])
    made.began("again", 320)
    assert made.keys == 100
    made.placed("and again", made.prompt(tokens(640, seed=5)), NAMES[0])
    made.began("and again", 319)
    assert made.keys == 90
    assert made.prompt(tokens(640, seed=0)).prefixes[-1] not in made._holders, "what was used longest ago goes first"
