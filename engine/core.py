"""The engine: add requests, take steps. One step is schedule, run, sample, publish.

Single-threaded and synchronous; `thread_client` drives it from a thread of its own, `llm` from the caller's.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from kvloom.engine.admission import Admission, Hold, sharing
from kvloom.engine.cache import CacheManager
from kvloom.engine.client import EngineStats, TenantStats
from kvloom.engine.config import EngineConfig
from kvloom.engine.errors import EngineDeadError, InternalError, InvalidRequestError, KVLoomError
from kvloom.engine.isolation import INTERNAL, MOST_FAILURES, Blamed, Holdings, failed
from kvloom.engine.limits import Limits
from kvloom.engine.logprobs import logprobs
from kvloom.engine.output import OutputState
from kvloom.engine.replay import append, correct, replay_next
from kvloom.engine.request import Request, RequestOutput
from kvloom.engine.retention.razor import Razor
from kvloom.engine.reuse.kvshare.estimate import ShareEstimator
from kvloom.engine.reuse.kvshare.share import KVShare
from kvloom.engine.reuse.prefix import Domain, DomainFactory
from kvloom.engine.runner import Runner, StepResult
from kvloom.engine.sampler import SampleError, Sampler
from kvloom.engine.scheduling import ORDERS, Chunk, Scheduler, StepPlan
from kvloom.engine.scheduling.cache_aware import PrefixEstimator
from kvloom.engine.selection.policies import Selectors
from kvloom.engine.state import StateMemory
from kvloom.engine.statistics import Statistics
from kvloom.engine.tenants import Tenants
from kvloom.engine.text import Tokenizer
from kvloom.kernels.interface import Kernels

log = logging.getLogger("kvloom.engine")

LOGITS_ROWS = 128
"""Prompt log-probabilities are computed this many rows at a time: a row of logits is as wide as the vocabulary."""


class Ending(NamedTuple):
    """A chunk whose last rows are sampled from: rows [first, last) of the step."""

    chunk: Chunk
    first: int
    last: int


class Computed(NamedTuple):
    """What a step's model run gave."""

    result: StepResult
    ends: list[Ending]
    logits: Tensor | None
    """[rows of all ends, vocab] fp32, in their order; None without any."""


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
        states: StateMemory,
        retention: Razor | None = None,
        share: KVShare | None = None,
        tenants: Tenants | None = None,
    ) -> None:
        """states: memory of what selection and retention remember; share: what serves approximate reuse; None if this engine
        cannot. tenants: weights and quotas."""
        self._tenants = tenants = tenants or Tenants()
        self.states = states
        self.share = share
        self.cache = cache
        self.retention = retention
        self.runner = runner
        self.observer: Callable[[Request, Tensor], None] | None = None
        """Called with (request, logits [1, vocab] fp32, valid only during the call) for every row a token is taken from."""
        self._tokenizer = tokenizer
        self._domains = domains
        self._eos = frozenset(token for token in eos if 0 <= token < limits.vocab_size)
        self._eos_ids = sorted(self._eos)
        self._sampler = Sampler(limits.vocab_size)
        order = ORDERS[config.scheduler.scheduler]
        self._estimator = PrefixEstimator(cache) if share is None else ShareEstimator(cache, share)
        self._scheduler = Scheduler(
            cache,
            order,
            max_seqs=config.scheduler.max_num_seqs,
            max_tokens=config.scheduler.max_batched_tokens,
            step_seconds=config.scheduler.step_time_ms / 1000 or math.inf,
            reuse=share,
            states=self.states,
            weight=lambda tenant: tenants.get(tenant).weight,
            max_wait=config.scheduler.max_wait_ms / 1000,
            estimator=self._estimator,
        )
        cache.limit(tenants.get)
        self._states: dict[str, OutputState] = {}
        self._holdings = Holdings()
        self._admission = Admission(
            limits=limits,
            cache=cache,
            domains=domains,
            selectors=selectors,
            retention=retention,
            share=share,
            states=self.states,
            reuse=config.cache.reuse,
            uses_priority=order.uses_priority,
        )
        self._failures = 0
        """Steps in a row that failed with nobody to blame."""
        self._sequence = 0
        self._statistics = Statistics(
            cache=cache,
            scheduler=self._scheduler,
            kernels=kernels,
            selectors=selectors,
            states=self.states,
            share=share,
        )
        self._errand: Request | None = None

    @property
    def limits(self) -> Limits:
        """What requests may ask for."""
        return self._admission.limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        """From the next request on, for measurements beyond what the model was trained for."""
        self._admission.limits = limits

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
        """Queue a request. Raises InvalidRequestError if it can never be served, or its id is in use; InternalError if
        something of the engine's own failed. Nothing of it stays then."""
        if request.id in self._states:
            raise InvalidRequestError(f"request id {request.id!r} is already in use", param="request_id")
        if self._errand is not None and not request.internal:
            self._give_way(self._errand)
        try:
            with self._holdings.opening(request) as hold:
                self._queue(request, hold)
        except KVLoomError:
            raise
        except Exception:
            self._statistics.internal_errors += 1
            log.exception("request %s could not be queued", request.id)
            raise InternalError(INTERNAL) from None

    def _queue(self, request: Request, hold: Hold) -> None:
        table = self._admission.open(request, self._sequence, hold)
        hold(self._scheduler.finish, request)
        self._scheduler.add(request, table)
        self._sequence += 1
        self._states[request.id] = OutputState(request, self._tokenizer, self._eos)
        hold(self._states.pop, request.id)
        hold(self._sampler.drop, request)
        if self.share is not None:
            hold(self.share.close, request)

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
            except KVLoomError as error:  # such as a text that is too long with the tokens in front of it
                log.warning("work for an idle engine is dropped: %s", error)
            else:
                self._errand = request

    def _give_way(self, errand: Request) -> None:
        """End the engine's own work, to begin it anew later."""
        sharing(self.share).give_way()
        self._errand = None
        self.abort(errand.id)

    def weight(self, tenant: str) -> float:
        """A tenant's share beside others."""
        return self._tenants.get(tenant).weight

    def charge(self, tenant: str, seconds: float) -> None:
        """Work that was done for a tenant between steps."""
        self._scheduler.charge_time(tenant, seconds)

    # What others ask --------------------------------------------------------------------------------------------------

    def explain(self, prompt: Sequence[int], tenant: str, salt: str) -> dict[str, Any]:
        """What a prompt would reuse now; of a server without approximate reuse the exact prefix alone. Moves and pins nothing:
        no eviction order, no store order."""
        table = self.cache.open(self._domains.domain(tenant, salt))
        try:
            cached = self.cache.peek(table, prompt)
        finally:
            self.cache.close(table)
        nothing: dict[str, Any] = {"runs": [], "broken": [], "dropped": []}
        found = nothing if self.share is None else self.share.look(prompt, cached, tenant, salt)
        return {"prompt_tokens": len(prompt), "cached_tokens": cached, **found}

    def purge(self, tenant: str) -> int:
        """Forget a tenant's segments. Returns how many."""
        share = sharing(self.share)
        if self._errand is not None and self._errand.tenant == tenant:
            self._give_way(self._errand)
        share.errands.purge(tenant)
        return share.store.purge(tenant)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now. Its full blocks stay reusable. Returns its last output, or None if it is not here."""
        state = self._states.get(request_id)
        if state is None:
            return None
        state.request.drop_drafts()
        outputs: list[RequestOutput] = []
        with self._alone(state.request, outputs):
            outputs.append(self._finish(state, state.end("abort")))
        return outputs[-1]

    def step(self) -> list[RequestOutput]:
        """One step. Returns what it added to each request that got anything, and the end of those that something failed for.

        Raises EngineDeadError when one step after the other fails with nobody to blame.
        """
        began = time.perf_counter()
        outputs: list[RequestOutput] = []
        plan: StepPlan | None = None
        try:
            if self.share is not None:
                self.share.between_steps()
            plan = self._scheduler.schedule()
            if plan.chunks:
                computed = self._compute(plan)
                self._failures = 0
                self._publish(plan, computed, outputs)
            self._scheduler.stepped()
        except Blamed as failure:
            outputs += self._fail(failure.request)
        except Exception:
            outputs += self._fail_step(plan)
        of_prompts = sum(chunk.count for chunk in plan.chunks if chunk.prefills) if plan else 0
        self._statistics.stepped(time.perf_counter() - began, plan.rows if plan else 0, of_prompts)
        return [output for output in outputs if not self._own(output)]

    def _compute(self, plan: StepPlan) -> Computed:
        """Run the model: what all requests of a step depend on."""
        began = time.perf_counter()
        result = self.runner.run(plan)
        if self.share is not None:
            self.share.timed(plan.rows, time.perf_counter() - began)
        ends = [
            Ending(chunk, *span)
            for chunk, span in zip(plan.chunks, _sampled_rows(plan, result))
            if chunk.samples and not chunk.request.replay
        ]
        rows = [row for end in ends for row in range(end.first, end.last)]
        return Computed(result, ends, self.runner.logits(result, rows) if rows else None)

    def _publish(self, plan: StepPlan, computed: Computed, outputs: list[RequestOutput]) -> None:
        """What a step computed, request by request: what fails here fails for one of them."""
        result, at = computed.result, 0
        for i, (chunk, seen) in enumerate(zip(plan.chunks, result.seen())):
            with self._alone(chunk.request, outputs):
                self._scheduler.completed(chunk, saw_everything=seen.everything)
                if chunk.samples and chunk.start >= len(chunk.request.prompt) and not chunk.request.replay:
                    self._states[chunk.request.id].attended(seen.attended, chunk.stop)
                self._score_prompt(chunk, result, result.starts[i])
                if chunk.samples and chunk.request.replay:
                    replay_next(chunk.request)
                    self._statistics.replayed += 1
        for end in computed.ends:
            first, at = at, at + end.last - end.first
            with self._alone(end.chunk.request, outputs):
                if computed.logits is not None and end.chunk.request.id in self._states:
                    outputs.extend(self._sample(end, computed.logits[first:at]))
        if self.retention is not None:
            for chunk in plan.chunks:
                with self._alone(chunk.request, outputs):
                    self._retain(chunk, self.retention)

    @contextmanager
    def _alone(self, request: Request, outputs: list[RequestOutput]) -> Iterator[None]:
        """Work for one request, which ends if that fails."""
        try:
            yield
        except Exception:
            outputs += self._fail(request)

    def _fail(self, request: Request) -> list[RequestOutput]:
        """End a request for which something has just failed. Nothing if it has ended already."""
        self._statistics.internal_errors += 1
        log.exception("something failed for request %s, which ends", request.id)
        return [failed(request)] if self._holdings.close(request) else []

    def _fail_step(self, plan: StepPlan | None) -> list[RequestOutput]:
        """A step has failed and nobody is to blame: whoever had rows in it ends, or everybody that runs if that is not known.

        Raises EngineDeadError after too many of them in a row.
        """
        self._failures += 1
        self._statistics.internal_errors += 1
        log.exception("a step has failed, the %d. in a row", self._failures)
        if self._failures >= MOST_FAILURES:
            raise EngineDeadError(
                f"the engine has ended after {self._failures} failed steps in a row; the server's log says more"
            )
        if plan is None:
            victims = list(self._scheduler.running)
        else:
            victims = list(dict.fromkeys(chunk.request for chunk in plan.chunks))
            self._scheduler.take_back(plan)
        return [failed(request) for request in victims if self._holdings.close(request)]

    def _own(self, output: RequestOutput) -> bool:
        """Whether an output is of the engine's own work, which nobody waits for."""
        if self._errand is None or output.id != self._errand.id:
            return False
        if output.finish_reason is not None:
            self._errand = None
        return True

    def _retain(self, chunk: Chunk, retention: Razor) -> None:
        """Give back what local heads leave behind of a request that goes on, once its prompt has been computed densely."""
        request = chunk.request
        decodes_next = len(request.prompt) < len(request.tokens) == request.computed + 1
        if request.id in self._states and decodes_next:
            retention.advance(request, chunk.table, self.states)

    def check(self) -> None:
        """Prove that no block and no state is lost. Raises AssertionError."""
        self.cache.check()
        self.states.check(self._scheduler.running)

    def stats(self) -> EngineStats:
        """Counters as of now."""
        return self._statistics.snapshot()

    def tenants(self, names: Iterable[str] | None = None) -> Mapping[str, TenantStats]:
        """What tenants hold; of all that are known by default."""
        return self._statistics.tenants(names)

    def _sample(self, end: Ending, logits: Tensor) -> Iterator[RequestOutput]:
        """What comes of the last rows of a request's chunk. logits: [rows, vocab]."""
        request = end.chunk.request
        if request.verifying:
            yield from self._verify(request, logits)
        elif request.draft_tokens and end.chunk.decodes and request.sparse:
            self._draft(request, logits)
        else:
            yield self._next(request, logits)

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
            self._statistics.prompt_tokens += len(request.prompt)
            if self.share is not None:
                self.share.generated(request, self._scheduler.table(request))
        append(request, token)
        self._statistics.generation_tokens += 1
        top = request.sampling.logprobs
        output = state.push(token, None if top is None else logprobs(logits, [token], top)[0])
        if output.finish_reason is not None:
            return self._finish(state, output)
        correct(request)
        return output

    def _draft(self, request: Request, logits: Tensor) -> None:
        """Sample a draft: known to the engine, handed out only once a dense step agrees."""
        token = self._sampler.sample(logits, [request], self._eos_ids)[0]
        if not isinstance(token, SampleError):
            request.tokens.append(token)
            request.drafts += 1
            request.drafted += 1
            self._statistics.drafted += 1
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
        self._statistics.drafts += 1
        for i in range(len(drafts) + 1):
            output = self._next(request, logits[i : i + 1])
            agrees = output.finish_reason != "error" and i < len(drafts) and request.tokens[-1] == drafts[i]
            request.accepted += agrees
            self._statistics.accepted += agrees
            yield output
            if output.finish_reason is not None:
                return
            if not agrees:
                break
        request.computed = len(request.tokens) - 1
        request.exact = min(request.exact, request.computed)

    def _finish(self, state: OutputState, output: RequestOutput) -> RequestOutput:
        """A request has ended with this output: it gives back all it holds."""
        request = state.request
        if self.share is not None and (request.kv.explain or request.kv.segment is not None):
            output = replace(output, usage=replace(output.usage, explanation=self.share.explain(request)))
        self._holdings.close(request)
        return output

    def _score_prompt(self, chunk: Chunk, result: StepResult, first_row: int) -> None:
        """Log-probabilities of prompt tokens, for a request that wants them: row p scores token p + 1."""
        request, found = chunk.request, self._states[chunk.request.id].prompt_logprobs
        if found is None:
            return
        begin, end = len(found) - 1, min(chunk.stop, len(request.prompt) - 1)
        for low in range(begin, end, LOGITS_ROWS):
            high = min(low + LOGITS_ROWS, end)
            rows = [first_row + position - chunk.start for position in range(low, high)]
            targets = list(request.prompt[low + 1 : high + 1])
            top = request.sampling.prompt_logprobs
            assert top is not None
            found.extend(logprobs(self.runner.logits(result, rows), targets, top))
