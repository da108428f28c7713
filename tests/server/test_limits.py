"""Bodies: what headers promise is not trusted, all of them together are bounded, and parsing them takes its share at most."""

import json
import math

import pytest

from kvloom.server.limits import HELD_BODIES, LONGEST_TURN, PARSE_SHARE, SMALL_BODY, BodyHall, parse_seconds

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"


def raw(running, head, body=b""):
    with running.connect() as connection:
        received = b""
        try:
            connection.sendall(head + body)
            while chunk := connection.recv(65536):
                received += chunk
        except (BrokenPipeError, ConnectionResetError):
            pass
        return received


def long_body(size):
    return b'{"prompt": "a", "max_tokens": 1, "cache_salt": "%b"}' % (b"x" * size)


@pytest.mark.parametrize("zeros", [0, 20, 5000])
@pytest.mark.parametrize("method", [b"POST", b"GET", b"DELETE"])
def test_zeros_in_front_of_a_length_change_nothing(serving, fake, zeros, method):
    engine = fake.FakeEngine()
    body = long_body(3000)
    head = HEAD.replace(b"POST", method) + b"Content-Length: %b%d\r\n\r\n" % (b"0" * zeros, len(body))
    assert raw(serving(engine, max_body=1024), head, body).startswith(b"HTTP/1.1 413")
    assert not engine.calls


@pytest.mark.parametrize(
    "headers",
    [b"Content-Length: +3000\r\n", b"Content-Length: 3000\r\nContent-Length: 10\r\n", b"Content-Length: 0x10\r\n",
     b"Content-Length: 10, 3000\r\n", b"Content-Length: -1\r\n", b"Content-Length: 99999999999999999999999\r\n"],
)  # fmt: skip
def test_lengths_that_are_none_are_refused(serving, fake, headers):
    engine = fake.FakeEngine()
    answer = raw(serving(engine, max_body=1024), HEAD + headers + b"\r\n", long_body(2900))
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 413")) and not engine.calls


@pytest.mark.parametrize("headers", [b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", b"Transfer-Encoding: chunked\r\n"])
def test_what_comes_is_counted(serving, fake, headers):
    engine, body = fake.FakeEngine(), long_body(3000)
    chunks = b"".join(b"1;x=%d\r\n%c\r\n" % (i, byte) for i, byte in enumerate(body)) + b"0\r\n\r\n"
    answer = raw(serving(engine, max_body=1024), HEAD + headers + b"\r\n", chunks)
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 413")) and not engine.calls


def test_all_bodies_together_are_bounded(serving, fake):
    """Bodies of which the last byte does not come fill what there is; short ones are served, and room comes back."""
    limit, engine = 256 * 1024, fake.FakeEngine()
    running = serving(engine, max_body=limit)
    size = limit - 1000
    unfinished = [running.connect() for _ in range(HELD_BODIES)]
    for connection in unfinished:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % size + b"x" * (size - 1))
    answers = []
    with running.client() as client:
        while 429 not in answers and len(answers) < 200:  # until they have all been read
            answers.append(client.post("/v1/completions", content=b"x" * size).status_code)
        refused = client.post("/v1/completions", content=b"x" * size)
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "overloaded"
        assert refused.headers["retry-after"]
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
        for connection in unfinished:
            connection.close()
        while client.post("/v1/completions", content=b"x" * size).status_code == 429:
            pass


def test_a_hall_keeps_room_for_others():
    hall = BodyHall(100)
    assert hall.take("a", 50) and not hall.take("a", 1), "no more than what is left"
    assert hall.take("b", 25) and hall.take("", 25) and not hall.take("", 1)
    hall.give("a", 50)
    assert hall.held == 50 and hall.take("b", 12)
    hall.give("b", 37), hall.give("", 25)
    assert hall.held == 0 and not hall._held


def test_turns_leave_time_for_others():
    now = [0.0]
    hall = BodyHall(1 << 30, clock=lambda: now[0])
    ids = json.dumps({"prompt": [7] * 100_000}).encode()
    pause = parse_seconds(ids) / PARSE_SHARE
    assert hall.turn("", b"x" * SMALL_BODY) == 0
    assert [hall.turn("", ids) for _ in range(3)] == pytest.approx([0, pause, 2 * pause])
    assert hall.turn("", b"x" * SMALL_BODY) == 0, "short bodies do not wait for long ones"
    assert hall.turn("other", ids) == 0, "nor do others"
    while (wait := hall.turn("", ids)) < math.inf:
        assert wait <= LONGEST_TURN
    now[0] = 1000.0
    assert hall.turn("", ids) == 0


def test_a_long_body_waits_and_is_served(serving, fake):
    engine = fake.FakeEngine()
    with serving(engine).client() as client:
        for _ in range(2):
            assert client.post("/v1/completions", content=long_body(100_000), headers={"Content-Type": "application/json"}
                               ).status_code == 400  # the salt is too long; all of it was read  # fmt: skip
            assert client.post("/v1/completions", json={"prompt": ["a"] * 500, "max_tokens": 1}).status_code == 200
