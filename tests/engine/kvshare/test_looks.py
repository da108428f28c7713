"""Rows that are looked at before it is decided what is computed: rows of steps like any others, beside other requests'."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kvloom.engine import LLM, KVOptions, SamplingParams
from kvloom.engine.requests.request import Request
from kvloom.engine.reuse.kvshare.scan import LookAtRows
from kvloom.engine.reuse.kvshare.share import KVShare
from kvloom.engine.scheduling import StepPlan

MakeLLM = Callable[..., LLM]
OPTIONS = (
    '{"verified": true, "min_match": 32, "min_reusable": 48, "min_gain": -1, "reject_above": 10, "shadow_share": 0, '
    '"heal": false, "refresh": 0}'
)
POLICIES = ["focus", "dhd", "query", "blend", "boundary", "random"]


def text(seed: int, length: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 300) for _ in range(length)]


SHARED = text(1, 180)
PROMPT = [*text(2, 30), *SHARED[60:], *SHARED[:60], *text(3, 25)]


def engine(make_llm: MakeLLM, **config: Any) -> LLM:
    llm = make_llm(kvshare_options=OPTIONS, segment_memory="64MiB", max_num_seqs=4, **config)
    llm.generate([SHARED], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True), kv=KVOptions(reuse="approx"))
    return llm


def asks(policy: str, name: str = "asks") -> Request:
    kv = KVOptions(reuse="approx", reuse_options={"policy": policy, "ratio": 0.3})
    sampling = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    return Request(id=name, prompt=tuple(PROMPT), sampling=sampling, kv=kv)


def plans(llm: LLM) -> list[StepPlan]:
    """Every plan that the engine makes from now on."""
    seen: list[StepPlan] = []
    real = llm.core._scheduler.schedule

    def schedule() -> StepPlan:
        seen.append(real())
        return seen[-1]

    llm.core._scheduler.schedule = schedule  # type: ignore[method-assign]
    return seen


def run(llm: LLM) -> None:
    while llm.core.busy:
        llm.core.step()
    llm.core.check()
    assert llm.stats().internal_errors == 0


@pytest.mark.parametrize("policy", ["focus", "boundary"])
def test_streams_get_a_row_in_every_step_that_looks(make_llm: MakeLLM, policy: str) -> None:
    llm = engine(make_llm, max_batched_tokens=40)
    llm.core.add(Request(id="stream", prompt=tuple(text(9, 20)), sampling=SamplingParams(max_tokens=40, ignore_eos=True)))
    for _ in range(3):
        llm.core.step()
    seen = plans(llm)
    llm.core.add(asks(policy))
    run(llm)
    looking = [plan for plan in seen if any(chunk.look is not None for chunk in plan.chunks)]
    assert len(looking) >= (5 if policy == "focus" else 1)
    assert all({chunk.request.id for chunk in plan.chunks} >= {"stream", "asks"} and plan.rows <= 40 for plan in looking)


@pytest.mark.parametrize("policy", ["focus", "dhd", "blend"])
def test_however_a_look_is_cut_the_same_is_decided(make_llm: MakeLLM, policy: str) -> None:
    found = []
    for rows in (24, 64, 512):
        llm = engine(make_llm, max_batched_tokens=rows)
        request = asks(policy)
        llm.core.add(request)
        while request.repair is None:
            llm.core.step()
        found.append((request.repair.initial_stale, request.repair.rows))
        run(llm)
    for stale, computed in found[1:]:
        assert len(stale) > 48
        np.testing.assert_array_equal(stale, found[0][0])
        np.testing.assert_array_equal(computed, found[0][1])


def test_planning_never_runs_the_model(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, planning = engine(make_llm), [False]
    scheduler, decoder = llm.core._scheduler, llm.core.runner.decoder
    schedule, embed, project = scheduler.schedule, decoder.embed, decoder.project

    def planned() -> StepPlan:
        planning[0] = True
        try:
            return schedule()
        finally:
            planning[0] = False

    def outside(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            assert not planning[0]
            return function(*args)

        return call

    monkeypatch.setattr(scheduler, "schedule", planned)
    monkeypatch.setattr(decoder, "embed", outside(embed))
    monkeypatch.setattr(decoder, "project", outside(project))
    for policy in POLICIES:
        llm.core.cache.evict()
        request = asks(policy)
        llm.core.add(request)
        run(llm)
        assert request.reused > 48


@pytest.mark.parametrize("policy", ["focus", "boundary"])
def test_who_ends_or_is_preempted_while_it_is_looked_at_leaves_nothing(make_llm: MakeLLM, policy: str) -> None:
    llm = engine(make_llm, max_batched_tokens=24)
    share: Any = llm.core.feature(KVShare)
    for preempted in (False, True):
        llm.core.cache.evict()
        request = asks(policy)
        llm.core.add(request)
        if policy == "focus":
            llm.core.step()
        else:
            llm.core._scheduler.schedule()
        assert request.looks is not None and request in share._looking
        if not preempted:
            llm.core.abort(request.id)
            assert request not in share._looking
            run(llm)
            continue
        llm.core._scheduler._preempt(request, StepPlan([], []))
        assert request.looks is None and request.computed == 0
        run(llm)
        assert request.reused > 48 and request.generated == 3
    assert not share._looking and llm.core.cache.pool.in_use == 0


def test_what_layer_0_contradicts_is_computed_instead(make_llm: MakeLLM) -> None:
    llm = engine(make_llm)
    share: Any = llm.core.feature(KVShare)
    with torch.inference_mode():
        for segment in share.store:
            segment.v[0] += 1.0
    request = asks("focus")
    llm.core.add(request)
    while llm.core.busy:
        llm.core.step()
    assert request.reused == 0 and request.repair is None and llm.stats().share.identity_failures == 1
    cold = make_llm(max_num_seqs=4)
    plain = Request(id="plain", prompt=tuple(PROMPT), sampling=request.sampling)
    cold.core.add(plain)
    run(cold)
    assert request.output == plain.output


def test_a_look_that_fails_ends_nobody_elses_request(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = engine(make_llm, max_batched_tokens=64)
    stream = Request(id="stream", prompt=tuple(text(9, 20)), sampling=SamplingParams(max_tokens=40, ignore_eos=True))
    llm.core.add(stream)
    llm.core.step()

    def fail(self: LookAtRows, layer: Any, out: Any) -> None:
        raise MemoryError("no room for what is looked at")

    monkeypatch.setattr(LookAtRows, "_attend", fail)
    llm.core.add(asks("focus"))
    ends: dict[str, str | None] = {}
    while llm.core.busy:
        ends |= {output.id: output.finish_reason for output in llm.core.step() if output.finish_reason is not None}
    assert ends == {"asks": "error", "stream": "length"}
    assert llm.stats().internal_errors == 1 and llm.core.cache.pool.in_use == 0
