"""An engine as a replica of Ray Serve.

A call `run` lasts as long as its request, so that Ray counts, drains and cancels it as any other; outputs do not come back by
it but by the front's line, a stream that carries one message a step for all requests of a front.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, cast

from ray import serve

from kvloom.deploy.placement import DECODE_TOKENS
from kvloom.deploy.wire import ASKED, Batch, Line, Order, Question, ReplicaLostError, unpacked
from kvloom.engine.client import ModelInfo
from kvloom.engine.config import EngineConfig
from kvloom.engine.errors import EngineDeadError, KVLoomError, OverloadedError
from kvloom.engine.requests.request import RequestOutput
from kvloom.server import logs

log = logging.getLogger("kvloom.engine")

LINE_SECONDS = 30.0
"""How long a request may be here before the line of its front is."""
ENDING_SECONDS = 0.3
"""How long a replica whose engine has ended still tells its fronts."""
TOLD_SECONDS = 20.0
"""How long a replica that could not load stays, so that a front can be told why."""
STATS_SECONDS = 0.5
"""How often a line carries figures."""
MOST_OUTPUTS = 65536
"""Outputs that may wait for a front to take them, all together."""


class Outgoing:
    """What waits for one front."""

    def __init__(self) -> None:
        self.ended = False
        self._waiting: list[tuple[str, RequestOutput]] = []
        self._more = asyncio.Event()

    def put(self, key: str, output: RequestOutput) -> None:
        """One more output. Raises OverloadedError if the front takes none, ReplicaLostError if it is gone."""
        if self.ended:
            raise ReplicaLostError("the line to the front has ended")
        if len(self._waiting) >= MOST_OUTPUTS:
            raise OverloadedError(f"{MOST_OUTPUTS} outputs were not taken in time; the request has been ended")
        self._waiting.append((key, output))
        self._more.set()

    async def take(self, seconds: float) -> Sequence[tuple[str, RequestOutput]]:
        """All that waits, once something does or the time is over; what a step made comes together."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._more.wait()
            await asyncio.sleep(0)  # the step's other requests are woken in the same turn of the loop
        taken, self._waiting = self._waiting, []
        self._more.clear()
        return taken

    def close(self) -> None:
        """Nobody takes anything any more."""
        self.ended, self._waiting = True, []
        self._more.set()


class Replica:
    """One of the engines that serve the same."""

    def __init__(self, config: EngineConfig, cores: int = 0, log_level: str = "INFO") -> None:
        """cores: how many this replica computes on alone, by its rank on this machine; 0 to leave that to the system."""
        logs.set_up(log_level, "text")
        context = serve.get_replica_context()
        self._name = context.replica_id.unique_id
        self._began = time.monotonic()
        self._lines: dict[str, Outgoing] = {}
        self._opened: dict[str, asyncio.Event] = {}
        self._failed: KVLoomError | None = None
        self._ending = False
        try:
            from kvloom.engine.thread.client import ThreadEngineClient

            with _on_own_cores(context.rank.local_rank, cores):
                self._engine = ThreadEngineClient.start(replace(config, model=replace(config.model, replica=self._name)))
        except KVLoomError as error:  # told to whoever asks first: Ray would make a traceback of it, and try again
            self._failed = error

    async def describe(self) -> ModelInfo | KVLoomError:
        """The model, or what kept it from being loaded: not raised, since Ray would log that as a failure of its own."""
        return self._failed or self._engine.model

    async def run(self, order: Order) -> KVLoomError | None:
        """Run a request to its end; its outputs go to its front. Returns what `EngineClient.generate` raises, as Ray would log
        a traceback for everybody's bad request; ReplicaLostError if the front is gone."""
        try:
            line = await self._line(order.front)
            stream = self._engine.generate(
                unpacked(order.prompt), order.sampling, request_id=f"{order.front}/{order.key}", kv=order.kv,
                priority=order.priority, tenant=order.tenant, cache_salt=order.cache_salt,
            )  # fmt: skip
            async with aclosing(cast(AsyncGenerator[RequestOutput, None], stream)) as outputs:
                async for output in outputs:
                    line.put(order.key, output)
        except KVLoomError as error:
            if isinstance(error, EngineDeadError):
                self._end()
            return error
        return None

    async def outputs(self, line: Line) -> AsyncGenerator[Batch, None]:
        """The line of a front: outputs as they come, and figures. A front has one; a second one ends the first."""
        if (before := self._lines.pop(line.front, None)) is not None:
            before.close()
        mine = self._lines[line.front] = Outgoing()
        self._opened.setdefault(line.front, asyncio.Event()).set()
        told = 0.0
        try:
            while not mine.ended:
                outputs = await mine.take(STATS_SECONDS)
                now = time.monotonic()
                if now - told >= STATS_SECONDS or any(output.finish_reason for _, output in outputs):
                    told, health = now, await self._engine.health()
                    yield Batch(outputs, await self._engine.stats(), health, os.getpid())
                    if not health.ok:
                        self._end()
                else:
                    yield Batch(outputs)
        finally:
            mine.close()
            if self._lines.get(line.front) is mine:
                del self._lines[line.front], self._opened[line.front]

    async def ask(self, question: Question) -> tuple[str, Any]:
        """This replica's name, and what a method of the engine's client answers, or the error that it raises."""
        if question.method not in ASKED:
            raise ValueError(f"method is {question.method!r}; allowed: {', '.join(ASKED)}")
        given: Mapping[str, Any] = question.arguments
        try:
            return self._name, await getattr(self._engine, question.method)(**given)
        except KVLoomError as error:
            return self._name, error

    async def check_health(self) -> None:
        """Called by Ray Serve. Raises if this replica is of no use any more: it is then replaced."""
        if self._failed is not None:
            if time.monotonic() - self._began > TOLD_SECONDS:
                raise self._failed
            return
        state = await self._engine.health()
        if not state.ok:
            raise EngineDeadError(state.reason)

    async def record_routing_stats(self) -> dict[str, Any]:
        """Called by Ray Serve: what routers are told."""
        if self._failed is not None:
            return {}
        stats = await self._engine.stats()
        waits = stats.queued_tokens + DECODE_TOKENS * (stats.waiting + stats.running)
        return {"waits": waits, "fronts": len(self._lines), "capacity_tokens": stats.capacity_tokens}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve: what `deploy.scaling` decides by."""
        if self._failed is not None:
            return {}
        stats = await self._engine.stats()
        return {"queued_tokens": float(stats.queued_tokens), "running": float(stats.running)}

    async def _line(self, front: str) -> Outgoing:
        """The line of a front, once it is there. Raises ReplicaLostError if it does not come."""
        if (line := self._lines.get(front)) is None:
            try:
                async with asyncio.timeout(LINE_SECONDS):
                    await self._opened.setdefault(front, asyncio.Event()).wait()
            except TimeoutError:
                self._opened.pop(front, None)
                raise ReplicaLostError("the front has not asked for its outputs") from None
            line = self._lines.get(front)
            if line is None:
                raise ReplicaLostError("the line to the front has ended")
        return line

    def _end(self) -> None:
        """End this process, so that Ray starts another in its place at once: the engine does not come back."""
        if not self._ending:
            self._ending = True
            log.critical("the engine of replica %s has ended; so does the replica", self._name)
            asyncio.get_running_loop().call_later(ENDING_SECONDS, os._exit, 1)

    def __del__(self) -> None:
        if (engine := getattr(self, "_engine", None)) is not None:
            engine.close()


@contextlib.contextmanager
def _on_own_cores(rank: int, cores: int) -> Iterator[None]:
    """Threads that begin here, which are the engine's, keep to this replica's own cores, if there are enough for its rank; this
    thread, which passes messages, may be anywhere."""
    there = os.sched_getaffinity(0)
    mine = sorted(there)[rank * cores : (rank + 1) * cores]
    if cores and len(mine) < cores:
        log.warning("replica %d shares cores with others: there are %d", rank, len(there))
    if not cores or len(mine) < cores:
        yield
        return
    os.sched_setaffinity(0, mine)
    try:
        yield
    finally:
        os.sched_setaffinity(0, there)
