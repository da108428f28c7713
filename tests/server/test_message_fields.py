"""No field of a message that changes an answer is ignored: each is served, a harmless hint, or refused by name; requests prove
of each that it is what the table says."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvloom.server.schema.message_known import ANTHROPIC, fields, table

PATH = "/v1/messages"
BASE = {"messages": [{"role": "user", "content": "the quick brown fox jumps"}], "max_tokens": 3}
TOOL = {"name": "look", "input_schema": {"type": "object"}}
EFFECTS = {
    "messages": [{"role": "user", "content": "dog"}], "model": "other", "max_tokens": 2, "system": "dog", "tools": [TOOL],
    "stop_sequences": ["q"], "stream": True, "temperature": 0.5, "top_k": 5, "top_p": 0.5,
    "output_config": {"format": {"type": "json_schema", "schema": {}}}, "output_format": {"type": "json_schema", "schema": {}},
    "thinking": {"type": "enabled"}, "frequency_penalty": 0.5, "presence_penalty": 0.5, "repetition_penalty": 1.5,
    "logit_bias": {"5": 1.0}, "min_tokens": 1, "seed": 7, "stop_token_ids": [7], "min_p": 0.5, "allowed_token_ids": [5, 6],
    "bad_words": ["fox"], "ignore_eos": True,  "include_stop_str_in_output": True, "skip_special_tokens": False,
    "truncate_prompt_tokens": 2, "priority": 1, "cache_salt": "s", "response_format": {"type": "json_object"},
    "structured_outputs": {"regex": "a+"}, "guided_json": {}, "guided_json_object": True, "guided_regex": "a+",
    "guided_choice": ["a"], "guided_grammar": 'start: "a"', "guided_decoding": {"regex": "a+"}, "json_schema": {},
    "grammar": 'root ::= "a"', "regex": "a+", "ebnf": 'root ::= "a"', "forced_tokens": [5],
    "structural_tag": {"structures": [], "triggers": []}, "kv": {"explain": True},
}  # fmt: skip
"""Values with which a request of a fake engine is asked, or answered, otherwise than without."""
WITH = {
    "tool_choice": ({"tools": [TOOL]}, {"type": "any"}), "truncation_side": ({"truncate_prompt_tokens": 2}, "right"),
    "guided_whitespace_pattern": ({"guided_json": {}}, " "), "chat_template_kwargs": None,
}  # fmt: skip
"""The same for fields that mean something beside others only; None where the fake's template has nothing to tell."""
WRONG = {"json_schema": 5, "guided_json": 5, "structural_tag": 5, "structured_outputs": 5, "guided_decoding": 5,
         "response_format": 5, "logit_bias": "x", "chat_template_kwargs": "x"}  # fmt: skip
"""Values that a field cannot have; the others cannot be this:"""
OBJECT = {"wrong": True}


@pytest.fixture(scope="module")
def asking(served):
    with served.client() as client:
        yield served.engine, client


def named(kind):
    return [name for name, standing in fields().items() if standing == kind]


def ask(asking, **more):
    """What the engine was asked, and what was answered; without what differs every time."""
    engine, client = asking
    engine.calls.clear()
    reply = client.post(PATH, json={**BASE, **more})
    asked = [{key: value for key, value in call.items() if key != "id"} for call in engine.calls]
    if "text/event-stream" in reply.headers["content-type"]:
        return reply.status_code, asked, reply.text.count("data:")
    return reply.status_code, asked, {key: value for key, value in reply.json().items() if key not in ("id", "request_id")}


def test_every_field_has_a_standing():
    assert len(ANTHROPIC) > 25 and not named("unknown")


@pytest.mark.parametrize("name", named("served"))
def test_served_fields_are_validated_and_change_something(asking, name):
    status, asked, answer = ask(asking, **{name: WRONG.get(name, OBJECT)})
    assert status == 400 and not asked and name in answer["error"]["message"], answer
    given = WITH.get(name, ({}, EFFECTS.get(name)))
    if given is not None:
        beside, value = given
        assert ask(asking, **beside, **{name: value}) != ask(asking, **beside)


@pytest.mark.parametrize("name", named("hint"))
def test_hints_change_nothing(asking, name):
    expected = ask(asking)
    assert expected[0] == 200
    for value in ("x", 7, True, ["b"], {"type": "ephemeral"}, None):
        assert ask(asking, **{name: value}) == expected


@pytest.mark.parametrize("name", named("refused"))
def test_refused_fields_are_named(asking, name):
    status, asked, answer = ask(asking, **{name: {"asked": 1}})
    assert (status, asked) == (400, []) and answer["error"]["message"].startswith(f"{name} is not supported")
    assert ask(asking, **{name: None}) == ask(asking)


def test_documentation_holds_the_table():
    """`python -m kvloom.server.schema.message_known` prints it."""
    assert table() in (Path(__file__).resolve().parents[2] / "docs" / "messages.md").read_text()
