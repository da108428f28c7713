"""Which tokens a step's rows may draw: the grammars of open requests, and a bit per token and row.

    begin   the step is planned: masks are computed on a thread of their own, beside the model's run
    masks   there are logits: wait for what is left of that
    accept  a token is known: its request's grammar moves on

Bits lie where every step finds them and are copied to the device once per step; what is captured of a step ends before logits,
so no mask is part of it. Requests without a grammar cost a look into an empty table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.engine.constraint.compiler import Compiler
from kvloom.engine.constraint.progress import Progress, Together
from kvloom.engine.device import Mirror
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.requests.lifecycle import Feature
from kvloom.engine.requests.plan import Chunk
from kvloom.engine.requests.request import Request


class Mask(NamedTuple):
    """What a row may draw."""

    row: int
    """Of `Masks.bits`."""
    progress: Progress


class Masks(NamedTuple):
    """Of the rows of a step that are drawn from."""

    of: Mapping[int, Mask]
    """By the number of the row among those."""
    errors: Mapping[int, Exception]
    """Rows whose requests end, and why."""
    bits: Tensor | None
    """[masks, words] int32 on the device: bit t % 32 of word t / 32 says whether token t may follow. None without any."""


NO_MASKS = Masks({}, {}, None)
Computed = tuple[dict[int, Mask], dict[int, Exception]]


class _Job(NamedTuple):
    progress: Progress
    drafts: list[int]
    first: int
    """Number of its first row among those that are drawn from."""
    rows: range
    """Of the bits."""
    goes_on: list[bool]
    """Of every row, whether the text may not end there while it can go on."""

    @property
    def plain(self) -> bool:
        """Whether it is one row, behind what is accepted."""
        return len(self.rows) == 1 and not self.drafts


def drawn_rows(chunk: Chunk) -> int:
    """How many of a chunk's last rows are drawn from. A chunk that verifies drafts has a token after each of its rows."""
    if not chunk.samples or chunk.request.replay:
        return 0
    return chunk.count if chunk.request.verifying else 1


class Constraints(Feature):
    """Open requests whose text must look like something."""

    def __init__(self, compiler: Compiler, vocab_size: int, device: torch.device, max_rows: int) -> None:
        """max_rows: of a step that are drawn from."""
        self.compiler = compiler
        self._words, self._device, self._max_rows = -(-vocab_size // 32), device, max_rows
        self._together = Together()
        self._open: dict[Request, Progress] = {}  # requests compare by identity
        self._computing: Future[Computed] | None = None
        self._work: Callable[[], Computed] = lambda: ({}, {})

    def opened(self, request: Request) -> None:
        """Compile its grammar, if that has not been done, and see that forced tokens are of it."""
        sampling = request.sampling
        if sampling.structured is not None:
            grammar = request.grammar or self.compiler.compile(sampling.structured)
            progress = grammar.begin(sampling.structured)
            progress.check_forced(sampling.forced_tokens)
            self._open[request] = progress

    def closed(self, request: Request) -> None:
        """Its grammar is forgotten."""
        self._open.pop(request, None)

    def begin(self, chunks: Sequence[Chunk]) -> None:
        """Start to compute the masks of a step."""
        if self._computing is not None and not self._computing.cancel():  # its step has failed, and grammars are one thread's
            self._computing.exception()
        self._computing = None
        if not self._open:
            return
        jobs, row, used = [], 0, 0
        for chunk in chunks:
            request, count = chunk.request, drawn_rows(chunk)
            progress = self._open.get(request)
            forced = chunk.stop - len(request.prompt) < len(request.sampling.forced_tokens)
            if count and progress is not None and not forced:
                drafts = request.tokens[len(request.tokens) - request.drafts :]
                jobs.append(_Job(progress, drafts, row, range(used, used + count), _goes_on(chunk, count)))
                used += count
            row += count
        if jobs:
            self._work = functools.partial(_compute, jobs, self._bits.host, self._together, self.compiler.no_ends)
            self._computing = self._thread.submit(self._work)

    def masks(self) -> Masks:
        """Of the step that was begun last."""
        if self._computing is None:
            return NO_MASKS
        begun = not self._computing.cancel()  # on a busy machine the thread may not have come to it: then this one does it
        found, errors = self._computing.result() if begun else self._work()
        self._computing = None
        return Masks(found, errors, self._bits.front(1 + max((mask.row for mask in found.values()), default=-1)))

    def accept(self, request: Request, token: int) -> bool:
        """A token of an open request is known. Whether its text is complete. Raises InvalidRequestError."""
        progress = self._open.get(request)
        if progress is None:
            return False
        return progress.accept(token)

    @cached_property
    def _bits(self) -> Mirror:
        return Mirror((self._max_rows, self._words), torch.int32, self._device)

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="kvloom-masks")


def _goes_on(chunk: Chunk, count: int) -> list[bool]:
    params, first = chunk.request.sampling, chunk.stop - count + 1 - len(chunk.request.prompt)
    return [params.ignore_eos or place < params.min_tokens for place in range(first, first + count)]


def _compute(jobs: list[_Job], bits: npt.NDArray[np.int32], together: Together, no_ends: npt.NDArray[np.int32]) -> Computed:
    found: dict[int, Mask] = {}
    errors: dict[int, Exception] = {}
    go_on: list[int] = []
    computed = together.compute([(job.progress, job.rows.start) for job in jobs if job.plain], bits)
    for job in jobs:
        try:
            if computed and job.plain:
                only_ends = [job.progress.masked()]
            else:
                only_ends = job.progress.masks(job.drafts, bits[job.rows.start : job.rows.stop])
        except InvalidRequestError as error:
            errors |= dict.fromkeys(range(job.first, job.first + len(job.rows)), error)
            continue
        for i, ends in enumerate(only_ends):
            found[job.first + i] = Mask(job.rows[i], job.progress)
            if job.goes_on[i] and not ends:
                go_on.append(job.rows[i])
    if go_on:
        bits[go_on] &= no_ends
    return found, errors
