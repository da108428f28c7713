"""From one HTTP request to engine requests and back: prompts x n completions, merged into one stream of outputs.

However the stream ends (finished, failed, closed because the client left), no engine request of it goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Container, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import NamedTuple, cast

from kvloom.engine.client import EngineClient
from kvloom.engine.errors import EngineDeadError, InvalidRequestError, OverloadedError
from kvloom.engine.requests.request import KVOptions, RequestOutput
from kvloom.engine.requests.sampling import SamplingParams
from kvloom.engine.thread.backlog import MAX_OUTPUTS
from kvloom.server.errors import GenerationError, ServerClosingError
from kvloom.server.trace import RequestTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one HTTP request asks of the engine. Completion i belongs to prompt i // n."""

    id: str
    prompts: Sequence[tuple[int, ...]]
    """Shared by their completions: never copied."""
    sampling: SamplingParams
    kv: KVOptions = KVOptions()
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""

    @property
    def n(self) -> int:
        """Completions per prompt."""
        return self.sampling.n

    @property
    def completions(self) -> int:
        """Completions over all prompts."""
        return len(self.prompts) * self.n

    def prompt_of(self, index: int) -> tuple[int, ...]:
        """The prompt of a completion."""
        return self.prompts[index // self.n]


class Indexed(NamedTuple):
    """An output and the completion it belongs to."""

    completion: int
    output: RequestOutput


async def outputs(
    client: EngineClient, work: Work, trace: RequestTrace, over: Container[int] = ()
) -> AsyncGenerator[Indexed, None]:
    """Outputs of all completions as they come, until each has finished, or is `over`: who reads them wants no more of it.

    Raises what `EngineClient.generate` raises, GenerationError for a completion that failed, InvalidRequestError where a field
    of the request is to blame, ServerClosingError for one that the engine ended by itself.
    """
    trace.asked(work.sampling)
    sources = list(_sources(client, work, over))
    error: BaseException | None = None
    try:
        async with aclosing(sources[0] if len(sources) == 1 else _merged(sources)) as merged:
            async for item in merged:
                if item.completion in over:
                    continue
                trace.note(*item)
                _check(item.output)
                yield item
    except BaseException as caught:
        error = caught
        raise
    finally:
        trace.close(work.completions, error)


def _sources(client: EngineClient, work: Work, over: Container[int]) -> Iterator[AsyncGenerator[Indexed, None]]:
    params = work.sampling.choices()
    for index in range(work.completions):
        yield _source(client, work, index, params[index % work.n], over)


async def _source(
    client: EngineClient, work: Work, index: int, sampling: SamplingParams, over: Container[int]
) -> AsyncGenerator[Indexed, None]:
    stream = client.generate(
        work.prompt_of(index),
        sampling,
        request_id=f"{work.id}-{index}",
        kv=work.kv,
        priority=work.priority,
        tenant=work.tenant,
        cache_salt=work.cache_salt,
    )
    async with aclosing(cast(AsyncGenerator[RequestOutput, None], stream)) as items:
        async for output in items:
            yield Indexed(index, output)
            if output.finish_reason is not None or index in over:
                return
    raise EngineDeadError("the engine ended a request without a finish reason")


def _check(output: RequestOutput) -> None:
    if output.finish_reason == "error" and output.param is not None:
        raise InvalidRequestError(output.error or f"{output.param} cannot be served", output.param)
    if output.finish_reason == "error":
        raise GenerationError(f"generation failed: {output.error or 'the engine gives no reason'}")
    if output.finish_reason == "abort":
        raise ServerClosingError("the request was ended by the server, which is shutting down; try again")


class _End(NamedTuple):
    """A source is used up, or has failed."""

    error: BaseException | None


async def _merged(sources: list[AsyncGenerator[Indexed, None]]) -> AsyncGenerator[Indexed, None]:
    queue: asyncio.Queue[Indexed | _End] = asyncio.Queue()  # bounded by `_pump`
    tasks = [asyncio.create_task(_pump(source, queue)) for source in sources]
    open_sources = len(sources)
    try:
        while open_sources:
            item = await queue.get()
            if isinstance(item, Indexed):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                open_sources -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(source: AsyncGenerator[Indexed, None], queue: asyncio.Queue[Indexed | _End]) -> None:
    try:
        async with aclosing(source):
            async for item in source:
                if queue.qsize() >= MAX_OUTPUTS:  # the client does not read: end it rather than keep everything for it
                    raise OverloadedError(
                        f"{MAX_OUTPUTS} outputs were not read in time; the request has been ended; read faster"
                    )
                queue.put_nowait(item)
    except Exception as error:
        queue.put_nowait(_End(error))
    else:
        queue.put_nowait(_End(None))
