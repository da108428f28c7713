"""Every operation in plain torch, for all rows at once: the back end of any device, and of machines without a compiler.

Attention is cut into *tiles* once per step: the query heads of one KV head, of one row or of up to TILE consecutive rows of a
prefill chunk, and the positions that the last of these rows sees, their number rounded up to one of four widths per octave.
Tiles of one shape are a `Group`: it is gathered, multiplied, masked and normalised at once, in parts that take at most ROOM
numbers of working memory, or two tiles' own: 2 * keys * (TILE * query heads + 2 * head_dim), 18 MiB for three heads of 64 that
see 7,168 positions. Shapes are known when the plan is made; between two operations nothing waits for a result.

On a CPU, a row's bits do not depend on what else is in the batch: its tile's shape follows from its own positions (or its
chunk's), sums run over that shape alone, and products are batches of two or more, which MKL computes one matrix to a thread;
a single one it may cut among threads. What the reference already computes for all rows at once is inherited from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvloom.kernels.interface import Counters, PagedKV, Plan, PoolHow, Rows
from kvloom.kernels.reference import ReferenceKernels, check_pool

TILE = 64
"""Most rows of a prefill chunk that share one read of their keys."""
ROOM = 1 << 20
"""fp32 elements of keys, values and scores at once: 4 MiB, and about as much again while they are converted."""
LOG2E, LN2 = math.log2(math.e), math.log(2.0)


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

    def addresses(self, cache: Tensor, rows: Rows) -> Tensor:
        """[tiles, keys] int64: the row of `as_matrix(cache)` that holds each column's key or value."""
        layout = (cache.shape[2], *(stride // pitch(cache) for stride in cache.stride()[:3]))
        if layout in self._addresses:
            return self._addresses[layout]
        position = self.tail
        if self.listed is not None and rows.lists is not None:
            position = torch.where(self.listed < 0, position, rows.lists.positions[self.listed])
        block_size, per_block, per_head, per_token = layout
        blocks = rows.tables[self.request, position // block_size].long()
        found = blocks * per_block + self.heads * per_head + position % block_size * per_token
        if self.listed is None:  # the same in every layer
            self._addresses[layout] = found
        return found


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
    if rows.lists is not None:
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
    counts = Counters(rows.size, int(seen.sum()), 2 * elements, elements, 2 * of_lists)
    return Cut(tuple(groups), bool((seen == 0).any()), counts)


def pitch(cache: Tensor) -> int:
    """Elements that all strides of a cache but the last are multiples of."""
    return math.gcd(*cache.stride()[:3])


def as_matrix(cache: Tensor) -> Tensor:
    """A cache [blocks, heads, block_size, head_dim] of any strides whose last is 1 as a matrix: a row for each place where
    a position of a head can begin. Rows may overlap."""
    last = sum((size - 1) * stride for size, stride in zip(cache.shape[:3], cache.stride()))
    return cache.as_strided((last // pitch(cache) + 1, cache.shape[3]), (pitch(cache), 1))


def gather(cache: Tensor, addresses: Tensor) -> Tensor:
    """fp32 [tiles, keys, head_dim]."""
    return as_matrix(cache).index_select(0, addresses.flatten()).view(*addresses.shape, -1).float()


def emit(scores: Tensor, hidden: Tensor, common: int, logits: Tensor, at: tuple[Tensor, Tensor]) -> None:
    """Write scores [tiles, size, query heads, keys] in base 2 into logits [rows, kv_heads, query heads, width]. What a row does
    not see, always in columns from `common` on, stays as it was."""
    logits = logits[..., : scores.shape[-1]]
    fresh = scores[..., : logits.shape[-1]] * LN2
    last = fresh[..., common:]
    last.copy_(torch.where(hidden[..., : last.shape[-1]], logits[at][..., common:], last))
    logits[at] = fresh


class TorchKernels(ReferenceKernels):
    """`interface.Kernels` in torch, without a loop over rows or heads. Threads are torch's."""

    name = "torch"

    # Attention ---------------------------------------------------------------------------------------------------

    def store(self, k: Tensor, v: Tensor, kv: PagedKV, slots: Tensor) -> None:
        """Write rows into slots; see `interface.Kernels.store`. A row without a slot writes what some other row writes, or, if
        there is none, what slot 0 holds."""
        if len(slots) == 0:
            return
        kept = slots >= 0
        source = torch.where(kept, torch.arange(len(slots), device=slots.device), kept.byte().argmax())
        slot, written = slots[source].clamp(min=0), kept[source, None, None]
        block, offset = slot // kv.k.shape[2], slot % kv.k.shape[2]
        for cache, new in ((kv.k, k), (kv.v, v)):
            cache[block, :, offset] = torch.where(written, new[source].to(cache.dtype), cache[block, :, offset])

    def plan(self, rows: Rows, q_heads: int, kv_heads: int, head_dim: int, into: Plan | None = None) -> Plan:
        """Cut rows into tiles; see `interface.Kernels.plan`."""
        if q_heads % kv_heads:
            raise ValueError(f"{q_heads} query heads do not divide into {kv_heads} KV heads")
        return TorchPlan(rows, kv_heads, head_dim, {0: cut(rows, kv_heads, head_dim, 0)})

    def attend(self, q: Tensor, kv: PagedKV, plan: Plan, *, scale: float, out: Tensor,
               lse: Tensor | None = None, logits: Tensor | None = None) -> Tensor:  # fmt: skip
        """Softmax attention; see `interface.Kernels.attend`."""
        assert isinstance(plan, TorchPlan)
        tiles = plan.cut(0 if logits is None else len(logits))
        self._run(q, kv, plan, tiles, scale, out, lse, logits)
        self.counters.rows += tiles.counts.rows
        self.counters.positions += tiles.counts.positions
        self.counters.kv_bytes += tiles.counts.kv_bytes * kv.k.element_size()
        self.counters.list_kv_bytes += tiles.counts.list_kv_bytes * kv.k.element_size()
        return out

    def score(self, q: Tensor, kv: PagedKV, plan: Plan, *, scale: float, out: Tensor) -> Tensor:
        """Query-key products; see `interface.Kernels.score`."""
        assert isinstance(plan, TorchPlan)
        tiles = plan.cut(len(out))
        self._run(q, kv, plan, tiles, scale, None, None, out)
        self.counters.score_bytes += tiles.counts.score_bytes * kv.k.element_size()
        return out

    def _run(self, q: Tensor, kv: PagedKV, plan: TorchPlan, tiles: Cut, scale: float, out: Tensor | None,
             lse: Tensor | None, logits: Tensor | None) -> None:  # fmt: skip
        """Attention in base 2, a part of a group at a time; without `out` the products alone."""
        if {q.dtype, kv.v.dtype, q.dtype if out is None else out.dtype} != {kv.k.dtype}:
            raise TypeError(f"q is {q.dtype}, the cache {kv.k.dtype} and {kv.v.dtype}; they and out must be of one dtype")
        if tiles.blind and out is not None:
            out.zero_()
        if tiles.blind and lse is not None:
            lse.fill_(-math.inf)
        by_head = (plan.kv_heads, q.shape[1] // plan.kv_heads)
        q = q.unflatten(1, by_head)
        for group in tiles.groups:
            keys_at = group.addresses(kv.k, plan.rows)
            values_at = keys_at if kv.v.stride() == kv.k.stride() else group.addresses(kv.v, plan.rows)
            for part in group.parts(by_head[1], plan.head_dim):
                at, hidden = (group.rows[part], group.heads[part]), group.hidden[part]
                queries = q[at].float() * (scale * LOG2E)  # [tiles, size, query heads, head_dim]
                scores = torch.bmm(queries.flatten(1, 2), gather(kv.k, keys_at[part]).transpose(1, 2))
                by_row = scores.unflatten(1, queries.shape[1:3])
                if logits is not None and group.emits:
                    emit(by_row, hidden, group.common, logits.unflatten(1, by_head), at)
                if out is None:
                    continue
                by_row[..., group.common :].masked_fill_(hidden, -math.inf)
                top = scores.amax(-1, keepdim=True)
                weights = scores.sub_(top).exp2_()
                total = weights.sum(-1, keepdim=True)
                mean = torch.bmm(weights, gather(kv.v, values_at[part])).div_(total)
                out.unflatten(1, by_head)[at] = mean.view(queries.shape).to(out.dtype)
                if lse is not None:
                    lse.unflatten(1, by_head)[at] = (top * LN2 + total.log()).view(queries.shape[:3])

    def pool(self, logits: Tensor, first: Tensor, last: Tensor, groups: int, *,
             how: PoolHow, window: int, out: Tensor) -> Tensor:  # fmt: skip
        """From logits to rankings; see `interface.Kernels.pool`. Sums run from left to right: padding changes no bit."""
        check_pool(logits, groups, how, window)
        column = first[:, None] + torch.arange(out.shape[2], device=out.device)
        outside = (column >= last[:, None])[:, None]
        column = column.clamp(max=logits.shape[2] - 1).long()[:, None].expand(-1, logits.shape[1], -1)
        x = logits.gather(2, column).masked_fill_(outside, -math.inf)
        top = x.amax(-1, keepdim=True)
        shares = x.sub_(torch.where(top == -math.inf, 0.0, top)).mul_(LOG2E).exp2_()
        shares /= shares.cumsum(-1)[..., -1:].clamp(min=1.0)  # the largest is 1, unless all are 0
        shares = shares.unflatten(1, (groups, -1))
        combined = shares.sum(2) if how == "sum" else shares.amax(2)
        if window > 1:
            combined = torch.nn.functional.max_pool1d(combined, window, stride=1, padding=window // 2)
        return out.copy_(torch.where(outside, out, combined))

    def select(self, scores: Tensor, lengths: Tensor, k: int, *, offset: Tensor | None = None,
               out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Top-k with ties to the lower column; see `interface.Kernels.select`."""
        rows, width = scores.shape
        columns, counts = out or (lengths.new_empty(rows, k), lengths.new_empty(rows))
        taken = min(k, width)
        if columns.dtype != torch.int32 or columns.shape != (rows, k) or counts.shape != (rows,):
            raise ValueError(f"out must be int32 [{rows}, {k}] and [{rows}]; got {columns.dtype} {tuple(columns.shape)} "
                             f"and {tuple(counts.shape)}")  # fmt: skip
        counts.copy_(lengths.clamp(max=k))
        if taken == 0:
            columns.fill_(-1)
            return columns, counts
        column = torch.arange(width, dtype=torch.int32, device=scores.device).expand(rows, -1)
        there = column < lengths[:, None]
        scores = scores.masked_fill(~there, -math.inf)
        least = scores.topk(taken, sorted=False).values.amin(-1, keepdim=True)
        above, equal = scores > least, (scores == least) & there
        chosen = above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
        place = torch.where(chosen, chosen.cumsum(-1) - 1, k)  # what is not chosen goes into a last column, which is cut off
        found = torch.full((rows, k + 1), -1, dtype=torch.int32, device=scores.device)
        found.scatter_(1, place, column if offset is None else column + offset[:, None])
        columns.copy_(found[:, :k])
        return columns, counts
