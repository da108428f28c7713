"""What leaves no trace: requests that share with nobody, and questions about a prompt. And who pays for questions."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from kvloom.engine import LLM, KVOptions, SamplingParams
from kvloom.engine.client import ShareStats
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.requests.request import Request
from kvloom.engine.reuse.kvshare.jobs import MOST, Job, JobQueue
from kvloom.engine.reuse.kvshare.share import KVShare
from kvloom.engine.reuse.kvshare.unavailable import NoKVShare
from kvloom.engine.scheduling.fairness import MOST_DEBTORS, Fairness

MakeLLM = Callable[..., LLM]
OPTIONS = '{"verified": true, "min_match": 32, "min_reusable": 48, "min_gain": -1, "reject_above": 10, "shadow_share": 1%s}'
TWO = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
NUMBERS = itertools.count()


def text(seed: int, length: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 300) for _ in range(length)]


def ask(llm: LLM, prompt: list[int], *, reuse: str, share: str | None, salt: str = "") -> int:
    """Tokens that came from the exact prefix."""
    kv = KVOptions(reuse=reuse, share=share)
    request = Request(id=f"n{next(NUMBERS)}", prompt=tuple(prompt), sampling=TWO, kv=kv, tenant="t", cache_salt=salt)
    usage = llm._run([request])[0].usage
    assert usage is not None
    return usage.cached_tokens


@pytest.mark.parametrize("salt", ["", "s"])
@pytest.mark.parametrize("reuse", ["exact", "approx", "off"])
def test_share_none_leaves_nothing_and_may_look_up(make_llm: MakeLLM, reuse: str, salt: str) -> None:
    llm = make_llm(kvshare_options=OPTIONS % "", segment_memory="64MiB")
    prompt = text(1, 200)
    ask(llm, prompt, reuse=reuse, share="none", salt=salt)
    llm.settle()  # nor what the idle engine does about it
    assert llm.core.cache.pool.cached == 0 and len(llm.core.feature(KVShare).store) == 0
    assert ask(llm, prompt, reuse="exact", share=None, salt=salt) == 0
    assert ask(llm, [*prompt, 5, 6], reuse=reuse, share="none", salt=salt) == (0 if reuse == "off" else 192)
    cached = llm.core.cache.pool.cached
    ask(llm, [*prompt, *text(2, 60)], reuse=reuse, share="none", salt=salt)
    assert llm.core.cache.pool.cached == cached


@pytest.mark.parametrize("share", ["tenant", "group", "public", "everybody"])
def test_other_scopes_need_approximate_reuse(make_llm: MakeLLM, share: str) -> None:
    llm = make_llm(kvshare_options=OPTIONS % "")
    with pytest.raises(InvalidRequestError, match=r"kv\.share"):
        ask(llm, text(1, 50), reuse="exact", share=share)


def test_explain_moves_nothing(make_llm: MakeLLM) -> None:
    llm = make_llm(kvshare_options=OPTIONS % ', "heal": false', segment_memory="64MiB")
    prompts = [text(seed, 150) for seed in range(4)]
    for prompt in prompts:
        ask(llm, prompt, reuse="approx", share=None)
    llm.settle()
    cache, store = llm.core.cache, llm.core.feature(KVShare).store
    kept = cache.pool._cached

    def state() -> object:
        index = {key: list(entries) for key, entries in store._index.items()}
        return (
            list(kept),
            kept._turn,
            dict(kept._touched),
            list(store),
            store.version,
            index,
            cache.query_tokens,
            cache.hit_tokens,
        )

    before = state()
    for prompt in (prompts[0], [*prompts[1], 7], [*text(9, 20), *prompts[2]], text(10, 60)):
        told = llm.core.explain(prompt, "t", "")
        assert told["cached_tokens"] == (144 if prompt[:100] in (prompts[0][:100], prompts[1][:100]) else 0)
    assert state() == before


def test_explain_answers_for_the_exact_prefix_on_a_server_that_drops_kv(
    make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm()
    prompt = text(1, 100)
    ask(llm, prompt, reuse="exact", share=None)
    monkeypatch.setattr(llm.core, "_features", [NoKVShare("exact")])  # as with --retention razor
    told = llm.core.explain([*prompt, 5], "t", "")
    assert told == {"prompt_tokens": 101, "cached_tokens": 96, "runs": [], "broken": [], "dropped": []}


def test_a_look_up_is_charged(make_llm: MakeLLM) -> None:
    llm = make_llm(max_num_seqs=1)
    for name in ("t", "u"):
        kv = KVOptions(reuse="exact")
        llm.core.add(Request(id=name, prompt=tuple(text(1, 50)), sampling=TWO, kv=kv, tenant=name))
    llm.core.step()
    fairness = llm.core._scheduler._fairness
    before = fairness.credit("t"), fairness.credit("u")
    llm.core._scheduler._pace.cost.rows_per_second = 100.0
    llm.core.charge("u", 0.03)  # what it took to answer a question
    llm.core.charge("nobody", 0.03)
    assert fairness.credit("t") == before[0] and fairness.credit("u") == pytest.approx(before[1] - 3)
    assert fairness.credit("nobody") == pytest.approx(-3)
    while llm.core.busy:
        llm.core.step()
    assert not fairness._credit


def test_debts_of_strangers_are_bounded() -> None:
    fairness = Fairness(100, lambda tenant: 1.0)
    fairness.charge("nobody", 5, contended=False)
    assert fairness.credit("nobody") == 0
    for number in range(3 * MOST_DEBTORS):
        fairness.charge(f"t{number}", 5, contended=True)
        fairness.charge("t0", 1, contended=True)
    assert len(fairness._credit) <= MOST_DEBTORS and fairness.credit("t0") == -5 - 3 * MOST_DEBTORS
    fairness.calm()
    assert not fairness._credit


def job(tenant: str, number: int) -> Job:
    return Job(kind="heal", tokens=(number,), tenant=tenant)


def test_one_tenants_jobs_crowd_out_nobody_elses() -> None:
    jobs = JobQueue()
    for number in range(3):
        jobs.add(job("quiet", number))
    for number in range(200):
        jobs.add(job("busy", number))
    assert len(jobs) == MOST
    started = []
    while (request := jobs.start()) is not None:
        started.append((request.tenant, request.prompt[0]))
        jobs.done()
    assert [number for tenant, number in started if tenant == "quiet"] == [0, 1, 2]
    assert [tenant for tenant, _ in started[:6]].count("quiet") == 3, "they take turns"
    assert [number for tenant, number in started if tenant == "busy"] == list(range(200 - MOST + 3, 200))


def test_a_look_for_who_computes_the_same_now_is_bounded(make_llm: MakeLLM) -> None:
    llm = make_llm(kvshare_options=OPTIONS % "")
    donors, prompt = llm.core.feature(KVShare)._donors, text(1, 400)
    looked: list[int] = []

    class Watched(dict):  # type: ignore[type-arg]
        def get(self, *arguments: object) -> object:
            looked.append(1)
            return super().get(*arguments)

    for number in range(100):
        other = Request(id=f"o{number}", prompt=tuple(prompt), sampling=TWO, kv=KVOptions(), tenant="t")
        donors.expect(other)
        donors._expected[other] = Watched(donors._expected[other])
    mine = Request(id="m", prompt=tuple(prompt), sampling=TWO, kv=KVOptions(), tenant="t")
    mine.tokens = list(prompt)
    nothing = llm.core.feature(KVShare).look(prompt, 0, "t", "")
    assert nothing["runs"] == []
    from kvloom.engine.reuse.kvshare.donors import MOST_CHUNKS, MOST_PRODUCERS
    from kvloom.engine.reuse.kvshare.matching import Match

    assert donors.producer(mine, Match((), (), ()), 48) is not None
    assert 0 < len(looked) <= MOST_CHUNKS * MOST_PRODUCERS
    assert len(looked) <= MOST_PRODUCERS * (400 // 32)
    assert isinstance(llm.stats().share, ShareStats)
