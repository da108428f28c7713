"""Random messages through the whole application and a real engine: no error but the caller's own, no hang, nothing left behind.

    python -m kvloom.loadtest.fuzz.messages [--requests N | --minutes M] [--seed S]

Clients leave where they like: before the first token, in the middle of a stream, or never. A stream that is read to its end is
put together strictly; where nothing is drawn by chance it is the same message as without streaming, and `count_tokens` counts
what it reports. After every batch the engine has nothing left of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from kvloom.engine import LLM
from kvloom.loadtest.fuzz import chats
from kvloom.loadtest.fuzz.asgi import Reply
from kvloom.loadtest.fuzz.engines import write_model
from kvloom.loadtest.fuzz.fuzzer import FuzzError
from kvloom.loadtest.fuzz.in_process import Application, serving
from kvloom.loadtest.fuzz.message_bodies import answer, body
from kvloom.loadtest.fuzz.message_streams import events_of, message_of
from kvloom.server import sse

BATCH = 24
"""Requests at once."""
LONGEST = 2048
PING_SECONDS = 0.003
"""So short that many streams have pings, before their first token, too."""
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% if enable_thinking %}<think>{% endif %}{% endif %}"
)
STOPS = {"end_turn", "max_tokens", "tool_use", "stop_sequence", "model_context_window_exceeded"}


def write(folder: Path) -> None:
    """The fuzzer's model, with a chat template and a longer context."""
    write_model(folder)
    for name, more in (
        ("config.json", {"max_position_embeddings": LONGEST}),
        ("tokenizer_config.json", {"chat_template": TEMPLATE}),
    ):
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **more}))


def engine(folder: Path) -> LLM:
    """An engine of it, whose cache is too small for what is asked at once."""
    return LLM(str(folder), device="cpu", dtype="fp32", threads=1, kv_memory="1MiB", block_size=8, max_batched_tokens=256,
               max_num_seqs=16)  # fmt: skip


def said(llm: LLM, draw: random.Random) -> dict[str, Any]:
    """What makes the model say marks, calls and crumbs."""
    text = answer(draw) if draw.random() < 0.6 else chats.answer(draw)
    tokens = llm.tokenizer.encode(text, add_special_tokens=False)[: draw.choice((400, 400, 400, 30))]
    return {"forced_tokens": [*tokens, *([0] if draw.random() < 0.8 else [])], "max_tokens": len(tokens) + 9}


async def attempt(application: Application, llm: LLM, draw: random.Random) -> str:
    """One request and what belongs to it; says how it ended. Raises FuzzError, or what nobody expects."""
    asked = body(draw)
    if draw.random() < 0.5:
        asked |= said(llm, draw)
    data = json.dumps(asked).encode()
    if draw.random() < 0.02:
        data = data[: draw.randrange(len(data))]
    leaves = draw.choice((0, 1, 2, 5)) if draw.random() < 0.3 else None
    reply = await application.post("/v1/messages", data, leaves)
    if leaves is not None:
        return "left"
    if reply.status != 200:
        return refused(reply)
    message = whole(reply, streamed=asked.get("stream") is True)
    if isinstance(message, str):
        return message
    if asked.get("kv") is None and "stream" in asked and asked.get("temperature") == 0:
        other = await application.post("/v1/messages", json.dumps({**asked, "stream": not asked["stream"]}).encode())
        same(message, whole(other, streamed=not asked["stream"]))
    counted = await application.post("/v1/messages/count_tokens", data)
    usage = message["usage"]
    if counted.json() != {"input_tokens": sum(count for name, count in usage.items() if name.endswith("input_tokens"))}:
        raise FuzzError(f"{counted.text} is counted, {usage} told")
    return str(message["stop_reason"])


def refused(reply: Reply) -> str:
    """Checks an error."""
    told = reply.json()
    if reply.status not in (400, 413, 429) or told["type"] != "error" or not told["error"]["message"]:
        raise FuzzError(f"{reply.status}: {reply.text[:500]}")
    if told["request_id"] != reply.headers["request-id"]:
        raise FuzzError(f"another request id than {reply.headers['request-id']}: {reply.text[:300]}")
    return f"{reply.status}"


def whole(reply: Reply, *, streamed: bool) -> dict[str, Any] | str:
    """The message of an answer, or how its stream failed through the caller's fault."""
    if streamed and (last := events_of(reply.text)[-1])[0] == "error":
        if last[1]["error"]["type"] not in ("invalid_request_error", "rate_limit_error"):
            raise FuzzError(f"a stream ends with {last[1]}")
        return "refused in a stream"
    message: dict[str, Any] = message_of(reply.text) if streamed else reply.json()
    if message["stop_reason"] not in STOPS or not all(isinstance(count, int | dict) for count in message["usage"].values()):
        raise FuzzError(f"a strange message: {message}")
    if (message["stop_reason"] == "stop_sequence") != (message["stop_sequence"] is not None):
        raise FuzzError(f"stopped at {message['stop_sequence']!r}, for {message['stop_reason']}")
    return message


def same(message: dict[str, Any], other: dict[str, Any] | str) -> None:
    """Raises FuzzError where two messages differ in more than ids and what was cached."""
    if isinstance(other, str):
        raise FuzzError(f"{message['content']} once, and then {other}")
    one, two = (
        (
            [{**block, "id": ""} for block in each["content"]],
            each["stop_reason"],
            each["stop_sequence"],
            each["usage"]["output_tokens"],
        )
        for each in (message, other)
    )
    if one != two:
        raise FuzzError(f"streamed and not: {one} and {two}")


async def run(folder: Path, seed: int, requests: int, until: float = float("inf")) -> Counter[str]:
    """So many requests, or until the monotonic clock says so; how they ended. Raises FuzzError that names the batch."""
    llm = engine(folder)
    with patch.object(sse, "PING_SECONDS", PING_SECONDS):
        async with serving(llm) as application:
            return await _batches(application, llm, seed, requests, until)


async def _batches(application: Application, llm: LLM, seed: int, requests: int, until: float) -> Counter[str]:
    ends, done = Counter[str](), 0
    while done < requests and time.monotonic() < until:
        count = min(BATCH, requests - done)
        draws = [random.Random(f"{seed} {done + number}") for number in range(count)]
        try:
            ends.update(await asyncio.gather(*(attempt(application, llm, draw) for draw in draws)))
            await application.check()
        except Exception as error:
            raise FuzzError(f"requests {done} to {done + count} of seed {seed}: {type(error).__name__}: {error}") from error
        done += count
    return ends


def main(argv: Sequence[str] | None = None) -> int:
    """Run; prints how requests ended."""
    made = argparse.ArgumentParser(prog="python -m kvloom.loadtest.fuzz.messages", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--requests", type=int, default=None, help="end after so many requests; default: 2000")
    made.add_argument("--minutes", type=float, default=None, help="end after so many minutes")
    made.add_argument("--seed", type=int, default=0)
    args = made.parse_args(argv)
    logging.basicConfig(level=logging.ERROR, format="%(name)s: %(message)s")
    most = args.requests or (sys.maxsize if args.minutes else 2000)
    until = time.monotonic() + args.minutes * 60 if args.minutes else float("inf")
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        ends = asyncio.run(run(Path(folder), args.seed, most, until))
    print(f"{ends.total()} requests: " + ", ".join(f"{count} {end}" for end, count in ends.most_common()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
