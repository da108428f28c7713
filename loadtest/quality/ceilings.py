"""Bytes that a decode step has to read, by formula, beside those that were counted, and the speed-up that they allow.

    kvloom eval ceilings [MODEL] --json results/methods.json [--markdown FILE]

Reads rows that `kvloom eval methods` wrote; nothing is timed here. Per request and step, with N positions, L layers, H query
heads, B positions that a row attends to (budget, and tokens since a list was made), E that are read anyway (sinks and recent
ones), kappa the bytes of K and V of a position in a layer, and m the share of layers that make a list in a step:

    dense          L N kappa
    sink_window    L B kappa
    tidal_decode   F N kappa + S N kappa / 2 + (L - F) B kappa           F layers see everything, S only score it and choose
    token_select   L (m (N - E) kappa / 2 + B kappa)
    recycled       the same

Making a list also moves scores through work space, 3 H N fp32 numbers each (token_select 2 H N + 2 N). They may stay in a
cache, so ceilings are given without and with them. In token_select and recycled m depends on the text and is solved from the
counted bytes: there formula and counters agree by construction, and a test holds them to each other with the methods' own count
of lists. For the others nothing is fitted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvloom import kernels
from kvloom.engine import LLM
from kvloom.engine.errors import ConfigError
from kvloom.engine.selection import METHODS, Geometry
from kvloom.engine.selection.base import read_options
from kvloom.loadtest.quality.spec import DENSE, METHOD_COLUMNS
from kvloom.loadtest.study.flags import add_outputs, parser
from kvloom.loadtest.study.results import Column, Results, Row

SCORE = 4
"""Bytes of a score: fp32."""
ITEM = {"bf16": 2, "fp16": 2, "fp32": 4}
COLUMNS = (
    *METHOD_COLUMNS,
    Column("lists made", "made", ".1%"),
    Column("MB counted", "counted", ".1f", 1e-6),
    Column("MB by formula", "formula", ".1f", 1e-6),
    Column("scores MB", "scores", ".1f", 1e-6),
    Column("ceiling", "ceiling", ".2f"),
    Column("with scores", "ceiling_scores", ".2f"),
    Column("measured", "attention_up", ".2f"),
    Column("of ceiling", "reached", ".0%"),
    Column("GB/s", "rate", ".1f", 1e-9),
    Column("ms beyond bytes", "beyond_ms", "+.1f"),
)


class Shape(NamedTuple):
    """What bytes depend on in a model."""

    layers: int
    q_heads: int
    kappa: int
    """Bytes of K and V of a position in a layer."""

    @classmethod
    def of(cls, geometry: Geometry, item: int) -> Shape:
        return cls(geometry.layers, geometry.q_heads, 2 * geometry.kv_heads * geometry.head_dim * item)


class Work(NamedTuple):
    """One decode row, on average over what is asked about."""

    n: float
    """Positions there are."""
    attended: float
    """Positions it attends to, mean over layers and KV heads."""
    made: float = 0.0
    """Share of layers that make a list."""


class Reads(NamedTuple):
    """Bytes of one decode row."""

    kv: float
    scores: float = 0.0


def dense(selector: Any, shape: Shape, work: Work) -> Reads:
    return Reads(shape.layers * work.n * shape.kappa)


def sink_window(selector: Any, shape: Shape, work: Work) -> Reads:
    return Reads(shape.layers * work.attended * shape.kappa)


def tidal_decode(selector: Any, shape: Shape, work: Work) -> Reads:
    """selector: `TidalDecode`, whose roles of layers say everything; `work.attended` is that of a list."""
    full, score = (sum(role in kinds for role in selector.roles) for kinds in (("dense", "select"), ("choose",)))
    lists = score + selector.roles.count("select")
    positions = full * work.n + score * work.n / 2 + (shape.layers - full) * work.attended
    return Reads(positions * shape.kappa, lists * 3 * shape.q_heads * work.n * SCORE)


def token_select(selector: Any, shape: Shape, work: Work) -> Reads:
    """selector: `TokenSelect`."""
    scores = shape.layers * work.made * (2 * shape.q_heads + 2) * work.n * SCORE
    return Reads(_scored(shape, work, outside(selector)), scores)


def recycled(selector: Any, shape: Shape, work: Work) -> Reads:
    """selector: `Recycled` that refreshes by scores. Dense refreshes score on the way: `work.attended` holds all they read."""
    by_score = selector.options.refresh == "score"
    kv = _scored(shape, work, outside(selector)) if by_score else shape.layers * work.attended * shape.kappa
    return Reads(kv, shape.layers * work.made * 3 * shape.q_heads * work.n * SCORE)


def _scored(shape: Shape, work: Work, outside: int) -> float:
    return shape.layers * shape.kappa * (work.made * (work.n - outside) / 2 + work.attended)


def outside(selector: Any) -> int:
    """Positions that are read without being scored: sinks and recent ones."""
    return int(selector.budget - (selector.split.chosen if hasattr(selector, "split") else selector.chosen))


def made(selector: Any, shape: Shape, work: Work, counted: float) -> float:
    """The share of layers that must have made a list for a row to read `counted` bytes: `_scored`, solved for it."""
    return 2 * (counted / shape.layers / shape.kappa - work.attended) / (work.n - outside(selector))


FORMULAS: dict[str, Callable[[Any, Shape, Work], Reads]] = {
    DENSE: dense,
    "sink_window": sink_window,
    "tidal_decode": tidal_decode,
    "token_select": token_select,
    "recycled": recycled,
}
FITTED = ("token_select", "recycled")
"""Methods whose lists are made where the text asks for it."""


def requests(row: Row) -> int:
    """How many ran in the timed steps: a batch has no more than there were texts."""
    return int(min(row["batch"], row["windows"]))


def ceiling(row: Row, geometry: Geometry) -> Row:
    """A row of the table from one of `kvloom eval methods`. Raises ConfigError if there is no formula for it."""
    name, budget = row["method"], row["budget"]
    if name not in FORMULAS or row["options"].get("refresh") == "dense":
        raise ConfigError(f"{name} {row['options']} has no formula here; there are some for {', '.join(FORMULAS)}")
    selector = None
    if name != DENSE:
        method = METHODS[name]
        selector = method.make(read_options(method, row["options"]), budget, geometry, kernels.load("reference"))  # never run
    shape, count = Shape.of(geometry, ITEM[row["dtype"]]), requests(row)
    work = Work(n := row["bytes_read_dense"] / count / shape.layers / shape.kappa, n if budget is None else budget)
    if name in FITTED:
        work = work._replace(attended=row["attended_share"] * n)
        work = work._replace(made=made(selector, shape, work, row["bytes_read"] / count))
    read = FORMULAS[name](selector, shape, work)
    everything = dense(None, shape, work).kv
    rates = [row[f"bytes_read{kind}"] / row[f"attention_ms{kind}"] * 1e3 for kind in ("", "_dense")]
    roof = everything / read.kv
    return {
        "method": name, "budget": budget, "options": row["options"], "made": work.made if name in FITTED else None,
        "counted": row["bytes_read"], "formula": read.kv * count, "scores": read.scores * count or None,
        "ceiling": roof, "ceiling_scores": everything / sum(read), "attention_up": row["attention_up"],
        "reached": row["attention_up"] / roof, "rate": rates[0],
        "beyond_ms": row["attention_ms"] - row["bytes_read"] / rates[1] * 1e3,
    }  # fmt: skip


def read_rows(file: Path) -> list[Row]:
    """What `kvloom eval methods` wrote. Raises ConfigError if the file holds no such rows."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        if rows and all("bytes_read_dense" in row for row in rows):
            return list(rows)
    except (OSError, ValueError, TypeError):
        pass
    raise ConfigError(f"--json {file} holds no rows of kvloom eval methods; run that first, with --json {file}")


def main(argv: Sequence[str] | None = None) -> int:
    """Print and write; returns the exit code."""
    made = parser("eval ceilings", __doc__)
    made.add_argument("model", nargs="?", default="smollm2", help="that was measured (default: %(default)s)")
    made.add_argument("--json", type=Path, required=True, help="rows of kvloom eval methods")
    add_outputs(made, rows="")
    args = made.parse_args(argv)
    rows = read_rows(args.json)
    geometry = LLM(args.model, dtype=rows[0]["dtype"], device="cpu", kv_memory="1GiB").core.runner.geometry
    first = rows[0]
    note = (
        f"{first['model']}, {first['dtype']}, {requests(first)} requests of {first['context']} tokens: bytes of a step of "
        "all. Ceiling: bytes of dense over those of the formula. Measured: attention time of dense steps over the method's. "
        f"Beyond bytes: its attention time less that of its bytes at dense's rate. Measured {first['machine']}."
    )
    found = [ceiling(row, geometry) for row in rows]
    return Results(COLUMNS, (), "", None, args.markdown, args.publish, note, found).conclude()
