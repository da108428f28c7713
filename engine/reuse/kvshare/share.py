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
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kvloom.engine.cache import BlockTable, CacheManager
from kvloom.engine.client import ShareStats
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.isolation import blame
from kvloom.engine.model.decoder import Decoder
from kvloom.engine.request import Request
from kvloom.engine.reuse.kvshare.copying import copy_in, covered
from kvloom.engine.reuse.kvshare.donors import Donors
from kvloom.engine.reuse.kvshare.errands import Errand, Errands
from kvloom.engine.reuse.kvshare.matching import Match, Run, find
from kvloom.engine.reuse.kvshare.options import RepairOptions, ShareOptions, read_repair
from kvloom.engine.reuse.kvshare.ranking import choose
from kvloom.engine.reuse.kvshare.repair import Floats, Repair
from kvloom.engine.reuse.kvshare.report import TenantTokens, count, describe, explain
from kvloom.engine.reuse.kvshare.scan import Placed, Scanner
from kvloom.engine.reuse.kvshare.scopes import ScopeBook, Scopes
from kvloom.engine.reuse.kvshare.segments import SegmentStore
from kvloom.engine.reuse.kvshare.shadow import Shadow
from kvloom.engine.reuse.prefix import DomainFactory
from kvloom.engine.scheduling.plan import Chunk, StepPlan
from kvloom.engine.tenants import Tenants
from kvloom.kernels.interface import Kernels

log = logging.getLogger("kvloom.engine")

NEAR_END = 8
"""Tokens before a request's limit at which refreshing it is not worth while any more."""
COPY_WORK = 0.02
"""Work of copying one token in, in rows of a full pass; a first guess, measured from then on."""
TIMED_ROWS = 256
"""Rows of a step whose time tells what a row costs."""


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
        self.tenant_tokens = TenantTokens()
        self.errands = Errands()
        self.scopes = ScopeBook(domains, tenants)
        self._decoder, self._cache, self._kernels = decoder, cache, kernels
        self._scanner = Scanner(decoder, cache.storage, kernels, rows=rows, layer=options.check_layer)
        self._donors = Donors(store, self.scopes, cache, self.errands, self.stats, special=special, sink=sink)
        self._shadow = Shadow(options, self.errands, self.stats)
        self._repairs: dict[Request, RepairOptions] = {}
        self._plans: dict[Request, Plan] = {}
        self._copy_work, self._row_seconds = COPY_WORK, 0.0

    def enabled(self, tenant: str) -> bool:
        """False once shadow checks of a tenant's requests have failed: they are served exactly."""
        return self._shadow.of(tenant).enabled

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

    def compile(self, request: Request) -> None:
        """A text is being queued to be compiled alone. Raises InvalidRequestError if the tenant may not."""
        self._donors.compile(request)

    def forget(self, request: Request) -> None:
        """It has ended, or could not be queued at all: nothing of it stays, however far it came. Harmless if called again."""
        self._donors.forget(request)
        self._shadow.forget(request)
        self._repairs.pop(request, None)
        self._plans.pop(request, None)
        if self.errands.of(request) is not None:
            self.errands.done()

    def give_way(self) -> None:
        """The errand that runs begins anew later; what it has seen so far does not count."""
        self.errands.put_back()
        self._shadow.conclude("", whole=False)

    def generated(self, request: Request, table: BlockTable) -> None:
        """A request's prompt is computed."""
        ours = request in self._repairs or self._donors.compiled(request) or self.errands.of(request)
        if ours and request.kv.share != "none":
            self._donors.generated(request, table)

    def observe(self, request: Request, logits: Tensor) -> None:
        """A token is about to be drawn from these logits: [1, vocab]."""
        self._shadow.observe(request, logits)

    def between_steps(self) -> None:
        """Do what must not delay the outputs of the step before."""
        self._donors.between_steps()

    def close(self, request: Request) -> None:
        """It has ended; its blocks are about to go back. `forget` comes next."""
        self._donors.close(request)
        again = self._shadow.close(request)
        if request.repair is not None:
            self.stats.stale_left += len(request.repair.stale)
            if not again:
                self._heal(request, request.repair)
        errand = self.errands.of(request)
        if errand is not None:
            self._shadow.conclude(request.tenant, whole=request.generated >= len(errand.answer))
            self.stats.healed_tokens += len(request.prompt) if errand.kind != "compile" and request.generated else 0

    def _heal(self, request: Request, repair: Repair) -> None:
        """Have a prompt that reused KV computed in full one day, if it brought enough that is new."""
        scope = request.kv.share or "tenant"
        if self.options.heal and scope != "none" and repair.kinds["fresh"] >= self.options.min_match:
            self.errands.add(
                Errand(kind="heal", tokens=tuple(request.prompt), tenant=request.tenant, salt=request.cache_salt, scope=scope)
            )

    # Admission ----------------------------------------------------------------------------------------------------------

    def prepare(self, request: Request, table: BlockTable) -> float:
        """See `scheduling.Reuse`."""
        placed = Placed.of(request.tokens, table.blocks, self._cache.block_size)
        options, prefix = self._repairs[request], request.computed
        began = time.perf_counter()
        match = self._search(placed.tokens, prefix, self.scopes.of(request), options)
        self.stats.match_seconds += time.perf_counter() - began
        reason, work = self._reuse(request, match, placed, prefix, options)
        self._plans[request] = Plan(match, reason)
        if request.repair is None and request.kv.share != "none":
            self._donors.expect(request)
        if request.repair is not None:
            kinds = request.repair.kinds
            request.reused = kinds["stale"]
            request.recomputed = kinds["boundary"] + kinds["ranked"] + kinds["rejected"]
        count(self.stats, self.tenant_tokens, request, reason, self.scopes.of(request).kinds())
        return work

    def search(self, request: Request, tokens: npt.NDArray[np.int64], prefix: int) -> Match:
        """What a request would find now behind its prefix. Changes nothing."""
        return self._search(tokens, prefix, self.scopes.of(request), self._repairs[request])

    def work(self, request: Request, reused: int, rest: int) -> float:
        """Rows of a full pass that a request takes of whose `rest` tokens behind the prefix so many are reused."""
        return self._work(reused, rest, self._repairs[request])

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
            barriers=self._donors.barriers(tokens.astype(np.int32)),
        )

    def _reuse(self, request: Request, match: Match, placed: Placed, prefix: int, options: RepairOptions) -> tuple[str, float]:
        """Copy, check, rank. Returns why not, if not, and the work in rows of a full pass."""
        reused, rest = sum(run.length for run in match.runs), len(placed.tokens) - prefix
        if reused < self.options.min_reusable:
            repeats = np.zeros(len(placed.tokens), bool)
            for start, stop, why in match.dropped:
                repeats[start:stop] |= why == "periodic"
            enough = reused + int(repeats.sum()) >= self.options.min_reusable
            return ("periodic" if enough else "too little to reuse"), 0.0
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
        rejected = [not mean <= self.options.reject_above for mean in deviation]  # NaN too
        self._judge(match.runs, deviation, rejected)
        request.repair = choose(options, match.runs, prefix, len(placed.tokens), score, rejected=rejected, deviation=deviation)
        return "", self._preparing(reused, rest, options)

    def _work(self, reused: int, rest: int, options: RepairOptions) -> float:
        """Rows of a full pass that a prompt takes with reuse. rest: tokens behind the prefix."""
        return rest - reused + options.ratio * reused + self._preparing(reused, rest, options)

    def _preparing(self, reused: int, rest: int, options: RepairOptions) -> float:
        """Of those, what it takes to find out which rows to compute: copying, and a scan if there is one."""
        scan = self._scanner.work_per_row * rest if options.scans else 0.0
        return scan + self._copy_work * reused

    def _score(
        self, runs: Sequence[Run], placed: Placed, prefix: int, options: RepairOptions, request: Request
    ) -> tuple[Floats, list[float]]:
        """The policy's score of every reused position, and the mean relative deviation of every run if it was measured."""
        positions, length = covered(runs), len(placed.tokens)
        if options.policy == "random":
            return np.random.default_rng(request.seed % 2**64).random(len(positions), np.float32), []
        if not options.scans:
            return np.ones(len(positions), np.float32), []
        found = self._scanner.deviation(placed, prefix, positions)
        bounds = np.cumsum([0, *(run.length for run in runs)])
        deviation = [float(found.relative[a:b].mean()) for a, b in itertools.pairwise(bounds)]
        if options.policy == "blend":
            return found.absolute, deviation
        fresh = np.setdiff1d(np.arange(prefix, length), positions, assume_unique=True)  # rows that are computed in any case
        breaks = np.flatnonzero(np.diff(fresh) != 1)
        probe = fresh[breaks[-1] + 1 if len(breaks) else 0 :][-self.options.probe :]
        known = None if options.policy == "dhd" else np.concatenate([np.arange(prefix), positions])
        attention = self._scanner.attention(placed, probe, known)[positions]
        if options.policy == "query":
            return attention, deviation
        return found.absolute * (attention if options.policy == "dhd" else np.sqrt(attention)), deviation

    def _judge(self, runs: Sequence[Run], deviation: Sequence[float], rejected: Sequence[bool]) -> None:
        """Remember what was seen of segments; those that keep being far off go."""
        for run, mean, bad in zip(runs, deviation, rejected):
            self.stats.deviation_sum += mean
            self.stats.deviation_runs += 1
            self.stats.rejected_runs += bad
            for piece in reversed(run.pieces):  # a chain's beginning is given up last
                if (
                    not run.domain.shared
                ):  # how far others' segments are off is for each prompt to see: no prompt speaks for all
                    piece.segment.deviation += 0.3 * (mean - piece.segment.deviation)
                if bad and not run.domain.shared:
                    self.store.reject(piece.segment)
                elif not bad:
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
            errands=len(self.errands),
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

    def look(self, tokens: Sequence[int], prefix: int, tenant: str, salt: str) -> dict[str, object]:
        """What would be found now of a prompt behind its prefix. Changes nothing."""
        scopes = self.scopes.named(tenant, salt)
        match = self._search(np.array(tokens, np.int64), prefix, scopes, self.options.repair)
        return describe(match, scopes.kinds())
