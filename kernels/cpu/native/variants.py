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


@dataclass(frozen=True, slots=True)
class Variant:
    """One library of a wheel."""

    name: str
    machine: str
    """As `platform.machine()` has it."""
    needs: frozenset[str]
    """Of the processor, in the words of /proc/cpuinfo."""
    flags: tuple[str, ...]
    """What tells gcc and clang so."""

    @property
    def file(self) -> str:
        """Its library's name."""
        return f"kvloom-{self.name}.so"


VARIANTS = (
    Variant("x86-64-v4-vnni", "x86_64", frozenset(_V4 | {"avx512_vnni"}), ("-march=x86-64-v4", "-mavx512vnni")),
    Variant("x86-64-v3", "x86_64", frozenset(_V3), ("-march=x86-64-v3",)),
    Variant("aarch64", "aarch64", frozenset({"fp", "asimd"}), ()),
)
"""The best of each machine first. A processor with AVX-512 and no VNNI runs x86-64-v3."""


def processor_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What every core of this machine can do and the system lets it, in the words of /proc/cpuinfo; empty where that cannot
    be read."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    cores = [frozenset(line.partition(":")[2].split()) for line in lines if line.startswith(("flags\t", "flags ", "Features"))]
    return frozenset.intersection(*cores) if cores else frozenset()


def missing(variant: Variant, flags: frozenset[str], machine: str = "") -> str:
    """What this machine lacks to run a variant, as "avx512_vnni, avx512f"; empty if nothing.

    flags: of `processor_flags`; machine: of `platform.machine()` unless given.
    """
    machine = machine or platform.machine()
    if machine != variant.machine:
        return f"a processor of the kind {variant.machine} (this one is {machine})"
    return ", ".join(sorted(variant.needs - flags))
