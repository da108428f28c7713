"""/v1/messages and its count_tokens: what the model is asked, what is answered, whole and streamed alike."""

import json
from dataclasses import replace

import pytest

from kvloom.engine.requests.sampling import SamplingDefaults
from kvloom.loadtest.fuzz.message_streams import events_of, message_of
from kvloom.server import sse
from kvloom.server.messages.replies import INPUT_COUNTS, SIGNATURE, input_of

USER = {"role": "user", "content": "weather in Bonn?"}
LOOK = {"name": "look", "description": "Looks.", "input_schema": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}  # fmt: skip
LIST = {"name": "list_all", "input_schema": {"type": "object"}}
CALL = '<tool_call>\n{"name": "look", "arguments": {"city": "Bonn"}}\n</tool_call>'
TEXT = {"type": "text", "text": "a"}
ANY_CALL = {"type": "tool_use", "id": "a", "name": "b", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "call_1", "content": "rain"}
HISTORY = [
    USER,
    {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "redacted_thinking", "data": "x"},
        {"type": "text", "text": "I look."}, {"type": "tool_use", "id": "call_1", "name": "look", "input": {"city": "Bonn"}}]},
    {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "call_1", "content": "rain", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "So?"}]},
]  # fmt: skip
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined %}"
    "[{{ enable_thinking }} {{ thinking_budget }} {{ reasoning_effort }}]{% endif %}{% endif %}"
)


@pytest.fixture
def says(serving, fake):
    """Starts a server whose model says a text: says(text, template) -> what asks it."""

    def start(text, template=None, **options):
        engine = fake.FakeEngine()
        engine.says = text
        engine.tokenizer = fake.make_tokenizer(template or fake.TEMPLATE)
        return Asking(serving(engine, **options))

    return start


@pytest.fixture(scope="module")
def asking(served):
    return Asking(served)


class Asking:
    """Asks a server for messages."""

    def __init__(self, served):
        self.engine, self.client = served.engine, served.client()

    def post(self, path="", **fields):
        self.engine.calls.clear()
        fields = {"model": "echo-model", "max_tokens": 200, "messages": [USER], **fields}
        return self.client.post("/v1/messages" + path, json={key: value for key, value in fields.items() if value != "-"})

    def message(self, **fields):
        """The answer, which is the same streamed and not, but for its id."""
        whole, stream = self.post(**fields), self.post(stream=True, **fields)
        assert whole.status_code == stream.status_code == 200, whole.text + stream.text
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert whole.headers["request-id"] == whole.headers["x-request-id"] and stream.headers["request-id"]
        one, other = whole.json(), message_of(stream.text)
        assert one["id"].startswith("msg_")
        for message in (one, other):
            ids = [made.pop("id") for made in (message, *message["content"]) if "id" in made]
            assert len(set(ids)) == len(ids)
        assert one == other
        return one

    def prompt(self):
        return self.engine.tokenizer.decode(self.engine.calls[-1]["prompt"], False)

    def refusal(self, path="", status=400, **fields):
        """The message of an error in the shape that these clients read."""
        reply = self.post(path, **fields)
        assert reply.status_code == status, reply.text
        body = reply.json()
        assert body["type"] == "error" and set(body) == {"type", "error", "request_id"}
        assert body["request_id"] == reply.headers["request-id"] and set(body["error"]) == {"type", "message"}
        return body["error"]["message"]


def test_text(says):
    message = says("Rain.").message(system="Be short.")
    tokens = message["usage"]["output_tokens"]
    assert message["content"] == [{"type": "text", "text": "Rain."}] and tokens > 1
    assert (message["type"], message["role"], message["model"]) == ("message", "assistant", "echo-model")
    assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)


def test_calls_thoughts_and_text_keep_their_order(says):
    said = f'<think>\nhm, Bonn\n</think>\n\nI look.\n{CALL}\n<tool_call>{{"name": "list_all"}}</tool_call> Done.'
    message = says(said, THINKING).message(tools=[LOOK, LIST])
    assert [block["type"] for block in message["content"]] == ["thinking", "text", "tool_use", "tool_use", "text"]
    thought, text, call, other, rest = message["content"]
    assert (thought["thinking"], text["text"], rest["text"]) == ("hm, Bonn", "I look.", " Done.") and thought["signature"]
    assert (call["name"], call["input"], other["name"], other["input"]) == ("look", {"city": "Bonn"}, "list_all", {})
    assert message["stop_reason"] == "tool_use" and message["usage"]["output_tokens_details"]["thinking_tokens"] > 2


def test_why_it_ended(says):
    asking = says("one two three")
    assert asking.message(stop_sequences=["x", "two"])["stop_sequence"] == "two"
    stopped = asking.message(stop_sequences=["two"])
    assert stopped["stop_reason"] == "stop_sequence" and stopped["content"][0]["text"] == "one "
    assert asking.message(max_tokens=2)["stop_reason"] == "max_tokens"
    asking.engine.says = None
    full = asking.post(messages=[{"role": "user", "content": "the " * 1900}], max_tokens=9000).json()
    assert full["stop_reason"] == "model_context_window_exceeded"


def test_a_call_that_is_cut_has_what_came_of_it(says):
    asking = says(CALL)
    cut = next(
        reply
        for count in range(200, 0, -1)
        if (reply := asking.post(tools=[LOOK], max_tokens=count).json())["stop_reason"] == "max_tokens"
    )
    assert cut["content"][0]["name"] == "look" and cut["content"][0]["input"] in ({}, {"city": "Bonn"})
    assert input_of('{"a": [1, {"b": "x"}], "c": "cu') == {"a": [1, {"b": "x"}]}
    assert input_of('{"a": 1e999, "b": 10') == {"a": "Infinity", "b": 10} and input_of("nonsense") == {}
    json.dumps(input_of('{"a": [1e999, -1e999]}'), allow_nan=False)


def test_a_conversation_with_calls_as_the_model_reads_it(says):
    asking = says("Wet.", THINKING)
    system = [{"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}]
    asking.post(messages=HISTORY, system=system, tools=[LOOK], tool_choice={"type": "none"})
    start = "<|im_start|>"
    assert asking.prompt() == (
        f"{start}system\nBe short.<|im_end|>\n{start}user\nweather in Bonn?<|im_end|>\n"
        f'{start}assistant\n<think>hm</think>I look.\n<tool_call>\n{{"name": "look", "arguments": {{"city": "Bonn"}}}}\n'
        f"</tool_call><|im_end|>\n{start}user\n<tool_response>\nrain\n</tool_response><|im_end|>\n{start}user\nSo?<|im_end|>\n"
        f"{start}assistant\n"
    )


def test_turns_of_a_role_are_one_and_blocks_are_lines(says):
    asking = says("x")
    blocks = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
    late = {"role": "system", "content": "Now."}
    asking.post(messages=[{"role": "user", "content": "a"}, {"role": "user", "content": blocks}, late])
    assert "user\na\nb\nc<|im_end|>" in asking.prompt() and "system\nNow.<|im_end|>" in asking.prompt()


@pytest.mark.parametrize("error", ["no such city", "Error: no such city", "<tool_use_error>no such city</tool_use_error>"])
def test_a_result_that_is_an_error_says_so(says, error):
    asking = says("x")
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": error}], "is_error": True}
    asking.post(messages=[*HISTORY[:2], {"role": "user", "content": [result]}])
    assert asking.prompt().lower().count("error") == error.lower().count("error") + (error == "no such city")


def test_the_last_turn_of_an_assistant_is_continued(says):
    asking = says(" fine")
    asking.post(messages=[USER, {"role": "assistant", "content": "It is"}])
    assert asking.prompt().endswith("assistant\nIt is")
    assert "tool_result" in asking.refusal(messages=HISTORY[:2])
    assert "no content" in asking.refusal(messages=[USER, {"role": "assistant", "content": []}])


def test_the_line_that_changes_every_time_is_left_out(says):
    """Claude Code's: with it in front, no prefix would ever be found again."""
    asking = says("x")
    prompts = set()
    for number in range(2):
        line = f"x-anthropic-billing-header: cc_version=2.1; cch={number};"
        for system in (f"{line}\nBe short.", [{"type": "text", "text": line}, {"type": "text", "text": "Be short."}]):
            asking.post(system=system)
            prompts.add(asking.prompt())
    asking.post(system="Be short.")
    assert prompts == {asking.prompt()}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "[True 1024 ]"),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}, "[False  high]"),
        ({"thinking": {"type": "adaptive"}}, ""),
        ({}, ""),
        ({"thinking": {"type": "disabled"}, "chat_template_kwargs": {"enable_thinking": True}}, "[True  ]"),
    ],
)
def test_thinking_as_the_template_allows(says, fields, told):
    asking = says("x", THINKING)
    asking.post(**fields)
    assert asking.prompt().endswith("assistant\n" + told)


def test_thoughts_that_are_not_told(says):
    asking, omitted = says("<think>hm, well</think>Rain.", THINKING), {"type": "adaptive", "display": "omitted"}
    message = asking.message(thinking=omitted)
    empty = {"type": "thinking", "thinking": "", "signature": SIGNATURE}
    assert message["content"] == [empty, {"type": "text", "text": "Rain."}]
    assert message["usage"]["output_tokens_details"]["thinking_tokens"] > 2
    found = [data for _, data in events_of(asking.post(stream=True, thinking=omitted).text) if data.get("index") == 0]
    assert [data["type"].removeprefix("content_block_") for data in found] == ["start", "delta", "stop"]
    assert found[0]["content_block"] == {**empty, "signature": ""}
    assert found[1]["delta"] == {"type": "signature_delta", "signature": SIGNATURE}
    asking.post(messages=[USER, {"role": "assistant", "content": message["content"]}, USER])  # as clients send it back
    assert "<think>" not in asking.prompt() and "Rain.<|im_end|>" in asking.prompt()


def test_counts_of_the_prompt_stay_as_they_were_told(says, monkeypatch):
    """A request that another engine takes up has another cache there."""
    asking = says("Rain, and more of it.")
    steps = asking.engine._steps

    async def resumed(*args):
        number = 0
        async for output in steps(*args):
            number += 1
            usage = output.usage if number < 3 else replace(output.usage, cached_tokens=0, written_tokens=0)
            yield replace(output, usage=usage)

    monkeypatch.setattr(asking.engine, "_steps", resumed)
    found = dict(events_of(asking.post(stream=True).text))
    first, last = found["message_start"]["message"]["usage"], found["message_delta"]["usage"]
    assert first["cache_read_input_tokens"] > 0 and first["output_tokens"] < last["output_tokens"]
    assert all(first[name] == last[name] for name in INPUT_COUNTS)


def test_thinking_of_a_model_that_does_not(says):
    asking = says("x")
    assert "does not write thoughts" in asking.refusal(thinking={"type": "enabled", "budget_tokens": 1024})
    asking.post(thinking={"type": "disabled"}, output_config={"effort": "low"})
    assert asking.engine.calls


@pytest.mark.parametrize(
    ("choice", "constrained", "most"),
    [({"type": "auto"}, False, 2), ({"type": "auto", "disable_parallel_tool_use": True}, False, 1), ({"type": "any"}, True, 2),
     ({"type": "tool", "name": "look"}, True, 2), ({"type": "none"}, False, 0)],
)  # fmt: skip
def test_which_tool_must_be_called(says, choice, constrained, most):
    asking = says(CALL + CALL)
    message = asking.message(tools=[LOOK], tool_choice=choice)
    assert [block["type"] for block in message["content"]].count("tool_use") == most
    assert (asking.engine.calls[-1]["sampling"].structured is not None) == constrained


def test_examples_of_input_reach_the_model(says):
    asking = says("x")
    asking.post(tools=[{**LOOK, "input_examples": [{"city": "Ulm"}]}])
    assert "Ulm" in asking.prompt()


@pytest.mark.parametrize("field", ["output_config", "output_format"])
def test_an_answer_of_a_schema(asking, field):
    wanted = {"type": "json_schema", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    asking.post(**{field: {"format": wanted} if field == "output_config" else wanted}, max_tokens=3)
    assert asking.engine.calls[0]["sampling"].structured.json_schema == json.dumps(wanted["schema"], separators=(",", ":"))


def test_fields_of_kvloom_work_here_too(asking):
    own = {"seed": 7, "priority": 3, "cache_salt": "s", "min_p": 0.5, "kv": {"selection": "dense", "explain": True}}
    reply = asking.post(**own, top_k=4, top_p=0.5, temperature=0.5, max_tokens=3).json()
    call = asking.engine.calls[0]
    sampling = call["sampling"]
    assert (call["priority"], call["cache_salt"], call["kv"].explain, sampling.seed) == (3, "s", True, 7)
    assert (sampling.top_k, sampling.top_p, sampling.min_p, sampling.temperature, sampling.default_tokens) == (
        4,
        0.5,
        0.5,
        0.5,
        3,
    )
    assert reply["usage"]["kv"]["explain"]["reason"] == "a fake"


def test_what_the_model_recommends_holds_here_too(serving, fake):
    engine = fake.FakeEngine()
    engine.model = replace(engine.model, sampling=SamplingDefaults(temperature=0.25))
    asking = Asking(serving(engine))
    asking.post(max_tokens=3)
    assert engine.calls[0]["sampling"].temperature == 0.25


@pytest.mark.parametrize("fields", [
    {}, {"system": "Be short."}, {"tools": [LOOK, LIST]}, {"tools": [LOOK], "tool_choice": {"type": "none"}},
    {"messages": HISTORY, "tools": [LOOK]}, {"messages": [USER, {"role": "assistant", "content": "It"}]},
    {"truncate_prompt_tokens": 5},
], ids=str)  # fmt: skip
def test_count_tokens_counts_what_messages_read(asking, fields):
    usage = asking.message(max_tokens=2, **fields)["usage"]
    counted = asking.post("/count_tokens", **fields, max_tokens="-")
    assert not asking.engine.calls
    assert counted.json() == {
        "input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"]
    }
    assert usage["cache_read_input_tokens"] > 0


@pytest.mark.parametrize("name", ["max_tokens", "messages"])
def test_what_is_required(asking, name):
    assert asking.refusal(**{name: "-"}) == f"{name}: this field is required"


@pytest.mark.parametrize(("fields", "said"), [
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url"}}]}]}, "reads text only"),
    ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0].type: blocks of"),
    ({"messages": [*HISTORY[:2], {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "image"}]}]}]}, "content[0].content[0]"),
    ({"messages": [{"role": "assistant", "content": [{"type": "server_tool_use"}]}]}, "run at the server"),
    ({"messages": [{"role": "user", "content": [ANY_CALL]}]}, "allowed there"),
    ({"messages": [{"role": "user", "content": []}]}, "content is empty"),
    ({"messages": [{"role": "user", "content": [7]}]}, "must be an object with a type"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": {"type": "text"}}]}, "must be a string, or a list of blocks"),
    ({"tools": [LOOK], "tool_choice": "auto"}, '{"type": "auto"}'),
    ({"messages": [{"role": "user", "content": [TEXT] * 4096}, {"role": "user", "content": "a"}]}, "4097 blocks"),
    ({"messages": [HISTORY[0], HISTORY[1], {"role": "user", "content": [RESULT] * 4095}]}, "4095 results in 3 messages"),
    ({"messages": [{"role": "assistant", "content": [ANY_CALL] * 513}, USER]}, "513 of them calls"),
    ({"messages": [{"role": "assistant", "content": [{**ANY_CALL, "name": "x" * 257}]}, USER]}, "at most 256"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
    ({"tools": [{"name": "a", "input_schema": {"type": "string"}}]}, "input_schema must be of type object"),
    ({"tools": [LOOK, LOOK]}, "twice"),
    ({"tools": [{**LOOK, "defer_loading": True}]}, "defer_loading"),
    ({"tools": [{**LOOK, "allowed_callers": ["code_execution_20260120"]}]}, "allowed_callers"),
    ({"tool_choice": {"type": "any"}}, "no tools are given"),
    ({"tools": [LOOK], "tool_choice": {"type": "tool", "name": "b"}}, "not among the tools: look"),
    ({"tools": [LOOK], "tool_choice": {"type": "tool"}}, "which tool must be called"),
    ({"thinking": {"type": "between_tools"}}, "thinking.type"),
    ({"temperature": 1.5}, "temperature is 1.5"),
    ({"max_tokens": 0}, "max_tokens is 0; allowed: 1 or more; ask for one token"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens asks for 9 tokens"),
    ({"forced_tokens": [5, 5], "max_tokens": 1}, "forced_tokens asks for 2 tokens"),
    ({"stop_sequences": ["x"] * 1000}, "stop_sequences"),
    ({"output_config": {"format": {"type": "text"}}}, "output_config.format.type"),
    ({"output_config": {"task_budget": 5}}, "output_config.task_budget"),
    ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "sent whole"),
    ({"kv": {"nonsense": 8}}, "nonsense"),
])  # fmt: skip
def test_what_is_not_served_is_said(asking, fields, said):
    assert said in asking.refusal(**fields) and not asking.engine.calls


def test_context_management_that_keeps_everything_passes(asking):
    for edits in ([], [{"type": "clear_thinking_20251015", "keep": "all"}]):
        assert asking.post(context_management={"edits": edits}, max_tokens=2).status_code == 200


def test_a_long_silence_has_pings(says, monkeypatch, until):
    monkeypatch.setattr(sse, "PING_SECONDS", 0.01)
    asking = says("Rain.")
    asking.engine.held = True
    body = {"max_tokens": 9, "messages": [USER], "stream": True}
    with asking.client.stream("POST", "/v1/messages", json=body) as stream:
        pieces = stream.iter_text()
        text = next(pieces)  # before the first token
        assert events_of(text)[0] == ("ping", {"type": "ping"}) and asking.engine.live
        asking.engine.held = False
        text += "".join(pieces)
    assert message_of(text)["content"] == [{"type": "text", "text": "Rain."}]


def test_pings_stand_between_tokens(says, monkeypatch):
    monkeypatch.setattr(sse, "PING_SECONDS", 0.01)
    asking = says("Rain, and more of it.")
    asking.engine.step_seconds = 0.05
    text = asking.post(stream=True, max_tokens=4).text
    names = [name for name, _ in events_of(text)]
    assert "ping" in names[names.index("content_block_start") : -1] and names[-1] == "message_stop" and message_of(text)


def test_a_refusal_after_a_ping_is_an_event(says, monkeypatch):
    monkeypatch.setattr(sse, "PING_SECONDS", 0.01)
    asking = says("Rain.")
    asking.engine.step_seconds, asking.engine.fail_after, asking.engine.blame = 0.1, 0, "stop"
    reply = asking.post(stream=True)
    assert reply.status_code == 200 and events_of(reply.text)[0][0] == "ping"
    name, data = events_of(reply.text)[-1]
    assert (name, data["error"]["type"]) == ("error", "invalid_request_error")
    assert data["error"]["message"] == "stop_sequences: the fake failed"


def test_a_client_that_leaves_in_a_silence_ends_its_request(says, monkeypatch, until):
    monkeypatch.setattr(sse, "PING_SECONDS", 0.01)
    asking = says("Rain.")
    asking.engine.held = True
    with asking.client.stream("POST", "/v1/messages", json={"max_tokens": 9, "messages": [USER], "stream": True}) as stream:
        next(stream.iter_text())
    until(lambda: asking.engine.aborted and not asking.engine.live)
