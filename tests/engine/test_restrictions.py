"""allowed_token_ids, bad_words and logprob_token_ids through whole engines: drafts, methods, several completions, seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from kvloom.engine import LLM
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.requests.request import KVOptions
from kvloom.engine.requests.sampling import SamplingParams

MakeLLM = Callable[..., LLM]
PROMPT = [(7 * i) % 250 + 3 for i in range(70)]
METHODS: list[KVOptions] = [
    KVOptions(),
    KVOptions(selection="sink_window", budget=32),
    KVOptions(selection="token_select", budget=48),
    KVOptions(selection="recycled", budget=48),
    KVOptions(selection="sink_window", budget=32, draft=True, draft_tokens=4),
    KVOptions(selection="recycled", budget=48, draft=True, draft_tokens=4),
]


def tokens(llm: LLM, kv: KVOptions = KVOptions(), **params: Any) -> list[int]:
    sampling = SamplingParams(**{"max_tokens": 10, "ignore_eos": True, "temperature": 0.0, **params})
    return list(llm.generate([PROMPT], sampling, kv=kv)[0].tokens)


@pytest.mark.parametrize("kv", METHODS, ids=lambda kv: f"{kv.selection}{'-draft' * bool(kv.draft)}")
def test_every_method_keeps_to_what_is_allowed(make_llm: MakeLLM, kv: KVOptions) -> None:
    llm, allowed = make_llm(), tuple(range(40, 60))
    for temperature in (0.0, 1.0):
        found = tokens(llm, kv, allowed_token_ids=allowed, temperature=temperature, seed=5)
        assert len(found) == 10 and set(found) <= set(allowed)
        if kv.draft:
            assert found == tokens(llm, allowed_token_ids=allowed, temperature=temperature, seed=5)


@pytest.mark.parametrize("kv", METHODS, ids=lambda kv: f"{kv.selection}{'-draft' * bool(kv.draft)}")
def test_no_method_says_a_bad_word(make_llm: MakeLLM, kv: KVOptions) -> None:
    """Whatever would be generated is banned, piece by piece, until nothing of it is left."""
    llm, banned = make_llm(), list[str]()
    for _ in range(3):
        found = tokens(llm, kv, bad_words=tuple(banned), temperature=1.0, seed=3)
        if kv.draft:
            assert found == tokens(llm, bad_words=tuple(banned), temperature=1.0, seed=3)
        for word in banned:
            spelled = llm.tokenizer.encode(word, add_special_tokens=False)
            assert not any(found[i : i + len(spelled)] == spelled for i in range(len(found)))
        pairs = [llm.tokenizer.decode(found[i : i + 2]) for i in range(len(found) - 1)]
        fit = [p for i, p in enumerate(pairs) if p.strip() and llm.tokenizer.encode(p.lstrip(), False) == found[i : i + 2]]
        banned += fit[:3] or [p for p in map(llm.tokenizer.token_text, found) if p.strip() and "\ufffd" not in p][:1]
    assert banned


def test_each_completion_of_several_is_what_its_seed_gives_alone(make_llm: MakeLLM) -> None:
    llm, given = make_llm(), {"allowed_token_ids": tuple(range(30, 90)), "bad_words": ("the", "e"), "temperature": 1.0}
    together = llm.generate([PROMPT] * 3, [SamplingParams(max_tokens=12, ignore_eos=True, seed=s, **given) for s in (1, 2, 3)])
    assert [list(r.tokens) for r in together] == [tokens(llm, seed=s, max_tokens=12, **given) for s in (1, 2, 3)]


def test_what_leaves_nothing_is_refused_and_leaves_nothing_behind(make_llm: MakeLLM) -> None:
    llm = make_llm()
    eos = llm.tokenizer.eos_ids
    with pytest.raises(InvalidRequestError) as error:
        tokens(llm, allowed_token_ids=eos, min_tokens=1, ignore_eos=False)
    assert error.value.param == "allowed_token_ids"
    with pytest.raises(InvalidRequestError, match="outside the vocabulary"):
        tokens(llm, allowed_token_ids=(10**6,))
    assert tokens(llm, allowed_token_ids=eos, ignore_eos=False) == list(eos)


def test_log_probabilities_of_given_tokens(make_llm: MakeLLM) -> None:
    llm, asked = make_llm(), (200, 5, 77)
    sampling = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.0, logprobs=0, logprob_token_ids=asked)
    given = llm.generate([PROMPT], sampling)[0].logprobs
    every = llm.generate([PROMPT], SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.0, logprobs=20))[0].logprobs
    for some, likeliest in zip(given, every, strict=True):
        assert [token for token, _ in some.top] == list(asked) and some.logprob == pytest.approx(likeliest.logprob, abs=1e-4)
        known, least = dict(likeliest.top), likeliest.top[-1][1]
        for token, value in some.top:
            assert value == pytest.approx(known[token], abs=1e-4) if token in known else value < least + 1e-4
        assert math.fsum(math.exp(value) for _, value in some.top) < 1


def test_a_request_that_bans_its_last_token_on_the_way_is_to_blame(make_llm: MakeLLM) -> None:
    """And ends with what it has; the engine goes on."""
    llm = make_llm()
    token, word = next(
        (t, w) for t in range(300) if llm.tokenizer.encode(w := llm.tokenizer.token_text(t) * 2, False) == [t, t]
    )
    given = SamplingParams(max_tokens=9, ignore_eos=True, allowed_token_ids=(token,), bad_words=(word,))
    ends = llm.generate([PROMPT, PROMPT], [given, SamplingParams(max_tokens=9, ignore_eos=True)])
    assert list(ends[0].tokens) == [token] and ends[0].finish_reason == "error" and "leave no token" in (ends[0].error or "")
    assert len(ends[1].tokens) == 9
