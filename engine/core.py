"""The engine: add requests, take steps. One step is schedule, run, sample, publish.

Single-threaded and synchronous; `thread_client` drives it from a thread of its own, `llm` from the caller's.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from kvloom.engine.cache import CacheManager
from kvloom.engine.client import EngineStats, GroupStats, ShareStats
from kvloom.engine.config import EngineConfig
from kvloom.engine.errors import ContextLengthError, InvalidRequestError
from kvloom.engine.logprobs import logprobs
from kvloom.engine.output import OutputState
from kvloom.engine.request import KVOptions, Request, RequestOutput, SamplingParams
from kvloom.engine.retention.razor import Razor
from kvloom.engine.reuse import REUSE
from kvloom.engine.reuse.kvshare.estimate import ShareEstimator
from kvloom.engine.reuse.kvshare.share import KVShare
from kvloom.engine.reuse.prefix import Domain, DomainFactory
from kvloom.engine.runner import Runner, StepResult
from kvloom.engine.sampler import SampleError, Sampler
from kvloom.engine.scheduling import LOOK_UP_COST, ORDERS, Chunk, Scheduler, StepPlan
from kvloom.engine.scheduling.cache_aware import PrefixEstimator
from kvloom.engine.selection.base import Correcting, extrapolates
from kvloom.engine.selection.policies import Selectors
from kvloom.engine.tenants import Tenants
from kvloom.engine.text import Tokenizer
from kvloom.engine.view import decodes
from kvloom.kernels.interface import Kernels

log = logging.getLogger("kvloom.engine")

LOGITS_ROWS = 128
"""Prompt log-probabilities are computed this many rows at a time: a row of logits is as wide as the vocabulary."""


class Limits(NamedTuple):
    """What a request may ask for, whatever else runs."""

    max_model_len: int
    trained_len: int
    """Positions that the model was trained for: without a selection that goes beyond, a request has no more."""
    vocab_size: int

    def check(
        self,
        prompt_length: int,
        largest_token: int,
        smallest_token: int,
        sampling: SamplingParams,
        kv: KVOptions,
        *,
        extrapolates: bool = False,
    ) -> int:
        """The request's token limit, prompt + output. Raises InvalidRequestError if it could never be served."""
        if prompt_length == 0:
            raise InvalidRequestError("the prompt is empty; give at least one token", param="prompt")
        if smallest_token < 0 or largest_token >= self.vocab_size:
            bad = smallest_token if smallest_token < 0 else largest_token
            raise InvalidRequestError(f"token id {bad} is outside the vocabulary, 0 to {self.vocab_size - 1}", param="prompt")
        longest = self.max_model_len if extrapolates else min(self.max_model_len, self.trained_len)
        limit, hint = "this server's context", ""
        if longest < self.max_model_len:
            limit = "what the model was trained for"
            hint = ", or use kv.selection token_select with re-indexed positions and a prefill_budget"
        room = longest - prompt_length
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {prompt_length} tokens; {limit} is {longest} tokens, prompt and output together; shorten the "
                f"prompt{hint}",
                param="prompt",
            )
        if sampling.max_tokens is not None and sampling.max_tokens > room:
            raise ContextLengthError(
                f"max_tokens is {sampling.max_tokens} and the prompt has {prompt_length} tokens; together they exceed {limit}, "
                f"{longest}; ask for at most {room}{hint}",
                param="max_tokens",
            )
        for name in ("logit_bias", "stop_token_ids", "forced_tokens"):
            largest = max(getattr(sampling, name), default=0)
            if largest >= self.vocab_size:
                raise InvalidRequestError(
                    f"token id {largest} is outside the vocabulary, 0 to {self.vocab_size - 1}", param=name
                )
        if kv.reuse is not None and kv.reuse not in REUSE:
            raise InvalidRequestError(f"kv.reuse is {kv.reuse!r}; allowed: {', '.join(REUSE)}", param="kv.reuse")
        return prompt_length + (room if sampling.max_tokens is None else sampling.max_tokens)


class Ending(NamedTuple):
    """A chunk whose last rows are sampled from: rows [first, last) of the step."""

    chunk: Chunk
    first: int
    last: int


def _sampled_rows(plan: StepPlan, result: StepResult) -> Iterator[tuple[int, int]]:
    """Rows to sample from: all of a chunk that verifies drafts, else its last."""
    for chunk, start in zip(plan.chunks, result.starts):
        stop = start + chunk.count
        yield (start if chunk.request.verifying else stop - 1), stop


class EngineCore:
    """Requests in, outputs out, one step at a time."""

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        cache: CacheManager,
        kernels: Kernels,
        selectors: Selectors,
        tokenizer: Tokenizer,
        domains: DomainFactory,
        limits: Limits,
        eos: frozenset[int],
        retention: Razor | None = None,
        share: KVShare | None = None,
        tenants: Tenants | None = None,
    ) -> None:
        """share: what serves approximate reuse; None if this engine cannot. tenants: weights and quotas."""
        tenants = tenants or Tenants()
        self.share = share
        self.limits = limits
        self.cache = cache
        self._reuse = config.cache.reuse
        self.retention = retention
        self.runner = runner
        self.observer: Callable[[Request, Tensor], None] | None = None
        """Called with (request, logits [1, vocab] fp32, valid only during the call) for every row a token is taken from."""
        self._kernels = kernels
        self._selectors = selectors
        self._tokenizer = tokenizer
        self._domains = domains
        self._eos = eos
        self._eos_ids = sorted(eos)
        self._sampler = Sampler(limits.vocab_size)
        self._order = ORDERS[config.scheduler.scheduler]
        self._estimator = PrefixEstimator(cache) if share is None else ShareEstimator(cache, share)
        self._scheduler = Scheduler(
            cache,
            self._order,
            max_seqs=config.scheduler.max_num_seqs,
            max_tokens=config.scheduler.max_batched_tokens,
            reuse=share,
            weight=lambda tenant: tenants.get(tenant).weight,
            max_wait=config.scheduler.max_wait_ms / 1000,
            estimator=self._estimator,
        )
        cache.limit(tenants.get)
        self._states: dict[str, OutputState] = {}
        self._sequence = 0
        self._steps = self._prompt_tokens = self._generation_tokens = 0
        self._step_seconds = 0.0
        self._drafts = self._drafted = self._accepted = 0
        self._errand: Request | None = None

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return len(self._scheduler) > 0

    @property
    def queued_tokens(self) -> int:
        """Tokens of waiting requests."""
        return self._scheduler.queued_tokens

    def domain(self, tenant: str, salt: str) -> Domain:
        """The scope inside which requests share KV."""
        return self._domains.domain(tenant, salt)

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequestError if it can never be served, or its id is in use."""
        if self.share is None:
            self._add(request)
            return
        try:
            self._add(request)
        except InvalidRequestError:
            self.share.discard(request)
            raise

    def _add(self, request: Request) -> None:
        if request.id in self._states:
            raise InvalidRequestError(f"request id {request.id!r} is already in use", param="request_id")
        if request.priority and not self._order.uses_priority:
            raise InvalidRequestError(
                f"priority is {request.priority}, but this server runs requests as they come; start it with "
                "--scheduler priority, or leave priority out",
                param="priority",
            )
        if self._errand is not None and not request.internal:
            self._give_way(self._errand)
        if request.kv.segment is not None:
            self._sharing().compile(request)
        prompt = request.prompt
        kv = request.kv if request.kv.segment is None else replace(request.kv, selection="dense")
        selector, request.draft_tokens = self._selectors.policy(kv)
        if selector is not None and self.retention is not None:
            raise InvalidRequestError(
                f"kv.selection asks for a method, but this server runs with --retention {self.retention.name}, which drops KV "
                "that methods choose from; leave it out, or use a server with --retention everything (razor_view reads there "
                "what razor keeps)",
                param="kv.selection",
            )
        request.token_limit = self.limits.check(
            len(prompt),
            max(prompt, default=0),
            min(prompt, default=0),
            request.sampling,
            request.kv,
            extrapolates=extrapolates(selector),
        )
        request.tokens = list(prompt)
        request.seed = secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed
        request.sequence = self._sequence
        self._sequence += 1
        request.selector = selector
        if isinstance(selector, Correcting) and not request.draft_tokens:  # verification leaves nothing approximate
            request.correct_every = selector.correct_every
        compiles = request.kv.segment is not None
        reuse = "exact" if compiles else request.kv.reuse or self._reuse
        if reuse == "approx":
            self._sharing().open(request)
        elif request.kv.reuse_options or (request.kv.share not in (None, "none") and not request.internal):
            name = "kvshare" if request.kv.reuse_options else "share"
            raise InvalidRequestError(
                f"kv.{name} is given, but kv.reuse is {reuse}; set kv.reuse to approx, or leave it out", param=f"kv.{name}"
            )
        reusing = reuse != "off"
        method = "kvshare compile" if compiles else selector.domain if selector is not None else ""
        table = self.cache.open(
            self._domains.domain(request.tenant, request.cache_salt, method),
            publishes=reusing and request.kv.share != "none",
            looks_up=reusing and request.sampling.prompt_logprobs is None,  # every prompt row must be computed
            align=max(1, selector.grid) if selector else 1,
        )
        if selector is not None:
            self._selectors.open(selector, request)
        if self.retention is not None:
            self.retention.open(request)
        self._states[request.id] = OutputState(request, self._tokenizer, self._eos)
        self._scheduler.add(request, table)

    def _sharing(self) -> KVShare:
        """What serves approximate reuse. Raises InvalidRequestError if nothing does."""
        if self.share is None:
            raise InvalidRequestError(
                "approximate reuse is asked for, but this server runs with --retention razor, which drops KV that would be "
                "reused; use kv.reuse exact",
                param="kv.reuse",
            )
        return self.share

    # The engine's own work ----------------------------------------------------------------------------------------------

    @property
    def has_errands(self) -> bool:
        """Whether there is work for an engine that is not busy."""
        return self.share is not None and len(self.share.errands) > 0

    def start_errand(self) -> None:
        """Begin a piece of that work: the engine is busy until it is done, or until a request comes."""
        request = self.share.errands.start() if self.share is not None else None
        if request is not None:
            request.arrival = time.monotonic()
            try:
                self.add(request)
            except InvalidRequestError as error:  # such as a text that is too long with the tokens in front of it
                log.warning("work for an idle engine is dropped: %s", error)
            else:
                self._errand = request

    def _give_way(self, errand: Request) -> None:
        """End the engine's own work, to begin it anew later."""
        self._sharing().give_way()
        self._errand = None
        self.abort(errand.id)

    # What others ask --------------------------------------------------------------------------------------------------

    def explain(self, prompt: Sequence[int], tenant: str, salt: str) -> dict[str, Any]:
        """What a prompt would reuse now; of a server without approximate reuse the exact prefix alone. Moves and pins nothing:
        no eviction order, no store order. The look-up is charged to the tenant."""
        table = self.cache.open(self._domains.domain(tenant, salt))
        try:
            cached = self.cache.peek(table, prompt)
        finally:
            self.cache.close(table)
        self._scheduler.charge(tenant, LOOK_UP_COST * len(prompt))
        found = (
            {"runs": [], "broken": [], "dropped": []} if self.share is None else self.share.look(prompt, cached, tenant, salt)
        )
        return {"prompt_tokens": len(prompt), "cached_tokens": cached, **found}

    def purge(self, tenant: str) -> int:
        """Forget a tenant's segments. Returns how many."""
        share = self._sharing()
        if self._errand is not None and self._errand.tenant == tenant:
            self._give_way(self._errand)
        share.errands.purge(tenant)
        return share.store.purge(tenant)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now. Its full blocks stay reusable. Returns its last output, or None if it is not here."""
        state = self._states.get(request_id)
        return None if state is None else self._finish(state, state.end("abort"))

    def step(self) -> list[RequestOutput]:
        """One step. Returns what it added to each request that got anything."""
        began = time.perf_counter()
        if self.share is not None:
            self.share.between_steps()
        plan = self._scheduler.schedule()
        outputs: list[RequestOutput] = []
        if plan.chunks:
            computing = time.perf_counter()
            result = self.runner.run(plan)
            if self.share is not None:
                self.share.timed(plan.rows, time.perf_counter() - computing)
            for chunk, exact in zip(plan.chunks, result.exact):
                self._scheduler.completed(chunk, exact=exact)
            for chunk, attended in zip(plan.chunks, result.attended):
                if chunk.samples and chunk.start >= len(chunk.request.prompt):
                    self._states[chunk.request.id].attended(attended, chunk.stop)
            self._score_prompts(plan, result)
            outputs = [output for output in self._sample(plan, result) if not self._own(output)]
            self._retain(plan)
        self._steps += 1
        self._step_seconds += time.perf_counter() - began
        return outputs

    def _own(self, output: RequestOutput) -> bool:
        """Whether an output is of the engine's own work, which nobody waits for."""
        if self._errand is None or output.id != self._errand.id:
            return False
        if output.finish_reason is not None:
            self._errand = None
        return True

    def _retain(self, plan: StepPlan) -> None:
        """Give back what local heads leave behind of requests that go on, once their prompt has been computed densely."""
        if self.retention is None:
            return
        for chunk in plan.chunks:
            request = chunk.request
            if request.id in self._states and request.generated and request.computed == len(request.tokens) - 1:
                self.retention.advance(request, chunk.table)

    def check(self) -> None:
        """Prove that no block is lost. Raises AssertionError."""
        self.cache.check()

    def stats(self) -> EngineStats:
        cache, scheduler = self.cache, self._scheduler
        pools = [group.pool for group in cache.groups]
        in_use: Counter[str] = sum((pool.in_use_by for pool in pools), Counter())
        cached: Counter[str] = sum((pool.cached_by for pool in pools), Counter())
        tenants = {
            tenant: {"in_use_blocks": in_use[tenant], "cached_blocks": cached[tenant]}
            for tenant in sorted(set(+in_use) | set(+cached))
        }
        groups = tuple(
            GroupStats(name=group.storage.spec.name, total=pool.total, free=pool.free, cached=pool.cached, in_use=pool.in_use)
            for group, pool in zip(cache.groups, pools)
        )
        counters = self._kernels.counters
        return EngineStats(
            running=len(scheduler.running),
            waiting=scheduler.waiting,
            capacity_tokens=cache.capacity_tokens,
            block_size=cache.block_size,
            groups=groups,
            prefix_query_tokens=cache.query_tokens,
            prefix_hit_tokens=cache.hit_tokens,
            evicted_blocks=sum(pool.evictions for pool in pools),
            preemptions=scheduler.preemptions,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            steps=self._steps,
            step_seconds=self._step_seconds,
            queued_tokens=scheduler.queued_tokens,
            kv_bytes_read=counters.kv_bytes + counters.score_bytes,
            kv_bytes={
                "tail": counters.kv_bytes - counters.list_kv_bytes,
                "list": counters.list_kv_bytes,
                "score": counters.score_bytes,
            },
            selection={name: replace(stats) for name, stats in self._selectors.stats.items()},
            drafts=self._drafts,
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
            tenants=tenants,
            share=ShareStats() if self.share is None else self.share.snapshot(),
        )

    def _sample(self, plan: StepPlan, result: StepResult) -> Iterator[RequestOutput]:
        ends = [Ending(chunk, *span) for chunk, span in zip(plan.chunks, _sampled_rows(plan, result)) if chunk.samples]
        if not ends:
            return
        logits = self.runner.logits(result, [row for end in ends for row in range(end.first, end.last)])
        at = 0
        for end in ends:
            own = logits[at : at + end.last - end.first]
            at += end.last - end.first
            request = end.chunk.request
            if request.verifying:
                yield from self._verify(request, own)
            elif request.draft_tokens and decodes(end.chunk) and request.sparse:
                self._draft(request, own)
            else:
                yield self._next(request, own)

    def _next(self, request: Request, logits: Tensor) -> RequestOutput:
        """Sample the next token of a request and hand it out. logits: [1, vocab]."""
        state = self._states[request.id]
        if self.observer is not None:
            self.observer(request, logits)
        if self.share is not None:
            self.share.observe(request, logits)
        token = self._sampler.sample(logits, [request], self._eos_ids)[0]
        if isinstance(token, SampleError):
            return self._finish(state, state.end("error", error=str(token)))
        if not request.first_token:
            request.first_token = time.monotonic()
            self._prompt_tokens += len(request.prompt)
            if self.share is not None:
                self.share.generated(request, self._scheduler.table(request))
        request.tokens.append(token)
        self._generation_tokens += 1
        top = request.sampling.logprobs
        output = state.push(token, None if top is None else logprobs(logits, [token], top)[0])
        if output.finish_reason is not None:
            return self._finish(state, output)
        self._correct(request)
        return output

    def _correct(self, request: Request) -> None:
        """Cache correction: once enough tokens have approximate KV, the next rows compute them again, densely, in place."""
        request.correcting = False
        if request.correct_every and len(request.tokens) - 1 - request.exact >= request.correct_every:
            assert request.selector is not None
            request.computed, request.correcting = request.exact, True
            request.selector.stats.refreshes += 1

    def _draft(self, request: Request, logits: Tensor) -> None:
        """Sample a draft: known to the engine, handed out only once a dense step agrees."""
        token = self._sampler.sample(logits, [request], self._eos_ids)[0]
        if not isinstance(token, SampleError):
            request.tokens.append(token)
            request.drafts += 1
            request.drafted += 1
            self._drafted += 1
        if isinstance(token, SampleError) or request.drafts >= request.draft_limit or token in self._eos:
            request.verifying = True
            request.computed = len(request.tokens) - request.drafts - 1

    def _verify(self, request: Request, logits: Tensor) -> Iterator[RequestOutput]:
        """Sample from the dense logits of every draft, [drafts + 1, vocab], as long as the drafts agree.

        A token's random number depends on its seed and index alone, and draft and verification draw with the same one. So what
        comes out is what dense decoding with that seed gives, and drafts that were sampled from a near distribution mostly
        agree: no correction of probabilities is needed.
        """
        drafts = request.drop_drafts()
        self._drafts += 1
        for i in range(len(drafts) + 1):
            output = self._next(request, logits[i : i + 1])
            agrees = output.finish_reason != "error" and i < len(drafts) and request.tokens[-1] == drafts[i]
            request.accepted += agrees
            self._accepted += agrees
            yield output
            if output.finish_reason is not None:
                return
            if not agrees:
                break
        request.computed = len(request.tokens) - 1
        request.exact = min(request.exact, request.computed)

    def _finish(self, state: OutputState, output: RequestOutput) -> RequestOutput:
        if self.share is not None:
            if state.request.kv.explain or state.request.kv.segment is not None:
                output = replace(output, usage=replace(output.usage, explanation=self.share.explain(state.request)))
            self.share.close(state.request)
        self._scheduler.finish(state.request)
        self._sampler.drop(state.request)
        if state.request.selector is not None:
            self._selectors.close(state.request.selector, state.request)
        if self.retention is not None:
            self.retention.close(state.request)
        del self._states[state.request.id]
        return output

    def _score_prompts(self, plan: StepPlan, result: StepResult) -> None:
        """Log-probabilities of prompt tokens, for the requests that want them: row p scores token p + 1."""
        for chunk, first in zip(plan.chunks, result.starts):
            request, found = chunk.request, self._states[chunk.request.id].prompt_logprobs
            if found is None:
                continue
            begin, end = len(found) - 1, min(chunk.stop, len(request.prompt) - 1)
            for low in range(begin, end, LOGITS_ROWS):
                high = min(low + LOGITS_ROWS, end)
                rows = [first + position - chunk.start for position in range(low, high)]
                targets = list(request.prompt[low + 1 : high + 1])
                top = request.sampling.prompt_logprobs
                assert top is not None
                found.extend(logprobs(self.runner.logits(result, rows), targets, top))
