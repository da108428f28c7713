"""The decoder of the Llama family (Llama, Mistral, Qwen2, Qwen3): one flat batch of rows through all layers.

    x = embedding[token]                                  residual stream, fp32
    for each layer:
        x += attention(norm(x) W_qkv) W_o                 attention is the caller's: rotation, cache, visibility
        x += (silu(gate) * up) W_down                     gate, up = norm(x) W_gate_up
    logits = norm(x) W_head                               for the rows that are wanted

Owns the weights and a workspace; knows nothing of requests, caches or positions. A row is one token of any request; rows meet
only inside attention, so callers may drop rows between layers. The residual stream stays in fp32 whatever the weights' dtype:
each sub-layer's result is added by the norm that follows it, which is why `layer` takes and returns a pending `delta`.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from kvloom.engine.model.config import ModelConfig
from kvloom.engine.model.linear import Linear
from kvloom.engine.model.quantized import DenseEmbedding, PackedEmbedding
from kvloom.engine.model.rope import RotaryTable, rotary_table
from kvloom.kernels.graph import CaptureError, Graph
from kvloom.kernels.interface import Kernels

T = TypeVar("T")
log = logging.getLogger("kvloom.engine")
GraphMode = Literal["none", "piecewise", "full"]
"""What of a step is captured in a graph and replayed: nothing, all but attention, or all. Attention that is captured makes the
same calls at the same addresses in every step."""
MODES: tuple[GraphMode, ...] = ("none", "piecewise", "full")
MOST_GRAPHS = 128
"""Kept at a time; the one that was used longest ago goes first."""


class LayerAttention(Protocol):
    """Attention of one step, supplied by the runner: it knows positions, slots and what each row sees."""

    def __call__(self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        """qkv: [rows, (q_heads + 2 kv_heads) * head_dim] in the model's dtype, not rotated, q then k then v; reused by the
        next layer. q_norm, k_norm: [head_dim] fp32 RMS-norm weights, or None. Returns [rows, q_heads * head_dim]; with
        graphs, at one address in every step."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Weights of one layer. Norm weights are fp32: [hidden], and [head_dim] for q_norm and k_norm."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class Workspace(NamedTuple):
    """Activations that every layer writes anew, for a number of rows. All in the model's dtype but for the residual."""

    residual: Tensor
    """[rows, hidden] fp32"""
    normed: Tensor
    """[rows, hidden]"""
    qkv: Tensor
    gate_up: Tensor
    gated: Tensor
    """[rows, intermediate]"""
    delta: Tensor
    """[rows, hidden]: what the last sub-layer adds to the residual"""

    def rows(self, count: int) -> Workspace:
        return Workspace(*(buffer[:count] for buffer in self))


def _call(calls: Callable[[], T]) -> T:
    """Calls that are not captured."""
    return calls()


class Captured(NamedTuple):
    """What a graph depends on."""

    attention: LayerAttention
    mode: GraphMode
    program: Hashable
    """None unless attention is captured."""
    rows: int
    """Of a device's graph; 0 for any number."""


class Decoder:
    """A model ready to run. Not thread-safe: one step at a time.

    The first step of an attention, a mode and a program (and on a device of a number of rows) is captured, and later ones
    replay it: whoever puts other kernels, other layers or another attention in their place does so within `capturing`.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        kernels: Kernels,
        *,
        embedding: DenseEmbedding | PackedEmbedding,
        layers: list[Layer],
        final_norm: Tensor,
        head: Linear,
    ) -> None:
        """embedding: rows of [vocab, hidden]; final_norm: [hidden] fp32; head: hidden -> vocab."""
        self.config, self.dtype, self.kernels, self.device = config, dtype, kernels, embedding.device
        self.embedding, self.layers, self.final_norm, self.head = embedding, layers, final_norm, head
        projections = [linear for layer in layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        graph = kernels.graph()
        self._of_device = graph is not None and graph.of_device
        captures = graph is not None and (graph.of_device or all(linear.capturable for linear in projections))
        self._most: GraphMode = "full" if captures else "none"
        self._graphs: OrderedDict[Captured, Graph] = OrderedDict()
        self.steps = Counter[GraphMode]()
        """By how much of them was replayed."""
        self.refused: OrderedDict[Captured, CaptureError] = OrderedDict()
        """Graphs that could not be captured, and why: not tried again, but for those that were forgotten over many others."""
        self.failures = 0
        """Captures that failed."""
        self._whole = self._part = self._allocate(1)

    @functools.cached_property
    def rotary(self) -> RotaryTable:
        """Cosines and sines for the runner: of all positions, unless a table of another length is set before anybody asks."""
        return rotary_table(self.config.rope, self.config.max_position, self.device)

    @property
    def graphs(self) -> int:
        """Captured ones that are kept now."""
        return len(self._graphs)

    @property
    def captures_sizes(self) -> bool:
        """Whether steps are captured for one number of rows each: then they have to be padded to few different ones."""
        return self._of_device and self._most != "none"

    def enforce_eager(self) -> None:
        """Capture nothing from now on."""
        self._most = "none"

    def forward(
        self,
        tokens: Tensor,
        attention: LayerAttention,
        graphs: GraphMode = "none",
        program: Hashable = None,
        narrows: Mapping[int, int] = MappingProxyType({}),
    ) -> Tensor:
        """tokens: [rows] int64. Returns the last layer's output behind the final norm: [rows, hidden] in the model's dtype,
        valid until the next call.

        program: what the attention's calls depend on beside the contents of their tensors; kept while they are captured.
        narrows: layers whose projection is the last that all rows get, and how many of the first ones go on; no graphs then.
        """
        x, rows = self.embed(tokens), tokens.shape[0]
        mode = min(graphs, self._most if rows and not narrows else "none", key=MODES.index)
        key = Captured(attention, mode, program if mode == "full" else None, rows if self._of_device else 0)
        if key in self.refused:
            mode = "none"
        graph = None if mode == "none" else self._graphs.get(key)
        self.steps[mode if graph is not None else "none"] += 1
        if graph is None:
            return self._through(x, attention, _call, narrows) if mode == "none" else self._capture(x, key)
        self._graphs.move_to_end(key)
        ws = self._workspace(rows)
        graph.replay(0, rows)
        if mode == "piecewise":
            for index, layer in enumerate(self.layers):
                attention(index, ws.qkv, layer.q_norm, layer.k_norm)
                graph.replay(index + 1, rows)
        return ws.normed

    @contextmanager
    def capturing(self, most: GraphMode) -> Iterator[None]:
        """Capture no more than that within; what was captured within is forgotten."""
        before, known = self._most, dict(self._graphs)
        self._most = min(most, before, key=MODES.index)
        try:
            yield
        finally:
            self._most = before
            self._graphs = OrderedDict((key, graph) for key, graph in self._graphs.items() if known.get(key) is graph)

    def forget_programs(self) -> None:
        """What was captured of attentions with a program has moved."""
        self._graphs = OrderedDict((key, graph) for key, graph in self._graphs.items() if key.program is None)

    def _capture(self, x: Tensor, key: Captured) -> Tensor:
        """Run all layers, and keep what was called for steps to come. A capture that fails leaves the step as it is."""
        graph, failed = self.kernels.graph(), list[CaptureError]()
        assert graph is not None

        def piece(calls: Callable[[], T]) -> T:
            if failed:
                return calls()
            try:
                return graph.piece(calls)
            except CaptureError as error:
                failed.append(error)
                return cast(T, error.result)

        if key.mode == "piecewise":
            result = self._through(x, key.attention, piece)
        else:
            result = piece(partial(self._through, x, key.attention, _call))
        if failed:
            self._give_up(key, failed[0])
            return result
        self._graphs[key] = graph
        if len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)
        return result

    def _give_up(self, key: Captured, error: CaptureError) -> None:
        """Steps like this one run eagerly from now on."""
        log.warning("steps of %d rows (%s) cannot be captured, and run eagerly: %s", key.rows, key.mode, error, exc_info=error)
        self.failures += 1
        self.refused[key] = error
        if len(self.refused) > MOST_GRAPHS:
            self.refused.popitem(last=False)

    def _through(
        self,
        x: Tensor,
        attention: LayerAttention,
        piece: Callable[[Callable[[], Any]], Any],
        narrows: Mapping[int, int] = MappingProxyType({}),
    ) -> Tensor:
        """All layers and the final norm, of the rows that get so far; what lies between two attentions is called by `piece`."""
        result: Tensor = piece(partial(self.project, 0, x, None))
        for index, layer in enumerate(self.layers):
            attended = attention(index, result, layer.q_norm, layer.k_norm)
            if index in narrows:
                x, attended = x[: narrows[index]], attended[: narrows[index]]
                if not len(x):
                    return self._whole.normed[:0]
            result = piece(partial(self._after, index, x, attended))
        return result

    def _after(self, index: int, x: Tensor, attended: Tensor) -> Tensor:
        """What follows a layer's attention: up to the next one's projection, or to the end."""
        delta = self.mix(index, x, attended)
        return self.project(index + 1, x, delta) if index + 1 < len(self.layers) else self.finish(x, delta)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [n, hidden], the rows of `forward`'s result that are wanted. Returns [n, vocab] fp32, the caller's."""
        return self.head(hidden, hidden.new_empty(hidden.shape[0], self.config.vocab_size, dtype=torch.float32))

    # The pieces of `forward`, for callers that change the set of rows between layers ------------------------------------

    def embed(self, tokens: Tensor) -> Tensor:
        """The residual stream of the rows: [rows, hidden] fp32, in the workspace."""
        return self.embedding(tokens, self._workspace(tokens.shape[0]).residual)

    def layer(self, index: int, x: Tensor, delta: Tensor | None, attention: LayerAttention) -> Tensor:
        """Run one layer. Adds `delta` (what the layer before returned) to x in place and returns this layer's own delta:
        [rows, hidden], in the workspace. x and delta may hold any subset of the rows of the layer before."""
        layer = self.layers[index]
        return self.mix(index, x, attention(index, self.project(index, x, delta), layer.q_norm, layer.k_norm))

    def project(self, index: int, x: Tensor, delta: Tensor | None) -> Tensor:
        """The beginning of a layer, up to its fused projection: [rows, (q_heads + 2 kv_heads) * head_dim], in the workspace.
        Adds `delta` to x in place."""
        layer, ws = self.layers[index], self._workspace(x.shape[0])
        return layer.qkv(self.kernels.add_rms_norm(x, delta, layer.input_norm, self.config.rms_eps, ws.normed), ws.qkv)

    def mix(self, index: int, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of a layer, from what its attention returned: [rows, q_heads * head_dim]. Returns the layer's delta."""
        layer, kernels, ws = self.layers[index], self.kernels, self._workspace(x.shape[0])
        projected = layer.o(attended, ws.delta)
        normed = kernels.add_rms_norm(x, projected, layer.mlp_norm, self.config.rms_eps, ws.normed)
        gated = kernels.silu_mul(layer.gate_up(normed, ws.gate_up), ws.gated)
        return layer.down(gated, ws.delta)

    def finish(self, x: Tensor, delta: Tensor) -> Tensor:
        """Add the last layer's delta to x in place. Returns its final norm, the result of `forward`, in the workspace."""
        return self.kernels.add_rms_norm(x, delta, self.final_norm, self.config.rms_eps, self._workspace(x.shape[0]).normed)

    def _workspace(self, rows: int) -> Workspace:
        if rows > self._whole.residual.shape[0]:
            self._graphs.clear()  # they write to the old one
            self._whole = self._part = self._allocate(rows)
        if rows != self._part.residual.shape[0]:
            self._part = self._whole.rows(rows)
        return self._part

    @torch.inference_mode(False)  # a caller in inference mode must not leave buffers that others cannot write
    def _allocate(self, rows: int) -> Workspace:
        config = self.config
        residual = torch.empty(rows, config.hidden_size, dtype=torch.float32, device=self.device)
        widths = (
            config.hidden_size,
            config.qkv_size,
            2 * config.intermediate_size,
            config.intermediate_size,
            config.hidden_size,
        )
        return Workspace(residual, *(residual.new_empty(rows, width, dtype=self.dtype) for width in widths))
