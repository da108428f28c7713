"""What fails for one request ends that request alone: the others' tokens are what they are without it, and nothing is lost."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest

from kvloom.engine import LLM, EngineConfig, KVOptions, SamplingParams
from kvloom.engine.errors import EngineDeadError, InternalError
from kvloom.engine.requests.isolation import INTERNAL, MOST_FAILURES
from kvloom.engine.requests.request import Request, RequestOutput
from kvloom.engine.reuse.kvshare.share import KVShare
from kvloom.engine.startup.assemble import assemble

MakeLLM = Callable[..., LLM]
SHARE = (
    '{"verified": true, "min_match": 32, "min_reusable": 48, "min_gain": -1, "reject_above": 10, "shadow_share": 0, '
    '"heal": false}'
)
RECYCLED = KVOptions(selection="recycled", budget=16, options={"recent": 4, "sinks": 2})


def text(seed: int, length: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 300) for _ in range(length)]


def add(llm: LLM, name: str, prompt: list[int], kv: KVOptions | None = None, **sampling: Any) -> None:
    params = SamplingParams(**{"max_tokens": 6, "ignore_eos": True, "temperature": 0.0, **sampling})
    llm.core.add(Request(id=name, prompt=prompt, sampling=params, kv=kv or KVOptions(), arrival=float(ord(name[0]))))


def run(llm: LLM, limit: int = 300) -> dict[str, list[RequestOutput]]:
    found: dict[str, list[RequestOutput]] = {}
    for _ in range(limit):
        if not llm.core.busy:
            return found
        for output in llm.core.step():
            found.setdefault(output.id, []).append(output)
        llm.core.check()
    raise AssertionError("a request does not end")


def tokens(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.tokens]


def break_once(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, blames: Callable[..., bool] = lambda *a, **k: True
) -> None:
    """Make a call fail the first time that it is about request "b"."""
    real, broken = getattr(owner, name), itertools.count()

    def call(*args: Any, **kwargs: Any) -> Any:
        if blames(*args, **kwargs) and next(broken) == 0:
            raise ZeroDivisionError("the secret of the engine room")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def about_b(*args: Any, **kwargs: Any) -> bool:
    ids = [getattr(getattr(a, "request", a), "id", None) for a in args]
    return "b" in ids


PLACES: dict[str, tuple[Callable[[LLM], Any], str]] = {
    "completed": (lambda llm: llm.core._scheduler, "completed"),
    "next": (lambda llm: llm.core.decoding, "_next"),
    "score": (lambda llm: llm.core.decoding, "score_prompt"),
    "admit": (lambda llm: llm.core._scheduler._fairness, "admitted"),
    "chunk": (lambda llm: llm.core._scheduler._progress, "chunk"),
    "begin": (lambda llm: llm.core.feature(KVShare), "begin"),
    "settle": (lambda llm: llm.core.feature(KVShare), "settle"),
    "sample": (lambda llm: llm.core.decoding._sampler, "_edit"),
    "prefilled": (lambda llm: llm.core.feature(KVShare), "prefilled"),
    "leave": (lambda llm: llm.core.feature(KVShare)._donors, "_leave"),
    "explain": (lambda llm: llm.core.feature(KVShare), "explain"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("scheduler", ["fcfs", "cache_aware"])
def test_whatever_fails_for_one_request_ends_it_alone(
    make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str, scheduler: str
) -> None:
    llm = make_llm(kvshare_options=SHARE, segment_memory="8MiB", scheduler=scheduler, max_batched_tokens=64, max_num_seqs=8)
    prompts = {name: text(i, 90) for i, name in enumerate("abc")}
    kv = KVOptions(reuse="approx", explain=True)
    for name, prompt in prompts.items():
        add(llm, name, prompt, kv, presence_penalty=0.1)
    expected = {name: tokens(outputs) for name, outputs in run(llm).items()}

    llm.core.cache.evict()
    owner, method = PLACES[place]
    break_once(monkeypatch, owner(llm), method, about_b)
    for name, prompt in prompts.items():
        add(llm, name, prompt, kv, presence_penalty=0.1)
    found = run(llm)
    assert [tokens(found[name]) for name in "ac"] == [expected[name] for name in "ac"]
    last = found["b"][-1]
    assert (last.finish_reason, last.error) == ("error", INTERNAL)
    assert "secret" not in repr(found)
    assert "request b" in caplog.text and "the secret of the engine room" in caplog.text
    assert llm.stats().internal_errors == 1
    assert llm.core.cache.pool.in_use == 0 and not llm.core._holdings._held and not llm.core.decoding._states
    add(llm, "b", prompts["b"], kv, presence_penalty=0.1)
    assert tokens(run(llm)["b"]) == expected["b"]


def test_a_search_that_fails_in_the_queue_ends_who_waits(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache-aware order looks at what waiting requests would reuse."""
    llm = make_llm(kvshare_options=SHARE, segment_memory="8MiB", scheduler="cache_aware", max_num_seqs=1)
    for name in "abc":
        add(llm, name, text(ord(name), 60), KVOptions(reuse="approx"))
    lane = llm.core._scheduler._waiting._lanes[""]
    lane._round += 1  # all are looked at anew
    break_once(monkeypatch, lane._around.estimator, "estimate", about_b)
    found = run(llm)
    assert {name: outputs[-1].finish_reason for name, outputs in found.items()} == {"a": "length", "b": "error", "c": "length"}


@pytest.mark.parametrize("place", ["run", "logits"])
def test_a_step_that_fails_as_a_whole_ends_its_rows_and_leaves_nothing_to_be_found(
    make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    llm = make_llm(max_num_seqs=2, max_batched_tokens=64)
    shared = text(1, 48)
    expected = llm.generate([[*shared, 5]], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))[0].tokens
    llm.core.cache.evict()
    for name, last in zip("abc", (7, 8, 5)):  # c waits: two run at once, and b begins with what a computes in that very step
        add(llm, name, [*shared, last], max_tokens=4)
    break_once(monkeypatch, llm.core.runner, place)
    found = run(llm)
    assert [found[name][-1].finish_reason for name in "abc"] == ["error", "error", "length"]
    assert tokens(found["c"]) == expected, "blocks that were never computed were found"
    assert found["c"][-1].usage.cached_tokens == (0 if place == "run" else found["c"][-1].usage.cached_tokens)
    assert llm.stats().internal_errors == 1


def test_an_engine_that_only_fails_ends(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm()

    def fail(*args: Any) -> None:
        raise MemoryError("no more")

    good = llm.core.runner.run
    for i in range(3 * MOST_FAILURES):  # never so many without a good step in between
        monkeypatch.setattr(llm.core.runner, "run", good if i % MOST_FAILURES == 0 else fail)
        add(llm, "a", text(i, 20), max_tokens=1)
        assert run(llm)["a"][-1].finish_reason == ("length" if i % MOST_FAILURES == 0 else "error")
    monkeypatch.setattr(llm.core.runner, "run", fail)
    add(llm, "a", text(1, 20), max_tokens=1)
    with pytest.raises(EngineDeadError) as dead:
        for _ in range(MOST_FAILURES):
            llm.core.step()
            add(llm, "a", text(1, 20), max_tokens=1)
    assert "no more" not in str(dead.value)
    llm.core.abort("a")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (lambda llm: llm.core._admission.selectors, "open"),
        (lambda llm: llm.core.feature(KVShare), "opened"),
        (lambda llm: llm.core.cache, "open"),
        (lambda llm: llm.core.feature(KVShare), "search"),
        (lambda llm: llm.core.decoding._sampler, "drop"),
    ],
)
def test_a_request_that_cannot_be_queued_leaves_nothing(
    make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch, owner: Callable[[LLM], Any], name: str
) -> None:
    llm = make_llm(
        kvshare_options=SHARE.replace('"shadow_share": 0', '"shadow_share": 1'), segment_memory="8MiB", scheduler="cache_aware"
    )
    kv = KVOptions(selection="recycled", budget=16, options={"recent": 4, "sinks": 2}, reuse="approx")
    break_once(monkeypatch, owner(llm), name)
    if name == "drop":  # fails on the way out
        add(llm, "a", text(1, 40), kv)
        assert len(tokens(run(llm)["a"])) == 6
    else:
        with pytest.raises(InternalError) as error:
            add(llm, "a", text(1, 40), kv)
        assert str(error.value) == INTERNAL and error.value.__suppress_context__
    core = llm.core
    core.check()
    assert not core._holdings._held and not core.decoding._states and not core.busy and core.queued_tokens == 0
    assert not core.feature(KVShare)._repairs and not core.feature(KVShare)._shadow._seen and not core.cache._tables
    assert all(not entry.open for entry in core._admission.selectors._entries.values())
    add(llm, "a", text(1, 40), kv)
    assert len(tokens(run(llm)["a"])) == 6


def test_work_of_the_engines_own_that_fails_is_dropped(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm(kvshare_options=SHARE.replace('"heal": false', '"heal": true'), segment_memory="64MiB")
    shared = text(9, 96)
    for i in range(2):
        add(llm, "a", [*text(i, 20), *shared, *text(i + 5, 64)], KVOptions(reuse="approx"), max_tokens=1)
        run(llm)
    assert llm.core.background.waiting
    break_once(monkeypatch, llm.core.runner, "run")
    llm.settle()
    assert llm.stats().internal_errors == 1 and not llm.core.background.waiting
    assert llm.core.background._running is None and not llm.core._holdings._held


def test_an_end_token_outside_the_vocabulary_is_no_end_token(make_llm: MakeLLM) -> None:
    """Whoever makes an engine with one: `min_tokens` must not index a row of logits with it."""
    llm = make_llm()
    core = llm.core
    assert core.decoding._eos
    admission = core._admission
    again = assemble(
        EngineConfig(), core.runner, core.cache, core.states, core._statistics.kernels, admission.selectors, llm.tokenizer,
        admission.domains, core._tenants, admission.limits, frozenset({*core.decoding._eos, 10**6, -1}), None,
        core.feature(KVShare),
    )  # fmt: skip
    assert again.decoding._eos == core.decoding._eos
    llm.core = again
    add(llm, "a", text(1, 9), min_tokens=2, ignore_eos=False)
    assert 2 <= len(tokens(run(llm)["a"])) <= 6


def count_calls(work: Callable[[], object]) -> int:
    """Python calls and C calls that something takes: a measure of work that no clock disturbs."""
    calls = itertools.count()
    sys.setprofile(lambda frame, event, argument: next(calls) if event.endswith("call") else None)
    try:
        work()
    finally:
        sys.setprofile(None)
    return next(calls)


def test_what_a_step_tells_costs_the_same_however_many_tenants_were_served(make_llm: MakeLLM) -> None:
    llm = make_llm(kvshare_options=SHARE, segment_memory="8MiB")
    share = llm.core.feature(KVShare)
    llm.core.stats()  # the first one fills caches of Python's own
    costs, sizes = [], []
    for tenants in (10, 10_000):
        for i in range(tenants):
            share.tenant_tokens.add(f"t{i}", {"fresh": 1})
            share.store.bytes_by[f"t{i}"] = 1
            llm.core.cache.pool.cached_by[f"t{i}"] = 1
        costs.append(count_calls(llm.core.stats))
        sizes.append(len(pickle.dumps(dataclasses.asdict(llm.core.stats()))))
    assert costs[0] == costs[1] < 300 and sizes[0] == sizes[1]
    assert len(llm.core.tenants()) >= 10_000 and set(llm.core.tenants(["t5"])) == {"t5"}
    assert llm.core.tenants(["t5"])["t5"].segment_bytes == 1
    share.store.bytes_by.clear()
    llm.core.cache.pool.cached_by.clear()


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_drafts_never_outgrow_a_step(make_llm: MakeLLM, rows: int) -> None:
    """Sixteen drafts and a step of eight rows: shorter drafts, the same tokens, and nobody waits for ever."""
    prompt = text(3, 30)
    kv = KVOptions(selection="sink_window", budget=12, draft=True, draft_tokens=16)
    expected = make_llm().generate([prompt], SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))[0].tokens
    llm = make_llm(max_batched_tokens=rows, max_num_seqs=4)
    for name in "abc":
        add(llm, name, prompt, kv, max_tokens=40)
    found = run(llm, 3000)
    assert [tokens(found[name]) for name in "abc"] == [expected] * 3
    stats = llm.stats()
    assert (stats.drafted_tokens > 0) == (rows > 1) and stats.drafted_tokens <= stats.drafts * (rows - 1)
