"""Shadow checks: some requests that reused KV are computed again in full when the engine is idle, and compared.

sampled     the log-probabilities of the first tokens of the answer are kept
idle        the same prompt in full, forced to the same answer: KL(full || reused) and the likeliest token, per token
bad window  at first more is recomputed; if that does not help, approximate reuse is switched off
"""

from __future__ import annotations

import logging
import random
from collections import deque

import torch
from torch import Tensor

from kvloom.engine.client import ShareStats
from kvloom.engine.request import Request
from kvloom.engine.reuse.kvshare.errands import Errand, Errands
from kvloom.engine.reuse.kvshare.options import RATIOS, ShareOptions

log = logging.getLogger("kvloom.engine")

TOKENS = 16
"""Tokens of an answer that are compared."""
WINDOW, LEAST = 32, 8
"""Checks that are looked at together, and the fewest that decide."""


class Shadow:
    """Samples, compares, and decides."""

    def __init__(self, options: ShareOptions, errands: Errands, stats: ShareStats) -> None:
        self.enabled = True
        """False once checks have failed for good."""
        self.least_ratio = 0.0
        """Reused tokens that are computed at least, since checks have failed once."""
        self._options, self._errands, self._stats = options, errands, stats
        self._random = random.Random()
        self._seen: dict[Request, list[Tensor]] = {}
        self._checking: list[tuple[float, bool]] = []
        self._window: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def open(self, request: Request) -> None:
        """Maybe watch a request that may reuse KV."""
        if self._random.random() < self._options.shadow_share:
            self._seen[request] = []

    def observe(self, request: Request, logits: Tensor) -> None:
        """A token is about to be drawn from these logits: [1, vocab]."""
        seen = self._seen.get(request)
        if seen is not None and request.repair is not None and len(seen) < TOKENS:
            seen.append(_kept(logits))
        errand = self._errands.of(request) if request.internal else None
        if errand is not None and request.generated < len(errand.seen):
            self._checking.append(_compared(logits[0], errand.seen[request.generated]))

    def close(self, request: Request) -> bool:
        """A request has ended. Returns whether it will be computed again."""
        seen = self._seen.pop(request, None)
        if not seen or not request.generated:
            return False
        answer = tuple(request.output[: len(seen)])
        self._errands.add(
            Errand(
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

    def conclude(self, *, whole: bool) -> None:
        """An errand has ended, as a whole or not: if it was a check, take its result in, and act if results are bad."""
        found, self._checking = self._checking, []
        if not found or not whole:
            return
        stats = self._stats
        stats.shadow_checks += 1
        stats.shadow_tokens += len(found)
        stats.shadow_kl += sum(kl for kl, _ in found)
        stats.shadow_agree += sum(same for _, same in found)
        self._window.append((sum(kl for kl, _ in found) / len(found), sum(same for _, same in found) / len(found)))
        if len(self._window) >= LEAST:
            self._decide()

    def _decide(self) -> None:
        kl, top1 = (sum(values) / len(self._window) for values in zip(*self._window))
        if kl <= self._options.shadow_kl and top1 >= self._options.shadow_top1:
            return
        checks = len(self._window)
        self._window.clear()
        told = f"{checks} shadow checks found a mean KL of {kl:.3f} and {top1:.0%} agreement"
        ratio = self._options.repair.ratio
        if self.least_ratio == 0.0 and ratio < 1:
            self.least_ratio = next(step for step in RATIOS if step > ratio)
            log.warning("%s; at least %g of reused tokens are computed from now on", told, self.least_ratio)
        else:
            self.enabled = False
            log.error("%s; approximate reuse is switched off, requests are served exactly", told)


def _kept(logits: Tensor) -> Tensor:
    """Log-probabilities to compare later: [vocab] fp16. logits: [1, vocab]."""
    return torch.log_softmax(logits[0].float(), dim=-1).clamp_min(-6e4).half()


def _compared(full: Tensor, reused: Tensor) -> tuple[float, bool]:
    """KL(full || reused) in nats, and whether the likeliest token is the same. full: [vocab] logits; reused: log-probs."""
    log_p, log_q = torch.log_softmax(full.float(), dim=-1), reused.float()
    return float((log_p.exp() * (log_p - log_q)).sum().clamp_min(0)), bool(log_p.argmax() == log_q.argmax())
