"""Runs random requests through an engine in this process, with aborts and preemption, and looks at all that comes out.

What must hold of every batch: `add` raises nothing but InvalidRequestError, whose message holds no exception; `step` raises
nothing; every request ends; nothing failed inside that the engine had to isolate; afterwards every block is accounted for, and
no part of the engine remembers a request.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from kvloom.engine import LLM
from kvloom.engine.core import EngineCore
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.requests.request import Request, RequestOutput
from kvloom.engine.reuse.kvshare.share import KVShare
from kvloom.engine.selection import METHODS
from kvloom.loadtest.fuzz.inputs import Inputs, Sent

BATCH = 128
"""Requests that are sent before all must have ended."""
CONSTRAINED = 0.04
"""Of requests, unless told otherwise."""
MOST_STEPS = 20_000
"""Steps in which a batch must end."""
_EXCEPTION = re.compile(r"Error\b|Exception|Traceback|array\(|object at 0x|[a-z]\.py\b")


class FuzzError(AssertionError):
    """Something does not hold."""


@dataclass(slots=True)
class Tally:
    """What happened so far."""

    requests: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    """By finish reason; `refused` for those that `add` refused."""
    preemptions: int = 0
    tokens: int = 0


class Fuzzer:
    """One engine and what it is sent."""

    def __init__(self, llm: LLM, seed: int, constrained: float = CONSTRAINED) -> None:
        """constrained: share of requests that have a grammar."""
        order = llm.core._admission.uses_priority
        self.llm, self.tally = llm, Tally()
        size, longest = llm.model.vocab_size, llm.model.max_model_len
        self._inputs = Inputs(seed, size, longest, methods=tuple(METHODS), priorities=order, constrained=constrained)
        self._open: dict[str, Request] = {}
        self._number = 0

    def batch(self, count: int = BATCH) -> None:
        """Send so many requests, abort some, and wait for the end of all. Raises FuzzError."""
        source, core = self._inputs.random, self.llm.core
        left = count
        for _ in range(MOST_STEPS):
            for _ in range(min(left, source.randint(0, 24))):
                self._send(self._inputs.request())
                left -= 1
            if self._open and source.random() < 0.08:
                self._abort(source.choice([*self._open]))
            if source.random() < 0.02:
                self._ask()
            if not core.busy and core.background.waiting and source.random() < 0.5:
                core.background.start()
            if core.busy:
                self._take(core.step())
            elif not left:
                break
        if self._open or core.busy:
            raise FuzzError(f"{len(self._open)} requests do not end: {[*self._open][:3]}")
        self._look()

    def _send(self, sent: Sent) -> None:
        self._number += 1
        self.tally.requests += 1
        try:
            request = Request(
                id=f"r{self._number}", prompt=sent.prompt, sampling=sent.sampling(), kv=sent.kv(), priority=sent.priority,
                tenant=sent.tenant, cache_salt=sent.salt, arrival=float(self._number),
            )  # fmt: skip
            self.llm.core.add(request)
        except InvalidRequestError as error:
            self.tally.ends["refused"] += 1
            if _EXCEPTION.search(str(error)) or len(str(error)) > 600:
                raise FuzzError(f"a refusal says too much: {error}") from error
            return
        self._open[request.id] = request

    def _abort(self, name: str) -> None:
        output = self.llm.core.abort(name)
        if output is None:
            raise FuzzError(f"{name} cannot be aborted, though it is here")
        self._take([output])

    def _ask(self) -> None:
        """What others may ask of an engine while it works."""
        core, source = self.llm.core, self._inputs.random
        core.tenants()
        if core.feature(KVShare) is not None:
            core.explain([source.randrange(self.llm.model.vocab_size) for _ in range(50)], "alice", "")
            if source.random() < 0.1:
                core.purge("bob")

    def _take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            request = self._open[output.id]
            self.tally.tokens += len(output.tokens)
            if output.finish_reason is None:
                continue
            del self._open[output.id]
            self.tally.ends["conflict" if output.param else output.finish_reason] += 1
            limit = request.sampling.max_tokens or self.llm.model.max_model_len
            failed = output.finish_reason == "error" and output.param is None  # else a field of the request's is to blame
            if failed or not 0 <= output.usage.completion_tokens <= limit:
                raise FuzzError(f"{output.id} ended with {output}")

    def _look(self) -> None:
        look(self.llm.core)
        self.tally.preemptions = self.llm.core.stats().preemptions


def look(core: EngineCore) -> None:
    """Nothing runs: raises FuzzError if a block is lost, something had failed inside, or anything is still remembered."""
    core.check()
    share = core.feature(KVShare)
    if share is not None:
        share.store.check()
    stats = core.stats()
    if stats.internal_errors:
        raise FuzzError(f"{stats.internal_errors} errors of the engine's own; the log has them")
    held = {
        "requests": len(core._holdings), "states": len(core.decoding._states),
        "blocks": sum(group.in_use for group in stats.groups),
        "tables": len(core.cache._tables), "matches": len(core.cache._matches), "queued tokens": core.queued_tokens,
        "selectors": sum(len(entry.open) for entry in core._admission.selectors._entries.values()),
        "sampler": len(core.decoding._sampler._seen), "grammars": len(core.decoding.constraints._open),
        **({} if share is None else {"repairs": len(share._repairs), "plans": len(share._plans)}),
    }  # fmt: skip
    if any(held.values()):
        raise FuzzError(f"nothing runs, but something is still held: {held}")
