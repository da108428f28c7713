"""`kvloom bench builds`: what a ready-made library of the native kernels loses beside one made for this very processor.

    decode    milliseconds per step, one request and eight: medians of the rounds' medians
    prefill   milliseconds of one prompt

One engine per build, all in this process; they take turns, so that what else happens on the machine happens to all of them. In
a checkout, which has no ready-made libraries, they are compiled with the same flags by the compiler that is there. What the
libraries of a wheel lose is measured where that is installed.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from kvloom.engine import LLM
from kvloom.engine.errors import ConfigError
from kvloom.kernels.cpu.native.build import NATIVE, VARIABLE
from kvloom.kernels.cpu.native.variants import VARIANTS, missing, processor_flags
from kvloom.loadtest.bench.engine import decode_steps, prefill_seconds
from kvloom.loadtest.figures import publish
from kvloom.loadtest.study.flags import add_model, add_outputs, count, parser
from kvloom.loadtest.study.results import Column, Row, cells, console, console_table

DECODES = ((1, 512), (8, 4096))
PREFILL = 1024


def _decode(llm: LLM, batch: int, context: int) -> float:
    return statistics.median(decode_steps(llm, batch, context))


PARTS: dict[str, Callable[[LLM], float]] = {
    **{f"decode {batch} x {context}, ms": partial(_decode, batch=batch, context=context) for batch, context in DECODES},
    f"prefill {PREFILL}, ms": partial(prefill_seconds, length=PREFILL),
}


@contextmanager
def named(build: str) -> Iterator[None]:
    """Have the native kernels load that build meanwhile."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = build
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def builds() -> list[str]:
    """Those that this processor can run, the one made for it first."""
    flags = processor_flags()
    return [NATIVE, *(one.name for one in VARIANTS if not missing(one, flags))]


def measure(engines: dict[str, LLM], rounds: int) -> list[Row]:
    """A row for each build: medians, and how many times as long as the first one's they are."""
    spent: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in engines}
    for _ in range(rounds):
        for part, run in PARTS.items():
            for name, llm in engines.items():
                spent[name][part].append(run(llm))
    first, rows = next(iter(engines)), []
    for name, llm in engines.items():
        row: Row = {"build": llm.model.build}
        for part in PARTS:
            row[part] = statistics.median(spent[name][part])
            row[f"times {part}"] = statistics.median(a / b for a, b in zip(spent[name][part], spent[first][part]))
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    made: argparse.ArgumentParser = parser("bench builds", __doc__)
    add_model(made)
    made.add_argument("--rounds", type=count, default=5, help="turns that every build gets (default: %(default)s)")
    made.add_argument("--threads", type=count, help="as in kvloom serve")
    add_outputs(made)
    args = made.parse_args(argv)
    names, engines = builds(), {}
    if len(names) == 1:
        raise ConfigError("no ready-made library is for this processor: there is nothing to compare")
    for name in names:
        with named(name):
            engines[name] = LLM(args.model, device="cpu", backend="native", threads=args.threads, kv_memory="1GiB")
    rows = measure(engines, args.rounds)
    columns = [Column("build", "build")]
    for part in PARTS:
        columns += [Column(part, part, ".1f", 1e3), Column("times native", f"times {part}", ".2f")]
    table = cells(columns, rows)
    console.print(console_table(*table, "Builds of the native kernels"))
    if args.publish:
        publish(args.publish, *table, f"{engines[names[0]].model.name}, medians of {args.rounds} rounds in turn.")
    return 0
