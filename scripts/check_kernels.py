"""Kernels built for other processors compute what this machine's compute: `python scripts/check_kernels.py`.

    generic    without any processor's instructions
    v3         AVX2 (x86-64-v3), without VNNI and bf16 products
    amx        linear layers of 16 rows and more, and attention over bf16, in AMX tiles, of which a model takes the place
               (csrc/amx_model.h); the latter where this machine has products of bf16 pairs
    aarch64    NEON, cross-compiled by the package ziglang, and run by qemu-user (qemu-aarch64)

The same calls with the same numbers (check_kernels.cpp) run in each build and in one for this very processor; results agree to
2e-3 of a call's largest number in bf16, to 1e-4 in fp32 and fp16's 1e-3. What compilers make of the library with AMX is
disassembled: tiles are configured before they are used, and released behind. Exits with 1 where any of that is not so, or where
nothing was compared; builds that this machine cannot run are named.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvloom.kernels.cpu.native.compiler import COMMON_FLAGS, SOURCES, find_compiler, spelled, zig
from kvloom.kernels.cpu.native.variants import BF16_DOT, TILE_FLAGS, VARIANTS
from kvloom.kernels.quantized import KINDS

DRIVER = Path(__file__).with_suffix(".cpp")
TOLERANCE = {0: 1e-4, 1: 2e-3, 2: 1e-3}
"""By element type (csrc/vec.h: DType), relative to the largest number."""
ROUNDED = {1: 2**-8, 2: 2**-11}
"""What one number may differ by besides: its last bit."""


def build(compiler: Sequence[str], flags: Sequence[str], target: Path) -> None:
    """The driver with all kernels in one program. Raises SystemExit with what the compiler says."""
    sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
    command = [*compiler, *COMMON_FLAGS, f"-I{SOURCES}", *flags, str(DRIVER), *sources, "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nfailed:\n{done.stderr[-2000:]}")


def results(command: Sequence[str]) -> list[tuple[str, int, np.ndarray]]:
    """Name, element type or format, and numbers of each call."""
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [(name, int(which), np.array(values, float)) for name, which, *values in map(str.split, told)]


def differences(wanted: list[tuple[str, int, np.ndarray]], found: list[tuple[str, int, np.ndarray]]) -> list[str]:
    """Calls that differ by more than they may, in words."""
    wrong = []
    for (name, which, one), (other_name, other_which, other) in zip(wanted, found, strict=True):
        kind = 0 if name in ("linear", "rows", "lse") else which
        allowed = TOLERANCE[kind] * np.abs(one).max() + ROUNDED.get(kind, 0.0) * np.abs(one)
        if (name, which) != (other_name, other_which) or not (np.abs(one - other) <= allowed).all():
            wrong.append(f"{name} {which}: {np.abs(one - other).max():.3g} of {np.abs(one).max():.3g}")
    return wrong


def tile_instructions(
    compiler: Sequence[str], source: str, folder: Path, common: Sequence[str] = COMMON_FLAGS
) -> list[list[str]]:
    """Instructions on tiles of each function that has any, in the order of the code, as "tdpbssd 6 4 0"."""
    flags = next(one.flags for one in VARIANTS if one.needs >= TILE_FLAGS)
    target = ["-target", "x86_64-linux-gnu"] if "ziglang" in compiler else []
    made = str(folder / f"{source}.o")
    command = [*compiler, *target, *spelled([*common, *flags], compiler), "-w"]
    subprocess.run([*command, "-c", str(SOURCES / source), "-o", made], check=True)
    told = subprocess.run(["objdump", "-d", "--no-show-raw-insn", made], check=True, capture_output=True, text=True)
    lines = [re.findall(r"\t((?:ldtilecfg|tile|tdp)\S*)(.*)", text) for text in told.stdout.split("\n\n")]
    return [[" ".join([name, *re.findall(r"%tmm(\d)", rest)]) for name, rest in found] for found in lines if found]


TILE_PRODUCTS = {"linear.cpp": "tdpbssd [67] [45] [0-3]", "attention.cpp": "tdpbf16ps (5 4|7 6) [0-3]"}
"""Of each source: weights or keys, activations or queries, sums (csrc/amx_linear.h, csrc/amx_pairs.h)."""


def wrong_instructions(source: str, functions: Sequence[Sequence[str]]) -> list[str]:
    """What is not as it has to be, in words."""
    all_names = {one.split()[0] for each in functions for one in each}
    products = [one for each in functions for one in each if one.startswith("tdp")]
    wrong = [f"{one}: other tiles" for one in products if not re.fullmatch(TILE_PRODUCTS[source], one)]
    needed = {"ldtilecfg", "tileloadd", "tilezero", TILE_PRODUCTS[source].split()[0], "tilestored", "tilerelease"}
    if lacking := needed - all_names:
        wrong.append(f"no {', '.join(sorted(lacking))}")
    if source != "linear.cpp":
        return wrong
    loops = [[one.split()[0] for one in each] for each in functions if "ldtilecfg" in each]
    if len(loops) != len(KINDS):
        wrong.append(f"{len(loops)} functions with tiles, for {len(KINDS)} kinds of weights")
    outside = [each for each in loops if (each.count("ldtilecfg"), each[0], each[-1]) != (1, "ldtilecfg", "tilerelease")]
    return [*wrong, *(f"tiles are not configured first, once, and released last: {each}" for each in outside)]


def disassemble(compilers: dict[str, Sequence[str]], folder: Path) -> bool:
    """Tell of the instructions on tiles; whether they are as they have to be."""
    right = True
    for name, compiler in compilers.items():
        for source in TILE_PRODUCTS:
            functions = tile_instructions(compiler, source, folder)
            told = Counter(one.split()[0] for each in functions for one in each)
            wrong = wrong_instructions(source, functions)
            counts = ", ".join(f"{told[one]} {one}" for one in sorted(told))
            print(f"amx, {source} by {name}: {counts}", *wrong, sep="\n  ", flush=True)
            right = right and not wrong
    return right


def main() -> int:
    """Build, run and compare; returns the exit code."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    compiler, cross, qemu = find_compiler(), zig(), shutil.which("qemu-aarch64")
    if compiler is None:
        raise SystemExit("no C++ compiler found")
    aarch64 = ["-target", "aarch64-linux-musl", "-static"]
    builds = [("generic", compiler, ["-DKVLOOM_GENERIC"], []), ("v3", compiler, ["-march=x86-64-v3"], []),
              ("amx", compiler, ["-march=native", "-DKVLOOM_AMX_MODEL", BF16_DOT], [])]  # fmt: skip
    if cross and qemu:
        builds.append(("aarch64", cross, aarch64, [qemu]))
    else:
        print("aarch64: left out; needs the package ziglang and qemu-user")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "own"
        build(compiler, ["-march=native"], own)
        wanted = results([str(own)])
        for name, with_, flags, run in builds:
            target = Path(folder) / name
            build(with_, flags, target)
            wrong = differences(wanted, results([*run, str(target)]))
            print(
                f"{name}: {len(wanted)} calls, {'all agree' if not wrong else 'these differ: ' + '; '.join(wrong)}", flush=True
            )
            failed = failed or bool(wrong)
        compilers = {one: found for one, found in ((Path(compiler[0]).name, compiler), ("zig", cross)) if found}
        if shutil.which("objdump"):
            failed = not disassemble(compilers, Path(folder)) or failed
        else:
            print("amx: not disassembled; needs objdump")
    return 1 if failed or not wanted else 0


if __name__ == "__main__":
    sys.exit(main())
