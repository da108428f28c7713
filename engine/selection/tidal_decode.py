"""TidalDecode (arXiv 2410.05076, ICLR 2025), with the layers and heads of Kascade (arXiv 2512.16391).

Neighbouring layers attend to much the same tokens, so a few layers choose for all. One decode step, layer l of L, first
selection layer s1:

    full attention                        l < s1           everything
    full attention with token selection   l = s1           everything; the best k by q k^T are the list of the layers behind it
    re-selection                          other l chosen   the same again: what is chosen at s1 fades in deep layers
    position persistent sparse attention  all others       the list of the last selection layer

Nothing persists between steps: every step chooses anew, so there is no state, and requests come and go freely.

Departures, and why:

- The paper keeps a list per *query* head, which under GQA makes a KV head read the union of its group's lists. Here a list
  belongs to a KV head: weights of its g query heads are summed after the softmax (as Kascade pools them), then top-k.
- Sinks and recent tokens are always read; the paper's code forces none, its authors' next method keeps a window of recent
  ones (LessIsMore, arXiv 2508.07101). The budget counts them: budget = sinks + selected + recent.
- The paper has two selection layers, {2, s}. Any set may be given, and calibration finds good ones by dynamic programming over
  the attention mass that one layer's choice covers in another (Kascade's anchor layers): see `engine.calibration`.
- `head_map`: head h of a sparse layer reads the list of whichever head of the selection layer is most like it (head remapping
  in Kascade).
- `output="sparse"`: a selection layer scores K alone and then reads only what it chose, as Kascade's anchor layers do.
- KV cache correction: not a pass beside decoding; the request's own next rows recompute its tokens densely, once
  `correct_every` of them are approximate. Their KV is then the dense one and may be shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.engine.bounds import MOST_TOKENS, bounded
from kvloom.engine.calibration import TidalCalibration, find_tidal
from kvloom.engine.selection.base import EVERYWHERE, Geometry, Layer, MethodStats, check_fields, refuse
from kvloom.engine.selection.batch import Batch, Ints
from kvloom.engine.slots import Slab
from kvloom.kernels.interface import Kernels, PoolHow

NAME = "tidal_decode"


@dataclass(frozen=True, slots=True)
class TidalDecodeOptions:
    """Options of tidal_decode."""

    selections: int | None = bounded(None, 1, 1024)
    """How many selection layers: one of the sets that calibration found for this model. None: its default set."""
    layers: tuple[int, ...] | None = bounded(None, 0, 1023)
    """The selection layers themselves, ascending, counted from 0; layers before the first are dense. None: calibrated ones,
    or without a calibration the paper's two, the third layer and one at two fifths of the depth."""
    head_map: bool | None = None
    """Whether a KV head reads the list of the selection layer's most similar head instead of its own namesake's. None: if the
    model is calibrated."""
    output: Literal["dense", "sparse"] = "sparse"
    """What a selection layer itself attends to: everything, or, at about half the cost, only what it has just chosen."""
    pool: Literal["group", "max", "all"] = "group"
    """Which weights choose a list: the sum over the query heads of each KV head, their maximum, or the sum over all query
    heads of the layer, which makes one list for all KV heads."""
    sinks: int | None = bounded(None, 0, MOST_TOKENS)
    """First tokens that are always read. None: 4, or an eighth of the budget if that is less."""
    recent: int | None = bounded(None, 1, MOST_TOKENS)
    """Last tokens that are always read, the current one included. None: a quarter of the budget."""
    correct_every: int = bounded(0, 0, MOST_TOKENS)
    """Recompute generated tokens densely whenever this many of them are approximate; 0 for never."""

    def __post_init__(self) -> None:
        if self.selections is not None and self.layers is not None:
            raise refuse(NAME, "selections", self.selections, "selections or layers, not both")
        check_fields(self, NAME)
        layers = self.layers
        if layers is not None and (not layers or any(a >= b for a, b in pairwise(layers))):
            raise refuse(NAME, "layers", list(layers), "one or more layer numbers, ascending")


class TidalDecode:
    """Chooses in a few layers for all others. No state."""

    prompts: Literal["dense", "seed", "sparse"] = "dense"
    grid = tail = 0
    dense_until = EVERYWHERE
    domain = ""
    slabs: tuple[Slab, ...] = ()

    def __init__(
        self,
        options: TidalDecodeOptions,
        budget: int,
        geometry: Geometry,
        kernels: Kernels,
        calibration: TidalCalibration | None = None,
    ) -> None:
        """calibration: to use instead of what is stored for the model."""
        self.sinks = min(4, budget // 8) if options.sinks is None else options.sinks
        self.recent = max(1, budget // 4) if options.recent is None else options.recent
        self.selected = budget - self.sinks - self.recent
        if self.selected < 1:
            allowed = f"with {self.sinks} sinks and {self.recent} recent tokens, at least {self.sinks + self.recent + 1}"
            raise refuse(NAME, "budget", budget, allowed)
        self.budget = budget
        self.heads = 1 if options.pool == "all" else geometry.kv_heads
        self.how: PoolHow = "max" if options.pool == "max" else "sum"
        self.width = self.sinks + self.selected
        self.dense_output = options.output == "dense"
        self.emits = self.dense_output
        self.correct_every = options.correct_every
        calibration = calibration or find_tidal(geometry.model_key)
        self.layers = selection_layers(options, geometry.layers, calibration)
        self.roles = _roles(self.layers, geometry.layers, self.dense_output)
        self.maps = _maps(options, self.layers, geometry, calibration)
        self.stats = MethodStats()

    def decode(self, batch: Batch) -> TidalDecodeStep:
        return TidalDecodeStep(self, batch)

    def prefill(self, batch: Batch) -> TidalDecodeStep:
        raise AssertionError("prompts are dense")


Role = Literal["dense", "select", "choose", "reuse"]
"""Of a layer: reads everything; the same, and makes a list; makes a list, then reads it; reads a list made before."""


def selection_layers(options: TidalDecodeOptions, layers: int, calibration: TidalCalibration | None) -> tuple[int, ...]:
    """The selection layers of a model of so many layers. Raises InvalidRequestError if what is asked for is not there."""
    if options.layers is not None:
        if options.layers[-1] >= layers:
            raise refuse(NAME, "layers", list(options.layers), f"0 to {layers - 1}, this model's layers")
        return options.layers
    if options.selections is None:
        return paper_layers(layers) if calibration is None else calibration.choice(None).layers
    if calibration is None:
        raise refuse(NAME, "selections", options.selections, "none: this model has no calibration; run kvloom calibrate tidal")
    if options.selections not in calibration.sizes:
        raise refuse(NAME, "selections", options.selections, ", ".join(map(str, calibration.sizes)) + ", as calibrated")
    return calibration.choice(options.selections).layers


def paper_layers(layers: int) -> tuple[int, ...]:
    """The paper's selection and re-selection layer: 2 and 13 of 32. Shallow models have no two layers to spare for dense."""
    return tuple(sorted({min(2, layers // 8), round(0.4 * layers)}))


def _roles(selections: tuple[int, ...], layers: int, dense_output: bool) -> list[Role]:
    """A list that no layer would read is not made: the last layer's, or one before another selection layer."""
    roles: list[Role] = []
    for layer in range(layers):
        if layer in selections:
            used = layer + 1 < layers and layer + 1 not in selections
            roles.append("choose" if not dense_output else "select" if used else "dense")
        else:
            roles.append("dense" if layer < selections[0] else "reuse")
    return roles


def _maps(
    options: TidalDecodeOptions, selections: tuple[int, ...], geometry: Geometry, calibration: TidalCalibration | None
) -> list[Ints]:
    """[layers] of [kv_heads]: whose list each KV head reads."""
    if options.head_map and calibration is None:
        raise refuse(NAME, "head_map", True, "false or null: this model has no calibration; run kvloom calibrate tidal")
    if options.head_map and options.pool == "all":
        raise refuse(NAME, "head_map", True, "false or null with pool all, where all heads share a list")
    own = np.zeros(geometry.kv_heads, np.int32) if options.pool == "all" else np.arange(geometry.kv_heads, dtype=np.int32)
    if calibration is None or options.head_map is False or options.pool == "all":
        return [own] * geometry.layers
    anchors = [max((s for s in selections if s < layer), default=None) for layer in range(geometry.layers)]
    return [own if anchor is None or layer in selections else np.array(calibration.heads(anchor, layer), np.int32)
            for layer, anchor in enumerate(anchors)]  # fmt: skip


class TidalDecodeStep:
    """One step of all rows. Rows within the budget see everything throughout."""

    def __init__(self, method: TidalDecode, batch: Batch) -> None:
        self.method, self.batch = method, batch
        (self.long,) = (batch.stops > method.budget).nonzero()
        if not len(self.long):
            return
        batch.lists[:, :, : method.sinks] = torch.arange(method.sinks, dtype=torch.int32)
        self.start = batch.stops[self.long] - np.int32(method.recent)
        ends = np.where(batch.stops > method.budget, batch.stops, 0).astype(np.int32)
        self.first, self.last = np.zeros(batch.runs, np.int32), ends
        candidates = np.maximum(ends - np.int32(method.sinks + method.recent), 0)
        self.candidates = torch.from_numpy(np.repeat(candidates, method.heads))
        self.offset = torch.full((batch.runs * method.heads,), method.sinks, dtype=torch.int32)
        self.counts = torch.empty(batch.runs * method.heads, dtype=torch.int32)
        self.chosen = batch.lists.flatten(0, 1)[:, method.sinks :]
        size = np.int32(method.heads * method.width)
        self.begins = np.arange(batch.runs, dtype=np.int32)[:, None] * size + np.int32(batch.base)
        self.map: npt.NDArray[np.int32] | None = None
        self.sparse = False

    def before(self, layer: Layer) -> None:
        """Set up what the layer's role needs."""
        if not len(self.long):
            return
        role, batch = self.method.roles[layer.layer], self.batch
        if role == "choose":
            self._choose(batch.score(layer.q, layer.kv, batch.table, self.first, self.last, batch.geometry.scale))
        if role in ("choose", "reuse"):
            self._read_lists(self.method.maps[layer.layer])
            batch.stats.reused += len(self.long) if role == "reuse" else 0
        elif self.sparse:
            batch.see_all(self.long)
            self.sparse = False
        batch.emits = role == "select"

    def after(self, layer: Layer, logits: Tensor | None, out: Tensor) -> None:
        """Choose from the logits of a dense layer."""
        if logits is not None and len(self.long):
            self._choose(logits)

    def _choose(self, logits: Tensor) -> None:
        """Lists for the layers to come. logits: [rows, q_heads, width], column j being position j.

        The softmax runs over everything, as in attention, so that a head which looks at sinks has little say.
        """
        method, batch = self.method, self.batch
        weights = batch.rank(logits, self.first, self.last, method.heads, how=method.how)
        ranking = weights.flatten(0, 1)[:, method.sinks :]
        batch.kernels.select(ranking, self.candidates, method.selected, offset=self.offset, out=(self.chosen, self.counts))
        batch.stats.selections += len(self.long)

    def _read_lists(self, heads: npt.NDArray[np.int32]) -> None:
        """Every KV head h of the long rows reads the list of heads[h], then the recent tokens."""
        method, batch = self.method, self.batch
        if heads is not self.map:
            batch.offsets[:] = self.begins + heads * np.int32(method.width)
            self.map, batch.changed = heads, True
        if not self.sparse:
            batch.see(self.long, self.start, method.width)
            self.sparse = True
