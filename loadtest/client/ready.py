"""Before the load: is the server there, what does it serve, and does it take our requests?"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable
from dataclasses import replace
from urllib.parse import urlsplit

import aiohttp

from kvloom.loadtest.client.client import Client, words
from kvloom.loadtest.client.record import Job, Record
from kvloom.loadtest.study.flags import BenchError

PROBE_TOKENS = 8
"""Of a prompt that the test request sends: too few to fill a block of a cache."""
LOOK_SECONDS = 5.0
TENANT_HEADER = "X-KVLoom-Tenant"


async def wait_until_ready(client: Client, seconds: float) -> None:
    """Return once the server is healthy. Raises BenchError after a time."""
    until = time.perf_counter() + seconds
    while (problem := await _problem(client)) is not None:
        if time.perf_counter() >= until:
            raise BenchError(
                f"no server is ready at {client.base_url} after {seconds:g} s ({problem}); start it, or change --base-url or "
                "--ready-timeout"
            )
        await asyncio.sleep(0.2)


async def _problem(client: Client) -> str | None:
    """Why the server is not ready; a refused key is not a reason, as the test request tells more."""
    status = 0
    for path in ("/health", "/v1/models"):  # the latter for servers without the former
        try:
            status, _ = await client.get(path, LOOK_SECONDS)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            return words(error)
        if status in (200, 401, 403):
            return None
        if status not in (404, 405, 501):
            break
    return f"{path} answers with status {status}"


async def first_model(client: Client) -> str:
    """The first model that the server lists. Raises BenchError."""
    try:
        status, text = await client.get("/v1/models", LOOK_SECONDS)
        if status != 200:
            hint = "; give --api-key" if status in (401, 403) else "; give --model"
            raise BenchError(f"{client.base_url}/v1/models answers with status {status}{hint}")
        return str(json.loads(text)["data"][0]["id"])
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise BenchError(f"{client.base_url}/v1/models lists no model ({type(error).__name__}); give --model") from None


async def check(client: Client, job: Job, tenants: Iterable[str]) -> None:
    """Send the beginning of a job, as its tenant and as each with a key of its own. Raises BenchError if it is refused.

    A busy server (429) and an answer without text are no reason to stop.
    """
    probe = Job(prompt=job.prompt[:PROBE_TOKENS], output_tokens=1, extra=job.extra)
    for tenant in dict.fromkeys(("", *tenants, job.tenant)):
        record = await client.send(replace(probe, tenant=tenant), Record(index=0))
        if record.error is not None and record.error_kind not in ("http_429", "empty"):
            whose = f" of tenant {tenant}" if tenant else ""
            hint = trust(client) if tenant and record.status in (400, 403) and TENANT_HEADER in record.error else ""
            raise BenchError(f"{client.base_url} refused a test request{whose}: {record.error}{hint}")


def trust(client: Client) -> str:
    """The command with which a server takes tenants' names from us."""
    address = urlsplit(client.base_url)
    here = (
        "127.0.0.1" if address.hostname in ("127.0.0.1", "localhost") else "::1" if address.hostname == "::1" else "OUR_ADDRESS"
    )
    command = f"kvloom serve {client.model or 'MODEL'} --port {address.port or 80} --trusted-proxies {here}"
    return f"; this workload names its tenants: start the server with `{command}`, or give --tenant-key NAME=KEY for each"
