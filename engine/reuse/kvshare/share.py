"""KVShare: reuse of KV beyond the prefix, for one engine. The scheduler asks it when a request is admitted, the core tells it
what happens to requests.

    admitted   find runs in donors' segments, copy them in, check them, rank them, decide what is computed    `prepare`
    decoding   some reused tokens computed again beside decode rows                                           `refresh`
    prompt in  what is exact of it becomes donors for the same tenant                                         `generated`
    idle       work for later: compile in isolation, heal, shadow checks                                      `Errands`

Nothing approximate becomes a donor, and nothing computed in the context of one tenant's prompt is found by another tenant.
"""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kvloom.engine.cache import BlockTable, CacheManager
from kvloom.engine.client import ShareStats
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.model.decoder import Decoder
from kvloom.engine.request import Request
from kvloom.engine.reuse.kvshare import chunks
from kvloom.engine.reuse.kvshare.copying import copy_in, copy_out, covered
from kvloom.engine.reuse.kvshare.errands import SHADOW_TOKENS, Errand, Errands, compared, kept
from kvloom.engine.reuse.kvshare.matching import Match, Run, find
from kvloom.engine.reuse.kvshare.options import RATIOS, SCOPES, RepairOptions, ShareOptions, read_repair
from kvloom.engine.reuse.kvshare.popularity import Popularity
from kvloom.engine.reuse.kvshare.ranking import choose
from kvloom.engine.reuse.kvshare.repair import Floats, Repair
from kvloom.engine.reuse.kvshare.report import count, describe, explain
from kvloom.engine.reuse.kvshare.scan import Placed, Scanner
from kvloom.engine.reuse.kvshare.segments import Segment, SegmentStore
from kvloom.engine.reuse.prefix import Domain, DomainFactory
from kvloom.engine.scheduling.scheduler import Chunk, StepPlan
from kvloom.engine.tenants import Tenants
from kvloom.engine.view import decodes
from kvloom.kernels.interface import Kernels

log = logging.getLogger("kvloom.engine")

NEAR_END = 8
"""Tokens before a request's limit at which refreshing it is not worth while any more."""
SHADOW_WINDOW, SHADOW_LEAST = 32, 8
"""Shadow checks that are looked at together, and the fewest that decide."""
COPY_WORK = 0.02
"""Work of copying one token in, in rows of a full pass; a first guess, measured from then on."""
TIMED_ROWS = 256
"""Rows of a step whose time tells what a row costs."""


class Scopes(NamedTuple):
    """The domains in which a request may find segments, and the widest one that it leaves them to."""

    own: Domain
    group: Domain | None
    public: Domain | None

    def readable(self) -> list[Domain]:
        """In the order in which they are searched."""
        return [domain for domain in (self.own, self.group, self.public) if domain is not None]

    def of(self, scope: str) -> Domain | None:
        """The domain of a scope."""
        return {"tenant": self.own, "group": self.group, "public": self.public}.get(scope)

    def kinds(self) -> dict[bytes, str]:
        """Names of the scopes by their domain's key."""
        return {domain.key: name for name in SCOPES if (domain := self.of(name)) is not None}


@dataclass(slots=True)
class Compiled:
    """A text that is compiled alone, and what came of it."""

    domain: Domain
    tokens: int = 0
    segments: int = 0
    bytes: int = 0


class Plan(NamedTuple):
    """What was found for a request, and what became of it."""

    match: Match
    reason: str
    """Why nothing was reused; "" if something was."""


class KVShare:
    """Approximate reuse of one engine. Called on the engine's thread."""

    def __init__(
        self,
        options: ShareOptions,
        store: SegmentStore,
        decoder: Decoder,
        cache: CacheManager,
        kernels: Kernels,
        domains: DomainFactory,
        tenants: Tenants,
        *,
        rows: int,
        special: frozenset[int],
        sink: Sequence[int],
    ) -> None:
        """rows: of the largest step; special: ids of special tokens, which are never reused; sink: neutral tokens that stand
        in front of what is compiled in isolation."""
        self.options, self.store, self.stats = options, store, ShareStats()
        self.sink = tuple(sink)
        self._decoder, self._cache, self._kernels = decoder, cache, kernels
        self._domains, self._tenants = domains, tenants
        self._special = np.array(sorted(special), np.int64)
        self._scanner = Scanner(decoder, cache.storage, kernels, rows=rows, layer=options.check_layer)
        self._repairs: dict[Request, RepairOptions] = {}
        self._plans: dict[Request, Plan] = {}
        self._capture: list[tuple[Request, BlockTable]] = []
        self._compiles: dict[Request, Compiled] = {}
        self._seen: dict[Request, list[Tensor]] = {}
        self._checks: deque[tuple[float, float]] = deque(maxlen=SHADOW_WINDOW)
        self._checking: list[tuple[float, bool]] = []
        self._popularity = Popularity()
        self._random = random.Random()
        self._least_ratio = 0.0
        self.errands = Errands()
        self._donors = itertools.count(1)
        self._copy_work, self._row_seconds = COPY_WORK, 0.0
        self.enabled = True
        """False once a shadow check has failed: requests are served exactly."""

    # A request's life ---------------------------------------------------------------------------------------------------

    def open(self, request: Request) -> None:
        """A request that asks for approximate reuse is being queued. Raises InvalidRequestError if its options cannot work."""
        kv, selector = request.kv, request.selector
        if not self.options.verified:
            raise InvalidRequestError(
                "kv.reuse is approx, but nobody has checked what that does to this model's answers; the operator can, with "
                "kvloom calibrate kvshare",
                param="kv.reuse",
            )
        options = read_repair(kv.reuse_options, self.options.repair)
        if kv.share is not None and kv.share not in SCOPES:
            raise InvalidRequestError(f"kv.share is {kv.share!r}; allowed: {', '.join(SCOPES)}", param="kv.share")
        self._check_scope(request, kv.share or "tenant")
        if selector is not None and (selector.prompts == "sparse" or selector.domain):
            raise InvalidRequestError(
                "kv.reuse is approx, but this selection computes prompts sparsely, so their KV fits nobody else's; use reuse "
                "exact, or a selection with dense prompts",
                param="kv.reuse",
            )
        if request.correct_every:
            raise InvalidRequestError(
                "kv.reuse is approx, but this selection corrects KV from the first approximate token on, which would be the "
                "prompt; use reuse exact, or set the selection's correct_every to 0",
                param="kv.reuse",
            )
        if selector is not None and options.refresh and options.refresh_order == "sweep":
            raise InvalidRequestError(
                "kv.kvshare.refresh_order is sweep, which makes a request exact, but its selection's own decode steps are not; "
                "choose another order or no selection",
                param="kv.kvshare.refresh_order",
            )
        request.approximate = self.enabled and request.sampling.prompt_logprobs is None  # those need every row
        self._repairs[request] = replace(options, ratio=max(options.ratio, self._least_ratio))
        if request.approximate and self._random.random() < self.options.shadow_share:
            self._seen[request] = []

    def close(self, request: Request) -> None:
        """It has ended; its blocks are about to go back."""
        for waiting in [pair for pair in self._capture if pair[0] is request]:
            self._capture.remove(waiting)
            self._leave(*waiting)
        if request.repair is not None:
            self.stats.stale_left += len(request.repair.stale)
            self._follow_up(request, request.repair)
        self._repairs.pop(request, None)
        self._plans.pop(request, None)
        self._compiles.pop(request, None)
        self._seen.pop(request, None)
        if self.errands.of(request) is not None:
            self.errands.done()
            self._conclude()

    def scopes(self, tenant: str, salt: str) -> Scopes:
        """Whose segments a request of this tenant may use. A salt keeps it to itself."""
        own = self._domains.domain(tenant, salt, "kvshare tenant")
        if salt:
            return Scopes(own, None, None)
        group = self._tenants.get(tenant).group
        shared = self._domains.domain("", "", f"kvshare group {group}") if group else None
        return Scopes(own, shared, self._domains.domain("", "", "kvshare public"))

    # Admission ----------------------------------------------------------------------------------------------------------

    def prepare(self, request: Request, table: BlockTable) -> float:
        """See `scheduling.Reuse`."""
        placed = self._placed(request, table)
        options, prefix = self._repairs[request], request.computed
        began = time.perf_counter()
        match = self._search(placed.tokens, prefix, self.scopes(request.tenant, request.cache_salt), options)
        self.stats.match_seconds += time.perf_counter() - began
        reason, work = self._reuse(request, match, placed, prefix, options)
        self._plans[request] = Plan(match, reason)
        if request.repair is not None:
            kinds = request.repair.kinds
            request.reused = kinds["stale"]
            request.recomputed = kinds["boundary"] + kinds["ranked"] + kinds["rejected"]
        count(self.stats, request, reason, self.scopes(request.tenant, request.cache_salt).kinds())
        return work

    def search(self, request: Request, tokens: npt.NDArray[np.int64], prefix: int) -> Match:
        """What a request would find now behind its prefix. Changes nothing."""
        return self._search(tokens, prefix, self.scopes(request.tenant, request.cache_salt), self._repairs[request])

    def work(self, request: Request, reused: int, rest: int) -> float:
        """Rows of a full pass that a request takes of whose `rest` tokens behind the prefix so many are reused."""
        return self._work(reused, rest, self._repairs[request])

    @property
    def open_requests(self) -> int:
        """Requests that may reuse KV approximately and have not ended."""
        return len(self._repairs)

    def timed(self, rows: int, seconds: float) -> None:
        """A step that computed a prompt took so long: the measure for what copying costs."""
        if rows >= TIMED_ROWS:
            per_row = seconds / rows
            self._row_seconds += (0.2 if self._row_seconds else 1.0) * (per_row - self._row_seconds)

    def _search(self, tokens: npt.NDArray[np.int64], begin: int, scopes: Scopes, options: RepairOptions) -> Match:
        end = max(begin, len(tokens) - options.tail)
        return find(
            self.store,
            tokens.astype(np.int32),
            begin,
            end,
            scopes.readable(),
            min_match=self.options.min_match,
            short_match=self.options.min_match // 2,
            barriers=np.isin(tokens, self._special),
        )

    def _reuse(self, request: Request, match: Match, placed: Placed, prefix: int, options: RepairOptions) -> tuple[str, float]:
        """Copy, check, rank. Returns why not, if not, and the work in rows of a full pass."""
        reused, rest = sum(run.length for run in match.runs), len(placed.tokens) - prefix
        if reused < self.options.min_reusable:
            return "too little to reuse", 0.0
        work = self._work(reused, rest, options)
        if work > (1 - self.options.min_gain) * rest:
            return "too little to gain", 0.0
        began = time.perf_counter()
        copy_in(match.runs, placed, self._cache.storage, self._kernels, self._decoder.rotary.inv_freq)
        copied = time.perf_counter()
        self.stats.copy_seconds += copied - began
        self.stats.copied_tokens += reused
        if self._row_seconds:
            now = (copied - began) / reused / self._row_seconds
            self._copy_work += 0.2 * (min(now, 1.0) - self._copy_work)
        positions = covered(match.runs)
        if not self._scanner.identity(placed, positions):
            self._distrust(match.runs)
            return "layer 0 differs", 0.0
        score, deviation = self._score(match.runs, placed, prefix, options, request)
        self.stats.scan_seconds += time.perf_counter() - copied
        rejected = [mean > self.options.reject_above for mean in deviation]
        self._judge(match.runs, deviation, rejected)
        request.repair = choose(options, match.runs, prefix, len(placed.tokens), score, rejected=rejected, deviation=deviation)
        return "", work - request.repair.left

    def _work(self, reused: int, rest: int, options: RepairOptions) -> float:
        """Rows of a full pass that a prompt takes with reuse. rest: tokens behind the prefix."""
        scan = self._scanner.work_per_row * rest if options.scans else 0.0
        return rest - reused + options.ratio * reused + scan + self._copy_work * reused

    def _score(
        self, runs: Sequence[Run], placed: Placed, prefix: int, options: RepairOptions, request: Request
    ) -> tuple[Floats, list[float]]:
        """The policy's score of every reused position, and the mean relative deviation of every run if it was measured."""
        positions, length = covered(runs), len(placed.tokens)
        if options.policy == "random":
            return np.random.default_rng(request.seed).random(len(positions), np.float32), []
        if not options.scans:
            return np.ones(len(positions), np.float32), []
        found = self._scanner.deviation(placed, prefix, positions)
        bounds = np.cumsum([0, *(run.length for run in runs)])
        deviation = [float(found.relative[a:b].mean()) for a, b in itertools.pairwise(bounds)]
        if options.policy == "blend":
            return found.absolute, deviation
        fresh = np.setdiff1d(np.arange(prefix, length), positions, assume_unique=True)  # rows that are computed in any case
        probe = fresh[-self.options.probe :]
        attention = self._scanner.attention(placed, probe, deep=options.policy == "query")[positions]
        return (attention * found.absolute if options.policy == "dhd" else attention), deviation

    def _judge(self, runs: Sequence[Run], deviation: Sequence[float], rejected: Sequence[bool]) -> None:
        """Remember what was seen of segments; those that keep being far off go."""
        for run, mean, bad in zip(runs, deviation, rejected):
            self.stats.deviation_sum += mean
            self.stats.deviation_runs += 1
            self.stats.rejected_runs += bad
            for piece in run.pieces:
                piece.segment.deviation += 0.3 * (mean - piece.segment.deviation)
                if bad:
                    self.store.reject(piece.segment)
                else:
                    self.store.touch(piece.segment)

    def _distrust(self, runs: Sequence[Run]) -> None:
        """Layer 0 contradicts these segments: they do not hold what they claim to."""
        log.error("reused KV differs from the model's own at layer 0; %d runs are dropped", len(runs))
        self.stats.identity_failures += 1
        for segment in {piece.segment for run in runs for piece in run.pieces}:
            self.store.remove(segment)

    # Decoding -----------------------------------------------------------------------------------------------------------

    def refresh(self, plan: StepPlan, rows: int) -> list[Chunk]:
        """See `scheduling.Reuse`."""
        budget, found = min(rows, self.options.refresh_budget), []
        for chunk in plan.chunks:
            repair = chunk.request.repair
            if budget <= 0:
                break
            if repair is None or not self._worth(chunk, repair):
                continue
            positions = repair.due(min(budget, repair.options.refresh), chunk.start)
            if len(positions):
                found.append(Chunk(chunk.request, chunk.table, int(positions[0]), len(positions), positions, refresh=True))
                budget -= len(positions)
        self.stats.refreshed_tokens += sum(chunk.count for chunk in found)
        return found

    def _worth(self, chunk: Chunk, repair: Repair) -> bool:
        request, options = chunk.request, repair.options
        if not options.refresh or repair.left or not decodes(chunk):
            return False
        if options.refresh_order == "sweep":
            return True
        return len(request.tokens) < request.token_limit - NEAR_END and repair.worth() >= self.options.stop_mass

    # What it tells -----------------------------------------------------------------------------------------------------

    def snapshot(self) -> ShareStats:
        """Counters as of now."""
        stats, store = self.stats, self.store
        return replace(
            stats,
            tokens=stats.tokens.copy(),
            tenant_tokens={tenant: tokens.copy() for tenant, tokens in stats.tenant_tokens.items()},
            requests=stats.requests.copy(),
            runs=stats.runs.copy(),
            run_lengths=list(stats.run_lengths),
            recomputed_shares=list(stats.recomputed_shares),
            enabled=self.enabled,
            segments=len(store),
            segment_bytes=store.bytes,
            segment_capacity=store.capacity,
            segment_evictions=store.evictions,
            segment_bytes_by=dict(store.bytes_by),
            errands=len(self.errands),
        )

    def explain(self, request: Request) -> dict[str, object]:
        """What was reused for a request, and why no more; or what was stored of a text that was compiled. Empty if neither."""
        compiled = self._compiles.get(request)
        if compiled is not None:
            return {"segments": compiled.segments, "tokens": compiled.tokens, "bytes": compiled.bytes}
        plan = self._plans.get(request)
        if plan is None:
            return {}
        return explain(request, plan.match, plan.reason, self.scopes(request.tenant, request.cache_salt).kinds())

    def look(self, tokens: Sequence[int], prefix: int, tenant: str, salt: str) -> dict[str, object]:
        """What would be found now of a prompt behind its prefix. Changes nothing."""
        scopes = self.scopes(tenant, salt)
        match = self._search(np.array(tokens, np.int64), prefix, scopes, self.options.repair)
        return describe(match, scopes.kinds())

    # What requests leave behind -----------------------------------------------------------------------------------------

    def compile(self, request: Request) -> None:
        """A text is being queued to be compiled alone. Raises InvalidRequestError if the tenant may not."""
        scope = request.kv.segment or "tenant"
        if scope not in SCOPES[1:]:
            raise InvalidRequestError(f"scope is {scope!r}; allowed: {', '.join(SCOPES[1:])}", param="scope")
        if not request.internal:
            self._check_scope(request, scope)
        domain = self.scopes(request.tenant, request.cache_salt).of(scope)
        assert domain is not None
        request.prompt = (*self.sink, *request.prompt)
        self._compiles[request] = Compiled(domain)

    def generated(self, request: Request, table: BlockTable) -> None:
        """A request's prompt is computed. Its exact part is copied out before the next step, or before its blocks go."""
        compiled = self._compiles.get(request)
        if compiled is not None:
            placed, before = self._placed(request, table), (len(self.store), self.store.bytes)
            compiled.tokens = self._add(
                placed, len(self.sink), len(request.prompt), compiled.domain, request.tenant, isolated=True
            )
            compiled.segments, compiled.bytes = len(self.store) - before[0], self.store.bytes - before[1]
            self.stats.compiled_tokens += compiled.tokens
        elif (request in self._repairs or self.errands.of(request) is not None) and (request.kv.share or "tenant") != "none":
            self._capture.append((request, table))
            if not request.internal:
                self._count_sighting(request)

    def observe(self, request: Request, logits: Tensor) -> None:
        """A token is about to be drawn from these logits: [1, vocab]."""
        seen = self._seen.get(request)
        if seen is not None and request.repair is not None and len(seen) < SHADOW_TOKENS:
            seen.append(kept(logits))
            return
        errand = self.errands.of(request) if request.internal else None
        if errand is not None and request.generated < len(errand.seen):
            self._checking.append(compared(logits[0], errand.seen[request.generated]))

    def between_steps(self) -> None:
        """Do what must not delay the outputs of the step before."""
        for request, table in self._capture:
            self._leave(request, table)
        self._capture.clear()

    def _leave(self, request: Request, table: BlockTable) -> None:
        """Make donors of the exact part of a prompt: chunks that are not known yet, in context, for the same tenant alone."""
        scopes = self.scopes(request.tenant, request.cache_salt)
        placed = self._placed(request, table)
        end = min(request.exact, len(request.prompt))
        self.stats.captured_tokens += self._add(placed, 0, end, scopes.own, request.tenant, isolated=False)

    def _count_sighting(self, request: Request) -> None:
        """Text that a second prompt brings, of those that share it with others, is compiled alone when there is time."""
        scope = request.kv.share or "tenant"
        domain = self.scopes(request.tenant, request.cache_salt).of(scope)
        if scope == "tenant" or domain is None:
            return
        tokens = np.array(request.prompt, np.int32)
        spans = chunks.cut(tokens, barriers=np.isin(tokens, self._special))
        for first, last in self._popularity.second_sight(domain, tokens, spans, request.id, time.monotonic()):
            if not self.store.known(domain, tokens[first:last]):
                text = tuple(int(token) for token in tokens[first:last])
                self.errands.add(Errand(kind="compile", tokens=text, tenant=request.tenant, scope=scope))

    def _follow_up(self, request: Request, repair: Repair) -> None:
        """Queue what is to be done about a request that reused KV."""
        seen, scope = self._seen.get(request), request.kv.share or "tenant"
        prompt = tuple(request.prompt)
        if seen and request.generated:
            answer = tuple(request.output[: len(seen)])
            self.errands.add(Errand(kind="shadow", tokens=prompt, tenant=request.tenant, salt=request.cache_salt, scope=scope,
                                    answer=answer, seen=tuple(seen[: len(answer)])))  # fmt: skip
        elif self.options.heal and scope != "none" and repair.kinds["fresh"] >= self.options.min_match:
            self.errands.add(Errand(kind="heal", tokens=prompt, tenant=request.tenant, salt=request.cache_salt, scope=scope))

    def _conclude(self) -> None:
        """An errand has ended: if it was a shadow check, take its result in, and act if results are bad."""
        if not self._checking:
            return
        stats, found = self.stats, self._checking
        self._checking = []
        stats.shadow_checks += 1
        stats.shadow_tokens += len(found)
        stats.shadow_kl += sum(kl for kl, _ in found)
        stats.shadow_agree += sum(same for _, same in found)
        self._checks.append((sum(kl for kl, _ in found) / len(found), sum(same for _, same in found) / len(found)))
        if len(self._checks) < SHADOW_LEAST:
            return
        kl, top1 = (sum(values) / len(self._checks) for values in zip(*self._checks))
        if kl <= self.options.shadow_kl and top1 >= self.options.shadow_top1:
            return
        self._checks.clear()
        told = f"{SHADOW_LEAST} or more shadow checks found a mean KL of {kl:.3f} and {top1:.0%} agreement"
        ratio = max(self.options.repair.ratio, self._least_ratio)
        if self._least_ratio == 0.0 and ratio < 1:
            self._least_ratio = next(step for step in RATIOS if step > ratio)
            log.warning("%s; at least %g of reused tokens are computed from now on", told, self._least_ratio)
        else:
            self.enabled = False
            log.error("%s; approximate reuse is switched off, requests are served exactly", told)

    def _add(self, placed: Placed, begin: int, end: int, domain: Domain, owner: str, *, isolated: bool) -> int:
        """Store what is not known yet of positions [begin, end) as segments of one donor. Returns tokens stored."""
        tokens = placed.tokens.astype(np.int32)[begin:end]
        donor, stored = next(self._donors), 0
        for first, last in chunks.cut(tokens, barriers=np.isin(tokens, self._special)):
            part = tokens[first:last]
            if self.store.known(domain, part):
                continue
            k, v = copy_out(placed, begin + first, begin + last, self._cache.storage)
            segment = Segment(
                domain=domain, tokens=part.copy(), k=k, v=v, position=begin + first, donor=donor, isolated=isolated, owner=owner
            )
            stored += len(part) if self.store.add(segment) else 0
        return stored

    def _placed(self, request: Request, table: BlockTable) -> Placed:
        blocks = np.frombuffer(table.blocks, np.int32).copy()
        return Placed(np.array(request.tokens, np.int64), blocks, self._cache.block_size)

    def _check_scope(self, request: Request, scope: str) -> None:
        """Whether the tenant may leave segments there."""
        tenant = self._tenants.get(request.tenant)
        if scope == "group" and not tenant.group:
            raise InvalidRequestError(
                "kv.share is group, but this tenant is in none; the operator can give it one in the tenants file",
                param="kv.share",
            )
        if scope in ("group", "public") and request.cache_salt:
            raise InvalidRequestError(
                f"kv.share is {scope}, but cache_salt keeps this request to itself; leave one of them out", param="kv.share"
            )
        if scope == "public" and not tenant.publishes:
            raise InvalidRequestError(
                "kv.share is public, but this tenant may not publish; the operator can allow it in the tenants file",
                param="kv.share",
            )
