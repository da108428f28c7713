"""Paths of other APIs: an error that says what is served, in OpenAI's shape, and no second try of its client."""

import openai
import pytest

from kvloom.server.unserved import UNSERVED

SERVED = "/v1/chat/completions, /v1/completions"


BESIDE_SERVED = {"/v1/messages/batches", "/v1/responses/compact"}


@pytest.mark.parametrize("path", sorted(UNSERVED.keys() - BESIDE_SERVED))
def test_what_others_serve(served, path):
    with served.client() as client:
        for reply in (client.post(path, json={}), client.get(path + "/x")):
            error = reply.json()["error"]
            assert reply.status_code == 501 and reply.headers["x-should-retry"] == "false"
            assert error["message"].startswith(f"{path} is not served: {UNSERVED[path]}") and SERVED in error["message"]
            assert (error["type"], error["code"]) == ("server_error", "not_served")
        beside = client.post(path + "x", json={}).json()["error"]
        assert "no such path" in beside["message"] and SERVED in beside["message"]


def test_what_is_not_served_beside_what_is(served):
    with served.client() as client:
        for path in ("/v1/responses/compact", "/v1/responses/compact/x"):
            for reply in (client.post(path, json={}), client.get(path), client.delete(path)):
                error = reply.json()["error"]
                assert (reply.status_code, error["code"]) == (501, "not_served") and reply.headers["x-should-retry"] == "false"
                assert "use truncation" in error["message"] and SERVED in error["message"]
        assert client.get("/v1/responses/compact_1").json()["error"]["code"] == "response_not_found"
        for path in ("/v1/messages/batches", "/v1/messages/batches/x"):
            for reply in (client.post(path, json={}), client.get(path)):
                body = reply.json()
                assert (reply.status_code, reply.headers["x-should-retry"]) == (501, "false")
                assert (body["type"], body["error"]["type"]) == ("error", "api_error")
                assert "use /v1/messages for each request" in body["error"]["message"]


def test_every_path_that_is_named_is_served(served):
    with served.client() as client:
        told = client.get("/v1/nothing").json()["error"]
        assert told["type"] == "not_found_error"
        for path in told["message"].partition("POST ")[2].partition(";")[0].split(", "):
            assert client.options(path).headers["allow"] == "OPTIONS, POST", path


def test_openai_asks_once(serving):
    running = serving()
    with pytest.raises(openai.InternalServerError, match="makes no embeddings"):
        running.openai(max_retries=5).embeddings.create(model="echo-model", input="a")
    with running.client() as client:
        counted = [line for line in client.get("/metrics").text.splitlines() if "refused" in line and 'status="501"' in line]
    assert counted[0].endswith(" 1.0")
