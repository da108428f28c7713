"""What a client can pour onto a server: one function per flood, each bounded in connections and in time.

A flood runs in a process of its own, at the lowest priority, so that what it costs the neighbour is the server's doing
and not that of the client beside it. All of them send to a server on this machine with the key of a tenant of their own.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

WORDS = ("river", "stone", "cloud", "letter", "garden", "window", "number", "summer", "paper", "bridge")


class Target(NamedTuple):
    """Where to, as whom, and until when (time.monotonic, which processes of a machine share)."""

    port: int
    key: str
    until: float

    @property
    def over(self) -> bool:
        """Whether the flood is to end."""
        return time.monotonic() >= self.until


def _head(target: Target, path: str, length: int) -> bytes:
    lines = (f"POST {path} HTTP/1.1", f"Host: 127.0.0.1:{target.port}", f"Authorization: Bearer {target.key}",
             "Content-Type: application/json", f"Content-Length: {length}")  # fmt: skip
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _post(target: Target, path: str, body: Callable[[], bytes], threads: int) -> None:
    """So many clients that send the same kind of body again and again, and read the answers."""

    def one() -> None:
        while not target.over:
            connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=max(0.1, target.until - time.monotonic()))
            with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
                headers = {"Authorization": f"Bearer {target.key}", "Content-Type": "application/json"}
                connection.request("POST", path, body(), headers)
                if connection.getresponse().read() is not None:
                    time.sleep(0.01)

    clients = [threading.Thread(target=one, daemon=True) for _ in range(threads)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(max(0.0, target.until - time.monotonic()) + 1.0)


def _json(body: Any) -> bytes:
    return json.dumps(body).encode()


def _text(words: int, seed: int | None = None) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def giant_body(target: Target) -> None:
    """4 MB of token ids, for 64 completions."""
    body = _json({"n": 64, "prompt": [7] * 1_390_000})
    _post(target, "/v1/completions", lambda: body, 4)


def long_chat(target: Target) -> None:
    """Chat messages of 4 MB."""
    body = _json({"messages": [{"role": "user", "content": _text(600_000, 0)[:4_100_000]}]})
    _post(target, "/v1/chat/completions", lambda: body, 2)


def short_prompts(target: Target) -> None:
    """A thousand short prompts in one request."""
    _post(target, "/v1/completions", lambda: _json({"prompt": [_text(12) for _ in range(1000)], "max_tokens": 1}), 2)


def explain(target: Target) -> None:
    """What would a long prompt reuse?"""
    body = _json({"prompt": _text(2000, 1)})
    _post(target, "/v1/kv/explain", lambda: body, 16)


def segments(target: Target) -> None:
    """New texts to compile."""
    _post(target, "/v1/kv/segments", lambda: _json({"text": _text(1000)}), 4)


def queued(target: Target) -> None:
    """Long prompts, faster than they can be computed."""
    _post(target, "/v1/completions", lambda: _json({"prompt": _text(4000), "max_tokens": 1}), 64)


def silent(target: Target) -> None:
    """Connections that never say anything, opened again when they are closed."""
    _hold(target, 900, b"", b"")


def slow_bodies(target: Target) -> None:
    """Bodies of which a byte comes now and then."""
    _hold(target, 300, _head(target, "/v1/completions", 4_000_000), b"[")


def _hold(target: Target, count: int, first: bytes, then: bytes) -> None:
    held: list[socket.socket] = []
    try:
        while not target.over:
            with contextlib.suppress(OSError):
                if len(held) < count:
                    held.append(socket.create_connection(("127.0.0.1", target.port), timeout=1.0))
                    held[-1].sendall(first)
                    held[-1].setblocking(False)
                    continue
            held = [connection for connection in held if _alive(connection, then)]
            time.sleep(0.2)
    finally:
        for connection in held:
            connection.close()


def _alive(connection: socket.socket, more: bytes) -> bool:
    try:
        if more:
            connection.sendall(more)
        return bool(connection.recv(1024))
    except BlockingIOError:
        return True
    except OSError:
        connection.close()
        return False


FLOODS: dict[str, Callable[[Target], None]] = {
    "giant body": giant_body,
    "4 MB chat message": long_chat,
    "thousands of short prompts": short_prompts,
    "explain": explain,
    "segments": segments,
    "queued long prompts": queued,
    "silent connections": silent,
    "slow bodies": slow_bodies,
}
"""By the name that the table shows."""


def run(name: str, target: Target) -> None:
    """One flood, in the process that is made for it."""
    os.nice(19)
    with contextlib.suppress(OSError):  # where sessions share the machine, niceness counts within one: make it the session's
        os.setsid()
        Path("/proc/self/autogroup").write_text("19")
    FLOODS[name](target)
