"""What a step's attention is cut into, decided on the device: the host knows sizes only.

A *tile* is what one read of keys serves, for one KV head: the query heads of one row, or of up to `size` consecutive rows of a
prefill chunk. Rows of a chunk of fewer than CHUNK are tiles of their own. A tile's positions, in the order in which its last
row sees them, are cut into *splits* at multiples of a power of two.

For a row alone that follows from how many it sees: at least SPLIT, at most SPLITS of them. A step of few rows spreads splits
over programs, which leave partial results in scratch; in a step of many, a program computes a row's splits one after the other.
Both add the same numbers in the same order. For a chunk it follows from the longest context that there can be, and each split
has a program of its own: so a row's splits, and its bits, do not depend on where its prompt was cut into chunks either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvloom.kernels.interface import Lists, Rows
from kvloom.kernels.triton.numbers import INTERPRETED, power_of_2

CHUNK = 16
"""Fewest rows of a chunk that share reads."""
QUERIES = 128
"""Queries of a tile of a chunk, rows by query heads of a group, of up to 128 numbers; half as many of more."""
SPLIT = 256
"""Fewest positions of a row's split."""
SPLITS = 64
"""Most splits of a row."""
SECTION = 4096
"""Fewest positions of a chunk's split."""
SECTIONS = 16
"""Most splits of a chunk."""
PROGRAMS = 64 if INTERPRETED.value else 2048
"""Programs that keep a device busy with rows. Half as many rows and heads find room for partial results, or fewer."""
TOGETHER = 32_768
"""Queries of chunks that find room for partial results. Others come later."""
LARGEST_BLOCK = LARGEST_HEAD = 256


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
    """One `Rows`, ready to run. scratch: fp32, for partial results."""

    rows: Rows
    q_heads: int
    kv_heads: int
    head_dim: int
    tiles: tuple[Tiles, ...]
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
    if rows.most is not None or rows.size <= len(rows.tables):
        return (Tiles(1, rows.size),)
    row = torch.arange(rows.size, device=rows.request.device)
    if rows.size < CHUNK or size == 1:
        return (_tiles(1, rows.size, row >= 0, row),)
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


class Launch(NamedTuple):
    """How tiles of one size are computed."""

    tile: int
    """Rows to a program,"""
    parts: int
    """and programs to a tile."""
    least: int
    """Fewest positions of a split,"""
    splits: int
    """and most splits of a tile."""
    fewest: int
    """As many programs to a row, or more, or one."""
    queries: int
    """Queries of a tile."""
    block_n: int
    warps: int
    stages: int
    registers: int | None
    """The most to a thread: left alone, ptxas may spill some to fit more programs."""


def launch(tiles: Tiles, room: int, group: int, head_dim: int, item: int, *, lists: bool = False,
           logits: bool = False) -> Launch:  # fmt: skip
    """room: positions that a block table holds: no row sees more. item: bytes of an element of K. logits: whether a chunk hands
    them out beside its sums, which takes registers: then fewer columns come at once. lists: whether rows may have them."""
    block_n, stages = 64 if head_dim <= 128 else 32, 3
    if item == 4:
        block_n = 16
    if INTERPRETED.value:
        block_n = 128
    warps, registers = 4, 255 if lists or head_dim not in range(65, 129) else None
    if item == 4:
        warps, registers = 4 if head_dim <= 128 else 8, 255
    if tiles.last is None:
        fewest, most = max(2, group // 2), max(1, min(SPLITS, -(-room // SPLIT)))
        return Launch(1, 1, SPLIT, most, fewest, group, block_n, warps, stages, registers)
    queries = 16
    if item < 4:
        queries, warps, registers = QUERIES // (1 if head_dim <= 128 else 2), 8, None
    if logits:
        block_n, stages = min(block_n, 16), 2
    elif 64 < head_dim <= 128 and group & (group - 1):  # dividing by such a number takes registers, too
        block_n = min(block_n, 32)
    tile = max(1, queries // group)
    least, most = max(SECTION, power_of_2(-(-room // SECTIONS))), max(1, min(SECTIONS, -(-room // SECTION)))
    return Launch(tile, -(-tiles.size // tile), least, most, 1, tile * group, block_n, warps, stages, registers)


def scratch_size(rows: Rows, group: int) -> int:
    """Partial results that there may be at once, in queries, however many rows there are and whatever the size of blocks."""
    room = rows.tables.shape[1] * LARGEST_BLOCK
    of_rows = PROGRAMS // max(2, group // 2) * group * max(1, min(SPLITS, -(-room // SPLIT)))
    return max(of_rows, TOGETHER * max(1, min(SECTIONS, -(-room // SECTION))))
