"""Clients that speak HTTP/1.0, or close their sending side once they have asked: both get whole answers."""

import json
import socket

import pytest

COMPLETION = {"prompt": "hello world", "max_tokens": 40}


def request(path="/v1/completions", version="1.1", **fields):
    data = json.dumps({**COMPLETION, **fields}).encode()
    head = f"POST {path} HTTP/{version}\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def everything(connection):
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    return received


def text_of(received, stream):
    """(head, the text of the completion)."""
    head, _, body = received.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head:
        parts, rest = [], body
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            parts.append(rest[: int(size, 16)])
            rest = rest[int(size, 16) + 2 :]
        body = b"".join(parts)
    if not stream:
        return head, json.loads(body)["choices"][0]["text"]
    events = body.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return head, "".join(json.loads(event[6:])["choices"][0]["text"] for event in events[:-2])


@pytest.fixture(params=[True, False], ids=["stream", "whole"])
def stream(request):
    return request.param


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("step", [0.0, 0.004], ids=["at once", "slowly"])
def test_who_closes_its_sending_side_is_answered(serving, fake, stream, version, step):
    engine = fake.FakeEngine(step_seconds=step)
    with serving(engine).connect() as connection:
        connection.sendall(request(version=version, stream=stream))
        connection.shutdown(socket.SHUT_WR)
        received = everything(connection)
    head, text = text_of(received, stream)
    assert head.startswith(b"HTTP/1.1 200 OK\r\n") and b"connection: close" in head
    prompt = engine.tokenizer.encode("hello world")
    assert text == engine.tokenizer.decode(fake.echo_tokens(prompt, 40)) and not engine.aborted


def test_it_is_answered_after_waiting_in_the_queue(serving, fake, until):
    """For several ticks: the answer's first bytes come one by one, and fit."""
    engine = fake.FakeEngine()
    engine.held = True
    running = serving(engine, keep_alive=0.2)
    with running.connect() as connection:
        connection.sendall(request())
        connection.shutdown(socket.SHUT_WR)
        until(lambda: engine.live)
        early = connection.recv(65536)
        while len(early) < len(b"HTTP/1.1 "):
            early += connection.recv(65536)
        assert early == b"HTTP/1.1 "
        engine.held = False
        head, text = text_of(early + everything(connection), False)
    assert head.startswith(b"HTTP/1.1 200 OK\r\n") and text


def test_errors_reach_it_as_well(serving, fake):
    with serving(fake.FakeEngine()).connect() as connection:
        connection.sendall(request(temperature=-1))
        connection.shutdown(socket.SHUT_WR)
        received = everything(connection)
    assert received.startswith(b"HTTP/1.1 400 ") and b"temperature" in received


def test_pipelined_requests_before_the_end_are_answered(serving, fake):
    with serving(fake.FakeEngine(step_seconds=0.001)).connect() as connection:
        connection.sendall(request() + request() + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        received = everything(connection)
    assert received.count(b"HTTP/1.1 200 OK") == 3


@pytest.mark.parametrize("sent", [b"", b"POST /v1/comp", request()[:-3], b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /"])
def test_half_a_request_is_not_waited_for(serving, fake, until, sent):
    running = serving(fake.FakeEngine())
    with running.connect() as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        everything(connection)
        until(lambda: not len(running.connections))


def test_http_1_0_gets_no_chunks(serving, fake, stream):
    engine = fake.FakeEngine(step_seconds=0.001)
    with serving(engine).connect() as connection:
        connection.sendall(request(version="1.0", stream=stream))
        head, text = text_of(everything(connection), stream)
    assert b"chunked" not in head and b"connection: close" in head and text
    assert (b"content-length" in head) != stream


def test_http_1_0_errors_and_head(serving, fake):
    running = serving(fake.FakeEngine())
    for sent, status in ((b"GET /nothing HTTP/1.0\r\n\r\n", 404), (b"HEAD /health HTTP/1.0\r\n\r\n", 200),
                         (b"GET /version HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", 200)):  # fmt: skip
        with running.connect() as connection:
            connection.sendall(sent)
            assert everything(connection).startswith(b"HTTP/1.1 %d " % status)
