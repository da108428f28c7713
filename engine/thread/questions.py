"""Questions to the engine beside requests (what would be reused, forget what is stored): answered between steps, within bounds.

While the engine is busy, at most one is answered before a step, and only once steps have had so many times as long as the one
before took. Tenants take turns; each may have a few waiting. When the engine is idle nobody is kept from anything.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from kvloom.engine.errors import OverloadedError

WAITING_OF_TENANT = 4
WAITING = 64
STEPS_SHARE = 20.0
"""Between two questions steps get so many times as long as the first took."""


class Question(NamedTuple):
    """Somebody's question: `answer` does the work and tells whoever asked."""

    tenant: str
    answer: Callable[[], None]


class Questions:
    """Those that wait. Put from any thread, answered on the engine's."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[Callable[[], None]]] = {}  # tenants in the order of their turns
        self._count = 0
        self._next = float("-inf")

    def __len__(self) -> int:
        return self._count

    def put(self, question: Question) -> None:
        """One more. Raises OverloadedError if too many wait."""
        with self._lock:
            own = len(self._waiting.get(question.tenant, ()))
            if own >= WAITING_OF_TENANT or self._count >= WAITING:
                raise OverloadedError(
                    f"{own} questions of this tenant wait for the engine, {self._count} in all; the limits are "
                    f"{WAITING_OF_TENANT} and {WAITING}; try again later"
                )
            self._waiting.setdefault(question.tenant, deque()).append(question.answer)
            self._count += 1

    def answer_one(self, *, busy: bool) -> tuple[str, float] | None:
        """Answer the next, if it is time: whose it was and the seconds it took. busy: others wait for the next step."""
        if not self._count or (busy and self._clock() < self._next):
            return None
        with self._lock:
            tenant = next(iter(self._waiting))
            own = self._waiting.pop(tenant)
            answer = own.popleft()
            if own:
                self._waiting[tenant] = own  # behind the others
            self._count -= 1
        began = self._clock()
        answer()
        ended = self._clock()
        self._next = ended + STEPS_SHARE * (ended - began)
        return tenant, ended - began
