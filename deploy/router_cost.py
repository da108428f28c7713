"""What a front's router takes on this machine: time per call, and memory of what it remembers. Measured on real objects."""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median

from kvloom.deploy.placement import Placement
from kvloom.deploy.prompt_keys import CHUNK, Prompt
from kvloom.deploy.simulated_load import PREFIX, Scale
from kvloom.loadtest.simulate_scheduler import Machine
from kvloom.loadtest.study.results import Column, Row

COST_COLUMNS = (
    Column("what", "what"), Column("microseconds", "micros", ",.1f"), Column("cores for the rate", "cores", ".1f"),
    Column("MB", "megabytes", ",.0f"),
)  # fmt: skip
COST_NOTE = (
    "Processor time on one core, medians of five rounds; all replicas are thought to be full. Memory as Python allocates it."
)
ROUNDS, CALLS = 5, 200
SHORT, LONG = 1024, 8192
"""Tokens of prompts that keys are made of."""


def costs(scale: Scale, machine: Machine, capacity: int, show: Callable[[Row], None]) -> Iterator[Row]:
    """Medians of rounds, on one core, with every replica's cache full in the router's eyes."""
    draw = random.Random(scale.seed)
    names = [f"replica-{i}" for i in range(scale.replicas)]
    there = dict.fromkeys(names, capacity)
    tracemalloc.start()
    front = Placement(b"simulation", scale.seed)
    front.update(there)
    rare, hot = (tuple(draw.getrandbits(64) for _ in range(PREFIX // CHUNK)) for _ in range(2))
    tail = (capacity - 2 * PREFIX) // CHUNK
    for i, name in enumerate(names):
        _send(front, Prompt(CHUNK * tail, tuple(draw.getrandbits(64) for _ in range(tail))), name)
        _send(front, Prompt(PREFIX, hot), name)
        if i % (scale.replicas // 10 + 1) == 0:
            _send(front, Prompt(PREFIX, rare), name)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    yield {"what": f"index of a front, {front.keys:,} keys", "megabytes": size / 1e6}

    def row(what: str, micros: float, per_call: bool = True) -> Row:
        return {"what": what, "micros": micros, "cores": micros * 1e-6 * scale.rate if per_call else None}

    for count, segments in ((SHORT, False), (SHORT, True), (LONG, False)):
        make = partial(front.prompt, front_tokens(draw, count), "tenant", segments=segments)
        yield row(f"{'keys and segments' if segments else 'keys'} of {count:,} tokens", timed(make))
    for held, prefix in (("nowhere", ()), ("at ten replicas", rare), ("everywhere", hot)):
        yield row(f"a call held {held}: choose, place, begin, end", timed(_Calls(front, prefix, draw)))
    yield row("what all replicas tell, once a second", timed(partial(_tell, front, names), 1), False)
    fewer = dict.fromkeys(names[scale.replicas // 10 :], capacity)
    yield row("a tenth of all replicas is gone", timed(lambda: front.update(fewer), 1, 1), False)


def front_tokens(draw: random.Random, count: int) -> bytes:
    """Token ids as they come to a router."""
    return b"".join(draw.randrange(49152).to_bytes(4, "little") for _ in range(count))


class _Calls:
    """Every call of it is one more request, to the end."""

    def __init__(self, front: Placement, prefix: tuple[int, ...], draw: random.Random) -> None:
        self._front, self._number = front, 0
        self._prompts = [Prompt(PREFIX + 80, (*prefix, draw.getrandbits(64))) for _ in range(ROUNDS * CALLS)]

    def __call__(self) -> None:
        prompt, key = self._prompts[self._number], str(self._number)
        self._number += 1
        choice = self._front.choose(prompt)
        assert choice is not None
        self._front.placed(key, prompt, choice.replica)
        self._front.began(key, choice.hit)
        self._front.ended(key)


def timed(call: Callable[[], object], calls: int = CALLS, rounds: int = ROUNDS) -> float:
    """Microseconds that a call takes: the median of rounds, of processor time."""
    found = []
    for _ in range(rounds):
        begin = time.process_time()
        for _ in range(calls):
            call()
        found.append((time.process_time() - begin) / calls * 1e6)
    return median(found)


def _tell(front: Placement, names: Sequence[str]) -> None:
    for name in names:
        front.report(name, 0.0, 9)


def _send(front: Placement, prompt: Prompt, name: str) -> None:
    front.placed("one", prompt, name)
    front.ended("one")
