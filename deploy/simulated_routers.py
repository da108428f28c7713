"""Routers of a simulation: the one that serves, and what it is compared with."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from kvloom.deploy import placement
from kvloom.deploy.placement import Placement
from kvloom.deploy.simulation import Call, Fleet


class Placing:
    """The router that serves: a `Placement` for every front, all with the same secret."""

    def __init__(self, fronts: int, capacity: int, seed: int = 0, told: int | None = None) -> None:
        """told: how many fronts replicas say there are, all of them by default."""
        self._told = told or fronts
        self.fronts = [Placement(b"simulation", seed=seed + i) for i in range(fronts)]
        self._capacity = capacity

    def present(self, names: Sequence[str]) -> None:
        for front in self.fronts:
            front.update(dict.fromkeys(names, self._capacity))

    def pick(self, call: Call) -> str:
        front = self.fronts[call.front]
        choice = front.choose(call.prompt)
        assert choice is not None
        front.placed(call.key, call.prompt, choice.replica)
        return choice.replica

    def began(self, call: Call) -> None:
        self.fronts[call.front].began(call.key, call.found)

    def ended(self, call: Call) -> None:
        self.fronts[call.front].ended(call.key)

    def report(self, name: str, waits: float) -> None:
        for front in self.fronts:
            front.report(name, waits, self._told)


class Forgetful:
    """A router that remembers nothing of calls."""

    def __init__(self, seed: int) -> None:
        self.names: Sequence[str] = ()
        self.random = random.Random(seed)

    def present(self, names: Sequence[str]) -> None:
        self.names = names

    def began(self, call: Call) -> None:
        pass

    def ended(self, call: Call) -> None:
        pass

    def report(self, name: str, waits: float) -> None:
        pass


class RoundRobin(Forgetful):
    """Every front sends to one after another, and begins anywhere."""

    def __init__(self, fronts: int, seed: int = 0) -> None:
        super().__init__(seed)
        self._next = [self.random.randrange(2**30) for _ in range(fronts)]

    def pick(self, call: Call) -> str:
        self._next[call.front] += 1
        return self.names[self._next[call.front] % len(self.names)]


class TwoChoices(Forgetful):
    """Power of two choices: of two drawn replicas the one with fewer requests, which it knows exactly and at once."""

    def __init__(self, fleet: Callable[[], Fleet], seed: int = 0) -> None:
        super().__init__(seed)
        self._fleet = fleet

    def pick(self, call: Call) -> str:
        engines = self._fleet().engines
        return min(self.random.sample(self.names, 2), key=lambda name: len(engines[name].calls))


class Hashing(Forgetful):
    """Consistent hashing alone: the ring of a `Placement` that is never told of any load."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._ring = Placement(b"simulation", seed=seed)

    def present(self, names: Sequence[str]) -> None:
        self._ring.update(dict.fromkeys(names))

    def pick(self, call: Call) -> str:
        choice = self._ring.choose(call.prompt)
        assert choice is not None
        return choice.replica


@contextmanager
def constants(**values: float) -> Iterator[None]:
    """`deploy.placement` with other numbers, such as GUARD=8.0."""
    before = {name: getattr(placement, name) for name in values}
    try:
        for name, value in values.items():
            setattr(placement, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(placement, name, value)
