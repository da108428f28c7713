"""RazorAttention (arXiv 2407.15891, ICLR 2025), evict mode: local heads return the memory of what they no longer read.

    retrieval heads   the whole sequence (head group "retrieval", the first)
    local heads       sinks, a window max(S0, N / C), and one token for everything between (head group "local")

A prompt is computed densely by all heads, as in the paper; afterwards, and every so many generated tokens, blocks of the local
group that lie wholly before the window are folded into the compensation token and given back. So while a prompt is computed its
local KV is there in full, and the pool of the local group has room for a whole prompt beside the windows of many requests.

Departures, and why:

- Whole blocks are dropped: up to a block more than the window stays, which the paper's rule allows and costs nothing.
- The paper's S0 is 4000; at 8k tokens that would drop little. It is 256 here, as in the authors' own deployment.
- What is dropped stays findable until its memory is wanted. A later request with the same beginning may use a prefix as far
  as *both* groups still hold it: reuse is exact or shorter, never wrong. Generated tokens are approximate and never published.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvloom.engine.bounds import shown, wrong
from kvloom.engine.cache import BlockTable, CacheManager, GroupSpec, Storage, bytes_per_token
from kvloom.engine.calibration.razor import HeadClasses
from kvloom.engine.device import staged, upload
from kvloom.engine.errors import ConfigError
from kvloom.engine.model.config import ModelConfig
from kvloom.engine.requests.sampling import MAX_DRAFT_TOKENS
from kvloom.engine.requests.state import StateMemory
from kvloom.engine.requests.traits import Record
from kvloom.engine.retention.base import Kept
from kvloom.engine.retention.compensation import Compensation, Leaving
from kvloom.engine.retention.window import RazorHeads, Window
from kvloom.kernels.interface import Kernels, Lists, Rows

if TYPE_CHECKING:
    from kvloom.engine.requests.plan import Chunk
    from kvloom.engine.requests.request import Request

RETRIEVAL, LOCAL = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RazorOptions(RazorHeads):
    """Options of retention razor."""

    def __post_init__(self) -> None:
        if (found := wrong(self)) is not None:
            raise ConfigError(f"retention_options: {found.name} is {shown(found.value)}; allowed: {found.allowed}")

    def calibrated(self, model_key: str) -> HeadClasses:
        """`classes`. Raises ConfigError if the model has no calibration."""
        found = self.classes(model_key)
        if found is None:
            raise ConfigError("this model has no RazorAttention calibration; run kvloom calibrate razor MODEL first")
        return found


def group_specs(classes: HeadClasses) -> tuple[GroupSpec, GroupSpec]:
    """The head groups "retrieval" and "local". Raises ConfigError if either would be empty."""
    local = GroupSpec("local", tuple(classes.local(layer) for layer in range(classes.layers)))
    if classes.share in (0.0, 1.0):
        raise ConfigError(
            f"{classes.count} of {classes.layers * classes.kv_heads} KV heads would keep everything; retention razor needs "
            "some of both kinds: change induction_share and echo_share, or use retention everything"
        )
    return GroupSpec("retrieval", classes.retrieval), local


class Blocks(NamedTuple):
    """How a cache's memory is divided."""

    retrieval: int
    local: int


def divide(memory: int, length: int, block_size: int, sizes: tuple[int, int], window: Window) -> Blocks:
    """Blocks of both groups, so that as many sequences of `length` tokens as possible fit at once.

    k sequences need k whole ones in the retrieval group; in the local group k windows, and beside them room for one prompt
    that is being computed. sizes: `block_bytes`.
    """
    whole, windows = -(-length // block_size), window_blocks(length, block_size, window)
    full, local = sizes
    sequences = (memory - (whole - windows) * local) / (whole * full + windows * local)
    if sequences < 1:  # not even one: as much of a sequence as there is room for
        blocks = memory // (full + local)
        return Blocks(blocks, blocks)
    retrieval = int(sequences * whole)
    return Blocks(retrieval, (memory - retrieval * full) // local)


def block_bytes(classes: HeadClasses, head_dim: int, dtype: torch.dtype, block_size: int) -> tuple[int, int]:
    """Bytes of a block of the retrieval and of the local group, over all layers."""
    retrieval, local = (bytes_per_token(spec, head_dim, dtype) * block_size for spec in group_specs(classes))
    return retrieval, local


def window_blocks(length: int, block_size: int, window: Window) -> int:
    """Blocks of the local group that a sequence of `length` tokens holds once its prompt is computed."""
    begin = int(window.begin(np.array([length]), block_size)[0])
    dropped = begin // block_size - -(-window.sinks // block_size)
    return -(-length // block_size) - max(0, dropped)


class Razor:
    """`Retention`: the head groups of one engine, and the state of what its open requests have dropped."""

    name = "razor"

    def __init__(self, options: RazorOptions, model_key: str, model: ModelConfig, dtype: torch.dtype) -> None:
        """Raises ConfigError if the model has no calibration, or no heads of either kind."""
        self.options, self.classes, self.window = options, options.calibrated(model_key), options.window
        self.specs = group_specs(self.classes)
        self._model, self._dtype = model, dtype
        local = [len(heads) for heads in self.specs[LOCAL].heads]
        self._local = sum(local)
        self._state = Compensation(model.layers, local, model.head_dim, options.sinks)
        self._cache: CacheManager | None = None

    def make_cache(self, memory: int, length: int, block_size: int, device: torch.device) -> CacheManager:
        """See `Retention`."""
        sizes = block_bytes(self.classes, self._model.head_dim, self._dtype, block_size)
        blocks = divide(memory, length, block_size, sizes, self.window)
        if min(blocks) < 2:
            raise ConfigError(f"kv_memory is {memory} bytes; two blocks of all heads take {2 * sum(sizes)}, give at least that")
        self._sinks = torch.arange(max(1, self.window.sinks), dtype=torch.int32, device=device)
        self._cache = CacheManager(
            *(Storage(spec, n, block_size, self._model.head_dim, self._dtype, device) for spec, n in zip(self.specs, blocks))
        )
        return self._cache

    @property
    def state(self) -> Compensation | None:
        """What stands for dropped tokens; None if nothing does."""
        return self._state if self.options.compensation else None

    @property
    def budget(self) -> int:
        """Tokens up to which a sequence drops nothing."""
        return self.window.shortest

    @property
    def records(self) -> tuple[Record, ...]:
        """State of requests that may drop something."""
        return (self._state,) if self.options.compensation else ()

    def kept(
        self, chunks: Sequence[Chunk], tables: Tensor, request: Tensor, stop: Tensor, states: StateMemory, space: Tensor
    ) -> Kept:
        """See `Retention`: sinks and a window, once something is dropped, and a token for it."""
        assert self._cache is not None
        counts = np.array([chunk.count for chunk in chunks], np.int64)
        begins = np.array([chunk.table.forgotten * self._cache.block_size for chunk in chunks], np.int32)
        dropped = self._state.dropped(begins)
        own = np.zeros_like(begins) if self.state is None else states.at(self.state, [chunk.request for chunk in chunks])
        columns = np.zeros(space.shape, np.int32)
        for column, of in zip(columns, (begins, np.where(begins > 0, self.window.sinks, 0), own, dropped)):
            column[: counts.sum()] = np.repeat(of, counts)
        begin, lengths, at, count, offsets = space.copy_(staged(columns, space.device), non_blocking=True)
        rows = Rows(tables, request, begin, stop, Lists(self._sinks, offsets[:, None], lengths[:, None]))
        unseen = (dropped * self._local).tolist()
        if self.state is None:
            return Kept(rows, unseen)
        return Kept(rows, unseen, functools.partial(self.state.folded, states.words, at=at, dropped=count))

    def advance(self, going_on: Sequence[tuple[Request, BlockTable]], states: StateMemory, kernels: Kernels) -> None:
        """See `Retention`: what leaves windows is folded before it is given back."""
        cache = self._cache
        assert cache is not None
        size, keep = cache.block_size, -(-self.window.sinks // cache.block_size)
        for request, _ in going_on:
            if request.draft_tokens:  # drafts are verified together, by rows that must see what each would see alone
                known = len(request.tokens) - request.drafts
                request.draft_until = self.window.until(known, size, MAX_DRAFT_TOKENS)
        lengths = np.array([len(request.tokens) for request, _ in going_on], np.int32)
        begins = self.window.begin(lengths, size)
        moved = [(*pair, int(to)) for pair, to in zip(going_on, begins) if to > pair[1].forgotten * size]
        if moved and self.state is not None:
            self._fold(self._state, moved, states, kernels, cache.groups[LOCAL].storage)
        for _, table, to in moved:
            cache.forget(table, LOCAL, max(keep, table.forgotten), to // size)

    @staticmethod
    def _fold(
        state: Compensation, moved: Sequence[tuple[Request, BlockTable, int]], states: StateMemory, kernels: Kernels,
        storage: Storage,
    ) -> None:  # fmt: skip
        requests, blocks, to = zip(*((request, table.parts[LOCAL], to) for request, table, to in moved))
        tables = np.zeros((len(moved), max(map(len, blocks))), np.int32)
        for row, own in zip(tables, blocks):
            row[: len(own)] = own
        last, rows, at = np.array(to, np.int32), np.arange(len(moved), dtype=np.int32), states.at(state, requests)
        first = state.advance(requests, last)
        request, begin, end, where = (upload(column, storage.device) for column in (rows, first, last, at))
        leaving = Leaving(upload(tables, storage.device), request, begin, end, where, int((last - first).max()))
        for layer, kv in enumerate(storage.layers):
            if storage.spec.heads[layer]:
                state.fold(kernels, states.words, layer, kv, leaving)
