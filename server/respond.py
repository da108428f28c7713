"""The way from a checked request to its HTTP answer, for every endpoint that generates.

arrive      gives a request its id and starts its clock
make_job    what the engine is asked, from a prompt; `conversations.chat_job` makes one from a chat's body
respond     runs a job: its pieces go through the endpoint's `StreamWriter`, or are collected for one JSON body
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from kvloom.engine.requests.request import RequestOutput
from kvloom.engine.requests.sampling import TOKEN_LISTS, SamplingParams
from kvloom.server.answers.events import Content
from kvloom.server.answers.reader import Expected
from kvloom.server.answers.readers import Reader, reader_of
from kvloom.server.context import ServerContext, client_request_id, context_of, new_id, tenant_of
from kvloom.server.generation import Work, outputs
from kvloom.server.pieces import Choice, Piece
from kvloom.server.replies import ChunkWriter, Envelope, Format, LogprobWriter, whole_body
from kvloom.server.schema.chat import ChatBody
from kvloom.server.schema.common import GenerationBody
from kvloom.server.sse import ClientGoneError, EventStream, unless_gone, waiting_told
from kvloom.server.token_ids import TokenIds
from kvloom.server.trace import RequestTrace
from kvloom.server.usage import UsageTotals

Whole = Callable[[Sequence[Choice]], dict[str, Any]]
"""From finished choices to the body of an answer."""

log = logging.getLogger("kvloom.server")


class StreamWriter(Protocol):
    """What an endpoint writes of a stream: whole server-sent events."""

    def write(self, piece: Piece) -> bytes:
        """Of one piece; nothing where it is not worth an event."""

    def end(self) -> bytes:
        """Once all completions have finished."""

    def error(self, error: Exception) -> bytes:
        """Instead, where generation failed after something was written."""


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
    readers: Sequence[Reader] = ()
    """Of each completion, where there is more in its text than content."""

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """What the completions bring, as it comes; `usage` is that of the pieces so far. Raises what `generation.outputs`
        does."""
        over = set[int]()
        async with aclosing(outputs(self.context.client, self.work, self.trace, over)) as items:
            async for index, output in items:
                if self.readers:
                    reader = self.readers[index]
                    events = reader.read(output)
                    if reader.complete and output.finish_reason is None:
                        over.add(index)
                        self.trace.stopped(index)
                        output, events = replace(output, finish_reason="stop"), [*events, *reader.push("", ended=True)]
                    piece = Piece(index, output, events, reader.finish_reason(output.finish_reason))
                    self.usage.update(index, output.usage, reader.counted_reasoning)
                else:
                    output = output if self.adjust is None else self.adjust(index, output)
                    piece = Piece(index, output, (Content(output.text),) if output.text else (), output.finish_reason)
                    self.usage.update(index, output.usage)
                yield piece

    def chunks(self, form: Format, logprobs: LogprobWriter | None) -> ChunkWriter:
        """The stream of a chat or of completions."""
        body = self.body
        return ChunkWriter(form, self.envelope, self.usage, logprobs=logprobs, include_usage=body.include_usage,
                           continuous_usage=body.continuous_usage, ids=self.ids, mixed=bool(self.readers))  # fmt: skip

    def whole(self, form: Format, choices: Sequence[Choice], written: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The whole body of a chat or of completions; written: the choices as it shows them."""
        body = whole_body(form, self.envelope, written, self.usage, **more)
        return body if self.ids is None else self.ids.whole(body, [choice.tokens for choice in choices])


class Arrival(NamedTuple):
    """A request that has just come in, before its prompt is encoded."""

    id: str
    """The engine's; no client sees it without its prefix."""
    public_id: str
    """The answer's."""
    name: str
    """What the client and the log call it."""
    trace: RequestTrace


def arrive(request: Request, id_prefix: str) -> Arrival:
    """Give a request its id and start its clock. From now on it goes by that name, also where it fails."""
    context, work_id = context_of(request), new_id()
    public_id = id_prefix + work_id
    name = request.state.request_id = client_request_id(request, public_id)
    record = None if context.tracing is None else context.tracing.arrived(request.scope, id_prefix, context.client.model.name)
    trace = RequestTrace(context.metrics, name, access_log=context.options.access_log, record=record)
    return Arrival(work_id, public_id, name, trace)


def make_job(request: Request, arrival: Arrival, body: GenerationBody, sampling: SamplingParams, prompts: list[list[int]], *,
             adjust: Callable[[int, RequestOutput], RequestOutput] | None = None,
             expected: Expected | None = None) -> Job:  # fmt: skip
    """Put a request together.

    expected: what is looked for in its answers beside content. Raises InvalidRequestError for a token that does not exist."""
    context = context_of(request)
    for prompt in prompts:
        context.prompts.check_length(len(prompt))
        context.prompts.check(prompt)
    for name in TOKEN_LISTS:
        context.prompts.check(tuple(getattr(sampling, name) or ()), name)
    work = Work(id=arrival.id, prompts=[tuple(prompt) for prompt in prompts],
                sampling=sampling, kv=body.kv_options(), priority=body.priority,
                tenant=tenant_of(request), cache_salt=body.cache_salt)  # fmt: skip
    chat = isinstance(body, ChatBody)
    return Job(
        context=context,
        body=body,
        work=work,
        envelope=Envelope(arrival.public_id, int(time.time()), context.client.model.name),
        usage=UsageTotals(work.completions, work.n, with_kv=body.kv is not None),
        trace=arrival.trace,
        headers={"X-Request-Id": arrival.name},
        adjust=adjust,
        ids=TokenIds(work, echoed=adjust is not None, chat=chat) if body.return_token_ids else None,
        readers=[] if expected is None else [reader_of(expected) for _ in range(work.completions)],
    )


async def respond(request: Request, job: Job, writer: StreamWriter, whole: Whole, ping: bytes = b"") -> Response:
    """Run a job and answer: a stream if the body asks for one, else the JSON that `whole` makes of the finished choices.

    ping: what is written into a stream whenever nothing came for PING_SECONDS, before its first token, too; empty for nothing.
    A client that leaves ends its engine requests at once. Raises what `Job.pieces` raises before something is written.
    """
    try:
        if not job.body.stream:
            choices = await unless_gone(request.receive, _collect(job))
            return JSONResponse(whole(choices), headers=job.headers)
        events = _events(job, writer, ping)
        first = await unless_gone(request.receive, _first(events))
        return EventStream(first, events, job.headers, ping)
    except ClientGoneError:
        return Response(status_code=499)  # nobody reads it


async def _collect(job: Job) -> list[Choice]:
    choices = [Choice() for _ in range(job.work.completions)]
    async with aclosing(job.pieces()) as pieces:
        async for piece in pieces:
            choices[piece.completion].add(piece)
    return choices


async def _first(events: AsyncGenerator[bytes, None]) -> bytes:
    try:
        return await anext(events)
    except BaseException:
        await events.aclose()
        raise


async def _events(job: Job, writer: StreamWriter, ping: bytes) -> AsyncGenerator[bytes, None]:
    """Events of a stream. An error before the first one is raised, a later one becomes an event."""
    begun = False
    coming: AsyncGenerator[Piece | None, None] = waiting_told(job.pieces()) if ping else job.pieces()
    try:
        async with aclosing(coming) as pieces:
            async for piece in pieces:
                data = ping if piece is None else writer.write(piece)
                if data:
                    begun = True
                    yield data
        yield writer.end()
    except Exception as error:
        if not begun:
            raise
        log.warning("%s ended with %s", job.envelope.id, type(error).__name__, exc_info=log.isEnabledFor(logging.DEBUG))
        yield writer.error(error)
