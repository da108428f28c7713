"""What a selection method is to the engine: three small protocols and a table of names.

    Method       one per name: its options, and how to make a selector of them
    Selector     one per (method, budget, options) in use: knows where its requests' state lies, outlives steps
    RowsInStep   one per step and batch of rows: attends, layer by layer, to what the method lets the rows see

Budgets count positions: a sparse decode row reads about `budget` of them, forced ones (sinks, recent tokens) included.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from kvloom.engine.bounds import shown, wrong
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.requests.traits import Layer, SelectorTraits
from kvloom.engine.selection.geometry import Geometry
from kvloom.engine.settings.former import renamed
from kvloom.kernels.interface import Kernels

if TYPE_CHECKING:
    from kvloom.engine.selection.batch import Batch


Counting = Callable[[], None]
"""Adds what a device has counted to statistics, once that is computed."""
EVERYWHERE = sys.maxsize
"""`Selector.dense_until` of methods that compute prompts densely."""


class RowsInStep(Protocol):
    """A batch's way through one step: the rows of one method."""

    @property
    def program(self) -> Hashable | None:
        """Of rows that decode, if they are all that a step has, what their kernel calls depend on beside tensors that stay in
        place: steps with equal programs may replay one another's calls. None if there is more to them than kernel calls."""
        ...

    def attend(self, layer: Layer, out: Tensor, heads: Tensor | None = None, lse: Tensor | None = None) -> None:
        """Choose what the rows see in this layer, and write their attention over it.

        out: as `Layer.q`; heads: [KV heads] int32, negative for those that are left out, None for all: in every step those of
        the layer; lse: [rows, query heads] fp32, written if given, of what was seen. Reads no tensor's value on the host while
        rows decode.
        """
        ...

    def finish(self) -> Counting | None:
        """All layers are queued: add to the method's statistics. Returns what adds, and waits for, what only the device knows;
        where that is counted may be written again meanwhile."""
        ...


class Selector(SelectorTraits, Protocol):
    """One method with one budget and one set of options. Called on the engine's thread only."""

    emits: bool
    """Whether it chooses by the logits of a layer's own attention, which leaves no head out."""

    def decode(self, batch: Batch) -> RowsInStep:
        """A step's decode rows beyond the budget, one run of one row per request."""
        ...

    def prefill(self, batch: Batch) -> RowsInStep:
        """A step's prompt rows, if `prompts` is not "dense". Sparse: a run per grid cell; seed: a run per last chunk."""
        ...


@runtime_checkable
class Correcting(Protocol):
    """What a selector has beside that if it wants approximate KV computed again."""

    correct_every: int
    """Once so many known tokens of a request have approximate KV, the engine recomputes them densely; 0 for never."""


@runtime_checkable
class Extrapolating(Protocol):
    """What a selector has beside that if it may serve sequences that are longer than the model was trained for."""

    extrapolates: bool
    """Whether it does with its options: no row, of the prompt neither, sees positions further apart than trained."""


@runtime_checkable
class Whole(Protocol):
    """What a selector has beside that if it may have to decide for all KV heads (`Geometry.heads`)."""

    whole: str
    """Why it has to with its options, and what to do instead, as a client is told; "" if it need not."""


def extrapolates(selector: Selector | None) -> bool:
    """Whether a request with this selector may be longer than the model's trained length."""
    return selector is not None and isinstance(selector, Extrapolating) and selector.extrapolates


@dataclass(frozen=True, slots=True)
class Method:
    """A registered selection method."""

    name: str
    summary: str
    options: type
    """Frozen dataclass; a field's docstring and range are its documentation. Its `__post_init__` raises InvalidRequestError."""
    make: Callable[[Any, int, Geometry, Kernels], Selector]
    """(options, budget, geometry, kernels) -> selector. Raises InvalidRequestError if they cannot work together."""
    default_budget: int = 512
    takes_budget: Callable[[Any], bool] = lambda options: True
    """Whether a budget means something with these options. If not, it is refused, and `make` gets the longest length."""


def read_options(method: Method, values: Mapping[str, Any]) -> Any:
    """A method's options from a request's JSON object. Raises InvalidRequestError naming the key that is wrong."""
    return read_fields(method.options, method.name, values)


def read_fields(cls: type, name: str, values: Mapping[str, Any]) -> Any:
    """A dataclass `cls` from the JSON object `kv.<name>`. Raises InvalidRequestError naming the key that is wrong."""
    fields, values = {field.name for field in dataclasses.fields(cls)}, renamed(name, values)
    for key in values:
        where = f"kv.{name}.{str(key)[:64]}"
        if key not in fields:
            allowed = ", ".join(sorted(fields)) or "none"
            raise InvalidRequestError(f"{where} is not an option; allowed: {allowed}", param=where)
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def check_fields(options: Any, name: str) -> None:
    """Types and ranges as declared. Raises InvalidRequestError naming the key of `kv.<name>` that is wrong."""
    if (found := wrong(options)) is not None:
        raise refuse(name, found.name, found.value, found.allowed)


def refuse(method: str, option: str, value: object, allowed: str) -> InvalidRequestError:
    """The error for an option out of bounds."""
    where = f"kv.{method}.{option}" if option != "budget" else "kv.budget"
    return InvalidRequestError(f"{where} is {shown(value)}; allowed: {allowed}", param=where)
