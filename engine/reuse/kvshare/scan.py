"""What reused KV is worth: passes over a prompt that look at it without computing it all.

    identity    layer 0 of a few rows            its KV depends on token and position alone, so copied and computed must agree:
                                                 a free check of tokens, indices and rotation on every reuse
    layers      layers [0, c] of all rows        writes their true KV, and compares the values of layer c with what was copied
    attention   layers of the last rows          who looks at what: at layer c alone, or averaged over all layers

Rows are taken in pieces that fit the engine's largest step. Everything is read from and written to the request's own blocks.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.engine.cache import Storage
from kvloom.engine.model.decoder import Decoder
from kvloom.engine.reuse.kvshare.repair import Floats, Ints
from kvloom.kernels.interface import Kernels, Lists, PagedKV, Plan, Rows

IDENTITY_ROWS = 32


class Placed(NamedTuple):
    """A request's tokens and where their KV lies."""

    tokens: Ints
    blocks: npt.NDArray[np.int32]
    block_size: int

    @classmethod
    def of(cls, tokens: Sequence[int], blocks: array[int], block_size: int) -> Placed:
        """From a request's tokens and table."""
        return cls(np.array(tokens, np.int64), np.frombuffer(blocks, np.int32).copy(), block_size)

    def slots(self, positions: Ints) -> Tensor:
        """[positions] int64"""
        return torch.from_numpy(self.blocks[positions // self.block_size].astype(np.int64) * self.block_size
                                + positions % self.block_size)  # fmt: skip


class Deviation(NamedTuple):
    """How far the copied values of layer c are from the true ones, per position that was compared."""

    absolute: Floats
    """||V' - V||_1 over KV heads and dimensions."""
    relative: Floats
    """||V' - V||_2 / ||V'||_2"""


class Scanner:
    """Partial passes of one decoder over one storage."""

    def __init__(self, decoder: Decoder, storage: Storage, kernels: Kernels, *, rows: int, layer: int) -> None:
        """rows: most rows at a time; layer: the check layer c."""
        config = decoder.config
        self._decoder, self._storage, self._kernels, self._config = decoder, storage, kernels, config
        self._rows, self._layer = rows, min(layer, config.layers - 1)
        self._scale = config.head_dim**-0.5
        self.work_per_row = (self._layer + 0.35) / config.layers
        """Of `deviation`, in rows of a full pass."""

    @torch.inference_mode()
    def identity(self, sequence: Placed, reused: Ints) -> bool:
        """Whether layer 0's copied keys and values of sampled positions are what the model computes there.

        Sampled evenly. Tolerance: copied keys were rounded to the model's dtype before they were turned and again after.
        """
        sample = reused[:: -(-len(reused) // IDENTITY_ROWS)].copy()
        decoder, kv = self._decoder, self._storage.layers[0]
        x = decoder.embed(torch.from_numpy(sequence.tokens[sample]))
        qkv = decoder.project(0, x, None)
        shape = (1, self._config.kv_heads, len(sample), self._config.head_dim)
        fresh = PagedKV(torch.empty(shape, dtype=kv.k.dtype), torch.empty(shape, dtype=kv.k.dtype))
        self._store(0, qkv, sample, fresh, torch.arange(len(sample)))
        slots = sequence.slots(sample)
        return all(_agrees(gather(cached, slots), new[0].transpose(0, 1)) for cached, new in zip(kv, fresh))

    @torch.inference_mode()
    def deviation(self, sequence: Placed, begin: int, reused: Ints) -> Deviation:
        """Run layers [0, c] on positions [begin, end), writing their KV, and compare those of `reused` (ascending) at layer c.

        Positions before begin must be computed in these layers.
        """
        length, layer = len(sequence.tokens), self._layer
        values = self._storage.layers[layer].v
        copied = gather(values, sequence.slots(reused)).clone()
        for first in range(begin, length, self._rows):
            positions = np.arange(first, min(first + self._rows, length))
            part = _Part(self, sequence, positions)
            x, delta = self._decoder.embed(part.tokens), None
            for index in range(layer):
                delta = self._decoder.layer(index, x, delta, part)
            self._store(layer, self._decoder.project(layer, x, delta), positions, self._storage.layers[layer], part.slots)
        true = gather(values, sequence.slots(reused)).float()
        change = (true - copied.float()).flatten(1)
        norm = true.flatten(1).norm(dim=1).clamp_min(1e-12)
        return Deviation(change.abs().sum(dim=1).numpy(), (change.norm(dim=1) / norm).numpy())

    @torch.inference_mode()
    def attention(self, sequence: Placed, probe: Ints, known: Ints | None = None) -> Floats:
        """Mean attention that rows at `probe` pay to every position, over rows, heads and layers: [length].

        known: None to look at the check layer alone, where `deviation` has computed all rows. Otherwise the positions before
        the first of `probe` (which follow each other) whose KV is there in every layer: all layers count, and the rows see
        those positions and each other. Their KV is stored, and computed again with the prompt's other rows.
        """
        part = _Part(self, sequence, probe, known)
        x, delta = self._decoder.embed(part.tokens), None
        layers = range(self._layer + 1 if known is None else self._config.layers)
        part.watch = layers[-1:] if known is None else layers
        for index in layers:
            delta = self._decoder.layer(index, x, delta, part)
        return (part.mass / (len(part.watch) * len(probe) * self._config.q_heads)).numpy()

    def _store(self, layer: int, qkv: Tensor, positions: Ints, kv: PagedKV, slots: Tensor) -> Tensor:
        """Rotate and store a projection; returns q: [rows, q_heads, head_dim]."""
        config, rotary, own = self._config, self._decoder.rotary, self._decoder.layers[layer]
        q = torch.empty(len(positions), config.q_heads, config.head_dim, dtype=qkv.dtype)
        return self._kernels.rotate_store(
            qkv, rotary.cos, rotary.sin, torch.from_numpy(positions), kv, slots, q, own.q_norm, own.k_norm, config.rms_eps
        )


class _Part:
    """`LayerAttention` of rows at some positions of one sequence, each seeing everything up to itself; or, with `known`, those
    positions and the rows' own, which follow each other."""

    def __init__(self, scanner: Scanner, sequence: Placed, positions: Ints, known: Ints | None = None) -> None:
        self._scanner, self._config = scanner, scanner._config
        self._positions = positions
        self.tokens = torch.from_numpy(sequence.tokens[positions])
        self.slots = sequence.slots(positions)
        count, config = len(positions), scanner._config
        stop = torch.from_numpy((positions + 1).astype(np.int32))
        zeros = torch.zeros(count, dtype=torch.int32)
        start, lists, columns = zeros, None, np.arange(int(positions[-1]) + 1)
        if known is not None:
            start = torch.full_like(zeros, int(positions[0]))
            lengths = torch.full((count, 1), len(known), dtype=torch.int32)
            lists = Lists(torch.from_numpy(known.astype(np.int32)), torch.zeros_like(lengths), lengths)
            columns = np.concatenate([known, positions])
        rows = Rows(torch.from_numpy(sequence.blocks)[None], zeros, start, stop, lists)
        self._plan: Plan = scanner._kernels.plan(rows, config.q_heads, config.kv_heads, config.head_dim)
        self._columns = torch.from_numpy(columns)
        self.watch: Sequence[int] = ()
        """Layers whose attention is added up in `mass`."""
        self.mass = torch.zeros(len(sequence.tokens))

    def __call__(self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        scanner, kv = self._scanner, self._scanner._storage.layers[layer]
        q = scanner._store(layer, qkv, self._positions, kv, self.slots)
        out = torch.empty_like(q)
        logits = None
        if layer in self.watch:
            logits = torch.full((len(q), self._config.q_heads, len(self._columns)), float("-inf"))
        scanner._kernels.attend(q, kv, self._plan, scale=scanner._scale, out=out, logits=logits)
        if logits is not None:
            self.mass[self._columns] += logits.softmax(dim=2).sum(dim=(0, 1))
        return out.view(len(q), -1)


def gather(paged: Tensor, slots: Tensor) -> Tensor:
    """Rows of [blocks, heads, block_size, head_dim] at slots: [rows, heads, head_dim], a copy."""
    size = paged.shape[2]
    return paged[slots // size, :, slots % size]


def _agrees(copied: Tensor, fresh: Tensor) -> bool:
    """Equal but for rounding: two roundings of the dtype, relative to the row's largest entry."""
    a, b = copied.float(), fresh.float()
    bound = 4 * torch.finfo(copied.dtype).eps * b.abs().amax(dim=-1, keepdim=True) + 1e-6
    if copied.dtype == torch.float32:
        bound = bound + 1e-4 * b.abs().amax(dim=-1, keepdim=True)  # an angle's own rounding grows with the distance
    return bool(((a - b).abs() <= bound).all())
