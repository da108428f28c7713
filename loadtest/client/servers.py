"""Servers under test as child processes: start one, wait until it is healthy, and be sure that it is gone afterwards.

A child runs in a process group of its own, so that Ctrl-C reaches the measurement alone, which then stops the child in order.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from kvloom.server.exit_codes import USAGE_ERROR

START_SECONDS = 600.0
STOP_SECONDS = 30.0
LAST_WORDS = 400
"""Characters of a dead server's output that are worth repeating."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server under test: a command to start it ({port} is filled in), or where it already runs."""

    name: str
    command: str | None = None
    url: str | None = None


class Started(NamedTuple):
    """A healthy server."""

    url: str
    seconds: float | None
    """From the command to the first healthy answer; None for a server that ran already."""
    pid: int | None = None
    """Its process; None for a server that ran already."""


class StartError(Exception):
    """A server did not become healthy."""

    def __init__(self, name: str, code: int | None, words: str, log: Path) -> None:
        """`code`: its exit code, None if it still ran; `words`: the last it said."""
        how = f"did not become healthy in {START_SECONDS:.0f} s" if code is None else f"ended with exit code {code}"
        super().__init__(f"{name} {how}: {words or 'it said nothing'} (see {log})")
        self.code = code
        self.words = words

    @property
    def refused(self) -> bool:
        """Whether the server found its settings wrong, rather than failed."""
        return self.code == USAGE_ERROR


def answers(url: str) -> bool:
    """Whether /health says 200."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as reply:
            return bool(reply.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def model_name(url: str) -> str:
    """The first model that a server lists."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as reply:
        return str(json.load(reply)["data"][0]["id"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def resident(pid: int) -> float:
    """MiB of memory that a started server's processes hold together, pages of files that they have mapped among them."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError, ValueError):
            if os.getpgid(int(status.parent.name)) == pid:
                total += sum(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return total / 1024


@contextmanager
def running(server: Server, logs: Path) -> Iterator[Started]:
    """A healthy server, stopped at the end whatever happens; its output goes to `logs`/NAME.log. Raises StartError."""
    if server.url is not None:
        yield Started(server.url.rstrip("/"), None)
        return
    assert server.command is not None
    port, path = free_port(), logs / f"{server.name}.log"
    command = [part.replace("{port}", str(port)) for part in shlex.split(server.command)]
    with path.open("ab") as log, _terminated_like_interrupted():
        try:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        except OSError as error:
            raise StartError(server.name, 127, f"{command[0]} cannot be run: {error.strerror}", path) from None
        try:
            yield _wait_until_healthy(server.name, process, f"http://127.0.0.1:{port}", path)
        finally:
            stop(process)


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM unwinds the stack instead of ending the process at once: a server in a group of its own would live on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait_until_healthy(name: str, process: subprocess.Popen[bytes], url: str, log: Path) -> Started:
    began = time.perf_counter()
    while not answers(url):
        if process.poll() is not None:
            raise StartError(name, process.returncode, last_words(log), log)
        if time.perf_counter() - began > START_SECONDS:
            raise StartError(name, None, last_words(log), log)
        time.sleep(0.05)
    return Started(url, time.perf_counter() - began, process.pid)


def last_words(log: Path) -> str:
    """The last line that a server wrote, which is where its reason stands."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][-LAST_WORDS:] if lines else ""


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process group: SIGTERM, and SIGKILL for what does not listen or when the caller is in a hurry."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=STOP_SECONDS)
    finally:
        with suppress(ProcessLookupError):  # children that outlived their leader
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
