"""Connections that send nothing, too little, too slowly or too much, or do not read: closed, and nobody else waits."""

import json
import os
import socket

import pytest

from kvloom.engine.errors import ConfigError
from kvloom.server.connections import SURPLUS, ConnectionGuard, ConnectionLimits, State
from kvloom.server.options import ServerOptions

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = b'{"prompt": "a", "max_tokens": 1}'
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


def everything(connection):
    """What the server says until it closes the connection."""
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    return received


def answer(connection):
    """The first bytes of an answer."""
    return connection.recv(65536)


def test_a_silent_connection_is_closed(serving):
    with serving(header_timeout=0.2).connect() as connection:
        assert everything(connection).startswith(b"HTTP/1.1 408")


def test_a_head_without_end_is_closed_however_often_a_byte_comes(serving):
    running = serving(header_timeout=0.3)
    with running.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
        connection.settimeout(0.02)
        received = b""
        for _ in range(1000):
            try:
                connection.sendall(b"a")
                received += connection.recv(65536)
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                break
            break
        assert received.startswith(b"HTTP/1.1 408") or not received
    assert running.connections.closed[State.HEAD.value] == 1


@pytest.mark.parametrize("head", [b"Content-Length: 1000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"])
def test_a_body_that_does_not_come_is_closed(serving, head):
    running = serving(body_timeout=0.2)
    with running.connect() as connection:
        connection.sendall(HEAD + head)
        assert everything(connection).startswith(b"HTTP/1.1 408")
    assert running.connections.closed[State.BODY.value] == 1


def test_a_body_that_nobody_reads_has_its_time_as_well(serving):
    """Refused for want of a key: the answer is whole, and the rest of the body is not waited for."""
    with serving(body_timeout=0.2, api_key=("k",)).connect() as connection:
        connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
        received = everything(connection)
    assert received.startswith(b"HTTP/1.1 401") and received.count(b"HTTP/1.1") == 1


def test_more_body_gives_more_time():
    now = [0.0]
    guard = ConnectionGuard(ConnectionLimits(body_timeout=30.0), clock=lambda: now[0])

    class Flow:
        read_paused = False

    from kvloom.server.connections import BoundedHttpProtocol

    connection = BoundedHttpProtocol.__new__(BoundedHttpProtocol)
    connection._guard, connection._stuck, connection._in_body, connection.since = guard, None, True, 5.0
    connection.flow, connection._body_bytes = Flow(), 160 * 1024
    assert connection.deadline() == 5.0 + 30.0 + 10.0
    connection.flow.read_paused = True
    assert connection.deadline() == float("inf"), "we do not read: not the client's fault"


def test_an_idle_connection_is_closed_whatever_comes_between_requests(serving):
    """Empty lines are no request: they keep nothing alive."""
    with serving(keep_alive=0.3, header_timeout=30).connect() as connection:
        connection.sendall(HEALTH)
        assert answer(connection).startswith(b"HTTP/1.1 200")
        connection.settimeout(0.02)
        for _ in range(1000):
            try:
                connection.sendall(b"\r\n")
                assert connection.recv(10) == b""
                break
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                break
        else:
            raise AssertionError("it was kept")


def test_work_takes_the_time_it_takes(serving, fake):
    """Deadlines are for what a client has to do, not for the engine."""
    engine = fake.FakeEngine(step_seconds=0.05)
    running = serving(engine, header_timeout=0.1, body_timeout=0.1, send_timeout=0.1, keep_alive=0.1)
    with running.client() as client:
        whole = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 12})
        stream = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 12, "stream": True})
    assert whole.json()["choices"][0]["finish_reason"] == "length" and stream.content.endswith(b"data: [DONE]\n\n")


def test_a_flood_of_silent_connections_closes_its_own(serving, until):
    running = serving(max_connections=16, header_timeout=60)
    idle, flood = running.connect(), []
    idle.sendall(HEALTH)
    assert answer(idle).startswith(b"HTTP/1.1 200")
    for _ in range(60):
        flood.append(running.connect())
        with running.connect() as connection:
            connection.sendall(HEALTH)
            assert answer(connection).startswith(b"HTTP/1.1 200")
    assert len(running.connections) <= 17
    idle.sendall(HEALTH)
    assert answer(idle).startswith(b"HTTP/1.1 200"), "who has asked before goes after those who never did"
    for connection in (idle, *flood):
        connection.close()
    until(lambda: len(running.connections) == 0)


def test_when_all_connections_are_busy_health_answers_and_others_are_refused(serving, fake, until, caplog):
    engine = fake.FakeEngine()
    engine.held = True
    running = serving(engine, max_connections=16)
    busy = [running.connect() for _ in range(16)]
    for connection in busy:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
    until(lambda: len(engine.live) == 16)
    surplus = [running.connect() for _ in range(2 * SURPLUS)]
    with running.connect() as late:
        late.sendall(HEALTH)
        assert answer(late).startswith(b"HTTP/1.1 200")
        late.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
        refused = everything(late)
    assert refused.startswith(b"HTTP/1.1 503") and b"too_many_connections" in refused and b"retry-after: 1" in refused.lower()
    assert len(running.connections) <= 16 + SURPLUS and len(engine.live) == 16
    assert sum("connections closed" in message for message in caplog.messages) == 1, "told, once"
    engine.held = False
    for connection in busy:
        assert answer(connection).startswith(b"HTTP/1.1 200")
    for connection in (*busy, *surplus):
        connection.close()


@pytest.mark.parametrize("n", [4])
def test_a_stream_that_nobody_reads_is_ended(serving, fake, until, n):
    engine = fake.FakeEngine()
    running = serving(engine, send_timeout=0.3)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", running.port))
        body = json.dumps({"prompt": "a", "max_tokens": 4000, "n": n, "stream": True, "logprobs": 20}).encode()
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        until(lambda: len(engine.live) == n)
        until(lambda: not engine.live)  # by the deadline, or before it by the bound on outputs that wait
        until(lambda: running.connections.closed)
    assert len(engine.aborted) == n and running.connections.closed == {State.ANSWER.value: 1}


@pytest.mark.parametrize(
    ("name", "values"),
    [("max_connections", (0, 15, 100_000)), ("header_timeout", (0.0, 4000.0)), ("body_timeout", (-1.0, float("nan"))),
     ("send_timeout", (float("inf"),)), ("keep_alive", (0.01,))],
)  # fmt: skip
def test_settings_are_bounded(name, values):
    for value in values:
        with pytest.raises(ConfigError, match=name):
            ServerOptions(**{name: value})


def test_trailers_do_not_become_headers(serving, fake):
    """A proxy hands trailers on as they are: they must not name a tenant, nor grow without end."""
    engine = fake.FakeEngine()
    chunks = b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY)
    trailer = b"X-KVLoom-Tenant: victim\r\n" + b"X-Big: %b\r\n" % (b"a" * 1000) * 40 + b"\r\n"
    with serving(engine, trusted_proxies=("127.0.0.0/8",)).connect() as connection:
        connection.sendall(HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + trailer)
        assert everything(connection).startswith(b"HTTP/1.1 200")
    assert [call["tenant"] for call in engine.calls] == [""]


@pytest.mark.parametrize("what", ["trailers", "extensions"])
def test_framing_without_end_is_cut_off(serving, what):
    from kvloom.server.limits import LINGER_BYTES

    piece = b"X-Big: %b\r\n" % (b"a" * 65000) if what == "trailers" else b"1;%b\r\na\r\n" % (b"x" * 65000)
    running = serving(max_body=65536)
    with running.connect() as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + (b"0\r\n" if what == "trailers" else b""))
        sent = 0
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while sent < 4 * LINGER_BYTES:
                connection.sendall(piece * 16)
                sent += 16 * len(piece)
    assert sent <= 2 * LINGER_BYTES
    with running.client() as client:
        assert client.get("/health").status_code == 200


def test_few_file_descriptors_are_told_of(serving, until, monkeypatch, caplog):
    running = serving(header_timeout=0.4)
    real = os.open

    def none_left(path, *args, **kwargs):
        if path == os.devnull:
            raise OSError(24, "Too many open files")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", none_left)
    with running.connect() as connection:
        everything(connection)
    until(lambda: any("file descriptors" in message for message in caplog.messages))


@pytest.mark.parametrize(
    "head", [b"GARBAGE\r\n\r\n", HEAD + b"Content-Length: +48\r\n\r\n", HEAD + b"Content-Length: -1\r\n\r\n"]
)
def test_what_is_no_http_is_told_in_the_shape_of_every_error(serving, head):
    with serving().connect() as connection:
        connection.sendall(head)
        status, _, body = everything(connection).partition(b"\r\n\r\n")
    assert status.startswith(b"HTTP/1.1 400") and b"application/json" in status
    assert json.loads(body)["error"]["code"] == "invalid_http"
