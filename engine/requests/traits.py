"""What a request carries of others, as the scheduler and the runner know it: how its selection method wants rows cut and what
that remembers, rows that are looked at, rows that are repaired."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kvloom.engine.requests.stats import MethodStats
from kvloom.kernels.interface import PagedKV


class Record(Protocol):
    """One keeper's part of a request's state."""

    @property
    def words(self) -> int:
        """How many it takes: the same for every request."""
        ...

    def opened(self, request: Hashable, words: Tensor) -> None:
        """A request gets this record: [words] int32 with anything in it, to be made empty."""
        ...

    def closed(self, request: Hashable) -> None:
        """It has it no more."""
        ...


class SelectorTraits(Protocol):
    """See `engine.selection.base.Selector`."""

    budget: int
    """Rows that know no more tokens than that see everything, and are none of the method's business."""
    levels: tuple[int, ...]
    """More numbers of known tokens from which rows are treated otherwise: a batch has rows between two of them only."""
    stats: MethodStats
    prompts: Literal["dense", "seed", "sparse"]
    """How prompts are computed: densely; densely, with `prefill` called for the last chunk to look at; or sparsely."""
    grid: int
    """With sparse prompts: chunks end at multiples of this many positions, whatever the scheduler's budget; else 0."""
    domain: str
    """What must agree beside the model for prompt KV to be shared: "" when it is the dense one."""
    records: tuple[Record, ...]
    """State of running requests that may know more tokens than `budget`. It is empty when a request is admitted, also after a
    preemption (`engine.requests.state`)."""
    tail: int
    """Last rows of a prompt that are computed in one step, whatever is found of it: those that `prefill` looks at; else 0."""
    dense_until: int
    """Rows of a prompt below this position see everything."""


class Layer(NamedTuple):
    """One layer of one step, as a hook sees it."""

    layer: int
    """0 to layers - 1."""
    q: Tensor
    """[rows of the batch, query heads of `Geometry.heads`, head_dim], rotated, in the model's dtype."""
    kv: PagedKV
    """The layer's cache of those heads; the step's own rows are stored already."""

    @property
    def heads(self) -> int:
        """How many KV heads it has."""
        return self.kv.k.shape[1]


class Look(Protocol):
    """Rows of one step that are computed to look at them. Their KV is stored as any other's, but they count for nothing."""

    @property
    def stop(self) -> int:
        """The layer before whose attention they leave: KV is stored up to it, and attention ends with the one before."""
        ...

    @property
    def depth(self) -> float:
        """What a row takes, in rows of a full pass."""
        ...

    def attend(self, layer: Layer, out: Tensor) -> None:
        """Write attention of the rows in a layer before `stop`. out: [rows, q_heads, head_dim]."""
        ...


class Repairing(Protocol):
    """Which rows of a prompt are computed where others hold KV from elsewhere (`engine.reuse.kvshare.repair`)."""

    taint: int
    """The first position whose KV is not what a cold run gives; what comes after it is approximate."""

    @property
    def left(self) -> int:
        """Rows of the prompt pass that are still to be computed."""
        ...

    def next(self, count: int, *, tail_alone: bool = False) -> npt.NDArray[np.int64]:
        """The next of them, at most so many. tail_alone: the last ones form a chunk of their own."""
        ...

    def advance(self, count: int) -> None:
        """So many more of them have been computed."""
        ...

    def refresh(self, positions: npt.NDArray[np.int64]) -> None:
        """These, whose KV was from elsewhere, have been computed again."""
        ...


class Looks(Protocol):
    """What is still to be looked at of one request."""

    @property
    def left(self) -> int:
        """Rows, 1 or more."""
        ...

    @property
    def depth(self) -> float:
        """See `Look`: of the next rows."""
        ...

    def next(self, count: int) -> tuple[npt.NDArray[np.int64], Look]:
        """The next rows, at most `count`: their positions, ascending, and what they are for."""
        ...

    def advance(self, count: int) -> None:
        """So many more have been computed."""
        ...
