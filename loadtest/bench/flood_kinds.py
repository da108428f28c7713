"""What a client can pour onto a server: floods by name, each bounded in connections and in time.

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
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Posts:
    """So many clients that send the same kind of body again and again, and read the answers."""

    path: str
    clients: int
    body: Callable[[], Any]
    """What is sent as JSON."""
    anew: bool = True
    """Whether every request has another body."""

    def __call__(self, target: Target) -> None:
        """Until it is over."""
        same = None if self.anew else json.dumps(self.body()).encode()
        clients = [threading.Thread(target=self._client, args=(target, same), daemon=True) for _ in range(self.clients)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(max(0.0, target.until - time.monotonic()) + 1.0)

    def _client(self, target: Target, same: bytes | None) -> None:
        headers = {"Authorization": f"Bearer {target.key}", "Content-Type": "application/json"}
        while not target.over:
            connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=max(0.1, target.until - time.monotonic()))
            with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
                connection.request("POST", self.path, same or json.dumps(self.body()).encode(), headers)
                if connection.getresponse().read() is not None:
                    time.sleep(0.01)


def _text(words: int, seed: int | None = None) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def _long_chat() -> Any:
    return {"messages": [{"role": "user", "content": _text(600_000, 0)[:4_100_000]}]}


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


COMPLETIONS = "/v1/completions"
FLOODS: dict[str, Callable[[Target], None]] = {
    "giant body": Posts(COMPLETIONS, 4, lambda: {"n": 64, "prompt": [7] * 1_390_000}, anew=False),  # 4 MB, 64 completions
    "4 MB chat message": Posts("/v1/chat/completions", 2, _long_chat, anew=False),
    "thousands of short prompts": Posts(COMPLETIONS, 2, lambda: {"prompt": [_text(12) for _ in range(1000)], "max_tokens": 1}),
    "explain": Posts("/v1/kv/explain", 16, lambda: {"prompt": _text(2000, 1)}, anew=False),
    "segments": Posts("/v1/kv/segments", 4, lambda: {"text": _text(1000)}),
    # more than can be computed:
    "queued long prompts": Posts(COMPLETIONS, 64, lambda: {"prompt": _text(4000), "max_tokens": 1}),
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
