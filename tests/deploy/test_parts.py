"""What replicas are made of, as far as it needs no Ray."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.deploy import local
from kvloom.deploy.placement import Placement
from kvloom.deploy.resume import Received
from kvloom.deploy.scaling import QUEUED_TOKENS, policy, wanted
from kvloom.deploy.uploads import Upload, Uploads
from kvloom.deploy.wire import Batch, Order, packed, unpacked
from kvloom.engine.config import EngineConfig
from kvloom.engine.errors import ConfigError
from kvloom.engine.requests.figures import counted
from kvloom.engine.requests.request import KVOptions, RequestOutput, TokenLogprob, Usage
from kvloom.engine.requests.sampling import SamplingParams
from kvloom.engine.requests.stats import ROUTED, EngineStats, GroupStats
from kvloom.engine.requests.tenants import Tenants
from kvloom.engine.startup.processors import Processors
from kvloom.server.options import ServerOptions

ANSWER = [(token, text) for token, text in enumerate(["a", "", "bcd", " e", "", "", "fgh", "i j", "", "k"])]


def outputs(cuts: list[int], held: list[int], reused: int = 0) -> list[RequestOutput]:
    """The answer in pieces of tokens that end at `cuts`; text comes `held` characters later than its tokens."""
    made, start, told = [], 0, 0
    ends = [*sorted({cut for cut in cuts if 0 < cut < len(ANSWER)}), len(ANSWER)]
    for i, end in enumerate(ends):
        text = "".join(piece for _, piece in ANSWER[:end])
        upto = len(text) if end == len(ANSWER) else max(told, len(text) - held[i % len(held)])
        made.append(RequestOutput(
            id="x", tokens=tuple(token for token, _ in ANSWER[start:end]), text=text[told:upto],
            logprobs=tuple(TokenLogprob(token, -1.0, 1, ()) for token, _ in ANSWER[start:end]),
            prompt_logprobs=(None,) if start == 0 else None, finish_reason="stop" if end == len(ANSWER) else None,
            usage=Usage(prompt_tokens=3, completion_tokens=end, cached_tokens=0, reused_tokens=reused),
        ))  # fmt: skip
        start, told = end, upto
    return made


pieces = st.tuples(st.lists(st.integers(1, 9), max_size=6), st.lists(st.integers(0, 4), min_size=1, max_size=4))


@given(st.lists(st.tuples(pieces, st.integers(0, 8)), max_size=3), pieces, st.booleans())
def test_a_stream_that_is_taken_up_says_everything_once(lost, last, approximate) -> None:
    received, got = Received(SamplingParams(seed=1, forced_tokens=(0, 1))), list[RequestOutput]()
    for tried, ((cuts, held), outlasts) in enumerate([*lost, (last, 99)]):
        asked = received.next_try()
        had = [token for output in got for token in output.tokens]
        assert list(asked.forced_tokens) == (had if len(had) > 2 else [0, 1]) and asked.seed == 1
        for output in outputs(cuts, held, reused=int(approximate and tried == 0))[: outlasts if tried < len(lost) else None]:
            if output.finish_reason is not None and tried < len(lost):
                break
            new = received.new(output)
            if new is not None:
                got.append(new)
    assert [token for output in got for token in output.tokens] == [token for token, _ in ANSWER]
    assert "".join(output.text for output in got) == "".join(text for _, text in ANSWER)
    assert [one.token for output in got for one in output.logprobs] == [token for token, _ in ANSWER]
    assert [output.prompt_logprobs for output in got].count((None,)) == 1 and got[-1].finish_reason == "stop"
    began = any(output.usage.reused_tokens for output in got) if lost else False
    assert got[-1].usage.resumed == ("" if not lost else "approximate" if began else "exact")


def test_what_crosses_can_be_pickled() -> None:
    order = Order(front="f", key="k", request_id="r", prompt=packed((1, 2, 70000)), sampling=SamplingParams(seed=2),
                  kv=KVOptions(budget=64), priority=0, tenant="t", cache_salt="")  # fmt: skip
    batch = Batch([("k", outputs([], [0])[0])], EngineStats(running=2))
    assert pickle.loads(pickle.dumps((order, batch))) == (order, batch)
    assert unpacked(order.prompt) == (1, 2, 70000)


def test_counters_of_an_engine_that_is_gone_remain() -> None:
    stats = EngineStats(replicas=("a",), running=3, prompt_tokens=70, groups=(GroupStats(name="all", total=9),))
    stats.share.requests["full", ""] = 5
    stats.step_times[2] = 4
    left = counted(stats)
    assert (left.running, left.replicas, left.groups) == (0, (), ())
    assert left.prompt_tokens == 70 and left.share.requests["full", ""] == 5 and left.step_times[2] == 4
    assert (left + EngineStats(running=1, prompt_tokens=1)).prompt_tokens == 71


def test_quotas_are_divided_and_weights_are_not() -> None:
    parsed = Tenants.parse(
        {"tenants": {"a": {"weight": 3, "cache_bytes": 101, "segment_bytes": "1KiB"}}, "default": {"cache_bytes": 9}}
    )
    each = parsed.divided(2)
    assert (each.get("a").weight, each.get("a").cache_bytes, each.get("a").segment_bytes) == (3, 50, 512)
    assert each.get("b").cache_bytes == 4 and each.get("b").segment_bytes is None


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cores, of which the control group grants all, and 8 GiB that are free."""
    monkeypatch.setattr(local, "processors", lambda: Processors(4, math.inf))
    monkeypatch.setattr(local, "available_memory", lambda: 8 << 30)
    monkeypatch.setattr(local, "default_kv_memory", lambda: 2 << 30)


def config(**settings: object) -> EngineConfig:
    return EngineConfig.from_flat(settings)


def test_a_machine_is_divided(machine: None) -> None:
    share = local.shares(config(), 2)
    assert (share.threads, share.kv_memory, share.cores) == (2, 1 << 30, 2)
    crowded = local.shares(config(), 5)
    assert (crowded.threads, crowded.cores) == (1, 0), "more replicas than cores: nobody has one for itself"
    given = local.shares(config(threads=1, kv_memory="3GiB"), 2)
    assert (given.threads, given.kv_memory, given.cores) == (1, 3 << 30, 1)
    on_gpus = local.shares(config(), 2, gpus=2)
    assert (on_gpus.threads, on_gpus.kv_memory, on_gpus.resources["num_gpus"]) == (None, None, 1)


def test_more_replicas_than_fit_are_refused(machine: None) -> None:
    with pytest.raises(ConfigError, match=r"40 replicas of .* need .*; give fewer --replicas$"):
        local.shares(config(), 40)


@pytest.mark.parametrize(
    ("settings", "gpus", "says"),
    [
        ({"threads": 3}, 0, "give --threads 2"),
        ({"kv_memory": "5GiB"}, 0, "about 3584MiB"),
        ({"device": "cuda"}, 1, "need a GPU each, and there are 1"),
    ],
)
def test_what_does_not_fit_is_refused(machine: None, settings: dict[str, object], gpus: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        local.shares(config(**settings), 2, gpus)


@pytest.mark.parametrize("given", [{"replicas": 0}, {"replicas": 65}, {"max_replicas": 0}, {"replicas": 3, "max_replicas": 2}])
def test_numbers_of_replicas_have_a_range(given: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"replicas is .*; allowed"):
        ServerOptions(**given)


def test_each_replica_is_told_its_part(machine: None) -> None:
    each = local.for_replicas(config(kv_memory="1GiB"), local.shares(config(kv_memory="1GiB"), 2), 2, "0" * 32)
    assert (each.model.threads, each.cache.kv_memory, each.tenants.tenant_replicas) == (2, 1 << 30, 2)
    assert each.cache.hash_secret == "0" * 32
    assert (
        local.for_replicas(config(hash_secret="x" * 20), local.shares(config(), 2), 2, "0" * 32).cache.hash_secret == "x" * 20
    )


def test_replicas_follow_what_waits() -> None:
    assert wanted(0, 0, 1, 1, 4, seqs=64) == 1
    assert wanted(QUEUED_TOKENS, 5, 1, 1, 4, seqs=64) == 2 and wanted(9 * QUEUED_TOKENS, 5, 2, 1, 4, seqs=64) == 4
    assert wanted(10, 5, 3, 1, 4, seqs=64) == 3, "nothing is taken away while something waits"
    assert wanted(0, 130, 2, 1, 4, seqs=64) == 3 and wanted(0, 1, 3, 2, 4, seqs=64) == 2
    told = {"queued_tokens": {"a": 3000.0, "b": 0.0}, "running": {"a": 1.0, "b": 2.0}}
    context = SimpleNamespace(aggregated_metrics=told, capacity_adjusted_min_replicas=1, capacity_adjusted_max_replicas=4,
                              current_num_replicas=2)  # fmt: skip
    assert policy(context)[0] == 3


def test_a_choice_is_counted_once_by_its_reason() -> None:
    placement = Placement(b"secret", seed=1)
    placement.update({"a": None, "b": None})
    prompt = placement.prompt(range(256))
    for request, reason in (("first", "hash"), ("second", "affinity")):
        choice = placement.choose(prompt)
        assert choice is not None and choice.reason == reason
        for _ in range(2):  # the router says it when it has chosen, and when the replica has taken it
            placement.placed(request, prompt, choice.replica, choice.reason)
    assert placement.routed == {"hash": 1, "affinity": 1} and set(placement.routed) <= set(ROUTED)


def test_uploads_are_kept_once_and_no_tenants_at_the_cost_of_others() -> None:
    kept = Uploads(most_tokens=100)

    def upload(tenant: str, number: int, tokens: int = 30) -> Upload:
        return Upload(packed([number] * tokens), KVOptions(segment="tenant"), tenant, "")

    for _ in range(5):
        kept.add(upload("a", 1))
    kept.add(upload("b", 1))
    assert len(list(kept)) == 2 and upload("a", 1) in kept
    for number in range(2, 9):
        kept.add(upload("a", number))
    assert [one.tenant for one in kept] == ["b", "a", "a"] and upload("a", 8) in kept and upload("b", 1) in kept
    kept.purge("a")
    assert [one.tenant for one in kept] == ["b"]
    kept.add(upload("b", 9, tokens=101))
    assert list(kept) == [], "one that is more than there is room for is not kept, nor what was before"


def test_who_has_ended_is_not_placed_any_more() -> None:
    placement = Placement(b"x", seed=1, announced=True)
    placement.update({"a": 1000, "b": 1000})
    prompt = placement.prompt(range(128))
    placement.announce("one")
    placement.placed("one", prompt, "a")
    assert placement.where("one") == "a" and placement.waits("a") > 0
    placement.ended("one")
    placement.placed("one", prompt, "a")  # Ray's thread comes too late
    placement.placed("never announced", prompt, "a")
    assert placement.where("one") is None and placement.waits("a") == placement.waits("b") == 0


def test_what_was_lost_or_hangs_is_avoided_where_there_are_others() -> None:
    placement = Placement(b"x", seed=1)
    placement.update({"a": 10000, "b": 10000})
    prompt = placement.prompt(range(640))
    placement.placed("one", prompt, "a")
    placement.ended("one")

    def chosen(**how: Iterable[str]) -> str:
        choice = placement.choose(prompt, **how)
        assert choice is not None
        return choice.replica

    assert chosen() == "a" and chosen(avoid=["a"]) == "b" and chosen(among=["a"], avoid=["a"]) == "a"
    placement.shun(["a"])
    assert chosen() == "b" and chosen(avoid=["b"]) == "a"
    placement.shun([])
    assert chosen() == "a"
