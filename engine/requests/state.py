"""State of running requests beside their KV: what selection methods and retention remember from step to step, in one bound.

A request has state from its admission to its preemption or end, and only if it may grow beyond what its method reads anyway
(`Keeper.budget`). All of it lies in one array of words that is made at start-up and stays where it is; a request holds one
stretch of it, whose parts are its keepers' records.

    held        words of stretches that requests have       held + wanted <= bound, or the request waits

Stretches are handed out where they first fit. Where enough is free but not in one piece, they are moved together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.engine.cache.storage import lazy_zeros
from kvloom.engine.device import CPU
from kvloom.engine.requests.traits import Record

if TYPE_CHECKING:
    from kvloom.engine.requests.request import Request

WORD = 4
"""Bytes of a word."""
NO_STATE = -1
"""In place of where a request's record begins, if it has none."""


class Keeper(Protocol):
    """What keeps state of requests: a selection method, or a retention."""

    @property
    def budget(self) -> int:
        """Known tokens up to which a request needs no state."""
        ...

    @property
    def records(self) -> tuple[Record, ...]:
        """What it remembers of a longer one."""
        ...


@dataclass(slots=True)
class _Stretch:
    records: tuple[Record, ...]
    at: int
    """First word."""
    words: int


class StateMemory:
    """The array, and who holds what of it. Called on the engine's thread."""

    def __init__(self, bound: int, retention: Keeper | None = None, device: torch.device = CPU) -> None:
        """bound: bytes, of which at most 2^31 words are used. retention: keeps state of every request, beside its selection."""
        self.words: Tensor = lazy_zeros((min(bound // WORD, 2**31 - 1),), torch.int32, device)
        """[total] int32: memory of what is never used is never touched."""
        self.bound = bound
        self._retention = retention
        self._held: dict[Request, _Stretch] = {}
        """In the order of their words."""

    @property
    def held(self) -> int:
        """Bytes that requests have."""
        return sum(stretch.words for stretch in self._held.values()) * WORD

    @property
    def selection_bound(self) -> int:
        """Most bytes that a selection method may remember of a request; negative if not even retention's state fits."""
        own = () if self._retention is None else self._retention.records
        return self.bound - sum(record.words for record in own) * WORD

    def wanted(self, request: Request) -> int:
        """Bytes of state that a request has while it runs."""
        return sum(record.words for record in self._wanted(request)) * WORD

    def could_fit(self, request: Request) -> bool:
        """Whether a request could have its state if no other ran."""
        return self.wanted(request) <= WORD * len(self.words)

    def fits(self, request: Request, without: Sequence[Request] = ()) -> bool:
        """Whether a request could have its state now, or once some that run give theirs up."""
        wanted = self.wanted(request)
        return not wanted or self.held - sum(map(self.wanted, without)) + wanted <= WORD * len(self.words)

    def open(self, request: Request) -> None:
        """A request that `fits` is admitted: its state is empty."""
        records = self._wanted(request)
        if not records:
            return
        at = self._place(sum(record.words for record in records))
        stretch = _Stretch(records, at, sum(record.words for record in records))
        self._held[request] = stretch
        self._held = dict(sorted(self._held.items(), key=lambda item: item[1].at))
        for record in records:
            record.opened(request, self.words[at : at + record.words])
            at += record.words

    def close(self, request: Request) -> None:
        """A request is preempted or has ended: its state is gone."""
        stretch = self._held.pop(request, None)
        for record in () if stretch is None else stretch.records:
            record.closed(request)

    def at(self, record: Record, requests: Sequence[Request]) -> npt.NDArray[np.int32]:
        """[len(requests)]: the first word of each one's record, `NO_STATE` without."""
        return np.array([self._at(record, request) for request in requests], np.int32)

    def check(self, running: Sequence[Request]) -> None:
        """Prove that the running requests have state, those that need it, and nobody else. Raises AssertionError."""
        in_need = {request for request in running if self._wanted(request)}
        assert set(self._held) == in_need, "state is not where the running requests are"
        end = 0
        for request, stretch in self._held.items():
            assert stretch.at >= end and stretch.words * WORD == self.wanted(request), "stretches overlap, or are miscounted"
            end = stretch.at + stretch.words
        assert end <= len(self.words), "state exceeds its bound"

    def _at(self, record: Record, request: Request) -> int:
        stretch = self._held.get(request)
        at = 0 if stretch is None else stretch.at
        for own in () if stretch is None else stretch.records:
            if own is record:
                return at
            at += own.words
        return NO_STATE

    def _wanted(self, request: Request) -> tuple[Record, ...]:
        keepers = (request.selector, self._retention)
        return tuple(record for keeper in keepers if keeper is not None and request.token_limit > keeper.budget
                     for record in keeper.records)  # fmt: skip

    def _place(self, words: int) -> int:
        """Where that many free words begin."""
        end = 0
        for stretch in self._held.values():
            if stretch.at - end >= words:
                return end
            end = stretch.at + stretch.words
        if len(self.words) - end >= words:
            return end
        end = 0
        for stretch in self._held.values():  # in order, so that nothing is overwritten before it has moved
            if stretch.at != end:
                self.words[end : end + stretch.words] = self.words[stretch.at : stretch.at + stretch.words].clone()
                stretch.at = end
            end += stretch.words
        assert len(self.words) - end >= words, "a request is admitted whose state does not fit"
        return end
