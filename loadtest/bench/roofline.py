"""Bytes that an operation has to move, operations it has to compute, and the time that a machine needs for them at least.

    seconds = max(bytes / bandwidth, FLOPs / rate)

Per layer, with R rows, N positions that a row sees, Hq query heads, Hkv KV heads of d numbers, b bytes to a number and
kappa = 2 Hkv d b bytes of K and V to a position:

    decode     R N kappa, and q and out                                     4 R N Hq d
    list       the same with its length k in place of N, and 4 bytes to each of Hkv k positions
    chunk      (N0 + R) kappa once, and q and out                           4 Hq d sum of (N0 + i), i = 1 to R
    score      R N kappa / 2, q, and R Hq N scores of 4 bytes               2 R N Hq d
    pool       R Hq N scores in, R Hkv N out
    select     R groups N scores in, R groups k positions of 4 bytes out
    linear     the weights once, 16 bits each, or 8.5 or 5 with a scale, or a scale and a minimum, to 32 of them; and x and y
                                                                            2 R in out

Score, pool, select and list together are a layer that makes its list anew: K N / 2 + k kappa, 2 Hq N and 2 Hkv N scores. Tables
and lengths are left out, and so is what a step shares among layers.
"""

from __future__ import annotations

from typing import NamedTuple

BITS = {16: 16.0, 8: 8.5, 4: 5.0}
"""Of a weight with its group's scale and minimum, by bits of its code."""
SCORE, INDEX = 4, 4
"""Bytes."""


class Machine(NamedTuple):
    """What a device can do."""

    name: str
    bandwidth: float
    """Bytes per second to and from its memory."""
    rate: float
    """FLOPs per second of bf16 matrix products with fp32 sums."""


GPUS = (
    Machine("A100", 2.039e12, 312e12),
    Machine("H100", 3.35e12, 989e12),
    Machine("H200", 4.8e12, 989e12),
)
"""From NVIDIA's data sheets: A100 80GB SXM, H100 80GB SXM and H200 141GB SXM; dense tensor cores, without sparsity."""


class Cost(NamedTuple):
    """Of one call."""

    bytes: int
    flops: int = 0

    def seconds(self, machine: Machine) -> float:
        """The least that it can take."""
        return max(self.bytes / machine.bandwidth, self.flops / machine.rate)

    def plus(self, other: Cost) -> Cost:
        """Of both calls, one after the other."""
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


class Shape(NamedTuple):
    """A model, as far as its kernels see it."""

    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int

    @property
    def qkv(self) -> int:
        """Columns of the fused projection."""
        return (self.q_heads + 2 * self.kv_heads) * self.head_dim

    def position(self, item: int) -> int:
        """Bytes of K and V of a position in a layer; item: bytes of a number."""
        return 2 * self.kv_heads * self.head_dim * item

    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's projections, and of the head."""
        return {
            "qkv": (self.hidden, self.qkv),
            "o": (self.q_heads * self.head_dim, self.hidden),
            "gate_up": (self.hidden, 2 * self.intermediate),
            "down": (self.intermediate, self.hidden),
            "head": (self.hidden, self.vocab),
        }


SHAPES = {
    "llama-3-8b": Shape(32, 32, 8, 128, 4096, 14_336, 128_256),
    "llama-3-70b": Shape(80, 64, 8, 128, 8192, 28_672, 128_256),
    "qwen3-8b": Shape(36, 32, 8, 128, 4096, 12_288, 151_936),
    "qwen2.5-7b": Shape(28, 28, 4, 128, 3584, 18_944, 152_064),
    "smollm2-135m": Shape(30, 9, 3, 64, 576, 1536, 49_152),
}


class Size(NamedTuple):
    """Of one call."""

    rows: int
    context: int = 0
    """Positions that a row sees; of a chunk, those in front of it."""
    k: int = 0
    """Positions that are chosen, or listed."""
    groups: int = 1
    """Rankings to a row."""
    inputs: int = 0
    outputs: int = 0
    bits: int = 16
    """Of a linear layer's weights."""


def _queries(shape: Shape, rows: int, item: int) -> int:
    """Bytes of q and out."""
    return 2 * rows * shape.q_heads * shape.head_dim * item


def decode(shape: Shape, size: Size, item: int) -> Cost:
    seen = size.rows * size.context
    return Cost(seen * shape.position(item) + _queries(shape, size.rows, item), 4 * seen * shape.q_heads * shape.head_dim)


def listed(shape: Shape, size: Size, item: int) -> Cost:
    dense = decode(shape, size._replace(context=size.k), item)
    return dense.plus(Cost(INDEX * size.rows * shape.kv_heads * size.k))


def chunk(shape: Shape, size: Size, item: int) -> Cost:
    rows, before = size.rows, size.context
    seen = rows * before + rows * (rows + 1) // 2
    read = (before + rows) * shape.position(item)
    return Cost(read + _queries(shape, rows, item), 4 * seen * shape.q_heads * shape.head_dim)


def score(shape: Shape, size: Size, item: int) -> Cost:
    seen = size.rows * size.context
    moved = seen * shape.position(item) // 2 + _queries(shape, size.rows, item) // 2 + seen * shape.q_heads * SCORE
    return Cost(moved, 2 * seen * shape.q_heads * shape.head_dim)


def pool(shape: Shape, size: Size, item: int) -> Cost:
    return Cost(size.rows * size.context * (shape.q_heads + shape.kv_heads) * SCORE)


def select(shape: Shape, size: Size, item: int) -> Cost:
    return Cost(size.rows * size.groups * (size.context * SCORE + size.k * INDEX))


def linear(shape: Shape, size: Size, item: int) -> Cost:
    weights = size.inputs * size.outputs
    moved = int(weights * BITS[size.bits] / 8) + size.rows * (size.inputs + size.outputs) * item
    return Cost(moved, 2 * size.rows * weights)


def store(shape: Shape, size: Size, item: int) -> Cost:
    return Cost(2 * size.rows * shape.position(item))


def rotate(shape: Shape, size: Size, item: int) -> Cost:
    return Cost(size.rows * shape.position(item))


def rotate_store(shape: Shape, size: Size, item: int) -> Cost:
    """Projections in, q, k and v out, and the angles of the rows' positions."""
    return Cost(size.rows * (2 * shape.qkv * item + 4 * shape.head_dim))


def add_rms_norm(shape: Shape, size: Size, item: int) -> Cost:
    """The fp32 residual in and out, what is added to it and the result; the weights once."""
    return Cost(size.rows * shape.hidden * (8 + 2 * item) + 4 * shape.hidden)


def silu_mul(shape: Shape, size: Size, item: int) -> Cost:
    return Cost(3 * size.rows * shape.intermediate * item)


def sample(shape: Shape, size: Size, item: int) -> Cost:
    return Cost(4 * size.rows * shape.vocab)


def fold(shape: Shape, size: Size, item: int) -> Cost:
    """K and V of `k` positions, and the fp32 sums."""
    return Cost(size.rows * (size.k * shape.position(item) + 2 * shape.kv_heads * shape.head_dim * 4))


def renew(shape: Shape, size: Size, item: int) -> Cost:
    """The queries, and those that were kept in fp32, which rows that renew replace: none here."""
    return Cost(size.rows * shape.q_heads * shape.head_dim * (item + 4))
