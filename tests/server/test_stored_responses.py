"""What /v1/responses stores: continued conversations, whose they are, how much is kept."""

import json
import math

import openai
import pytest

from kvloom.server.limits import BodyHall
from tests.server.response_words import CALL, LOOK, THINKING, ask, prompt


def test_a_conversation_goes_on(says):
    client, served = says(f"<think>Hm.</think>I look.\n{CALL}", THINKING)
    first = ask(client, "weather in Bonn?", tools=[LOOK], instructions="Be brief.")
    call = first.output[-1]
    served.engine.says = "Rain."
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    second = ask(client, [result], previous_response_id=first.id, tools=[LOOK])
    by_id = prompt(served)
    assert second.previous_response_id == first.id and "Be brief." not in by_id
    assert by_id.index("weather in Bonn?") < by_id.index("<think>Hm.</think>I look.") < by_id.index("rain")
    ask(client, [{"role": "user", "content": "weather in Bonn?"}, *first.output, result], tools=[LOOK], store=False)
    assert prompt(served) == by_id  # the same as all items sent again, so the same prefix in the cache
    references = [{"type": "item_reference", "id": item.id} for item in first.output]
    ask(client, [{"role": "user", "content": "weather in Bonn?"}, *references, result], tools=[LOOK])
    assert prompt(served) == by_id
    items = list(client.responses.input_items.list(second.id, limit=2, order="asc"))
    assert [item.type for item in items] == ["message", "reasoning", "message", "function_call", "function_call_output"]
    assert list(client.responses.input_items.list(second.id, limit=1)) == items[::-1]
    assert list(client.responses.input_items.list(second.id, after=items[2].id)) == items[1::-1]
    with served.client() as http:
        for path in (first.id, f"{second.id}/input_items"):
            text = http.get(f"/v1/responses/{path}").text
            assert text == json.dumps(json.loads(text), separators=(",", ":"))
    third = ask(client, "And tomorrow?", previous_response_id=second.id)
    assert prompt(served).index("rain") < prompt(served).index("Rain.") < prompt(served).index("And tomorrow?")
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)
    ask(client, "Well?", previous_response_id=third.id)  # what it continues is kept for it
    assert "Rain." in prompt(served)


def lost(client, answer):
    """Every way to a response and to its items is a 404; continuing it is a 400, as at OpenAI's."""
    ways = (
        lambda: client.responses.retrieve(answer.id),
        lambda: client.responses.delete(answer.id),
        lambda: client.responses.cancel(answer.id),
        lambda: client.responses.input_items.list(answer.id),
        lambda: ask(client, [{"type": "item_reference", "id": answer.output[0].id}]),
    )
    for way in ways:
        with pytest.raises(openai.NotFoundError, match="is stored for this key"):
            way()
    for continued in (client.responses.create, client.responses.input_tokens.count):
        with pytest.raises(openai.BadRequestError, match="is stored for this key") as refused:
            continued(model="echo-model", input="dog", previous_response_id=answer.id)
        error = refused.value
        assert (error.type, error.param) == ("invalid_request_error", "previous_response_id")
        assert error.code == "previous_response_not_found"


def test_what_is_not_stored(says):
    client, served = says("Hi.")
    answer = ask(client, store=False)
    assert not answer.store
    lost(client, answer)
    off, _ = says("Hi.", response_store_size=0)
    answer = ask(off)
    assert not answer.store
    lost(off, answer)
    served.engine.fail_after = 1
    with served.client() as http:
        text = http.post("/v1/responses", json={"input": "x", "stream": True}).text
        made = json.loads(text.split("data: ")[1].split("\n")[0])["response"]["id"]
        assert http.get(f"/v1/responses/{made}").status_code == 404


def test_responses_are_their_keys_alone(serving):
    served = serving(api_key=("first", "second"), admin_key=("admin",))
    first, second, admin = (served.openai(api_key=key) for key in ("first", "second", "admin"))
    answer = ask(first, "dog", max_output_tokens=2)
    lost(second, answer)
    lost(admin, answer)
    assert first.responses.retrieve(answer.id).id == answer.id


def test_responses_of_a_proxys_tenants_are_theirs_alone(serving):
    served = serving(trusted_proxies=("127.0.0.0/8",))
    ann, ben = (served.openai(default_headers={"X-KVLoom-Tenant": name}) for name in ("ann", "ben"))
    answer = ask(ann, "dog", max_output_tokens=2)
    assert ann.responses.retrieve(answer.id).id == answer.id
    with pytest.raises(openai.NotFoundError):
        ben.responses.retrieve(answer.id)


def test_stored_responses_are_not_streamed_or_cancelled(says):
    client, served = says("Hi.")
    answer = ask(client)
    with pytest.raises(openai.BadRequestError, match="in the background"):
        client.responses.cancel(answer.id)
    with served.client() as http:
        for query, param in {"stream=true": "stream", "starting_after=3": "starting_after"}.items():
            reply = http.get(f"/v1/responses/{answer.id}?{query}")
            assert reply.status_code == 400 and reply.json()["error"]["param"] == param
        for query in ("limit=0", "limit=101", "limit=x", "order=up", "after=msg_1"):
            reply = http.get(f"/v1/responses/{answer.id}/input_items?{query}")
            assert reply.status_code == 400 and reply.json()["error"]["param"] == query.split("=")[0], reply.text


def test_the_store_is_bounded(says):
    client, _ = says("Hi.", response_store_count=3)
    answers = [ask(client) for _ in range(5)]
    for gone in answers[:2]:
        lost(client, gone)
    for kept in answers[2:]:
        client.responses.retrieve(kept.id)
    client, served = says("Hi.", response_store_size=8192)
    assert not ask(client, "dog " * 2000, truncation="disabled").store
    assert ask(client).store
    with served.client() as http:
        figures = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if "stored_response" in line)
    values = [float(value) for name, value in figures.items() if not name.startswith("#")]
    assert len(values) == 2 and values[0] == 1 and 2048 < values[1] <= 8192


def test_a_stored_conversation_is_no_longer_than_a_body(says):
    client, _ = says("Hi.", max_body=4096)
    text = "dog " * 500
    first = ask(client, text)
    second = ask(client, text, previous_response_id=first.id)
    with pytest.raises(openai.BadRequestError, match="bytes; allowed: 4096, as in a body") as refused:
        ask(client, "dog", previous_response_id=second.id)
    assert refused.value.param == "previous_response_id"
    with pytest.raises(openai.BadRequestError, match="as in a body"):
        ask(client, [{"type": "item_reference", "id": first.output[0].id}] * 30)


def test_long_conversations_wait_for_their_turn(says, monkeypatch):
    client, _ = says("Hi.")
    first, waited = ask(client), []

    def turn(hall, tenant, data):
        waited.append(data)
        return math.inf if data.startswith(b"[") and len(waited) == 2 else 0.01

    monkeypatch.setattr(BodyHall, "turn", turn)
    with pytest.raises(openai.RateLimitError, match="long conversations"):
        ask(client, previous_response_id=first.id)
    assert json.loads(waited[1])[0]["content"][0]["text"] == "weather in Bonn?"
    assert ask(client, previous_response_id=first.id).status == "completed"
