"""What requests leave behind: segments of the exact part of their prompts, and texts that are compiled alone.

in context   copied out of a prompt's own blocks once it is computed; found by the same tenant (and salt) alone
isolated     computed behind neutral prose and nothing else: by upload, or when a second prompt of those that share with others
             brings the same text; found as far as was asked for, and by others only from its beginning (`chains`)
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvloom.engine.bounds import shown
from kvloom.engine.cache import BlockTable, CacheManager
from kvloom.engine.cache.prefix import Domain
from kvloom.engine.client import ShareStats
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.requests.isolation import blame
from kvloom.engine.requests.request import Request
from kvloom.engine.reuse.kvshare import chunks
from kvloom.engine.reuse.kvshare.chains import stretches
from kvloom.engine.reuse.kvshare.copying import copy_out
from kvloom.engine.reuse.kvshare.jobs import Job, JobQueue
from kvloom.engine.reuse.kvshare.matching import Bools, Ints, Match, find
from kvloom.engine.reuse.kvshare.options import SCOPES
from kvloom.engine.reuse.kvshare.popularity import Popularity
from kvloom.engine.reuse.kvshare.scan import Placed
from kvloom.engine.reuse.kvshare.scopes import ScopeBook
from kvloom.engine.reuse.kvshare.segment import START, Segment, link
from kvloom.engine.reuse.kvshare.segments import SegmentStore

LEAST_NEW = 64
"""Tokens of a text that came twice of which nothing is there yet: with fewer it is not compiled again."""
MOST_CHUNKS, MOST_PRODUCERS = 512, 16
"""Chunks of a prompt, and running requests, that are looked at to find out who is about to leave what a prompt lacks."""


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
        jobs: JobQueue,
        stats: ShareStats,
        *,
        special: frozenset[int],
        sink: Sequence[int],
    ) -> None:
        """special: ids that no segment holds; sink: neutral tokens in front of what is compiled alone."""
        self._store, self._scopes, self._cache, self._jobs, self._stats = store, scopes, cache, jobs, stats
        self._special = np.array(sorted(special), np.int64)
        self._sink = tuple(sink)
        self._numbers = itertools.count(1)
        self._popularity = Popularity()
        self._waiting: list[tuple[Request, BlockTable]] = []
        self._compiled: dict[Request, Compiled] = {}
        self._expected: dict[Request, dict[bytes, int]] = {}
        self.changes = 0
        """Counts changes of what is expected."""

    def barriers(self, tokens: Ints) -> Bools:
        """Where special tokens are."""
        return np.isin(tokens, self._special)

    # Compiled alone -----------------------------------------------------------------------------------------------------

    def compile(self, request: Request) -> None:
        """A text is being queued to be compiled. Raises InvalidRequestError if the tenant may not."""
        scope = request.kv.segment
        if scope == "none" or scope is None:
            raise InvalidRequestError(f"scope is {shown(scope)}; allowed: {', '.join(SCOPES[1:])}", param="scope")
        if not request.internal:
            self._scopes.check(request, scope, "scope")
        if len(request.prompt) < chunks.LEAST:
            raise InvalidRequestError(
                f"the text has {len(request.prompt)} tokens; allowed: {chunks.LEAST} or more, as no shorter one is ever reused",
                param="prompt",
            )
        domain = self._scopes.of(request).of(scope)
        assert domain is not None
        text = request.prompt
        if domain.shared:  # a text that begins with special tokens, such as one for its beginning, is found without them
            plain = np.flatnonzero(~self.barriers(np.array(text, np.int64)))
            text = text[int(plain[0]) :] if len(plain) else text
        request.prompt = (*self._sink, *text)
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
        placed = self._cache_of(request, table)
        stored = self._add(placed, len(self._sink), len(request.prompt), found.domain, request.tenant, isolated=True)
        found.segments = len(stored)
        found.tokens, found.bytes = sum(len(s.tokens) for s in stored), sum(s.nbytes for s in stored)
        self._stats.compiled_tokens += found.tokens

    def expect(self, request: Request) -> None:
        """A prompt is being computed in full: it will leave its chunks behind."""
        tokens = np.array(request.prompt, np.int32)
        spans = chunks.cut(tokens, barriers=self.barriers(tokens))[:MOST_CHUNKS]
        self._expected[request] = {tokens[first:last].tobytes(): last - first for first, last in spans}
        self.changes += 1

    def producer(self, request: Request, match: Match, least: int) -> Request | None:
        """A request with the same domain that is about to leave `least` tokens or more of those that `match` lacks."""
        others = [other for other in self._expected if (other.tenant, other.cache_salt) == (request.tenant, request.cache_salt)]
        if not others:
            return None
        others = others[-MOST_PRODUCERS:]
        tokens = np.array(request.tokens, np.int32)
        lacking = np.ones(len(tokens), bool)
        for run in match.runs:
            lacking[run.start : run.stop] = False
        names = [
            tokens[first:last].tobytes()
            for first, last in chunks.cut(tokens, barriers=self.barriers(tokens))[:MOST_CHUNKS]
            if lacking[first:last].all()
        ]
        shared = {other: sum(self._expected[other].get(name, 0) for name in names) for other in others}
        best = max(others, key=shared.__getitem__)
        return best if shared[best] >= least else None

    def leave(self) -> None:
        """Do what must not delay the outputs of the step before."""
        while self._waiting:
            request, table = self._waiting.pop(0)
            with blame(request):
                self._leave(request, table)
                self._arrived(request)

    def close(self, request: Request) -> None:
        """The request's blocks are about to go. `forget` comes next."""
        for pair in [pair for pair in self._waiting if pair[0] is request]:
            self._waiting.remove(pair)
            self._leave(*pair)

    def forget(self, request: Request) -> None:
        """It has ended, or could not be queued at all."""
        self._waiting = [pair for pair in self._waiting if pair[0] is not request]
        self._arrived(request)
        self._compiled.pop(request, None)

    def _arrived(self, request: Request) -> None:
        if self._expected.pop(request, None) is not None:
            self.changes += 1

    def _leave(self, request: Request, table: BlockTable) -> None:
        end = min(request.exact, len(request.prompt))
        own = self._scopes.of(request).own
        placed = self._cache_of(request, table)
        stored = self._add(placed, 0, end, own, request.tenant, isolated=False)
        self._stats.captured_tokens += sum(len(segment.tokens) for segment in stored)

    def _add(self, placed: Placed, begin: int, end: int, domain: Domain, owner: str, *, isolated: bool) -> list[Segment]:
        """Store what is not known yet of positions [begin, end) as segments of one donor. Returns what was stored."""
        tokens = placed.tokens.astype(np.int32)[begin:end]
        donor = next(self._numbers)
        stored: list[Segment] = []
        for first, last, before in self._parts(tokens, domain):
            part = tokens[first:last]
            known = self._store.known(domain, part, isolated=isolated, before=before)
            if known is not None:
                self._store.claim(known, owner)
                continue
            k, v = copy_out(placed, begin + first, begin + last, self._cache.storage)
            segment = Segment(
                domain=domain, tokens=part.copy(), k=k, v=v, position=begin + first, donor=donor, isolated=isolated,
                owner=owner, before=before,
            )  # fmt: skip
            if self._store.add(segment):
                stored.append(segment)
        return stored

    def _parts(self, tokens: Ints, domain: Domain) -> list[tuple[int, int, bytes]]:
        """Spans that are stored of a text, and what each is linked to. In a shared domain the last one first: what is stored
        last is given up last, and the end of a chain is worth nothing without its beginning."""
        spans = chunks.cut(tokens, barriers=self.barriers(tokens))
        if not domain.shared:
            return [(first, last, START) for first, last in spans]
        parts, before = [], START
        for first, last in stretches(spans):
            parts.append((first, last, before))
            before = link(domain, before, tokens[first:last])
        return parts[::-1]

    def _count_sighting(self, request: Request) -> None:
        """Text that a second prompt brings, of those that share it with others, is compiled alone when there is time."""
        scope = request.kv.share or "tenant"
        domain = self._scopes.of(request).of(scope)
        if scope == "tenant" or domain is None:
            return
        tokens = np.array(request.prompt, np.int32)
        spans = chunks.cut(tokens, barriers=self.barriers(tokens))
        for first, last in self._popularity.second_sight(domain, tokens, spans, request.id, time.monotonic()):
            part = tokens[first:last]
            there = sum(run.length for run in find(self._store, part, 0, len(part), [domain]).runs)
            if len(part) - there >= LEAST_NEW:
                text = tuple(int(token) for token in part)
                self._jobs.add(Job(kind="compile", tokens=text, tenant=request.tenant, scope=scope))

    def _cache_of(self, request: Request, table: BlockTable) -> Placed:
        return Placed.of(request.tokens, table.blocks, self._cache.block_size)
