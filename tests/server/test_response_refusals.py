"""What /v1/responses refuses, by the names of its own fields."""

import json
import math

import openai
import pytest

from kvloom.engine.errors import ContextLengthError
from tests.server.response_words import LOGPROBS, LOOK, ask

IMAGE = [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"input": []}, "input", "at least 1"),
        ({"input": 5}, "input", "a text, or a list of items"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type", "'web_search_call'; allowed: message"),
        ({"input": IMAGE}, "input[0].content[0].type", "'input_image'; this model reads text only"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "'assistant'"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id", "required"),
        ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input[0].encrypted_content", "cannot be read"),
        ({"input": [{"role": "user", "content": "\ud800"}]}, "input[0].content", "surrogate"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'web_search'; only tools of type"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name", "required"),
        ({"tools": [LOOK, LOOK]}, "tools", "'look' twice"),
        ({"tools": [{**LOOK, "defer_loading": True}]}, "tools[0].defer_loading", "not supported"),
        ({"tools": [{**LOOK, "parameters": {"type": "object", "x": "\ud800"}}]}, "tools[0].parameters", "surrogate"),
        ({"text": {"format": {"type": "json_schema", "schema": {"x": math.nan}}}}, "text.format.schema", "NaN"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice", "of type 'mcp'; allowed: function, allowed_tools"),
        ({"tool_choice": "required"}, "tool_choice", "no tools are given"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "needs a schema"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type", "'text', 'json_object' or 'json_schema'"),
        ({"text": {"format": {"type": "json_object"}}, "regex": "a"}, "regex", "text.format"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort", "reasoning.effort is 'low'"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", "told in full"),
        ({"top_logprobs": 2}, "top_logprobs", LOGPROBS),
        ({"include": ["everything"]}, "include[0]", LOGPROBS),
        ({"metadata": {"k" * 65: "v"}}, "metadata", "64 and 512"),
        ({"max_tokens": 5}, "max_tokens", "use max_output_tokens"),
        ({"n_predict": 5}, "n_predict", "use max_output_tokens"),
        ({"background": True}, "background", "not supported"),
        ({"conversation": "conv_1"}, "conversation", "previous_response_id"),
        ({"prompt": {"id": "p"}}, "prompt", "instructions and input"),
        ({"stream_options": {}}, "stream_options", "without stream"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "not supported",
        ),
        ({"truncation": "auto", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "give one"),
        ({"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options.prewarm", "not supported"),
        ({"bad_words": ["x"] * 200}, "bad_words", "128"),
        ({"input": [{"role": "user", "content": "x"}] * 5000}, "input", "4096"),
    ],
)
def test_refusals_name_the_field(served, fields, param, said):
    with served.client() as http:
        before = len(served.engine.calls)
        reply = http.post(
            "/v1/responses", content=json.dumps({"input": "dog", **fields}), headers={"Content-Type": "application/json"}
        )
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param) and said in error["message"], error
    assert len(served.engine.calls) == before


def test_what_the_engine_refuses_is_told_by_the_names_of_this_endpoint(says):
    client, served = says("Hi.")
    served.engine.refuse = ContextLengthError("max_tokens is 5000 and the prompt has 9 tokens", "max_tokens")
    with pytest.raises(openai.BadRequestError, match="max_output_tokens is 5000") as refused:
        ask(client, max_output_tokens=5000)
    assert (refused.value.param, refused.value.code) == ("max_output_tokens", "context_length_exceeded")


def test_paths_have_the_methods_that_they_tell(served):
    with served.client() as http:
        for path, methods in {
            "input_tokens": "OPTIONS, POST",
            "resp_1": "DELETE, GET, HEAD, OPTIONS",
            "": "OPTIONS, POST",
        }.items():
            assert http.options(f"/v1/responses/{path}".rstrip("/")).headers["allow"] == methods
        assert http.get("/v1/responses/input_tokens").status_code == 405
        assert http.get("/v1/responses/input_tokens_of_mine").status_code == 404
        described = http.get("/openapi.json").json()["paths"]
    assert {"/v1/responses/{response_id}", "/v1/responses/input_tokens"} <= described.keys()
