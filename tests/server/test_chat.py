"""Chat completions through openai-python, over a real socket."""

import asyncio

import openai
import pytest

MESSAGES = [{"role": "user", "content": "hello world"}]


def expected(served, count):
    tokenizer = served.engine.tokenizer
    prompt = tokenizer.encode("<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    return prompt, tokenizer.decode([prompt[i % len(prompt)] for i in range(count)])


def test_answer(served):
    answer = served.openai().chat.completions.create(model="echo-model", messages=MESSAGES, max_tokens=9)
    prompt, text = expected(served, 9)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and answer.model == "echo-model"
    assert answer.choices[0].message.content == text and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(prompt) and answer.usage.completion_tokens == 9
    assert answer.usage.total_tokens == len(prompt) + 9
    assert answer.usage.prompt_tokens_details.cached_tokens == len(prompt) // 2


def test_stream_equals_answer(served):
    stream = served.openai().chat.completions.create(
        model="echo-model", messages=MESSAGES, max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    prompt, text = expected(served, 12)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == len(prompt) // 2
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_async_stream(served):
    async def main():
        async with served.async_openai() as client:
            stream = await client.chat.completions.create(model="echo-model", messages=MESSAGES, max_tokens=6, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(main()) == expected(served, 6)[1]


def test_continuous_usage(served):
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = served.openai().chat.completions.create(
        model="echo-model", messages=MESSAGES, max_tokens=5, stream=True, stream_options=options
    )
    counts = [chunk.usage.completion_tokens for chunk in stream]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == 5


def test_n_choices(served):
    before = len(served.engine.calls)
    answer = served.openai().chat.completions.create(model="echo-model", messages=MESSAGES, max_tokens=4, n=3, seed=7)
    prompt, text = expected(served, 4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert all(choice.message.content == text for choice in answer.choices)
    assert sorted(call["sampling"].seed for call in served.engine.calls[before:]) == [7, 8, 9]
    assert answer.usage.prompt_tokens == len(prompt) and answer.usage.completion_tokens == 12


def test_n_streamed(served):
    stream = served.openai().chat.completions.create(model="echo-model", messages=MESSAGES, max_tokens=4, n=3, stream=True)
    texts, ends = ["", "", ""], []
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        ends += [chunk.choices[0].index] if chunk.choices[0].finish_reason else []
    assert texts == [expected(served, 4)[1]] * 3 and sorted(ends) == [0, 1, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(served, stream):
    client = served.openai()
    given = client.chat.completions.create(
        model="echo-model", messages=[{"role": "user", "content": "the fox 🦊"}], max_tokens=40, logprobs=True, top_logprobs=3,
        stream=stream,
    )  # fmt: skip
    if stream:
        entries = [entry for chunk in given if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    else:
        entries = given.choices[0].logprobs.content
    assert len(entries) == 40
    assert all(entry.logprob == -0.5 and len(entry.top_logprobs) == 3 for entry in entries)
    assert "🦊".encode() in b"".join(bytes(entry.bytes) for entry in entries)


def test_logprobs_without_top(served):
    answer = served.openai().chat.completions.create(model="echo-model", messages=MESSAGES, max_tokens=2, logprobs=True)
    assert [entry.top_logprobs for entry in answer.choices[0].logprobs.content] == [[], []]


def test_stop_string(served):
    answer = served.openai().chat.completions.create(model="echo-model", messages=MESSAGES, max_tokens=50, stop="world")
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].stop_reason == "world"
    assert "world" not in answer.choices[0].message.content


def test_parts_developer_and_continue(served):
    served.openai().chat.completions.create(
        model="echo-model",
        max_tokens=1,
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "I am"},
        ],
        extra_body={"continue_final_message": True},
    )
    sent = served.engine.tokenizer.decode(served.engine.calls[-1]["prompt"], skip_special_tokens=False)
    assert sent == "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\nI am"


def test_fields_reach_the_engine(served):
    served.openai().chat.completions.create(
        model="echo-model", messages=MESSAGES, max_completion_tokens=3, max_tokens=99, temperature=0.5, top_p=0.9, seed=-2,
        presence_penalty=1.5, frequency_penalty=-1.0, logit_bias={"5": -100}, stop=["x", "y"],
        extra_body={"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2, "ignore_eos": True, "priority": -3,
                    "stop_token_ids": [7], "include_stop_str_in_output": True, "skip_special_tokens": False, "cache_salt": "s",
                    "kv": {"selection": "dense", "reuse": "off"}, "unheard_of": {"a": 1}, "metadata": {}},
    )  # fmt: skip
    call = served.engine.calls[-1]
    sampling = call["sampling"]
    assert (sampling.max_tokens, sampling.min_tokens, sampling.temperature, sampling.top_p) == (3, 2, 0.5, 0.9)
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty, sampling.seed) == (4, 0.1, 1.1, -2)
    assert (sampling.presence_penalty, sampling.frequency_penalty, dict(sampling.logit_bias)) == (1.5, -1.0, {5: -100.0})
    assert (sampling.stop, sampling.stop_token_ids, sampling.ignore_eos) == (("x", "y"), (7,), True)
    assert (sampling.include_stop_str_in_output, sampling.skip_special_tokens) == (True, False)
    assert (call["priority"], call["cache_salt"], call["tenant"]) == (-3, "s", "")
    assert (call["kv"].selection, call["kv"].reuse) == ("dense", "off")


def test_usage_tells_of_kv_only_when_asked(served):
    plain = served.openai().chat.completions.create(model="echo-model", messages=MESSAGES, max_tokens=3)
    asked = served.openai().chat.completions.create(model="echo-model", messages=MESSAGES, max_tokens=3, extra_body={"kv": {}})
    assert "kv" not in plain.usage.model_extra
    assert asked.usage.kv["cached_tokens"] == asked.usage.prompt_tokens_details.cached_tokens
    assert asked.usage.kv["attended_tokens"] == 3


def test_nulls_are_defaults(served):
    names = ("stop", "seed", "tools", "response_format", "n", "temperature", "stream", "max_tokens", "logit_bias", "kv", "user")
    body = {"model": "echo-model", "messages": MESSAGES, "max_completion_tokens": 1, **dict.fromkeys(names)}
    with served.client() as client:
        assert client.post("/v1/chat/completions", json=body).status_code == 200


def test_long_prompt_is_encoded_off_the_loop(served):
    text = "the quick brown fox " * 300
    answer = served.openai().chat.completions.create(
        model="echo-model", messages=[{"role": "user", "content": text}], max_tokens=1
    )
    assert answer.usage.prompt_tokens > 1000


def test_typed_errors(served):
    client = served.openai()
    for create, given in (
        (client.chat.completions.create, {"messages": MESSAGES}),
        (client.completions.create, {"prompt": "a"}),
        (client.responses.create, {"input": "a"}),
    ):
        with pytest.raises(openai.NotFoundError) as missing:
            create(model="gpt-5", **given)
        assert missing.value.code == "model_not_found" and missing.value.param == "model"
        assert missing.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="echo-model", messages=[{"role": "user", "content": "the " * 9000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(model="echo-model", messages=MESSAGES, tools=[{"type": "function", "function": {}}])
    assert tools.value.param == "tools[0].function.name"
