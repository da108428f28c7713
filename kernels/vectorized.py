"""Every operation in plain torch, for all rows at once: the back end of any device, and of machines without a compiler.

Attention is cut into tiles once per step (`tiles`). Those of one shape are gathered, multiplied, masked and normalised at once,
in parts that take at most ROOM numbers of working memory, or two tiles' own: 2 * keys * (TILE * query heads + 2 * head_dim),
18 MiB for three heads of 64 that see 7,168 positions. Between two operations nothing waits for a result.

On a CPU, a row's bits do not depend on what else is in the batch: its tile's shape follows from its own positions (or its
chunk's, or its bound), sums run over that shape alone, and products are batches of two or more, which MKL computes one matrix
to a thread; a single one it may cut among threads. What the reference already computes for all rows at once is inherited.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvloom.kernels.counters import Counters
from kvloom.kernels.interface import Folded, PagedKV, Plan, PoolHow, Renewal, Rows
from kvloom.kernels.reference import ReferenceKernels, check_folded, check_folding, check_pool, check_renewal, turn
from kvloom.kernels.tiles import ROOM, Cut, TorchPlan, Use, as_matrix

LOG2E, LN2 = math.log2(math.e), math.log(2.0)
SMALLEST = torch.finfo(torch.float32).tiny


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


def add_folded(q: Tensor, out: Tensor, lse: Tensor, folded: Folded, kv_heads: int, scale: float, heads: Tensor | None) -> None:
    """Give rows their folded position. q, out: [rows, q_heads, head_dim], out in fp32; lse: [rows, q_heads]; heads: see
    `interface.Kernels.attend`."""
    group, count, size = q.shape[1] // kv_heads, folded.counts[:, None, None], 2 * kv_heads * q.shape[2]
    if len(folded.words) < size:  # nobody has sums
        return
    place = torch.where(folded.counts > 0, folded.at, 0).long()[:, None] + torch.arange(size, device=q.device)
    means = folded.words.view(torch.float32)[place].view(len(q), 2, kv_heads, 1, -1) / count.clamp(min=1)[..., None, None]
    keys, values = means.unbind(1)
    logit = (q.unflatten(1, (-1, group)).float() * keys).sum(-1).mul_(scale).add_(count.log())
    has = count > 0 if heads is None else (count > 0) & (heads >= 0)[:, None]
    out, lse = out.unflatten(1, (-1, group)), lse.unflatten(1, (-1, group))
    total = torch.logaddexp(lse, logit)
    own, share = (torch.exp(part - total)[..., None] for part in (lse, logit))
    out.copy_(torch.where(has[..., None], out * own + values * share, out))
    lse.copy_(torch.where(has, total, lse))


class TorchKernels(ReferenceKernels):
    """`interface.Kernels` in torch, without a loop over rows or heads. Threads are torch's."""

    name = "torch"
    dense: str | None = None

    def __init__(self) -> None:
        self._counts: list[int | Tensor] = [0] * 5

    # Attention ---------------------------------------------------------------------------------------------------

    def store(self, k: Tensor, v: Tensor, kv: PagedKV, slots: Tensor) -> None:
        """Write rows into slots; see `interface.Kernels.store`. A row without a slot writes what some other row writes, or, if
        there is none, what slot 0 holds."""
        if len(slots) == 0:
            return
        kept = slots >= 0
        source = standing_in(kept)
        slot, written = slots[source].clamp(min=0), kept[source, None, None]
        block, offset = slot // kv.k.shape[2], slot % kv.k.shape[2]
        for cache, new in ((kv.k, k), (kv.v, v)):
            cache[block, :, offset] = torch.where(written, new[source].to(cache.dtype), cache[block, :, offset])

    def plan(self, rows: Rows, q_heads: int, kv_heads: int, head_dim: int, into: Plan | None = None) -> Plan:
        """Cut rows into tiles; see `interface.Kernels.plan`."""
        if q_heads % kv_heads:
            raise ValueError(f"{q_heads} query heads do not divide into {kv_heads} KV heads")
        plan = TorchPlan(rows, kv_heads, head_dim, {})
        plan.cut(rows.size if plan.open else 0)
        return plan

    def attend(self, q: Tensor, kv: PagedKV, plan: Plan, *, scale: float, out: Tensor, lse: Tensor | None = None,
               logits: Tensor | None = None, positions: Tensor | None = None, heads: Tensor | None = None,
               read: Tensor | None = None, folded: Folded | None = None) -> Tensor:  # fmt: skip
        """Softmax attention; see `interface.Kernels.attend`. What is folded is merged in when all else is known."""
        assert isinstance(plan, TorchPlan)
        if out.dtype != q.dtype:
            raise TypeError(f"q is {q.dtype} and out {out.dtype}; they and the cache must be of one dtype")
        use = Use.of(plan.rows, plan.kv_heads, heads, None) if read is not None or heads is not None or plan.open else None
        if use is not None and read is not None:
            read += use.seen.sum(1)
        if use is not None and (heads is not None or plan.open):
            if logits is not None and len(logits) != plan.rows.size:
                raise ValueError(f"with heads or bounds, all {plan.rows.size} rows hand out logits; got room for {len(logits)}")
            tiles, item = plan.cut(plan.rows.size), plan.head_dim * kv.k.element_size()
            listed = torch.where(use.listers < 0, 0, use.listed[:, use.listers.clamp(min=0)])
            seen = use.seen.sum()
            self._add((plan.rows.stop > 0).sum(), seen, 2 * item * seen, 0, 2 * item * listed.sum())
        else:
            use, tiles, item = None, plan.cut(0 if logits is None else len(logits)), kv.k.element_size()
            counts = tiles.counts
            self._add(counts.rows, counts.positions, counts.kv_bytes * item, 0, counts.list_kv_bytes * item)
        if folded is None:
            self._run(q, kv, plan, tiles, scale, out, lse, logits, use, positions)
            return out
        check_folded(folded, plan.rows.size)
        state = out.float()  # not rounded in between
        lse = q.new_empty(q.shape[:2], dtype=torch.float32) if lse is None else lse
        self._run(q, kv, plan, tiles, scale, state, lse, logits, use, positions)
        add_folded(q, state, lse, folded, plan.kv_heads, scale, heads)
        return out.copy_(state)

    def fold(self, kv: PagedKV, tables: Tensor, request: Tensor, first: Tensor, last: Tensor, words: Tensor, at: Tensor, *,
             origin: int, most: int) -> None:  # fmt: skip
        """Add keys and values to sums; see `interface.Kernels.fold`. Blocks are added from left to right: padding changes no
        bit. A row that is left out adds what some other row does, or, if there is none, writes what is there."""
        check_folding(kv, tables, words, (request, first, last, at))
        rows, (count, heads, size, dim) = len(at), kv.k.shape
        if rows == 0 or heads == 0 or len(words) < 2 * heads * dim:
            return
        source = standing_in(at >= 0)
        request, first, last, at = (column[source].long()[:, None] for column in (request, first, last, at))
        floats, place = words.view(torch.float32), at.clamp(min=0) + torch.arange(2 * heads * dim, device=at.device)
        known = floats[place]
        total = known.masked_fill(first <= origin, 0.0).double().view(rows, 1, 2, heads, dim)
        blocks = first // size + torch.arange(most // size + 2, device=at.device)
        for part in blocks.split(max(1, ROOM // (rows * heads * size * dim)), dim=1):
            position = part[..., None] * size + torch.arange(size, device=at.device)
            outside = ((position < first[..., None]) | (position >= last[..., None]))[:, :, None, :, None]
            found = tables[request, part.clamp(max=tables.shape[1] - 1)].clamp(0, count - 1)
            added = [cache[found].float().masked_fill_(outside, 0.0).sum(3).double() for cache in kv]
            total = torch.cat([total, torch.stack(added, 2)], 1).cumsum(1)[:, -1:]
        floats[place] = torch.where(at >= 0, total.flatten(1).float(), known)

    def score(self, q: Tensor, kv: PagedKV, plan: Plan, *, scale: float, out: Tensor, active: Tensor | None = None) -> Tensor:
        """Query-key products; see `interface.Kernels.score`."""
        assert isinstance(plan, TorchPlan)
        tiles = plan.cut(len(out))
        use = Use.of(plan.rows, plan.kv_heads, None, active) if active is not None or plan.open else None
        self._run(q, kv, plan, tiles, scale, None, None, out, use, None)
        elements = tiles.counts.score_bytes if use is None else use.seen.sum() * plan.head_dim
        self._add(0, 0, 0, elements * kv.k.element_size(), 0)
        return out

    @property
    def counters(self) -> Counters:
        """As of now."""
        return Counters(*map(int, self._counts))

    def _add(self, *counts: int | Tensor) -> None:
        """Add to the fields of `Counters`: numbers, or tensors that nobody waits for."""
        self._counts = [known + count for known, count in zip(self._counts, counts)]

    def _run(self, q: Tensor, kv: PagedKV, plan: TorchPlan, tiles: Cut, scale: float, out: Tensor | None,
             lse: Tensor | None, logits: Tensor | None, use: Use | None, positions: Tensor | None) -> None:  # fmt: skip
        """Attention in base 2, a part of a group at a time; without `out` the products alone. use: what rows see now, if that
        may differ from what they saw when planned; positions: in place of those of lists."""
        if {q.dtype, kv.v.dtype} != {kv.k.dtype}:
            raise TypeError(f"q is {q.dtype}, the cache {kv.k.dtype} and {kv.v.dtype}; they and out must be of one dtype")
        by_head = (plan.kv_heads, q.shape[1] // plan.kv_heads)
        q = q.unflatten(1, by_head)
        if tiles.blind and out is not None:  # rows of open plans that see nothing have tiles even so
            left_out = torch.zeros(1, dtype=torch.bool, device=q.device) if use is None else use.listers < 0
            out.unflatten(1, by_head).masked_fill_(~left_out[:, None, None], 0.0)
            if lse is not None:
                lse.unflatten(1, by_head).masked_fill_(~left_out[:, None], -math.inf)
        for planned in tiles.groups:
            group = planned if use is None else planned.now(plan.rows, use)
            keys_at = group.addresses(kv.k, plan.rows, positions)
            values_at = keys_at if kv.v.stride() == kv.k.stride() else group.addresses(kv.v, plan.rows, positions)
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
                weights = scores.sub_(top if use is None else torch.where(top == -math.inf, 0.0, top)).exp2_()
                total = weights.sum(-1, keepdim=True)
                mean = torch.bmm(weights, gather(kv.v, values_at[part])).div_(total.clamp(min=SMALLEST))
                found, of = mean.view(queries.shape).to(out.dtype), out.unflatten(1, by_head)
                kept = None if use is None else (use.listers[at[1]] < 0)[..., None]
                of[at] = found if kept is None else torch.where(kept[..., None], of[at], found)
                if lse is not None:
                    logs, of = (top * LN2 + total.log()).view(queries.shape[:3]), lse.unflatten(1, by_head)
                    of[at] = logs if kept is None else torch.where(kept, of[at], logs)

    def pool(self, logits: Tensor, first: Tensor, last: Tensor, groups: int, *,
             how: PoolHow, window: int, out: Tensor, active: Tensor | None = None) -> Tensor:  # fmt: skip
        """From logits to rankings; see `interface.Kernels.pool`. Sums run from left to right: padding changes no bit."""
        check_pool(logits, groups, how, window)
        last = last if active is None else torch.where(active < 0, first, last)
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
               out: tuple[Tensor, Tensor | None] | None = None,
               at: Tensor | None = None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Top-k with ties to the lower column; see `interface.Kernels.select`."""
        shape, width = scores.shape[:-1], scores.shape[-1]
        columns, counts = out or (lengths.new_empty(*shape, k), lengths.new_empty(shape))
        taken, wanted = min(k, width), (*shape, k) if at is None else (*shape[1:], k)
        if columns.dtype != torch.int32 or columns.shape != wanted or (counts is not None and counts.shape != shape):
            raise ValueError(f"out must be int32 {list(wanted)} and {list(shape)}; got {columns.dtype} {tuple(columns.shape)} "
                             f"and {None if counts is None else tuple(counts.shape)}")  # fmt: skip
        by_row = (-1, *(1,) * len(shape))
        if counts is not None:
            counts.copy_(lengths.clamp(max=k).view(by_row[:-1]).expand(shape))
        if taken == 0:
            nothing = torch.full((*shape, k), -1, dtype=torch.int32, device=scores.device)
            return (columns.copy_(nothing) if at is None else scatter(columns, nothing, at)), counts
        column = torch.arange(width, dtype=torch.int32, device=scores.device).expand(*shape, -1)
        there = column < lengths.view(by_row)
        scores = scores.masked_fill(~there, -math.inf)
        least = scores.topk(taken, sorted=False).values.amin(-1, keepdim=True)
        above, equal = scores > least, (scores == least) & there
        chosen = above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
        place = torch.where(chosen, chosen.cumsum(-1) - 1, k)  # what is not chosen goes into a last column, which is cut off
        found = torch.full((*shape, k + 1), -1, dtype=torch.int32, device=scores.device)
        found.scatter_(-1, place, column if offset is None else column + offset.view(by_row))
        if at is None:
            columns.copy_(found[..., :k])
        else:
            scatter(columns, found[..., :k], at)
        return columns, counts

    def renew(self, q: Tensor, words: Tensor, at: Tensor, stop: Tensor, due: Tensor, how: Renewal,
              angles: tuple[Tensor, Tensor] | None, active: Tensor, start: Tensor, lengths: Tensor,
              counts: Tensor) -> None:  # fmt: skip
        """Which lists are made anew; see `interface.Kernels.renew`. A row that is left out does what some other row does, or,
        if there is none, writes what is there."""
        check_renewal(q, how, (at, stop, due, active, start), words, lengths, counts)
        if not len(at):
            return
        own = at >= 0
        source = standing_in(own)
        q, stop, due, at = q[source], stop[source], due[source], at[source].clamp(min=0)
        where = at.long() + how.tail
        tail = words[where]
        have = tail < stop
        anew = (due == 1) | ~have | (stop.long() - tail - how.recent > how.most)
        if how.compare != "none":
            query = q.float()
            if angles is not None:
                query = turn(query, angles[0][source, None], -angles[1][source, None])
            query = query.mean(1) if how.compare == "mean" else query.flatten(1)
            floats, place = (
                words.view(torch.float32),
                at.long()[:, None] + how.query + torch.arange(query.shape[1], device=q.device),
            )
            kept = floats[place]
            by_part = (len(q), q.shape[1] if how.compare == "min" else 1, -1)
            pair = (query.view(by_part).double(), kept.view(by_part).double())
            anew |= (due == 2) & (torch.cosine_similarity(*pair, dim=-1, eps=1e-38).amin(1) < how.threshold)
            floats[place] = torch.where((anew & own[source])[:, None], query, kept)
        anew &= own[source]
        words[where] = torch.where(anew, stop - how.recent, tail)
        active.copy_(torch.where(anew & own, at, -1))
        no_list = (anew & how.dense) | ~own
        start.copy_(torch.where(no_list, 0, words[where]))
        lengths.copy_(torch.where(no_list, 0, how.width)[:, None].expand_as(lengths))
        counts += torch.stack([(anew & own).sum(), (anew & have & own).sum(), (~anew & own).sum()])


def standing_in(written: Tensor) -> Tensor:
    """[rows] int64: for each row one that is written, itself if it is; 0 if there is none."""
    return torch.where(written, torch.arange(len(written), device=written.device), written.byte().argmax())


def scatter(columns: Tensor, found: Tensor, at: Tensor) -> Tensor:
    """Write rows of found [rows, ..] where `columns` [..] would be `at` elements further on. Rows whose `at` is negative write
    what some other row writes, or, if there is none, what is there. Returns columns."""
    written = at >= 0
    source = standing_in(written)
    begin = columns.storage_offset()
    size = columns.untyped_storage().nbytes() // columns.element_size() - begin
    flat = columns.as_strided((size,), (1,), begin)
    place = torch.arange(columns.shape[-1], device=at.device)
    for length, stride in zip(reversed(columns.shape[:-1]), reversed(columns.stride()[:-1])):
        place = torch.arange(length, device=at.device).view(-1, *(1,) * place.ndim) * stride + place
    by_row = (-1, *(1,) * place.ndim)
    index = at[source].clamp(min=0).long().view(by_row) + place
    flat[index] = torch.where(written[source].view(by_row), found[source], flat[index])
    return columns
