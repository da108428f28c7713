"""The way from a checked request to its HTTP answer, for chat and completions alike."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from kvloom.engine.requests.request import RequestOutput
from kvloom.engine.requests.sampling import TOKEN_LISTS, SamplingParams
from kvloom.server.answers.reader import AnswerReader, Expected
from kvloom.server.context import ServerContext, client_request_id, context_of, new_id, tenant_of
from kvloom.server.errors import sse_error
from kvloom.server.generation import Indexed, Work, outputs
from kvloom.server.replies import CHAT, Choice, ChunkWriter, Envelope, Format, LogprobWriter
from kvloom.server.schema.common import GenerationBody
from kvloom.server.sse import DONE, ClientGoneError, EventStream, unless_gone
from kvloom.server.token_ids import TokenIds
from kvloom.server.trace import RequestTrace
from kvloom.server.usage import UsageTotals

Whole = Callable[[Sequence[Choice]], dict[str, Any]]
"""From finished choices to the body of an answer."""

log = logging.getLogger("kvloom.server")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One request, ready to run, with all that its answer needs."""

    context: ServerContext
    body: GenerationBody
    work: Work
    envelope: Envelope
    usage: UsageTotals
    trace: RequestTrace
    headers: dict[str, str]
    adjust: Callable[[int, RequestOutput], RequestOutput] | None = None
    """Changes an output before it is written: echo."""
    ids: TokenIds | None = None
    """What is told of token ids, if something is."""
    readers: Sequence[AnswerReader] = ()
    """Of each completion, where there is more in its text than content."""

    async def outputs(self) -> AsyncGenerator[Indexed, None]:
        """Outputs as they are to be written."""
        async with aclosing(outputs(self.context.client, self.work, self.trace)) as items:
            async for item in items:
                yield item if self.adjust is None else Indexed(item.completion, self.adjust(*item))


class Arrival(NamedTuple):
    """A request that has just come in, before its prompt is encoded."""

    format: Format
    id: str
    name: str
    """What the client and the log call it."""
    trace: RequestTrace


def arrive(request: Request, form: Format) -> Arrival:
    """Give a request its id and start its clock."""
    context, work_id = context_of(request), new_id()
    name = client_request_id(request, form.id_prefix + work_id)
    record = None if context.tracing is None else context.tracing.arrived(request.scope, form.object, context.client.model.name)
    trace = RequestTrace(context.metrics, name, access_log=context.options.access_log, record=record)
    return Arrival(form, work_id, name, trace)


def make_job(request: Request, arrival: Arrival, body: GenerationBody, sampling: SamplingParams, prompts: list[list[int]], *,
             adjust: Callable[[int, RequestOutput], RequestOutput] | None = None,
             expected: Expected | None = None) -> Job:  # fmt: skip
    """Put a request together.

    expected: what is looked for in its answers beside content. Raises InvalidRequestError for a token that does not exist."""
    context, form, work_id = context_of(request), arrival.format, arrival.id
    for prompt in prompts:
        context.prompts.check_length(len(prompt))
        context.prompts.check(prompt)
    for name in TOKEN_LISTS:
        context.prompts.check(tuple(getattr(sampling, name) or ()), name)
    work = Work(id=work_id, prompts=[tuple(prompt) for prompt in prompts],
                sampling=sampling, kv=body.kv_options(), priority=body.priority,
                tenant=tenant_of(request), cache_salt=body.cache_salt)  # fmt: skip
    return Job(
        context=context,
        body=body,
        work=work,
        envelope=Envelope(format=form, id=work_id, created=int(time.time()), model=context.client.model.name),
        usage=UsageTotals(work.completions, work.n, with_kv=body.kv is not None),
        trace=arrival.trace,
        headers={"X-Request-Id": arrival.name},
        adjust=adjust,
        ids=TokenIds(work, echoed=adjust is not None, chat=form is CHAT) if body.return_token_ids else None,
        readers=[] if expected is None else [AnswerReader(expected) for _ in range(work.completions)],
    )


async def respond(request: Request, job: Job, logprobs: LogprobWriter | None, whole: Whole) -> Response:
    """Run a job and answer: a stream if the body asks for one, else the JSON that `whole` makes of the finished choices.

    A client that leaves ends its engine requests at once. Raises what `outputs` raises before the first token.
    """
    try:
        if not job.body.stream:
            choices = await unless_gone(request.receive, _collect(job))
            answer = whole(choices)
            if job.ids is not None:
                answer = job.ids.whole(answer, [choice.tokens for choice in choices])
            return JSONResponse(answer, headers=job.headers)
        events = _events(job, logprobs)
        first = await unless_gone(request.receive, _first(events))
        return EventStream(first, events, job.headers)
    except ClientGoneError:
        return Response(status_code=499)  # nobody reads it


async def _collect(job: Job) -> list[Choice]:
    choices = [Choice() for _ in range(job.work.completions)]
    async with aclosing(job.outputs()) as items:
        async for index, output in items:
            reader = job.readers[index] if job.readers else None
            choices[index].add(output, reader)
            job.usage.update(index, output.usage, None if reader is None else reader.counted_reasoning)
    return choices


async def _first(events: AsyncGenerator[bytes, None]) -> bytes:
    try:
        return await anext(events)
    except BaseException:
        await events.aclose()
        raise


async def _events(job: Job, logprobs: LogprobWriter | None) -> AsyncGenerator[bytes, None]:
    """Events of a stream. An error before the first one is raised, a later one becomes an event."""
    writer = ChunkWriter(job.envelope, job.usage, logprobs=logprobs, include_usage=job.body.include_usage,
                         continuous_usage=job.body.continuous_usage, ids=job.ids, readers=job.readers)  # fmt: skip
    begun = False
    try:
        async with aclosing(job.outputs()) as items:
            async for index, output in items:
                data = writer.write(index, output)
                if data:
                    begun = True
                    yield data
        yield writer.end()
    except Exception as error:
        if not begun:
            raise
        log.warning("%s ended with %s", job.envelope.id, type(error).__name__, exc_info=log.isEnabledFor(logging.DEBUG))
        yield sse_error(error) + DONE
