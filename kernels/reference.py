"""Every operation in plain torch, one row and one head at a time: what all other back ends are tested against.

Arithmetic is fp32, or fp64 where the inputs are fp64 (an oracle for tests; storage in fp64 is not part of the contract).
Runs on any device. Slow on purpose: each function reads as its definition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvloom.kernels.counters import Counters
from kvloom.kernels.interface import COMPARES, Allowed, Folded, PagedKV, Plan, PoolHow, Renewal, Rows
from kvloom.kernels.quantized import QuantizedLinears


def wide(x: Tensor) -> Tensor:
    """x in the precision of the arithmetic."""
    return x if x.dtype == torch.float64 else x.float()


SMALLEST = 1e-30
"""In place of a temperature of 0, which counts for nothing then."""


@dataclass(slots=True)
class ReferencePlan:
    """Only the rows: what they see is looked up at each use."""

    rows: Rows


def visible(rows: Rows, kv_heads: int, heads: Tensor | None = None, listed: Tensor | None = None) -> list[list[Tensor]]:
    """Positions each row sees for each KV head, list first, then tail: int64 tensors.

    heads, listed: `heads` and `positions` of `interface.Kernels.attend`. A head that is left out sees nothing.
    """
    seen = []
    for row in range(rows.size):
        found = []
        for head, lister in enumerate(range(kv_heads) if heads is None else heads.tolist()):
            start = int(rows.start[row] if rows.start.ndim == 1 else rows.start[row, head])
            tail = torch.arange(start, int(rows.stop[row]), device=rows.start.device)
            if lister < 0:
                tail = tail[:0]
            if rows.lists is None or lister < 0:
                found.append(tail)
                continue
            column = lister if rows.lists.offsets.shape[1] > 1 else 0
            offset, length = int(rows.lists.offsets[row, column]), int(rows.lists.lengths[row, column])
            positions = rows.lists.positions if listed is None else listed
            found.append(torch.cat([positions[offset : offset + length].long(), tail]))
        seen.append(found)
    return seen


def gather(cache: Tensor, table: Tensor, positions: Tensor, head: int) -> Tensor:
    """Rows of a cache [blocks, heads, block_size, head_dim] at logical positions: [positions, head_dim]."""
    block_size = cache.shape[2]
    return cache[table[positions // block_size].long(), head, positions % block_size]


def sums(words: Tensor, at: int, kv: PagedKV) -> Tensor:
    """The record of sums that begins at a word, in place: [2, kv_heads, head_dim] fp32."""
    heads, dim = kv.k.shape[1], kv.k.shape[3]
    return words[at : at + 2 * heads * dim].view(torch.float32).view(2, heads, dim)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + rotary/2) of x [..., head_dim] by angles whose cos and sin are [..., rotary/2]."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    x = wide(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * wide(weight)


def check_sample(logits: Tensor, how: Tensor, out: Tensor, allowed: Allowed | None) -> None:
    """Raises ValueError or TypeError if the tensors do not belong together."""
    rows = logits.shape[0]
    if how.shape != (rows, 5) or out.shape != (rows,) or logits.ndim != 2 or not logits.shape[1]:
        raise ValueError(f"logits are {tuple(logits.shape)}, how {tuple(how.shape)}, out {tuple(out.shape)}; allowed: "
                         "[rows, vocab], [rows, 5] and [rows]")  # fmt: skip
    if how.dtype != torch.float64 or out.dtype != torch.int64 or not how.is_contiguous() or not out.is_contiguous():
        raise TypeError(f"how must be contiguous fp64 and out contiguous int64; got {how.dtype} and {out.dtype}")
    if allowed is None:
        return
    words = -(-logits.shape[1] // 32)
    if allowed.bits.ndim != 2 or allowed.bits.shape[1] != words or allowed.rows.shape != (rows,):
        raise ValueError(f"allowed has bits {tuple(allowed.bits.shape)} and rows {tuple(allowed.rows.shape)}; allowed: "
                         f"[masks, {words}] and [{rows}]")  # fmt: skip
    for tensor in allowed:
        if tensor.dtype is not torch.int32 or not tensor.is_contiguous():
            raise TypeError(f"what rows may draw must be contiguous int32; got {tensor.dtype}")


def forbidden(allowed: Allowed, vocab: int) -> Tensor:
    """[rows, vocab] bool: the tokens that rows may not draw. Reads no value of a tensor."""
    if not len(allowed.bits):
        return torch.zeros(len(allowed.rows), vocab, dtype=torch.bool, device=allowed.rows.device)
    octets = allowed.bits.view(torch.uint8)[allowed.rows.clamp(min=0).long()]
    places = torch.arange(8, dtype=torch.uint8, device=octets.device)
    unset = (octets[:, :, None] >> places & 1).view(len(octets), -1)[:, :vocab] == 0
    return unset & (allowed.rows >= 0)[:, None]


def check_pool(logits: Tensor, groups: int, how: str, window: int) -> None:
    """Raises ValueError for what no back end can pool."""
    if groups < 1 or logits.shape[1] % groups:
        raise ValueError(f"groups is {groups}; it must divide the {logits.shape[1]} query heads of the logits")
    if how not in ("sum", "max"):
        raise ValueError(f"how is {how!r}; allowed: sum, max")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window is {window}; it must be odd, 1 for none")


def check_renewal(q: Tensor, how: Renewal, indices: Sequence[Tensor], words: Tensor, lengths: Tensor, counts: Tensor) -> None:
    """Raises ValueError for what no back end can renew. indices: at, stop, due, active and start, [rows] each."""
    if how.compare not in COMPARES:
        raise ValueError(f"compare is {how.compare!r}; allowed: {', '.join(COMPARES)}")
    for tensor in (*indices, words, lengths):
        if tensor.dtype is not torch.int32 or not tensor.is_contiguous():
            raise ValueError(f"all but counts must be contiguous int32; got {tensor.dtype} with strides {tensor.stride()}")
    if counts.dtype is not torch.int64 or counts.shape != (3,):
        raise ValueError(f"counts must be int64 [3]; got {counts.dtype} {tuple(counts.shape)}")
    if lengths.ndim != 2 or any(len(tensor) != len(q) for tensor in (*indices, lengths)):
        raise ValueError(f"there are {len(q)} rows; got {[tuple(tensor.shape) for tensor in (*indices, lengths)]}")


def check_folded(folded: Folded, rows: int) -> None:
    """Raises ValueError for what no back end can read."""
    _check_indices([folded.words], None)
    _check_indices([folded.at, folded.counts], rows)


def check_folding(kv: PagedKV, tables: Tensor, words: Tensor, columns: Sequence[Tensor]) -> None:
    """Raises ValueError for what no back end can fold. columns: request, first, last and at, [n] each."""
    _check_indices([words, tables], None)
    _check_indices(columns, len(columns[0]))
    if kv.k.shape != kv.v.shape or tables.ndim != 2:
        raise ValueError(f"K is {tuple(kv.k.shape)}, V {tuple(kv.v.shape)}, tables {tuple(tables.shape)}")


def _check_indices(tensors: Sequence[Tensor], rows: int | None) -> None:
    for tensor in tensors:
        if tensor.dtype is not torch.int32 or not tensor.is_contiguous() or (rows is not None and tensor.shape != (rows,)):
            wanted = "must be contiguous int32" + ("" if rows is None else f" [{rows}]")
            raise ValueError(f"{wanted}; got {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}")


class ReferenceKernels:
    """`interface.Kernels` in plain torch."""

    name = "reference"
    build = ""
    paths = ""
    dense: str | None = None
    quantized: QuantizedLinears | None = None

    def __init__(self) -> None:
        self._counted = Counters()

    @property
    def counters(self) -> Counters:
        """As of now."""
        return replace(self._counted)

    def store(self, k: Tensor, v: Tensor, kv: PagedKV, slots: Tensor) -> None:
        """Write rows into slots; see `interface.Kernels.store`."""
        kept = slots >= 0
        block, offset = slots[kept] // kv.k.shape[2], slots[kept] % kv.k.shape[2]
        kv.k[block, :, offset] = k[kept].to(kv.k.dtype)
        kv.v[block, :, offset] = v[kept].to(kv.v.dtype)

    def graph(self) -> None:
        """None: calls are made one by one."""

    def plan(self, rows: Rows, q_heads: int, kv_heads: int, head_dim: int, into: Plan | None = None) -> Plan:
        """Nothing to prepare."""
        return ReferencePlan(rows)

    def attend(self, q: Tensor, kv: PagedKV, plan: Plan, *, scale: float, out: Tensor, lse: Tensor | None = None,
               logits: Tensor | None = None, positions: Tensor | None = None, heads: Tensor | None = None,
               read: Tensor | None = None, folded: Folded | None = None) -> Tensor:  # fmt: skip
        """Softmax attention; see `interface.Kernels.attend`."""
        assert isinstance(plan, ReferencePlan)
        if folded is not None:
            check_folded(folded, plan.rows.size)
        group = q.shape[1] // kv.k.shape[1]
        seen = visible(plan.rows, kv.k.shape[1], heads, positions)
        for row, by_head in enumerate(seen):
            table = plan.rows.tables[int(plan.rows.request[row])]
            if read is not None:
                read[row] += sum(map(len, by_head))
            for q_head in range(q.shape[1]):
                if heads is not None and int(heads[q_head // group]) < 0:
                    continue
                own = by_head[q_head // group]
                keys = wide(gather(kv.k, table, own, q_head // group))
                values = wide(gather(kv.v, table, own, q_head // group))
                products = keys @ wide(q[row, q_head]) * scale
                if logits is not None and row < logits.shape[0]:
                    logits[row, q_head, : len(own)] = products.to(logits.dtype)
                if folded is not None and (n := int(folded.counts[row])):
                    key, value = sums(folded.words, int(folded.at[row]), kv)[:, q_head // group].to(keys.dtype) / n
                    logit = key @ wide(q[row, q_head]) * scale + math.log(n)
                    products, values = torch.cat([products, logit[None]]), torch.cat([values, value[None]])
                out[row, q_head] = (torch.softmax(products, 0) @ values).to(out.dtype)
                if lse is not None:
                    lse[row, q_head] = torch.logsumexp(products, 0)
        self._count(kv, plan.rows, seen, scores_only=False, heads=heads)
        return out

    def fold(self, kv: PagedKV, tables: Tensor, request: Tensor, first: Tensor, last: Tensor, words: Tensor, at: Tensor, *,
             origin: int, most: int) -> None:  # fmt: skip
        """Add keys and values to sums; see `interface.Kernels.fold`."""
        columns, size = (request, first, last, at), kv.k.shape[2]
        check_folding(kv, tables, words, columns)
        for of, begin, end, where in zip(*(column.tolist() for column in columns)):
            if where < 0:
                continue
            record = sums(words, where, kv)
            if begin <= origin:
                record.zero_()
            for block in range(begin // size, -(-end // size)):
                part = slice(max(0, begin - block * size), min(size, end - block * size))
                for total, cache in zip(record, kv):
                    total += wide(cache[int(tables[of, block]), :, part]).sum(1)

    def score(self, q: Tensor, kv: PagedKV, plan: Plan, *, scale: float, out: Tensor, active: Tensor | None = None) -> Tensor:
        """Query-key products; see `interface.Kernels.score`."""
        assert isinstance(plan, ReferencePlan)
        group = q.shape[1] // kv.k.shape[1]
        seen = visible(plan.rows, kv.k.shape[1])
        for row, heads in enumerate(seen):
            if active is not None and int(active[row]) < 0:
                seen[row] = []
                continue
            table = plan.rows.tables[int(plan.rows.request[row])]
            for q_head in range(q.shape[1]):
                keys = wide(gather(kv.k, table, heads[q_head // group], q_head // group))
                out[row, q_head, : len(keys)] = (keys @ wide(q[row, q_head]) * scale).to(out.dtype)
        self._count(kv, plan.rows, seen, scores_only=True)
        return out

    def _count(self, kv: PagedKV, rows: Rows, seen: list[list[Tensor]], scores_only: bool, heads: Tensor | None = None) -> None:
        positions = sum(len(head) for heads in seen for head in heads)
        position_bytes = kv.k.shape[3] * kv.k.element_size()
        if scores_only:
            self._counted.score_bytes += positions * position_bytes
            return
        self._counted.rows += int((rows.stop > 0).sum())
        self._counted.positions += positions
        self._counted.kv_bytes += 2 * positions * position_bytes
        if rows.lists is not None:
            listers = torch.arange(kv.k.shape[1]) if heads is None else heads[heads >= 0]
            listed = int(rows.lists.lengths.expand(-1, kv.k.shape[1])[:, listers.long()].sum())
            self._counted.list_kv_bytes += 2 * listed * position_bytes

    def pool(self, logits: Tensor, first: Tensor, last: Tensor, groups: int, *,
             how: PoolHow, window: int, out: Tensor, active: Tensor | None = None) -> Tensor:  # fmt: skip
        """Softmax per head, combined per group, then a running maximum; see `interface.Kernels.pool`."""
        check_pool(logits, groups, how, window)
        for row, (begin, end) in enumerate(zip(first.tolist(), last.tolist())):
            if begin >= end or (active is not None and int(active[row]) < 0):
                continue
            shares = torch.softmax(wide(logits[row, :, begin:end]), dim=-1).unflatten(0, (groups, -1))
            shares = torch.where((logits[row, :, begin:end] == -torch.inf).unflatten(0, (groups, -1)), 0.0, shares)
            combined = shares.sum(1) if how == "sum" else shares.amax(1)
            if window > 1:
                combined = torch.nn.functional.max_pool1d(combined[None], window, stride=1, padding=window // 2)[0]
            out[row, :, : end - begin] = combined
        return out

    def select(self, scores: Tensor, lengths: Tensor, k: int, *, offset: Tensor | None = None,
               out: tuple[Tensor, Tensor | None] | None = None,
               at: Tensor | None = None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Top-k with ties to the lower column; see `interface.Kernels.select`."""
        shape = scores.shape[:-1]
        columns, counts = out or (lengths.new_empty(*shape, k), lengths.new_empty(shape))
        for row, length in enumerate(lengths.tolist()):
            if at is not None and int(at[row]) < 0:
                continue
            order = torch.sort(scores[row, ..., :length], descending=True, stable=True).indices[..., :k].sort().values
            place = columns[row] if at is None else columns.as_strided(columns.shape, columns.stride(),
                                                                       columns.storage_offset() + int(at[row]))  # fmt: skip
            place.fill_(-1)
            place[..., : order.shape[-1]] = order + (0 if offset is None else offset[row])
            if counts is not None:
                counts[row] = min(length, k)
        return columns, counts

    def renew(self, q: Tensor, words: Tensor, at: Tensor, stop: Tensor, due: Tensor, how: Renewal,
              angles: tuple[Tensor, Tensor] | None, active: Tensor, start: Tensor, lengths: Tensor,
              counts: Tensor) -> None:  # fmt: skip
        """Which lists are made anew; see `interface.Kernels.renew`."""
        check_renewal(q, how, (at, stop, due, active, start), words, lengths, counts)
        for row, (where, known) in enumerate(zip(at.tolist(), stop.tolist())):
            if where < 0:
                active[row], start[row], lengths[row] = -1, 0, 0
                continue
            record, query = words[where:], wide(q[row])
            if angles is not None:
                query = turn(query, angles[0][row], -angles[1][row])
            query = query.mean(0) if how.compare == "mean" else query.flatten()
            kept = record.view(torch.float32)[how.query : how.query + len(query)]
            tail = int(record[how.tail])
            anew = int(due[row]) == 1 or tail >= known or known - tail - how.recent > how.most
            if not anew and int(due[row]) == 2 and how.compare != "none":
                parts = (query.view(q.shape[1], -1), kept.view(q.shape[1], -1)) if how.compare == "min" else (query, kept)
                cosines = torch.cosine_similarity(parts[0].double(), parts[1].double(), dim=-1, eps=1e-38)
                anew = float(cosines.min()) < how.threshold
            counts += torch.tensor([anew, anew and tail < known, not anew])
            if anew:
                record[how.tail] = known - how.recent
                if how.compare != "none":
                    kept.copy_(query)
            active[row] = where if anew else -1
            sees_all = anew and how.dense
            start[row], lengths[row] = (0, 0) if sees_all else (int(record[how.tail]), how.width)

    def rotate(self, k: Tensor, delta: Tensor, inv_freq: Tensor, out: Tensor) -> Tensor:
        """Shift rotary positions; see `interface.Kernels.rotate`. Angles in fp64: a long shift must not lose its phase."""
        angles = delta[:, None, None].double() * inv_freq.double()
        cos, sin = angles.cos().to(wide(k).dtype), angles.sin().to(wide(k).dtype)
        return out.copy_(turn(wide(k), cos, sin))

    def sample(self, logits: Tensor, how: Tensor, out: Tensor, allowed: Allowed | None = None) -> Tensor:
        """Every row sorted; see `interface.Kernels.sample`."""
        check_sample(logits, how, out, allowed)
        if allowed is not None:
            logits = logits.masked_fill(forbidden(allowed, logits.shape[1]), -torch.inf)
        temperature, top_k, top_p, min_p, number = (column[:, None] for column in how.unbind(1))
        ordered, ids = logits.sort(dim=1, descending=True, stable=True)
        highest = ordered[:, :1]  # NaN, where there is any
        weights = ((ordered - highest) / temperature.clamp(min=SMALLEST).float()).exp()
        weights = torch.where(weights < min_p.float(), 0.0, weights).double()
        rank = torch.arange(logits.shape[1], device=logits.device)
        weights.masked_fill_(rank >= torch.where(temperature == 0, 1, torch.where(top_k == 0, len(rank), top_k)), 0.0)
        reached = weights.cumsum(dim=1)
        wanted = reached[:, -1:] * torch.where(top_p < 1, top_p, 1.0)
        last = torch.searchsorted(reached, wanted).clamp_(max=len(rank) - 1)  # NaN lies behind everything
        at = torch.searchsorted(reached, number * reached.gather(1, last), right=True)
        found = ids.gather(1, torch.minimum(at, last))
        return out.copy_(torch.where(highest.isfinite(), found, -1).squeeze(1))

    def add_rms_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> Tensor:
        """Residual addition and RMS norm; see `interface.Kernels.add_rms_norm`."""
        if delta is not None:
            x.copy_(wide(x) + wide(delta))
        return out.copy_(rms_norm(x, weight, eps))

    def rotate_store(self, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, kv: PagedKV, slots: Tensor, q: Tensor,
                     q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 0.0) -> Tensor:  # fmt: skip
        """Split, normalise, rotate, store; see `interface.Kernels.rotate_store`."""
        q_heads, kv_heads = q.shape[1], kv.k.shape[1]
        heads = wide(qkv).view(qkv.shape[0], q_heads + 2 * kv_heads, -1)
        queries, keys, values = heads.split([q_heads, kv_heads, kv_heads], dim=1)
        if q_norm is not None:
            queries = rms_norm(queries, q_norm, eps)
        if k_norm is not None:
            keys = rms_norm(keys, k_norm, eps)
        turned = turn(torch.cat([queries, keys], dim=1), cos[positions][:, None], sin[positions][:, None])
        self.store(turned[:, q_heads:], values, kv, slots)
        return q.copy_(turned[:, :q_heads])

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> Tensor:
        """Gated activation; see `interface.Kernels.silu_mul`."""
        gate, up = wide(gate_up).chunk(2, dim=-1)
        return out.copy_(torch.nn.functional.silu(gate) * up)
