"""`kvloom bench paths`: whether the loops that the native kernels take on this machine are the quickest.

    linear layers   milliseconds of a product by rows, with each loop that a library has, weights from memory
    the table       the loop that these rows take (`kernels/cpu/native/paths.py`), and its time over the quickest's
    attention       the same calls over bf16 KV with every library that this processor can run: the best must come first

Results never depend on it: nothing is chosen by a timing, and this command changes nothing. It ends with 1 if what the table
takes needs more than `--allowed` times as long as the quickest.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Sequence

import torch

from kvloom.engine.errors import ConfigError
from kvloom.kernels.cpu.native import NativeKernels, load
from kvloom.kernels.cpu.native.linear import QuantLinear, pack
from kvloom.kernels.cpu.native.paths import NEVER, ONE_PANEL, STORED, TILES, UNPACKED
from kvloom.kernels.cpu.native.variants import processor_flags, runnable
from kvloom.kernels.quantized import KINDS, PackedWeight, StoredWeight
from kvloom.loadtest.bench import kernel_calls
from kvloom.loadtest.bench.builds import named
from kvloom.loadtest.bench.roofline import SHAPES, Size
from kvloom.loadtest.figures import publish
from kvloom.loadtest.study.flags import FAILED, add_publish, count, listed, parser
from kvloom.loadtest.study.results import Column, Row, cells, console, console_table

OUTPUTS = INPUTS = 4096
IN_MEMORY = 256 << 20
"""Bytes of weights that take turns, more than the caches that two cores are given."""
ORDINARY = 0x1C
"""Every byte of a weight: a code like others, and as fp16 0.004. Products take the same time whatever they multiply."""
CALLS = {
    "attention, 8 x 4,096": (kernel_calls.decode, Size(8, 4096)),
    "attention, 256 at 4,096": (kernel_calls.chunk, Size(256, 4096)),
}


def weights(kernels: NativeKernels, kind: str) -> list[PackedWeight]:
    """Of one shape, together larger than the caches."""
    blocks = torch.full((OUTPUTS, KINDS[kind].row_bytes(INPUTS)), ORDINARY, dtype=torch.uint8)
    packed = pack(kernels, StoredWeight(kind, blocks, (OUTPUTS, INPUTS)))
    many = math.ceil(IN_MEMORY / packed.data.numel())
    return [packed._replace(data=packed.data.clone()) for _ in range(many)]


def loops(kernels: NativeKernels) -> list[str]:
    """Those that a library has."""
    paths = kernels.library.paths
    return [*([ONE_PANEL] if paths.one_panel else []), STORED, UNPACKED, *([TILES] if paths.tiles != NEVER else [])]


def layers(kernels: NativeKernels, packed: Sequence[PackedWeight], loop: str) -> list[QuantLinear]:
    """That take one loop."""
    own = kernels.library.paths
    kernels.library.paths = own.only(loop)
    try:
        return [QuantLinear(kernels, one) for one in packed]
    finally:
        kernels.library.paths = own


def linears(kernels: NativeKernels, kind: str, all_rows: Sequence[int], rounds: int) -> Iterator[Row]:
    """A row for each number of rows: seconds of a product with each loop, in turns, medians."""
    packed = weights(kernels, kind)
    for rows in all_rows:
        x, out = torch.ones(rows, INPUTS, dtype=torch.bfloat16), torch.empty(rows, OUTPUTS, dtype=torch.bfloat16)
        runs = {loop: layers(kernels, packed, loop) for loop in loops(kernels)}
        spent: dict[str, list[float]] = {loop: [] for loop in runs}
        for _ in range(rounds):
            for loop, each in runs.items():
                began = time.perf_counter()
                for layer in each:
                    layer(x, out)
                spent[loop].append((time.perf_counter() - began) / len(each))
        found = {loop: statistics.median(took) for loop, took in spent.items()}
        taken = kernels.library.paths.loop(rows, kind)
        yield {"what": kind, "rows": rows, "taken": taken, "over": found[taken] / min(found.values()), **found}


def attention(each: dict[str, NativeKernels], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each call with each library, in turns: medians."""
    make, shape, told = kernel_calls.on_device(torch.device("cpu"), torch.bfloat16), SHAPES["llama-3-8b"], {}
    for name, (prepare, size) in CALLS.items():
        prepared, spent = prepare(make, shape, size), {library: list[float]() for library in each}
        runs = {library: prepared(kernels) for library, kernels in each.items()}
        for _ in range(1 + 4 * rounds):  # short calls; the first of each finds nothing where it is to be
            for library, run in runs.items():
                assert run is not None
                began = time.perf_counter()
                run()
                spent[library].append(time.perf_counter() - began)
        told[name] = {library: statistics.median(times[1:]) for library, times in spent.items()}
    return told


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    made: argparse.ArgumentParser = parser("bench paths", __doc__)
    made.add_argument("--kinds", default="Q4_K,Q6_K,Q8_0", help=f"of {', '.join(KINDS)} (default: %(default)s)")
    made.add_argument(
        "--rows", default="1,3,4,8,16,24,32,48,64,128", help="of a product, up to 4096 each (default: %(default)s)"
    )
    made.add_argument("--rounds", type=count, default=5, help="turns that every loop gets (default: %(default)s)")
    made.add_argument("--threads", type=count, help="as in kvloom serve")
    made.add_argument("--allowed", type=float, default=1.25, help="times the quickest that is allowed (default: %(default)s)")
    add_publish(made)
    args = made.parse_args(argv)
    kinds = listed("--kinds", args.kinds, str, KINDS.__contains__, ", ".join(KINDS))
    all_rows = listed("--rows", args.rows, int, lambda rows: 1 <= rows <= 4096, "1 to 4096")
    if not 1 <= args.allowed <= 10:
        raise ConfigError(f"--allowed is {args.allowed}; allowed: 1 to 10")
    each = {}
    for one in runnable(processor_flags()):
        with named(one.name):
            each[one.name] = load(args.threads)
    if not each:
        raise ConfigError("no variant of the native kernels is for this processor: it takes one loop for everything")
    rows: list[Row] = []
    measured = set[tuple[str, int]]()
    for name, kernels in each.items():
        paths = kernels.library.paths
        if paths.stored and (paths.products, paths.tiles) not in measured:  # of two with the same loops the better
            measured.add((paths.products, paths.tiles))
            rows += [{"library": name, **row} for kind in kinds for row in linears(kernels, kind, all_rows, args.rounds)]
    columns = [Column("library", "library"), Column("weights", "what"), Column("rows", "rows")]
    columns += [Column(f"{loop}, ms", loop, ".2f", 1e3) for loop in (ONE_PANEL, STORED, UNPACKED, TILES)]
    columns += [Column("the table takes", "taken"), Column("over the quickest", "over", ".2f")]
    table = cells(columns, rows)
    console.print(console_table(*table, "Loops of linear layers"))
    told, slow = attention(each, args.rounds), [row for row in rows if row["over"] > args.allowed]
    said = "; ".join(
        f"{call}: "
        + ", ".join(f"{name} ({each[name].library.paths.attention}) {1e3 * seconds:.2f} ms" for name, seconds in found.items())
        for call, found in told.items()
    )
    first = next(iter(each))
    late = [call for call, found in told.items() if found[first] > args.allowed * min(found.values())]
    note = f"{OUTPUTS} x {INPUTS}, medians of {args.rounds} rounds in turn. {said[0].upper()}{said[1:]}."
    console.print(note)
    for row in slow:
        console.print(f"not the quickest: {row['library']}, {row['what']}, {row['rows']} rows: {row['over']:.2f} times")
    for call in late:
        console.print(f"not the quickest: {first}, {call}")
    if args.publish:
        publish(args.publish, *table, note)
    return FAILED if slow or late else 0
