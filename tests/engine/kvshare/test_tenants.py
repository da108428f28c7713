"""Who may find what: domains, scopes, and what an idle engine does on its own. The integrity tests of KVShare."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvloom.engine import LLM, KVOptions, SamplingParams
from kvloom.engine.client import ShareStats
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.llm import Completion
from kvloom.engine.requests.request import Request
from kvloom.engine.reuse.kvshare.jobs import JobQueue
from kvloom.engine.reuse.kvshare.options import ShareOptions
from kvloom.engine.reuse.kvshare.shadow import MOST_TENANTS, WINDOW, Shadow
from kvloom.engine.reuse.kvshare.share import KVShare

MakeLLM = Callable[..., LLM]
OPTIONS = '{"verified": true, "min_match": 32, "min_reusable": 48, "min_gain": -1, "reject_above": 10, "shadow_share": 0%s}'
TENANTS = """
tenants:
  alice: {group: readers}
  bob: {group: readers}
  carol: {group: others}
  press: {publishes: true}
  small: {segment_bytes: 160000}
"""
ONE = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
NUMBERS = itertools.count()


def text(seed: int, length: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 300) for _ in range(length)]


DOCUMENT = text(1, 200)


@pytest.fixture
def llm(make_llm: MakeLLM, tmp_path: Path) -> LLM:
    file = tmp_path / "tenants.yaml"
    file.write_text(TENANTS)
    return make_llm(kvshare_options=OPTIONS % ', "heal": false', segment_memory="64MiB", tenants=str(file))


def ask(
    llm: LLM,
    tenant: str,
    prompt: list[int],
    *,
    share: str | None = None,
    salt: str = "",
    reuse: str = "approx",
    sampling: SamplingParams = ONE,
    **options: Any,
) -> Completion:
    """One request of a tenant."""
    options = {"policy": "boundary", "ratio": 0.0, **options} if reuse == "approx" else {}
    number = next(NUMBERS)
    request = Request(
        id=f"t{number}",
        prompt=tuple(prompt),
        sampling=sampling,
        kv=KVOptions(reuse=reuse, share=share, explain=True, reuse_options=options),
        tenant=tenant,
        cache_salt=salt,
        arrival=float(number),
    )
    return llm._run([request])[0]


def reused(result: Completion) -> int:
    assert result.usage is not None
    return result.usage.reused_tokens + result.usage.recomputed_tokens


def upload(llm: LLM, tenant: str, tokens: list[int], scope: str) -> Completion:
    request = Request(id=f"t{next(NUMBERS)}", prompt=tuple(tokens), sampling=ONE, kv=KVOptions(segment=scope), tenant=tenant)
    return llm._run([request])[0]


def prompt(seed: int) -> list[int]:
    return [*text(100 + seed, 30), *DOCUMENT, *text(200 + seed, 30)]


# In context: the owner alone -------------------------------------------------------------------------------------------------


def test_a_tenant_reuses_its_own(llm: LLM) -> None:
    assert reused(ask(llm, "alice", prompt(1))) == 0
    assert reused(ask(llm, "alice", prompt(2))) > 150


@pytest.mark.parametrize("share", [None, "tenant", "group"])
def test_hijack_in_context_donors_never_serve_others(llm: LLM, share: str | None) -> None:
    """HijackKV: an attacker sends [adversarial prefix + popular text], and victims that reuse the text's KV are steered."""
    ask(llm, "alice", [*text(66, 32), *DOCUMENT, *text(3, 20)], share=share)
    assert len(llm.core.feature(KVShare).store) > 0
    for victim in ("bob", "carol", "", "alice2"):
        result = ask(llm, victim, prompt(5))
        assert reused(result) == 0
        assert result.usage is not None and not result.usage.explanation["runs"]


@pytest.mark.parametrize("refresh", [0, 4])
def test_hijack_public_requests_neither(make_llm: MakeLLM, tmp_path: Path, refresh: int) -> None:
    """Not even what is shared with everybody: only text that was compiled alone crosses, and it holds no attacker's prefix."""
    file = tmp_path / "tenants.yaml"
    file.write_text(TENANTS)
    llm = make_llm(kvshare_options=OPTIONS % "", tenants=str(file))
    ask(llm, "press", [*text(66, 32), *DOCUMENT, *text(3, 20)], share="public", refresh=refresh)
    assert reused(ask(llm, "bob", prompt(5))) == 0
    for segment in llm.core.feature(KVShare).store:
        assert not segment.isolated and segment.domain.tenant == segment.owner


def test_a_salt_keeps_to_itself(llm: LLM) -> None:
    ask(llm, "alice", prompt(1), salt="s")
    assert reused(ask(llm, "alice", prompt(2))) == 0
    assert reused(ask(llm, "alice", prompt(3), salt="other")) == 0
    assert reused(ask(llm, "alice", prompt(4), salt="s")) > 150


def test_none_leaves_nothing(llm: LLM) -> None:
    ask(llm, "alice", prompt(1), share="none")
    assert len(llm.core.feature(KVShare).store) == 0


def test_exact_requests_neither_leave_nor_take(llm: LLM) -> None:
    ask(llm, "alice", prompt(1), reuse="exact")
    assert len(llm.core.feature(KVShare).store) == 0
    ask(llm, "alice", prompt(2))
    assert reused(ask(llm, "alice", prompt(3), reuse="exact")) == 0


def test_domains_are_keyed(tiny: Path) -> None:
    """A domain cannot be made from its names: another process with the same model has other keys."""
    keys = set()
    for _ in range(2):
        llm = LLM(str(tiny), dtype="fp32", kv_memory="8MiB", kvshare_options=OPTIONS % "")
        scopes = llm.core.feature(KVShare).scopes.named("alice", "")
        keys |= {domain.key for domain in scopes.readable()}
        assert len({domain.key for domain in scopes.readable()}) == len(scopes.readable())
        assert llm.core.feature(KVShare).scopes.named("alice", "x").own.key not in keys
    assert len(keys) == 4


# Alone: across tenants, as far as allowed ------------------------------------------------------------------------------------


def test_uploads_reach_their_scope_and_no_further(llm: LLM) -> None:
    stored = upload(llm, "alice", DOCUMENT, "group")
    assert stored.usage is not None and stored.usage.explanation["tokens"] == len(DOCUMENT)
    for tenant, found in (("alice", True), ("bob", True), ("carol", False), ("", False)):
        result = ask(llm, tenant, prompt(7), share="none")
        assert (reused(result) > 150) is found, tenant
        if found:
            assert {run["donor"] for run in result.usage.explanation["runs"]} == {"isolated"}
            assert {run["scope"] for run in result.usage.explanation["runs"]} == {"group"}
    upload(llm, "press", DOCUMENT, "public")
    assert all(reused(ask(llm, tenant, prompt(8), share="none")) > 150 for tenant in ("carol", "", "nobody"))
    assert reused(ask(llm, "carol", prompt(9), salt="private", share="none")) == 0


@pytest.mark.parametrize(
    ("tenant", "scope"), [("carol", "public"), ("", "group"), ("alice", "none"), ("alice", "world"), ("alice", "public")]
)
def test_uploads_that_are_refused(llm: LLM, tenant: str, scope: str) -> None:
    with pytest.raises(InvalidRequestError):
        upload(llm, tenant, DOCUMENT, scope)
    assert len(llm.core.feature(KVShare).store) == 0 and not llm.core.busy
    assert not llm.core.feature(KVShare)._donors._compiled


def test_an_upload_that_is_too_long_leaves_nothing(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError):
        upload(llm, "alice", text(1, 600), "tenant")
    assert not llm.core.feature(KVShare)._donors._compiled


def test_isolated_text_has_seen_nothing_but_the_sink(llm: LLM) -> None:
    """Compiled twice, in between other work: the same KV; and another text before it in the queue changes nothing."""
    upload(llm, "press", DOCUMENT, "public")
    first = {s.tokens.tobytes(): (s.k.clone(), s.v.clone()) for s in llm.core.feature(KVShare).store}
    llm.core.purge("press")
    upload(llm, "press", text(9, 100), "public")
    ask(llm, "press", prompt(3), share="none")
    upload(llm, "press", DOCUMENT, "public")
    again = {s.tokens.tobytes(): (s.k, s.v) for s in llm.core.feature(KVShare).store}
    assert first.keys() <= again.keys()
    for name, (k, v) in first.items():
        assert float((again[name][0] - k).abs().max()) < 1e-4 and float((again[name][1] - v).abs().max()) < 1e-4


def test_text_seen_twice_is_compiled_when_idle(llm: LLM) -> None:
    long = text(78, 380)

    def around(seed: int) -> list[int]:
        return [*text(100 + seed, 30), *long, *text(200 + seed, 30)]

    ask(llm, "alice", around(1), share="group")
    assert not llm.core.background.waiting
    ask(llm, "bob", around(2), share="group")
    assert llm.core.background.waiting
    llm.settle()
    isolated = [segment for segment in llm.core.feature(KVShare).store if segment.isolated]
    assert isolated and not llm.core.background.waiting
    ask(llm, "alice", around(3), share="group")
    assert not llm.core.background.waiting  # it is there already
    known = {tuple(long[i : i + 8]) for i in range(len(long))}
    for segment in isolated:  # nothing that only one of them sent
        assert all(tuple(segment.tokens[i : i + 8].tolist()) in known for i in range(0, len(segment.tokens) - 8, 8))
    assert reused(ask(llm, "bob", around(4), share="none")) > 60
    assert reused(ask(llm, "carol", around(5), share="none")) == 0


def test_quota_charges_the_owner(llm: LLM) -> None:
    ask(llm, "alice", prompt(1))
    before = llm.core.feature(KVShare).store.bytes_by["alice"]
    for seed in range(10, 16):
        ask(llm, "small", text(seed, 100))
    store = llm.core.feature(KVShare).store
    assert store.bytes_by["alice"] == before > 0
    assert 0 < store.bytes_by["small"] <= 160000
    store.check()


def test_purge(llm: LLM) -> None:
    ask(llm, "alice", prompt(1))
    ask(llm, "bob", prompt(2))
    assert llm.core.purge("alice") > 0
    assert set(llm.core.feature(KVShare).store.bytes_by) == {"bob"}
    assert reused(ask(llm, "alice", prompt(3))) == 0


def test_reset_forgets_everybodys(llm: LLM) -> None:
    ask(llm, "alice", prompt(1))
    ask(llm, "bob", prompt(2))
    store = llm.core.feature(KVShare).store
    kept = len(store)
    told = llm.core.reset()
    assert told["segments"] == kept > 0 and told["blocks"] > 0 and not len(store)
    assert all(group.cached == 0 for group in llm.stats().groups) and not len(llm.core.feature(KVShare).jobs)
    store.check()
    llm.core.check()
    assert reused(ask(llm, "alice", prompt(3))) == 0


# Idle work -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def healing(make_llm: MakeLLM) -> LLM:
    return make_llm(kvshare_options=OPTIONS % "", segment_memory="64MiB", max_batched_tokens=96)


def test_healing_publishes_and_leaves_donors(healing: LLM) -> None:
    new = text(300, 120)
    ask(healing, "", prompt(1))
    longer = [*text(101, 30), *DOCUMENT, *new, *text(5, 20)]
    ask(healing, "", [*text(7, 5), *longer])
    assert not any(is_in(s.tokens.tolist(), new) for s in healing.core.feature(KVShare).store)  # tainted: not captured
    healing.settle()
    assert any(is_in(s.tokens.tolist(), new) for s in healing.core.feature(KVShare).store)
    again = ask(healing, "", [*text(7, 5), *longer, *text(8, 20)], reuse="exact")
    assert again.usage is not None and again.usage.cached_tokens >= (len(longer) + 5) // 16 * 16


def is_in(needle: list[int], hay: list[int]) -> bool:
    return any(hay[i : i + len(needle)] == needle for i in range(len(hay) - len(needle) + 1))


def test_jobs_give_way(healing: LLM) -> None:
    ask(healing, "", prompt(1))
    ask(healing, "", [*text(7, 5), *DOCUMENT, *text(9, 100)])
    core = healing.core
    core.background.start()
    core.step()
    assert ask(healing, "", text(11, 40), reuse="exact").finish_reason == "length"
    assert core.background.waiting  # put back
    healing.settle()
    assert not core.background.waiting and not core.busy


def test_an_interrupted_shadow_check_counts_once(make_llm: MakeLLM) -> None:
    options = OPTIONS.replace('"shadow_share": 0', '"shadow_share": 1') % (
        ', "heal": false, "shadow_kl": 1000, "shadow_top1": 0, "policy": "boundary", "ratio": 0.0'
    )
    llm = make_llm(kvshare_options=options, segment_memory="64MiB")
    ask(llm, "", prompt(1))
    ask(llm, "", prompt(2), sampling=SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))
    llm.core.background.start()
    for _ in range(6):  # its prompt in pieces, and some of its answer
        llm.core.step()
    assert llm.core.feature(KVShare)._shadow._checking
    ask(llm, "", text(11, 40), reuse="exact")
    llm.settle()
    stats = llm.stats().share
    assert stats.shadow_checks == 1 and stats.shadow_tokens == 10


def shadowing(make_llm: MakeLLM, extra: str) -> LLM:
    options = (
        OPTIONS.replace('"shadow_share": 0', '"shadow_share": 1')
        % f', "heal": false, "policy": "boundary", "ratio": 0.0{extra}'
    )
    return make_llm(kvshare_options=options, segment_memory="64MiB")


def test_shadow_checks_measure_what_reuse_did(make_llm: MakeLLM) -> None:
    llm = shadowing(make_llm, ', "shadow_kl": 1000, "shadow_top1": 0')
    long = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    ask(llm, "", prompt(1))
    watched: list[Any] = []
    llm.core.observer = lambda request, logits: watched.append(logits[0].double().log_softmax(-1))
    answer = ask(llm, "", prompt(2), sampling=long)
    llm.core.observer = None
    llm.settle()
    stats = llm.stats().share
    assert stats.shadow_checks == 1 and stats.shadow_tokens == 10
    full: list[Any] = []
    llm.core.observer = lambda request, logits: full.append(logits[0].double().log_softmax(-1))
    ask(
        llm,
        "",
        prompt(2),
        reuse="off",
        sampling=SamplingParams(max_tokens=10, ignore_eos=True, forced_tokens=tuple(answer.tokens)),
    )
    wanted = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(full, watched))
    assert stats.shadow_kl == pytest.approx(wanted, rel=0.05, abs=0.01) and wanted > 0
    assert stats.shadow_agree == sum(int(p.argmax()) == int(q.argmax()) for p, q in zip(full, watched))


def test_failing_shadow_checks_raise_the_ratio_then_switch_off(make_llm: MakeLLM) -> None:
    llm = shadowing(make_llm, ', "shadow_kl": 1e-6, "ratio": 0.15')
    ask(llm, "", prompt(1), ratio=0.15)
    seed = 2
    while llm.core.feature(KVShare).enabled(""):
        result = ask(llm, "", prompt(seed), ratio=0.15)
        seed += 1
        llm.settle()
        assert seed < 40
        if seed == 12:  # after eight checks
            share = result.usage.recomputed_tokens / reused(result)
            assert share == pytest.approx(0.2, abs=0.02)
    assert not llm.stats().share.enabled and llm.stats().share.failed_tenants == {"": "off"}
    result = ask(llm, "", prompt(seed), ratio=0.15)
    assert reused(result) == 0  # served exactly
    off = ask(llm, "", prompt(seed), reuse="off")
    assert result.tokens == off.tokens


def test_one_tenants_checks_decide_for_that_tenant_alone() -> None:
    shadow = Shadow(ShareOptions(), JobQueue(), ShareStats())
    for _ in range(2 * WINDOW):
        shadow._checking = [(9.0, False)]
        shadow.conclude("mallory", whole=True)
        shadow._checking = [(0.001, True)]
        shadow.conclude("victim", whole=True)
    assert not shadow.of("mallory").enabled and shadow.failed == {"mallory": "off"}
    assert shadow.of("victim").enabled and shadow.of("victim").least_ratio == 0 and shadow.of("nobody").enabled
    for number in range(3 * MOST_TENANTS):
        shadow._checking = [(0.0, True)]
        shadow.conclude(f"t{number}", whole=True)
    assert len(shadow._tenants) == MOST_TENANTS and not shadow.failed


def test_who_chooses_worse_options_is_not_checked(make_llm: MakeLLM) -> None:
    llm = shadowing(make_llm, ', "ratio": 0.15')
    ask(llm, "", prompt(1))
    for seed, options in enumerate(({"ratio": 0.0}, {"ratio": 0.14}, {"policy": "random", "ratio": 0.15}, {"ratio": 0.5}), 2):
        assert reused(ask(llm, "", prompt(seed), **options)) > 150
        llm.settle()
    assert llm.stats().share.shadow_checks == 0
    assert reused(ask(llm, "", prompt(9), ratio=0.15)) > 150
    llm.settle()
    assert llm.stats().share.shadow_checks == 1


# Guards ----------------------------------------------------------------------------------------------------------------------


def test_runs_that_deviate_too_far_are_computed(make_llm: MakeLLM) -> None:
    options = OPTIONS.replace('"reject_above": 10', '"reject_above": 1e-6') % ', "heal": false'
    llm = make_llm(kvshare_options=options, segment_memory="64MiB")
    ask(llm, "", prompt(1))
    held = len(llm.core.feature(KVShare).store)
    for seed in (2, 3, 4):
        result = ask(llm, "", prompt(seed), policy="blend", ratio=0.1)
        off = ask(llm, "", prompt(seed), reuse="off")
        assert result.tokens == off.tokens and result.usage.reused_tokens == 0 and result.usage.recomputed_tokens > 150
    stats = llm.stats().share
    assert stats.rejected_runs >= 3 and stats.tokens["rejected"] > 450
    assert len(llm.core.feature(KVShare).store) < held + 12  # rejected three times: evicted
    assert not any(is_in(s.tokens.tolist(), prompt(1)[:30]) for s in llm.core.feature(KVShare).store if s.rejections >= 3)


@pytest.mark.parametrize("what", ["k", "v", "position"])
def test_layer_zero_catches_kv_that_is_not_what_it_says(make_llm: MakeLLM, what: str) -> None:
    llm = make_llm(kvshare_options=OPTIONS % ', "heal": false', segment_memory="64MiB")
    ask(llm, "", prompt(1))
    for segment in llm.core.feature(KVShare).store:
        if what == "position":
            segment.position += 1
        else:
            wrong = getattr(segment, what).clone()
            wrong[0] *= 1.05
            setattr(segment, what, wrong)
    result, off = ask(llm, "", prompt(2)), ask(llm, "", prompt(2), reuse="off")
    assert reused(result) == 0 and result.tokens == off.tokens
    assert result.usage is not None and result.usage.explanation["reason"] == "layer 0 differs"
    assert llm.stats().share.identity_failures == 1


def test_explain_tells_what_would_be_found(llm: LLM) -> None:
    ask(llm, "alice", prompt(1))
    told = llm.core.explain(prompt(2), "alice", "")
    assert told["prompt_tokens"] == 260 and told["cached_tokens"] == 0
    assert sum(run["stop"] - run["start"] for run in told["runs"]) > 150
    assert {run["donor"] for run in told["runs"]} == {"context"}
    assert all(broken["reason"] in ("tokens differ", "segment ends", "range ends") for broken in told["broken"])
    assert llm.core.explain(prompt(2), "bob", "")["runs"] == []
    before = llm.stats().share
    llm.core.explain(prompt(2), "alice", "")
    assert llm.stats().share == before
