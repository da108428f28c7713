"""`kvloom bench soak`: clients that leave, that stop reading, that come all at once, and ten thousand that behave.

Starts a server of its own on this machine. After each part everything must be as it was: no request runs, every block is free
or cached, the engine's own books balance (it proves them once it has been idle for a second, and ends if they do not), and no
client waits for an answer. Over the last half of the ordinary requests the server's resident memory may grow by 3%. Returns 1
if any of that does not hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from kvloom.loadtest.bench.flood_kinds import WORDS
from kvloom.loadtest.client.servers import Server, StartError, running
from kvloom.loadtest.figures import publish
from kvloom.loadtest.study import flags
from kvloom.loadtest.study.flags import BenchError, add, add_publish, need, parser
from kvloom.loadtest.study.results import Column, Row, cells, console, console_table

ABORT_SECONDS = 10.0
"""In which all of those that leave have come and gone."""
HANG_SECONDS = 300.0
"""Without an end of any kind: hung."""
SETTLE_SECONDS = 2.5
"""Idle, until the engine has proved its books."""
SEND_TIMEOUT = 5.0
"""The server's, for who stops reading."""
CLIENTS = 16
"""Of the ordinary requests."""
MOST_GROWTH = 0.03
KV_MEMORY = "128MiB"
"""So little that all of it has been written to before memory is compared."""
COLUMNS = (
    Column("part", "part"),
    Column("requests", "requests"),
    Column("answered", "answered"),
    Column("refused with 429", "429"),
    Column("left", "left"),
    Column("ended by the server", "ended"),
    Column("hung", "hung"),
    Column("seconds", "seconds", ".1f"),
    Column("resident afterwards, MB", "resident", ".1f"),
    Column("blocks lost", "lost"),
)
Fate = str
"""answered, 429 (or another status that refuses), left, ended, hung."""


class Target(NamedTuple):
    """The server."""

    url: str
    pid: int

    @property
    def resident(self) -> float:
        """Its resident memory in MB."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1000


def _body(words: int, max_tokens: int, **more: Any) -> dict[str, Any]:
    text = " ".join(random.choices(WORDS, k=words))
    message = {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "ignore_eos": True}
    return {**message, "temperature": 0, **more}


async def _open(
    target: Target, body: dict[str, Any], *, narrow: bool = False
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A request on a connection of its own. narrow: over which little is on its way at a time: who does not read is felt."""
    port = urlsplit(target.url).port or 80
    connection = socket.socket()
    if narrow:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1460)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=2048 if narrow else 65536)
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n" \
           f"Content-Length: {len(data)}\r\n\r\n"  # fmt: skip
    writer.write(head.encode() + data)
    return reader, writer


async def _leave(target: Target, when: float) -> Fate:
    """Ask for a long stream, and close the connection at a random moment: before an answer has begun, or within it."""
    await asyncio.sleep(when)
    reader, writer = await _open(target, _body(random.randint(1, 60), 256, stream=random.random() < 0.7))
    reading = asyncio.ensure_future(reader.read(random.choice([1, 500, 5000])))
    await asyncio.wait([reading], timeout=random.choice([0.0, 0.05, 0.5, 1.0]))
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    writer.close()
    return "left"


async def _stop_reading(target: Target, count: int) -> Counter[Fate]:
    """Ask for more than a fast machine puts on the way, read a little, and look again once the server runs nothing any more."""
    opened = await asyncio.gather(*(_open(target, _body(4, 2000, **_LONG), narrow=True) for _ in range(count)))
    begun = await asyncio.gather(*(reader.read(20) for reader, _ in opened))
    await _at_rest(target, HANG_SECONDS)
    fates = Counter[Fate]()
    for (reader, writer), head in zip(opened, begun):
        rest = b""
        with contextlib.suppress(ConnectionError):
            rest = await reader.read()
        fates["429" if b" 429 " in head else "answered" if rest.endswith(b"[DONE]\n\n\r\n0\r\n\r\n") else "ended"] += 1
        writer.close()
    return fates


_LONG = {"stream": True, "logprobs": True, "top_logprobs": 20}


async def _stream(session: Any, target: Target, tokens: int, *, stream: bool = True) -> Fate:
    """An ordinary request, read to its end."""
    try:
        body = _body(random.randint(1, 12), tokens, stream=stream)
        async with asyncio.timeout(HANG_SECONDS), session.post(f"{target.url}/v1/chat/completions", json=body) as reply:
            content = await reply.read()
            whole = content.endswith(b"data: [DONE]\n\n") if stream else bool(json.loads(content).get("choices"))
            return "answered" if reply.status == 200 and whole else str(reply.status) if reply.status != 200 else "ended"
    except TimeoutError:
        return "hung"


async def _aborts(target: Target, count: int) -> Counter[Fate]:
    moments = sorted(random.uniform(0, ABORT_SECONDS - 2.0) for _ in range(count))
    return Counter(await asyncio.gather(*(_leave(target, moment) for moment in moments)))


async def _together(target: Target, count: int) -> Counter[Fate]:
    """All at once."""
    import aiohttp

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout()) as session:
        return Counter(await asyncio.gather(*(_stream(session, target, 4) for _ in range(count))))


async def _ordinary(target: Target, count: int) -> Counter[Fate]:
    """A few clients, one request after the other each."""
    import aiohttp

    fates, left = Counter[Fate](), iter(range(count))

    async def client(session: Any) -> None:
        for number in left:
            fates[await _stream(session, target, random.randint(1, 3), stream=number % 2 == 0)] += 1

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout()) as session:
        await asyncio.gather(*(client(session) for _ in range(CLIENTS)))
    return fates


async def _get(target: Target, path: str) -> Any:
    import aiohttp

    async with aiohttp.ClientSession() as session, session.get(target.url + path) as reply:
        if reply.status != 200:
            raise BenchError(f"{path} answers {reply.status}; the server's log says why")
        return await reply.json(content_type=None)


async def _at_rest(target: Target, seconds: float = 30.0) -> None:
    """Return once nothing runs or waits. Raises BenchError if that takes longer."""
    until = time.monotonic() + seconds
    while (load := (await _get(target, "/load"))["server_load"]) > 0:
        if time.monotonic() > until:
            raise BenchError(f"{load} requests still run {seconds:g} s after their clients have left or stopped reading")
        await asyncio.sleep(0.1)


async def settled(target: Target) -> tuple[float, int]:
    """Resident memory and blocks that are missing, once nothing runs. Raises BenchError if something goes on running."""
    await _at_rest(target)
    await asyncio.sleep(SETTLE_SECONDS)
    await _get(target, "/health")
    groups = (await _get(target, "/v1/kv"))["blocks"].values()
    return target.resident, sum(group["total"] - group["free"] - group["cached"] for group in groups)


async def forgotten(target: Target) -> int:
    """Blocks that are missing once everything cached has been forgotten."""
    import aiohttp

    async with aiohttp.ClientSession() as session, session.post(f"{target.url}/v1/kv/reset") as reply:
        reply.raise_for_status()
    return sum(group["total"] - group["free"] for group in (await _get(target, "/v1/kv"))["blocks"].values())


Part = Callable[[Target, int], Awaitable[Counter[Fate]]]


async def soak(target: Target, aborts: int, readers: int, streams: int, requests: int) -> list[Row]:
    """A row per part. Raises BenchError if the server does not come to rest."""
    parts: Sequence[tuple[str, Part, int]] = (
        (f"{aborts:,} leave within {ABORT_SECONDS:.0f} s", _aborts, aborts),
        ("stop reading", _stop_reading, readers),
        ("streams at once", _together, streams),
        ("first half of ordinary requests", _ordinary, requests // 2),
        ("second half", _ordinary, requests - requests // 2),
    )
    rows = []
    for name, part, count in parts:
        began = time.monotonic()
        fates = await part(target, count)
        seconds = time.monotonic() - began
        resident, lost = await settled(target)
        known = {fate: fates[fate] for fate in ("answered", "429", "left", "ended", "hung")}
        if strange := fates.total() - sum(known.values()):
            raise BenchError(f"{strange} of {name} got other answers: {dict(fates)}")
        rows.append({"part": name, "requests": count, **known, "seconds": seconds, "resident": resident, "lost": lost})
        console.print(f"{name}: {dict(fates)} in {seconds:.1f} s, {resident:.1f} MB, {lost} blocks lost")
    lost = await forgotten(target)
    rows.append({"part": "everything cached forgotten", "resident": target.resident, "lost": lost})
    return rows


def problems(rows: Sequence[Row]) -> list[str]:
    """What does not hold."""
    aborts, readers, streams, first, second, _ = rows
    found = [f"{row['part']}: {row['lost']} blocks lost" for row in rows if row["lost"]]
    found += [f"{row['part']}: {row['hung']} hung" for row in rows if row.get("hung")]
    if aborts["left"] < aborts["requests"] or aborts["seconds"] > ABORT_SECONDS:
        found.append(f"{aborts['left']} left in {aborts['seconds']:.1f} s; wanted {aborts['requests']} in {ABORT_SECONDS:g}")
    if readers["ended"] + readers["429"] < readers["requests"]:
        found.append(f"{readers['ended']} of {readers['requests']} that do not read were ended")
    for row in (streams, first, second):
        if row["answered"] + row["429"] < row["requests"]:
            found.append(f"{row['part']}: {row['answered']} answered and {row['429']} refused of {row['requests']}")
    if (growth := second["resident"] / first["resident"] - 1) > MOST_GROWTH:
        found.append(f"resident memory grew by {growth:.1%} over the second half; allowed: {MOST_GROWTH:.0%}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    made = parser("bench soak", __doc__)
    made.add_argument("--model", default="smollm2", help="model to serve (default: %(default)s)")
    add(made, ("aborts", 500, "clients that leave"), ("readers", 50, "clients that stop reading"),
        ("streams", 1000, "streams at once, at most 1000"), ("requests", 10_000, "ordinary requests, at least 2"))  # fmt: skip
    made.add_argument("--seed", type=int, default=0, help="of prompts and moments (default: %(default)s)")
    made.add_argument("--out", type=Path, default=Path("results/soak"), help="folder for soak.jsonl and the server's log")
    add_publish(made)
    args = made.parse_args(argv)
    if args.streams > 1000 or args.requests < 2:
        made.error("--streams is at most 1000, which a server has connections for, and --requests at least 2")
    need("aiohttp")
    random.seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    command = f"{sys.executable} -m kvloom.server.cli serve {args.model} --port {{port}} --send-timeout {SEND_TIMEOUT}"
    try:
        with running(Server("soak", f"{command} --no-access-log --kv-memory {KV_MEMORY}"), args.out) as started:
            assert started.pid is not None
            target = Target(started.url, started.pid)
            rows = asyncio.run(soak(target, args.aborts, args.readers, args.streams, args.requests))
    except (StartError, BenchError) as error:
        print(f"kvloom bench soak: {error}", file=sys.stderr)
        return flags.FAILED
    (args.out / "soak.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = cells(COLUMNS, rows)
    console.print(console_table(*table))
    found = problems(rows)
    for problem in found:
        flags.complain(problem, flags.FAILED)
    if args.publish and not found:
        growth = rows[4]["resident"] / rows[3]["resident"] - 1
        publish(args.publish, *table, f"Resident memory grew by {growth:.2%} over the second half.")
    return flags.FAILED if found else 0
