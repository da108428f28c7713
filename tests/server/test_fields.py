"""No field that changes an answer is ignored: every field that OpenAI, vLLM, SGLang and llama.cpp define is served, a harmless
hint, or refused by name, and each of them is proved by requests to be what the table says."""

from __future__ import annotations

import json
import logging
import re
import typing
from pathlib import Path

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from kvloom.server.schema import fields
from kvloom.server.schema.known import KNOWN, bodies, document

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "responses": "/v1/responses"}
BASE = {
    "chat": {"messages": [{"role": "user", "content": "the quick brown fox jumps"}], "max_tokens": 3},
    "completions": {"prompt": "the quick brown fox jumps", "max_tokens": 3},
    "responses": {"input": "the quick brown fox jumps", "max_output_tokens": 3},
}
EFFECTS = {
    "messages": [{"role": "user", "content": "dog"}], "prompt": "dog", "model": "other", "frequency_penalty": 0.5,
    "presence_penalty": 0.5, "repetition_penalty": 1.5, "logit_bias": {"5": 1.0}, "max_tokens": 2, "max_completion_tokens": 2,
    "min_tokens": 1, "n": 2, "seed": 7, "stop": ["q"], "stop_token_ids": [7], "stream": True, "temperature": 0.5, "top_p": 0.5,
    "top_k": 5, "min_p": 0.5, "prompt_logprobs": 1, "allowed_token_ids": [5, 6], "bad_words": ["fox"], "ignore_eos": True,
    "include_stop_str_in_output": True, "skip_special_tokens": False, "echo": True, "add_generation_prompt": False,
    "continue_final_message": True, "truncate_prompt_tokens": 2, "return_token_ids": True, "priority": 1, "cache_salt": "s",
    "best_of": 2, "response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a+"}, "guided_json": {},
    "guided_regex": "a+", "guided_choice": ["a"], "guided_grammar": 'start: "a"', "guided_decoding": {"regex": "a+"},
    "input": "dog", "instructions": "be brief", "store": False, "metadata": {"a": "b"}, "max_output_tokens": 2,
    "include": ["message.output_text.logprobs"], "previous_response_id": "resp_1", "text": {"format": {"type": "json_object"}},
    "max_tool_calls": 2, "prompt_cache_key": "k", "safety_identifier": "s", "user": "u",
    "truncation": "auto", "json_schema": {}, "grammar": 'root ::= "a"', "regex": "a+", "ebnf": 'root ::= "a"',
}  # fmt: skip
"""Values with which a request of a fake engine is asked, or answered, otherwise than without."""
WITH = {
    "stream_options": ({"stream": True}, {"include_usage": True}), "top_logprobs": ({"logprobs": True}, 2),
    "truncation_side": ({"truncate_prompt_tokens": 2}, "right"),
}  # fmt: skip
"""The same for fields that mean something beside others only."""
OF_ENDPOINT = {
    ("chat", "logprobs"): ({}, True), ("completions", "logprobs"): ({}, 2),
    ("chat", "logprob_token_ids"): ({"logprobs": True}, [5]), ("completions", "logprob_token_ids"): ({"logprobs": 0}, [5]),
    ("chat", "return_tokens_as_token_ids"): ({"logprobs": True}, True),
    ("completions", "return_tokens_as_token_ids"): ({"logprobs": 1}, True),
    ("responses", "logprob_token_ids"): ({"include": ["message.output_text.logprobs"]}, [5]),
    ("responses", "return_tokens_as_token_ids"): ({"include": ["message.output_text.logprobs"]}, True),
    ("responses", "top_logprobs"): ({"include": ["message.output_text.logprobs"]}, 2),
    ("responses", "stream_options"): None,  # usage is always told
    ("chat", "add_special_tokens"): None, ("completions", "add_special_tokens"): None,  # the tokenizer adds none
    ("chat", "chat_template_kwargs"): None,  # the template has no variables
}  # fmt: skip
WRONG = {"json_schema": 5, "logit_bias": "x", "stream_options": "x", "chat_template_kwargs": "x"}
"""Values that a field cannot have; the others cannot be this:"""
OBJECT = {"wrong": True}


@pytest.fixture(scope="module")
def asking(served):
    """A server's engine, and one client for all: a new one takes longer than its request."""
    with served.client() as client:
        yield served.engine, client


def rows(standing: str) -> list[tuple[str, str]]:
    """(endpoint, field) of that standing, of all that any server defines."""
    return [
        (endpoint, name)
        for endpoint, body in bodies().items()
        for name in sorted({name for known in KNOWN for name in getattr(known, endpoint)})
        if fields.standing(name, body) == standing
    ]


def ask(asking, endpoint, **more):
    """What the engine was asked, and what was answered; without what differs every time."""
    engine, client = asking
    engine.calls.clear()
    reply = client.post(PATHS[endpoint], json={**BASE[endpoint], **more})
    asked = [{key: value for key, value in call.items() if key != "id"} for call in engine.calls]
    if "text/event-stream" in reply.headers["content-type"]:
        return reply.status_code, asked, reply.text.count("data:")
    answer = json.loads(re.sub(r"[a-z]+[_-][0-9a-f]{32}", "id", reply.text))
    return (
        reply.status_code,
        asked,
        {key: value for key, value in answer.items() if not key.startswith(("created", "completed"))},
    )


def test_every_field_of_every_server_has_a_standing():
    for known in KNOWN:
        assert len(known.chat) > 30 and len(known.completions) > 15 and len(known.responses) > 30
        for endpoint, body in bodies().items():
            assert not [name for name in getattr(known, endpoint) if fields.standing(name, body) is None]


def test_the_list_of_openai_is_that_of_its_client():
    """openai-python says in type hints what a request may hold."""

    def hinted(module):
        kinds = [
            kind
            for name, kind in vars(module).items()
            if name.startswith(("CompletionCreateParams", "ResponseCreateParams")) and hasattr(kind, "__required_keys__")
        ]
        return {name for kind in kinds for name in typing.get_type_hints(kind)}

    openai = next(known for known in KNOWN if known.name == "OpenAI")
    assert hinted(chat_create_params) == openai.chat and hinted(completion_create_params) == openai.completions
    assert hinted(response_create_params) == openai.responses


@pytest.mark.parametrize(("endpoint", "name"), rows("served"))
def test_served_fields_are_validated_and_change_something(asking, endpoint, name):
    status, asked, answer = ask(asking, endpoint, **{name: WRONG.get(name, OBJECT)})
    assert status == 400 and not asked, answer
    assert answer["error"]["param"].replace("[", ".").split(".")[0] == name, answer
    beside, value = WITH.get(name, ({}, EFFECTS.get(name)))
    if (endpoint, name) in OF_ENDPOINT:
        beside, value = OF_ENDPOINT[endpoint, name] or ({}, None)
    if value is not None:
        assert ask(asking, endpoint, **beside, **{name: value}) != ask(asking, endpoint, **beside)


@pytest.mark.parametrize(("endpoint", "name"), rows("hint"))
def test_hints_change_nothing(asking, endpoint, name):
    expected = ask(asking, endpoint)
    assert expected[0] == 200
    for value in ("x", 7, True, ["b"], {"type": "content", "content": "x"}):
        assert ask(asking, endpoint, **{name: value}) == expected


@pytest.mark.parametrize(("endpoint", "name"), rows("refused"))
def test_refused_fields_are_named(asking, endpoint, name):
    status, asked, answer = ask(asking, endpoint, **{name: {"asked": 1}})
    assert (status, asked) == (400, []) and answer["error"]["param"] == name and name in answer["error"]["message"]
    assert ask(asking, endpoint, **{name: None}) == ask(asking, endpoint)


def test_fields_that_nobody_knows_pass_and_are_logged_once(asking, caplog, monkeypatch):
    monkeypatch.setattr(fields, "_logged", set())
    monkeypatch.setattr(fields, "MOST_UNKNOWN", 3)
    with caplog.at_level(logging.INFO, "kvloom.server"):
        for name in ("new", "new", "x" * 1000, "metadata", "third", "fourth", "new"):
            assert ask(asking, "chat", **{name: {"deep": [1]}})[0] == 200
    said = [message for message in caplog.messages if "nobody knows" in message]
    assert len(said) == 3 and "'new'" in said[0] and "x" * 64 in said[1] and "x" * 65 not in said[1]


def test_documentation_holds_the_table():
    """`python -m kvloom.server.schema.known > docs/fields.md` writes it."""
    assert (Path(__file__).resolve().parents[2] / "docs" / "fields.md").read_text() == document()
