"""Bad input: each a clear nested error with the right status, and the server stays up."""

import json

import pytest

from kvloom.server.refusals import FIRST_SECONDS, GAP_SECONDS, LONGEST_SECONDS, Refusals

USER = [{"role": "user", "content": "hi"}]
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


def chat(**fields):
    return CHAT, {"messages": USER, "max_tokens": 1, **fields}


def completion(**fields):
    return COMPLETION, {"prompt": "hi", "max_tokens": 1, **fields}


# (path, body), status, param, part of the message
TABLE = [
    (chat(model="nope"), 404, "model", "not served"),
    (chat(messages=[]), 400, "messages", "at least 1"),
    ((CHAT, {}), 400, "messages", "required"),
    (chat(messages=None), 400, "messages", "required"),
    (chat(messages="hi"), 400, "messages", "list"),
    (chat(messages=[{"role": "user"}]), 400, "messages[0].content", "required"),
    (chat(messages=[{"role": "user", "content": None}]), 400, "messages[0].content", "required"),
    (chat(messages=[{"role": "robot", "content": "x"}]), 400, "messages[0].role", "'user'"),
    (chat(messages=[{"role": "robot", "content": "x"}]), 400, "messages[0].role", "'user'"),
    (chat(messages=[{"role": "user", "content": 5}]), 400, "messages[0].content", "string"),
    (chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]), 400, "messages[0].content[0].type",
     "'text'"),
    (chat(messages=[*USER, {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]), 400,
     "messages[1].tool_calls[0].function", "required"),
    (chat(messages=[{"role": "user", "content": "\ud800"}]), 400, "messages[0].content", "surrogate"),
    (chat(max_tokens=-1), 400, "max_tokens", "is -1; allowed: 1 or more"),
    (chat(max_completion_tokens=0), 400, "max_completion_tokens", "is 0; allowed: 1 or more"),
    (completion(max_tokens=-1), 400, "max_tokens", "is -1; allowed: 0 or more"),
    (chat(max_tokens=0), 400, "max_tokens", "1 or more"),
    (chat(max_tokens="5"), 400, "max_tokens", "integer"),
    (chat(max_tokens=1.5), 400, "max_tokens", "integer"),
    (chat(max_tokens=10**30), 400, "max_tokens", ""),
    (chat(max_completion_tokens=-4), 400, "max_completion_tokens", "is -4; allowed: 1 or more"),
    (chat(min_tokens=5), 400, "min_tokens", "at most max_tokens"),
    (chat(temperature=-0.1), 400, "temperature", "0 to 100"),
    (chat(temperature="hot"), 400, "temperature", "number"),
    (chat(top_p=-1), 400, "top_p", "0 is greedy"),
    (chat(top_p=1.5), 400, "top_p", "0 to 1"),
    (chat(top_k=-2), 400, "top_k", "-1"),
    (chat(min_p=2), 400, "min_p", "0 to 1"),
    (chat(presence_penalty=3), 400, "presence_penalty", "-2 to 2"),
    (chat(repetition_penalty=0), 400, "repetition_penalty", "0.01 to 100"),
    (chat(n=0), 400, "n", "allowed: 1 or more"),
    (chat(n=10**9), 400, "n", "allowed: 128 or less"),
    (chat(n=True), 400, "n", "integer"),
    (chat(seed=2**70), 400, "seed", ""),
    (chat(seed="x"), 400, "seed", "integer"),
    (chat(stop=[""]), 400, "stop", "non-empty"),
    (chat(stop=["x"] * 17), 400, "stop", "at most 16"),
    (chat(stop=[1]), 400, "stop[0]", "string"),
    (chat(stop_token_ids=[-1]), 400, "stop_token_ids[0]", "allowed: 0 or more"),
    (chat(stop_token_ids=[999_999]), 400, "stop_token_ids", "allowed: 0 to"),
    (chat(logit_bias={"5": 200}), 400, "logit_bias", "-100 to 100"),
    (chat(logit_bias={"x": 1}), 400, "logit_bias", "not a token id"),
    (chat(logit_bias={"999999": 1}), 400, "logit_bias", "allowed: 0 to"),
    (chat(logprobs=3), 400, "logprobs", "boolean"),
    (chat(top_logprobs=2), 400, "top_logprobs", "without logprobs"),
    (chat(logprobs=True, top_logprobs=21), 400, "top_logprobs", "allowed: 20 or less"),
    (chat(stream="yes"), 400, "stream", "boolean"),
    (chat(stream_options={"include_usage": True}), 400, "stream_options", "without stream"),
    (chat(stream=True, prompt_logprobs=1), 400, "prompt_logprobs", "stream"),
    (chat(tools=[{"type": "function"}]), 400, "tools[0].function", "required"),
    (chat(tool_choice="required"), 400, "tool_choice", "no tools are given"),
    (chat(functions=[{"name": "f"}]), 400, "functions", "not supported"),
    (chat(response_format={"type": "xml"}), 400, "response_format.type", "allowed: text, json_object"),
    (chat(response_format={}), 400, "response_format.type", "allowed: text, json_object"),
    (chat(response_format="json"), 400, "response_format", "dictionary"),
    (chat(response_format={"type": "json_schema", "json_schema": {}}), 400, "response_format.json_schema.schema", "object"),
    (chat(guided_json=""), 400, "guided_json", "empty"),
    (chat(guided_json=[1]), 400, "guided_json", "object"),
    (chat(guided_choice=[]), 400, "guided_choice", "empty"),
    (chat(guided_choice=["a", ""]), 400, "guided_choice", "non-empty"),
    (chat(guided_regex=5), 400, "guided_regex", "string"),
    (chat(structured_outputs={"regex": "a", "choice": ["b"]}), 400, "structured_outputs", "regex and choice"),
    (chat(structured_outputs={"colour": "a"}), 400, "structured_outputs.colour", "allowed keys: json"),
    (chat(structured_outputs={"choice": "ab"}), 400, "structured_outputs.choice", "strings"),
    (chat(structured_outputs={"disable_any_whitespace": True}), 400, "structured_outputs", "no constraint"),
    (chat(regex="a", guided_json={}), 400, "regex", "guided_json and regex"),
    (chat(grammar={"type": "regex", "value": "a"}), 400, "grammar", "string"),
    (chat(logits_processors=["x"]), 400, "logits_processors", "not supported"),
    (chat(chat_template="{{ 1 }}"), 400, "chat_template", "not supported"),
    (chat(echo=True), 400, "echo", "not supported"),
    (chat(chat_template_kwargs={"messages": "x"}), 400, "chat_template_kwargs", "may not set"),
    (chat(chat_template_kwargs={"x": {"deep": []}}), 400, None, ""),
    (chat(kv={"selction": "dense"}), 400, "kv.selction", "unknown key"),
    (chat(kv="dense"), 400, "kv", ""),
    (chat(kv={"selection": 5}), 400, "kv.selection", "string"),
    (chat(cache_salt=""), 400, "cache_salt", "empty"),
    (chat(cache_salt="\udfff"), 400, "cache_salt", "nicode"),
    (chat(stop="\ud800"), 400, "stop[0]", "surrogate"),
    (chat(cache_salt=7), 400, "cache_salt", "string"),
    (chat(priority=2**40), 400, "priority", "or less"),
    (chat(continue_final_message=True, add_generation_prompt=True), 400, "continue_final_message", "both true"),
    (completion(prompt=[]), 400, "prompt", "at least 1"),
    (completion(prompt=[[]]), 400, "prompt[0]", "at least 1"),
    (completion(prompt=[1, "a"]), 400, "prompt[1]", "integer"),
    (completion(prompt=[-1]), 400, "prompt[0]", "allowed: 0 or more"),
    (completion(prompt=[999_999]), 400, "prompt", "allowed: 0 to"),
    (completion(prompt={"a": 1}), 400, "prompt", "string"),
    (completion(prompt=["a"] * 1025), 400, "prompt", "at most 1024"),
    (completion(prompt=["a"] * 100, n=64), 400, "n", "1024"),
    (completion(max_tokens=0), 400, "max_tokens", "echo"),
    (completion(best_of=3), 400, "best_of", "equal to n"),
    (completion(suffix="x"), 400, "suffix", "not supported"),
    (completion(logprobs=21), 400, "logprobs", "allowed: 20 or less"),
    (completion(logprobs=True), 400, "logprobs", "integer"),
    (completion(prompt="the " * 9000), 400, "prompt", "context"),
    (completion(kv={"budget": -1}), 400, "kv.budget", "allowed: 0 or more"),
    (completion(kv={"budget": "512"}), 400, "kv.budget", "integer"),
    (completion(kv={"selection": "recycled", "token_select": {}}), 400, "kv.token_select", "the selection is 'recycled'"),
    (completion(kv={"recycled": 7}), 400, "kv.recycled", "unknown key 'recycled'"),
    (completion(kv={"draft": "yes"}), 400, "kv.draft", "boolean"),
    (completion(forced_tokens=[-1]), 400, "forced_tokens[0]", "allowed: 0 or more"),
    (completion(forced_tokens=[1] * 4, max_tokens=3), 400, "forced_tokens", "at most max_tokens"),
    (completion(use_beam_search=True), 400, "use_beam_search", "not supported"),
    (("/tokenize", {}), 400, "prompt", "either"),
    (("/detokenize", {"tokens": [999_999]}), 400, "tokens", "allowed: 0 to"),
    (("/detokenize", {"tokens": "x"}), 400, "tokens", "list"),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "status", "param", "message"), TABLE, ids=lambda value: str(value)[:60])
def test_table(served, request_, status, param, message):
    path, body = request_
    with served.client() as client:
        content = json.dumps(body)
        response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param or param is None, error
    assert message in error["message"], error
    assert error["message"].isprintable() and len(error["message"]) <= 600


@pytest.mark.parametrize(
    ("content", "content_type", "code"),
    [
        (b"{nope", "application/json", "invalid_json"),
        (b'{"prompt": "a"', "application/json", "invalid_json"),
        (b"", "application/json", "invalid_json"),
        (b"[]", "application/json", "invalid_json"),
        (b'"text"', "application/json", "invalid_json"),
        (b"null", "application/json", "invalid_json"),
        (b'{"prompt": "\xff\xfe"}', "application/json", None),
        (b"[" * 100_000, "application/json", None),
        (b'{"seed": ' + b"9" * 10_000 + b"}", "application/json", None),
        (b'{"prompt": "a", "temperature": NaN}', "application/json", None),
    ],
)
def test_bodies_that_are_not_json_objects(served, content, content_type, code):
    with served.client() as client:
        response = client.post(COMPLETION, content=content, headers={"Content-Type": content_type})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and (code is None or error["code"] == code), error


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Content-Type": "text/plain"}, "invalid_content_type"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, "invalid_content_type"),
        ({"Content-Type": "nonsense"}, "invalid_content_type"),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, "invalid_content_encoding"),
        ({"Content-Type": "application/json", "Content-Encoding": "br, gzip"}, "invalid_content_encoding"),
    ],
)
def test_bodies_in_a_form_that_is_not_served(served, headers, code):
    with served.client() as client:
        refused = client.post(COMPLETION, content=b'{"prompt": "a"}', headers=headers)
        assert refused.status_code == 415 and refused.json()["error"]["code"] == code
        for more in ({"Content-Type": "application/json; charset=utf-8"}, {"Content-Encoding": "identity"}):
            served_too = client.post(
                COMPLETION, content=b'{"prompt": "a"}', headers={"Content-Type": "application/json", **more}
            )
            assert served_too.status_code == 200, served_too.text


@pytest.mark.parametrize(
    ("message", "param", "said"),
    [
        ({"role": "critic", "content": "a"}, "role", "messages[0].role is 'critic'; allowed: 'system', 'developer', 'user', "),
        ({"role": ["a", "b"], "content": "a"}, "role", 'messages[0].role is ["a", "b"]; allowed: \'system\''),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "content[0].type",
         "content of the type 'image_url' is not served, as this model reads text only; allowed: 'text'"),
        ({"role": "user", "content": [{"type": ["a"]}]}, "content[0].type", 'content of the type ["a"] is not served'),
        ({"role": "user", "content": {"text": "a"}}, "content",
         'messages[0].content is {"text": "a"}; allowed: a string, or a list of text parts'),
    ],
)  # fmt: skip
def test_messages_that_are_not_served_are_told_so(served, message, param, said):
    with served.client() as client:
        error = client.post(CHAT, json={"messages": [message]}).json()["error"]
    assert error["message"].startswith(said) and error["param"] == f"messages[0].{param}"


def test_lists_are_told_as_json(served):
    with served.client() as client:
        many = client.post(COMPLETION, json={"prompt": "a", "stop": ["é", 'b"'] * 200}).json()["error"]["message"]
        methods = client.post(COMPLETION, json={"prompt": "a", "kv": {"a": {}, "b": {}}}).json()["error"]["message"]
    assert many.startswith('stop is ["é", "b\\"", "é"') and '["a", "b"]' in methods


def test_paths_and_methods(served):
    with served.client() as client:
        missing, method, model = client.get("/v1/nothing"), client.get(CHAT), client.get("/v1/models/other/one")
    assert (missing.status_code, method.status_code, model.status_code) == (404, 405, 404)
    assert "/v1/nothing" in missing.json()["error"]["message"] and "GET" in method.json()["error"]["message"]
    assert model.json()["error"]["code"] == "model_not_found" and method.headers["allow"] == "OPTIONS, POST"


def test_body_too_large(served):
    """10 MB: told from the header alone, and the client gets to read it."""
    with served.client() as client:
        response = client.post(COMPLETION, json={"prompt": "a" * 10_000_000})
        assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"
        assert client.get("/health").status_code == 200


def test_chunked_body_too_large(served):
    def pieces():
        for _ in range(100):
            yield b"x" * 100_000

    with served.client() as client:
        response = client.post(COMPLETION, content=pieces(), headers={"Content-Type": "application/json"})
        assert response.status_code == 413


def test_chunked_body_within_the_limit(served):
    with served.client() as client:
        response = client.post(
            COMPLETION, content=iter([b'{"prompt": ', b'"a"}']), headers={"Content-Type": "application/json"}
        )
        assert response.status_code == 200


def test_expect_continue_is_not_waited_for(served):
    with served.connect() as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Expect: 100-continue\r\nContent-Length: 10000000\r\n\r\n"
        )
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")


def test_headers_too_large_for_messages_are_told_as_anthropic_does(served):
    head = b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 100_000 + b"\r\nContent-Length: 2\r\n\r\n{}"
    with served.connect() as connection:
        connection.sendall(head)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 431") and b"\r\nrequest-id: " in answer.lower()
    assert b'"type":"error"' in answer


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "without end"])
def test_headers_too_large(served, whole):
    with served.connect() as connection:
        request = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Big: " + b"a" * (200_000 if whole else 2_000_000)
        try:
            connection.sendall(request + (b"\r\n\r\n" if whole else b""))
            answer = connection.recv(4096)
        except (ConnectionResetError, BrokenPipeError):
            answer = b"HTTP/1.1 431"  # closed while we were still sending
        assert answer.startswith(b"HTTP/1.1 431")
    with served.client() as client:
        assert client.get("/health").status_code == 200


def test_overload_is_429_with_retry_after(serving, fake):
    from kvloom.engine.errors import OverloadedError

    engine = fake.FakeEngine()
    engine.refuse = OverloadedError("too much waits", retry_after=2.3)
    with serving(engine).client() as client:
        for stream in (False, True):
            response = client.post(CHAT, json={"messages": USER, "stream": stream})
            assert response.status_code == 429 and response.headers["retry-after"] == "3"
            assert response.json()["error"]["code"] == "overloaded"


def test_who_is_refused_waits_a_moment(serving, fake, monkeypatch):
    from kvloom.engine.errors import OverloadedError
    from kvloom.server import errors

    pauses, sleep = [], errors.asyncio.sleep

    async def counted(seconds):
        pauses.append(seconds)
        await sleep(0)

    engine = fake.FakeEngine()
    engine.refuse = OverloadedError("too much waits")
    with serving(engine).client() as client:
        monkeypatch.setattr(errors.asyncio, "sleep", counted)
        assert client.post(CHAT, json={"messages": USER}).status_code == 429
    assert any(0.9 * FIRST_SECONDS < pause <= FIRST_SECONDS for pause in pauses)


def test_refusals_of_a_tenant_are_told_one_after_the_other():
    now = 100.0
    refusals = Refusals(lambda: now)
    delays = [refusals.delay("a") for _ in range(100)]
    assert delays[0] == pytest.approx(FIRST_SECONDS) and delays[1] == pytest.approx(FIRST_SECONDS + GAP_SECONDS)
    assert delays == sorted(delays) and max(delays) == pytest.approx(LONGEST_SECONDS)
    assert refusals.delay("b") == pytest.approx(FIRST_SECONDS), "another tenant's come beside them"
    now += LONGEST_SECONDS + 1.0
    assert refusals.delay("a") == pytest.approx(FIRST_SECONDS)


def test_overload_is_retried_by_openai(serving, fake):
    from kvloom.engine.errors import OverloadedError

    engine = fake.FakeEngine()
    engine.refuse = OverloadedError("too much waits", retry_after=0.1)
    original = engine.generate

    def once(*args, **kwargs):
        stream = original(*args, **kwargs)
        if len(engine.calls) >= 1:
            engine.refuse = None
        return stream

    engine.generate = once
    answer = serving(engine).openai(max_retries=1).completions.create(model="echo-model", prompt="a", max_tokens=1)
    assert answer.choices[0].finish_reason == "length" and len(engine.calls) == 2


def test_unexpected_error_gives_nothing_away(serving, fake, caplog):
    engine = fake.FakeEngine()
    engine.refuse = RuntimeError("secret path /root/x")
    with serving(engine).client() as client:
        response = client.post(CHAT, json={"messages": USER})
        assert response.status_code == 500 and "secret" not in response.text
        engine.refuse = None
        assert client.post(CHAT, json={"messages": USER, "max_tokens": 1}).status_code == 200
