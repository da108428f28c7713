"""The engine: add requests, take steps. A step has two halves: `_launch` runs the model and draws tokens for everybody at once,
`_collect` waits for them and gives each request its own. What may take part in a request's life is a feature (`lifecycle`).

On a GPU a step is launched before the one in front is collected, where it is certain what it computes: its rows take their
tokens from where they are drawn, and the host's work is done beside the device's. The row of a request that ends with it is
computed for nothing; what it held is given away at once, as whoever gets it writes later in the device's queue.

Single-threaded and synchronous; `thread` drives it from a thread of its own, `llm` from the caller's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from kvloom.engine.cache import CacheManager
from kvloom.engine.cache.prefix import Domain
from kvloom.engine.client import EngineStats, TenantStats
from kvloom.engine.errors import EngineDeadError, InternalError, InvalidRequestError, KVLoomError
from kvloom.engine.requests.isolation import INTERNAL, MOST_FAILURES, Blamed, Holdings, failed, log_remedy
from kvloom.engine.requests.lifecycle import Features
from kvloom.engine.requests.plan import foreseen
from kvloom.engine.requests.request import Request, RequestOutput
from kvloom.engine.requests.state import StateMemory
from kvloom.engine.requests.tenants import Tenants
from kvloom.engine.scheduling import Scheduler, StepPlan
from kvloom.engine.scheduling.admission import Admission, Hold
from kvloom.engine.scheduling.background import Background, Jobs
from kvloom.engine.scheduling.limits import Limits
from kvloom.engine.statistics import Statistics
from kvloom.engine.step.decoding import Decoding, Draw
from kvloom.engine.step.runner import Runner, StepResult

log = logging.getLogger("kvloom.engine")

F = TypeVar("F")


class Pending(NamedTuple):
    """A step that has been launched: what it computes may still be on its way."""

    plan: StepPlan
    result: StepResult
    draw: Draw


class EngineCore:
    """Requests in, outputs out, one step at a time."""

    def __init__(
        self,
        runner: Runner,
        cache: CacheManager,
        states: StateMemory,
        scheduler: Scheduler,
        admission: Admission,
        decoding: Decoding,
        statistics: Statistics,
        tenants: Tenants,
        features: Features = (),
        jobs: Jobs | None = None,
        *,
        overlaps: bool = False,
    ) -> None:
        """states: memory of what selection and retention remember; tenants: weights and quotas; jobs: work for an idle engine,
        if there ever is any; overlaps: whether steps are launched ahead, which needs a device with a queue."""
        self.runner, self.cache, self.states, self.decoding = runner, cache, states, decoding
        self.background = Background(jobs, self.add, self.abort)
        self._scheduler, self._admission, self._statistics = scheduler, admission, statistics
        self._tenants, self._features = tenants, features
        cache.limit(tenants.get)
        self._holdings = Holdings()
        self._failures = 0
        """Steps in a row that failed with nobody to blame."""
        self._sequence = 0
        self._overlaps = overlaps
        self._ahead: Pending | None = None
        """The step that has been launched, and is to be collected next."""

    def feature(self, kind: type[F]) -> F | None:
        """The feature of this kind, if this engine has it."""
        return next((feature for feature in self._features if isinstance(feature, kind)), None)

    @property
    def observer(self) -> Callable[[Request, Tensor], None] | None:
        """Called with (request, logits [1, vocab] fp32, valid only during the call) for every row a token is taken from."""
        return self.decoding.observer

    @observer.setter
    def observer(self, observer: Callable[[Request, Tensor], None] | None) -> None:
        self.decoding.observer = observer

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
        return self._admission.domains.domain(tenant, salt)

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequestError if it can never be served, or its id is in use; InternalError if
        something of the engine's own failed. Nothing of it stays then."""
        if request.id in self.decoding:
            raise InvalidRequestError(f"request id {request.id!r} is already in use", param="request_id")
        if not request.internal:
            self.background.give_way()
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
        hold(self.decoding.close, request)
        self.decoding.open(request)
        for feature in self._features:
            hold(feature.ended, request)

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
        cached = self.peek(prompt, tenant, salt)
        found: dict[str, Any] = {"prompt_tokens": len(prompt), "cached_tokens": cached}
        for feature in self._features:
            found |= feature.look(prompt, cached, tenant, salt)
        return found

    def peek(self, prompt: Sequence[int], tenant: str, salt: str) -> int:
        """Tokens of a dense prompt's exact prefix that are held now. Changes nothing; may be asked from any thread."""
        return self.cache.held(self.domain(tenant, salt), prompt)

    def purge(self, tenant: str) -> int:
        """Forget what is kept of a tenant beyond its requests. Returns how many segments that were."""
        self.background.give_way(tenant)
        return sum(feature.purge(tenant) for feature in self._features)

    def reset(self) -> dict[str, int]:
        """Forget all KV that no request holds, whosever it is. Returns how many blocks and segments that were. What running
        requests hold can still be found, and is cached once they end."""
        self.background.give_way()
        segments = sum(feature.reset() for feature in self._features)
        return {"blocks": self.cache.evict(), "segments": segments}

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now. Its full blocks stay reusable. Returns its last output, or None if it is not here."""
        state = self.decoding.state(request_id)
        if state is None:
            return None
        state.request.drop_drafts()
        outputs: list[RequestOutput] = []
        with self._alone(state.request, outputs):
            self._hand_out(state.request, state.end("abort"), outputs)
        return outputs[-1]

    # Steps --------------------------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """One step. Returns what it added to each request that got anything, and the end of those that something failed for.

        Raises EngineDeadError when one step after the other fails with nobody to blame.
        """
        began, outputs = time.perf_counter(), list[RequestOutput]()
        launched, self._ahead = self._ahead, None
        pending = launched or self._plan(outputs)
        if pending is not None:
            self._ahead = self._plan(outputs, pending) if self._overlaps else None
            self._finish(pending, outputs, measured=launched is None or self._ahead is not None)
        plan = StepPlan([], []) if pending is None else pending.plan
        of_prompts = sum(chunk.count for chunk in plan.chunks if chunk.prefills)
        self._statistics.stepped(time.perf_counter() - began, plan.rows, of_prompts)
        return [output for output in outputs if not self.background.owns(output)]

    def _plan(self, outputs: list[RequestOutput], before: Pending | None = None) -> Pending | None:
        """Launch the next step; with one under way, the one after it if that is certain. None if there is nothing to do, or it
        has failed."""
        plan: StepPlan | None = None
        try:
            for feature in self._features:
                feature.stepping()
            if before is None:
                plan = self._scheduler.schedule()
                if plan.chunks:
                    return self._launch(plan)
                self._scheduler.stepped()
            elif self.decoding.observer is None and (certain := self._scheduler.foresight.certain(before.plan)):
                with foreseen(certain):
                    plan = self._scheduler.foresight.foresee(certain)
                    going_on = {chunk.request for chunk in plan.chunks}
                    for feature in self._features:
                        feature.computed([chunk for chunk in certain if chunk.request in going_on])
                    if going_on:
                        self._statistics.ahead_steps += 1
                        return self._launch(plan, before)
        except Blamed as failure:
            outputs += self._fail(failure.request)
        except Exception:
            outputs += self._fail_step(plan)
        return None

    def _finish(self, pending: Pending, outputs: list[RequestOutput], *, measured: bool) -> None:
        """Collect a step. measured: whether what has passed since the last plan is what a step takes."""
        try:
            self._collect(pending, outputs)
            if measured:
                self._scheduler.stepped()
        except Blamed as failure:
            outputs += self._fail(failure.request)
        except Exception:
            outputs += self._fail_step(pending.plan)

    def _launch(self, plan: StepPlan, before: Pending | None = None) -> Pending:
        """Run the model and draw tokens, for all requests of a step at once. Waits for nothing that a device computes. before:
        the step that draws the tokens of these rows, if the host does not know them."""
        began = time.perf_counter()
        self.decoding.begin(plan)
        result = self.runner.run(plan, None if before is None else before.draw.fed(plan.chunks))
        for feature in self._features:
            feature.stepped(plan, time.perf_counter() - began)
        return Pending(plan, result, self.decoding.draw(plan, result))

    def _collect(self, pending: Pending, outputs: list[RequestOutput]) -> None:
        """What a step computed, request by request: what fails here fails for one of them."""
        plan, result, draw = pending
        drawn = list(draw.each())
        self._failures = 0
        for chunk, seen, first_row in zip(plan.chunks, result.seen(), result.starts):
            if not self.decoding.has(chunk.request):  # it has ended since the step was launched
                continue
            with self._alone(chunk.request, outputs):
                self._scheduler.completed(chunk, saw_everything=seen.everything)
                self.decoding.computed(chunk, seen.attended)
                self.decoding.score_prompt(chunk, result, first_row)
        for end, tokens, rows in drawn:
            with self._alone(end.chunk.request, outputs):
                for output in self.decoding.take(end, tokens, draw.logits, rows):
                    self._hand_out(end.chunk.request, output, outputs)
        going_on = [chunk for chunk in plan.chunks if self.decoding.has(chunk.request)]
        for feature in self._features:
            feature.computed(going_on)

    def _hand_out(self, request: Request, output: RequestOutput, outputs: list[RequestOutput]) -> None:
        """One more output of a request, which gives back all it holds if that is the last."""
        if output.finish_reason is not None:
            if request.kv.explain or request.kv.segment is not None:
                told: dict[str, Any] = {}
                for feature in self._features:
                    told |= feature.explain(request)
                output = replace(output, usage=replace(output.usage, explanation=told))
            self._holdings.close(request)
        outputs.append(output)

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
        log_remedy()
        return [failed(request)] if self._holdings.close(request) else []

    def _fail_step(self, plan: StepPlan | None) -> list[RequestOutput]:
        """A step has failed and nobody is to blame: whoever had rows in it ends, or everybody that runs if that is not known.

        Raises EngineDeadError after too many of them in a row.
        """
        self._failures += 1
        self._statistics.internal_errors += 1
        log.exception("a step has failed, the %d. in a row", self._failures)
        log_remedy()
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
