"""What an engine tells of itself: every figure's declaration (`engine.requests.figures`), and nothing else.

Counters run since start-up. Seconds are the engine's own, token counts of approximate reuse are of prompts.
"""

from __future__ import annotations

import functools
import math
import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from kvloom.engine.constraint.options import COMPILE_SECONDS
from kvloom.engine.requests.figures import counter, derived, gauge, histogram, merged, nested, note, ratio, table

RUN_LENGTHS = (64, 128, 256, 512, 1024, 2048, 1 << 30)
SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
STEP_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, math.inf)
STEP_PROMPT_ROWS = (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, math.inf)
KINDS = ("prefix", "stale", "boundary", "ranked", "rejected", "fresh")
"""What becomes of a prompt's tokens: reused exactly; reused as copied; reused, then computed (first of a run, by rank, in a run
that was far off); never reused."""
CHECKS = ("passed", "recomputes more", "off")
"""What shadow checks of a tenant's requests may have come to, the worst last."""
ROUTED = ("affinity", "guard", "hash")
"""Why a request was sent to a replica: it holds much of the prompt; too much waits where it is held; nobody holds enough."""
OTHERS = "(other)"
"""In place of tenants that have not been here for long: their counts together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStats:
    """Blocks of one head group."""

    name: str = note("Of the head group.", merge=max)
    total: int = gauge("Blocks there are.", kv="total")
    free: int = gauge("Blocks that hold nothing.", kv="free")
    cached: int = gauge("Blocks that no request uses, but that still hold a reusable prefix.", kv="cached")
    in_use: int = gauge("Blocks that requests hold.", kv="in_use")
    __add__ = merged


@dataclass(slots=True)
class MethodStats:
    """What one selection method did, summed over layers and requests: proof that it does something, and how much."""

    decode_rows: int = counter("Decode rows of requests that use the method.", kv="decode_rows")
    attended: float = counter("Positions that those rows read, mean over KV heads, summed over layers.", kv="attended")
    held: int = counter("Positions that they could have read, summed over layers.", kv="held")
    selections: int = counter("Lists of positions made, one per row and layer.", kv="selections")
    reused: int = counter("Lists used again without a new selection.", kv="reused")
    refreshes: int = counter("Lists or KV made anew because a stride, a trigger or a correction said so.", kv="refreshes")
    mass: float = counter("Attention mass covered by what was read, summed over the samples.", kv="mass")
    mass_samples: int = counter("Samples of covered attention mass, against a shadow dense pass.", kv="mass_samples")
    attended_share = ratio("attended", "held", "Positions read of those that could have been.", kv="attended_share")
    covered_mass = ratio("mass", "mass_samples", "Mean of the attention mass that was covered.", kv="covered_mass")
    __add__ = merged


@dataclass(slots=True)
class ShareStats:
    """What approximate reuse (KVShare) did."""

    tokens: Counter[str] = counter(
        "Prompt tokens by what became of them.", default=Counter, by=("kind",), keys=KINDS, kv="tokens"
    )
    requests: Counter[tuple[str, str]] = counter(
        "Requests by path, and why nothing was reused.", default=Counter, by=("path", "reason")
    )
    """By (path, reason): path is full, prefix or segment; the reason says why nothing was reused."""
    runs: Counter[str] = counter("Runs that were reused, by donor and by whose they were.", None, default=Counter, kv="runs")
    run_lengths: list[int] = histogram("Tokens of a run that was reused.", RUN_LENGTHS, "run_length_tokens")
    recomputed_shares: list[int] = histogram("Share of reused tokens that was computed.", SHARES, "recomputed_ratio")
    match_seconds: float = counter("Time spent finding segments.", kv="seconds.match")
    copy_seconds: float = counter("Time spent copying and turning KV.", kv="seconds.copy")
    scan_seconds: float = counter("Time spent ranking copied tokens.", kv="seconds.scan")
    copied_tokens: int = counter("Prompt tokens whose KV was copied from donors.", None)
    deviation_sum: float = counter("Relative deviation at the check layer, summed over runs.")
    deviation_runs: int = counter("Runs whose deviation was measured.")
    rejected_runs: int = counter("Runs computed because they deviated too far.", kv="rejected_runs")
    identity_failures: int = counter("Requests whose copied KV contradicted the model at layer 0.", kv="identity_failures")
    """Never, unless something is broken."""
    refreshed_tokens: int = counter("Reused tokens computed again in decode steps.", kv="refreshed_tokens")
    stale_left: int = counter("Reused tokens still as copied when their request ended.", "stale_left_tokens")
    captured_tokens: int = counter("Prompt tokens left behind as segments.", kv="left.captured_tokens")
    compiled_tokens: int = counter("Tokens compiled alone.", kv="left.compiled_tokens")
    healed_tokens: int = counter("Prompt tokens computed again in full by an idle engine.", kv="left.healed_tokens")
    shadow_checks: int = counter("Requests that reused KV and were computed again in full to compare.", kv="shadow.checks")
    shadow_tokens: int = counter("Tokens compared by shadow checks.")
    shadow_kl: float = counter("KL of full against reused, nats, summed over those tokens.", "shadow_kl_sum")
    shadow_agree: int = counter("Of those, with the same likeliest token.", "shadow_agreeing_tokens")
    segment_evictions: int = counter("Segments given up for others.", kv="segments.evictions")
    enabled: bool = gauge(
        "0 once shadow checks have switched approximate reuse off for any tenant.", default=True, merge=min, kv="enabled"
    )
    failed_tenants: Mapping[str, str] = note(
        "Tenants whose shadow checks failed: more is computed, or reuse is off.",
        default=dict, merge=functools.partial(table, merge=max),
    )  # fmt: skip
    segments: int = gauge("Segments in the store.", kv="segments.count")
    segment_bytes: int = gauge("Bytes of their KV.", kv="segments.bytes")
    segment_capacity: int = gauge("Bytes there are for them.", "segment_capacity_bytes", kv="segments.capacity_bytes")
    errands: int = gauge("Pieces of work that wait for an idle engine.", kv="errands")
    reused_tokens = derived("counter", "Prompt tokens whose KV was reused as it was copied.", lambda s: s.tokens["stale"])
    recomputed_tokens = derived(
        "counter", "Prompt tokens that donors had, and that were computed.",
        lambda s: s.tokens["boundary"] + s.tokens["ranked"] + s.tokens["rejected"],
    )  # fmt: skip
    found_tokens = derived("counter", "Prompt tokens that donors had.", lambda s: s.reused_tokens + s.recomputed_tokens, None)
    recomputed_share = ratio("recomputed_tokens", "found_tokens", "Of those, the computed ones.", kv="recomputed_share")
    runs_by_donor = derived(
        "counter", "Runs that were reused, by donor.", lambda s: {kind: s.runs[kind] for kind in ("context", "isolated")},
        by=("donor",),
    )  # fmt: skip
    runs_by_scope = derived(
        "counter", "Runs that were reused, by scope.", lambda s: {kind: s.runs[kind] for kind in ("tenant", "group", "public")},
        by=("scope",),
    )  # fmt: skip
    requests_told = derived(
        "counter", "The requests, one object for each path and reason.",
        lambda s: [{"path": path, "reason": why or None, "count": n} for (path, why), n in sorted(s.requests.items())],
        None, kv="requests",
    )  # fmt: skip
    deviation = ratio("deviation_sum", "deviation_runs", "Mean relative deviation at the check layer.", kv="deviation")
    mean_kl = ratio("shadow_kl", "shadow_tokens", "Mean KL of full against reused, nats.", kv="shadow.kl")
    top1 = ratio("shadow_agree", "shadow_tokens", "Share of tokens with the same likeliest one.", kv="shadow.top1")
    __add__ = merged


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantStats:
    """What one tenant holds now, and what approximate reuse did for it."""

    in_use_blocks: int = gauge("KV blocks that its requests hold.")
    cached_blocks: int = gauge("KV blocks that hold reusable prefixes of its requests.")
    segment_bytes: int = gauge("Bytes of its segments.")
    tokens: Mapping[str, int] = counter("Prompt tokens by fate, where KVShare serves.", default=dict, by=("kind",))
    reuse_checks: str = note(
        "What shadow checks of its requests have come to: one of `CHECKS`.",
        default=CHECKS[0], merge=lambda a, b: max(a, b, key=CHECKS.index),
    )  # fmt: skip
    __add__ = merged


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantFigures:
    """What /metrics tells of tenants."""

    tenants: Mapping[str, TenantStats] = nested(TenantStats, "tenant", by=("tenant",))


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """A snapshot of the engine, or the sum of several, cheap to take however many tenants there are."""

    replicas: tuple[str, ...] = note(
        "The engines it is of, by their setting `replica`.", default=(), merge=operator.add, kv="replicas"
    )
    replicas_up = derived("gauge", "Engines that these figures are of.", lambda s: len(s.replicas))
    replicas_wanted: int = gauge("Engines that there should be, at least.", default=1, merge=max)
    replicas_lost: int = counter("Replicas that ended before they had drained: killed, crashed or hanging.")
    requests_resumed: int = counter("Times that another replica took up a request whose own was lost.")
    routed: Mapping[str, int] = counter(
        "Requests sent to a replica, by why to that one.", default=dict, by=("reason",), keys=ROUTED
    )
    """By the reasons of `deploy.placement.Choice`. These four are counted in front of replicas, and by no engine."""
    running: int = gauge("Requests that the engine computes.", "num_requests_running", kv="requests.running")
    waiting: int = gauge("Requests that wait for their turn.", "num_requests_waiting", kv="requests.waiting")
    queued_tokens: int = gauge("Prompt tokens of waiting requests.", "num_prompt_tokens_waiting")
    capacity_tokens: int = gauge("Tokens whose KV fits in the cache.", "kv_cache_capacity_tokens", kv="capacity_tokens")
    block_size: int = gauge("Tokens per block.", None, merge=max, kv="block_size")
    groups: tuple[GroupStats, ...] = note(
        "Blocks of every head group.", default=(),
        merge=lambda a, b: tuple(table({g.name: g for g in a}, {g.name: g for g in b}).values()),
    )  # fmt: skip
    prefix_query_tokens: int = counter(
        "Prompt tokens looked up in the prefix cache.", "prefix_cache_queries", kv="prefix.query_tokens"
    )
    prefix_hit_tokens: int = counter("Prompt tokens found in the prefix cache.", "prefix_cache_hits", kv="prefix.hit_tokens")
    evicted_blocks: int = counter(
        "Cached blocks given up, for other requests or by a reset.", "kv_evicted_blocks", kv="evicted_blocks"
    )
    preemptions: int = counter("Requests put back to free their blocks.", "num_preemptions", kv="requests.preemptions")
    replayed_tokens: int = counter(
        "Generated tokens computed again after preemption, one step each.", kv="requests.replayed_tokens"
    )
    prompt_tokens: int = counter("Prompt tokens of all requests.")
    """Of those that got their first token, reused ones included."""
    generation_tokens: int = counter("Generated tokens of all requests.")
    steps: int = counter("Steps of the engine.", "engine_steps")
    step_seconds: float = counter("Time spent in steps.", "engine_step_seconds")
    step_times: list[int] = histogram(
        "Time of a step that computed something.", STEP_SECONDS, "engine_step_time_seconds", total="step_times_sum"
    )
    step_times_sum: float = counter("Time spent in those steps.", None)
    step_prompt_rows: list[int] = histogram(
        "Rows of prompts in such a step.", STEP_PROMPT_ROWS, "engine_step_prompt_rows", total="step_prompt_rows_sum"
    )
    step_prompt_rows_sum: int = counter("Rows of prompts of all steps, those computed anew as well.", None)
    grammars_waiting: int = gauge("Requests that wait for their grammar to be compiled.", "num_grammars_waiting")
    grammar_times: list[int] = histogram(
        "Time in which a grammar was compiled, or found to be none.", COMPILE_SECONDS, "grammar_compile_seconds",
        total="grammar_times_sum",
    )  # fmt: skip
    grammar_times_sum: float = counter("Time in which grammars were compiled.", None)
    graph_steps: Mapping[str, int] = counter(
        "Steps by how much of them was replayed from a captured graph: full, piecewise (all but attention), none.",
        "engine_graph_steps", default=dict, by=("mode",), keys=("full", "piecewise", "none"), kv="graph_steps",
    )  # fmt: skip
    ahead_steps: int = counter(
        "Steps that were launched before the tokens of the one in front were known.", "engine_ahead_steps", kv="ahead_steps"
    )
    graph_failures: int = counter(
        "Captures of steps that failed: such steps run eagerly since.", "engine_graph_capture_failures", kv="graph_failures"
    )
    kv_bytes: Mapping[str, int] = counter(
        "Bytes of keys and values that attention had to read.", "kv_read_bytes", default=dict, by=("kind",), kv="read_bytes"
    )
    """By kind: tail (contiguous ranges, dense rows among them), list (positions chosen by selection methods), score (keys read
    to choose them)."""
    selection: Mapping[str, MethodStats] = nested(MethodStats, "selection", by=("method",))
    selection_bytes: int = gauge(
        "Bytes that selection methods remember of running requests.", "selection_state_bytes", kv="selection_state.bytes"
    )
    """Those of retention among them."""
    selection_capacity: int = gauge(
        "The most that may be.", "selection_state_capacity_bytes", kv="selection_state.capacity_bytes"
    )
    drafts: int = counter("Dense verifications of drafted tokens.", "spec_decode_num_drafts", kv="drafts.made")
    drafted_tokens: int = counter("Tokens drafted by sparse steps.", "spec_decode_num_draft_tokens", kv="drafts.drafted_tokens")
    accepted_tokens: int = counter(
        "Drafted tokens that verification kept.", "spec_decode_num_accepted_tokens", kv="drafts.accepted_tokens"
    )
    share: ShareStats = nested(ShareStats, "kvshare", kv="kvshare")
    internal_errors: int = counter("Requests and steps that failed inside the engine.", "engine_internal_errors")
    """Requests that ended because something of the engine's own failed, and steps that failed with nobody to blame."""
    kv_bytes_read = derived("counter", "Bytes of keys and values of all kinds.", lambda s: sum(s.kv_bytes.values()), None)
    kv_usage = derived(
        "gauge", "Share of KV blocks in use by requests, 0 to 1.",
        lambda s: max((group.in_use / group.total for group in s.groups if group.total), default=0.0),
        "kv_cache_usage_perc", kv="usage",
    )  # fmt: skip
    """Of the fullest head group."""
    hit_rate = ratio("prefix_hit_tokens", "prefix_query_tokens", "Of tokens looked up, those found.", kv="hit_rate", empty=0.0)
    blocks = derived("gauge", "Head groups by name.", lambda s: {group.name: group for group in s.groups}, None, kv="blocks")
    kv_blocks = derived(
        "gauge", "KV blocks by head group and state.",
        lambda s: {(g.name, state): getattr(g, state) for g in s.groups for state in ("free", "cached", "in_use")},
        by=("group", "state"),
    )  # fmt: skip
    methods = derived(
        "counter", "Selection methods that did something.",
        lambda s: {name: method for name, method in s.selection.items() if method.decode_rows}, None, kv="selection",
    )  # fmt: skip
    __add__ = merged
