"""A server over a real socket in a thread, with the fake engine behind it."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import httpx
import openai
import pytest
import uvicorn

from kvloom.server.app import create_app
from kvloom.server.connections import ConnectionGuard, ConnectionLimits
from kvloom.server.options import ServerOptions


def _load_fakes() -> ModuleType:
    """tests/server/fakes.py: in importlib mode, test folders are not on the path."""
    spec = importlib.util.spec_from_file_location("kvloom_server_fakes", Path(__file__).with_name("fakes.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kvloom_server_fakes"] = module
    spec.loader.exec_module(module)
    return module


fakes = _load_fakes()
HOSTS = {"allowed_hosts": ("x",)}
"""Raw requests in these tests say Host: x."""


@dataclass(frozen=True)
class Served:
    """A running server."""

    engine: object
    port: int
    connections: ConnectionGuard

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def openai(self, **options: object) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", **{"api_key": "none", "max_retries": 0, **options})

    def async_openai(self, **options: object) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.url + "/v1", **{"api_key": "none", "max_retries": 0, **options})

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)


@contextlib.contextmanager
def serve_in_thread(engine: object, options: ServerOptions) -> Iterator[Served]:
    listener = socket.create_server(("127.0.0.1", 0))
    guard = ConnectionGuard(ConnectionLimits.of(options))
    config = uvicorn.Config(create_app(engine, options), http=guard.protocol, ws="none", log_config=None, access_log=False,
                            lifespan="on", timeout_graceful_shutdown=2)  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield Served(engine, listener.getsockname()[1], guard)
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Fails the test if the condition does not come true; the limit is for a broken server only."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """One server for the tests of a module that change nothing about it."""
    with serve_in_thread(fakes.FakeEngine(), ServerOptions(**HOSTS)) as running:
        yield running


@pytest.fixture
def serving() -> Iterator[Callable[..., Served]]:
    """Starts servers of a test's own: serving(engine=..., **options)."""
    with contextlib.ExitStack() as stack:

        def start(engine: object = None, **options: object) -> Served:
            return stack.enter_context(serve_in_thread(engine or fakes.FakeEngine(), ServerOptions(**{**HOSTS, **options})))

        yield start


@pytest.fixture
def serve_for() -> Callable[..., contextlib.AbstractContextManager[Served]]:
    """As `serving`, for a server that ends before the test does: with serve_for(engine=..., **options)."""

    def start(engine: object = None, **options: object) -> contextlib.AbstractContextManager[Served]:
        return serve_in_thread(engine or fakes.FakeEngine(), ServerOptions(**{**HOSTS, **options}))

    return start


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    """The module `fakes`."""
    return fakes


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    """`wait_until`."""
    return wait_until


@pytest.fixture
def says(serving, fake):
    """Starts a server whose model says a text: says(text, **options) -> a client, the server."""

    def start(text=None, template=None, **options):
        engine = fake.FakeEngine()
        engine.says = text
        engine.tokenizer = fake.make_tokenizer(template or fake.TEMPLATE)
        served = serving(engine, **options)
        return served.openai(), served

    return start
