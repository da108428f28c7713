"""A checkpoint's response template from its folder to HTTP: refused at start where it says nothing, taken where it does."""

import json

import pytest

from kvloom.engine.errors import ModelError
from kvloom.engine.text import Tokenizer
from kvloom.server.answers.choose import formats_of
from kvloom.server.answers.template.spec import load
from tests.server.response_templates import CHANNELS, TAGS


def field(**given):
    return {"start_anchor": "a", "fields": {"content": given}}


@pytest.mark.parametrize("template, problem", [
    ("text", "it is 'text'; an object is needed"),
    ({"version": 2}, "version is 2; allowed: 1"),
    ({"more": 1}, "more unknown; allowed: defaults"),
    ({"start_anchor": "a", "fields": {}}, "fields is {}; allowed: an object of 1 to 16 fields"),
    ({"fields": {"content": {}}}, "start_anchor or start_anchor_pattern is needed"),
    ({"start_anchor": "a", "fields": {"content": {}, "thinking": {}}}, "content and thinking have neither open nor"),
    (field(shut="x"), "field content: shut unknown"),
    (field(open="a", open_pattern="b"), "open and open_pattern are both given"),
    (field(open=""), "open is ''; allowed: a string of 1 to 512 characters"),
    (field(close=["a", 3]), "close is"),
    (field(close_pattern="("), "close_pattern is no regular expression"),
    (field(close_pattern="x" * 3000), "allowed: a string of 1 to 2000"),
    (field(close_pattern="(?:(?:(?:a?){100}){100}){100}b"), "multiplied, more than 10000"),
    (field(close_pattern="(?:" + "ab?" * 600 + "){300}"), "multiplied, more than 276"),
    (field(close_pattern=r"<t>\K"), r"close_pattern has \K; not allowed: \K, the"),
    (field(close_pattern="(?r)<t>"), "close_pattern has (?r);"),
    (field(close_pattern=r"\\{e<=3}"), "close_pattern has {e<=3};"),
    (field(content="yaml"), "content is 'yaml'; allowed: text, int"),
    (field(content_args=[]), "content_args is []; an object is needed"),
    (field(content="xml-inline"), "tag_pattern is None"),
    (field(content="xml-inline", content_args={"tag_pattern": "(?P<name>x)"}), "no group named `key`"),
    (field(content="json", content_args={"string_delims": [["'"]]}), "string_delims is"),
    (field(content="kv-lines", content_args={"kv_sep": ""}), "line_sep and kv_sep are"),
    (field(content="kv-lines", content_args={"value_parser": 3}), "value_parser is 3"),
    (field(repeats=1), "repeats is 1; allowed: true or false"),
    (field(join=1), "join is 1"),
    (field(transform_each=True), "transform_each without transform"),
    (field(transform={"a": "b {c}"}), "a name in braces must be a string of its own"),
])  # fmt: skip
def test_a_template_that_says_nothing_is_refused_at_start(template, problem):
    with pytest.raises(ModelError) as refused:
        load(template, [])
    assert (
        problem in str(refused.value)
        and "response_template" in str(refused.value)
        and "--tool-call-parser" in str(refused.value)
    )


LOOK = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"days": {"type": "integer"}}}},
}
ANSWER = '<|channel|>analysis<|message|>hm, rain<|end|><|channel|>commentary to=functions.look <|message|>{"days": 3}<|call|>'
MARKS = ("<|channel|>", "<|message|>", "<|call|>", "<|other|>")


@pytest.fixture
def says(serving, fake):
    """Starts a server of a checkpoint with a response template whose model says a text."""

    def start(text, template=CHANNELS, **options):
        engine = fake.FakeEngine()
        engine.says = text
        engine.tokenizer = fake.make_tokenizer(special=(*fake.SPECIAL, *MARKS))
        engine.tokenizer.response_template = template
        return serving(engine, **options)

    return start


def ask(served, **fields):
    return served.openai().chat.completions.create(
        model="echo-model", messages=[{"role": "user", "content": "weather?"}], **fields
    )


def test_over_http(says):
    served = says(ANSWER)
    choice, usage = (answer := ask(served, tools=[LOOK])).choices[0], answer.usage
    assert (
        choice.message.reasoning_content == "hm, rain" and not choice.message.content and choice.finish_reason == "tool_calls"
    )
    assert [(call.function.name, call.function.arguments) for call in choice.message.tool_calls] == [("look", '{"days": 3}')]
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
    shown = served.engine.calls[-1]["sampling"].shown_special_tokens
    assert {served.engine.tokenizer.special_text(token) for token in shown} == {"<|channel|>", "<|message|>", "<|call|>"}
    deltas = [chunk.choices[0].delta for chunk in ask(served, tools=[LOOK], stream=True) if chunk.choices]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "hm, rain"
    assert "".join(call.function.arguments or "" for delta in deltas for call in delta.tool_calls or ()) == '{"days": 3}'
    assert ask(says("<|channel|>final<|message|>Rain.")).choices[0].message.content == "Rain.", "without tools, too"


def test_grammars_and_the_operator_go_first(says):
    call = '<tool_call>{"name": "look", "arguments": {"days": 3}}</tool_call>'
    named = {"type": "function", "function": {"name": "look"}}
    for served, fields in ((says(call), {"tool_choice": named}), (says(call, tool_call_parser="hermes"), {})):
        assert ask(served, tools=[LOOK], **fields).choices[0].message.tool_calls[0].function.arguments == '{"days": 3}'
    assert ask(says(ANSWER, reasoning_parser="none")).choices[0].message.content.startswith("analysishm, rain")


def test_a_folder_gives_its_template(fake, tmp_path):
    fake.make_tokenizer().backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "response_template": TAGS}))
    assert formats_of(Tokenizer.from_folder(tmp_path)).template.reasons


def test_a_bad_template_keeps_a_server_from_starting(fake):
    tokenizer = fake.make_tokenizer()
    tokenizer.response_template = {"version": 3}
    with pytest.raises(ModelError, match="version is 3"):
        formats_of(tokenizer)
    assert formats_of(tokenizer, "hermes").template is None
