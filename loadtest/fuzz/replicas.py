"""`python -m kvloom.loadtest.fuzz.replicas`: random requests to two replicas of which one is killed every few seconds.

Requests are sent undisturbed, before anything is killed, and again while replicas die: answers must be the same, token for
token; clients leave at random. Afterwards no block is held, nothing runs or waits, and /metrics counted what clients got.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

from kvloom.loadtest.client.servers import Server, running

KILL_SECONDS = (4.0, 12.0)
UNDER_WAY = 12
Answer = tuple[list[int], str]


def body(draw: random.Random) -> dict[str, Any]:
    """A random request whose answer is the same wherever it is computed."""
    shared = random.Random(draw.randrange(4))
    tokens = [shared.randrange(300, 40000) for _ in range(draw.choice((0, 64, 400)))]
    made: dict[str, Any] = {
        "prompt": tokens + [draw.randrange(300, 40000) for _ in range(draw.randrange(1, 200))],
        "max_tokens": draw.randrange(1, 80), "temperature": draw.choice((0, 0, 0.8, 1.2)), "seed": draw.randrange(1000),
        "return_token_ids": True, "stream": draw.random() < 0.7, "kv": {},
    }  # fmt: skip
    if draw.random() < 0.4:
        made["kv"] = {"selection": draw.choice(("token_select", "tidal_decode", "recycled", "sink_window")), "budget": 96,
                      "draft": draw.random() < 0.3}  # fmt: skip
    if draw.random() < 0.2:
        made["structured_outputs"] = {"regex": "[a-z ]{1,200}"}
    if draw.random() < 0.2:
        made["stop"] = [" the", "\n\n"]
    if draw.random() < 0.2:
        made["n"] = draw.randrange(2, 4)
    if draw.random() < 0.2:
        made["repetition_penalty"] = 1.2
    return made


async def ask(session: aiohttp.ClientSession, asked: dict[str, Any], leave: float | None = None) -> list[Answer] | None:
    """Token ids and text of every choice; None if the client left. Raises AssertionError for an error of the server's."""
    answers: list[tuple[list[int], list[str]]] = [([], []) for _ in range(asked.get("n", 1))]
    began = time.monotonic()
    async with session.post("/v1/completions", json=asked) as reply:
        assert reply.status == 200, (reply.status, await reply.text())
        if not asked["stream"]:
            for choice in (await reply.json())["choices"]:
                answers[choice["index"]][0].extend(choice["token_ids"])
                answers[choice["index"]][1].append(choice["text"])
        else:
            async for line in reply.content:
                if leave is not None and time.monotonic() - began > leave:
                    return None
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                assert "error" not in event, event
                for choice in event["choices"]:
                    answers[choice["index"]][0].extend(choice.get("token_ids") or [])
                    answers[choice["index"]][1].append(choice["text"])
    return [(tokens, "".join(text)) for tokens, text in answers]


def engines() -> list[int]:
    """Process ids of replicas on this machine."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [int(line.split()[0]) for line in listed if "ray::ServeReplica:kvloom:engine" in line]


async def killing(draw: random.Random, tally: Counter[str], ended: asyncio.Event) -> None:
    """SIGKILL for a replica, again and again."""
    while not ended.is_set():
        await asyncio.sleep(draw.uniform(*KILL_SECONDS))
        if (there := engines()) and not ended.is_set():
            os.kill(draw.choice(there), signal.SIGKILL)
            tally["killed"] += 1


async def figures(session: aiohttp.ClientSession) -> dict[str, float]:
    """/metrics, without labels: added up."""
    found: defaultdict[str, float] = defaultdict(float)
    for line in (await (await session.get("/metrics")).text()).splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name.partition("{")[0]] += float(value)
    return dict(found)


async def fuzz(url: str, seconds: float, seed: int) -> Counter[str]:
    """What happened. Raises AssertionError for what must not."""
    draw, tally = random.Random(seed), Counter[str]()
    bodies = [body(draw) for _ in range(60)]
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=180)) as session:
        expected = []
        for asked in bodies:
            expected.append(await ask(session, asked))
        before, given = await figures(session), Counter[str]()
        ended, until = asyncio.Event(), time.monotonic() + seconds
        killer = asyncio.ensure_future(killing(draw, tally, ended))

        async def client() -> None:
            while time.monotonic() < until:
                i = draw.randrange(len(bodies))
                leaves = bodies[i]["stream"] and draw.random() < 0.2
                answer = await ask(session, bodies[i], draw.uniform(0, 0.5) if leaves else None)
                if answer is None:
                    tally["left"] += 1
                    continue
                tally["answered"] += 1
                given["tokens"] += sum(len(tokens) for tokens, _ in answer)
                if answer != expected[i]:
                    tally["different"] += 1
                    print(f"seed {seed}, request {i} differs: {bodies[i]}", file=sys.stderr)

        try:
            await asyncio.gather(*(client() for _ in range(UNDER_WAY)))
        finally:
            ended.set()
            await killer
        for _ in range(300):
            told = await (await session.get("/v1/kv")).json()
            if len(told["replicas"]) == 2 and not told["requests"]["running"] and not told["requests"]["waiting"]:
                break
            await asyncio.sleep(0.1)
        assert len(told["replicas"]) == 2 and not told["requests"]["running"] + told["requests"]["waiting"], told["requests"]
        assert all(not group["in_use"] for group in told["blocks"].values()), told["blocks"]
        after = await figures(session)
        fallen = [name for name, value in before.items() if name.endswith("_total") and after[name] < value]
        assert not fallen, fallen
        grown = after["kvloom:generation_tokens_total"] - before["kvloom:generation_tokens_total"]
        assert grown >= given["tokens"] and (tally["left"] or grown == given["tokens"]), (grown, given)
    return tally


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if an answer was another than undisturbed; raises AssertionError for what is worse."""
    parser = argparse.ArgumentParser(prog="python -m kvloom.loadtest.fuzz.replicas", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    command = f"{sys.executable} -m kvloom.server.cli serve smollm2 --port {{port}} --replicas 2 --kv-memory 256MiB"
    with tempfile.TemporaryDirectory() as logs, running(Server("replicas", command), Path(logs)) as started:
        try:
            tally = asyncio.run(fuzz(started.url, args.minutes * 60, args.seed))
        except BaseException:
            print((Path(logs) / "replicas.log").read_text()[-6000:], file=sys.stderr)
            raise
    print(f"seed {args.seed}: " + ", ".join(f"{count} {name}" for name, count in sorted(tally.items())))
    return 1 if tally["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
