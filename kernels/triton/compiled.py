"""Every kernel compiled ahead of time: a table of what calls of one model launch, and a sweep over all kinds of attention.

    python -m kvloom.kernels.triton.compiled            what CALLS launch, for sm_80 and sm_90, as Markdown
    python -m kvloom.kernels.triton.compiled --sweep    what attention launches, for all GEOMETRIES, or for those of the kinds
                                                        that are named behind it: decode,lists

Exits with 1 if a kernel spills registers or wants more shared memory than a program may have.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch

from kvloom.kernels.triton.ahead import PER_SM, SHARED, Built, build, recorded
from kvloom.kernels.triton.calls import CALLS, KINDS, Kind, attend

ARCHES, ROWS = tuple(PER_SM), 64
HEAD = ["call", "kernel", "warps", "registers", "spilled", "shared memory", "occupancy", "16-byte loads", "tensor cores"]
SWEEP_HEAD = ["attention", "kernels compiled", "registers", "spilled", "shared memory", "occupancy"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Geometry(NamedTuple):
    """A kind of attention over heads of `dim` with `group` query heads to a KV head."""

    kind: Kind
    dtype: str
    dim: int
    group: int


GEOMETRIES = tuple(itertools.starmap(Geometry, itertools.product(KINDS, DTYPES, (64, 80, 96, 128, 256), (1, 2, 3, 4, 7, 8))))


def every() -> list[Built]:
    """What all calls launch."""
    built = []
    for name, call in CALLS.items():
        with recorded() as launches:
            call(ROWS)
        built += [build(name, launch, arch) for launch in launches for arch in ARCHES]
    return built


def sweep(geometries: Sequence[Geometry] = GEOMETRIES) -> list[Built]:
    """What attention of each geometry launches, compiled by as many processes as there are cores."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return [one for built in pool.map(_attention, geometries) for one in built]


def _attention(geometry: Geometry) -> list[Built]:
    kind, dtype, dim, group = geometry
    with recorded() as launches:
        attend(ROWS, kind, DTYPES[dtype], dim, group)
    name = f"{kind}, {dtype}: heads of {dim}, {group} to a KV head"
    return [build(name, launch, arch)._replace(ptx="") for launch in launches for arch in ARCHES]


def problems(built: Iterable[Built]) -> Iterator[str]:
    """What no kernel may do."""
    for one in built:
        name = f"{one.call}: {one.kernel} for sm_{one.arch}"
        if one.spilled:
            yield f"{name} spills {one.spilled} bytes"
        if one.shared > SHARED:
            yield f"{name} wants {one.shared} bytes of shared memory; {SHARED} are allowed"


def cells(built: Iterable[Built]) -> list[list[str]]:
    """A row for each kernel of a call, under HEAD; what differs between architectures one behind the other."""
    rows = []
    for (call, kernel), ones in itertools.groupby(built, key=lambda one: (one.call, one.kernel)):
        each = zip(*((one.warps, one.registers, one.spilled, one.shared, f"{one.occupancy:.0%}",
                      "yes" if one.wide_loads else "", one.tensor_cores) for one in ones))  # fmt: skip
        rows.append([call, f"`{kernel}`", *(" / ".join(dict.fromkeys(map(str, cell))) for cell in each)])
    return rows


def sweep_cells(built: Iterable[Built]) -> list[list[str]]:
    """A row for each kind and dtype, under SWEEP_HEAD: the most of registers and bytes, the least occupancy."""
    rows = []
    for name, ones in itertools.groupby(built, key=lambda one: one.call.partition(":")[0]):
        group = list(ones)

        def both(of: Callable[[list[Built]], str], group: list[Built] = group) -> str:
            return " / ".join(dict.fromkeys(of([one for one in group if one.arch == arch]) for arch in ARCHES))

        rows.append([
            name, str(len(group)), both(lambda some: str(max(one.registers for one in some))),
            str(sum(one.spilled > 0 for one in group)), both(lambda some: str(max(one.shared for one in some))),
            both(lambda some: f"{min(one.occupancy for one in some):.0%}"),
        ])  # fmt: skip
    return rows


def main(arguments: Sequence[str]) -> int:
    """Print a table and what is wrong with it; returns the exit code."""
    swept = "--sweep" in arguments
    kinds = arguments[1].split(",") if swept and len(arguments) > 1 else KINDS
    if unknown := set(kinds) - set(KINDS):
        print(f"unknown: {', '.join(sorted(unknown))}; allowed behind --sweep: {', '.join(KINDS)}", file=sys.stderr)
        return 2
    built = sweep([one for one in GEOMETRIES if one.kind in kinds]) if swept else every()
    head, rows = (SWEEP_HEAD, sweep_cells(built)) if swept else (HEAD, cells(built))
    print("\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)))
    found = list(problems(built))
    print("\n".join(found), file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
