"""Requests that wait: what they will cost with segments, and waiting for what another request is about to leave."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from kvloom.engine import LLM, KVOptions, SamplingParams
from kvloom.engine.requests.request import Request

MakeLLM = Callable[..., LLM]
OPTIONS = (
    '{"verified": true, "min_match": 32, "min_reusable": 100, "min_gain": 0, "reject_above": 10, "shadow_share": 0, '
    '"heal": false, "policy": "boundary", "ratio": 0.1, "boundary": 4}'
)
FOUR = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def text(seed: int, length: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 300) for _ in range(length)]


DOCUMENT = text(78, 300)


def request(name: str, prompt: list[int], tenant: str = "", reuse: str = "approx") -> Request:
    kv = KVOptions(reuse=reuse)
    return Request(id=name, prompt=tuple(prompt), sampling=FOUR, kv=kv, tenant=tenant, arrival=time.monotonic())


def run(llm: LLM, *requests: Request) -> list[str]:
    """Runs them; returns their ids in the order in which they got their first token."""
    order: list[str] = []
    for one in requests:
        llm.core.add(one)
    while llm.core.busy:
        for output in llm.core.step():
            if output.tokens and output.id not in order:
                order.append(output.id)
    return order


def estimate(llm: LLM, waiting: Request) -> float:
    scheduler = llm.core._scheduler
    found = llm.core._scheduler._waiting  # queue of lanes
    assert found is not None
    around = next(iter(found._lanes.values()))._around
    return around.estimator.estimate(waiting, scheduler.table(waiting), waiting.tokens).work


def test_waiting_requests_know_what_they_will_reuse(make_llm: MakeLLM) -> None:
    llm = make_llm(kvshare_options=OPTIONS, scheduler="cache_aware", max_num_seqs=1)
    run(llm, request("donor", [*text(1, 20), *DOCUMENT, *text(2, 20)]))
    hot = request("hot", [*text(3, 30), *DOCUMENT, *text(4, 20)])
    cold = request("cold", text(5, 350))
    other = request("other", [*text(6, 30), *DOCUMENT, *text(7, 20)], tenant="b")
    exact = request("exact", [*text(8, 30), *DOCUMENT, *text(9, 20)], reuse="exact")
    for one in (hot, cold, other, exact):
        llm.core.add(one)
    assert estimate(llm, hot) < 150
    assert estimate(llm, cold) == estimate(llm, other) == estimate(llm, exact) == 350
    while llm.core.busy:
        llm.core.step()


def test_cache_aware_runs_little_work_first(make_llm: MakeLLM) -> None:
    for scheduler, first in (("fcfs", "cold"), ("cache_aware", "hot")):
        llm = make_llm(kvshare_options=OPTIONS, scheduler=scheduler, max_num_seqs=1)
        run(llm, request("donor", [*text(1, 20), *DOCUMENT, *text(2, 20)]))
        order = run(
            llm,
            request("busy", text(9, 100)),
            request("cold", text(5, 350)),
            request("hot", [*text(3, 30), *DOCUMENT, *text(4, 20)]),
        )
        assert order.index(first) < order.index({"cold": "hot", "hot": "cold"}[first])


def test_what_is_being_computed_is_waited_for(make_llm: MakeLLM) -> None:
    """Two prompts with one document come together: the second waits for the first and reuses it."""
    reused = {}
    for scheduler in ("fcfs", "cache_aware"):
        llm = make_llm(kvshare_options=OPTIONS, scheduler=scheduler, max_batched_tokens=64, max_num_seqs=8)
        run(llm, request("warm", text(20, 300)))
        llm.core._scheduler._pace.cost.rows_per_second = 1e-3  # at the real speed a hold of one prefill is too short to test
        requests = [request(str(i), [*text(30 + i, 10), *DOCUMENT, *text(40 + i, 30)]) for i in range(2)]
        llm.core.add(requests[0])
        llm.core.step()
        run(llm, requests[1])
        reused[scheduler] = requests[1].reused + requests[1].recomputed
    assert reused["fcfs"] == 0 and reused["cache_aware"] > 200
