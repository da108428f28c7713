"""Which processors a ready-made library is for, and which of them this one is.

Owns the table of variants that a wheel holds, and what each needs of a processor. Promises that `missing` names every
instruction set that a variant's flags let a compiler use: a library is only loaded where it names none. Imports nothing of
the package, so that wheels are built without torch.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

_V2 = {"cx16", "lahf_lm", "popcnt", "pni", "ssse3", "sse4_1", "sse4_2"}
_V3 = _V2 | {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_V4_FLAGS = ("-march=x86-64-v4", "-mavx512vnni")
BF16_DOT = "-DKVLOOM_BF16_DOT"
"""Have attention multiply bf16 pairs as they are (csrc/pairs.h)."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One library of a wheel."""

    name: str
    machine: str
    """As `platform.machine()` has it."""
    needs: frozenset[str]
    """Of the processor, in the words of /proc/cpuinfo, its maker's name among them."""
    flags: tuple[str, ...]
    """What tells gcc and clang so."""

    @property
    def file(self) -> str:
        """Its library's name."""
        return f"kvloom-{self.name}.so"


FAST_DOT = Variant(
    "x86-64-v4-bf16",
    "x86_64",
    frozenset(_V4 | {"avx512_vnni", "avx512_bf16", "AuthenticAMD"}),
    (*_V4_FLAGS, "-mavx512bf16", BF16_DOT),
)
"""Where bf16 dot products start as often as fp32 multiply-adds: on AMD twice a cycle (measured on Zen 5), which doubles what
attention computes; on Intel (Emerald Rapids) every other cycle, which gains nothing. Told by the maker's name, not by a
timing, so that a machine computes the same bits at every start."""

VARIANTS = (
    FAST_DOT,
    Variant("x86-64-v4-vnni", "x86_64", frozenset(_V4 | {"avx512_vnni"}), _V4_FLAGS),
    Variant("x86-64-v3", "x86_64", frozenset(_V3), ("-march=x86-64-v3",)),
    Variant("aarch64", "aarch64", frozenset({"fp", "asimd"}), ()),
)
"""The best of each machine first. A processor with AVX-512 and no VNNI runs x86-64-v3."""

_LINES = (("flags\t", "flags ", "Features"), ("vendor_id",))


def processor_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What every core of this machine can do and the system lets it, and who made it, in the words of /proc/cpuinfo; empty
    where that cannot be read."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    cores, makers = (
        [frozenset(line.partition(":")[2].split()) for line in lines if line.startswith(names)] for names in _LINES
    )
    return frozenset.intersection(*cores).union(*makers) if cores else frozenset()


def missing(variant: Variant, flags: frozenset[str], machine: str = "") -> str:
    """What this machine lacks to run a variant, as "avx512_vnni, avx512f"; empty if nothing.

    flags: of `processor_flags`; machine: of `platform.machine()` unless given.
    """
    machine = machine or platform.machine()
    if machine != variant.machine:
        return f"a processor of the kind {variant.machine} (this one is {machine})"
    return ", ".join(sorted(variant.needs - flags))
