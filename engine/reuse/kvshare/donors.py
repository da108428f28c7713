"""What requests leave behind: segments of the exact part of their prompts, and texts that are compiled alone.

in context   copied out of a prompt's own blocks once it is computed; found by the same tenant (and salt) alone
isolated     computed behind a few neutral tokens and nothing else: by upload, or when a second prompt of those that share
             with others brings the same text; found as far as was asked for
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvloom.engine.cache import BlockTable, CacheManager
from kvloom.engine.client import ShareStats
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.request import Request
from kvloom.engine.reuse.kvshare import chunks
from kvloom.engine.reuse.kvshare.copying import copy_out
from kvloom.engine.reuse.kvshare.errands import Errand, Errands
from kvloom.engine.reuse.kvshare.matching import Bools, Ints
from kvloom.engine.reuse.kvshare.options import SCOPES
from kvloom.engine.reuse.kvshare.popularity import Popularity
from kvloom.engine.reuse.kvshare.scan import Placed
from kvloom.engine.reuse.kvshare.scopes import ScopeBook
from kvloom.engine.reuse.kvshare.segments import Segment, SegmentStore
from kvloom.engine.reuse.prefix import Domain


@dataclass(slots=True)
class Compiled:
    """A text that is compiled alone, and what came of it."""

    domain: Domain
    tokens: int = 0
    segments: int = 0
    bytes: int = 0


class Donors:
    """Fills the store."""

    def __init__(
        self,
        store: SegmentStore,
        scopes: ScopeBook,
        cache: CacheManager,
        errands: Errands,
        stats: ShareStats,
        *,
        special: frozenset[int],
        sink: Sequence[int],
    ) -> None:
        """special: ids that no segment holds; sink: neutral tokens in front of what is compiled alone."""
        self._store, self._scopes, self._cache, self._errands, self._stats = store, scopes, cache, errands, stats
        self._special = np.array(sorted(special), np.int64)
        self._sink = tuple(sink)
        self._numbers = itertools.count(1)
        self._popularity = Popularity()
        self._waiting: list[tuple[Request, BlockTable]] = []
        self._compiled: dict[Request, Compiled] = {}

    def barriers(self, tokens: Ints) -> Bools:
        """Where special tokens are."""
        return np.isin(tokens, self._special)

    # Compiled alone -----------------------------------------------------------------------------------------------------

    def compile(self, request: Request) -> None:
        """A text is being queued to be compiled. Raises InvalidRequestError if the tenant may not."""
        scope = request.kv.segment
        if scope == "none" or scope is None:
            raise InvalidRequestError(f"scope is {scope!r}; allowed: {', '.join(SCOPES[1:])}", param="scope")
        if not request.internal:
            self._scopes.check(request, scope, "scope")
        domain = self._scopes.of(request).of(scope)
        assert domain is not None
        request.prompt = (*self._sink, *request.prompt)
        self._compiled[request] = Compiled(domain)

    def compiled(self, request: Request) -> Compiled | None:
        """What came of a text that was compiled; None for other requests."""
        return self._compiled.get(request)

    # In context ---------------------------------------------------------------------------------------------------------

    def generated(self, request: Request, table: BlockTable) -> None:
        """A prompt is computed. Its exact part is copied out before the next step, or before its blocks go; a text that was to
        be compiled at once."""
        found = self._compiled.get(request)
        if found is None:
            self._waiting.append((request, table))
            if not request.internal:
                self._count_sighting(request)
            return
        placed, before = self._cache_of(request, table), (len(self._store), self._store.bytes)
        found.tokens = self._add(placed, len(self._sink), len(request.prompt), found.domain, request.tenant, isolated=True)
        found.segments, found.bytes = len(self._store) - before[0], self._store.bytes - before[1]
        self._stats.compiled_tokens += found.tokens

    def between_steps(self) -> None:
        """Do what must not delay the outputs of the step before."""
        for request, table in self._waiting:
            self._leave(request, table)
        self._waiting.clear()

    def close(self, request: Request) -> None:
        """The request's blocks are about to go."""
        for pair in [pair for pair in self._waiting if pair[0] is request]:
            self._waiting.remove(pair)
            self._leave(*pair)
        self._compiled.pop(request, None)

    def _leave(self, request: Request, table: BlockTable) -> None:
        end = min(request.exact, len(request.prompt))
        own = self._scopes.of(request).own
        placed = self._cache_of(request, table)
        self._stats.captured_tokens += self._add(placed, 0, end, own, request.tenant, isolated=False)

    def _add(self, placed: Placed, begin: int, end: int, domain: Domain, owner: str, *, isolated: bool) -> int:
        """Store what is not known yet of positions [begin, end) as segments of one donor. Returns tokens stored."""
        tokens = placed.tokens.astype(np.int32)[begin:end]
        donor, stored = next(self._numbers), 0
        for first, last in chunks.cut(tokens, barriers=self.barriers(tokens)):
            part = tokens[first:last]
            if self._store.known(domain, part):
                continue
            k, v = copy_out(placed, begin + first, begin + last, self._cache.storage)
            segment = Segment(
                domain=domain, tokens=part.copy(), k=k, v=v, position=begin + first, donor=donor, isolated=isolated, owner=owner
            )
            stored += len(part) if self._store.add(segment) else 0
        return stored

    def _count_sighting(self, request: Request) -> None:
        """Text that a second prompt brings, of those that share it with others, is compiled alone when there is time."""
        scope = request.kv.share or "tenant"
        domain = self._scopes.of(request).of(scope)
        if scope == "tenant" or domain is None:
            return
        tokens = np.array(request.prompt, np.int32)
        spans = chunks.cut(tokens, barriers=self.barriers(tokens))
        for first, last in self._popularity.second_sight(domain, tokens, spans, request.id, time.monotonic()):
            if not self._store.known(domain, tokens[first:last]):
                text = tuple(int(token) for token in tokens[first:last])
                self._errands.add(Errand(kind="compile", tokens=text, tenant=request.tenant, scope=scope))

    def _cache_of(self, request: Request, table: BlockTable) -> Placed:
        return Placed.of(request.tokens, table.blocks, self._cache.block_size)
