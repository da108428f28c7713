"""What is asked of simulated replicas: calls without text, whose keys say what they have in common.

    shared      a system prompt of one of many applications, a few far more often than most, and a question of its own
    chats       talks of several turns, each with all before it in front; every turn comes over any front
    chats/own   the same, each talk over a front of its own, as a load balancer that keeps sessions together sends them
    documents   three documents of a collection in any order, and a question: segments that may be reused wherever they stand
    unrelated   prompts that have nothing in common

Calls come at random (a Poisson process), and their sizes do not depend on what answers them: the same seed, the same calls.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from kvloom.deploy.prompt_keys import CHUNK, Prompt
from kvloom.deploy.simulation import Call


class Scale(NamedTuple):
    """How much there is of it."""

    replicas: int
    rate: float
    """Calls per second, of all fronts."""
    seconds: float
    fronts: int
    loads: tuple[str, ...] = ()
    """Which are simulated, one after another."""
    seed: int = 0


GROUPS, PREFIX, QUESTION = 20, 512, (32, 96)
"""Of shared: applications per replica, tokens of each system prompt, and of a question, from and up to."""
OUTPUT = (16, 48)
"""Tokens of an answer."""
TALK_SECONDS, TURNS, SAID, SYSTEM = 0.5, 8, (32, 96), 128
"""Of chats: between two turns, turns, tokens of what is said in one, tokens of the system prompt of one of 100 applications."""
DOCUMENTS, SEGMENTS, OF_ONE = 8, (48, 80), 2
"""Of documents: documents per replica, tokens of each of the segments that one is made of, and how many segments."""
PER_PROMPT = 3
"""Documents of a prompt."""
UNRELATED = (64, 192)
"""Tokens of an unrelated prompt."""
MASK = 2**64 - 1


def zipf(number: int, seed: int, exponent: float = 1.0) -> Iterator[int]:
    """Numbers below `number` without end, the n-th one n to the power of -exponent as often as the first."""
    shares = np.cumsum(np.arange(1, number + 1) ** -exponent)
    draw = np.random.default_rng(seed)
    while True:
        yield from np.searchsorted(shares, draw.random(65536) * shares[-1]).tolist()


def arrivals(scale: Scale, draw: random.Random) -> Iterator[tuple[int, float]]:
    """(number, seconds) of calls."""
    at = 0.0
    for number in itertools.count():
        at += draw.expovariate(scale.rate)
        if at >= scale.seconds:
            return
        yield number, at


def shared(scale: Scale) -> Iterator[Call]:
    draw = random.Random(f"shared {scale.seed}")
    groups: list[tuple[int, ...]] = [
        tuple(draw.getrandbits(64) for _ in range(PREFIX // CHUNK)) for _ in range(GROUPS * scale.replicas)
    ]
    which = zipf(len(groups), scale.seed)
    for number, at in arrivals(scale, draw):
        tokens = draw.randint(*QUESTION)
        keys = groups[next(which)] + tuple(draw.getrandbits(64) for _ in range(tokens // CHUNK))
        yield _call(number, at, Prompt(PREFIX + tokens, keys), draw, scale)


class _Talk:
    """A chat under way."""

    def __init__(self, draw: random.Random, system: tuple[int, ...], turns: int, front: int) -> None:
        self.keys = list(system)
        self.tokens, self.turns, self.front = SYSTEM, turns, front
        self._draw = draw

    def say(self, tokens: int) -> None:
        self.tokens += tokens
        while len(self.keys) < self.tokens // CHUNK:
            self.keys.append(self._draw.getrandbits(64))


def chats(scale: Scale, own: bool = False) -> Iterator[Call]:
    """own: each talk comes over the same front all the time."""
    draw = random.Random(f"chats {scale.seed}")
    systems = [tuple(draw.getrandbits(64) for _ in range(SYSTEM // CHUNK)) for _ in range(100)]
    which = zipf(len(systems), scale.seed)

    def talk(turns: int) -> _Talk:
        return _Talk(draw, systems[next(which)], turns, draw.randrange(scale.fronts))

    talks = deque(talk(draw.randint(1, TURNS)) for _ in range(max(1, int(TALK_SECONDS * scale.rate))))
    for number, at in arrivals(scale, draw):
        one = talks.popleft()
        one.say(draw.randint(*SAID))
        call = _call(number, at, Prompt(one.tokens, tuple(one.keys)), draw, scale)
        one.say(call.output)
        call.after = tuple(one.keys)
        call.front = one.front if own else call.front
        one.turns -= 1
        talks.append(one if one.turns else talk(TURNS))
        yield call


def documents(scale: Scale) -> Iterator[Call]:
    draw = random.Random(f"documents {scale.seed}")
    library = [
        tuple((draw.getrandbits(64), draw.randint(*SEGMENTS)) for _ in range(OF_ONE)) for _ in range(DOCUMENTS * scale.replicas)
    ]
    which = zipf(len(library), scale.seed)
    for number, at in arrivals(scale, draw):
        chosen: dict[int, None] = {}
        while len(chosen) < PER_PROMPT:
            chosen[next(which)] = None
        order = list(chosen)
        draw.shuffle(order)
        segments = tuple(segment for each in order for segment in library[each])
        ends = list(itertools.accumulate(sum(tokens for _, tokens in library[each]) for each in order))
        keys = []
        for chunk in range(1, ends[-1] // CHUNK + 1):
            seen = next(i for i, end in enumerate(ends) if chunk * CHUNK <= end)
            keys.append(hash((chunk, *order[: seen + 1])) & MASK)
        yield _call(number, at, Prompt(ends[-1] + draw.randint(*QUESTION), tuple(keys), segments), draw, scale)


def unrelated(scale: Scale) -> Iterator[Call]:
    draw = random.Random(f"unrelated {scale.seed}")
    for number, at in arrivals(scale, draw):
        tokens = draw.randint(*UNRELATED)
        yield _call(number, at, Prompt(tokens, tuple(draw.getrandbits(64) for _ in range(tokens // CHUNK))), draw, scale)


def _call(number: int, at: float, prompt: Prompt, draw: random.Random, scale: Scale) -> Call:
    return Call(number, at, prompt, draw.randint(*OUTPUT), draw.randrange(scale.fronts), key=str(number))


LOADS: dict[str, Callable[[Scale], Iterator[Call]]] = {
    "shared": shared,
    "chats": chats,
    "chats/own": lambda scale: chats(scale, own=True),
    "documents": documents,
    "unrelated": unrelated,
}
