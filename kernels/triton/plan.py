"""What a step's attention is cut into, decided on the device: the host knows sizes only.

A *tile* is what one read of keys serves, for one KV head: the query heads of one row, or of up to `size` consecutive rows of a
prefill chunk. Rows of a chunk of fewer than CHUNK are tiles of their own. A tile's positions, in the order in which its last
row sees them, are cut into *splits* at multiples of a power of two that follows from their number alone: at least SPLIT, at
most SPLITS of them. A step of few tiles spreads splits over programs, which leave partial results in scratch; in a step of
many, a program computes a tile's splits one after the other. Both add the same numbers in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.kernels.interface import Lists, Rows
from kvloom.kernels.triton.numbers import INTERPRETED

CHUNK = 16
"""Fewest rows of a chunk that share reads."""
QUERIES = 64
"""Queries of a tile of a chunk, rows by query heads of a group, of up to 128 numbers; half as many of more."""
SPLIT = 256
"""Fewest positions of a split."""
SPLITS = 64
"""Most splits of a tile."""
PROGRAMS = 64 if INTERPRETED.value else 2048
"""Programs that keep a device busy. Half as many rows and heads find room for partial results."""
LARGEST_BLOCK, LARGEST_HEAD = 128, 256


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tiles of one size, at most `most`. first: [rows] int32, the first row of each, of which count: [1] int32 are tiles; or
    None: all rows. last: [rows] int32, each row's last neighbour in its chunk, or None with tiles of one row."""

    size: int
    most: int
    first: Tensor | None = None
    count: Tensor | None = None
    last: Tensor | None = None


@dataclass(slots=True)
class TritonPlan:
    """One `Rows`, ready to run. scratch: fp32, for partial results of so many queries of each split."""

    rows: Rows
    q_heads: int
    kv_heads: int
    head_dim: int
    tiles: tuple[Tiles, ...]
    queries: int
    scratch: Tensor

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.q_heads // self.kv_heads


def check_rows(rows: Rows, q_heads: int, kv_heads: int, head_dim: int) -> None:
    """Raises ValueError for what no kernel here can read."""
    if q_heads % kv_heads:
        raise ValueError(f"q_heads must be a multiple of kv_heads; got {q_heads} and {kv_heads}")
    if head_dim % 8 or not 8 <= head_dim <= LARGEST_HEAD:
        raise ValueError(f"head_dim is {head_dim}; the triton back end takes multiples of 8 up to {LARGEST_HEAD}")
    named = {name: getattr(rows, name) for name in ("tables", "request", "start", "stop")}
    if rows.lists is not None:
        named |= {f"lists.{name}": tensor for name, tensor in zip(Lists._fields, rows.lists)}
    if rows.most is not None:
        named["most"] = rows.most
    for name, tensor in named.items():
        if tensor.dtype is not torch.int32 or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous int32, got {tensor.dtype} with strides {tensor.stride()}")
    if rows.start.ndim == 2 and rows.start.shape[1] not in (1, kv_heads):
        raise ValueError(f"start must have one column or {kv_heads}, got {tuple(rows.start.shape)}")
    if rows.lists is not None and (
        rows.lists.lengths.shape[1] not in (1, kv_heads) or rows.lists.offsets.shape != rows.lists.lengths.shape
    ):
        raise ValueError(f"lists must have one column or {kv_heads}, got lengths {tuple(rows.lists.lengths.shape)}")


def cut(rows: Rows, group: int, head_dim: int) -> tuple[Tiles, ...]:
    """A step's tiles, without a look at what is in its tensors. Rows of open plans share nothing, nor do rows that are no more
    than there are requests: in a step that is captured, a tile is a row."""
    size = max(1, QUERIES // (1 if head_dim <= 128 else 2) // group)
    if rows.most is not None or rows.size < CHUNK or rows.size <= len(rows.tables) or size == 1:
        return (Tiles(1, rows.size),)
    row = torch.arange(rows.size, device=rows.request.device)
    begin = torch.where(_joined(rows), 0, row).cummax(0).values  # each row's first neighbour
    length = torch.zeros_like(row).scatter_add_(0, begin, torch.ones_like(row))[begin]
    shared = length >= CHUNK
    heads = shared & ((row - begin) % size == 0)
    most = -(-rows.size // size) + rows.size // CHUNK
    return _tiles(1, rows.size, ~shared, row), _tiles(size, most, heads, row, (begin + length - 1).int())


def _joined(rows: Rows) -> Tensor:
    """[rows] bool: whether a row goes on where the one before ends: the same request, starts and lists, one position more."""
    start = rows.start.view(rows.size, -1)
    joined = (rows.request[1:] == rows.request[:-1]) & (rows.stop[1:] == rows.stop[:-1] + 1)
    joined &= ((start[1:] == start[:-1]) & (rows.stop[:-1, None] > start[:-1])).all(1)
    if rows.lists is not None:
        length, offset = rows.lists.lengths, rows.lists.offsets
        joined &= ((length[1:] == length[:-1]) & ((offset[1:] == offset[:-1]) | (length[1:] == 0))).all(1)
    return torch.nn.functional.pad(joined, (1, 0))


def _tiles(size: int, most: int, first: Tensor, row: Tensor, last: Tensor | None = None) -> Tiles:
    """first: [rows] bool. Later rows, which see most, come first."""
    found = torch.where(first, row, -1).sort(descending=True).values
    return Tiles(size, most, found.int(), first.sum(dtype=torch.int32)[None], last)


def splits(rows: Rows, block_size: int) -> int:
    """The most splits that a tile may have: no row sees more positions than its block table holds."""
    return max(1, min(SPLITS, -(-rows.tables.shape[1] * block_size // SPLIT)))


def partial_queries(tiles: tuple[Tiles, ...], kv_heads: int, group: int) -> int:
    """Queries that may leave partial results of each split."""
    return group * min(PROGRAMS // 2, kv_heads * max(some.most * some.size for some in tiles))
