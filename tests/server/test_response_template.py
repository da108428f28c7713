"""Answers read by a checkpoint's own response template: what transformers reads in them, whatever the pieces they come in."""

import itertools
import json
import random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.server.answers.events import CallArguments, CallStart, Content, Reasoning
from kvloom.server.answers.formats import CALL_FORMATS
from kvloom.server.answers.reader import Expected
from kvloom.server.answers.template import patterns
from kvloom.server.answers.template import reader as reading
from kvloom.server.answers.template.reader import TemplateReader
from kvloom.server.answers.template.spec import load
from tests.server.response_templates import CHANNELS, FRAMED, LISTED, PYTHON, TAGS


def shipped(model):
    """The template that transformers itself takes for a family of models."""
    from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS as templates

    return next(template for names, template in templates.items() if model in names)


def read(template, text, prompt="", cuts=None, schemas=None, **more):
    """(content, thoughts, [(name, arguments)]) of a text that comes in pieces of random lengths, or whole."""
    expected = Expected(calls=CALL_FORMATS["hermes"], prompt_end=prompt, schemas=schemas or {}, **more)
    reader, events, draw = TemplateReader(expected, load(template, [])), [], random.Random(cuts)
    while text:
        count = len(text) if cuts is None else draw.randint(1, 7)
        events += reader.push(text[:count])
        text = text[count:]
    events += reader.push("", ended=True)
    calls = {}
    for event in events:
        if isinstance(event, CallStart):
            calls[event.call] = (event.name, [])
        elif isinstance(event, CallArguments):
            calls[event.call][1].append(event.text)
    told = ["".join(event.text for event in events if isinstance(event, kind)) for kind in (Content, Reasoning)]
    return *told, [(name, json.loads("".join(pieces))) for name, pieces in calls.values()]


CALL = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
CASES = [
    (TAGS, "<think>\nhm\n</think>\n\nLet me look.\n" + CALL % ("look", '{"city": "Bonn"}')),
    (TAGS, CALL % ("a", "{}") + "\n" + CALL % ("b", '{"x": [1, null]}')),
    (TAGS, "no marks < at all <thin"),
    (TAGS, "<think>cut"),
    (CHANNELS, '<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.look <|constrain|>'
               'json<|message|>{"city": "Bonn"}<|call|>'),
    (CHANNELS, "<|channel|>final<|message|>Rain.<|return|>"),
    (LISTED, "hm</think>\n<R>\nRain.\n</R><C>[1]</C>"
             '<A>[{"tool": "a", "parameters": {"x": 1}}, {"tool": "b", "parameters": {}}]</A>'),
    (FRAMED, "<|think|> a<|e|><|m|>who<|think|>b <|e|><|m|><|text|> Rain <|e|><|text|>!<|e|>"
             "<|call|>city: Bonn\ndays: 3<|look|>"),
    (PYTHON, "Rain.<P>[look(city='Bonn', days=3, deep={'a': [True, None]}), list_all()]"),
    ("qwen3", "<think>\nhm\n</think>\n\nOk.\n\n" + CALL % ("look", '{"city": "Bonn"}') + "<|im_end|>"),
    ("qwen3_5", "<think>\nhm\n</think>\n\n<tool_call>\n<function=look>\n<parameter=city>\nBonn\n"
                "</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=list_all>\n</function>\n</tool_call><|im_end|>"),
    ("gemma4", "<|channel>thought\nhm<channel|>"
               '<|tool_call>call:look{city:<|"|>Bonn, "x": y<|"|>,days:3}<tool_call|>Rain.<turn|>'),
]  # fmt: skip


@pytest.mark.parametrize(
    "template, text", CASES, ids=lambda value: value if isinstance(value, str) and len(value) < 9 else None
)
def test_what_is_read_is_what_transformers_reads(template, text):
    from transformers.utils.chat_parsing import parse_response

    template = shipped(template) if isinstance(template, str) else template
    wanted = parse_response(text, template, prefix="")
    thoughts = next((wanted[name] for name in ("thinking", "reasoning", "reasoning_content") if name in wanted), "")
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in wanted.get("tool_calls") or ()
             ] if isinstance(wanted.get("tool_calls"), list) else [tuple(wanted["tool_calls"]["function"].values())
             ] if "tool_calls" in wanted else []  # fmt: skip
    for cuts in (None, 1, 2, 3):
        assert read(template, text, cuts=cuts) == (wanted.get("content", ""), thoughts, calls)


PIECES = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool", "\n", " ", "a", '{"name": "f", "arguments": {}}',
          "<|channel|>", "final", "analysis", "commentary to=functions.f", "<|message|>", "<|end|>", "<|call|>", "<|m|>",
          "<|e|>", "<|text|>", "<|think|>", "<R>", "</R>", "<A>", "</A>", "[]", "<P>", "[f(a=1)]", "<|im_end|>",
          "x: 1\n"]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([TAGS, CHANNELS, LISTED, FRAMED, PYTHON]),
    st.lists(st.sampled_from(PIECES), max_size=14),
    st.integers(0, 99),
)
def test_what_is_read_does_not_depend_on_the_pieces(template, pieces, seed):
    text = "".join(pieces)
    assert read(template, text, cuts=seed) == read(template, text)


def test_what_the_prompt_has_opened_goes_on():
    assert read(TAGS, "hm</think>Rain.", "x<think>y<|im_start|>assistant\n<think>\n", cuts=1) == ("Rain.", "hm", [])
    assert read(TAGS, "Rain.", "<|im_start|>assistant\n<think>\n\n</think>\n\n") == ("Rain.", "", [])
    assert read(TAGS, "Rain.", "a prompt of <think> without the mark") == ("Rain.", "", [])
    assert read(FRAMED, "<|text|>Rain.", "<|m|>") == ("Rain.", "", [])
    assert read(TAGS, "nk>hm</think>Rain.", "<|im_start|>assistant\n<thi", cuts=1) == ("Rain.", "hm", [])
    half, rest = "<|im_start|>assistant\n<tool_call>" + '{"name": "f", "arguments": {"a": "x<', '3"}}</tool_call>'
    assert read(TAGS, rest, half, cuts=1)[2] == [("f", {"a": "x<3"})]


@pytest.mark.parametrize("said, answer, content", [
    ("\n", "Hello", "Hello"), ("Partial \n", "Hello", "Hello"), ("Partial", " text", " text"), ("<thi", "s> is", "s> is"),
    ("<tool_call>x<", "y</tool_call> z", "y</tool_call> z"), ("<tool_call>x", "y", "y"), ("<think>hm", "</think>a", "a"),
    ("Partial <tool_call>{}</tool_call>", "a", "a"), ("<think>a</think>\n\n<tool", "<tool_call>b", "<tool_call>b"),
])  # fmt: skip
def test_nothing_of_the_prompt_is_told(said, answer, content):
    for cuts in (None, 1, 2):
        assert read(TAGS, answer, "<|im_start|>assistant\n" + said, cuts=cuts) == (content, "", [])


def test_calls_of_the_prompt_are_none_of_the_answer():
    prompt = "<|im_start|>assistant\n" + CALL % ("a", "{}")
    reader = TemplateReader(Expected(calls=CALL_FORMATS["hermes"], most_calls=1, prompt_end=prompt), load(TAGS, []))
    assert not reader.complete and reader.finish_reason("stop") == "stop"
    events = reader.push("\n" + CALL % ("b", "{}"), ended=True)
    assert [(event.call, event.name) for event in events if isinstance(event, CallStart)] == [(0, "b")] and reader.complete


@pytest.mark.parametrize("body", ["{", '{"arguments": {}}', '{"name": "", "arguments": {}}',
                                  '{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": {"a": NaN}}',
                                  "[" * 100_000,
                                  '{"name": "f", "arguments": {"a": ' + "[" * 128 + "]" * 128 + "}}",
                                  '{"name": "' + "f" * 257 + '"}'])  # fmt: skip
def test_what_is_no_call_stays_in_the_content(body):
    assert read(TAGS, f"Ok <tool_call>{body}</tool_call> no") == (f"Ok <tool_call>{body}</tool_call> no", "", [])


def test_what_nobody_asked_to_be_told_apart_is_content():
    text = '<think>hm</think>Ok <tool_call>{"name": "f", "arguments": {}}</tool_call>'
    expected = Expected(prompt_end="", apart=False)
    reader = TemplateReader(expected, load(TAGS, []))
    assert reader.push(text, ended=True) == [Content(text)] and reader.counted_reasoning is None
    assert read(TAGS, text, apart=False)[:2] == ("<think>hm</think>Ok", "")
    assert read(TAGS, text, tell_reasoning=False)[:2] == ("Ok", "")


def test_arguments_are_what_the_schema_says():
    schemas = {"look": {"properties": {"days": {"type": "integer"}, "city": {"type": "string"}, "deep": {"type": "object"}}}}
    text = ("<tool_call><function=look><parameter=days>3</parameter><parameter=city>7</parameter>"
            '<parameter=deep>{"a": 1}</parameter><parameter=more>5</parameter></function></tool_call>')  # fmt: skip
    wanted = {"days": 3, "city": "7", "deep": {"a": 1}, "more": "5"}
    assert read(shipped("qwen3_5"), text, schemas=schemas)[2] == [("look", wanted)]


def test_a_call_is_mended_and_as_deep_as_calls_may_be():
    deep = json.loads("[" * 127 + "]" * 127)
    body = '{"name": "f\\ud83d\\ude00\\ud800", "arguments": {"a\\ud800": ' + json.dumps(deep) + "}}"
    assert read(TAGS, f"<tool_call>{body}</tool_call>")[2] == [("f\U0001f600\ufffd", {"a\ufffd": deep})]


@pytest.mark.parametrize("close, rest", [("(?=<e>)", "<e> world"), (r"\b", "<e> world"), ("$", "<e> world"),
                                         ("x*", "<e> world"), ("(?:<e> )?", "world")])  # fmt: skip
def test_what_matches_nothing_ends_no_outside(close, rest):
    template = thinking(open="<t>")
    template["fields"]["content"] = {"close_pattern": close}
    for cuts in (None, 1, 2) if rest != "world" else (None,):
        assert read(template, "hello <t>h</t> <e> world", cuts=cuts) == (f"hello\n{rest}", "h", [])


def test_giving_up_loses_no_blanks():
    explodes = "(a|aa)+$!"
    text = "hello \n" + "a" * 60 + " and more"
    assert read(thinking(open_pattern=f"<t>|{explodes}"), text, cuts=1)[0] == text
    template = thinking(open="<t>")
    template["fields"]["thinking"] = {"open": "<t>", "close_pattern": f"</t>|{explodes}"}
    assert read(template, "<t>let me see \n" + "a" * 60 + " rest", cuts=1)[:2] == (" \n" + "a" * 60 + " rest", "let me see")


def test_one_call_is_enough_where_no_more_are_wanted():
    reader = TemplateReader(Expected(calls=CALL_FORMATS["hermes"], most_calls=1), load(TAGS, []))
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    reader.push(call)
    assert reader.complete and reader.finish_reason("stop") == "tool_calls" and reader.finish_reason("length") == "length"
    assert not [event for event in reader.push(call, ended=True) if isinstance(event, CallStart)]


def with_content(**field):
    return {"start_anchor": "x", "fields": {"content": {}, "tool_calls": {"content": "json", **field}}}


@pytest.mark.parametrize("template, text", [
    (with_content(open_pattern=r"((?:a|aa)+)\1!"), "a" * 60 + "b"),
    (with_content(open_pattern=r"(?:a|aa)+!"), "a" * 200 + "b"),
    (with_content(open="[[", close="]]", content="xml-inline", content_args={"tag_pattern": r"(?P<key>(?:a|aa)+)!"}),
     "[[" + "a" * 60 + "]]"),
    (with_content(open_pattern="(?=b)", close_pattern="(?=b)"), "aab"),
    (with_content(open="[[", close_pattern="(?:a|aa)+!"), "[[" + "a" * 60),
])  # fmt: skip
def test_an_expression_that_explodes_leaves_content(template, text):
    assert read(template, text + " and more", cuts=1)[0] == text + " and more"


def test_a_mark_that_never_ends_and_a_call_that_never_ends_are_text(monkeypatch):
    monkeypatch.setattr(patterns, "MOST_HELD", 50)
    monkeypatch.setattr(reading, "MOST_BODY", 400)
    text = "<|channel|>commentary to=functions.f" + "x" * 300
    template = {**CHANNELS, "fields": {**CHANNELS["fields"], "content": {}}}
    assert read(template, text, cuts=1)[0] == text
    assert read(TAGS, "<tool_call>" + "x" * 500 + "</tool_call> y", cuts=1)[0] == "<tool_call>" + "x" * 500 + "</tool_call> y"


def thinking(**given):
    return {"start_anchor": "<B>", "fields": {"thinking": {"close": "</t>", **given}, "content": {}}}


def test_searches_take_a_bounded_time_in_all(monkeypatch):
    ticks = itertools.count()  # every look at the clock says one ms more, so that each search takes that
    monkeypatch.setattr(patterns, "time", SimpleNamespace(thread_time=lambda: next(ticks) / 1000))
    fields = {f"f{i}": {"open_pattern": f"<[^>]*>{i}", "close": "x"} for i in range(15)}
    reader = TemplateReader(Expected(), load({"start_anchor": "x", "fields": {**fields, "content": {}}}, []))
    text = "<a b> " * 700
    events = [event for char in text for event in reader.push(char)] + reader.push("", ended=True)
    assert "".join(event.text for event in events) == text
    allowed = patterns.ANSWER_SECONDS + len(text) * patterns.CHARACTER_SECONDS
    assert 20 < next(ticks) / 2 <= 1000 * allowed + 1
    budget, before = patterns.Budget(), next(ticks)
    budget.grow(1_000_000)
    with pytest.raises(patterns.TooSlowError):
        while True:
            with budget.search():
                pass
    assert next(ticks) - before <= 2 * (1000 * patterns.ANSWER_SECONDS + 1) + 1, "what a long answer has saved is bounded"


def test_a_literal_that_begins_first_goes_first():
    for literals, text in (
        (["<a><b><c>", "<b>"], "x<a><b><c>yy</t>zz"),
        (["<a><b><c>", "<b>"], "x<a><b>yy</t>zz"),
        (["<b>", "<b>more"], "x<b>moyy</t><b>moreuu"),
    ):
        wanted = read(thinking(open=literals), text)
        assert wanted[1] and all(read(thinking(open=literals), text, cuts=cuts) == wanted for cuts in range(8))


@pytest.mark.parametrize("length", [400, 505, 506, 700, 4190])
def test_what_a_mark_may_hold_does_not_depend_on_the_pieces(length):
    template, text = thinking(open_pattern="<a>[^<]*<b>"), "<a>" + "x" * length + "<b>yy</t>zz<a><b>uu"
    wanted = read(template, text)
    assert (wanted[1] == "yy\nuu") == (length <= 506), "3 more characters each"
    assert all(read(template, text, cuts=cuts) == wanted for cuts in range(4))
