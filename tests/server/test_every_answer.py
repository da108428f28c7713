"""What every answer has: an id, and a line in the log if it is a refusal, without anything that the client wrote."""

from dataclasses import replace

import pytest

from kvloom.engine.errors import OverloadedError

COMPLETION = "/v1/completions"
BODY = {"prompt": "confidential", "max_tokens": 2}


def ask(client, kind):
    """An answer of this kind."""
    match kind:
        case "whole":
            return client.post(COMPLETION, json=BODY)
        case "stream":
            return client.post(COMPLETION, json=BODY | {"stream": True})
        case "400":
            return client.post(COMPLETION, json=BODY | {"temperature": "confidential"})
        case "401":
            return client.get("/v1/models", headers={"Authorization": "Bearer confidential"})
        case "403":
            return client.get("/metrics")
        case "404":
            return client.get("/confid%0Aential?prompt=confidential")
        case "405":
            return client.put("/v1/models")
        case "413":
            return client.post(COMPLETION, json={"prompt": "confidential" * 1000})
        case "415":
            return client.post(COMPLETION, content=b"confidential", headers={"Content-Type": "text/plain"})
        case "431":
            return client.get("/health", headers={f"X-{i}": "a" * 60_000 for i in range(2)})
        case "health":
            return client.get("/health")
        case "options":
            return client.options("/v1/models")
        case "preflight":
            headers = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
            return client.options("/v1/models", headers=headers)


KINDS = ("whole", "stream", "400", "401", "403", "404", "405", "413", "415", "431", "health", "options", "preflight")


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_has_an_id(serving, kind, caplog):
    caplog.set_level("INFO", "kvloom.access")
    running = serving(api_key=("k",), admin_key=("root",), max_body=4096, cors=("https://a.example",))
    with running.client(Authorization="Bearer k") as client:
        first, second = ask(client, kind), ask(client, kind)
        assert first.headers["x-request-id"] != second.headers["x-request-id"]
        client.headers["X-Request-Id"] = "mine-1"
        answer = ask(client, kind)
    assert answer.headers["x-request-id"] == "mine-1" or kind == "431"
    assert str(answer.status_code) == kind or answer.status_code in (200, 204)
    lines = [line for line in caplog.messages if " status=" in line]
    assert len(lines) == (3 if kind.isdigit() and kind != "431" else 0)
    assert all(f"status={kind} error=" in line and "confidential" not in line and "\n" not in line for line in lines)
    assert all(line.startswith("mine-1 ") for line in lines[2:])


def test_an_internal_error_has_an_id(serving, fake):
    engine = fake.FakeEngine()
    engine.refuse = RuntimeError("confidential")
    with serving(engine).client() as client:
        answer = client.post(COMPLETION, json=BODY, headers={"X-Request-Id": "mine-2"})
    assert answer.status_code == 500 and answer.headers["x-request-id"] == "mine-2" and "confidential" not in answer.text


@pytest.mark.parametrize("path", ["chat/completions", "completions", "messages", "responses"])
def test_a_whole_answer_that_fails_has_one_id(serving, fake, caplog, monkeypatch, path):
    """In the answer, in the line of its generation and in that of the refusal."""
    caplog.set_level("INFO", "kvloom.access")
    engine = fake.FakeEngine()
    steps = engine._steps

    async def ended(*args):
        async for output in steps(*args):
            yield output
            yield replace(output, finish_reason="abort", tokens=())
            return

    monkeypatch.setattr(engine, "_steps", ended)
    messages = [{"role": "user", "content": "hello"}]
    body = {"prompt": "a"} if path == "completions" else {"input": "a"} if path == "responses" else {"messages": messages}
    with serving(engine).client() as client:
        answer = client.post(f"/v1/{path}", json={**body, **({"max_tokens": 5} if path == "messages" else {})})
    name = answer.headers["x-request-id"]
    assert answer.status_code in (503, 529) and answer.json().get("request_id", name) == name
    generation, refusal = caplog.messages
    assert generation.startswith(f"{name} prompt=") and "ServerClosingError" in generation
    told = "overloaded_error" if path == "messages" else "shutting_down"
    assert refusal == f"{name} POST /v1/{path} status={answer.status_code} error={told}"


def test_a_refusal_for_load_has_an_id_and_a_line(serving, fake, caplog):
    caplog.set_level("INFO", "kvloom.access")
    engine = fake.FakeEngine()
    engine.refuse = OverloadedError("too much")
    with serving(engine).client() as client:
        answer = client.post(COMPLETION, json=BODY)
    assert answer.status_code == 429
    assert caplog.messages[-1] == f"{answer.headers['x-request-id']} POST {COMPLETION} status=429 error=overloaded"
    record = caplog.records[-1]
    assert record.levelname == "INFO"


@pytest.mark.parametrize(
    ("sent", "status"),
    [(b"NONSENSE\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000, 431), (b"POST /v1/completions HTTP/1.1\r\n", 408)],
)
def test_answers_that_no_application_gives_are_whole(serving, sent, status):
    with serving(header_timeout=0.2).connect() as connection:
        connection.sendall(sent)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status) and b"x-request-id: " in head.lower()
    assert body.startswith(b'{"error":{"message":') and b"content-length: %d" % len(body) in head


def test_no_line_where_none_is_wanted(serving, caplog):
    caplog.set_level("INFO", "kvloom.access")
    with serving(access_log=False).client() as client:
        assert client.get("/nothing").status_code == 404
    assert not caplog.messages


@pytest.mark.parametrize("path", ["/health/", "/v1/models/", "/v1/kv//", "/docs/", "/version/"])
def test_a_slash_at_the_end_means_nothing(served, path):
    with served.client() as client:
        answer = client.get(path)
    assert answer.status_code == 200 and not answer.history


def test_a_post_with_a_slash_keeps_its_body(served):
    with served.client() as client:
        answer = client.post(COMPLETION + "/", json=BODY)
        missing = client.post("/nothing/", json=BODY)
    assert answer.json()["object"] == "text_completion"
    assert missing.status_code == 404 and missing.json()["error"]["type"] == "not_found_error"


def test_a_slash_opens_no_door(serving):
    with serving(api_key=("k",)).client() as client:
        assert client.get("/v1/models/").status_code == 401 and client.get("/health/").status_code == 200
        assert client.get("//health").status_code == 401
