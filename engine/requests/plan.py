"""What a step computes: chunks of requests, and how many rows of one fit.

Data that the scheduler makes, the runner turns into tensors and the core reads back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvloom.engine.cache import BlockTable
from kvloom.engine.requests.request import Request
from kvloom.engine.requests.traits import Look

INTERNAL_ROWS = 128
"""Most rows per step of the engine's own work."""


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Rows of one request: tokens [start, start + count), or those at `positions`."""

    request: Request
    table: BlockTable
    start: int
    count: int
    positions: npt.NDArray[np.int64] | None = None
    """[count], ascending, the first is `start`: rows of a prompt whose other rows hold reused KV."""
    refresh: bool = False
    """Whether these rows only bring their KV up to date: the request has gone on without them, nothing is sampled."""
    look: Look | None = None
    """What these rows are computed for, if they are not computed for good."""

    @property
    def stop(self) -> int:
        """One past the last position."""
        return self.start + self.count if self.positions is None else int(self.positions[-1]) + 1

    @property
    def samples(self) -> bool:
        """Whether computed meets known at the end of this chunk, so that a token is sampled."""
        return self.stop == len(self.request.tokens) and not self.refresh and self.look is None

    @property
    def work(self) -> float:
        """What it takes, in rows of a full pass."""
        return self.count * (1.0 if self.look is None else self.look.depth)

    @property
    def decodes(self) -> bool:
        """Whether this is a decode row: one token beyond what is computed like a prompt, at the end of what is known."""
        request = self.request
        return self.count == 1 and self.samples and self.start >= max(len(request.prompt), request.prefill)

    @property
    def foreseeable(self) -> bool:
        """Whether the row after this one is certain before its token is known, unless that ends the request: it takes the token
        from where it is drawn, and nothing about the token matters to the host."""
        request, sampling = self.request, self.request.sampling
        watched = sampling.remembers or sampling.logprobs is not None
        changes = request.draft_tokens or request.correct_every or request.repair is not None or request.internal
        return self.decodes and not request.replay and not watched and not changes

    @property
    def prefills(self) -> bool:
        """Whether these rows bring a prompt, or what is computed like one, forward or up to date."""
        return self.refresh or of_prompt(self) or (self.count > 1 and not self.request.verifying)


class Reuse(Protocol):
    """Brings KV from elsewhere than the prefix index, and repairs it (`engine.reuse.kvshare`)."""

    def begin(self, request: Request, table: BlockTable) -> float:
        """The request has been admitted: its prefix is adopted (`computed`), blocks of all its tokens are reserved. May fill
        some of them, and set `request.looks` to have rows looked at before it is decided what is computed. Returns the work
        that took, in rows of a full pass: 0 or more. What it raises ends the request."""
        ...

    def settle(self, request: Request) -> None:
        """All that was to be looked at has been computed: decide. May set `request.repair`."""
        ...

    def refresh(self, plan: StepPlan, rows: int) -> list[Chunk]:
        """Rows beside those of the plan that bring reused KV up to date, at most `rows`; more are left out. Raises Blamed."""
        ...


class StepPlan(NamedTuple):
    """What one step computes. Decodes come first."""

    chunks: list[Chunk]
    preempted: list[Request]

    @property
    def rows(self) -> int:
        return sum(chunk.count for chunk in self.chunks)

    @property
    def work(self) -> float:
        """What it takes, in rows of a full pass."""
        return sum(chunk.work for chunk in self.chunks)


UNKNOWN = 0
"""In place of a token that is being drawn. Any id will do: its row takes the token from the device."""


@contextmanager
def foreseen(chunks: Sequence[Chunk]) -> Iterator[None]:
    """Within, the requests of these decode rows are as they will be once those are computed, but for their tokens' ids."""
    requests = [chunk.request for chunk in chunks]
    for request in requests:
        request.tokens.append(UNKNOWN)
        request.computed += 1
    try:
        yield
    finally:
        for request in requests:
            request.tokens.pop()
            request.computed -= 1


def of_prompt(chunk: Chunk) -> bool:
    """Whether a chunk begins in its request's prompt and brings it forward."""
    return chunk.start < len(chunk.request.prompt) and not chunk.refresh


def prefills(request: Request) -> bool:
    """Whether a request's next rows are those of a prompt, or of what is computed like one, and not just its next token."""
    return not request.verifying and (request.pending > 1 or request.computed < len(request.prompt))


def least(request: Request) -> int:
    """The fewest rows of a request that a step can take: the smallest budget of which `fitting` makes any use."""
    if request.looks is not None:
        return 1
    pending = request.pending
    grid, tail = (0, 0) if request.selector is None else (request.selector.grid, request.selector.tail)
    if request.verifying or pending <= tail:
        return pending
    return min(pending, grid - request.computed % grid) if grid else 1


def fitting(request: Request, budget: int) -> int:
    """Rows of a request that a step with `budget` rows left takes: 0 if it must wait for a step with more room.

    Drafts are verified in one piece, of at most a step's rows; a sparse prompt is cut at its method's grid, and the last rows
    that a method looks at stay together, so that what it sees never depends on the budget.
    """
    pending = request.pending
    if request.internal:  # whoever comes meanwhile waits for the end of the step
        budget = min(budget, INTERNAL_ROWS)
    if pending <= budget or request.looks is not None:
        return min(pending, budget)
    if request.verifying:
        return 0
    grid, tail = (0, 0) if request.selector is None else (request.selector.grid, request.selector.tail)
    budget = min(budget, max(0, pending - tail))
    return budget if grid == 0 else max(0, (request.computed + budget) // grid * grid - request.computed)
