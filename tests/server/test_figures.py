"""Statistics are declared once: their names on /metrics and in /v1/kv, and how the figures of replicas are added."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from kvloom.engine.client import Health
from kvloom.engine.requests.figures import declared, placed, told
from kvloom.engine.requests.stats import CHECKS, KINDS, EngineStats, GroupStats, MethodStats, ShareStats, TenantStats

CLASSES: tuple[Any, ...] = (EngineStats, GroupStats, MethodStats, ShareStats, TenantStats, Health)
METRICS = {
    "engine_ahead_steps": "", "engine_graph_capture_failures": "", "engine_graph_steps": "mode",
    "engine_internal_errors": "", "engine_step_prompt_rows": "le", "engine_step_seconds": "",
    "engine_step_time_seconds": "le", "engine_steps": "", "engine_up": "", "generation_tokens": "",
    "grammar_compile_seconds": "le", "num_grammars_waiting": "",
    "kv_blocks": "group,state", "kv_cache_capacity_tokens": "", "kv_cache_usage_perc": "", "kv_evicted_blocks": "",
    "kv_read_bytes": "kind", "kvshare_captured_tokens": "",
    "kvshare_compiled_tokens": "", "kvshare_copy_seconds": "", "kvshare_deviation_runs": "", "kvshare_deviation_sum": "",
    "kvshare_enabled": "", "kvshare_errands": "", "kvshare_healed_tokens": "", "kvshare_identity_failures": "",
    "kvshare_match_seconds": "", "kvshare_recomputed_ratio": "le", "kvshare_recomputed_tokens": "",
    "kvshare_refreshed_tokens": "", "kvshare_rejected_runs": "", "kvshare_requests": "path,reason", "kvshare_reused_tokens": "",
    "kvshare_run_length_tokens": "le", "kvshare_runs_by_donor": "donor", "kvshare_runs_by_scope": "scope",
    "kvshare_scan_seconds": "", "kvshare_segment_bytes": "", "kvshare_segment_capacity_bytes": "",
    "kvshare_segment_evictions": "", "kvshare_segments": "", "kvshare_shadow_agreeing_tokens": "", "kvshare_shadow_checks": "",
    "kvshare_shadow_kl_sum": "", "kvshare_shadow_tokens": "", "kvshare_stale_left_tokens": "", "kvshare_tokens": "kind",
    "num_preemptions": "", "num_prompt_tokens_waiting": "", "num_requests_running": "", "num_requests_waiting": "",
    "prefix_cache_hits": "", "prefix_cache_queries": "", "prompt_tokens": "", "replayed_tokens": "", "replicas_lost": "",
    "replicas_up": "", "replicas_wanted": "", "requests_resumed": "", "routed": "reason",
    "selection_attended": "method", "selection_decode_rows": "method", "selection_held": "method", "selection_mass": "method",
    "selection_mass_samples": "method", "selection_refreshes": "method", "selection_reused": "method",
    "selection_selections": "method", "selection_state_bytes": "", "selection_state_capacity_bytes": "",
    "spec_decode_num_accepted_tokens": "", "spec_decode_num_draft_tokens": "", "spec_decode_num_drafts": "",
}  # fmt: skip
"""What the engine tells on /metrics, and the labels beside the model's: names that dashboards hold, not to be changed."""
PLACES = {
    "": "ahead_steps block_size blocks capacity_tokens drafts evicted_blocks graph_failures graph_steps hit_rate "
        "kvshare prefix read_bytes replicas requests selection selection_state settings tenants usage",
    "blocks.full": "cached free in_use total", "drafts": "accepted_tokens drafted_tokens made",
    "prefix": "hit_tokens query_tokens",
    "kvshare": "deviation enabled errands identity_failures left recomputed_share refreshed_tokens rejected_runs requests runs "
               "seconds segments shadow tokens",
    "kvshare.left": "captured_tokens compiled_tokens healed_tokens", "kvshare.seconds": "copy match scan",
    "kvshare.segments": "bytes capacity_bytes count evictions", "kvshare.shadow": "checks kl top1",
    "requests": "preemptions replayed_tokens running waiting", "selection_state": "bytes capacity_bytes",
    "selection.recycled": "attended attended_share covered_mass decode_rows held mass mass_samples refreshes reused selections",
    "tenants.alice": "cached_blocks in_use_blocks reuse_checks segment_bytes tokens",
}  # fmt: skip
"""Keys of /v1/kv, by where they stand."""


@pytest.fixture
def busy(fake):
    """A fake engine that drafted, and of whose two methods one did something."""

    class Busy(fake.FakeEngine):
        async def stats(self):
            methods = {"recycled": MethodStats(decode_rows=3, attended=2.5, held=10), "token_select": MethodStats()}
            kinds = {"tail": 5, "list": 6, "score": 7}
            return dataclasses.replace(await super().stats(), selection=methods, kv_bytes=kinds, drafts=4)

    return Busy()


def test_names_and_labels_on_metrics_are_those_that_dashboards_know(serving, busy):
    with serving(busy).client() as client:
        families = list(text_string_to_metric_families(client.get("/metrics").text))
    labels: dict[str, set[str]] = {}
    for family in families:
        for sample in family.samples:
            labels.setdefault(family.name.removeprefix("kvloom:"), set()).update(sample.labels)
    found = {name: ",".join(sorted(names - {"model_name", "engine"})) for name, names in labels.items()}
    assert {name: label for name, label in found.items() if name in METRICS} == METRICS
    own = {name for name in found if name not in METRICS}
    known = ("request", "time_to_first_token", "inter_token", "e2e_", "engine_info", "stored_response")
    assert all(name.startswith(known) for name in own)


def test_keys_of_kv_are_those_that_scripts_know(serving, busy):
    with serving(busy).client() as client:
        body = client.get("/v1/kv").json()
    for place, keys in PLACES.items():
        at = functools.reduce(lambda part, key: part[key], place.split(".") if place else [], body)
        assert set(at) == set(keys.split()), place
    assert set(body["selection"]) == {"recycled"}, "a method that did nothing is not told of"
    assert body["selection"]["recycled"]["attended_share"] == 0.25 and body["read_bytes"] == {"tail": 5, "list": 6, "score": 7}


@pytest.mark.parametrize("cls", CLASSES)
def test_every_field_is_declared_and_described(cls):
    figures = declared(cls)
    assert {field.name for field in dataclasses.fields(cls)} <= set(figures)
    assert all(figure.of or figure.help.endswith(".") for figure in figures.values())
    assert all(figure.total == "" or figure.total in figures for figure in figures.values())


def values(cls: Any) -> Any:
    """Any instance of a dataclass of figures. Floats are whole: sums of others depend on their order by rounding."""
    counts, names = st.integers(0, 2**40), st.sampled_from("abc")
    special = {
        "name": st.just("full"), "groups": st.lists(st.deferred(lambda: values(GroupStats)), max_size=1).map(tuple),
        "selection": st.dictionaries(names, st.deferred(lambda: values(MethodStats)), max_size=2),
        "share": st.deferred(lambda: values(ShareStats)),
        "failed_tenants": st.dictionaries(names, st.sampled_from(["more", "off"])),
        "reuse_checks": st.sampled_from(CHECKS), "replicas": st.lists(names, max_size=2).map(tuple), "enabled": st.booleans(),
        "requests": st.dictionaries(st.tuples(names, names), counts, max_size=2).map(Counter), "ok": st.booleans(),
        "recovers": st.booleans(),
        "reason": names, "block_size": st.just(16), "replicas_wanted": st.integers(1, 64),
    }  # fmt: skip
    made = {}
    for name, figure in declared(cls).items():
        if name not in {field.name for field in dataclasses.fields(cls)}:
            continue
        if figure.kind == "histogram":
            default = st.lists(counts, min_size=len(figure.bounds), max_size=len(figure.bounds))
        elif name in ("tokens", "runs", "kv_bytes", "graph_steps", "routed"):
            made_of = Counter if name in ("tokens", "runs") else dict
            default = st.dictionaries(st.sampled_from(KINDS), counts, max_size=3).map(made_of)
        else:
            default = counts
        made[name] = special.get(name, default)
    return st.builds(cls, **made)


@pytest.mark.parametrize("cls", CLASSES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_sums_do_not_depend_on_brackets_and_nothing_adds_nothing(cls, data):
    a, b, c = (data.draw(values(cls)) for _ in range(3))
    assert (a + b) + c == a + (b + c)
    if cls is not GroupStats:  # a group has a name
        assert cls() + a == a == a + cls()


def test_what_replicas_tell_together(fake):
    one = asyncio.run(fake.FakeEngine().stats())
    a = dataclasses.replace(one, replicas=("a",), selection={"recycled": MethodStats(decode_rows=1, attended=1, held=4)})
    share = dataclasses.replace(one.share, enabled=False, failed_tenants={"t": "more", "u": "off"})
    b = dataclasses.replace(
        one, replicas=("b",), share=share, selection={"recycled": MethodStats(decode_rows=2, attended=2, held=4)}, block_size=16
    )
    both = a + b
    assert both.replicas == ("a", "b") and both.capacity_tokens == 3200 and both.block_size == 16
    assert both.step_times[:3] == [6, 0, 4] and both.step_times_sum == 1.0
    assert [(group.name, group.total) for group in both.groups] == [("full", 200), ("local", 80)]
    assert both.hit_rate == 0.25 and both.kv_usage == 0.1, "shares are made of sums"
    assert both.selection["recycled"] == MethodStats(decode_rows=3, attended=3, held=8)
    assert (
        both.share.tokens["stale"] == 120 and not both.share.enabled and both.share.failed_tenants == {"t": "more", "u": "off"}
    )
    assert sum([a, b], EngineStats()) == both
    tenant = TenantStats(cached_blocks=2, tokens={"fresh": 1}) + TenantStats(cached_blocks=3, reuse_checks="off")
    assert tenant == TenantStats(cached_blocks=5, tokens={"fresh": 1}, reuse_checks="off")
    health = Health(ok=True) + Health(ok=False, reason="gone")
    assert (health.ok, health.reason) == (False, "gone")


def test_histograms_are_told_with_their_sums_and_ratios_of_nothing_as_nothing():
    figures = {name: value for name, _, value in told(EngineStats())}
    assert figures["engine_step_time_seconds"] == ([0] * 16, 0) and figures["kvshare_run_length_tokens"] == ([0] * 7, None)
    assert placed(EngineStats())["kvshare"]["deviation"] is None and placed(EngineStats())["hit_rate"] == 0.0
    assert not any(isinstance(value, float) and math.isnan(value) for value in figures.values())
