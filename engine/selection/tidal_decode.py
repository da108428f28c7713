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
- Where the method decides for some KV heads alone (retention `razor`: the retrieval heads), a selection layer that has none of
  them is replaced by the next layer that has, or by the last one. A head then reads the list of the head that calibration found
  most like it, if the selection layer has that one; else of its own namesake; else of the head there with the nearest number.
- KV cache correction: not a pass beside decoding; the request's own next rows recompute its tokens densely, once
  `correct_every` of them are approximate. Their KV is then the dense one and may be shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvloom.engine.bounds import MOST_TOKENS, bounded
from kvloom.engine.calibration import TidalCalibration, find_tidal
from kvloom.engine.device import upload
from kvloom.engine.requests.stats import MethodStats
from kvloom.engine.requests.traits import Layer, Record
from kvloom.engine.selection.base import EVERYWHERE, check_fields, refuse
from kvloom.engine.selection.batch import Batch, Plans
from kvloom.engine.selection.geometry import Geometry
from kvloom.kernels.interface import Kernels, Lists, PoolHow

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
    levels: tuple[int, ...] = ()
    records: tuple[Record, ...] = ()

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
        self.pools_all = options.pool == "all"
        self.how: PoolHow = "max" if options.pool == "max" else "sum"
        self.width = self.sinks + self.selected
        self.emits = options.output == "dense"
        """Whether selection layers choose by the logits of their own attention."""
        self.correct_every = options.correct_every
        self.whole = (
            "correct_every computes tokens again from KV that others have dropped; leave it out"
            if options.correct_every
            else ""
        )
        calibration = calibration or find_tidal(geometry.model_key)
        self.layers = _with_heads(selection_layers(options, geometry.layers, calibration), geometry.heads)
        self.lists = 1 if self.pools_all else max(len(geometry.heads[layer]) for layer in self.layers)
        """Most lists that a selection layer makes."""
        self.roles = _roles(self.layers, geometry.heads, self.emits)
        self.reads = _reads(options, self.layers, geometry, calibration)
        reading = [i for i, role in enumerate(self.roles) if role in ("choose", "reuse")]
        kinds = {(reads.columns, len(geometry.heads[i])) for i in reading if (reads := self.reads[i]) is not None}
        self.plans = {columns: [n for other, n in sorted(kinds) if other == columns] for columns, _ in sorted(kinds)}
        """KV heads of layers, by the columns that are read there."""
        self._listers: dict[int, Tensor] = {}
        self.stats = MethodStats()

    def decode(self, batch: Batch) -> TidalDecodeStep:
        return TidalDecodeStep(self, batch)

    def prefill(self, batch: Batch) -> TidalDecodeStep:
        raise AssertionError("prompts are dense")

    def listers(self, layer: int, heads: Tensor | None) -> Tensor | None:
        """`Kernels.attend`'s heads in a layer, of which `heads` are wanted; at the same place in every step."""
        reads = self.reads[layer]
        own = None if reads is None else reads.heads
        if own is None or heads is None:
            return own if heads is None else heads
        if layer not in self._listers:
            self._listers[layer] = torch.where(heads < 0, heads, own)
        return self._listers[layer]


Role = Literal["dense", "select", "choose", "reuse", "none"]
"""Of a layer: reads everything; the same, and makes a list; makes a list, then reads it; reads a list made before; has no heads
to decide for."""


class Reads(NamedTuple):
    """Whose list each KV head of a layer reads."""

    columns: tuple[int, ...]
    """Lists of the last selection layer, by KV head; or all of them, in order; or the one that all heads share."""
    heads: Tensor | None
    """[KV heads] int32: which of the columns each reads, if not that of its own place."""


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


def _with_heads(selections: tuple[int, ...], heads: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """For every selection layer itself, or if it has no heads, the next layer that has some, or the last; ascending."""
    able = [layer for layer, own in enumerate(heads) if own]
    return tuple(sorted({next((layer for layer in able if layer >= wanted), able[-1]) for wanted in selections}))


def _roles(selections: tuple[int, ...], heads: Sequence[tuple[int, ...]], dense_output: bool) -> list[Role]:
    """A list that no layer would read is not made: the last layer's, or one before another selection layer."""
    roles: list[Role] = []
    for layer, own in enumerate(heads):
        if not own:
            roles.append("none")
        elif layer in selections:
            after = next((later for later in range(layer + 1, len(heads)) if heads[later]), None)
            used = after is not None and after not in selections
            roles.append("choose" if not dense_output else "select" if used else "dense")
        else:
            roles.append("dense" if layer < selections[0] else "reuse")
    return roles


def _reads(
    options: TidalDecodeOptions, selections: tuple[int, ...], geometry: Geometry, calibration: TidalCalibration | None
) -> list[Reads | None]:
    """[layers]: None where no list is read."""
    if options.head_map and calibration is None:
        raise refuse(NAME, "head_map", True, "false or null: this model has no calibration; run kvloom calibrate tidal")
    if options.head_map and options.pool == "all":
        raise refuse(NAME, "head_map", True, "false or null with pool all, where all heads share a list")
    if options.head_map is False:
        calibration = None
    found: list[Reads | None] = []
    for layer, own in enumerate(geometry.heads):
        anchor = max((s for s in selections if s <= layer), default=None)
        if anchor is None or not own:
            found.append(None)
        elif options.pool == "all":
            found.append(Reads((0,), None))
        else:
            there, places = geometry.heads[anchor], tuple(range(len(geometry.heads[anchor])))
            mapped = None if calibration is None or anchor == layer else calibration.heads(anchor, layer)
            listers = tuple(there.index(_lister(head if mapped is None else mapped[head], head, there)) for head in own)
            if len(own) != len(there) or (mapped is None and listers == places):
                found.append(Reads(listers, None))
            else:  # one plan for all such layers
                found.append(Reads(places, upload(np.array(listers, np.int32), geometry.device)))
    return found


def _lister(like: int, head: int, there: tuple[int, ...]) -> int:
    """The head whose list a head reads. like: the one most like it; there: those of the selection layer, which have lists."""
    return next((found for found in (like, head) if found in there), min(there, key=lambda found: (abs(found - head), found)))


class TidalDecodeStep:
    """One step of all rows."""

    def __init__(self, method: TidalDecode, batch: Batch) -> None:
        self._method, self._batch = method, batch
        rows, width = batch.rows, method.width
        lists = batch.ints("lists", rows, method.lists, width)
        lists[..., : method.sinks] = torch.arange(method.sinks, dtype=torch.int32, device=lists.device)
        self._chosen = lists[..., method.sinks :]
        self._whole = batch.span("whole", 0, batch.stops)
        self._sparse: dict[tuple[int, ...], Plans] = {}
        """By `Reads.columns`."""
        for columns, counts in method.plans.items():
            offsets = (np.arange(len(batch.stops))[:, None] * method.lists + np.array(columns)) * width
            lengths = batch.column(f"lengths {columns}", np.full_like(offsets, width))
            listed = Lists(lists.flatten(), batch.column(f"offsets {columns}", offsets), lengths)
            self._sparse[columns] = batch.seen(f"sparse {columns}", batch.stops - method.recent, listed, counts)
        self._candidates = batch.column("candidates", batch.stops - (method.sinks + method.recent))
        self._offset = batch.tensor("offset", np.full(rows, method.sinks))
        self.program = self._whole.width

    def attend(self, layer: Layer, out: Tensor, heads: Tensor | None = None, lse: Tensor | None = None) -> None:
        """See `RowsInStep`."""
        method, batch, whole = self._method, self._batch, self._whole
        role, reads = method.roles[layer.layer], method.reads[layer.layer]
        if role == "choose":
            self._choose(layer, batch.score(layer, whole))
        if role in ("choose", "reuse"):
            assert reads is not None
            batch.attend(layer, self._sparse[reads.columns], out, heads=method.listers(layer.layer, heads), lse=lse)
            return
        logits = batch.logits(layer.q, whole.width) if role == "select" else None
        batch.attend(layer, whole.plans, out, heads=heads, lse=lse, logits=logits)
        if logits is not None:
            self._choose(layer, logits)

    def finish(self) -> None:
        """See `RowsInStep`."""
        roles, stats = self._method.roles, self._batch.stats
        stats.selections += len(self._batch.stops) * (roles.count("choose") + roles.count("select"))
        stats.reused += len(self._batch.stops) * roles.count("reuse")

    def _choose(self, layer: Layer, logits: Tensor) -> None:
        """Lists for the layers to come. logits: [rows, query heads, width], column j being position j.

        The softmax runs over everything, as in attention, so that a head which looks at sinks has little say.
        """
        method, batch = self._method, self._batch
        lists = 1 if method.pools_all else layer.heads
        weights = batch.rank(logits, self._whole.zeros, batch.stop, lists, how=method.how)
        ranking, chosen = weights[..., method.sinks :], self._chosen[:, :lists]
        batch.kernels.select(ranking, self._candidates, method.selected, offset=self._offset, out=(chosen, None))
