"""The way of a request into the queue: what it is checked against, and what it is given of every part.

Whatever is taken is held (`isolation.Holdings`): it goes back when the request ends, or at once if it cannot be queued.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

from kvloom.engine.bounds import shown
from kvloom.engine.cache import BlockTable, CacheManager
from kvloom.engine.cache.prefix import DomainFactory
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.requests.lifecycle import Features
from kvloom.engine.requests.request import PRIORITIES, KVOptions, Request
from kvloom.engine.requests.state import StateMemory
from kvloom.engine.scheduling.limits import Limits
from kvloom.engine.selection.base import Correcting, Selector, extrapolates
from kvloom.engine.selection.policies import Selectors

Hold = Callable[..., None]
"""See `Holdings.opening`."""


@dataclass(slots=True, kw_only=True)
class Admission:
    """The parts that have a say in whether and how a request can be served."""

    limits: Limits
    cache: CacheManager
    domains: DomainFactory
    selectors: Selectors
    states: StateMemory
    features: Features
    reuse: str
    """Where KV comes from unless a request says otherwise."""
    uses_priority: bool
    """Whether the server's order looks at priorities."""

    def open(self, request: Request, sequence: int, hold: Hold) -> BlockTable:
        """Check a request and fill in what its options resolve to. Returns its table, which is the caller's to give back.

        Raises InvalidRequestError naming what cannot be served.
        """
        for feature in self.features:
            hold(feature.closed, request)
        self._check_priority(request.priority)
        for feature in self.features:
            feature.received(request)
        kv = request.kv if request.kv.segment is None else replace(request.kv, selection="dense")
        selector = self._resolve(request, kv, sequence)
        reuse = request.kv.reuse_or(self.reuse)
        self._check_reuse(request, reuse)
        for feature in self.features:
            feature.opened(request)
        if selector is not None:
            hold(self.selectors.close, selector, request)
            self.selectors.open(selector, request)
        method = "kvshare compile" if kv.segment is not None else selector.domain if selector is not None else ""
        return self.cache.open(
            self.domains.domain(request.tenant, request.cache_salt, method),
            publishes=reuse != "off" and kv.share != "none",
            looks_up=reuse != "off" and request.sampling.prompt_logprobs is None,  # every prompt row must be computed
            align=max(1, selector.grid) if selector else 1,
            leaves=max(1, selector.tail) if selector else 1,
        )

    def _check_priority(self, priority: int) -> None:
        if type(priority) is not int or not PRIORITIES.holds(priority):
            raise InvalidRequestError(f"priority is {shown(priority)}; allowed: {PRIORITIES}", param="priority")
        if priority and not self.uses_priority:
            raise InvalidRequestError(
                f"priority is {priority}, but this server runs requests as they come; start it with --scheduler priority, or "
                "leave priority out",
                param="priority",
            )

    def _resolve(self, request: Request, kv: KVOptions, sequence: int) -> Selector | None:
        """Its selector, limit, seed and tokens."""
        selector, request.draft_tokens = self.selectors.policy(kv)
        prompt, sampling = request.prompt, request.sampling
        request.token_limit = self.limits.check(
            len(prompt),
            max(prompt, default=0),
            min(prompt, default=0),
            sampling,
            request.kv,
            extrapolates=extrapolates(selector),
        )
        request.tokens = list(prompt)
        request.seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        request.sequence = sequence
        request.selector = selector
        if not self.states.could_fit(request):
            raise self.selectors.too_large(kv, self.states.selection_bound)
        if (
            selector is not None and isinstance(selector, Correcting) and not request.draft_tokens
        ):  # verification leaves nothing approximate
            request.correct_every = selector.correct_every
        return selector

    def _check_reuse(self, request: Request, reuse: str) -> None:
        """Raises InvalidRequestError if options of approximate reuse are given without it."""
        kv = request.kv
        if reuse != "approx" and (kv.reuse_options or (kv.share not in (None, "none") and not request.internal)):
            name = "kvshare" if kv.reuse_options else "share"
            raise InvalidRequestError(
                f"kv.{name} is given, but kv.reuse is {reuse}; set kv.reuse to approx, or leave it out", param=f"kv.{name}"
            )
