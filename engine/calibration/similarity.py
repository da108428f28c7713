"""How well one layer's choice serves another: attention mass covered, layer by layer and head by head.

For a decode row, W[l, h, n] is the weight that KV head h of layer l gives position n (softmax, mean over its g query heads),
and S[a, h'] the positions that TidalDecode would read if head h' of layer a chose: sinks, top-k of W[a, h'], recent tokens.
Then

    R[a, l, h', h] = mean over rows of  sum_{n in S[a, h']} W[l, h, n]        in [0, 1]

is Kascade's cross-layer similarity (arXiv 2512.16391), but for one thing: Kascade divides by what the layer's own choice would
cover, which here would hide layers that no list serves. The best h' for every (a, l, h) is the head map.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kvloom.engine.selection.base import Layer, MethodStats
from kvloom.engine.selection.batch import Batch
from kvloom.engine.slots import Slab


class WeightProbe:
    """A selector that reads everything and keeps the attention weights of every row and layer."""

    budget, heads, width, grid, tail, dense_until = 0, 1, 1, 0, 0, 0
    slabs: tuple[Slab, ...] = ()
    prompts: Literal["dense", "seed", "sparse"] = "dense"
    domain = ""
    emits = True

    def __init__(self) -> None:
        self.stats = MethodStats()
        self.weights: list[Tensor] = []
        """[layers] of [rows, kv_heads, longest] fp32; zero past a row's end."""
        self.stops = torch.empty(0, dtype=torch.int32)
        """[rows]: positions that each row sees."""

    def decode(self, batch: Batch) -> _ProbeStep:
        self.weights, self.stops = [], torch.from_numpy(batch.stops.copy())
        return _ProbeStep(self, batch)

    def prefill(self, batch: Batch) -> _ProbeStep:
        raise AssertionError("prompts are dense")


class _ProbeStep:
    def __init__(self, probe: WeightProbe, batch: Batch) -> None:
        self._probe, self._batch = probe, batch
        self._first = batch.stops * 0
        self._unseen = torch.arange(int(batch.stops.max())) >= probe.stops[:, None]

    def before(self, layer: Layer) -> None:
        """Ask for the logits."""
        self._batch.emits = True

    def after(self, layer: Layer, logits: Tensor | None, out: Tensor) -> None:
        """Keep the weights."""
        assert logits is not None
        heads = self._batch.geometry.kv_heads
        weights = self._batch.rank(logits, self._first, self._batch.stops, heads, how="sum")
        group = self._batch.geometry.q_heads // heads
        self._probe.weights.append((weights / group).masked_fill_(self._unseen[:, None], 0.0))


def read_by(weights: Tensor, stops: Tensor, sinks: int, selected: int, recent: int) -> Tensor:
    """What TidalDecode reads if these weights choose. weights: [rows, heads, n]; stops: [rows]. Returns the same shape, 0 or 1.

    Rows must be longer than sinks + selected + recent.
    """
    position = torch.arange(weights.shape[2])
    tail = (position >= stops[:, None] - recent) & (position < stops[:, None])
    forced = (tail | (position < sinks))[:, None].expand_as(weights)
    chosen = weights.masked_fill(forced, -1.0).topk(selected, dim=2).indices
    return forced.float().scatter_(2, chosen, 1.0)


def similarity(weights: list[Tensor], stops: Tensor, sinks: int, selected: int, recent: int) -> Tensor:
    """R of the module's description: [layers, layers, heads, heads] fp32, [a, l, h', h]; zero for l < a."""
    layers, heads = len(weights), weights[0].shape[1]
    found = torch.zeros(layers, layers, heads, heads)
    for anchor in range(layers):
        seen = read_by(weights[anchor], stops, sinks, selected, recent)
        for layer in range(anchor, layers):
            found[anchor, layer] = torch.bmm(seen, weights[layer].transpose(1, 2)).mean(0)
    return found
