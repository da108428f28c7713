"""KVShare: reuse of KV beyond the prefix, for one engine. The scheduler asks it when a request is admitted, the core tells it
what happens to requests.

    admitted   find runs in donors' segments, copy them in, have rows looked at                               `begin`
    looked at  check runs, rank their tokens, decide what is computed                                         `settle`
    decoding   some reused tokens computed again beside decode rows                                           `refresh`
    prompt in  what is exact of it becomes donors for the same tenant                                         `prefilled`
    idle       work for later: compile in isolation, heal, shadow checks                                      `JobQueue`

Nothing approximate becomes a donor, and nothing computed in the context of one tenant's prompt is found by another tenant.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kvloom.engine.cache import BlockTable, CacheManager
from kvloom.engine.cache.prefix import DomainFactory
from kvloom.engine.client import ShareStats
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.model.decoder import Decoder
from kvloom.engine.requests.isolation import blame
from kvloom.engine.requests.lifecycle import Feature
from kvloom.engine.requests.plan import Chunk, StepPlan
from kvloom.engine.requests.request import Request
from kvloom.engine.requests.tenants import Tenants
from kvloom.engine.reuse.kvshare.donors import Donors
from kvloom.engine.reuse.kvshare.jobs import Job, JobQueue
from kvloom.engine.reuse.kvshare.matching import Match, find
from kvloom.engine.reuse.kvshare.options import RepairOptions, ShareOptions, read_repair
from kvloom.engine.reuse.kvshare.ranker import Candidate, Ranker
from kvloom.engine.reuse.kvshare.repair import Repair, repair_of
from kvloom.engine.reuse.kvshare.report import TenantTokens, count, describe, explain
from kvloom.engine.reuse.kvshare.scan import Placed, Scan
from kvloom.engine.reuse.kvshare.scopes import ScopeBook, Scopes
from kvloom.engine.reuse.kvshare.segments import SegmentStore
from kvloom.engine.reuse.kvshare.shadow import Shadow
from kvloom.kernels.interface import Kernels

NEAR_END = 8
"""Tokens before a request's limit at which refreshing it is not worth while any more."""


class Plan(NamedTuple):
    """What was found for a request, and what became of it."""

    match: Match
    reason: str
    """Why nothing was reused; "" if something was."""


class KVShare(Feature):
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
        default: str,
        special: frozenset[int],
        sink: Sequence[int],
    ) -> None:
        """default: what requests reuse that do not say; special: ids of special tokens, which are
        never reused; sink: neutral tokens that stand in front of what is compiled in isolation."""
        self.options, self.store, self.stats = options, store, ShareStats()
        self.tenant_tokens = TenantTokens()
        self.jobs = JobQueue(gave_way=lambda: self._shadow.conclude("", whole=False))
        self.scopes = ScopeBook(domains, tenants)
        self._default, self._cache = default, cache
        self._ranker = Ranker(options, store, decoder, cache.storage, kernels, self.stats)
        self._donors = Donors(store, self.scopes, cache, self.jobs, self.stats, special=special, sink=sink)
        self._shadow = Shadow(options, self.jobs, self.stats)
        self._repairs: dict[Request, RepairOptions] = {}
        self._looking: dict[Request, tuple[Candidate, Scan]] = {}
        """What was found for requests that are being looked at."""
        self._plans: dict[Request, Plan] = {}

    def enabled(self, tenant: str) -> bool:
        """False once shadow checks of a tenant's requests have failed: they are served exactly."""
        return self._shadow.of(tenant).enabled

    # A request's life ---------------------------------------------------------------------------------------------------

    def received(self, request: Request) -> None:
        """See `Feature`: a text to be compiled alone gets its neutral beginning."""
        if request.kv.segment is not None:
            self._donors.compile(request)

    def opened(self, request: Request) -> None:
        """See `Feature`."""
        if request.kv.reuse_or(self._default) == "approx":
            self._open(request)

    def _open(self, request: Request) -> None:
        """Raises InvalidRequestError if what a request asks for cannot work."""
        kv, selector = request.kv, request.selector
        if not self.options.verified:
            raise InvalidRequestError(
                "kv.reuse is approx, but nobody has checked what that does to this model's answers; the operator can, with "
                "kvloom calibrate kvshare",
                param="kv.reuse",
            )
        options = read_repair(kv.reuse_options, self.options.repair)
        self.scopes.check(request, kv.share or "tenant", "kv.share")
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
        quality = self._shadow.of(request.tenant)
        request.approximate = quality.enabled and request.sampling.prompt_logprobs is None  # those need every row
        self._repairs[request] = replace(options, ratio=max(options.ratio, quality.least_ratio))
        if request.approximate:
            self._shadow.open(request, default=options == self.options.repair)

    def closed(self, request: Request) -> None:
        """See `Feature`."""
        self._donors.forget(request)
        self._shadow.forget(request)
        self._repairs.pop(request, None)
        self._looking.pop(request, None)
        self._plans.pop(request, None)
        if self.jobs.of(request) is not None:
            self.jobs.done()

    def prefilled(self, request: Request, table: BlockTable) -> None:
        """See `Feature`: the prompt may be left to others."""
        ours = request in self._repairs or self._donors.compiled(request) or self.jobs.of(request)
        if ours and request.kv.share != "none":
            self._donors.generated(request, table)

    def sampled(self, request: Request, logits: Tensor, row: int) -> None:
        """See `Feature`."""
        self._shadow.observe(request, logits, row)

    def stepping(self) -> None:
        """See `Feature`: what the last step's prompts leave behind is copied out."""
        self._donors.leave()

    def ended(self, request: Request) -> None:
        """See `Feature`."""
        self._donors.close(request)
        again = self._shadow.close(request)
        repair = repair_of(request)
        if repair is not None:
            self.stats.stale_left += len(repair.stale)
            if not again:
                self._heal(request, repair)
        job = self.jobs.of(request)
        if job is not None:
            self._shadow.conclude(request.tenant, whole=request.generated >= len(job.answer))
            self.stats.healed_tokens += len(request.prompt) if job.kind != "compile" and request.generated else 0

    def _heal(self, request: Request, repair: Repair) -> None:
        """Have a prompt that reused KV computed in full one day, if it brought enough that is new."""
        scope = request.kv.share or "tenant"
        if self.options.heal and scope != "none" and repair.kinds["fresh"] >= self.options.min_match:
            self.jobs.add(
                Job(kind="heal", tokens=tuple(request.prompt), tenant=request.tenant, salt=request.cache_salt, scope=scope)
            )

    # Admission ----------------------------------------------------------------------------------------------------------

    def begin(self, request: Request, table: BlockTable) -> float:
        """See `requests.plan.Reuse`."""
        self._looking.pop(request, None)  # it may have been preempted meanwhile
        placed, options = Placed.of(request.tokens, table.blocks, self._cache.block_size), self._repairs[request]
        began = time.perf_counter()
        match = self._search(placed.tokens, request.computed, self.scopes.of(request), options)
        self.stats.match_seconds += time.perf_counter() - began
        candidate = Candidate(match, placed, request.computed, options, request.seed)
        reason = self._ranker.refusal(candidate)
        if reason:
            self._decided(request, match, reason)
            return 0.0
        scan, work = self._ranker.begin(candidate)
        self._looking[request] = candidate, scan
        request.looks = scan
        return work

    def settle(self, request: Request) -> None:
        """See `requests.plan.Reuse`."""
        candidate, scan = self._looking.pop(request)
        reason = self._ranker.settle(request, candidate, scan)
        self._decided(request, candidate.match, reason)

    def _decided(self, request: Request, match: Match, reason: str) -> None:
        """Which rows of a prompt are computed is certain. reason: why all are."""
        self._plans[request] = Plan(match, reason)
        if request.repair is None and request.kv.share != "none":
            self._donors.expect(request)
        repair = repair_of(request)
        if repair is not None:
            kinds = repair.kinds
            request.reused = kinds["stale"]
            request.recomputed = kinds["boundary"] + kinds["ranked"] + kinds["rejected"]
        count(self.stats, self.tenant_tokens, request, reason, self.scopes.of(request).kinds())

    def search(self, request: Request, tokens: npt.NDArray[np.int64], prefix: int) -> Match:
        """What a request would find now behind its prefix. Changes nothing."""
        return self._search(tokens, prefix, self.scopes.of(request), self._repairs[request])

    def work(self, request: Request, reused: int, rest: int) -> float:
        """Rows of a full pass that a request takes of whose `rest` tokens behind the prefix so many are reused."""
        return self._ranker.work(reused, rest, self._repairs[request])

    @property
    def epoch(self) -> int:
        """Changes when another search may find something else."""
        return self.store.version + self._donors.changes

    def producer(self, request: Request, match: Match) -> Request | None:
        """A running request of the same tenant that will leave enough behind of what this one could not find."""
        return self._donors.producer(request, match, self.options.min_reusable)

    @property
    def open_requests(self) -> int:
        """Requests that may reuse KV approximately and have not ended."""
        return len(self._repairs)

    def stepped(self, plan: StepPlan, seconds: float) -> None:
        """See `Feature`."""
        self._ranker.stepped(plan, seconds)

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
            barriers=self._donors.barriers(tokens.astype(np.int32)),
        )

    # Decoding -----------------------------------------------------------------------------------------------------------

    def refresh(self, plan: StepPlan, rows: int) -> list[Chunk]:
        """See `requests.plan.Reuse`."""
        budget, found = min(rows, self.options.refresh_budget), []
        for chunk in plan.chunks:
            repair = repair_of(chunk.request)
            if budget <= 0:
                break
            if repair is None or not self._worth(chunk, repair):
                continue
            with blame(chunk.request):
                positions = repair.due(min(budget, repair.options.refresh), chunk.start)
            if len(positions):
                found.append(Chunk(chunk.request, chunk.table, int(positions[0]), len(positions), positions, refresh=True))
                budget -= len(positions)
        self.stats.refreshed_tokens += sum(chunk.count for chunk in found)
        return found

    def _worth(self, chunk: Chunk, repair: Repair) -> bool:
        request, options = chunk.request, repair.options
        if not options.refresh or repair.left or not chunk.decodes:
            return False
        if options.refresh_order == "sweep":
            return True
        return len(request.tokens) < request.token_limit - NEAR_END and repair.worth() >= self.options.stop_mass

    # What it tells -----------------------------------------------------------------------------------------------------

    @property
    def failed_tenants(self) -> Mapping[str, str]:
        """See `ShareStats.failed_tenants`."""
        return self._shadow.failed

    def snapshot(self) -> ShareStats:
        """Counters as of now."""
        stats, store, failed = self.stats, self.store, self.failed_tenants
        return replace(
            stats,
            tokens=stats.tokens.copy(),
            requests=stats.requests.copy(),
            runs=stats.runs.copy(),
            run_lengths=list(stats.run_lengths),
            recomputed_shares=list(stats.recomputed_shares),
            enabled="off" not in failed.values(),
            failed_tenants=failed,
            segments=len(store),
            segment_bytes=store.bytes,
            segment_capacity=store.capacity,
            segment_evictions=store.evictions,
            errands=len(self.jobs),
        )

    def explain(self, request: Request) -> dict[str, object]:
        """What was reused for a request, and why no more; or what was stored of a text that was compiled. Empty if neither."""
        compiled = self._donors.compiled(request)
        if compiled is not None:
            return {"segments": compiled.segments, "tokens": compiled.tokens, "bytes": compiled.bytes}
        plan = self._plans.get(request)
        if plan is None:
            return {}
        return explain(request, plan.match, plan.reason, self.scopes.of(request).kinds())

    def purge(self, tenant: str) -> int:
        """See `Feature`: segments."""
        self.jobs.purge(tenant)
        return self.store.purge(tenant)

    def reset(self) -> int:
        """See `Feature`: segments."""
        self.jobs.clear()
        return self.store.clear()

    def look(self, tokens: Sequence[int], prefix: int, tenant: str, salt: str) -> dict[str, object]:
        """What would be found now of a prompt behind its prefix. Changes nothing."""
        scopes = self.scopes.named(tenant, salt)
        match = self._search(np.array(tokens, np.int64), prefix, scopes, self.options.repair)
        return describe(match, scopes.kinds())
