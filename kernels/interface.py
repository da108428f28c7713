"""The kernel contract: what every back end computes, and nothing about how.

`kernels` knows tensors only. `reference.py` defines each operation in plain torch; `vectorized.py` and `cpu/` are tested
against it. Selection methods decide which rows see what; kernels execute it.

Storage. One layer's KV of one head group is a pair of tensors [blocks, heads, block_size, head_dim]; a *slot* is
block * block_size + offset. Kernels take any strides whose last is 1, so they also run on another engine's paged cache.

Visibility. Query row r, for KV head h, sees

    positions of its list (ascending, all below start)      followed by      the tail [start, stop)

    dense decode at position n-1   list empty          tail [0, n)
    causal prefill row at p        list empty          tail [0, p+1)
    sparse decode                  sinks + selected    tail [n-local, n)
    pure list                      list                tail empty (start == stop)

so dense is only a row kind. A start per KV head lets heads of one row differ: all positions for one, sinks and a window for
another. Lists and tails hold logical positions; a block table translates them at use, and they survive preemption and moves.
A row that sees nothing yields out = 0 and lse = -inf.

Padding. A step may have more rows than it needs, to be as large as one that was captured: those have stop = 0, no list, the
slot -1, and no record (`at` = -1). They store nothing, nothing is kept of them, and no call counts them.

Query head i reads KV head i // (q_heads // kv_heads). K, V and q in the model's dtype, accumulation in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kvloom.kernels.counters import Counters
from kvloom.kernels.graph import Graph
from kvloom.kernels.quantized import QuantizedLinears

T = TypeVar("T")


class PagedKV(NamedTuple):
    """One layer's KV of one head group. `k`, `v`: [blocks, kv_heads, block_size, head_dim], bf16, fp16 or fp32."""

    k: Tensor
    v: Tensor


class Lists(NamedTuple):
    """Explicit positions per row and KV head; rows and heads may share a list by sharing its offset.

    positions: [total] int32, ascending inside each list; may be rewritten between uses of a plan (see `Kernels.plan`)
    offsets, lengths: [rows, kv_heads] int32, or [rows, 1] when all heads of a row share one list
    """

    positions: Tensor
    offsets: Tensor
    lengths: Tensor


class Allowed(NamedTuple):
    """Tokens that rows of logits may draw; masks are shared by all rows that name the same.

    bits: [masks, words] int32, words = ceil(vocab / 32): bit t % 32 of word t // 32 says whether token t may be drawn
    rows: [rows] int32: a row's mask, -1 for one that may draw any token
    """

    bits: Tensor
    rows: Tensor


class Spans(NamedTuple):
    """What the host knows of rows that see everything up to their own position, by request, in the order of rows: for libraries
    that plan on the host.

    first: the row of `Rows.tables` of the first request; the others follow it
    counts, stops: rows of each request, and positions that the last of them sees, each other one fewer than the next; padding
    is a request of one row that sees 0
    blocks: int32, of each request the ids of the blocks that hold these positions
    block_size: positions of a block
    captured: whether steps of as many rows may be replayed by a device's graph; every request has one row then
    """

    first: int
    counts: Sequence[int]
    stops: Sequence[int]
    blocks: Sequence[npt.NDArray[np.int32]]
    block_size: int
    captured: bool = False


class Rows(NamedTuple):
    """What each query row of a step sees. All tensors int32 and contiguous.

    tables: [requests, max_blocks]   logical block -> block id; entries past a request's end are never read
    request: [rows]                  row of `tables`
    start: [rows], or [rows, kv_heads] when heads differ
    stop: [rows]                     tail [start, stop) of positions, start <= stop
    lists: optional                  explicit positions in front of the tail
    most: [rows], optional           the most positions that a row ever sees for a KV head: then `start`, and the lists' offsets
                                     and lengths, are read whenever the plan is used, and may be other ones each time
    spans: optional                  given only for rows with start 0 and no lists: see `Spans`
    """

    tables: Tensor
    request: Tensor
    start: Tensor
    stop: Tensor
    lists: Lists | None = None
    most: Tensor | None = None
    spans: Spans | None = None

    @property
    def size(self) -> int:
        return self.request.shape[0]


class Folded(NamedTuple):
    """One more position of rows, which stands for N others by the means k', v' of their keys and values: its logit is
    scale * q.k' + ln N.

    words: [total] int32, from which sums of keys and values are read: [2, kv_heads, head_dim] fp32 for each row
    at: [rows] int32, the word at which a row's sums begin
    counts: [rows] int32, N; 0 for rows without it, which stay as they are to the bit
    """

    words: Tensor
    at: Tensor
    counts: Tensor


class Plan(Protocol):
    """Host work for one `Rows`, done once per step and used by every layer of it. Opaque but for its rows."""

    rows: Rows


PoolHow = Literal["sum", "max"]
"""How `Kernels.pool` combines the query heads of a group."""

Compare = Literal["none", "mean", "min", "flat"]
"""What of two queries is compared: nothing; their means over heads; every head on its own, of which the least alike counts;
all heads as one vector."""
COMPARES: tuple[Compare, ...] = ("none", "mean", "min", "flat")


class Renewal(NamedTuple):
    """How `Kernels.renew` decides, and where in a request's words a layer's state lies."""

    tail: int
    """Word that holds the position from which everything is seen; `NO_LIST` without a list."""
    query: int
    """First word of what is kept of the query, fp32: head_dim of them for "mean", else q_heads * head_dim."""
    width: int
    """Positions of a list."""
    recent: int
    """A list that is made when N tokens are known has its tail at N - recent."""
    most: int
    """Tokens since it was made after which a list is made anew."""
    compare: Compare
    threshold: float
    """A cosine below this makes a list anew."""
    dense: bool
    """Whether a row that renews sees everything in this layer, instead of its new list."""


NO_LIST = 2**31 - 1
"""The tail of a request that has no list."""


class Kernels(Protocol):
    """A back end. Every `out` argument is written in place and returned; all other tensors are read only."""

    name: str
    build: str
    """Which build of it runs, as "x86-64-v3, ready-made"; empty where there is but one."""
    paths: str
    """Which loops that build takes, by rows, for people to read; empty where there is no choice."""
    dense: str | None
    """The library that attends for rows with `Spans`; None if these kernels do that themselves, and need none."""
    quantized: QuantizedLinears | None
    """Quantised linear layers, if this back end has them."""

    @property
    def counters(self) -> Counters:
        """As of now."""
        ...

    def graph(self) -> Graph | None:
        """An empty graph; None if this back end has none."""
        ...

    # Attention ---------------------------------------------------------------------------------------------------

    def store(self, k: Tensor, v: Tensor, kv: PagedKV, slots: Tensor) -> None:
        """Write rows into slots. k, v: [rows, kv_heads, head_dim]; slots: [rows] int64, -1 skips the row."""
        ...

    def plan(self, rows: Rows, q_heads: int, kv_heads: int, head_dim: int, into: Plan | None = None) -> Plan:
        """Group rows into tiles and splits. Consecutive rows of one request that share their lists (the same offsets) and
        starts, and end one position further each (a prefill chunk), may be computed together.

        A plan reads the contents of `rows.lists.positions` when it is used, not when it is made: they may be rewritten in
        place between two uses, as long as lists stay ascending and below start. Nothing else of `rows` may change, unless
        bounds are given (`Rows.most`).

        into: a plan for the same heads that nobody uses any more, but for graphs: calls captured with it see the new rows.
        A back end without graphs may ignore it.
        """
        ...

    def attend(
        self,
        q: Tensor,
        kv: PagedKV,
        plan: Plan,
        *,
        scale: float,
        out: Tensor,
        lse: Tensor | None = None,
        logits: Tensor | None = None,
        positions: Tensor | None = None,
        heads: Tensor | None = None,
        read: Tensor | None = None,
        folded: Folded | None = None,
    ) -> Tensor:
        """softmax(scale * q k^T) v over what each row sees.

        q, out: [rows, q_heads, head_dim]   lse: [rows, q_heads] fp32, natural log
        logits: [n, q_heads, width] fp32, n <= rows: of the first n rows the scaled products, in the order in which a head sees
        positions (list, then tail); columns past its count are left as they were. Rows from n on pay nothing.
        positions: [total] int32, in place of those of the plan's lists
        heads: [kv_heads] int32: KV head h reads the list of head heads[h], which is as long as its own or within the plan's
        bounds; negative, and its query heads are left out: nothing is read for them or written
        read: [rows] int64, to which is added how many positions each row sees, summed over KV heads
        folded: one more position behind those that a row sees: in out and lse, but neither in logits nor counted
        """
        ...

    def fold(self, kv: PagedKV, tables: Tensor, request: Tensor, first: Tensor, last: Tensor, words: Tensor, at: Tensor, *,
             origin: int, most: int) -> None:  # fmt: skip
        """Add keys and values of positions [first, last) to sums, as `Folded` reads them. Nothing is read by the host.

        tables: [requests, max_blocks] int32   request, first, last: [n] int32, the first a row of the tables
        at: [n] int32, the words at which sums begin, no two the same; where it is negative, nothing is added
        origin: where `first` is at most that, the sums begin anew   most: at least the largest last - first, for back ends that
        have no graphs: when captured calls are replayed, there may be more

        Positions of a block are added up by themselves, and blocks then in an order that `first` and `last` alone decide: a
        row's bits depend on no other row.
        """
        ...

    def score(self, q: Tensor, kv: PagedKV, plan: Plan, *, scale: float, out: Tensor, active: Tensor | None = None) -> Tensor:
        """The products alone, without reading V. out: [rows, q_heads, width] fp32, laid out as `attend`'s logits.

        active: [rows] int32; rows of which it is negative are left out. No two rows of the plan are of one request then.
        """
        ...

    def pool(
        self,
        logits: Tensor,
        first: Tensor,
        last: Tensor,
        groups: int,
        *,
        how: PoolHow,
        window: int,
        out: Tensor,
        active: Tensor | None = None,
    ) -> Tensor:
        """From raw logits to one ranking per group of query heads, for `select`.

        logits: [rows, q_heads, width] fp32   first, last: [rows] int32, the candidate columns [first, last) of each row
        out: [rows, groups, width'] fp32, width' >= the largest last - first

        Per query head a softmax over its candidates alone; the q_heads / groups consecutive heads of a group are combined by
        `how`; then, if window > 1 (odd), the maximum over a centred window of that many columns, cut off at the candidates'
        ends. out[r, g, j] is column first + j; what lies past last - first is left as it was, so a row without candidates
        writes nothing; nor does one of which active [rows] int32, if given, is negative. A head whose candidates are all -inf
        contributes 0.
        """
        ...

    def select(
        self,
        scores: Tensor,
        lengths: Tensor,
        k: int,
        *,
        offset: Tensor | None = None,
        out: tuple[Tensor, Tensor | None] | None = None,
        at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Deterministic top-k of every row of scores: [rows, width] or [rows, heads, width] fp32, of which the first
        lengths: [rows] int32 columns count.

        Ties go to the lower column. Returns columns: [rows, k] or [rows, heads, k] int32, ascending, padded with -1, and
        counts: [rows] or [rows, heads] int32, min(k, length); new tensors, or those of `out`: columns of any strides whose
        last is 1, counts contiguous, or None if nobody wants them. offset: [rows] int32, added to each column of the row that
        is not padding. at: [rows] int32: `out` is where a row with at = 0 goes, [k] or [heads, k]; others go so many elements
        further on, and a row whose at is negative is left out.
        """
        ...

    def renew(
        self,
        q: Tensor,
        words: Tensor,
        at: Tensor,
        stop: Tensor,
        due: Tensor,
        how: Renewal,
        angles: tuple[Tensor, Tensor] | None,
        active: Tensor,
        start: Tensor,
        lengths: Tensor,
        counts: Tensor,
    ) -> None:
        """Decide which rows make their list of a layer anew, and keep what later steps decide by. Nothing is read by the host.

        q: [rows, q_heads, head_dim]   words: [total] int32, the state of all requests
        at: [rows] int32, where each row's begins   stop: [rows] int32, tokens known
        due: [rows] int32: 1 renews, 2 renews if the queries differ, 0 if it must
        angles: cos, sin [rows, rotary/2] fp32 of the rows' positions, from which queries are turned back to 0 before they are
        compared; None to compare them as they are

        A row renews if it is due, has no list with a tail below stop (drafts may have been taken back), or one that is too
        old, or if its query's cosine with the one that the list was made for is below the threshold. Then its tail is
        stop - recent, and its query is kept. Written: active: [rows] int32, `at` of rows that renew and -1 of all others;
        start: [rows] and lengths: [rows, lists] int32, what is seen in this layer; counts: [3] int64, to which are added rows
        that renew, those of them that had a list, and rows that do not. A row whose `at` is negative sees nothing, start and
        lengths 0, and counts for nothing.
        """
        ...

    def rotate(self, k: Tensor, delta: Tensor, inv_freq: Tensor, out: Tensor) -> Tensor:
        """Shift rotary positions: each row turned by delta positions (half-split pairs i, i + rotary/2), in fp32, rounded once.

        The angle delta * inv_freq is computed and reduced in fp64: a long shift keeps its phase.
        k, out: [rows, heads, head_dim]; delta: [rows] int32 (may be negative); inv_freq: [rotary/2] fp32, the model's
        effective inverse frequencies, rotary <= head_dim (the rest passes through).
        """
        ...

    # Sampling ---------------------------------------------------------------------------------------------------

    def sample(self, logits: Tensor, how: Tensor, out: Tensor, allowed: Allowed | None = None) -> Tensor:
        """A token for every row. logits: [rows, vocab] fp32; out: [rows] int64; allowed: what rows may draw, without it any.

        how: [rows, 5] fp64: temperature, 0 for the likeliest token; top_k, 0 for all; top_p; min_p; and a number in [0, 1).
        In the order of a row's tokens, likeliest first and ties by id, those stay whose weight exp((x - max) / temperature) is
        at least min_p, then the first top_k, then the first whose weights together reach top_p of those: the token is the one
        over whose share of their weight the number lies. -1 for a row with NaN or inf, or nothing but -inf. A token that is not
        allowed is as one of -inf, whatever its logit.
        """
        ...

    # Layer ------------------------------------------------------------------------------------------------------

    def add_rms_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> Tensor:
        """x += delta (if given, x in place), then out = x / sqrt(mean(x^2) + eps) * weight, in fp32, rounded once.

        x, delta, out: [rows, hidden]; weight: [hidden] in the dtype of x. The residual stream x may be fp32 while delta and
        out have the model's dtype.
        """
        ...

    def rotate_store(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        kv: PagedKV,
        slots: Tensor,
        q: Tensor,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """Split a fused projection, normalise (QK norm) and rotate q and k, store k and v, and write q.

        qkv: [rows, (q_heads + 2 kv_heads) * head_dim], of any row stride   q: [rows, q_heads, head_dim] (written, returned)
        A row with slot -1 gets its q alone.
        cos, sin: [max_positions, rotary/2] fp32 (any YaRN temperature already multiplied in)   positions, slots: [rows] int64
        q_norm, k_norm: [head_dim] RMS-norm weights, or None
        """
        ...

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> Tensor:
        """out = silu(gate) * up. gate_up: [rows, 2 * intermediate], gate first; out: [rows, intermediate]."""
        ...
