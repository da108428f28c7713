"""JSON that is deep, or holds numbers without end: 400 or ignored, never a 500, and the server goes on."""

import pytest

PATHS = {
    "/v1/completions": b'"prompt": "a", "max_tokens": 1',
    "/v1/chat/completions": b'"messages": [{"role": "user", "content": "a"}], "max_tokens": 1',
    "/v1/messages": b'"messages": [{"role": "user", "content": "a"}], "max_tokens": 1',
}
FIELDS = [
    b'"unknown": %b', b'"kv": %b', b'"kv": {"kvshare": {"ratio": %b}}', b'"kv": {"recycled": {"stride": %b}}',
    b'"kv": {"x": %b}', b'"stop": %b', b'"logit_bias": {"5": %b}', b'"seed": %b', b'"temperature": %b',
    b'"forced_tokens": [%b]', b'"stop_token_ids": [%b]', b'"chat_template_kwargs": {"x": %b}', b'"stream_options": %b',
    b'"tools": %b', b'"priority": %b', b'"response_format": %b', b'"metadata": %b', b'"user": %b', b'"cache_salt": %b',
    b'"n": %b', b'"prompt": %b', b'"messages": %b', b'"system": %b', b'"thinking": %b', b'"output_config": {"format": %b}',
    b'"tools": [{"name": "a", "input_schema": {"x": %b}, "input_examples": [{"x": %b}]}]',
    b'"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {"x": %b}}]},'
    b'{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "c"}]}]',
    b'"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "a", "function": {"name": "b",'
    b'"arguments": {"x": %b}}}]}]',
]  # fmt: skip


def lists(depth):
    return b"[" * depth + b"]" * depth


def objects(depth):
    return b'{"a":' * depth + b"1" + b"}" * depth


# Short enough not to wait for a turn to be read (`limits.SMALL_BODY`).
VALUES = {
    "lists": lists(400), "deeper lists": lists(980), "deepest lists": lists(15_000), "objects": objects(400),
    "deeper objects": objects(980), "deepest objects": objects(5_000), "digits": b"9" * 5000, "fewer digits": b"9" * 4000,
    "exponent": b"1e999", "minus": b"-1e999", "small": b"1e-999", "nan": b"NaN", "infinity": b"-Infinity",
    "surrogate": b'"\\ud800"', "surrogate key": b'{"\\udfff": 1}', "nul": b'"\\u0000"',
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_values_that_are_hard_to_read(served, path):
    with served.client() as client:
        for field in FIELDS:
            for name, value in VALUES.items():
                content = b"{" + PATHS[path] + b", " + field.replace(b"%b", value) + b"}"
                response = client.post(path, content=content, headers={"Content-Type": "application/json"})
                assert response.status_code in (200, 400), (field, name, response.text[:300])
                if response.status_code == 400:
                    assert len(response.content) < 4000 and response.json()["error"]["message"]
