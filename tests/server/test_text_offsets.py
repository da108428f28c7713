"""Where tokens stand in a completion's text: against offsets computed from the whole text by another way."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.server.logprobs import Echoed, LegacyLogprobs

COMPLETION = "/v1/completions"


def expected_offsets(pieces: list[bytes]) -> list[int]:
    """Per token, the index of the character that holds its first byte: found by decoding every beginning of the whole."""
    raw = b"".join(pieces)
    starts = [end for end in range(len(raw)) if _begins(raw, end)]  # where each character begins
    offsets, at = [], 0
    for piece in pieces:
        offsets.append(sum(start <= at for start in starts) - 1 if piece else sum(start < at for start in starts))
        at += len(piece)
    return offsets


def _begins(raw: bytes, at: int) -> bool:
    """Whether a character of the whole begins at this byte: the text before it does not reach over it."""
    text = raw.decode("utf-8", "replace")
    before = raw[:at].decode("utf-8", "replace")
    return text.startswith(before) and before + raw[at:].decode("utf-8", "replace") == text


TEXT = st.text(st.sampled_from("ab é日🦊👩🏽\u200d\u0301\ufffdक्षि"), max_size=10)


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_offsets_of_valid_text(served, text):
    """Every token has the offset of its character, counted over the text, whatever it is made of."""
    tokenizer = served.engine.tokenizer
    tokens = tokenizer.encode(text)
    found = LegacyLogprobs(tokenizer, 0, echoed=Echoed(text, tokens, given=True)).take(tokens, [None] * len(tokens))
    starts = [i for i, char in enumerate(text) for _ in char.encode()]  # byte -> character
    at = 0
    for token, offset in zip(tokens, found["text_offset"]):
        assert offset == starts[at]
        at += len(tokenizer.token_bytes(token))


@settings(max_examples=300, deadline=None)
@given(tokens=st.lists(st.integers(0, 322), max_size=12), data=st.data())
def test_offsets_of_any_tokens_in_any_pieces(served, tokens, data):
    """Also of broken text, in a stream, behind a prompt that ends inside a character."""
    tokenizer = served.engine.tokenizer
    cut = data.draw(st.integers(0, len(tokens)))
    skip = data.draw(st.booleans())
    whole = [b"" if skip and tokenizer.is_special(token) else tokenizer.token_bytes(token) for token in tokens]
    echo = LegacyLogprobs(tokenizer, 0, echoed=Echoed("", tokens[:cut], given=False), skip_special_tokens=skip)
    parts = [echo.take(part, [None] * len(part))["text_offset"] for part in (tokens[:cut], tokens[cut:])]
    expected = expected_offsets(whole)
    pending = {i for i, piece in enumerate(whole) if not piece}  # stands anywhere between its neighbours
    for i, (offset, right) in enumerate(zip(parts[0] + parts[1], expected)):
        assert offset == right or (i in pending and right - 1 <= offset <= right)
    later = LegacyLogprobs(tokenizer, 0, prompt=tokens[:cut], skip_special_tokens=skip)
    base = len(tokenizer.decode(tokens[:cut], skip, open_end=True))
    behind = later.take(tokens[cut:], [None] * len(tokens[cut:]))["text_offset"]
    assert [offset + base for offset in behind] == parts[1]


@pytest.mark.parametrize("stream", [False, True])
def test_an_emoji_in_the_prompt_moves_nothing(served, stream):
    """The prompt is an emoji of several tokens and plain text; the fake goes on with the same tokens."""
    prompt = "🦊 hi there"
    tokenizer = served.engine.tokenizer
    tokens = tokenizer.encode(prompt)
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": len(tokens), "stream": stream}
    with served.client() as client:
        reply = client.post(COMPLETION, json=body)
    choices = _choices(reply.text) if stream else reply.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == prompt * 2
    offsets = [offset for choice in choices for offset in (choice["logprobs"] or {"text_offset": []})["text_offset"]]
    names = [token for choice in choices for token in (choice["logprobs"] or {"tokens": []})["tokens"]]
    assert offsets == expected_offsets([tokenizer.token_bytes(token) for token in tokens * 2])
    for offset, name in zip(offsets, names):
        assert name.startswith("bytes:\\x") or (prompt * 2).startswith(name, offset)


def _choices(text: str) -> list[dict]:
    events = [line[6:] for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event)["choices"][0] for event in events[:-1]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_an_echo_that_ends_inside_a_character(served, stream, cut):
    """Prompt and completion together are the decoding of all tokens; the completion begins with the rest of the character."""
    tokenizer = served.engine.tokenizer
    fox = tokenizer.encode("🦊")
    assert len(fox) == 4
    prompt = [*fox[cut:], *tokenizer.encode("ok"), *fox[:cut]]  # the fake repeats it, so the output completes the fox
    body = {"prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 6, "stream": stream}
    with served.client() as client:
        reply = client.post(COMPLETION, json=body)
    choices = _choices(reply.text) if stream else reply.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == tokenizer.decode([*prompt, *prompt[:6]])


def test_echo_alone_ends_with_what_there_is(served):
    fox = served.engine.tokenizer.encode("a🦊")
    with served.client() as client:
        reply = client.post(COMPLETION, json={"prompt": fox[:-1], "echo": True, "max_tokens": 0})
    assert reply.json()["choices"][0]["text"] == "a\ufffd"


@pytest.mark.parametrize("skip", [False, True])
def test_special_tokens_are_echoed_as_they_were_given(served, skip):
    """In a text they stand as written; of token ids they are shown as the completion shows them."""
    tokenizer = served.engine.tokenizer
    prompt = "<|im_start|>user"
    tokens = tokenizer.encode(prompt)
    more = {"echo": True, "max_tokens": 1, "logprobs": 0, "skip_special_tokens": skip}
    with served.client() as client:
        text = client.post(COMPLETION, json={"prompt": prompt, **more}).json()["choices"][0]
        ids = client.post(COMPLETION, json={"prompt": tokens, **more}).json()["choices"][0]
    assert text["text"].startswith(prompt) and text["logprobs"]["text_offset"][:2] == [0, 12]
    assert ids["text"].startswith("user" if skip else prompt)
    assert ids["logprobs"]["text_offset"][:2] == [0, 0 if skip else 12]


def test_tokens_of_half_characters_keep_their_names(served):
    """Four tokens of one byte each, none of them text alone: all are in top_logprobs, under names that tell them apart."""
    from kvloom.engine.requests.request import TokenLogprob

    tokenizer = served.engine.tokenizer
    fox = tokenizer.encode("🦊")
    top = tuple((token, -float(i)) for i, token in enumerate(fox))
    item = TokenLogprob(fox[3], -3.0, 4, top)
    found = LegacyLogprobs(tokenizer, 4).take([fox[3]], [item])
    names = ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\xa6", "bytes:\\x8a"]
    assert found["top_logprobs"] == [dict(zip(names, (0.0, -1.0, -2.0, -3.0)))] and found["tokens"] == [names[3]]


def test_tokens_of_the_same_name_go_by_id(served):
    """Ids without text, as in an embedding that is padded: the token itself keeps its name."""
    from kvloom.engine.requests.request import TokenLogprob

    item = TokenLogprob(9001, -2.0, 3, ((9000, -0.5), (70, -1.0), (9001, -2.0)))
    found = LegacyLogprobs(served.engine.tokenizer, 3).take([9001], [item])
    assert found["top_logprobs"] == [{"token_id:9000": -0.5, served.engine.tokenizer.token_text(70): -1.0, "": -2.0}]


def test_bytes_of_a_chat_are_the_tokens_own(served):
    body = {"messages": [{"role": "user", "content": "🦊"}], "logprobs": True, "top_logprobs": 2, "max_tokens": 12}
    with served.client() as client:
        content = client.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    prompt = served.engine.calls[-1]["prompt"]
    assert [bytes(entry["bytes"]) for entry in content] == [served.engine.tokenizer.token_bytes(t) for t in prompt[:12]]
    assert {"token": "bytes:\\xf0", "bytes": [0xF0]}.items() <= next(e for e in content if e["bytes"] == [0xF0]).items()


def test_half_a_surrogate_is_two_characters(served):
    """Python's incremental decoder holds its first two bytes back as if they could still become one character."""
    tokenizer = served.engine.tokenizer
    tokens = [next(i for i in range(323) if tokenizer.token_bytes(i) == byte) for byte in (b"\xed", b"\xa1")]
    echo = LegacyLogprobs(tokenizer, 0, echoed=Echoed("", tokens, given=False))
    assert echo.take(tokens, [None, None])["text_offset"] == [0, 1]
