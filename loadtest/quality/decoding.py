"""Teacher forcing through the decode path: given tokens are fed one by one, as generated ones would be.

    prompt    computed as prompts are (dense, unless a method computes prompts sparsely); may come from the prefix cache
    forced    every token after the prompt is a decode row of its own: what a selection method changes
    free      what the model then goes on to say, greedily

The distribution after the last prompt token comes from a prompt row; it is not observed. Costs are taken from the same steps:
time (without the observer's), bytes that attention read, and memory that the requests held.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from kvloom.engine import LLM
from kvloom.engine.errors import ConfigError
from kvloom.engine.requests.request import KVOptions, Request, RequestOutput, Usage
from kvloom.engine.requests.sampling import SamplingParams

Observe = Callable[[int, int, Tensor], None]
"""(passage, index of the token that this row predicts, logits [vocab] fp32, valid during the call). The index is 1 or more."""
WARM_STEPS = 2
"""First decode steps of a run, which are not timed."""


class Passage(NamedTuple):
    """A text that is followed."""

    prompt: Sequence[int]
    forced: Sequence[int] = ()


@dataclass(slots=True)
class Cost:
    """What decode steps of the whole batch cost, one entry per timed step."""

    seconds: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)
    """Of them, between a layer's projections: rotation, storing, selection, attention, and the step's planning of them."""
    bytes_read: list[int] = field(default_factory=list)
    """K and V that attention and selection needed to read (kernel counters)."""
    kv_bytes: int = 0
    """Most memory of KV blocks in use, while prompts were computed too."""
    held_bytes: int = 0
    """The same in the timed steps alone."""
    state_bytes: int = 0
    """The methods' own state for these requests."""
    attended: float = 0.0
    """Positions read by all decode rows, mean over layers and KV heads."""
    held: float = 0.0
    """Positions there were."""

    def add(self, other: Cost) -> Cost:
        """Take another run's steps in."""
        self.seconds += other.seconds
        self.attention += other.attention
        self.bytes_read += other.bytes_read
        self.kv_bytes, self.state_bytes = max(self.kv_bytes, other.kv_bytes), max(self.state_bytes, other.state_bytes)
        self.held_bytes = max(self.held_bytes, other.held_bytes)
        self.attended += other.attended
        self.held += other.held
        return self

    def figures(self) -> dict[str, float | None]:
        """Medians over steps, by the names that rows of results use; None where no step was timed."""
        middle = lambda values, factor: float(np.median(values)) * factor if values else None  # noqa: E731
        return {
            "step_ms": middle(self.seconds, 1e3),
            "attention_ms": middle(self.attention, 1e3),
            "bytes_read": middle(self.bytes_read, 1),
            "kv_bytes": self.kv_bytes,
            "held_bytes": self.held_bytes,
            "state_bytes": self.state_bytes,
            "attended_share": self.attended / self.held if self.held else None,
        }


class Followed(NamedTuple):
    """What came of some passages."""

    outputs: list[list[int]]
    """All tokens after the prompt, forced ones first."""
    usages: list[Usage]
    cost: Cost


class _Clock:
    """A step's attention, timed; otherwise as the one it wraps."""

    def __init__(self, attention: Any) -> None:
        self._attention = attention
        self.spent = 0.0

    def plan(self, *args: Any, **kwargs: Any) -> None:
        began = time.perf_counter()
        self._attention.plan(*args, **kwargs)
        self.spent += time.perf_counter() - began

    def __call__(self, *args: Any) -> Tensor:
        began = time.perf_counter()
        out: Tensor = self._attention(*args)
        self.spent += time.perf_counter() - began
        return out


def prefill(
    llm: LLM, prompts: Sequence[Sequence[int]], done: Callable[[], None] = lambda: None, kv: KVOptions = KVOptions()
) -> None:
    """Have the prefix cache hold these prompts, computed one after another; `done` is called after each."""
    for prompt in prompts:
        llm.generate([list(prompt)], SamplingParams(max_tokens=1, temperature=0, ignore_eos=True), kv=kv)
        done()


def greedy(name: str, prompt: Sequence[int], tokens: int, kv: KVOptions, forced: Sequence[int] = ()) -> Request:
    """A request that comes now and is answered with exactly so many tokens, `forced` ones first."""
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, forced_tokens=tuple(forced))
    return Request(id=name, prompt=list(prompt), sampling=sampling, kv=kv, arrival=time.monotonic())


@contextlib.contextmanager
def under_way(llm: LLM, requests: Sequence[Request]) -> Iterator[None]:
    """Requests are in the engine meanwhile, and gone at the end, also after Ctrl-C. Raises InvalidRequestError."""
    try:
        for request in requests:
            llm.core.add(request)
        yield
    finally:
        for request in requests:
            llm.core.abort(request.id)


def follow(llm: LLM, passages: Sequence[Passage], kv: KVOptions, *, free: int = 0, observe: Observe | None = None) -> Followed:
    """Run passages in one batch: their forced tokens, then `free` more of the model's own.

    Raises InvalidRequestError if one cannot be served, ConfigError if the KV cache is too small for requests that run together
    (one that is preempted comes back as a prompt, and its rows are no decode rows).
    """
    requests = [greedy(f"follow-{i}", one.prompt, len(one.forced) + free, kv, one.forced) for i, one in enumerate(passages)]
    return _Run(llm, requests, observe).run()


class _Run:
    """One batch on its way."""

    def __init__(self, llm: LLM, requests: list[Request], observe: Observe | None) -> None:
        self._llm, self._core, self._requests, self._observe = llm, llm.core, requests, observe
        self._number = {request.id: i for i, request in enumerate(requests)}
        self._observing = 0.0
        self._last: dict[str, RequestOutput] = {}
        self._outputs: list[list[int]] = [[] for _ in requests]
        self._cost = Cost()

    def run(self) -> Followed:
        core, runner = self._core, self._core.runner
        attention: Any = runner._attention
        clock: Any = _Clock(attention)
        core.observer = None if self._observe is None else self._observed
        try:
            with runner.decoder.capturing("piecewise"), under_way(self._llm, self._requests):  # so that attention is called
                runner._attention, warm = clock, 0
                while core.busy:
                    last = self._last.values()
                    decoding = len(last) == len(self._requests) and all(output.finish_reason is None for output in last)
                    warm += decoding
                    self._step(clock, timed=decoding and warm > WARM_STEPS)
        finally:
            core.observer = None
            runner._attention = attention
        return self._result()

    def _step(self, clock: _Clock, *, timed: bool) -> None:
        read, clock.spent, self._observing = self._core.stats().kv_bytes_read, 0.0, 0.0
        began = time.perf_counter()
        outputs = self._core.step()
        seconds = time.perf_counter() - began - self._observing
        for output in outputs:
            self._last[output.id] = output
            self._outputs[self._number[output.id]] += output.tokens
        self._cost.kv_bytes = max(self._cost.kv_bytes, self._core.cache.bytes_in_use)
        if timed:
            self._cost.held_bytes = max(self._cost.held_bytes, self._core.cache.bytes_in_use)
            self._cost.seconds.append(seconds)
            self._cost.attention.append(clock.spent)
            self._cost.bytes_read.append(self._core.stats().kv_bytes_read - read)

    def _observed(self, request: Request, logits: Tensor) -> None:
        if request.generated == 0:  # the prompt's own last row
            return
        began = time.perf_counter()
        assert self._observe is not None
        self._observe(self._number[request.id], request.generated, logits[0])
        self._observing += time.perf_counter() - began

    def _result(self) -> Followed:
        usages = [self._last[request.id].usage for request in self._requests]
        if any(usage.preemptions for usage in usages):
            raise ConfigError(
                f"the KV cache of {self._core.cache.capacity_tokens} tokens cannot hold {len(usages)} requests of "
                f"{max(len(r.tokens) for r in self._requests)} tokens at once; give more --kv-memory or a smaller --batch"
            )
        self._cost.attended = sum(usage.attended_tokens for usage in usages)
        self._cost.held = sum(usage.held_tokens for usage in usages)
        self._cost.state_bytes = sum(self._core.states.wanted(r) for r in self._requests)
        return Followed(self._outputs, usages, self._cost)
