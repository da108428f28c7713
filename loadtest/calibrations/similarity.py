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

from kvloom.engine.requests.stats import MethodStats
from kvloom.engine.requests.traits import Layer, Record
from kvloom.engine.selection.batch import Batch


class WeightProbe:
    """A selector that reads everything and keeps the attention weights of every row and layer."""

    budget, grid, tail, dense_until = 0, 0, 0, 0
    levels: tuple[int, ...] = ()
    records: tuple[Record, ...] = ()
    emits = True
    prompts: Literal["dense", "seed", "sparse"] = "dense"
    domain = ""

    def __init__(self) -> None:
        self.stats = MethodStats()
        self.weights: list[Tensor] = []
        """[layers] of [rows, kv_heads, longest] fp32; zero past a row's end."""
        self.stops = torch.empty(0, dtype=torch.int32)
        """[rows]: positions that each row sees."""

    def decode(self, batch: Batch) -> _ProbeStep:
        self.weights, self.stops = [], batch.stop.clone()
        return _ProbeStep(self, batch)

    def prefill(self, batch: Batch) -> _ProbeStep:
        raise AssertionError("prompts are dense")


class _ProbeStep:
    program = None

    def __init__(self, probe: WeightProbe, batch: Batch) -> None:
        self._probe, self._batch = probe, batch
        self._whole = batch.span("whole", 0, batch.stops)
        self._unseen = torch.arange(self._whole.width) >= probe.stops[:, None]

    def attend(self, layer: Layer, out: Tensor, heads: Tensor | None = None, lse: Tensor | None = None) -> None:
        """See everything, and keep the weights."""
        batch, whole = self._batch, self._whole
        logits, kv_heads = batch.logits(layer.q, whole.width), batch.geometry.kv_heads
        batch.attend(layer, whole.plans, out, heads=heads, lse=lse, logits=logits)
        weights = batch.rank(logits, whole.zeros, batch.stop, kv_heads, how="sum")
        self._probe.weights.append((weights / batch.geometry.group).masked_fill_(self._unseen[:, None], 0.0))

    def finish(self) -> None:
        """Nothing is chosen."""


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
