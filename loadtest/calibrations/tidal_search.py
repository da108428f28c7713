"""Calibrating TidalDecode: similarity between layers, chains of selection layers, and what each costs in KL.

One pass over decode rows of real text gives the attention weights of all layers, from them the mass that every layer's choice
covers in every later one (`similarity`), the head map, and by dynamic programming a chain of each length; a local search then
moves its layers about while the KL divergence from dense output falls (`choose`). The engine's own selector is what is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kvloom.engine.calibration.tidal import TidalCalibration, TidalChoice
from kvloom.engine.llm import LLM
from kvloom.engine.selection.base import Selector
from kvloom.engine.selection.tidal_decode import TidalDecode, TidalDecodeOptions
from kvloom.loadtest.calibrations.choose import Layers, best_chain, improve
from kvloom.loadtest.calibrations.rows import DecodeRows
from kvloom.loadtest.calibrations.similarity import WeightProbe, similarity

REACH = 3
"""Layers by which a move of the local search may shift a selection layer; in sets of up to two it may go anywhere."""


class Figures(NamedTuple):
    """What a selector costs, over all rows."""

    kl: float
    """Mean KL(dense || sparse), nats."""
    top1: float
    """Share of rows with the same likeliest token."""


class Judge:
    """Compares selectors with dense output on the same rows."""

    def __init__(self, rows: DecodeRows) -> None:
        self._rows = rows
        self._dense = rows.log_probs(None)

    def __call__(self, selector: Selector) -> Figures:
        """Run all rows with this selector."""
        found = self._rows.log_probs(selector)
        kl = (self._dense.exp() * (self._dense - found)).sum(-1).mean()
        return Figures(float(kl), float((found.argmax(-1) == self._dense.argmax(-1)).float().mean()))


class TidalSearch:
    """One model's calibration. The engine must have room for all rows of `rows` in one step."""

    def __init__(self, llm: LLM, rows: DecodeRows, budget: int, output: Literal["dense", "sparse"]) -> None:
        """output: of selection layers, while sets of them are compared."""
        self._llm, self._output, self.budget = llm, output, budget
        self.judge = Judge(rows)
        self.geometry = llm.core.runner.geometry
        probe = WeightProbe()
        rows.run(probe)
        split = self.selector(TidalDecodeOptions(layers=(0,), head_map=False))
        if int(probe.stops.min()) <= budget:
            raise ValueError(f"the shortest row sees {int(probe.stops.min())} positions; give more than the budget of {budget}")
        self.similarity = similarity(probe.weights, probe.stops, split.sinks, split.selected, split.recent)
        best = self.similarity.max(dim=2)
        self.value: Tensor = best.values.mean(-1)
        """[layers, layers]: mass that layer a's choice covers in layer l, heads mapped."""
        layers = self.geometry.layers
        self._head_map = tuple(
            tuple(tuple(best.indices[anchor, layer].tolist()) for layer in range(anchor + 1, layers))
            for anchor in range(layers)
        )

    def selector(self, options: TidalDecodeOptions, budget: int | None = None) -> TidalDecode:
        """With the head map found here, unless the options decline it."""
        kernels = self._llm.core.runner.decoder.kernels
        calibration = None if options.head_map is False else self.result("", (), 0)
        return TidalDecode(options, budget or self.budget, self.geometry, kernels, calibration)

    def figures(self, layers: Layers) -> Figures:
        """Of one set of selection layers."""
        return self.judge(self.selector(TidalDecodeOptions(layers=layers, output=self._output)))

    def choose(self, selections: int, firsts: Collection[int], tried: Callable[[Layers, float], None]) -> Layers:
        """A good set of so many selection layers. firsts: allowed first ones; tried: told of every set that is measured."""

        def score(layers: Layers) -> float:
            kl = self.figures(layers).kl
            tried(layers, kl)
            return kl

        total = self.geometry.layers
        start = best_chain(self.value, selections, firsts)
        return improve(start, total, firsts, score, total if selections <= 2 else REACH)

    def mass(self, layers: Layers) -> float:
        """Mean mass covered in the layers that read the lists of others, by this set; 1 if there are none."""
        anchor = lambda layer: max(a for a in layers if a < layer)  # noqa: E731
        readers = [layer for layer in range(layers[0] + 1, self.geometry.layers) if layer not in layers]
        return float(torch.stack([self.value[anchor(r), r] for r in readers]).mean()) if readers else 1.0

    def result(
        self, model: str, choices: tuple[TidalChoice, ...], default: int, settings: dict[str, object] | None = None
    ) -> TidalCalibration:
        """What was found, ready to be saved."""
        return TidalCalibration(
            model_key=self.geometry.model_key,
            model=model,
            choices=choices,
            default=default,
            head_map=self._head_map,
            settings=settings or {},
        )
