"""What a selection method is to the engine: three small protocols and a table of names.

    Method     one per name: its options, and how to make a selector of them
    Selector   one per (method, budget, options) in use: knows its requests' state, outlives steps
    LayerHook  one per step and batch of rows: says before each layer what the rows see, and looks at the layer afterwards

A selector decides *which positions a row sees*; `engine.attention` makes one attention call per layer for all rows.
Budgets count positions: a sparse decode row reads about `budget` of them, forced ones (sinks, recent tokens) included.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from kvloom.engine.bounds import shown, wrong
from kvloom.engine.client import MethodStats as MethodStats
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.slots import Slab
from kvloom.kernels.interface import Kernels, PagedKV

if TYPE_CHECKING:
    from kvloom.engine.selection.batch import Batch


EVERYWHERE = sys.maxsize
"""`Selector.dense_until` of methods that compute prompts densely."""


class Geometry(NamedTuple):
    """What a method may know of the model."""

    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    max_len: int
    """Longest sequence this engine serves."""
    trained_len: int
    """Longest sequence the model was trained for."""
    inv_freq: Tensor
    """[rotary/2] fp32: the model's effective inverse frequencies."""
    model_key: str
    """Fingerprint of the weights: calibrations are stored under it."""

    @property
    def scale(self) -> float:
        """1 / sqrt(head_dim): the scale of attention logits."""
        return float(self.head_dim**-0.5)


class Layer(NamedTuple):
    """One layer of one step, as a hook sees it."""

    layer: int
    """0 to layers - 1."""
    q: Tensor
    """[rows of the batch, q_heads, head_dim], rotated, in the model's dtype."""
    kv: PagedKV
    """The layer's cache; the step's own rows are stored already."""


class LayerHook(Protocol):
    """One batch's way through one step."""

    def before(self, layer: Layer) -> None:
        """Say what the rows see in this layer: through `Batch.see_all`, `Batch.see`. What was said stays until said anew.
        Setting `batch.emits` asks for the logits of this layer's attention, `batch.wants_lse` for its `batch.lse`."""
        ...

    def after(self, layer: Layer, logits: Tensor | None, out: Tensor) -> None:
        """Look at the layer. logits: [rows, q_heads, width] fp32, scaled, in the order seen, if `batch.emits` was set;
        out: [rows, q_heads, head_dim], may be written by methods that attend on their own."""
        ...


class Selector(Protocol):
    """One method with one budget and one set of options. Called on the engine's thread only."""

    budget: int
    stats: MethodStats
    heads: int
    """Lists per row: 1 (shared by all KV heads) or the number of KV heads."""
    width: int
    """Most positions a list can hold."""
    prompts: Literal["dense", "seed", "sparse"]
    """How prompts are computed: densely; densely, with `prefill` called for the last chunk to look at; or sparsely."""
    grid: int
    """With sparse prompts: chunks end at multiples of this many positions, whatever the scheduler's budget; else 0."""
    domain: str
    """What must agree beside the model for prompt KV to be shared: "" when it is the dense one."""
    emits: bool
    """Whether decode rows may ask for logits."""
    slabs: tuple[Slab, ...]
    """State of running requests that may know more tokens than `budget`, with which a row sees everything and leaves nothing.
    It is empty when a request is admitted, also after a preemption (`engine.state`)."""
    tail: int
    """Last rows of a prompt that are computed in one step, whatever is found of it: those that `prefill` looks at; else 0."""
    dense_until: int
    """Rows of a prompt below this position see everything."""

    def decode(self, batch: Batch) -> LayerHook:
        """A step's decode rows, one run of one row per request."""
        ...

    def prefill(self, batch: Batch) -> LayerHook:
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
    fields = {field.name for field in dataclasses.fields(cls)}
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
