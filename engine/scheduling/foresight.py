"""What comes after a step that is being computed, where that is certain before its tokens are known."""

from __future__ import annotations

from collections.abc import Sequence, Sized

from kvloom.engine.cache import CacheManager
from kvloom.engine.requests.plan import Chunk, StepPlan
from kvloom.engine.requests.request import Request, Status
from kvloom.engine.scheduling.pace import Pace

MOST_FORESEEN = 4
"""Steps in a row that are foreseen while somebody waits who found no room."""


class Foresight:
    """Of one scheduler's running requests."""

    def __init__(self, cache: CacheManager, running: Sequence[Request], waiting: Sized, pace: Pace) -> None:
        """running, waiting: those that do, as of now."""
        self._cache, self._running, self._waiting, self._pace = cache, running, waiting, pace
        self._settled, self._foreseen = False, 0
        """Whether the last plan found no room for anybody else, and nobody has come or gone since; steps foreseen since."""

    def planned(self, *, admitted: bool) -> None:
        """A step has been planned, and not foreseen. admitted: whether somebody was let in."""
        self._settled, self._foreseen = not admitted, 0

    def changed(self) -> None:
        """Somebody has come or gone."""
        self._settled = False

    def certain(self, plan: StepPlan) -> list[Chunk]:
        """Rows of a plan that is being computed, if it is certain what comes after it: all that run decode, nothing but a token
        can come of that, and nobody can come in. Else none."""
        if len(self._waiting) and not (self._settled and self._foreseen < MOST_FORESEEN):
            return []
        chunks = [chunk for chunk in plan.chunks if chunk.request.status is Status.RUNNING]
        return chunks if len(chunks) == len(self._running) and all(chunk.foreseeable for chunk in chunks) else []

    def foresee(self, chunks: Sequence[Chunk]) -> StepPlan:
        """The step after one of rows that are `certain`, while they are `foreseen`: everybody's next row, but for those that
        have all tokens they may have. Empty if there are not blocks enough: nobody is preempted for it."""
        going_on = [chunk for chunk in chunks if len(chunk.request.tokens) < chunk.request.token_limit]
        if not going_on or not all(self._cache.reserve(chunk.table, chunk.stop + 1) for chunk in going_on):
            return StepPlan([], [])
        self._foreseen += 1
        self._pace.begin(self._running)
        ahead = StepPlan([Chunk(chunk.request, chunk.table, chunk.stop, 1) for chunk in going_on], [])
        self._pace.planned(ahead)
        return ahead
