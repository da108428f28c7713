"""The bytes of a stream: what strict clients trip on."""

import json

import pytest


def events(served, path, body):
    with served.client() as client:
        response = client.post(path, json={"model": "echo-model", "stream": True, **body})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    return response.content


CHAT = {"messages": [{"role": "user", "content": "hi 🦊 'quoted' \"text\" \\ \n"}], "max_tokens": 60}


@pytest.mark.parametrize("options", [{}, {"logprobs": True, "top_logprobs": 1}, {"stream_options": {"include_usage": True}}])
def test_every_line_is_data_and_nothing_is_empty(served, options):
    raw = events(served, "/v1/chat/completions", CHAT | options)
    assert raw.endswith(b"data: [DONE]\n\n") and b"\r" not in raw
    parts = raw.split(b"\n\n")
    assert parts[-1] == b"" and all(part.startswith(b"data: ") and b"\n" not in part for part in parts[:-1])
    chunks = [json.loads(part[6:]) for part in parts[:-2]]
    with_text = [c for c in chunks if c["choices"] and "content" in c["choices"][0]["delta"]]
    assert with_text[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(c["choices"][0]["delta"]["content"] for c in with_text[1:])
    assert "".join(c["choices"][0]["delta"]["content"] for c in with_text).count("🦊") >= 1
    assert "\ufffd" not in raw.decode()


def test_one_event_per_token(served):
    raw = events(served, "/v1/completions", {"prompt": "hello world", "max_tokens": 10})
    assert raw.count(b"data: ") == 11


def test_usage_only_when_asked(served):
    assert b"usage" not in events(served, "/v1/chat/completions", CHAT)
    asked = events(served, "/v1/chat/completions", CHAT | {"stream_options": {"include_usage": True}})
    last = json.loads(asked.split(b"\n\n")[-3][6:])
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 60


def test_role_chunk_waits_for_the_first_token(serving, fake, until):
    """Nothing, not even headers, before the engine has a token: a client's clock for the first token stays honest."""
    engine = fake.FakeEngine()
    engine.held = True
    running = serving(engine)
    body = json.dumps({"messages": CHAT["messages"], "stream": True, "max_tokens": 2}).encode()
    with running.connect() as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        until(lambda: engine.live)
        connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            connection.recv(1)
        connection.settimeout(10)
        engine.held = False
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    assert received.startswith(b"HTTP/1.1 200") and b"data: [DONE]" in received


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_error_inside_a_stream(serving, fake, path):
    engine = fake.FakeEngine()
    engine.fail_after = 2
    body = {"prompt": "hello", "max_tokens": 9} if path == "/v1/completions" else CHAT
    parts = events(serving(engine), path, body).split(b"\n\n")
    assert parts[-2] == b"data: [DONE]"
    error = json.loads(parts[-3][6:])["error"]
    assert error["type"] == "server_error" and error["code"] == "generation_failed" and "the fake failed" in error["message"]


def test_error_before_the_first_token_has_its_status(serving, fake):
    engine = fake.FakeEngine()
    engine.fail_after = 0
    with serving(engine).client() as client:
        response = client.post("/v1/completions", json={"prompt": "hello", "stream": True})
    assert response.status_code == 500 and response.json()["error"]["code"] == "generation_failed"


def test_request_id(served):
    with served.client() as client:
        kept = client.post("/v1/completions", json={"prompt": "a"}, headers={"X-Request-Id": "trace-1.2:3"})
        dropped = client.post("/v1/completions", json={"prompt": "a"}, headers={"X-Request-Id": "evil\tid $(x)"})
    assert kept.headers["x-request-id"] == "trace-1.2:3"
    assert dropped.headers["x-request-id"] == dropped.json()["id"]
    assert kept.json()["id"] != "trace-1.2:3"
