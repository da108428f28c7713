"""Clients that leave: their engine requests end at once, streaming or not, running or queued."""

import json
import random
import socket
import struct
import threading

import httpx
import pytest


def post(connection, path, body):
    data = json.dumps({"model": "echo-model", **body}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)


def reset(connection):
    """Close with a TCP reset instead of an orderly end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]})
COMPLETION = ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 4000, "n": 2})


@pytest.mark.parametrize("leave", [socket.socket.close, reset], ids=["close", "reset"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize(("path", "body"), [CHAT, COMPLETION], ids=["chat", "completions"])
def test_leaving_aborts(serving, fake, until, leave, stream, path, body):
    engine = fake.FakeEngine(step_seconds=0.002)
    running = serving(engine)
    count = 1 if path == CHAT[0] else 4
    connection = running.connect()
    post(connection, path, {**body, "stream": stream})
    until(lambda: len(engine.live) == count and engine.generated > count)
    leave(connection)
    until(lambda: not engine.live)
    assert len(engine.aborted) == count and not engine.finished
    with running.client() as client:
        lines = client.get("/metrics").text.splitlines()
    assert any('finished_reason="abort"' in line and line.endswith(f" {count}.0") for line in lines)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_leaving_the_queue_aborts(serving, fake, until, stream):
    engine = fake.FakeEngine()
    engine.held = True
    connection = serving(engine).connect()
    post(connection, CHAT[0], {**CHAT[1], "stream": stream})
    until(lambda: engine.live)
    connection.close()
    until(lambda: not engine.live)
    assert len(engine.aborted) == 1 and engine.generated == 0


def test_one_failure_aborts_the_other_choices(serving, fake, until):
    engine = fake.FakeEngine(step_seconds=0.001)
    engine.fail_after = 3
    with serving(engine).client() as client:
        assert client.post("/v1/completions", json={"prompt": "hello", "n": 5}).status_code == 500
    until(lambda: not engine.live)
    assert len(engine.finished) + len(engine.aborted) == 5


def test_storm(serving, fake, until):
    """64 concurrent streams, some of which leave: survivors are whole, the others are aborted, nothing stays."""
    engine = fake.FakeEngine(step_seconds=0.001)
    running = serving(engine)
    dice = random.Random(0)
    leavers = {i: dice.randrange(1, 30) for i in range(64) if dice.random() < 0.5}
    texts = {}

    def one(i, client):
        body = {"prompt": f"request number {i} of many", "max_tokens": 60, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            text, seen = "", 0
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                    seen += 1
                if seen == leavers.get(i):
                    return
            texts[i] = text

    limits = httpx.Limits(max_connections=64)
    with httpx.Client(base_url=running.url, timeout=30, limits=limits) as client:
        threads = [threading.Thread(target=one, args=(i, client)) for i in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        until(lambda: not engine.live)
    assert sorted(texts) == [i for i in range(64) if i not in leavers]
    for i, text in texts.items():
        prompt = engine.tokenizer.encode(f"request number {i} of many")
        assert text == engine.tokenizer.decode(fake.echo_tokens(prompt, 60))
    assert len(engine.aborted) == len(leavers) and len(engine.finished) == 64 - len(leavers)
