"""A step costs what runs in it, not what was served before: instructions of Python are counted, which no clock disturbs."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from kvloom.engine import LLM, KVOptions, SamplingParams
from kvloom.engine.core import EngineCore
from kvloom.engine.requests.request import Request
from kvloom.engine.reuse.kvshare.report import MOST_TENANTS
from kvloom.engine.reuse.kvshare.shadow import LEAST
from kvloom.engine.reuse.kvshare.share import KVShare

MakeLLM = Callable[..., LLM]
SHARE = '{"verified": true, "min_match": 32, "min_reusable": 48, "min_gain": -1, "shadow_share": 0, "heal": false}'
ONE, FIVE = (SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True) for tokens in (1, 5))
APPROX = KVOptions(reuse="approx")
FEW, MANY = 10, 10_000
SLACK = 1.15
"""Heaps of what may be evicted are a little deeper, and which blocks go differs."""


def instructions(work: Callable[[], object]) -> int:
    """Instructions of Python that something takes, those of loops and comprehensions among them."""
    count = itertools.count()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        frame.f_trace_opcodes = True
        if event == "opcode":
            next(count)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return next(count)


def request(number: int, tenant: str, length: int, sampling: SamplingParams, kv: KVOptions) -> Request:
    prompt = [3 + (7919 * number + 31 * i * i) % 297 for i in range(length)]
    return Request(id=str(number), prompt=prompt, sampling=sampling, kv=kv, tenant=tenant)


def serve(core: EngineCore, tenants: range) -> None:
    """One request of each tenant: a block of KV that can be found, and segments of every twentieth."""
    for i in tenants:
        core.add(request(i, f"t{i}", 17 if i % 20 else 80, ONE, KVOptions() if i % 20 else APPROX))
        while i % 10 == 9 and core.busy:
            core.step()


def fail_checks(core: EngineCore, tenants: int) -> None:
    """As if shadow checks had gone wrong for so many tenants."""
    assert core.feature(KVShare) is not None
    shadow = core.feature(KVShare)._shadow
    for i in range(min(tenants, 2 * MOST_TENANTS)):
        for _ in range(LEAST):
            shadow._checking = [(1.0, False)]
            shadow.conclude(f"t{i}", whole=True)


def costs(core: EngineCore, number: int) -> list[int]:
    """Of every step of two requests, of a tenant that was here and of one that was not: prompt, decode steps, end."""
    found = []
    for tenant, more in (("t1", 0), (f"new{number}", 1)):
        core.add(request(2 * number + more, tenant, 40, FIVE, APPROX if more else KVOptions()))
    while core.busy:
        found.append(instructions(lambda: (core.step(), core.stats())))
    return found


def test_a_step_costs_the_same_after_ten_tenants_and_after_ten_thousand(make_llm: MakeLLM) -> None:
    llm = make_llm(
        scheduler="cache_aware", kv_memory="256KiB", max_model_len=100, max_batched_tokens=2048, step_time_ms=0,
        kvshare_options=SHARE, segment_memory="1MiB",
    )  # fmt: skip
    core, begun, counted = llm.core, 0, []
    for tenants in (FEW, MANY):
        serve(core, range(begun, tenants))
        fail_checks(core, tenants)
        counted.append(costs(core, 10**6 + tenants))
        begun = tenants
    few, many = counted
    assert len(llm.stats().share.failed_tenants) == MOST_TENANTS and len(few) == len(many) == 5
    assert all(after < SLACK * before for before, after in zip(few, many)), counted
