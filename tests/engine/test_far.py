"""What a client that may stand far away needs: values that can be pickled, a tokenizer of its own, equal hashes, `peek`."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.engine import LLM, SamplingParams, ThreadEngineClient, errors
from kvloom.engine.client import Health, ModelInfo
from kvloom.engine.config import EngineConfig, all_options
from kvloom.engine.errors import ConfigError, EngineDeadError, KVLoomError, ModelError
from kvloom.engine.requests.request import KVOptions, RequestOutput, TokenLogprob, Usage
from kvloom.engine.requests.sampling import SamplingDefaults
from kvloom.engine.startup.build import Built
from kvloom.engine.startup.prepare import tokenizer_of
from kvloom.server.errors import GenerationError, ServerClosingError

MakeLLM = Callable[..., LLM]
SECRET = "a secret that is long enough"
TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple)
COUNTS, TEXT = st.integers(0, 2**40), st.text(max_size=8)
JSON = st.dictionaries(TEXT, st.one_of(st.none(), st.booleans(), COUNTS, st.floats(allow_nan=False), TEXT, st.lists(COUNTS)))
LOGPROBS = st.builds(
    TokenLogprob, COUNTS, st.floats(-99, 0), COUNTS, st.lists(st.tuples(COUNTS, st.floats(-99, 0)), max_size=2).map(tuple)
)
VALUES = st.one_of(
    st.builds(
        SamplingParams, n=st.integers(1, 64), max_tokens=st.none() | st.integers(100, 2**31 - 1), min_tokens=st.integers(0, 99),
        temperature=st.floats(0, 100), logit_bias=st.dictionaries(st.integers(0, 99), st.floats(-100, 100)),
        seed=st.none() | st.integers(-(2**63), 2**64 - 1), stop_token_ids=TOKENS,
        stop=st.lists(st.text(min_size=1, max_size=9), max_size=3).map(tuple),
    ),
    st.builds(KVOptions, selection=st.none() | TEXT, options=JSON, reuse_options=JSON, segment=st.none() | TEXT),
    st.builds(
        RequestOutput, id=TEXT, text=st.text(), tokens=TOKENS, logprobs=st.lists(LOGPROBS, max_size=2).map(tuple),
        prompt_logprobs=st.none() | st.just((None,)), finish_reason=st.none() | st.just("stop"), stop_reason=st.none() | TEXT,
        usage=st.builds(Usage, prompt_tokens=COUNTS, completion_tokens=COUNTS, cached_tokens=COUNTS, explanation=JSON),
    ),
    st.builds(
        ModelInfo, name=TEXT, root=TEXT, source=TEXT, replica=TEXT, max_model_len=COUNTS, vocab_size=COUNTS, dtype=TEXT,
        weights=TEXT, backend=TEXT, created=COUNTS, settings=JSON,
        sampling=st.builds(SamplingDefaults, st.floats(0, 2), st.floats(0, 1), COUNTS, *[st.floats(-2, 2)] * 4),  # without NaN
    ),
    st.builds(Health, ok=st.booleans(), reason=TEXT),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(VALUES)
def test_what_crosses_arrives_as_it_was(value: Any) -> None:
    assert pickle.loads(pickle.dumps(value)) == value


def kinds(of: type[KVLoomError]) -> Iterator[type[KVLoomError]]:
    yield of
    for kind in of.__subclasses__():
        yield from kinds(kind)


def test_every_error_arrives_with_what_it_says() -> None:
    found = {*kinds(KVLoomError)}
    assert {errors.ContextLengthError, errors.OverloadedError, GenerationError, ServerClosingError} < found
    for kind in found:
        error = kind("what happened")
        error.param, error.retry_after = "max_tokens", 7.0  # type: ignore[attr-defined]
        arrived = pickle.loads(pickle.dumps(error))
        assert type(arrived) is kind and str(arrived) == "what happened" and vars(arrived) == vars(error)
    refused = pickle.loads(pickle.dumps(errors.ContextLengthError("too long", "prompt")))
    assert (refused.param, refused.code) == ("prompt", "context_length_exceeded")


def test_figures_of_a_real_engine_can_be_pickled_and_name_it(make_llm: MakeLLM) -> None:
    llm = make_llm(replica="7")
    llm.generate([[5] * 40], SamplingParams(max_tokens=2), kv=KVOptions(selection="sink_window", budget=16))
    stats = llm.stats()
    assert pickle.loads(pickle.dumps(stats)) == stats and stats.replicas == ("7",) and llm.model.replica == "7"
    assert (stats + stats).replicas == ("7", "7") and (stats + stats).prompt_tokens == 80
    tenants = llm.core.tenants()
    assert pickle.loads(pickle.dumps(tenants)) == tenants


def test_the_tokenizer_is_loaded_without_the_engine_and_without_torch(make_llm: MakeLLM, tiny: Path) -> None:
    llm = make_llm()
    assert llm.model.source == str(tiny)
    code = (
        "import pickle, sys; from kvloom.engine.startup.prepare import tokenizer_of\n"
        "tokens = tokenizer_of(pickle.loads(sys.stdin.buffer.read())).encode('import the model')\n"
        "sys.exit(1 if 'torch' in sys.modules else 0) if tokens else sys.exit(2)"
    )
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(llm.model), check=True, timeout=120)
    own = tokenizer_of(llm.model)
    assert own is not llm.tokenizer and own.encode("import the model") == llm.tokenizer.encode("import the model")


def test_a_tokenizer_of_another_model_is_refused(make_llm: MakeLLM) -> None:
    with pytest.raises(ModelError):
        tokenizer_of(replace(make_llm().model, vocab_size=7))


def test_engines_with_one_secret_make_the_same_hashes(
    make_llm: MakeLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text(SECRET + "\n")
    given = [make_llm(hash_secret=SECRET), make_llm(hash_secret=f"@{tmp_path / 'secret'}")]
    drawn = [make_llm(), make_llm()]
    monkeypatch.setenv("KVLOOM_HASH_SECRET", SECRET)
    given.append(make_llm())
    other = make_llm(hash_secret="another secret of some length")
    keys = [llm.core.domain("tenant", "salt").key for llm in (*given, *drawn, other)]
    assert len({*keys[:3]}) == 1 and len({*keys}) == 4
    assert given[0].core.domain("tenant", "").key != keys[0] != given[0].core.domain("", "salt").key


def test_the_secret_is_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig.from_flat({"hash_secret": SECRET})
    assert SECRET not in repr(config) and config.changed() == {} and config.cache.secret() is not None
    assert [option.name for _, option in all_options() if option.secret] == ["hash_secret"]
    (tmp_path / "bytes").write_bytes(b"\xff" * 40)
    monkeypatch.setenv("KVLOOM_HASH_SECRET", f" {SECRET}\n")
    assert EngineConfig().cache.secret() == config.cache.secret(), "as a file of it is read"
    for empty in ("", " \n"):
        with pytest.raises(ConfigError, match="hash_secret has 0 characters"):
            EngineConfig.from_flat({"hash_secret": empty}).cache.secret()
    wrong: list[Any] = ["short", f"@{tmp_path / 'bytes'}", f"@{tmp_path / 'absent'}", 12345678901234567890, "@" + SECRET]
    for value in wrong:
        with pytest.raises(ConfigError, match="hash_secret") as caught:
            EngineConfig.from_flat({"hash_secret": value}).cache.secret()
        assert str(value).removeprefix("@") not in str(caught.value)
    monkeypatch.setenv("KVLOOM_HASH_SECRET", "brief")
    with pytest.raises(ConfigError, match="5 characters; allowed: 16 or more"):
        EngineConfig().cache.secret()


def test_peek_tells_what_is_held_and_changes_nothing(make_llm: MakeLLM) -> None:
    llm = make_llm(kv_memory="1MiB", max_model_len=200)
    client = ThreadEngineClient(lambda: Built(llm.core, llm.model, llm.tokenizer))
    pool, index = llm.core.cache.pool, llm.core.cache.index

    async def serve(prompt: list[int], name: str, **whose: str) -> None:
        async for _ in client.generate(prompt, SamplingParams(max_tokens=1), request_id=name, **whose):  # type: ignore[arg-type]
            pass

    async def scenario() -> None:
        old, new = [5] * 50, [*[5] * 30, *[6] * 40]
        await serve(old, "old", tenant="t", cache_salt="s")
        await serve(new, "new", tenant="t", cache_salt="s")
        whose = {"tenant": "t", "cache_salt": "s"}
        while (await client.stats()).running or (await client.stats()).generation_tokens < 2:
            await asyncio.sleep(0.005)  # the last output comes before the figures of its step
        before = (list(pool._cached), await client.stats(), dict(index._entries), set(llm.core.cache._tables))
        assert [await client.peek(prompt, **whose) for prompt in (old, new, [7, *old], [], [5], [*new, 9])] == [
            48,
            64,
            0,
            0,
            0,
            64,
        ]
        assert await client.peek([5] * 48, **whose) == 32, "one token at least is left to compute"
        assert await client.peek(old) == await client.peek(old, tenant="t") == await client.peek(old, cache_salt="s") == 0
        after = (list(pool._cached), await client.stats(), dict(index._entries), set(llm.core.cache._tables))
        assert after == before, "neither the order of eviction nor any count has moved"
        assert (await client.explain(old, **whose))["cached_tokens"] == 48
        await client.abort("unknown")

    asyncio.run(scenario())
    client.close()
    with pytest.raises(EngineDeadError):
        asyncio.run(client.peek([5]))
