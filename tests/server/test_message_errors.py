"""Errors of /v1/messages: whoever refuses, in the one shape that Anthropic's clients read, with the name of the request."""

from datetime import datetime

import pytest

from kvloom.engine.errors import OverloadedError
from kvloom.loadtest.fuzz.message_streams import events_of

BODY = {"model": "echo-model", "max_tokens": 5, "messages": [{"role": "user", "content": "hello"}]}


def refusal(reply, status, kind):
    """The message of an error."""
    assert reply.status_code == status, reply.text
    body = reply.json()
    assert set(body) == {"type", "error", "request_id"} and body["type"] == "error"
    assert set(body["error"]) == {"type", "message"} and body["error"]["type"] == kind
    assert body["request_id"] == reply.headers["request-id"] and len(body["request_id"]) > 8
    assert int(reply.headers["content-length"]) == len(reply.content)
    return body["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_keys_of_either_header(serving, path):
    with serving(api_key=("first", "second")).client() as client:
        for headers in ({}, {"X-API-Key": "third"}, {"X-API-Key": ""}, {"Authorization": "Bearer third", "X-API-Key": "first"}):
            assert "API key" in refusal(client.post(path, json=BODY, headers=headers), 401, "authentication_error")
        for headers in (
            {"X-API-Key": "first"},
            {"Authorization": "Bearer second"},
            {"Authorization": "Basic x", "X-API-Key": "first"},
        ):
            assert client.post(path, json=BODY, headers=headers).status_code == 200


def test_a_key_is_the_same_tenant_in_either_header(serving, fake):
    engine = fake.FakeEngine()
    with serving(engine, api_key=("first", "second")).client() as client:
        for headers in ({"X-API-Key": "first"}, {"Authorization": "Bearer first"}, {"X-API-Key": "second"}):
            client.post("/v1/messages", json=BODY, headers=headers)
    one, same, other = (call["tenant"] for call in engine.calls)
    assert one == same != other


def test_layers_in_front_of_the_route(serving):
    with serving(max_body=1024).client() as client:
        refusal(client.post("/v1/messages", json=BODY, headers={"Host": "evil.example"}), 403, "permission_error")
        long = {**BODY, "system": "x" * 2000}
        assert "larger than" in refusal(client.post("/v1/messages", json=long), 413, "request_too_large")
        named = client.post("/v1/messages", json={}, headers={"X-KVLoom-Tenant": "a"})
        assert "trusted proxy" in refusal(named, 400, "invalid_request_error")
        assert "JSON" in refusal(client.post("/v1/messages", content=b"{"), 400, "invalid_request_error")
        refusal(client.get("/v1/messages"), 405, "not_found_error")
        refusal(client.post("/v1/messages/count", json={}), 404, "not_found_error")
        head = client.head("/v1/messages")
        assert head.status_code == 405 and not head.content and head.headers["request-id"]
        assert client.options("/v1/messages").headers["allow"] == "OPTIONS, POST"
        other = client.post("/v1/messagesx", json={})
        assert other.status_code == 404 and "code" in other.json()["error"]  # as everywhere else


def test_the_model(served):
    with served.client() as client:
        reply = client.post("/v1/messages", json={**BODY, "model": "claude-x"})
        assert "echo-model" in refusal(reply, 404, "not_found_error")


def test_models_of_whoever_asks_as_anthropics_clients_do(serving):
    with serving(api_key=("first",)).client(**{"anthropic-version": "2023-06-01", "X-API-Key": "first"}) as client:
        reply = client.get("/v1/models?limit=20")
        listed = reply.json()
        assert reply.headers["request-id"] == reply.headers["x-request-id"]
        assert (listed["first_id"], listed["last_id"], listed["has_more"]) == ("echo-model", "echo-model", False)
        card = client.get("/v1/models/echo-model").json()
        assert listed["data"] == [card] and (card["type"], card["display_name"]) == ("model", "echo-model")
        assert datetime.fromisoformat(card["created_at"]).timestamp() == card["created"] == 1700000000
        assert "echo-model" in refusal(client.get("/v1/models/claude-x"), 404, "not_found_error")
        refusal(client.post("/v1/models"), 405, "not_found_error")
        refusal(client.get("/v1/models", headers={"X-API-Key": "second"}), 401, "authentication_error")
        del client.headers["anthropic-version"]
        other = client.get("/v1/models/claude-x")
        assert other.json()["error"]["code"] == "model_not_found" and "request-id" not in other.headers


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_called_so(served, stream):
    with served.client() as client:
        for text in ("the " * 5000, "x" * 100_000):
            body = {**BODY, "stream": stream, "messages": [{"role": "user", "content": text}]}
            assert refusal(client.post("/v1/messages", json=body), 400, "invalid_request_error").startswith(
                "prompt is too long: "
            )


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses(serving, fake, stream):
    engine = fake.FakeEngine()
    wanted = {"type": "json_schema", "schema": {}}
    body = {**BODY, "stream": stream, "stop_sequences": ["x"], "output_config": {"format": wanted}}
    with serving(engine).client() as client:
        engine.refuse = OverloadedError("too much waits", retry_after=2.3)
        reply = client.post("/v1/messages", json=body)
        assert refusal(reply, 429, "rate_limit_error") == "too much waits" and reply.headers["retry-after"] == "3"
        engine.refuse, engine.fail_after = None, 0
        assert refusal(client.post("/v1/messages", json=body), 500, "api_error")
        for blamed, told in (("response_format", "output_config.format"), ("stop[0]", "stop_sequences[0]"), ("tools", "tools")):
            engine.blame = blamed
            message = refusal(client.post("/v1/messages", json=body), 400, "invalid_request_error")
            assert message == f"{told}: the fake failed"
        engine.dead = "it broke"
        assert refusal(client.post("/v1/messages", json=body), 529, "overloaded_error") == "it broke"


def test_an_error_in_a_stream(serving, fake):
    engine = fake.FakeEngine()
    engine.fail_after = 3
    with serving(engine).client() as client:
        reply = client.post("/v1/messages", json={**BODY, "stream": True})
    name, data = events_of(reply.text)[-1]
    assert reply.status_code == 200 and name == "error" and data["error"]["type"] == "api_error"
    assert data["request_id"] == reply.headers["request-id"] and "the fake failed" in data["error"]["message"]
    assert events_of(reply.text)[0][0] == "message_start"


def test_an_error_that_nobody_expects_gives_nothing_away(serving, fake):
    engine = fake.FakeEngine()
    engine.refuse = RuntimeError("secret path /root/x")
    running = serving(engine)
    with running.client() as client:
        assert refusal(client.post("/v1/messages", json=BODY), 500, "api_error") == "internal error; the server's log says more"
        engine.refuse = None
        assert client.post("/v1/messages", json=BODY).status_code == 200
        counted = [line for line in client.get("/metrics").text.splitlines() if "refused" in line and 'status="500"' in line]
        assert counted[0].endswith(" 1.0")


def test_a_client_may_name_its_request(served):
    with served.client() as client:
        headers = {"X-Request-Id": "mine-1"}
        assert client.post("/v1/messages", json=BODY, headers=headers).headers["request-id"] == "mine-1"
