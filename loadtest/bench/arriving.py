"""Long prompts that arrive beside streams: how far apart the streams' tokens are meanwhile, and when the prompts' own come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from kvloom.loadtest.client.client import Client
from kvloom.loadtest.client.record import Job, Record
from kvloom.loadtest.load.measures import Spread, Summary, summarise

LEAD = 20
"""Chunks that every stream has sent before prompts arrive."""
LEAD_SECONDS = 300.0


async def measure_arriving(client: Client, streams: Sequence[Job], prompts: Sequence[Job]) -> Summary:
    """Start the streams, send all prompts at once when all of them flow, and end them when the prompts have their first tokens.

    `ttft` is of the prompts; `itl` of the streams' gaps of which some part lies between the sending of the prompts and the last
    of their first tokens. A stream that failed, or ended before that, counts as failed; on a server that does not let all of
    them flow together they all do, and no prompt is sent.
    """
    flowing = [Record.of(index, job) for index, job in enumerate(streams)]
    tasks = [asyncio.create_task(client.send(job, record)) for job, record in zip(streams, flowing)]
    try:
        begun = time.perf_counter()
        while any(len(record.chunks) < LEAD for record in flowing) and not any(task.done() for task in tasks):
            if time.perf_counter() - begun > LEAD_SECONDS:
                return replace(summarise([]), failed=len(streams))
            await asyncio.sleep(0.01)
        arrived = [Record.of(index, job) for index, job in enumerate(prompts)]
        await asyncio.gather(*(client.send(job, record) for job, record in zip(prompts, arrived)))
        ended = sum(task.done() for task in tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    summary = summarise(arrived)
    return replace(summary, itl=Spread.of(gaps(flowing, arrived)), failed=summary.failed + ended)


def gaps(streams: Sequence[Record], prompts: Sequence[Record]) -> list[float]:
    """Seconds between chunks of streams while prompts were computed; of a stream that sent no more, until the end of that."""
    begin, end = min(record.sent for record in prompts), max((record.chunks or [record.sent])[0] for record in prompts)
    instants = [[*record.chunks, *([end] if record.chunks and record.chunks[-1] < end else [])] for record in streams]
    return [late - early for chunks in instants for early, late in pairwise(chunks) if late > begin and early < end]
