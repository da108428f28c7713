"""How the torch back end cuts a step's rows: tiles of one shape, and where their keys and values lie.

A *tile* is the query heads of one KV head, of one row or of up to TILE consecutive rows of a prefill chunk, and the positions
that the last of these rows sees, their number rounded up to one of four widths per octave. Tiles of one shape are a `Group`.
Shapes are known when a plan is made; contents of open plans (`Rows.most`) are read when it is used, row by row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvloom.kernels.counters import Counters
from kvloom.kernels.interface import Rows

TILE = 64
"""Most rows of a prefill chunk that share one read of their keys."""
ROOM = 1 << 20
"""fp32 elements of keys, values and scores at once: 4 MiB, and about as much again while they are converted."""


@dataclass(frozen=True, slots=True)
class Group:
    """Tiles of one shape: `size` rows and `keys` columns each. All on the device of the rows that they were made from.

    rows: [tiles, size]                        rows of q
    heads, request: [tiles, 1]                 KV head; row of the block tables
    tail: [tiles, keys]                        the position of each column; past the last that a tile sees, that one again
    listed: [tiles, keys], or None             where the position is in a list, its index in `Lists.positions`; -1 elsewhere
    hidden: [tiles, size, 1, keys - common]    which columns from `common` on a row does not see
    emits                                      whether the rows hand out logits
    """

    rows: Tensor
    heads: Tensor
    request: Tensor
    tail: Tensor
    listed: Tensor | None
    hidden: Tensor
    common: int
    emits: bool
    _addresses: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def parts(self, query_heads: int, head_dim: int) -> Iterator[slice]:
        """Slices of at least two tiles whose keys, values and scores fit into ROOM; the last two may overlap."""
        tiles, size = self.rows.shape
        step = max(2, ROOM // (self.tail.shape[1] * (size * query_heads + 2 * head_dim)))
        for begin in range(0, tiles, step):
            yield slice(min(begin, tiles - 2), begin + step)

    def addresses(self, cache: Tensor, rows: Rows, positions: Tensor | None) -> Tensor:
        """[tiles, keys] int64: the row of `as_matrix(cache)` that holds each column's key or value. positions: in place of
        those of the rows' lists."""
        layout = (cache.shape[2], *(stride // pitch(cache) for stride in cache.stride()[:3]))
        if layout in self._addresses:
            return self._addresses[layout]
        position = self.tail
        if self.listed is not None and rows.lists is not None:
            entries = rows.lists.positions if positions is None else positions
            position = torch.where(self.listed < 0, position, entries[self.listed])
        block_size, per_block, per_head, per_token = layout
        blocks = rows.tables[self.request, position // block_size].long()
        found = blocks * per_block + self.heads * per_head + position % block_size * per_token
        if self.listed is None:  # the same in every layer
            self._addresses[layout] = found
        return found

    def now(self, rows: Rows, use: Use) -> Group:
        """Tiles of one row each, as they are in this use of the plan: by contents that may be other ones than when it was
        made, and without what is left out."""
        column, row, head = torch.arange(self.tail.shape[1], device=self.tail.device), self.rows[:, 0], self.heads[:, 0]
        start = use.start[row, head][:, None]
        listed, offset = (x[row, use.listers[head].clamp(min=0)][:, None] for x in (use.listed, use.offset))
        seen = use.seen[row, head][:, None]
        column = column.minimum((seen - 1).clamp(min=0))
        hidden = torch.arange(self.tail.shape[1], device=self.tail.device) >= seen
        return Group(
            self.rows, self.heads, self.request, torch.where(seen > 0, start + (column - listed).clamp(min=0), 0),
            None if rows.lists is None else torch.where(column < listed, offset + column, -1),
            hidden[:, None, None], 0, self.emits,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Use:
    """What rows see in one use of a plan. start, listed, offset, seen: [rows, kv_heads] int64; listers: [kv_heads]."""

    start: Tensor
    listed: Tensor
    offset: Tensor
    seen: Tensor
    listers: Tensor

    @classmethod
    def of(cls, rows: Rows, kv_heads: int, heads: Tensor | None, active: Tensor | None) -> Use:
        """heads, active: see `interface.Kernels`."""
        device = rows.start.device
        start = rows.start.view(rows.size, -1).expand(-1, kv_heads).long()
        listers = torch.arange(kv_heads, device=device) if heads is None else heads.long()
        listed = offset = torch.zeros_like(start)
        if rows.lists is not None:
            listed, offset = (x.expand(-1, kv_heads).long() for x in (rows.lists.lengths, rows.lists.offsets))
        seen = listed[:, listers.clamp(min=0)] + rows.stop.long()[:, None] - start
        seen = torch.where(listers < 0, 0, seen)
        return cls(start, listed, offset, seen if active is None else torch.where(active[:, None] < 0, 0, seen), listers)


@dataclass(frozen=True, slots=True)
class Cut:
    """A step's rows as tiles. blind: whether a row sees nothing for some head; counts: of a pass, elements for bytes."""

    groups: tuple[Group, ...]
    blind: bool
    counts: Counters


@dataclass(slots=True)
class TorchPlan:
    """A step's rows, and their tiles by how many of the first rows share none, because they hand out logits."""

    rows: Rows
    kv_heads: int
    head_dim: int
    cuts: dict[int, Cut]

    @property
    def open(self) -> bool:
        """Whether contents are read when the plan is used."""
        return self.rows.most is not None

    def cut(self, alone: int) -> Cut:
        if alone not in self.cuts:
            self.cuts[alone] = cut(self.rows, self.kv_heads, self.head_dim, alone)
        return self.cuts[alone]


def tiles_of(request: Tensor, start: Tensor, stop: Tensor, listed: Tensor, offset: Tensor, alone: int) -> tuple[Tensor, Tensor]:
    """First rows and sizes of tiles: of rows of one request with the same starts and lists that end one position further each.
    The first `alone` rows share none."""
    joined = (request[1:] == request[:-1]) & (stop[1:] == stop[:-1] + 1)
    joined &= ((start[1:] == start[:-1]) & (stop[:-1, None] > start[:-1])).all(1)
    joined &= ((listed[1:] == listed[:-1]) & ((offset[1:] == offset[:-1]) | (listed[1:] == 0))).all(1)
    joined[:alone] = False
    row = torch.arange(len(request))
    chunk = torch.where(torch.nn.functional.pad(joined, (1, 0)), 0, row).cummax(0).values  # each row's first neighbour
    first = ((row - chunk) % TILE == 0).nonzero().squeeze(1)
    return first, torch.diff(first, append=torch.tensor([len(row)]))


def rounded(counts: Tensor) -> Tensor:
    """Counts, rounded up to a multiple of 64 and of an eighth of the next power of two."""
    step = torch.exp2(torch.frexp(counts.double()).exponent - 3).long().clamp(min=64)
    return (counts + step - 1) // step * step


def cut(rows: Rows, kv_heads: int, head_dim: int, alone: int) -> Cut:
    """Cut rows into tiles, on the host. alone: so many of the first rows hand out logits."""
    if rows.size == 0:
        return Cut((), False, Counters())
    request, start, stop = (x.cpu().long() for x in (rows.request, rows.start.view(rows.size, -1), rows.stop))
    listed = offset = torch.zeros(rows.size, 1, dtype=torch.int64)
    if rows.most is not None:
        start, stop = torch.zeros(rows.size, 1, dtype=torch.int64), rows.most.cpu().long()
    elif rows.lists is not None:
        listed, offset = rows.lists.lengths.cpu().long(), rows.lists.offsets.cpu().long()
    first, size = tiles_of(request, start, stop, listed, offset, alone)
    start, listed, offset = (x.expand(-1, kv_heads) for x in (start, listed, offset))
    seen = listed + stop[:, None] - start
    tile, head = seen[first + size - 1].nonzero(as_tuple=True)
    count = seen[first + size - 1][tile, head]
    shapes, shape = torch.stack([size[tile], rounded(count), first[tile] < alone]).unique(dim=1, return_inverse=True)
    groups = []
    for number, (sharing, keys, emits) in enumerate(shapes.t().tolist()):
        members = (shape == number).nonzero()
        members = members.expand(max(2, len(members)), 1)  # a single tile is computed twice: no product is alone
        at, begin, total = head[members], first[tile[members]], count[members]
        column = torch.arange(keys).minimum(total - 1)
        in_list = column < listed[begin, at]
        sees = total - sharing + 1 + torch.arange(sharing)
        common = int(sees.min())
        found = (
            begin + torch.arange(sharing),
            at,
            request[begin],
            start[begin, at] + column - listed[begin, at],
            torch.where(in_list, offset[begin, at] + column, -1),
            (torch.arange(common, keys) >= sees[..., None])[:, :, None],
        )
        row, at, begin, tail, entry, hidden = (x.to(rows.request.device) for x in found)
        groups.append(Group(row, at, begin, tail, entry if in_list.any() else None, hidden, common, bool(emits)))
    elements, of_lists = int(count.sum()) * head_dim, int(listed[first].sum()) * head_dim
    counts = Counters(int((rows.stop > 0).sum()), int(seen.sum()), 2 * elements, elements, 2 * of_lists)
    return Cut(tuple(groups), bool((seen == 0).any()), counts)


def pitch(cache: Tensor) -> int:
    """Elements that all strides of a cache but the last are multiples of."""
    return math.gcd(*cache.stride()[:3])


def as_matrix(cache: Tensor) -> Tensor:
    """A cache [blocks, heads, block_size, head_dim] of any strides whose last is 1 as a matrix: a row for each place where
    a position of a head can begin. Rows may overlap."""
    last = sum((size - 1) * stride for size, stride in zip(cache.shape[:3], cache.stride()))
    return cache.as_strided((last // pitch(cache) + 1, cache.shape[3]), (pitch(cache), 1))
