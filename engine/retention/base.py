"""What a retention is to the engine: a protocol, and a table of names with their options.

Method       one per name: its options, and how to make a retention of them
Retention    one per engine: the head groups, what rows see of the one that gives memory back, and when it gives it back
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kvloom.engine.cache import BlockTable, CacheManager, GroupSpec
from kvloom.engine.errors import ConfigError
from kvloom.engine.model.config import ModelConfig
from kvloom.engine.requests.lifecycle import Feature
from kvloom.engine.requests.state import Keeper, StateMemory
from kvloom.engine.settings.former import renamed
from kvloom.engine.settings.options import json_object, option_fields, parse_value
from kvloom.kernels.interface import Folded, Kernels, Rows

if TYPE_CHECKING:
    from kvloom.engine.requests.plan import Chunk
    from kvloom.engine.requests.request import Request


KEPT = 5
"""Numbers that what is kept may need of every row."""


class Kept(NamedTuple):
    """What a step's rows see of the second head group."""

    rows: Rows
    unseen: list[int]
    """[chunks]: positions that a chunk's last row does not see, summed over the group's layers and KV heads."""
    folded: Callable[[int], Folded] | None = None
    """By layer, what stands for those."""


class Retention(Keeper, Protocol):
    """What gives blocks of a cache's second head group back while requests run; the first group keeps whole sequences and is
    selection's. Called on the engine's thread."""

    name: str
    specs: tuple[GroupSpec, GroupSpec]

    def make_cache(self, memory: int, length: int, block_size: int, device: torch.device) -> CacheManager:
        """A cache of both groups. length: of the sequences that it is divided for. Raises ConfigError if it is too small."""
        ...

    def kept(
        self, chunks: Sequence[Chunk], tables: Tensor, request: Tensor, stop: Tensor, states: StateMemory, space: Tensor
    ) -> Kept:
        """What the rows of these chunks see. tables: [chunks, max_blocks] of the group; request, stop: [rows]; all int32.
        space: [KEPT, rows] int32 with anything in it, at one address in every step. Rows behind the chunks' are padding."""
        ...

    def advance(self, going_on: Sequence[tuple[Request, BlockTable]], states: StateMemory, kernels: Kernels) -> None:
        """All known tokens of these requests but the last are computed: give back what their next rows do not see any more."""
        ...


class Forgetting(Feature):
    """Has a retention give memory back as requests go on."""

    def __init__(self, retention: Retention, states: StateMemory, kernels: Kernels) -> None:
        """states: where its records lie; kernels: who computes them."""
        self.retention, self._states, self._kernels = retention, states, kernels

    def computed(self, chunks: Sequence[Chunk]) -> None:
        """See `Feature`: of those that decode next, whose prompts have been computed densely."""
        pairs = [(chunk.request, chunk.table) for chunk in chunks]
        going_on = [(r, table) for r, table in pairs if len(r.prompt) < len(r.tokens) == r.computed + 1]
        self.retention.advance(going_on, self._states, self._kernels)


@dataclass(frozen=True, slots=True)
class Method:
    """A registered retention."""

    name: str
    summary: str
    options: type | None
    """Frozen dataclass; a field's docstring is its documentation. Its `__post_init__` raises ConfigError. None: no options."""
    make: Callable[[Any, str, ModelConfig, torch.dtype], Retention | None]
    """(options, model's fingerprint, config, dtype of KV) -> retention; None if nothing is ever given back. Raises ConfigError
    if the model cannot be served so."""

    def read(self, text: str | None) -> Any:
        """Options from a JSON object. Raises ConfigError naming what is wrong."""
        if self.options is None:
            if text is not None:
                raise ConfigError(f"retention_options is given, but retention {self.name} has none; choose another --retention")
            return None
        known = {option.name: option for option in option_fields(self.options)}
        values = json_object("retention_options", text, f'{{"{next(iter(known))}": 1}}')
        values = renamed(self.name, values)
        if strange := sorted(set(values) - set(known)):
            raise ConfigError(f"retention_options: unknown {', '.join(strange)}; allowed: {', '.join(sorted(known))}")
        return self.options(**{name: parse_value(known[name], value) for name, value in values.items()})
