"""Structured output over HTTP: every dialect's fields mean the same constraint, and answers are of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvloom.engine.config import EngineConfig
from kvloom.engine.constraint.options import StructuredOutput
from kvloom.engine.requests.sampling import OPENAI_SAMPLING
from kvloom.engine.thread.client import ThreadEngineClient
from kvloom.server.schema.chat import ChatBody

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "n": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "n"],
    "additionalProperties": False,
}
OF_SCHEMA = {"type": "json_schema", "json_schema": {"name": "place", "strict": True, "schema": SCHEMA}}
TAGS = {"structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f"]}
AS_SCHEMA = StructuredOutput(json_schema=SCHEMA)
GBNF = 'root ::= "yes" | "no"'
MEANINGS: list[tuple[dict[str, Any], StructuredOutput | None]] = [
    ({}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": OF_SCHEMA}, AS_SCHEMA),
    ({"response_format": {"type": "json_object"}}, StructuredOutput(json_object=True)),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, AS_SCHEMA),
    ({"response_format": {"type": "structural_tag", **TAGS}}, StructuredOutput(structural_tag=TAGS)),
    ({"structured_outputs": {"json": SCHEMA}}, AS_SCHEMA),
    ({"structured_outputs": {"json": json.dumps(SCHEMA, separators=(",", ":"))}}, AS_SCHEMA),
    ({"structured_outputs": {"regex": "a+", "backend": "xgrammar", "json": None}}, StructuredOutput(regex="a+")),
    ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutput(choice=("a", "b"))),
    ({"structured_outputs": {"grammar": GBNF}}, StructuredOutput(grammar=GBNF)),
    ({"structured_outputs": {"json_object": True}}, StructuredOutput(json_object=True)),
    (
        {"structured_outputs": {"structural_tag": json.dumps(TAGS, separators=(",", ":"))}},
        StructuredOutput(structural_tag=TAGS),
    ),
    (
        {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True, "disable_additional_properties": True}},
        StructuredOutput(json_schema=SCHEMA, disable_any_whitespace=True, disable_additional_properties=True),
    ),
    ({"guided_json": SCHEMA, "guided_decoding_backend": "outlines"}, AS_SCHEMA),
    ({"guided_json": SCHEMA, "guided_whitespace_pattern": " ?"}, StructuredOutput(json_schema=SCHEMA, whitespace_pattern=" ?")),
    ({"guided_regex": "a+"}, StructuredOutput(regex="a+")),
    ({"guided_choice": ["a", "b"]}, StructuredOutput(choice=("a", "b"))),
    ({"guided_grammar": GBNF}, StructuredOutput(grammar=GBNF)),
    ({"guided_decoding": {"regex": "a+"}}, StructuredOutput(regex="a+")),
    ({"grammar": GBNF}, StructuredOutput(grammar=GBNF)),
    ({"grammar": ""}, None),
    ({"json_schema": SCHEMA}, AS_SCHEMA),
    ({"regex": "a+"}, StructuredOutput(regex="a+")),
    ({"ebnf": GBNF}, StructuredOutput(grammar=GBNF)),
]


@pytest.mark.parametrize(("fields", "meaning"), MEANINGS, ids=lambda value: str(value)[:60] if isinstance(value, dict) else "")
def test_what_fields_mean(fields: dict[str, Any], meaning: StructuredOutput | None) -> None:
    body = ChatBody.model_validate({"messages": [{"role": "user", "content": "hi"}], **fields})
    assert body.params(OPENAI_SAMPLING).structured == meaning


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[ThreadEngineClient]:
    client = ThreadEngineClient.start(EngineConfig.from_flat({"model": str(tiny), "dtype": "fp32", "kv_memory": "8MiB"}))
    yield client
    client.close()


def test_answers_are_of_their_schema(serving: Any, engine: ThreadEngineClient) -> None:
    with serving(engine).openai() as client:
        asked: dict[str, Any] = {"model": engine.model.name, "max_tokens": 60, "seed": 3}
        chat = {**asked, "messages": [{"role": "user", "content": "where?"}]}
        whole = client.chat.completions.create(**chat, response_format=OF_SCHEMA, n=2)
        for choice in whole.choices:
            found = json.loads(choice.message.content)
            assert choice.finish_reason == "stop" and found["city"] in ("Paris", "Rome") and 1 <= found["n"] <= 9
        with client.chat.completions.create(**chat, response_format=OF_SCHEMA, stream=True) as stream:
            chunks = [chunk.choices[0] for chunk in stream]
        assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.choices[0].message.content
        assert chunks[-1].finish_reason == "stop"
        text = client.completions.create(**asked, prompt=["a", "b"], extra_body={"guided_choice": ["red", "green"]})
        assert {choice.text for choice in text.choices} <= {"red", "green"}


def test_what_cannot_be_compiled_is_a_400_that_names_the_keyword(serving: Any, engine: ThreadEngineClient) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    deep = '{"type":"array","items":' * 10_000 + "{}" + "}" * 10_000
    with serving(engine).client() as client:
        for fields, param, named in (
            ({"response_format": {**OF_SCHEMA, "json_schema": {"schema": {"not": {}}}}}, "response_format", "not"),
            ({"guided_json": deep}, "guided_json", "nested too deeply"),
            ({"guided_json": {"description": "x" * 1_000_000}}, "guided_json", "allowed: 524288"),
            ({"regex": "(?=a)"}, "regex", "look-ahead"),
            ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs.grammar", "x"),
        ):
            for stream in (False, True):
                reply = client.post("/v1/chat/completions", json={**body, **fields, "stream": stream})
                error = reply.json()["error"]
                assert (reply.status_code, error["param"]) == (400, param) and named in error["message"], error
        assert client.post("/v1/chat/completions", json=body).status_code == 200


def test_what_fails_on_the_way_is_the_requests_own(serving: Any, engine: ThreadEngineClient) -> None:
    """Settings beside it leave nothing: a 400, and in a stream that has begun an event."""
    quote = engine.tokenizer.encode("q")[0]
    body = {"prompt": "a", "regex": "wq", "stop_token_ids": [quote], "min_tokens": 9, "max_tokens": 9}
    with serving(engine).client() as client:
        reply = client.post("/v1/completions", json=body)
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "regex"
        assert '"param":"regex"' in client.post("/v1/completions", json={**body, "stream": True}).text
