"""A request's way through what is computed of it: its next rows, and what it means that they have been.

unprepared    admitted, and KV from elsewhere may be looked for      `prepare`
looks         rows that are looked at before it is decided           `chunk`, `completed`
repair        the rows of a prompt that are computed                 the same
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvloom.engine.cache import BlockTable, CacheManager
from kvloom.engine.requests.plan import Chunk, Reuse, fitting
from kvloom.engine.requests.request import Request
from kvloom.engine.scheduling.fairness import Fairness
from kvloom.engine.scheduling.publishing import exact_until

LOOK_UP_COST = 0.01
"""Work of looking a token of a prompt up, in rows of a full pass: what one look-up compares is bounded per token."""


class Progress:
    """Of one scheduler's running requests."""

    def __init__(
        self,
        cache: CacheManager,
        tables: Mapping[Request, BlockTable],
        fairness: Fairness,
        reuse: Reuse | None,
        max_tokens: int,
        charge: Callable[[str, float], None],
    ) -> None:
        """tables: of all requests; max_tokens: rows of a step; charge: a tenant, for work in rows of a full pass."""
        self._cache, self._tables, self._fairness, self._reuse = cache, tables, fairness, reuse
        self._max_tokens, self._charge = max_tokens, charge

    def completed(self, chunk: Chunk, *, saw_everything: bool = True) -> None:
        """The chunk's KV is stored, and published as far as it is exact. saw_everything: its rows, if they are decode rows."""
        request = chunk.request
        self._fairness.computed(request, chunk.start, chunk.work)
        if chunk.look is not None:
            self._looked(request, chunk.count)
            return
        if chunk.refresh:
            assert request.repair is not None and chunk.positions is not None
            request.repair.refresh(chunk.positions)
        else:
            if request.repair is not None and request.repair.left:
                request.repair.advance(chunk.count)
            request.computed = chunk.stop
        if chunk.start <= request.exact:
            healed = chunk.refresh and request.taint > request.computed
            until = exact_until(chunk, saw_everything=saw_everything)
            request.exact = request.computed if healed else min(until, request.taint)
        self.publish(chunk, min(request.exact, len(request.tokens) - request.drafts))

    def publish(self, chunk: Chunk, until: int) -> None:
        """What is computed of a chunk's request is exact up to there: it can be found, and counts as written if it is of the
        prompt."""
        new = self._cache.commit(chunk.table, chunk.request.tokens, until)
        if not chunk.request.generated:
            chunk.request.written += new * self._cache.block_size

    def _looked(self, request: Request, count: int) -> None:
        """So many more rows have been looked at; after the last it is decided which are computed."""
        assert self._reuse is not None and request.looks is not None
        request.looks.advance(count)
        if not request.looks.left:
            request.looks = None
            self._reuse.settle(request)

    def prepare(self, request: Request) -> int:
        """Let KV be reused for a request that has been admitted. Returns the work in rows, at most a step's."""
        assert self._reuse is not None
        request.unprepared = False
        work = round(min(max(0.0, self._reuse.begin(request, self._tables[request])), self._max_tokens))
        self._fairness.computed(request, 0, work)
        self._charge(request.tenant, LOOK_UP_COST * len(request.tokens))
        return work

    def chunk(self, request: Request, budget: int) -> Chunk | None:
        """The request's next rows, as many as fit."""
        count = fitting(request, budget)
        if count == 0:
            return None
        table, repair = self._tables[request], request.repair
        if request.looks is not None:
            positions, look = request.looks.next(count)
            return Chunk(request, table, int(positions[0]), len(positions), positions, look=look)
        if repair is None or not repair.left:
            return Chunk(request, table, request.computed, count)
        seeds = request.selector is not None and request.selector.prompts == "seed"  # looks at the last rows: they stand alone
        rows = repair.next(count, tail_alone=seeds)
        scattered = None if rows[-1] - rows[0] == len(rows) - 1 else rows
        return Chunk(request, table, int(rows[0]), len(rows), scattered)
