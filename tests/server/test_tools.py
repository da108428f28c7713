"""Tools and thoughts over HTTP, through openai-python: whole and streamed, history, refusals, one rendering for every route."""

import json

import openai
import pytest

USER = [{"role": "user", "content": "weather in Bonn?"}]
LOOK = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}  # fmt: skip
LIST = {"type": "function", "function": {"name": "list_all"}}
CALL = '<tool_call>\n{"name": "look", "arguments": {"city": "Bonn"}}\n</tool_call>'
HISTORY = [
    *USER,
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"city": "Bonn"}'}}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
]  # fmt: skip


@pytest.fixture
def says(serving, fake):
    """Starts a server whose model says a text: says(text, **options) -> a client, the server."""

    def start(text, template=None, special=(), **options):
        engine = fake.FakeEngine()
        engine.says = text
        engine.tokenizer = fake.make_tokenizer(template or fake.TEMPLATE, (*fake.SPECIAL, *special))
        served = serving(engine, **options)
        return served.openai(), served

    return start


def ask(client, **fields):
    fields = {"messages": USER, "tools": [LOOK, LIST], **fields}
    return client.chat.completions.create(model="echo-model", **fields)


def gathered(stream):
    """(content, thoughts, calls, finish reason, chunks) of a stream."""
    content, thoughts, calls, finish, chunks = "", "", {}, None, list(stream)
    for chunk in chunks:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            thoughts += getattr(choice.delta, "reasoning_content", None) or ""
            finish = choice.finish_reason or finish
            for call in choice.delta.tool_calls or []:
                if call.id is not None:
                    assert call.type == "function" and call.index == len(calls) and call.function.arguments == ""
                    calls[call.index] = [call.function.name, ""]
                else:
                    calls[call.index][1] += call.function.arguments
    return content, thoughts, [tuple(call) for call in calls.values()], finish, chunks


def test_a_call_whole_and_streamed(says):
    client, _ = says(f'I look.\n{CALL}\n<tool_call>{{"name": "list_all"}}</tool_call> Done.')
    choice = ask(client).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I look. Done."
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
    assert calls == [("look", '{"city": "Bonn"}'), ("list_all", "{}")]
    assert all(call.id.startswith("call_") and call.type == "function" for call in choice.message.tool_calls)
    content, _, streamed, finish, chunks = gathered(ask(client, stream=True))
    assert (content, streamed, finish) == ("I look. Done.", calls, "tool_calls")
    assert chunks[0].choices[0].delta.role == "assistant"
    assert sum(bool(chunk.choices[0].delta.tool_calls) for chunk in chunks) > 6, "arguments come in pieces"


@pytest.mark.parametrize("n", [1, 2])
def test_an_answer_of_one_call_ends_with_it(says, n):
    """What the model goes on with is not generated."""
    client, served = says(f"I look. {CALL} {CALL * 50}")
    one = len(served.engine.tokenizer.encode(f"I look. {CALL} {CALL}", add_special_tokens=False))
    answer = ask(client, parallel_tool_calls=False, n=n)
    for choice in answer.choices:
        assert (choice.finish_reason, choice.message.content, len(choice.message.tool_calls)) == ("tool_calls", "I look.", 1)
        assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Bonn"}
    assert answer.usage.completion_tokens <= n * one
    content, _, calls, finish, chunks = gathered(
        ask(client, parallel_tool_calls=False, stream=True, stream_options={"include_usage": True})
    )
    assert (content, calls, finish) == ("I look.", [("look", '{"city": "Bonn"}')], "tool_calls")
    assert chunks[-1].usage.completion_tokens <= one
    with served.client() as http:
        ended = [line for line in http.get("/metrics").text.splitlines() if "request_success_total{" in line]
    counts = {line.split('finished_reason="')[1].split('"')[0]: float(line.split()[-1]) for line in ended}
    assert counts == {"stop": n + 1, "length": 0, "abort": 0, "error": 0}


def test_content_is_null_beside_calls_alone(says):
    client, served = says(CALL)
    assert ask(client).choices[0].message.content is None
    with served.client() as http:
        body = {"messages": USER, "tools": [LOOK], "stream": True}
        text = http.post("/v1/chat/completions", json=body).text
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in text.split("\n\n") if line.startswith("data: {")]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert all(set(delta) == {"tool_calls"} for delta in deltas[1:-1])


def test_a_call_that_is_cut(says):
    client, served = says(CALL)
    most = len(served.engine.tokenizer.encode(CALL[: CALL.index("nn")], add_special_tokens=False))
    choice = ask(client, max_tokens=most).choices[0]
    assert choice.finish_reason == "length" and choice.message.tool_calls[0].function.arguments == '{"city": "Bo'
    _, _, calls, finish, _ = gathered(ask(client, max_tokens=most, stream=True))
    assert finish == "length" and calls == [("look", '{"city": "Bo')]


@pytest.mark.parametrize("end", ["\n<tool_c", '\n<tool_call>\n{"name": "lo'])
def test_a_cut_call_is_no_content_where_there_can_be_none(says, end):
    """max_tokens cuts it before its name is known."""
    client, _ = says(CALL + end)
    assert ask(client, tool_choice="required").choices[0].message.content is None
    content, _, calls, *_ = gathered(ask(client, tool_choice="required", stream=True))
    assert not content and len(calls) == 1


def test_calls_are_text_where_no_tools_are_offered(says):
    client, served = says(CALL)
    for fields in ({"tools": openai.NOT_GIVEN}, {"tool_choice": "none"}):
        choice = ask(client, **fields).choices[0]
        assert choice.message.content == CALL and choice.message.tool_calls is None and choice.finish_reason == "stop"
        assert "list_all" not in prompt_of(served)


def prompt_of(served):
    return served.engine.tokenizer.decode(served.engine.calls[-1]["prompt"], skip_special_tokens=False)


def test_a_template_without_tools_gets_them_as_text(says):
    client, served = says("ok")
    ask(client, messages=[{"role": "system", "content": "Be brief."}, *HISTORY])
    prompt = prompt_of(served)
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n") and '"name": "list_all"' in prompt
    assert f"<|im_start|>assistant\n{CALL}<|im_end|>" in prompt
    assert "<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>" in prompt


TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}:{{ ARGUMENTS }}</tool_call>{% endfor %}"
    "{% if m.role == 'tool' %}{{ m.tool_call_id }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("form", ["c.function.arguments | tojson", "'' + c.function.arguments"])
@pytest.mark.parametrize("given", ['{"city": "Bonn"}', {"city": "Bonn"}])
def test_arguments_reach_the_template_in_its_form(says, form, given):
    """Templates want an object or a string; clients send JSON text, or an object."""
    client, served = says("ok", TEMPLATE.replace("ARGUMENTS", form))
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": given}}
    ask(client, messages=[*USER, {"role": "assistant", "tool_calls": [call]}, HISTORY[-1]])
    prompt = prompt_of(served)
    assert '<tool_call>look:{"city": "Bonn"}</tool_call>' in prompt and "rain" + "call_1" in prompt
    assert '"strict"' not in prompt and "Looks." in prompt


def test_marks_that_are_special_tokens_are_found(says):
    """They are no text to the client, but the parser must see them."""
    template = TEMPLATE.replace("ARGUMENTS", "c.function.arguments | tojson") + "{# [TOOL_CALLS] #}"
    client, _ = says('Hi[TOOL_CALLS]look[ARGS]{"city": "x"}<|endoftext|>', template, ["[TOOL_CALLS]", "[ARGS]"])
    choice = ask(client).choices[0]
    assert choice.message.content == "Hi" and choice.message.tool_calls[0].function.arguments == '{"city": "x"}'
    assert len(choice.message.tool_calls[0].id) == 9
    assert ask(client, tools=openai.NOT_GIVEN).choices[0].message.content == 'Hilook{"city": "x"}'


def test_the_operator_chooses_a_format(says):
    client, _ = says('[look(city="Bonn")]', tool_call_parser="llama4_pythonic")
    assert ask(client).choices[0].message.tool_calls[0].function.arguments == '{"city": "Bonn"}'


def test_one_rendering_for_chats_tokenize_and_explain(says):
    client, served = says("ok")
    ask(client, messages=HISTORY)
    prompt = served.engine.calls[-1]["prompt"]
    with served.client() as http:
        body = {"messages": HISTORY, "tools": [LOOK, LIST]}
        assert http.post("/tokenize", json=body).json()["tokens"] == prompt
        assert http.post("/v1/kv/explain", json=body).json()["prompt_tokens"] == len(prompt)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
         "tools[0].function.parameters"),
        ({"tools": [LOOK, LOOK]}, "tools"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "missing"}}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": openai.NOT_GIVEN, "tool_choice": "required"}, "tool_choice"),
        ({"functions": [LOOK["function"]]}, "functions"),
        ({"function_call": {"name": "look"}}, "function_call"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "tool"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": HISTORY[1]["tool_calls"]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 5}}]}]},
         "messages[0].tool_calls[0].function.arguments"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ],
    ids=str,
)  # fmt: skip
def test_refusals_name_the_field(served, fields, param):
    with pytest.raises(openai.BadRequestError) as error:
        ask(served.openai(), extra_body={k: v for k, v in fields.items() if v is not openai.NOT_GIVEN},
            **({"tools": openai.NOT_GIVEN} if fields.get("tools") is openai.NOT_GIVEN else {}))  # fmt: skip
    assert error.value.param == param


def test_unknown_parsers_are_refused():
    from kvloom.engine.errors import ConfigError
    from kvloom.server.options import ServerOptions

    for name in ("tool_call_parser", "reasoning_parser"):
        with pytest.raises(ConfigError, match="allowed: auto, "):
            ServerOptions(**{name: "nonsense"})


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% elif prompt_opens %}<think>\n{% endif %}{% endif %}"
)


@pytest.mark.parametrize("opens", [False, True], ids=["model opens", "prompt opens"])
def test_thoughts_apart(says, opens):
    client, served = says("hm, rain\n</think>\n\nRain." if opens else "<think>\nhm, rain\n</think>\n\nRain.", THINKING)
    fields = {"tools": openai.NOT_GIVEN, "extra_body": {"chat_template_kwargs": {"prompt_opens": True}} if opens else {}}
    whole = ask(client, **fields)
    message = whole.choices[0].message
    assert message.content == "Rain." and message.reasoning_content == message.reasoning == "hm, rain"
    tokens = len(served.engine.tokenizer.encode(served.engine.says.split("\n\n")[0], add_special_tokens=False))
    assert whole.usage.completion_tokens_details.reasoning_tokens == tokens
    stream = ask(client, stream=True, stream_options={"include_usage": True}, **fields)
    content, thoughts, _, finish, chunks = gathered(stream)
    assert (content, thoughts, finish) == ("Rain.", "hm, rain", "stop")
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == tokens


@pytest.mark.parametrize("fields", [{"separate_reasoning": False}, {"reasoning_format": "none"}], ids=str)
def test_thoughts_left_in_the_content(says, fields):
    client, _ = says("<think>hm</think>Rain.", THINKING)
    message = ask(client, tools=openai.NOT_GIVEN, extra_body=fields).choices[0].message
    assert message.content == "<think>hm</think>Rain." and not hasattr(message, "reasoning_content")


def test_thoughts_left_out(says):
    client, _ = says("<think>hm</think>Rain.", THINKING)
    message = ask(client, tools=openai.NOT_GIVEN, extra_body={"include_reasoning": False}).choices[0].message
    assert message.content == "Rain." and not hasattr(message, "reasoning_content")


def test_effort_and_earlier_thoughts_reach_the_template(says):
    client, served = says("Rain.", THINKING)
    earlier = {"role": "assistant", "content": "Sun.", "reasoning_content": "because"}
    ask(client, messages=[*USER, earlier, *USER], tools=openai.NOT_GIVEN, reasoning_effort="none")
    assert "<think>because</think>Sun." in prompt_of(served) and prompt_of(served).endswith("<think>\n\n</think>\n\n")
    ask(client, tools=openai.NOT_GIVEN, reasoning_effort="high")
    assert prompt_of(served).endswith("assistant\n")


def test_no_parser_leaves_thoughts(says):
    client, _ = says("<think>hm</think>Rain.", THINKING, reasoning_parser="none")
    assert ask(client, tools=openai.NOT_GIVEN).choices[0].message.content == "<think>hm</think>Rain."


def test_completions_of_one_request_are_read_apart(says):
    client, _ = says(CALL)
    choices = ask(client, n=3).choices
    assert [choice.message.tool_calls[0].function.name for choice in choices] == ["look"] * 3
    assert len({choice.message.tool_calls[0].id for choice in choices}) == 3


def test_logprobs_stand_beside_calls(says):
    client, served = says(CALL)
    count = len(served.engine.tokenizer.encode(CALL, add_special_tokens=False))
    assert len(ask(client, logprobs=True).choices[0].logprobs.content) == count
    chunks = list(ask(client, logprobs=True, stream=True))
    assert sum(len(chunk.choices[0].logprobs.content) for chunk in chunks if chunk.choices[0].logprobs) == count


def test_what_must_be_called_is_asked_of_the_engine_as_a_grammar(says):
    client, served = says(CALL)

    def structured(**fields):
        ask(client, **fields)
        return served.engine.calls[-1]["sampling"].structured

    strict = {"type": "function", "function": {**LOOK["function"], "strict": True}}
    named = {"type": "function", "function": {"name": "list_all"}}
    assert structured() is None and structured(tools=[strict], tool_choice="none") is None
    assert "look" in structured(tool_choice="required").grammar and "{0,7}" in structured(tool_choice="required").grammar
    assert "{0,7}" not in structured(tool_choice="required", parallel_tool_calls=False).grammar
    assert "look" not in structured(tool_choice=named).grammar and structured(tool_choice=named).param == "tool_choice"
    assert "TEXT" in structured(tools=[strict]).grammar and structured(tools=[strict]).param == "tools"


SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


def test_a_schema_beside_tools_and_thoughts(says):
    """Either calls or content of that form, behind thoughts; what no grammar can join stays alone and is content."""
    client, served = says('<think>hm</think>{"a": 1}', THINKING)
    message = ask(client, response_format=SCHEMA).choices[0].message
    sent = served.engine.calls[-1]["sampling"].structured
    assert message.content == '{"a": 1}' and message.reasoning_content == "hm"
    assert "(calls | content)" in sent.grammar and "</think>" in sent.grammar and sent.param == "response_format"
    assert "{0,7}" in sent.grammar
    ask(client, response_format=SCHEMA, parallel_tool_calls=False)
    assert "{0,7}" not in served.engine.calls[-1]["sampling"].structured.grammar
    ask(client, response_format=SCHEMA, tools=openai.NOT_GIVEN)
    assert "calls" not in served.engine.calls[-1]["sampling"].structured.grammar
    ask(client, response_format=SCHEMA, tool_choice="required")
    assert served.engine.calls[-1]["sampling"].structured.param == "tool_choice"
    served.engine.says = "12"
    fields = {"regex": "[0-9]+", "chat_template_kwargs": {"prompt_opens": True}}
    message = ask(client, extra_body=fields).choices[0].message
    assert message.content == "12" and served.engine.calls[-1]["sampling"].structured.regex == "[0-9]+"
