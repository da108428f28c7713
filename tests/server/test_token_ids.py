"""Token ids in answers, tokens by id in log-probabilities, log-probabilities of given tokens, and prompts cut to a length."""

from __future__ import annotations

import json

import pytest

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
TEXT = "the quick brown fox jumps over 😀"
FLAGS = {"return_token_ids": True, "return_tokens_as_token_ids": True}


def body_of(path, **more):
    asked = {"prompt": TEXT} if path == COMPLETION else {"messages": [{"role": "user", "content": TEXT}]}
    return {**asked, "max_tokens": 12, **more}


def post(served, path, **more):
    with served.client() as client:
        reply = client.post(path, json=body_of(path, **more))
    assert reply.status_code == 200, reply.text
    return reply.json()


def chunks(served, path, **more):
    with served.client() as client:
        reply = client.post(path, json=body_of(path, stream=True, **more))
    assert reply.status_code == 200, reply.text
    return [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]


def sent(served):
    """Prompts that the engine was asked for last."""
    return [call["prompt"] for call in served.engine.calls]


@pytest.fixture(autouse=True)
def forget(served):
    served.engine.calls.clear()


@pytest.mark.parametrize(
    "more", [{}, {"logprobs": True}, {"n": 2}, {"stream_options": {"continuous_usage_stats": True}}], ids=str
)
@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_ids_of_an_answer_whole_and_streamed(served, fake, path, more):
    """Every token is in one chunk, also those of a character that is not complete yet."""
    if path == COMPLETION and "logprobs" in more:
        more = {"logprobs": 1}
    options = {name: value for name, value in more.items() if name != "stream_options"}
    whole = post(served, path, return_token_ids=True, **options)
    prompt = sent(served)[0]
    for choice in whole["choices"]:
        assert choice["token_ids"] == fake.echo_tokens(prompt, 12)
        assert path == CHAT or choice["prompt_token_ids"] == prompt
    assert path == COMPLETION or whole["prompt_token_ids"] == prompt
    seen = {index: [] for index in range(more.get("n", 1))}
    begun = set()
    for chunk in chunks(served, path, return_token_ids=True, **more):
        for choice in chunk["choices"]:
            place = chunk if path == CHAT else choice
            assert ("prompt_token_ids" in place) == (choice["index"] not in begun)
            assert place.get("prompt_token_ids", prompt) == prompt
            begun.add(choice["index"])
            seen[choice["index"]] += choice.get("token_ids", [])
            assert path == COMPLETION or ("token_ids" in choice) == ("role" not in choice["delta"])
    assert all(tokens == fake.echo_tokens(prompt, 12) for tokens in seen.values())


@pytest.mark.parametrize("echo_only", [False, True])
def test_an_echo_is_none_of_the_completions_tokens(served, fake, echo_only):
    more = {"echo": True, "return_token_ids": True, "logprobs": 1, "max_tokens": 0 if echo_only else 5}
    choice = post(served, COMPLETION, **more)["choices"][0]
    prompt = sent(served)[0]
    assert choice["prompt_token_ids"] == prompt and choice["text"].startswith(TEXT)
    assert choice["token_ids"] == ([] if echo_only else fake.echo_tokens(prompt, 5))
    streamed = [c["choices"][0] for c in chunks(served, COMPLETION, **more)]
    assert [token for c in streamed for token in c["token_ids"]] == choice["token_ids"]


def test_without_asking_there_are_none(served):
    for path in (CHAT, COMPLETION):
        assert "token_ids" not in json.dumps([post(served, path), *chunks(served, path)])


def test_tokens_by_id(served):
    content = post(served, CHAT, logprobs=True, top_logprobs=3, **FLAGS)["choices"][0]
    ids = content["token_ids"]
    assert [entry["token"] for entry in content["logprobs"]["content"]] == [f"token_id:{i}" for i in ids]
    assert all(entry["top_logprobs"][0]["token"] == entry["token"] for entry in content["logprobs"]["content"])
    assert bytes(b for entry in content["logprobs"]["content"] for b in entry["bytes"])
    legacy = post(served, COMPLETION, logprobs=2, echo=True, **FLAGS)["choices"][0]
    every = [*legacy["prompt_token_ids"], *legacy["token_ids"]]
    assert legacy["logprobs"]["tokens"] == [f"token_id:{i}" for i in every]
    assert all(own in top for own, top in zip(legacy["logprobs"]["tokens"][1:], legacy["logprobs"]["top_logprobs"][1:]))
    assert (
        legacy["logprobs"]["text_offset"]
        == post(served, COMPLETION, logprobs=2, echo=True)["choices"][0]["logprobs"]["text_offset"]
    )


def test_log_probabilities_of_given_tokens_need_log_probabilities(served):
    for path in (CHAT, COMPLETION):
        with served.client() as client:
            reply = client.post(path, json=body_of(path, logprob_token_ids=[5]))
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "logprob_token_ids"
    post(served, CHAT, logprobs=True, logprob_token_ids=[5, 9])
    assert served.engine.calls[-1]["sampling"].logprob_token_ids == (5, 9)


# Prompts cut to a length -----------------------------------------------------------------------------------------------


def test_prompts_are_cut_on_either_side(served):
    for path in (CHAT, COMPLETION):
        post(served, path)
        (tokens,) = sent(served)
        for most, side, kept in (
            (4, "left", tokens[-4:]),
            (4, "right", tokens[:4]),
            (4, None, tokens[-4:]),
            (999, None, tokens),
        ):
            served.engine.calls.clear()
            whole = post(served, path, truncate_prompt_tokens=most, truncation_side=side)
            assert sent(served) == [kept] and whole["usage"]["prompt_tokens"] == len(kept)
        served.engine.calls.clear()


def test_every_form_of_prompt_is_cut(served):
    for prompt, kept in (([5, 6, 7], [[6, 7]]), ([[5, 6, 7], [8]], [[6, 7], [8]]), (["aaa bbb ccc", "d"], None)):
        served.engine.calls.clear()
        post(served, COMPLETION, prompt=prompt, truncate_prompt_tokens=2)
        assert all(len(tokens) <= 2 for tokens in sent(served)) and (kept is None or sent(served) == kept)


def test_minus_one_leaves_room_for_what_is_asked_for(served, fake):
    long = [5] * (2 * fake.MAX_MODEL_LEN)
    for more, room in (({"max_tokens": 12}, 12), ({"max_tokens": None}, 1)):
        served.engine.calls.clear()
        post(served, COMPLETION, prompt=long, truncate_prompt_tokens=-1, **more)
        assert [len(tokens) for tokens in sent(served)] == [fake.MAX_MODEL_LEN - room]
    served.engine.calls.clear()
    post(served, CHAT, messages=[{"role": "user", "content": "fox " * 9000}], truncate_prompt_tokens=-1, max_tokens=3)
    assert [len(tokens) for tokens in sent(served)] == [fake.MAX_MODEL_LEN - 3]


def test_what_is_echoed_is_what_was_kept(served):
    echoed = post(served, COMPLETION, echo=True, truncate_prompt_tokens=6, max_tokens=0)["choices"][0]["text"]
    assert echoed == served.engine.tokenizer.decode(sent(served)[0]) and TEXT.endswith(echoed) and echoed != TEXT


@pytest.mark.parametrize(("value", "said"), [(0, "-1, or 1 or more"), (-2, "-1"), (4097, "1 to 4096"), ("5", "integer")])
def test_lengths_that_cannot_be(served, value, said):
    for path in (CHAT, COMPLETION):
        with served.client() as client:
            reply = client.post(path, json=body_of(path, truncate_prompt_tokens=value))
        error = reply.json()["error"]
        assert reply.status_code == 400 and error["param"] == "truncate_prompt_tokens" and said in error["message"], error


def test_a_field_that_is_to_blame_for_a_failure_is_named(serving, fake):
    """bad_words may leave nothing only once a token is there: a 400 then too, or an event of that type."""
    engine = fake.FakeEngine()
    engine.fail_after, engine.blame = 2, "bad_words"
    with serving(engine).client() as client:
        whole = client.post(COMPLETION, json=body_of(COMPLETION))
        stream = client.post(COMPLETION, json=body_of(COMPLETION, stream=True)).text
    assert whole.status_code == 400 and whole.json()["error"]["param"] == "bad_words"
    last = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")][-1]
    assert last["error"]["type"] == "invalid_request_error" and last["error"]["param"] == "bad_words"
    assert stream.rstrip().endswith("data: [DONE]")


def test_tokenizer_info_is_what_lm_eval_asks_for(served, fake):
    """Its remote tokenizer renders chats itself, and takes the end token from here."""
    with served.client() as client:
        found = client.get("/tokenizer_info").json()
    assert found["eos_token"] == "<|im_end|>" and found["bos_token"] is None
    assert (found["chat_template"], found["model_max_length"]) == (fake.TEMPLATE, fake.MAX_MODEL_LEN)
