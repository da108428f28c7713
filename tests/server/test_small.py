"""Small things that users meet: HEAD and OPTIONS, -1 as a seed, defaults that do not fit, ids without text, halves of
surrogate pairs wherever a client can write them."""

import json

import pytest

from kvloom.engine.config import EngineConfig
from kvloom.engine.requests.sampling import SamplingParams
from kvloom.engine.thread.client import ThreadEngineClient

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]
HALF = "\ud800"


@pytest.mark.parametrize("path", ["/health", "/version", "/v1/models", "/v1/models/echo-model", "/metrics", "/v1/kv",
                                  "/v1/kv/explain?prompt=a", "/openapi.json", "/docs"])  # fmt: skip
def test_head_is_get_without_a_body(served, path):
    with served.client() as client:
        head, get = client.head(path), client.get(path)
    assert head.status_code == get.status_code == 200 and head.content == b""
    assert head.headers["content-type" if get.content else "content-length"] in {
        get.headers.get("content-type"), get.headers["content-length"]
    }  # fmt: skip


def test_head_of_what_has_no_get(served):
    with served.client() as client:
        assert [client.head(path).status_code for path in (COMPLETION, "/v1/nothing", "/v1/models/other")] == [405, 404, 404]


def test_options_tell_the_methods_of_a_path(served):
    with served.client() as client:
        told = {path: client.options(path) for path in ("/health", CHAT, "/v1/kv/segments", "/v1/nothing")}
        wrong = client.put("/v1/kv/segments")
    assert [reply.status_code for reply in told.values()] == [204, 204, 204, 404]
    assert told["/health"].headers["allow"] == "GET, HEAD, OPTIONS" and told[CHAT].headers["allow"] == "OPTIONS, POST"
    assert told["/v1/kv/segments"].headers["allow"] == wrong.headers["allow"] == "DELETE, OPTIONS, POST"
    assert wrong.status_code == 405


def test_a_seed_of_minus_one_is_no_seed(served):
    assert SamplingParams(seed=-1) == SamplingParams()
    assert [choice.seed for choice in SamplingParams(seed=-1, n=2).choices()] == [None, None]
    assert [choice.seed for choice in SamplingParams(seed=-2, n=2).choices()] == [2**64 - 2, 2**64 - 1]
    with served.client() as client:
        client.post(COMPLETION, json={"prompt": "a", "seed": -1, "max_tokens": 1})
    assert served.engine.calls[-1]["sampling"].seed is None


def test_the_default_number_of_tokens_is_cut_to_what_fits():
    default = SamplingParams(default_tokens=16)
    assert [default.most_tokens(room) for room in (10, 16, 100)] == [10, 16, 16]
    assert SamplingParams(default_tokens=16, min_tokens=20).most_tokens(100) == 20
    assert SamplingParams().most_tokens(10) == 10 and SamplingParams(max_tokens=5, default_tokens=16).most_tokens(10) == 5


@pytest.fixture(scope="module")
def padded(tiny, tmp_path_factory):
    """The tiny model with an embedding of 16 rows more than its tokenizer has ids."""
    import torch
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("padded")
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(1)
    model = LlamaForCausalLM.from_pretrained(tiny)
    model.resize_token_embeddings(model.config.vocab_size + 16, mean_resizing=False)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def real(padded, serving):
    config = EngineConfig.from_flat(
        {"model": str(padded), "served_model_name": "echo-model", "dtype": "fp32", "kv_memory": "8MiB", "max_model_len": 64}
    )
    engine = ThreadEngineClient.start(config)
    try:
        yield serving(engine)
    finally:
        engine.close()


def test_a_default_that_does_not_fit_is_nobodys_error(real):
    """Ten positions are left: the default of sixteen becomes ten; a number that was given is refused by its name."""
    prompt = [5] * 54
    with real.client() as client:

        def ask(path=COMPLETION, **fields):
            return client.post(path, json={"prompt": prompt, "ignore_eos": True, **fields})

        default, low = ask(), ask(min_tokens=10)
        given = [ask(max_tokens=11), ask(min_tokens=11), ask(forced_tokens=[5] * 11)]
        echoed = ask(echo=True, max_tokens=0, prompt=[5] * 63)
        several = ask(prompt=[prompt, [5, 6]])
        longer = ask(prompt=[5, 6], min_tokens=20, ignore_eos=False)
    assert default.status_code == low.status_code == 200 and default.json()["usage"]["completion_tokens"] == 10
    assert [reply.status_code for reply in given] == [400] * 3
    assert [reply.json()["error"]["param"] for reply in given] == ["max_tokens", "min_tokens", "forced_tokens"]
    assert echoed.status_code == 200 and echoed.json()["usage"]["completion_tokens"] == 0
    assert several.json()["usage"]["completion_tokens"] == 10 + 16
    assert longer.json()["usage"]["completion_tokens"] >= 20


def test_an_answer_to_a_chat_fills_what_is_left(real):
    with real.client() as client:
        body = {"messages": USER, "ignore_eos": True}
        reply, low = client.post(CHAT, json=body), client.post(CHAT, json={**body, "min_tokens": 64})
    usage = reply.json()["usage"]
    assert usage["total_tokens"] == 64 and low.status_code == 400 and low.json()["error"]["param"] == "min_tokens"


def test_ids_without_text_have_one_rule(real):
    """The model has rows for them: they may be sent, forced, stopped at; no id beyond the model's may."""
    size = real.engine.model.vocab_size
    assert size == real.engine.tokenizer.vocab_size + 16
    with real.client() as client:
        for last, status in ((size - 1, 200), (size, 400)):
            replies = [
                client.post(COMPLETION, json={"prompt": [5, last], "max_tokens": 1}),
                client.post(COMPLETION, json={"prompt": [5], "max_tokens": 1, "forced_tokens": [last]}),
                client.post(COMPLETION, json={"prompt": [5], "max_tokens": 1, "stop_token_ids": [last]}),
                client.post(COMPLETION, json={"prompt": [5], "max_tokens": 1, "logit_bias": {str(last): 1}}),
                client.post("/detokenize", json={"tokens": [last]}),
            ]
            assert [reply.status_code for reply in replies] == [status] * 5
        assert client.post("/detokenize", json={"tokens": [70, size - 1, 71]}).json()["prompt"] == real.engine.tokenizer.decode(
            [70, 71]
        )


HALVES = [
    {"kv": {HALF: 1}}, {"kv": {HALF: {}}}, {"kv": {"selection": HALF}}, {"kv": {"token_select": {HALF: 1}}},
    {"kv": {"reuse": "approx", "kvshare": {HALF: 1}}}, {"kv": {"reuse": "approx", "kvshare": {"policy": HALF}}},
    {"kv": {"reuse": HALF}}, {"kv": {"share": HALF}}, {"chat_template_kwargs": {HALF: 1}},
    {"chat_template_kwargs": {"x": HALF}}, {"logit_bias": {HALF: 1}}, {"logit_bias": {"5": HALF}}, {"model": HALF},
    {HALF: 1},
    {"stop": [HALF]}, {"cache_salt": HALF}, {"stream_options": {HALF: 1}, "stream": True}, {"tools": [HALF]},
    {"extra_body": {HALF: HALF}}, {"messages": [{"role": HALF, "content": "a"}]}, {"seed": HALF},
    {"messages": [{"role": "user", "content": [{"type": HALF}]}]},
    {"messages": [{"role": "user", "content": "a", "name": HALF}]},
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_halves_of_surrogate_pairs_are_the_clients_error(real, stream):
    with real.client() as client:
        for fields in HALVES:
            body = json.dumps({"messages": USER, "max_tokens": 1, "stream": stream, **fields})
            reply = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
            assert reply.status_code in (400, 404), (fields, reply.text)
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_unknown_fields_may_be_named_anything(real):
    body = json.dumps({"prompt": "a", "max_tokens": 1, "é\x00": HALF, "metadata": {HALF: HALF}})
    headers = {"Content-Type": "application/json", "X-Request-Id": b"\xff\xfe", "X-Odd": b"\xed\xa0\x80"}
    with real.client() as client:
        reply = client.post(COMPLETION, content=body, headers=headers)
    assert reply.status_code == 200 and reply.headers["x-request-id"].startswith("cmpl-")
