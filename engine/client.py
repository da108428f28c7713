"""EngineClient: the one seam between HTTP and the engine. A thread, a process or a Ray handle can stand behind it.

All that crosses it can be pickled, errors too. What stays beside whoever asks: `model`, the tokenizer (`engine.startup.prepare`
makes it from the model's files), and the places of `reserve`. Where several engines serve the same, `everywhere` says which
questions are for all of them, and how their answers make one; the others are for the one that a request goes to.
"""

from __future__ import annotations

import operator
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from kvloom.engine.requests.figures import Merge, gauge, merged, note, table
from kvloom.engine.requests.request import KVOptions, RequestOutput
from kvloom.engine.requests.sampling import OPENAI_SAMPLING, SamplingDefaults, SamplingParams
from kvloom.engine.requests.stats import (
    OTHERS,
    RUN_LENGTHS,
    SHARES,
    EngineStats,
    GroupStats,
    MethodStats,
    ShareStats,
    TenantStats,
)

__all__ = ["OTHERS", "RUN_LENGTHS", "SHARES", "EngineClient", "EngineStats", "GroupStats", "Health", "MethodStats", "ModelInfo",
           "ShareStats", "TenantStats"]  # fmt: skip


OPENAI_SOURCE = "OpenAI's defaults"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What a client may know of the model that is served."""

    name: str
    root: str
    """Where the weights came from: path or repo id."""
    source: str = ""
    """The setting `model`: what finds the model's files (`engine.startup.catalog.resolve`). Not for clients of the API."""
    replica: str = "0"
    """Which of the engines that serve the same."""
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
    """What requests that do not say are sampled with,"""
    sampling_source: str = OPENAI_SOURCE
    """and who says so: generation_config.json, the model's card, ..."""
    other_names: tuple[str, ...] = ()
    """Names beside `name` that requests may ask for."""
    chat_template: str | None = None
    """Jinja source of the chat template that the operator gave; None for the model's own."""
    weights_held: str = ""
    """What the mode `weights` came to and why: layers int4 (the file's codes), head int8 (rounded from BF16)."""
    build: str = ""
    """Which build of the kernels runs, as "x86-64-v3, ready-made"; empty where there is but one."""
    paths: str = ""
    """Which loops that build takes, by rows, for people to read; empty where there is no choice."""
    device: str = "cpu"
    """Where weights and KV are: cpu or cuda."""
    device_note: str = ""
    """Which one that is, or why it is no other; empty for a CPU that was named."""
    attention: str = ""
    """The library that attends for rows that see everything, if that is not the backend itself."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that requests may ask for; answers bear the first."""
        return (self.name, *self.other_names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """`ok` while the engine loop turns; otherwise `reason` says why not."""

    ok: bool = gauge("1 while the engine runs.", "engine_up", default=True, merge=min)
    reason: str = note("Why not.", merge=lambda a, b: a or b)
    recovers: bool = note("Whether it is being brought back.", default=False, merge=lambda a, b: a or b)
    __add__ = merged


Method = TypeVar("Method", bound=Callable[..., Any])


def everywhere(fold: Merge) -> Callable[[Method], Method]:
    """Mark a method that concerns every engine that serves the same. fold: makes one answer of two."""

    def mark(method: Method) -> Method:
        method.fold = fold  # type: ignore[attr-defined]
        return method

    return mark


def fold_of(name: str) -> Merge | None:
    """How the answers of all engines to this method make one; None if it is for one engine."""
    fold: Merge | None = getattr(getattr(EngineClient, name), "fold", None)
    return fold


class EngineClient(Protocol):
    """What the HTTP side may ask of an engine. All methods but `close` are called on the event loop and never block it."""

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
        """Outputs of one request until one has a finish_reason. Closing the iterator early aborts the request. With
        `kv.everywhere` every engine is to do it.

        Raises InvalidRequestError (before the first output) if it can never be served, OverloadedError if too much waits,
        EngineDeadError if the engine has ended or ends.
        """
        ...

    def reserve(self, tenant: str, tokens: int) -> AbstractContextManager[object]:
        """Room for a prompt of about so many tokens that is still being encoded here. Raises OverloadedError if too much waits
        already: then there is no use in encoding it."""
        ...

    @everywhere(lambda a, b: None)
    async def abort(self, request_id: str) -> None:
        """End a request: its blocks return before the next step, its full blocks stay reusable. Unknown ids are ignored."""
        ...

    async def explain(self, prompt: Sequence[int], *, tenant: str = "", cache_salt: str = "") -> Mapping[str, Any]:
        """What a prompt would reuse now, without running it. Raises as `generate` does."""
        ...

    async def peek(self, prompt: Sequence[int], *, tenant: str = "", cache_salt: str = "") -> int:
        """Tokens of a prompt's beginning whose KV is held now, for who chooses an engine: of a prompt that is computed densely,
        as with all methods but those that compute prompts sparsely or look at their last rows. Cheap; changes nothing, not even
        what is evicted next. Raises EngineDeadError."""
        ...

    @everywhere(operator.add)
    async def purge(self, tenant: str) -> int:
        """Forget a tenant's segments of approximate reuse. Returns how many. Raises as `generate` does."""
        ...

    @everywhere(table)
    async def reset(self) -> Mapping[str, int]:
        """Forget all KV that no request holds, of every tenant: cached prefixes and segments of approximate reuse. Returns how
        many `blocks` and `segments` that were. Raises EngineDeadError, and OverloadedError if too many questions wait."""
        ...

    @everywhere(table)
    async def tenants(self, names: Sequence[str] | None = None) -> Mapping[str, TenantStats]:
        """What these tenants hold, or all that are known; the tenant of requests without one is ''. Raises EngineDeadError."""
        ...

    @everywhere(operator.add)
    async def stats(self) -> EngineStats:
        """What is known of the engine, at once: figures as of its last step, or as they came last. Raises nothing."""
        ...

    @everywhere(operator.add)
    async def health(self) -> Health:
        """Whether the engine's loop turns, at once. Raises nothing."""
        ...

    def close(self) -> None:
        """End the requests of this client, and the engine if it is nobody else's. Blocks until that is done; idempotent."""
        ...
