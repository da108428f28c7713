"""EngineClient: the one seam between HTTP and the engine. A thread, a process or a Ray handle can stand behind it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvloom.engine.request import OPENAI_SAMPLING, KVOptions, RequestOutput, SamplingDefaults, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What a client may know of the model that is served."""

    name: str
    root: str
    """Where the weights came from: path or repo id."""
    max_model_len: int
    vocab_size: int
    dtype: str
    weights: str
    backend: str
    created: int
    """Unix seconds at which the server loaded it."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Engine settings that are not at their default, by their flat name."""
    threads: str = ""
    """How many threads compute, and on what: "2 on 2 cores"."""
    sampling: SamplingDefaults = OPENAI_SAMPLING
    """What requests that do not say are sampled with."""
    weights_held: str = ""
    """What the mode `weights` came to and why: layers int4 (the file's codes), head int8 (rounded from BF16)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStats:
    """Blocks of one head group."""

    name: str
    total: int
    free: int
    cached: int
    """Unused by any request but still holding a reusable prefix."""
    in_use: int


@dataclass(slots=True)
class MethodStats:
    """What one method did since start-up, summed over layers and requests: proof that it does something, and how much."""

    decode_rows: int = 0
    """Decode rows of requests that use the method (not times layers)."""
    attended: float = 0.0
    """Positions those rows read, mean over KV heads, summed over layers."""
    held: int = 0
    """Positions they could have read, summed over layers."""
    selections: int = 0
    """Lists made (one per row and layer)."""
    reused: int = 0
    """Lists used again without a new selection: Selection Cache hits, reuse between layers or between steps."""
    refreshes: int = 0
    """Lists made anew because a stride or a trigger said so (Recycled), or KV corrected (TidalDecode)."""
    mass: float = 0.0
    """Sum of sampled covered attention mass, each in [0, 1]; see `mass_samples`."""
    mass_samples: int = 0


RUN_LENGTHS = (64, 128, 256, 512, 1024, 2048, 1 << 30)
SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
"""Upper bounds of the buckets that `ShareStats` counts in."""


@dataclass(slots=True)
class ShareStats:
    """What approximate reuse (KVShare) did since start-up. Token counts are of prompts; seconds are the engine's own."""

    tokens: Counter[str] = field(default_factory=Counter)
    """By kind: prefix (exact), stale (reused as copied), boundary and ranked (reused, then computed), rejected, fresh."""
    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By (path, reason): path is full, prefix or segment; the reason says why nothing was reused."""
    runs: Counter[str] = field(default_factory=Counter)
    """Runs that were reused, by the kind of donor: context, isolated; and by whose: own, group, public."""
    run_lengths: list[int] = field(default_factory=lambda: [0] * len(RUN_LENGTHS))
    """Runs by length: [i] counts those of at most RUN_LENGTHS[i] tokens and more than the bound before."""
    recomputed_shares: list[int] = field(default_factory=lambda: [0] * len(SHARES))
    """Requests by the share of reused tokens that were computed after all, in the same way."""
    match_seconds: float = 0.0
    copy_seconds: float = 0.0
    scan_seconds: float = 0.0
    copied_tokens: int = 0
    deviation_sum: float = 0.0
    """Of runs, mean relative deviation at the check layer."""
    deviation_runs: int = 0
    rejected_runs: int = 0
    identity_failures: int = 0
    """Requests whose copied KV contradicted the model at layer 0: never, unless something is broken."""
    refreshed_tokens: int = 0
    """Computed again in decode steps."""
    stale_left: int = 0
    """Still stale when their request ended."""
    captured_tokens: int = 0
    """Left behind as segments, in context."""
    compiled_tokens: int = 0
    """Compiled in isolation."""
    healed_tokens: int = 0
    """Prompt tokens computed again in full when the engine was idle."""
    shadow_checks: int = 0
    shadow_tokens: int = 0
    shadow_kl: float = 0.0
    """Sum over those tokens of KL(full || reused), nats."""
    shadow_agree: int = 0
    """Of those tokens, with the same likeliest token."""
    enabled: bool = True
    """False once shadow checks have switched approximate reuse off for any tenant."""
    failed_tenants: Mapping[str, str] = field(default_factory=dict)
    """Tenants whose shadow checks failed, and what follows for them: "more" is computed, or reuse is "off"."""
    segments: int = 0
    segment_bytes: int = 0
    segment_capacity: int = 0
    segment_evictions: int = 0
    errands: int = 0
    """Work that waits for an idle engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantStats:
    """What one tenant holds now, and what approximate reuse did for it."""

    in_use_blocks: int = 0
    cached_blocks: int = 0
    segment_bytes: int = 0
    tokens: Mapping[str, int] = field(default_factory=dict)
    """Prompt tokens by kind, as in `ShareStats.tokens`."""
    reuse_checks: str = "passed"
    """What shadow checks of its requests have come to: "passed", "recomputes more" or "off"."""


OTHERS = "(other)"
"""In place of tenants that have not been here for long: their counts together."""


STEP_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, math.inf)
STEP_PROMPT_ROWS = (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, math.inf)
"""Upper bounds of the buckets that `EngineStats` counts steps in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot of the engine, cheap to take however many tenants there are. Counters run since start-up; times in seconds."""

    running: int
    waiting: int
    capacity_tokens: int
    block_size: int
    groups: tuple[GroupStats, ...]
    prefix_query_tokens: int
    """Prompt tokens looked up in the prefix cache."""
    prefix_hit_tokens: int
    evicted_blocks: int
    preemptions: int
    prompt_tokens: int
    """Prompt tokens of requests that got their first token, reused ones included."""
    generation_tokens: int
    steps: int
    step_seconds: float
    """Time spent in steps."""
    step_times: tuple[int, ...] = (0,) * len(STEP_SECONDS)
    """Steps that computed something, by time: [i] counts those of at most STEP_SECONDS[i] and more than the bound before."""
    step_times_sum: float = 0.0
    """What those took together."""
    step_prompt_rows: tuple[int, ...] = (0,) * len(STEP_PROMPT_ROWS)
    """The same steps by their rows of prompts (those computed anew as well), likewise."""
    step_prompt_rows_sum: int = 0
    """Rows of prompts of all steps."""
    queued_tokens: int
    """Prompt tokens of waiting requests."""
    kv_bytes_read: int
    kv_bytes: Mapping[str, int] = field(default_factory=dict)
    """The same by kind: tail (contiguous ranges, dense rows among them), list (positions chosen by selection methods), score
    (keys read to choose them)."""
    selection: Mapping[str, MethodStats] = field(default_factory=dict)
    """What every selection method did."""
    drafts: int = 0
    """Dense verifications of drafts, tokens drafted for them, and how many of those were kept."""
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    replayed_tokens: int = 0
    """Generated tokens that were computed again as decode rows after a preemption."""
    selection_bytes: int = 0
    """Memory of what selection methods (and retention) remember of running requests."""
    selection_capacity: int = 0
    """The most that may be."""
    share: ShareStats = field(default_factory=ShareStats)
    """What approximate reuse did."""
    internal_errors: int = 0
    """Requests that ended because something of the engine's own failed, and steps that failed with nobody to blame."""

    @property
    def kv_usage(self) -> float:
        """Share of blocks in use by requests, 0 to 1, of the fullest group."""
        return max((g.in_use / g.total for g in self.groups if g.total), default=0.0)

    @property
    def hit_rate(self) -> float:
        """Prefix hit tokens over tokens looked up, 0 to 1."""
        return self.prefix_hit_tokens / self.prefix_query_tokens if self.prefix_query_tokens else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """`ok` while the engine loop turns; otherwise `reason` says why not."""

    ok: bool
    reason: str = ""


class EngineClient(Protocol):
    """What the HTTP side may ask of an engine. All methods are called on the event loop and never block it."""

    model: ModelInfo
    tokenizer: Any
    """A `kvloom.engine.text.Tokenizer`."""

    def generate(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        request_id: str,
        kv: KVOptions = KVOptions(),
        priority: int = 0,
        tenant: str = "",
        cache_salt: str = "",
    ) -> AsyncIterator[RequestOutput]:
        """Outputs of one request until one has a finish_reason. Closing the iterator early aborts the request.

        Raises InvalidRequestError (before the first output) if it can never be served, OverloadedError if too much waits,
        EngineDeadError if the engine has ended or ends.
        """
        ...

    def reserve(self, tenant: str, tokens: int) -> AbstractContextManager[object]:
        """Room for a prompt of about so many tokens that is still being encoded. Raises OverloadedError if too much waits
        already: then there is no use in encoding it."""
        ...

    def abort(self, request_id: str) -> None:
        """End a request: its blocks return before the next step, its full blocks stay reusable. Unknown ids are ignored."""
        ...

    async def explain(self, prompt: Sequence[int], *, tenant: str = "", cache_salt: str = "") -> Mapping[str, Any]:
        """What a prompt would reuse now, without running it. Raises as `generate` does."""
        ...

    async def purge(self, tenant: str) -> int:
        """Forget a tenant's segments of approximate reuse. Returns how many. Raises as `generate` does."""
        ...

    async def tenants(self, names: Sequence[str] | None = None) -> Mapping[str, TenantStats]:
        """What these tenants hold, or all that are known; the tenant of requests without one is ''. Raises EngineDeadError."""
        ...

    def stats(self) -> EngineStats:
        """Counters as of the last step."""
        ...

    def health(self) -> Health: ...

    def close(self) -> None:
        """End all requests and the engine. Idempotent."""
        ...
