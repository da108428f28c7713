"""/openapi.json says what answers are: real ones are held to it, without a field more."""

import json

import jsonschema
import pytest

from kvloom.loadtest.fuzz.message_streams import events_of
from kvloom.server import description
from kvloom.server.schema import answers, message_answers, response_answers

CHAT = {"messages": [{"role": "user", "content": "hello 🦊"}], "max_tokens": 6}
TEXT = {"prompt": "hello world", "max_tokens": 6}
KV = {"kv": {"explain": True}}
IDS = {"return_token_ids": True}
TOOLS = {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], "max_tokens": 100}
REQUESTS = [
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/v1/chat/completions", {**CHAT, "n": 2, "logprobs": True, "top_logprobs": 2, "prompt_logprobs": 1, **KV, **IDS}),
    ("POST", "/v1/completions", {**TEXT, "prompt": ["a", "hello"], "echo": True, "logprobs": 2, **KV, **IDS}),
    ("POST", "/v1/completions", {**TEXT, "prompt_logprobs": 1, "stop": "world"}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/echo-model", None),
    ("POST", "/tokenize", {"prompt": "hello", "return_token_strs": True}),
    ("POST", "/tokenize", {"messages": CHAT["messages"]}),
    ("POST", "/detokenize", {"tokens": [5, 6]}),
    ("GET", "/tokenizer_info", None),
    ("GET", "/v1/kv", None),
    ("POST", "/v1/kv/segments", {"text": "the quick brown fox"}),
    ("DELETE", "/v1/kv/segments", None),
    ("POST", "/v1/kv/explain", {"prompt": "hello world"}),
    ("GET", "/v1/kv/explain?prompt=hello", None),
    ("POST", "/v1/kv/reset", None),
    ("GET", "/load", None),
    ("GET", "/version", None),
]
STREAMS = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "stream_options": {"include_usage": True}, **KV, **IDS}),
    ("/v1/completions", {**TEXT, "n": 2, "logprobs": 1, "stream_options": {"continuous_usage_stats": True}, **IDS}),
]


def described(method, path):
    path = path.partition("?")[0].replace("/v1/models/echo-model", "/v1/models/{name}")
    return description.ANSWERS[method.lower(), path]


def held_to(schema, model, body):
    """The body fits the model, strictly, and the schema that clients are given."""
    model.model_validate(body, strict=True)
    jsonschema.validate(body, {"$ref": f"#/components/schemas/{model.__name__}", "components": schema["components"]})


@pytest.fixture(scope="module")
def schema(served):
    with served.client() as client:
        return client.get("/openapi.json").json()


@pytest.mark.parametrize(("method", "path", "body"), REQUESTS)
def test_answers_are_as_described(served, schema, method, path, body):
    with served.client() as client:
        answer = client.request(method, path, json=body)
    assert answer.status_code == 200, answer.text
    held_to(schema, described(method, path).whole, answer.json())


@pytest.mark.parametrize(("path", "body"), STREAMS)
def test_events_are_as_described(served, schema, path, body):
    with served.client() as client:
        lines = client.post(path, json={**body, "stream": True}).text.split("\n\n")
    events = [json.loads(line[6:]) for line in lines[:-2]]
    assert len(events) > 5
    for event in events:
        held_to(schema, described("POST", path).event, event)


def test_calls_and_thoughts_are_as_described(serving, fake, schema):
    engine = fake.FakeEngine()
    engine.tokenizer = fake.make_tokenizer("{% if tools %}<tool_call>{% endif %}<think>" + fake.TEMPLATE)
    engine.says = '<think>well</think>so <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    with serving(engine, tool_call_parser="hermes", reasoning_parser="think").client() as client:
        whole = client.post("/v1/chat/completions", json={**CHAT, **TOOLS}).json()
        lines = client.post("/v1/chat/completions", json={**CHAT, **TOOLS, "stream": True}).text.split("\n\n")
    message = whole["choices"][0]["message"]
    assert message["tool_calls"] and message["reasoning"] and whole["usage"]["completion_tokens_details"]
    held_to(schema, answers.ChatCompletion, whole)
    for line in lines[:-2]:
        held_to(schema, answers.ChatChunk, json.loads(line[6:]))


MESSAGE = {"max_tokens": 200, "messages": [{"role": "user", "content": "hello"}], "kv": {"explain": True}}
LOOK = {"name": "f", "input_schema": {"type": "object"}}


def test_messages_are_as_described(serving, fake, schema):
    engine = fake.FakeEngine()
    engine.tokenizer = fake.make_tokenizer("{% if tools %}<tool_call>{% endif %}<think>" + fake.TEMPLATE)
    engine.says = '<think>well</think>so <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    with serving(engine, tool_call_parser="hermes", reasoning_parser="think").client() as client:
        whole = client.post("/v1/messages", json={**MESSAGE, "tools": [LOOK]}).json()
        stream = client.post("/v1/messages", json={**MESSAGE, "tools": [LOOK], "stream": True}).text
        counted = client.post("/v1/messages/count_tokens", json=MESSAGE).json()
        error = client.post("/v1/messages", json={}).json()
    assert [block["type"] for block in whole["content"]] == ["thinking", "text", "tool_use"]
    held_to(schema, message_answers.MessageAnswer, whole)
    held_to(schema, message_answers.TokenCount, counted)
    for _, event in events_of(stream):
        held_to(schema, message_answers.MessageEvent, event)
    jsonschema.validate(error, schema["components"]["schemas"]["MessageError"])


def test_responses_are_as_described(serving, fake, schema):
    engine = fake.FakeEngine()
    engine.tokenizer = fake.make_tokenizer(fake.TEMPLATE + "<think>")
    engine.says = 'well</think>so <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    asked = {"input": "hello", "tools": [{"type": "function", "name": "f"}], "include": ["message.output_text.logprobs"],
             "top_logprobs": 2, "metadata": {"a": "b"}, "text": {"format": {"type": "text"}}, **KV}  # fmt: skip
    path, model = "/v1/responses", response_answers.ModelResponse
    with serving(engine, tool_call_parser="hermes", reasoning_parser="think").client() as client:
        whole = client.post(path, json=asked).json()
        lines = client.post(path, json={**asked, "stream": True, "max_output_tokens": 30}).text.split("\n\n")
        call = next(item for item in whole["output"] if item["type"] == "function_call")
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "x"}
        again = {"input": [*whole["output"], result], "tool_choice": "none", "max_output_tokens": 3}
        more = client.post(path, json=again).json()
        held_to(schema, model, client.get(f"{path}/{whole['id']}").json())
        held_to(schema, response_answers.ResponseItems, client.get(f"{path}/{more['id']}/input_items").json())
        held_to(schema, response_answers.InputTokens, client.post(f"{path}/input_tokens", json=again).json())
        held_to(schema, response_answers.ResponseDeleted, client.delete(f"{path}/{whole['id']}").json())
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call"]
    held_to(schema, model, whole)
    held_to(schema, model, more)
    for line in lines[:-2]:
        held_to(schema, response_answers.ResponseEvent, json.loads(line.partition("\ndata: ")[2]))


def test_every_operation_tells_its_answer_and_its_errors(schema):
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            statuses = set(operation["responses"])
            gone = "529" if path.startswith("/v1/messages") else "503"
            assert statuses >= {"200", "400", "401", "404", "429", "500", gone} and "422" not in statuses, path
            assert ("415" in statuses) == ("requestBody" in operation)
            assert (method, path) in description.ANSWERS or path.endswith("/cancel"), path
    assert set(description.ANSWERS) - {("post", "/health"), ("post", "/ready")} <= {
        (method, path) for path, operations in schema["paths"].items() for method in operations
    }, "nothing is described that there is not"
    jsonschema.Draft202012Validator.check_schema(schema["components"]["schemas"]["ChatCompletion"])


def test_the_key_is_described(serving, schema):
    assert schema["security"] == [{}, {"key": []}] and schema["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    with serving(api_key=("k",)).client(Authorization="Bearer k") as client:
        guarded = client.get("/openapi.json").json()
    assert guarded["security"] == [{"key": []}]
    open_paths = {path for path, ops in guarded["paths"].items() if any(op.get("security") == [] for op in ops.values())}
    assert open_paths == {"/health", "/ready", "/ping"}
