"""Calls of every operation of `kernels.interface` on made-up tensors, of any size: one function for each, which makes the
tensors and returns what does a step's host work, which returns the call itself.

Contents are drawn on the host where several devices are to get the same, else on the device, which is quicker.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.engine.model.quantized import dense, round_to_int4, round_to_int8
from kvloom.kernels import Kernels, Lists, PagedKV, Rows
from kvloom.kernels.dense import spanned
from kvloom.kernels.interface import Renewal
from kvloom.loadtest.bench.roofline import Shape, Size

BLOCK = 16

Run = Callable[[], tuple[Tensor, ...]]
"""Makes the call; returns what it has written."""
Prepare = Callable[[Kernels], Run | None]
"""Does a step's host work; None if these kernels have no such operation."""


@dataclass(frozen=True)
class Tensors:
    """Where tensors are made. Numbers of the model are in `dtype`."""

    device: torch.device
    dtype: torch.dtype
    source: torch.Generator
    block: int = BLOCK
    """Tokens of a block of KV."""

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        made = torch.randn(shape, generator=self.source, device=self.source.device, dtype=torch.float32)
        return made.to(self.device, dtype or self.dtype)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def full(self, rows: int, value: int) -> Tensor:
        return torch.full((rows,), value, dtype=torch.int32, device=self.device)

    def count(self, rows: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.arange(rows, dtype=dtype, device=self.device)

    def shuffled(self, count: int) -> Tensor:
        made = torch.randperm(count, generator=self.source, device=self.source.device)
        return made.to(self.device, torch.int32)

    def cache(self, shape: Shape, requests: int, tokens: int) -> tuple[PagedKV, Tensor]:
        """K and V in shuffled blocks, and their tables."""
        blocks = -(-tokens // self.block)
        tables = self.shuffled(requests * blocks).view(requests, blocks)
        k, v = (self.normal(requests * blocks, shape.kv_heads, self.block, shape.head_dim) for _ in "kv")
        return PagedKV(k, v), tables


def on_host(device: torch.device, dtype: torch.dtype, seed: int = 0, block: int = BLOCK) -> Tensors:
    """The same contents for every device."""
    return Tensors(device, dtype, torch.Generator().manual_seed(seed), block)


def on_device(device: torch.device, dtype: torch.dtype, block: int = BLOCK) -> Tensors:
    """Contents drawn where they stay."""
    return Tensors(device, dtype, torch.Generator(device).manual_seed(0), block)


def _attend(make: Tensors, shape: Shape, rows: Rows, kv: PagedKV) -> Prepare:
    q = make.normal(rows.size, shape.q_heads, shape.head_dim)
    out = torch.empty_like(q)

    def prepare(kernels: Kernels) -> Run:
        known = None if kernels.dense is None else spanned(rows, make.block)
        plan = kernels.plan(known or rows, shape.q_heads, shape.kv_heads, shape.head_dim)
        return lambda: (kernels.attend(q, kv, plan, scale=shape.head_dim**-0.5, out=out),)

    return prepare


def decode(make: Tensors, shape: Shape, size: Size) -> Prepare:
    kv, tables = make.cache(shape, size.rows, size.context)
    rows = Rows(tables, make.count(size.rows), make.full(size.rows, 0), make.full(size.rows, size.context))
    return _attend(make, shape, rows, kv)


def chunk(make: Tensors, shape: Shape, size: Size) -> Prepare:
    kv, tables = make.cache(shape, 1, size.context + size.rows)
    zeros = make.full(size.rows, 0)
    return _attend(make, shape, Rows(tables, zeros, zeros, size.context + 1 + make.count(size.rows)), kv)


def listed(make: Tensors, shape: Shape, size: Size) -> Prepare:
    """A list of its own for every KV head, spread over the context."""
    kv, tables = make.cache(shape, size.rows, size.context)
    lists = size.rows * shape.kv_heads
    chosen = torch.stack([make.shuffled(size.context)[: size.k].sort().values for _ in range(lists)])
    offsets = (size.k * make.count(lists)).view(size.rows, shape.kv_heads)
    ends = make.full(size.rows, size.context)
    lengths = torch.full_like(offsets, size.k)
    return _attend(make, shape, Rows(tables, make.count(size.rows), ends, ends, Lists(chosen.flatten(), offsets, lengths)), kv)


def score(make: Tensors, shape: Shape, size: Size) -> Prepare:
    kv, tables = make.cache(shape, size.rows, size.context)
    rows = Rows(tables, make.count(size.rows), make.full(size.rows, 0), make.full(size.rows, size.context))
    q = make.normal(size.rows, shape.q_heads, shape.head_dim)
    out = make.empty(size.rows, shape.q_heads, size.context, dtype=torch.float32)

    def prepare(kernels: Kernels) -> Run:
        plan = kernels.plan(rows, shape.q_heads, shape.kv_heads, shape.head_dim)
        return lambda: (kernels.score(q, kv, plan, scale=shape.head_dim**-0.5, out=out),)

    return prepare


def pool(make: Tensors, shape: Shape, size: Size) -> Prepare:
    logits = make.normal(size.rows, shape.q_heads, size.context, dtype=torch.float32)
    out = make.empty(size.rows, shape.kv_heads, size.context, dtype=torch.float32)
    first, last = make.full(size.rows, 0), make.full(size.rows, size.context)
    return lambda kernels: lambda: (kernels.pool(logits, first, last, shape.kv_heads, how="sum", window=1, out=out),)


def select(make: Tensors, shape: Shape, size: Size) -> Prepare:
    scores = make.normal(size.rows, size.groups, size.context, dtype=torch.float32)
    columns = make.empty(size.rows, size.groups, size.k, dtype=torch.int32)
    lengths = make.full(size.rows, size.context)
    return lambda kernels: lambda: (kernels.select(scores, lengths, size.k, out=(columns, None))[0],)


def linear(make: Tensors, shape: Shape, size: Size) -> Prepare:
    """Of 16 bits torch's own product; of fewer, codes as they are rounded from a weight."""
    x, out = make.normal(size.rows, size.inputs), make.empty(size.rows, size.outputs)
    weight = make.normal(size.outputs, size.inputs, dtype=torch.float32) * size.inputs**-0.5
    if size.bits == 16:
        held = weight.to(make.dtype)
        return lambda kernels: lambda: (torch.mm(x, held.t(), out=out),)
    codes = (round_to_int8 if size.bits == 8 else round_to_int4)(weight)

    def prepare(kernels: Kernels) -> Run | None:
        if kernels.name == "reference":
            return lambda: ((x.double() @ dense(codes).double().t()).to(x.dtype),)
        if kernels.quantized is None:
            return None
        multiply = kernels.quantized.linear(kernels.quantized.pack(codes), None)
        return lambda: (multiply(x, out),)

    return prepare


def store(make: Tensors, shape: Shape, size: Size) -> Prepare:
    kv, _ = make.cache(shape, 1, size.rows + BLOCK)
    k, v = (make.normal(size.rows, shape.kv_heads, shape.head_dim) for _ in "kv")
    slots = make.count(size.rows, torch.int64) + 3

    def prepare(kernels: Kernels) -> Run:
        def run() -> tuple[Tensor, ...]:
            kernels.store(k, v, kv, slots)
            return tuple(kv)

        return run

    return prepare


def rotate(make: Tensors, shape: Shape, size: Size) -> Prepare:
    k = make.normal(size.rows, shape.kv_heads, shape.head_dim)
    delta, out = make.count(size.rows) - size.rows // 2, torch.empty_like(k)
    inv_freq = 10_000.0 ** -(make.count(shape.head_dim // 2).float() * 2 / shape.head_dim)
    return lambda kernels: lambda: (kernels.rotate(k, delta, inv_freq, out),)


def rotate_store(make: Tensors, shape: Shape, size: Size) -> Prepare:
    kv, _ = make.cache(shape, 1, size.rows)
    qkv, q = make.normal(size.rows, shape.qkv), make.empty(size.rows, shape.q_heads, shape.head_dim)
    angles = make.normal(size.rows, shape.head_dim // 2, dtype=torch.float32)
    cos, sin, positions = angles.cos(), angles.sin(), make.count(size.rows, torch.int64)
    q_norm, k_norm = (1 + make.normal(shape.head_dim, dtype=torch.float32) / 8 for _ in "qk")
    return lambda kernels: lambda: (
        kernels.rotate_store(qkv, cos, sin, positions, kv, positions, q, q_norm, k_norm, 1e-6), *kv,
    )  # fmt: skip


def add_rms_norm(make: Tensors, shape: Shape, size: Size) -> Prepare:
    x, delta = make.normal(size.rows, shape.hidden, dtype=torch.float32), make.normal(size.rows, shape.hidden)
    weight, out = make.normal(shape.hidden, dtype=torch.float32), make.empty(size.rows, shape.hidden)
    return lambda kernels: lambda: (kernels.add_rms_norm(x, delta, weight, 1e-5, out), x)


def silu_mul(make: Tensors, shape: Shape, size: Size) -> Prepare:
    gate_up, out = make.normal(size.rows, 2 * shape.intermediate), make.empty(size.rows, shape.intermediate)
    return lambda kernels: lambda: (kernels.silu_mul(gate_up, out),)


def sample(make: Tensors, shape: Shape, size: Size) -> Prepare:
    logits = make.normal(size.rows, shape.vocab, dtype=torch.float32) * 3
    settings = torch.tensor([0.8, 50, 0.95, 0.01, 0.0], dtype=torch.float64, device=make.device).repeat(size.rows, 1)
    settings[:, 4] = (make.count(size.rows).double() + 0.5) / size.rows
    out = make.empty(size.rows, dtype=torch.int64)
    return lambda kernels: lambda: (kernels.sample(logits, settings, out),)


def fold(make: Tensors, shape: Shape, size: Size) -> Prepare:
    kv, tables = make.cache(shape, size.rows, size.k + BLOCK)
    width = 2 * shape.kv_heads * shape.head_dim
    words = make.empty(size.rows * width, dtype=torch.int32)
    request, first, last = make.count(size.rows), make.full(size.rows, 3), make.full(size.rows, 3 + size.k)
    at = width * make.count(size.rows)

    def prepare(kernels: Kernels) -> Run:
        def run() -> tuple[Tensor, ...]:
            kernels.fold(kv, tables, request, first, last, words, at, origin=3, most=size.k)
            return (words.view(torch.float32),)

        return run

    return prepare


def renew(make: Tensors, shape: Shape, size: Size) -> Prepare:
    """Lists that are up to date: every row compares its query, as one vector, and keeps its list."""
    rows, width = size.rows, shape.q_heads * shape.head_dim
    how = Renewal(tail=0, query=4, width=size.k, recent=8, most=1000, compare="flat", threshold=0.9, dense=False)
    q = make.normal(rows, shape.q_heads, shape.head_dim)
    words = make.empty(rows, 4 + width, dtype=torch.int32)
    words[:, 0] = size.context - 8
    words[:, 4:] = q.reshape(rows, width).float().view(torch.int32)
    at, stop, due = (4 + width) * make.count(rows), make.full(rows, size.context), make.full(rows, 2)
    active, start, lengths = (torch.zeros_like(due) for _ in range(3))
    counts = make.empty(3, dtype=torch.int64)

    def prepare(kernels: Kernels) -> Run:
        def run() -> tuple[Tensor, ...]:
            kernels.renew(q, words.view(-1), at, stop, due, how, None, active, start, lengths.view(rows, 1), counts)
            return active, start, lengths, counts

        return run

    return prepare
