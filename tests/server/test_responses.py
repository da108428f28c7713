"""/v1/responses through openai-python: whole and streamed, items, and what the engine is asked."""

import json
import math

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.server.response_words import CALL, LIST, LOGPROBS, LOOK, THINKING, ask, prompt

EVENTS = TypeAdapter(ResponseStreamEvent)


def events(served, **body):
    """The events of a stream as they are on the wire, checked against the client's types."""
    with served.client() as http:
        body = {"input": "weather in Bonn?", "stream": True, **body}
        reply = http.post("/v1/responses", json=body)
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream"), reply.text
    blocks = reply.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    found = []
    for number, block in enumerate(blocks[:-2]):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}" and event["sequence_number"] == number
        if (event.get("response") or {}).get("usage"):
            event["response"]["usage"]["input_tokens_details"].setdefault("cache_write_tokens", 0)
        EVENTS.validate_python(event)
        found.append(event)
    return found


def kinds(found):
    """Their types, neighbours of one type once."""
    names = [event["type"].removeprefix("response.") for event in found]
    return [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]


def plain(response):
    """A response without what differs every time."""
    items = [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in response["output"]]
    return {**response, "output": items, "id": "", "created_at": 0, "completed_at": 0}


def gathered(found):
    """The output items that the events of a stream add up to, without what only `done` events tell."""
    items = []
    for event in found:
        match event["type"].removeprefix("response."):
            case "output_item.added":
                assert event["output_index"] == len(items) and event["item"]["status"] == "in_progress"
                items.append(json.loads(json.dumps(event["item"])))
            case "content_part.added":
                items[event["output_index"]]["content"].append(event["part"])
            case "output_text.delta" | "reasoning_text.delta":
                items[event["output_index"]]["content"][event["content_index"]]["text"] += event["delta"]
            case "function_call_arguments.delta":
                items[event["output_index"]]["arguments"] += event["delta"]
            case "output_text.done" | "reasoning_text.done":
                part = items[event["output_index"]]["content"][event["content_index"]]
                assert part["text"] == event["text"]
                part |= {"logprobs": event["logprobs"]} if "logprobs" in event else {}
            case "function_call_arguments.done":
                assert items[event["output_index"]]["arguments"] == event["arguments"]
            case "output_item.done":
                items[event["output_index"]]["status"] = event["item"]["status"]
                assert items[event["output_index"]] == event["item"]
        if "item_id" in event:
            assert event["item_id"] == items[event["output_index"]]["id"]
    return items


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_output_tokens": 20},
        {"tools": [LOOK, LIST]},
        {"tools": [LOOK, LIST], "max_output_tokens": 40},
        {"tools": [LOOK], "parallel_tool_calls": False},
        {"include": [LOGPROBS], "top_logprobs": 2, "tools": [LOOK, LIST]},
        {"include": [LOGPROBS], "stop": "Done"},
        {"include_reasoning": False},
    ],
)
def test_a_stream_adds_up_to_the_whole_which_is_what_is_stored(says, fields):
    text = f'<think>\nIt asks for weather.\n</think>\nI look.\n{CALL}\n<tool_call>{{"name": "list_all"}}</tool_call> Done.'
    _, served = says(text, THINKING)
    found = events(served, **fields)
    assert kinds(found)[:2] == ["created", "in_progress"] and found[0]["response"]["output"] == []
    last = found[-1]["response"]
    assert gathered(found) == last["output"]
    with served.client() as http:
        whole = http.post("/v1/responses", json={"input": "weather in Bonn?", **fields}).json()
        assert plain(whole) == plain(json.loads(json.dumps(last)) | {"usage": whole["usage"]})
        for response in (whole, last):
            stored = http.get(f"/v1/responses/{response['id']}").json()
            stored["usage"]["input_tokens_details"].setdefault("cache_write_tokens", 0)
            response["usage"]["input_tokens_details"].setdefault("cache_write_tokens", 0)
            assert stored == response
            Response.model_validate(response)
    assert last["status"] == ("incomplete" if "max_output_tokens" in fields else "completed")
    assert last["incomplete_details"] == ({"reason": "max_output_tokens"} if "max_output_tokens" in fields else None)
    shown = [item["type"] for item in whole["output"]]
    assert (shown[:1] == ["reasoning"]) == fields.get("include_reasoning", True)


def test_items_are_in_the_order_in_which_they_were_written(says):
    _, served = says(f"<think>Hm.</think>I look.\n{CALL} Done.", THINKING)
    found = events(served, tools=[LOOK])
    text, thought = ["content_part.added", "output_text.delta"], ["content_part.added", "reasoning_text.delta"]
    ends = ["content_part.done", "output_item.done", "output_item.added"]
    assert kinds(found) == [
        "created", "in_progress", "output_item.added", *thought, "reasoning_text.done", *ends, *text, "output_text.done", *ends,
        "function_call_arguments.delta", "function_call_arguments.done", "output_item.done", "output_item.added", *text,
        "output_text.done", "content_part.done", "output_item.done", "completed"]  # fmt: skip
    output = found[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call", "message"]
    assert output[0]["content"][0]["text"] == "Hm." and output[0]["summary"] == []
    assert output[2]["arguments"] == '{"city": "Bonn"}' and output[2]["call_id"].startswith("call_")
    assert [item["content"][0]["text"] for item in output if item["type"] == "message"] == ["I look.", " Done."]
    usage = found[-1]["response"]["usage"]
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] < usage["output_tokens"]
    assert usage["input_tokens_details"]["cached_tokens"] == usage["input_tokens"] // 2


def test_the_clients_own_stream(says):
    client, _ = says(f"I look.\n{CALL}")
    with client.responses.stream(model="echo-model", input="weather?", tools=[LOOK]) as stream:
        seen = [event.type for event in stream]
        final = stream.get_final_response()
    assert seen[-1] == "response.completed" and final.output_text == "I look."
    assert final.output[1].arguments == '{"city": "Bonn"}'
    assert final.to_dict(exclude_none=True) | {"output": 0} == client.responses.retrieve(final.id).to_dict(
        exclude_none=True
    ) | {"output": 0}


def test_parsed_text(says):
    class Weather(BaseModel):
        city: str

    client, served = says('{"city": "Bonn"}')
    assert client.responses.parse(model="echo-model", input="?", text_format=Weather).output_parsed == Weather(city="Bonn")
    assert json.loads(served.engine.calls[-1]["sampling"].structured.json_schema)["properties"]["city"]["type"] == "string"
    ask(client, text={"format": {"type": "json_object"}})
    assert served.engine.calls[-1]["sampling"].structured.json_object
    ask(client, text={"format": {"type": "text"}, "verbosity": "medium"})
    assert served.engine.calls[-1]["sampling"].structured is None


def test_what_the_engine_is_asked(says):
    client, served = says("Hi.")
    own = {"kv": {"reuse": "off"}, "priority": 3, "cache_salt": "s", "top_k": 5, "seed": 7, "min_tokens": 1}
    answer = ask(client, temperature=0.5, top_p=0.25, max_output_tokens=9, metadata={"a": "b"}, extra_body=own)
    call = served.engine.calls[-1]
    assert (call["kv"].reuse, call["priority"], call["cache_salt"]) == ("off", 3, "s")
    sampling = call["sampling"]
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.top_k) == (0.5, 0.25, 9, 5)
    assert (sampling.seed, sampling.min_tokens, sampling.logprobs) == (7, 1, None)
    assert (answer.temperature, answer.max_output_tokens, answer.metadata) == (0.5, 9, {"a": "b"})
    assert answer.usage.kv["cached_tokens"] == answer.usage.input_tokens_details.cached_tokens


def test_items_become_turns(says):
    shown = "{% for m in messages %}[{{ m | tojson }}]{% endfor %}"
    client, served = says("Rain.", shown)
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
        {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "look", "arguments": '{"city": "Bonn"}'},
        {"type": "function_call", "call_id": "call_2", "name": "list_all", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": "rain"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "none"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Well."}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "user", "content": "Then?"},
    ]  # fmt: skip
    answer = ask(client, items, instructions="You look.")
    said = json.loads("[" + prompt(served).replace("][", ",")[1:])
    assert [message["role"] for message in said] == [
        "system", "system", "user", "assistant", "tool", "tool", "assistant", "user"]  # fmt: skip
    assert [said[0]["content"], said[1]["content"], said[2]["content"]] == ["You look.", "Be brief.", "weather?"]
    assert (said[3]["reasoning_content"], said[3]["content"]) == ("Hm.", "I look.")
    assert [call["id"] for call in said[3]["tool_calls"]] == ["call_1", "call_2"]
    assert [(one["tool_call_id"], one["content"]) for one in said[4:6]] == [("call_1", "rain"), ("call_2", "none")]
    assert (said[6]["reasoning_content"], said[6]["content"]) == ("Well.", "No.")
    listed = client.responses.input_items.list(answer.id, order="asc", limit=100).data
    assert [item.type for item in listed] == [item.get("type", "message") for item in items]
    assert listed[2].id == "rs_1" and listed[3].id == "msg_1" and listed[5].id.startswith("fc_")


def test_an_error_in_a_stream(says):
    client, served = says("I look.")
    served.engine.fail_after = 2
    found = events(served)
    assert kinds(found)[-2:] == ["error", "failed"]
    failed = found[-1]["response"]
    assert failed["status"] == "failed" and failed["error"]["code"] == "server_error" and not failed["store"]
    assert failed["output"][0]["status"] == "incomplete"
    with pytest.raises(openai.InternalServerError):
        ask(client)
    with client.responses.stream(model="echo-model", input="x") as stream:
        assert [event.type for event in stream][-1] == "response.failed"


def test_an_answer_without_words_is_a_message(says):
    client, served = says("<think>Hm.</think>", THINKING)
    answer = ask(client)
    assert [item.type for item in answer.output] == ["reasoning", "message"] and answer.output_text == ""
    assert gathered(found := events(served)) == found[-1]["response"]["output"]


def test_truncation(says, fake):
    client, served = says()
    turns = [{"role": "user", "content": f"turn {i} " + "the lazy dog " * 100} for i in range(20)]
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, turns)
    assert refused.value.code == "context_length_exceeded" and refused.value.param == "input"
    answer = ask(client, turns, truncation="auto", instructions="Be brief.", max_output_tokens=100)
    kept = [i for i in range(20) if f"turn {i} " in prompt(served)]
    assert kept[0] > 0 and kept == list(range(kept[0], 20)) and "Be brief." in prompt(served)
    usage, turn = answer.usage, len(served.engine.tokenizer.encode(turns[0]["content"], add_special_tokens=False))
    assert fake.MAX_MODEL_LEN - 2 * turn < usage.input_tokens <= fake.MAX_MODEL_LEN - 100
    ask(client, turns[:2], truncation="auto", max_output_tokens=1)
    assert "turn 0 " in prompt(served)
    with pytest.raises(openai.BadRequestError):
        ask(client, "the lazy dog " * 4000, truncation="auto")


def test_tokens_are_counted(says):
    client, _ = says("Hi.")
    first = ask(client, "dog", instructions="Be brief.", tools=[LOOK])
    counted = client.responses.input_tokens.count(model="echo-model", input="dog", instructions="Be brief.", tools=[LOOK])
    assert counted.input_tokens == first.usage.input_tokens
    turns = [{"role": "user", "content": "dog " * 400}] * 9
    shortened = {"model": "echo-model", "input": turns, "truncation": "auto"}
    assert (
        client.responses.input_tokens.count(**shortened).input_tokens == client.responses.create(**shortened).usage.input_tokens
    )
    cut = {"model": "echo-model", "input": "dog fox dog", "extra_body": {"truncate_prompt_tokens": 5}}
    assert client.responses.input_tokens.count(**cut).input_tokens == 5
    second = ask(client, "fox", previous_response_id=first.id)
    counted = client.responses.input_tokens.count(model="echo-model", input="fox", previous_response_id=first.id)
    assert counted.input_tokens == second.usage.input_tokens


def test_tools_that_are_allowed(says):
    client, served = says("Hi.", "{% for t in tools %}{{ t.function.name }} {% endfor %}{{ messages[-1].content }}")
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "look"}]}
    answer = ask(client, tools=[LOOK, LIST], tool_choice=allowed)
    assert prompt(served).startswith("look weather") and answer.tool_choice.tools[0]["name"] == "look"
    ask(client, tools=[LOOK, LIST], tool_choice={**allowed, "mode": "required"})
    assert served.engine.calls[-1]["sampling"].structured is not None
    answer = ask(client, tools=[LOOK, LIST], tool_choice={"type": "function", "name": "list_all"})
    assert answer.tool_choice.name == "list_all" and served.engine.calls[-1]["sampling"].structured is not None


def test_an_answer_repeats_what_names_its_user_and_its_prompt(says):
    _, served = says("Hi.")
    said = {"max_tool_calls": 3, "prompt_cache_key": "key", "safety_identifier": "someone", "user": "me"}
    assert events(served, **said)[-1]["response"].items() >= said.items()
    with served.client() as http:
        assert http.post("/v1/responses", json={"input": "dog", **said}).json().items() >= said.items()
        assert http.post("/v1/responses", json={"input": "dog"}).json().items() >= dict.fromkeys(said).items()


def test_what_an_answer_repeats_can_be_written(served):
    odd = {"type": "function", "name": "look", "x": "\ud800", "y": math.nan}
    body = {"input": "dog", "max_output_tokens": 1, "tools": [LOOK], "tool_choice": odd}
    with served.client() as http:
        reply = http.post("/v1/responses", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert reply.status_code == 200, reply.text
    assert reply.json()["tool_choice"] == {"type": "function", "name": "look"} and reply.json()["tools"] == [LOOK]


def test_a_client_that_leaves_ends_its_response(serving, fake, until):
    engine = fake.FakeEngine(step_seconds=0.01)
    served = serving(engine)
    with served.client() as http, http.stream("POST", "/v1/responses", json={"input": "dog", "stream": True}) as reply:
        line = next(line for line in reply.iter_lines() if line.startswith("data: "))
    until(lambda: engine.aborted and not engine.live)
    with served.client() as http:
        assert http.get(f"/v1/responses/{json.loads(line[6:])['response']['id']}").status_code == 404
