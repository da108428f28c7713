"""State of running requests beside their KV: what selection methods and retention remember from step to step, in one bound.

A request has state from its admission to its preemption or end, and only if it may grow beyond what its method reads anyway
(`Selector.budget`). Methods keep it in slabs, with a slot per request; slabs without requests hold no memory.

    held        slots that requests have                    held + wanted <= bound, or the request waits
    allocated   slabs, which may have slots to spare        never more than the bound: spare slots go first
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvloom.engine.request import Request
from kvloom.engine.slots import Slab, grown


class Keeper(Protocol):
    """What keeps state of requests: a selection method, or a retention."""

    @property
    def budget(self) -> int:
        """Known tokens up to which a request needs no state."""
        ...

    @property
    def slabs(self) -> tuple[Slab, ...]:
        """Where the state of a longer one is."""
        ...


class StateMemory:
    """The bound, and who holds what. Called on the engine's thread."""

    def __init__(self, bound: int, retention: Keeper | None = None) -> None:
        """bound: most bytes of all slabs together. retention: keeps state of every request, beside its selection."""
        self.bound = bound
        self._retention = retention
        self._holders: dict[Request, tuple[Slab, ...]] = {}
        self._slabs: dict[int, Slab] = {}

    @property
    def allocated(self) -> int:
        """Bytes of all slabs, counted from their arrays."""
        return sum(slab.bytes for slab in self._slabs.values())

    @property
    def held(self) -> int:
        """Bytes of the slots that requests have."""
        return sum(len(slab.slots_held) * slab.bytes_per_request for slab in self._slabs.values())

    def wanted(self, request: Request) -> int:
        """Bytes of state that a request has while it runs."""
        return sum(slab.bytes_per_request for slab in self._wanted(request))

    def could_fit(self, request: Request) -> bool:
        """Whether a request could have its state if no other ran."""
        return self.wanted(request) <= self.bound

    def fits(self, request: Request, without: Sequence[Request] = ()) -> bool:
        """Whether a request could have its state now, or once some that run give theirs up."""
        wanted = self.wanted(request)
        return not wanted or self.held - sum(map(self.wanted, without)) + wanted <= self.bound

    def open(self, request: Request) -> None:
        """A request that `fits` is admitted: its state is empty."""
        slabs = self._wanted(request)
        for slab in slabs:
            self._make_room(slab)
            slab.open(request)
            self._slabs[id(slab)] = slab
        if slabs:
            self._holders[request] = slabs

    def close(self, request: Request) -> None:
        """A request is preempted or has ended: its state is gone."""
        for slab in self._holders.pop(request, ()):
            slab.close(request)
            if not len(slab.slots_held):
                slab.slots_held.resize(0)
                del self._slabs[id(slab)]

    def check(self, running: Sequence[Request]) -> None:
        """Prove that the running requests have state, those that need it, and nobody else. Raises AssertionError."""
        in_need = {request for request in running if self._wanted(request)}
        assert set(self._holders) == in_need, "state is not where the running requests are"
        for slab in self._slabs.values():
            holders = sum(slab in slabs for slabs in self._holders.values())
            assert holders == len(slab.slots_held) > 0, "a slab's slots differ from its requests"
            assert slab.bytes == slab.slots_held.capacity * slab.bytes_per_request, "a slab's bytes are miscounted"
        assert self.held <= self.allocated <= self.bound, "state exceeds its bound"

    def _wanted(self, request: Request) -> tuple[Slab, ...]:
        keepers = (request.selector, self._retention)
        return tuple(slab for keeper in keepers if keeper is not None and request.token_limit > keeper.budget
                     for slab in keeper.slabs)  # fmt: skip

    def _make_room(self, slab: Slab) -> None:
        """A free slot in a slab: with some to spare, unless others must give up theirs for it."""
        slots, size = slab.slots_held, slab.bytes_per_request
        if slots.free:
            return
        more = grown(len(slots)) - len(slots)
        if self.allocated + more * size > self.bound:
            for other in self._slabs.values():
                other.slots_held.resize(len(other.slots_held))
            more = 1
        slots.resize(len(slots) + more)
