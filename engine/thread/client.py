"""EngineClient over a thread of this process: the engine steps on its own thread, the event loop only passes messages.

    event loop                          engine thread
    generate -> inbox  ---------------> add, abort; step
    queue of the request <------------- outputs, one call into the loop per step

The heavy operations of a step release the interpreter lock. If the thread dies, every stream ends with EngineDeadError, and
`health` says so; why is for the log alone.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from kvloom.engine.client import EngineStats, Health, TenantStats
from kvloom.engine.config import EngineConfig
from kvloom.engine.core import EngineCore
from kvloom.engine.errors import EngineDeadError, KVLoomError
from kvloom.engine.requests.isolation import no_internals
from kvloom.engine.requests.request import KVOptions, Request, RequestOutput
from kvloom.engine.requests.sampling import SamplingParams
from kvloom.engine.startup.build import Built, Progress, build
from kvloom.engine.startup.prepare import Prepared
from kvloom.engine.thread.backlog import Backlog
from kvloom.engine.thread.questions import Question, Questions
from kvloom.engine.thread.queue_limit import QUEUED_CAPACITIES, Place, QueueLimit
from kvloom.engine.thread.watchdog import Watchdog

T = TypeVar("T")

log = logging.getLogger("kvloom.engine")

STALL_SECONDS = 120.0
"""A step that takes longer, in time that the process really had, counts as a dead engine in `health`."""
DIED = "the engine has ended after an internal error; the server's log says more"
"""All that anybody but the log is told."""

BACKGROUND_SECONDS = 0.2
"""After this long with nothing to do, the engine turns to its own work."""
RECEIVE_SECONDS, RECEIVE_SHARE = 0.005, 0.2
"""Between two steps, messages are taken for so long, or for that share of the step before if it is more: a thousand requests at
once are not added before anybody's next token, and nobody waits behind them for many long steps."""
STATS_SECONDS = 0.1
"""While it works, the engine says so often what it has counted."""
IDLE_SECONDS = 1.0
"""After this long with nothing to do, the engine proves once that no block is lost."""


class _Stream(NamedTuple):
    """Where one request's outputs go."""

    loop: asyncio.AbstractEventLoop
    outputs: Backlog


class ThreadEngineClient:
    """An engine on a thread of this process. See `client.EngineClient`."""

    def __init__(self, make: Callable[[], Built], *, max_queued_tokens: int | None = None) -> None:
        """`make` builds the engine, on the engine's own thread; blocks until it has, and raises what it raises.

        Where torch multiplies (weights in bf16 or fp32), the model must not be built on one thread and run on another: OpenMP
        keeps a pool of workers per calling thread, and once there are more of them than cores it puts them to sleep at every
        barrier. A decode step then takes four times as long.
        """
        self._questions = Questions()
        self._watchdog = Watchdog(lambda: self._core.busy)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}  # engine thread adds and removes; everyone reads
        self._closing = False
        self._dead: str | None = None
        made: Future[Built] = Future()
        self._thread = threading.Thread(target=self._run, args=(make, made), name="kvloom-engine", daemon=True)
        self._thread.start()
        self._core, self.model, self.tokenizer = made.result()
        self._compiler = self._core.decoding.constraints.compiler
        queued = max_queued_tokens or QUEUED_CAPACITIES * self._stats.capacity_tokens
        self._queue_limit = QueueLimit(queued, self._core.weight)
        self._watchdog.start()

    @classmethod
    def start(
        cls, config: EngineConfig, progress: Progress | None = None, prepared: Prepared | None = None
    ) -> ThreadEngineClient:
        """Load the model and start its thread. prepared: what was begun of it already. Blocks; raises ModelError,
        ModelNotFoundError or ConfigError."""
        return cls(lambda: build(config, progress, prepared), max_queued_tokens=config.scheduler.max_queued_tokens)

    # Event loop side -----------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        request_id: str,
        kv: KVOptions = KVOptions(),
        priority: int = 0,
        tenant: str = "",
        cache_salt: str = "",
    ) -> AsyncIterator[RequestOutput]:
        """See `EngineClient.generate`."""
        self._require_alive()
        place = self._queue_limit.enter(tenant, len(prompt))
        try:
            request = Request(
                id=request_id,
                prompt=tuple(prompt),
                sampling=sampling,
                kv=kv,
                priority=priority,
                tenant=tenant,
                cache_salt=cache_salt,
                arrival=time.monotonic(),
            )
            if sampling.structured is not None:
                request.grammar = await self._compiler.ready(sampling.structured, tenant)
            async for output in self._outputs(request):
                place.leave()
                yield output
        finally:
            place.leave()

    async def _outputs(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        stream = _Stream(asyncio.get_running_loop(), Backlog(lambda: self._end(request.id)))
        self._inbox.put(lambda: self._add(request, stream))
        if self._dead is not None:  # it may have died before the message got in; if not, the stream is told
            raise EngineDeadError(self._dead)
        done = False
        try:
            while not done:
                output = await stream.outputs.get()
                done = isinstance(output, KVLoomError) or output.finish_reason is not None
                if isinstance(output, KVLoomError):
                    raise output
                yield output
        finally:
            if not done:
                self._end(request.id)

    def reserve(self, tenant: str, tokens: int) -> Place:
        """See `EngineClient.reserve`."""
        return self._queue_limit.enter(tenant, tokens)

    async def abort(self, request_id: str) -> None:
        """See `EngineClient.abort`."""
        self._end(request_id)

    def _end(self, request_id: str) -> None:
        self._inbox.put(lambda: self._abort(request_id))

    async def explain(self, prompt: Sequence[int], *, tenant: str = "", cache_salt: str = "") -> Mapping[str, Any]:
        """See `EngineClient.explain`."""
        tokens = tuple(prompt)
        return await self._ask(tenant, lambda core: core.explain(tokens, tenant, cache_salt))

    async def peek(self, prompt: Sequence[int], *, tenant: str = "", cache_salt: str = "") -> int:
        """See `EngineClient.peek`. Does not wait for the engine's thread: what is read may change in the same moment."""
        self._require_alive()
        with no_internals():
            return self._core.peek(prompt, tenant, cache_salt)

    async def purge(self, tenant: str) -> int:
        """See `EngineClient.purge`."""
        return await self._ask(tenant, lambda core: core.purge(tenant))

    async def reset(self) -> Mapping[str, int]:
        """See `EngineClient.reset`."""
        return await self._ask("", self._reset)

    async def tenants(self, names: Sequence[str] | None = None) -> Mapping[str, TenantStats]:
        """See `EngineClient.tenants`."""
        asker = names[0] if names and len(names) == 1 else ""  # who is told of itself alone asks for itself
        return await self._ask(asker, lambda core: core.tenants(names))

    async def _ask(self, tenant: str, question: Callable[[EngineCore], T]) -> T:
        """Have the engine's thread answer between two steps. Raises OverloadedError if too many wait."""
        answer: Future[T] = Future()
        self._require_alive()
        self._questions.put(Question(tenant, lambda: self._answer(question, answer)))
        self._inbox.put(_wake)  # a busy engine answers when it is time
        if self._dead is not None:  # as in `generate`
            raise EngineDeadError(self._dead)
        return await asyncio.wrap_future(answer)

    async def stats(self) -> EngineStats:
        """As of the end of the last step, or of one STATS_SECONDS before while the engine works; of grammars as of now."""
        return replace(self._stats, **self._compiler.figures())

    async def health(self) -> Health:
        """Not ok once the thread has ended, or while a step takes longer than STALL_SECONDS."""
        if self._dead is not None:
            return Health(ok=False, reason=self._dead)
        silence = self._watchdog.silence
        if silence > STALL_SECONDS:
            return Health(ok=False, reason=f"no step has ended for {silence:.0f} s")
        return Health(ok=True)

    def close(self) -> None:
        """End all requests (finish reason "abort") and the thread."""
        if not self._closing:
            self._closing = True
            self._inbox.put(None)
        self._thread.join(timeout=30.0)
        self._compiler.close()
        self._watchdog.close()

    def _require_alive(self) -> None:
        if self._dead is not None or self._closing:
            raise EngineDeadError(self._dead or "the engine is shutting down")

    # Engine thread side ---------------------------------------------------------------------------------------------

    def _run(self, make: Callable[[], Built], made: Future[Built]) -> None:
        try:
            built = make()
        except BaseException as error:
            made.set_exception(error)
            return
        self._core, self._stats = built.core, built.core.stats()
        made.set_result(built)
        reason = "the engine has been shut down"
        try:
            took, told = 0.0, time.monotonic()
            while self._receive(max(RECEIVE_SECONDS, RECEIVE_SHARE * took)):
                self._watchdog.beat()
                began = time.monotonic()
                outputs = self._core.step()
                now = time.monotonic()
                took = now - began
                if now - told >= STATS_SECONDS or not self._core.busy:  # who gets a last output finds it counted
                    self._stats, told = self._core.stats(), now
                self._deliver(outputs)
        except BaseException:
            log.exception("the engine thread has died")
            reason = DIED
        self._dead = reason
        self._drain(EngineDeadError(reason))

    def _receive(self, seconds: float) -> bool:
        """Handle messages, for so long; waits for one while there is nothing to do. False when it is time to end."""
        checked, idle, until = False, time.monotonic(), float("inf")
        self._answer_next()
        while True:
            if not self._core.busy:
                self._answer_next()
            wait = BACKGROUND_SECONDS if self._core.background.waiting else None if checked else IDLE_SECONDS
            pause = None if wait is None else max(0.0, idle + wait - time.monotonic())  # questions do not put it off
            try:
                message = self._inbox.get(block=not self._core.busy, timeout=pause)
            except queue.Empty:
                if self._core.busy:
                    return True
                if self._core.background.waiting:
                    self._core.background.start()
                    if self._core.busy:
                        return True
                    continue  # it could not be started
                self._core.check()
                checked = True
                continue
            if message is None:
                self._drain(None)
                return False
            until = min(until, time.monotonic() + seconds)
            message()
            if self._core.busy and time.monotonic() > until:
                return True
            if not self._core.busy:
                self._stats = self._core.stats()

    def _add(self, request: Request, stream: _Stream) -> None:
        if self._dead is not None:
            _send([(stream, EngineDeadError(self._dead))])
            return
        try:
            self._core.add(request)
        except KVLoomError as error:
            _send([(stream, error)])
        else:
            self._streams[request.id] = stream

    def _answer_next(self) -> None:
        """Answer a question, if it is time for one, and charge it to whoever asked; all that wait if no step does."""
        while (answered := self._questions.answer_one(busy=self._dead is None and self._core.busy)) is not None:
            self._core.charge(*answered)
            if self._core.busy and self._dead is None:
                return

    def _answer(self, question: Callable[[EngineCore], T], answer: Future[T]) -> None:
        if not answer.set_running_or_notify_cancel():
            return
        try:
            if self._dead is not None:
                raise EngineDeadError(self._dead)
            with no_internals():
                found = question(self._core)
            answer.set_result(found)
        except KVLoomError as error:  # the one who asked is told; nobody else's request depends on it
            answer.set_exception(error)

    def _reset(self, core: EngineCore) -> Mapping[str, int]:
        told = core.reset()
        self._stats = core.stats()  # whoever is answered finds it so
        return told

    def _abort(self, request_id: str) -> None:
        output = None if self._dead else self._core.abort(request_id)
        if output is not None:
            self._deliver([output])

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        pairs: list[tuple[_Stream, RequestOutput | KVLoomError]] = [
            (self._streams[output.id], output) for output in outputs if output.id in self._streams
        ]
        for output in outputs:
            if output.finish_reason is not None:
                self._streams.pop(output.id, None)
        _send(pairs)

    def _drain(self, error: KVLoomError | None) -> None:
        """End every request: aborted, or with an error. Also those that are still in the inbox."""
        if error is None:
            self._deliver([output for name in list(self._streams) if (output := self._core.abort(name)) is not None])
            self._stats = self._core.stats()
            return
        _send([(stream, error) for stream in self._streams.values()])
        self._streams.clear()
        while not self._inbox.empty():
            message = self._inbox.get()
            if message is not None:
                message()
        self._answer_next()


def _wake() -> None:
    """A message that only ends the engine's waiting."""


def _send(pairs: Sequence[tuple[_Stream, RequestOutput | KVLoomError]]) -> None:
    """Hand outputs to their event loops: one call per loop, however many requests."""
    loops: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, RequestOutput | KVLoomError]]] = {}
    for pair in pairs:
        loops.setdefault(pair[0].loop, []).append(pair)
    for loop, batch in loops.items():
        try:
            loop.call_soon_threadsafe(_put, batch)
        except RuntimeError:  # the loop is closed: nobody listens any more
            log.debug("an event loop has closed; %d outputs dropped", len(batch))


def _put(batch: Sequence[tuple[_Stream, RequestOutput | KVLoomError]]) -> None:
    for stream, item in batch:
        stream.outputs.put_nowait(item)
