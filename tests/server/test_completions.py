"""Completions: the four forms of a prompt, echo, and what lm-eval and the bench clients of other servers send."""

import json

import pytest


def test_text(served):
    answer = served.openai().completions.create(model="echo-model", prompt="hello world", max_tokens=7)
    tokenizer = served.engine.tokenizer
    prompt = tokenizer.encode("hello world")
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert answer.choices[0].text == tokenizer.decode([prompt[i % len(prompt)] for i in range(7)])
    details = answer.usage.prompt_tokens_details
    assert details.cached_tokens == len(prompt) // 2 and details.cache_write_tokens == len(prompt) - len(prompt) // 2


def test_default_is_sixteen_tokens(served):
    assert served.openai().completions.create(model="echo-model", prompt="hello").usage.completion_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [(["a", "b"], ["a", "b"]), ([70, 71], ["FG"]), ([[70, 71], [72]], ["FG", "HH"])],
    ids=["texts", "token ids", "token id lists"],
)  # fmt: skip
def test_other_forms_of_a_prompt(served, prompt, texts):
    tokenizer = served.engine.tokenizer
    answer = served.openai().completions.create(model="echo-model", prompt=prompt, max_tokens=2)
    lists = [prompt] if isinstance(prompt[0], int) else prompt
    ids = [tokenizer.encode(item) if isinstance(item, str) else item for item in lists]
    expected = [tokenizer.decode([item[i % len(item)] for i in range(2)]) for item in ids]
    assert [choice.text for choice in answer.choices] == expected and len(expected) == len(texts)
    assert [choice.index for choice in answer.choices] == list(range(len(texts)))
    assert answer.usage.prompt_tokens == sum(map(len, ids))


def test_n_per_prompt(served):
    answer = served.openai().completions.create(model="echo-model", prompt=["a", "b c"], n=2, best_of=2, max_tokens=3)
    texts = [choice.text for choice in answer.choices]
    assert len(texts) == 4 and texts[0] == texts[1] != texts[2] == texts[3]
    assert answer.usage.completion_tokens == 12


def test_lm_eval_loglikelihood(served):
    """As local-completions sends it: a batch of token-id lists, echo, one token, log-probabilities of the prompt."""
    prompts = [[70, 71, 72, 73], [80, 81, 82]]
    answer = served.openai().completions.create(
        model="echo-model", prompt=prompts, max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234
    )
    for choice, prompt in zip(answer.choices, prompts):
        logprobs = choice.logprobs
        assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.tokens) == len(prompt) + 1
        assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
        assert logprobs.token_logprobs[1:-1] == [-0.5] * (len(prompt) - 1)
        assert all(max(top.values()) == -0.5 for top in logprobs.top_logprobs[1:])
        assert choice.text == served.engine.tokenizer.decode([*prompt, prompt[0]])
        assert logprobs.text_offset == list(range(len(prompt) + 1))


@pytest.mark.parametrize("stream", [False, True])
def test_echo_alone(served, stream):
    """max_tokens 0: nothing but the prompt."""
    given = served.openai().completions.create(
        model="echo-model", prompt="the fox", max_tokens=0, echo=True, logprobs=2, stream=stream
    )
    choices = [chunk.choices[0] for chunk in given] if stream else given.choices
    assert "".join(choice.text for choice in choices) == "the fox"
    assert choices[-1].finish_reason == "length"
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.tokens]
    assert len(tokens) == len(served.engine.tokenizer.encode("the fox"))
    if not stream:
        assert given.usage.completion_tokens == 0


def test_stream_with_logprobs(served):
    prompt = "a 🦊"
    stream = served.openai().completions.create(model="echo-model", prompt=prompt, max_tokens=12, logprobs=1, stream=True)
    text, tokens, offsets = "", [], []
    for chunk in stream:
        assert chunk.object == "text_completion"
        text += chunk.choices[0].text
        if chunk.choices[0].logprobs is not None:
            tokens += chunk.choices[0].logprobs.tokens
            offsets += chunk.choices[0].logprobs.text_offset
    assert text == "a 🦊a 🦊" and len(tokens) == 12 and offsets == sorted(offsets)


def test_prompt_logprobs(served):
    with served.client() as client:
        body = {"model": "echo-model", "prompt": [70, 71], "max_tokens": 1, "prompt_logprobs": 1}
        choice = client.post("/v1/completions", json=body).json()["choices"][0]
    assert choice["prompt_logprobs"] == [None, {"71": {"logprob": -0.5, "rank": 1, "decoded_token": _token(served, 71)}}]


def _token(served, token):
    return served.engine.tokenizer.token_text(token)


def test_sglang_bench_body(served):
    """Every event has choices, since usage was not asked for; each data line is JSON or the end mark."""
    body = {
        "model": "echo-model",
        "prompt": "hello",
        "temperature": 0.0,
        "best_of": 1,
        "max_tokens": 5,
        "stream": True,
        "ignore_eos": True,
    }
    with served.client() as client:
        lines = [line for line in client.post("/v1/completions", json=body).text.split("\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-1])


def test_guidellm_body(served):
    body = {
        "model": "echo-model", "prompt": "hello", "max_tokens": 4, "max_completion_tokens": 4, "stop": None, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip
    with served.client() as client:
        events = [line[6:] for line in client.post("/v1/completions", json=body).text.split("\n\n") if line]
    chunks = [json.loads(event) for event in events[:-1]]
    assert all("usage" in chunk for chunk in chunks) and chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 4
