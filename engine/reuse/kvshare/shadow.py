"""Shadow checks: some requests that reused KV are computed again in full when the engine is idle, and compared.

sampled     the log-probabilities of the first tokens of the answer are kept
idle        the same prompt in full, forced to the same answer: KL(full || reused) and the likeliest token, per token
bad window  at first more is recomputed; if that does not help, approximate reuse is switched off

Judged per tenant: whoever sends prompts that reuse serves badly turns it off for itself, not for others. And only by requests
that leave the server's own options as they are: what a request chose for itself says nothing about them.
"""

from __future__ import annotations

import logging
import random
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvloom.engine.client import ShareStats
from kvloom.engine.requests.request import Request
from kvloom.engine.reuse.kvshare.jobs import Job, JobQueue
from kvloom.engine.reuse.kvshare.options import RATIOS, ShareOptions

log = logging.getLogger("kvloom.engine")

TOKENS = 16
"""Tokens of an answer that are compared."""
WINDOW, LEAST = 32, 8
"""Checks that are looked at together, and the fewest that decide."""


MOST_TENANTS = 1024
"""Tenants whose checks are remembered: the one that was checked longest ago is forgotten, and begins anew."""


@dataclass(slots=True)
class Quality:
    """What checks of one tenant's requests have shown."""

    enabled: bool = True
    """False once they have failed for good."""
    least_ratio: float = 0.0
    """Reused tokens that are computed at least, since checks have failed once."""
    window: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    """Mean KL and share of equal likeliest tokens, of the last checks."""
    checks: int = 0


_UNKNOWN = Quality()


class Shadow:
    """Samples, compares, and decides."""

    def __init__(self, options: ShareOptions, jobs: JobQueue, stats: ShareStats) -> None:
        self._options, self._jobs, self._stats = options, jobs, stats
        self._random = random.Random()
        self._seen: dict[Request, list[Tensor]] = {}
        self._checking: list[tuple[float, bool]] = []
        self._tenants: OrderedDict[str, Quality] = OrderedDict()
        self.failed: Mapping[str, str] = {}
        """Tenants whose checks have failed, and what follows: "more" is computed, or reuse is "off". Told after every step, so
        it is made anew when it changes, and not before."""

    def of(self, tenant: str) -> Quality:
        """What is known of a tenant. Not to be changed."""
        return self._tenants.get(tenant, _UNKNOWN)

    def open(self, request: Request, *, default: bool) -> None:
        """Maybe watch a request that may reuse KV. default: it leaves the server's options as they are."""
        if default and self._random.random() < self._options.shadow_share:
            self._seen[request] = []

    def observe(self, request: Request, logits: Tensor, row: int) -> None:
        """A token is about to be drawn from this row of the logits: [rows, vocab]."""
        seen = self._seen.get(request)
        if seen is not None and request.repair is not None and len(seen) < TOKENS:
            seen.append(_kept(logits[row : row + 1]))
        job = self._jobs.of(request) if request.internal else None
        if job is not None and request.generated < len(job.seen):
            self._checking.append(_compared(logits[row], job.seen[request.generated]))

    def close(self, request: Request) -> bool:
        """A request has ended. Returns whether it will be computed again."""
        seen = self._seen.pop(request, None)
        if not seen or not request.generated:
            return False
        answer = tuple(request.output[: len(seen)])
        self._jobs.add(
            Job(
                kind="shadow",
                tokens=tuple(request.prompt),
                tenant=request.tenant,
                salt=request.cache_salt,
                scope=request.kv.share or "tenant",
                answer=answer,
                seen=tuple(seen[: len(answer)]),
            )
        )
        return True

    def forget(self, request: Request) -> None:
        """A request could not be queued, or has ended."""
        self._seen.pop(request, None)

    def conclude(self, tenant: str, *, whole: bool) -> None:
        """A tenant's job has ended, as a whole or not: if it was a check, take its result in, and act if results are bad."""
        found, self._checking = self._checking, []
        if not found or not whole:
            return
        stats, tokens = self._stats, len(found)
        kl, same = sum(kl for kl, _ in found), sum(same for _, same in found)
        stats.shadow_checks += 1
        stats.shadow_tokens += tokens
        stats.shadow_kl += kl
        stats.shadow_agree += same
        quality = self._tenants.setdefault(tenant, Quality())
        self._tenants.move_to_end(tenant)
        if len(self._tenants) > MOST_TENANTS:
            forgotten, _ = self._tenants.popitem(last=False)
            if forgotten in self.failed:
                self.failed = {name: follows for name, follows in self.failed.items() if name != forgotten}
        quality.checks += 1
        quality.window.append((kl / tokens, same / tokens))
        if len(quality.window) >= LEAST:
            self._decide(tenant, quality)

    def _decide(self, tenant: str, quality: Quality) -> None:
        kl, top1 = (sum(values) / len(quality.window) for values in zip(*quality.window))
        if kl <= self._options.shadow_kl and top1 >= self._options.shadow_top1:
            return
        checks = len(quality.window)
        quality.window.clear()
        told = f"{checks} shadow checks of tenant {tenant!r} found a mean KL of {kl:.3f} and {top1:.0%} agreement"
        ratio = self._options.repair.ratio
        if quality.least_ratio == 0.0 and ratio < 1:
            quality.least_ratio = next(step for step in RATIOS if step > ratio)
            self.failed = {**self.failed, tenant: "more"}
            log.warning("%s; at least %g of its reused tokens are computed from now on", told, quality.least_ratio)
        else:
            quality.enabled = False
            self.failed = {**self.failed, tenant: "off"}
            log.error("%s; its requests are served without approximate reuse from now on", told)


def _kept(logits: Tensor) -> Tensor:
    """Log-probabilities to compare later: [vocab] fp16. logits: [1, vocab]."""
    return torch.log_softmax(logits[0].float(), dim=-1).clamp_min(-6e4).half()


def _compared(full: Tensor, reused: Tensor) -> tuple[float, bool]:
    """KL(full || reused) in nats, and whether the likeliest token is the same. full: [vocab] logits; reused: log-probs."""
    log_p, log_q = torch.log_softmax(full.float(), dim=-1), reused.float()
    return float((log_p.exp() * (log_p - log_q)).sum().clamp_min(0)), bool(log_p.argmax() == log_q.argmax())
