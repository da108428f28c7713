"""Which processors a ready-made library is for, and which of them this one is.

Owns the table of variants that a wheel holds, what each needs of a processor, and which paths it takes. Promises that
`missing` names every instruction set that a variant's flags let a compiler use: a library is only loaded where it names none.
Imports nothing that needs torch, so that wheels are built without.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from .paths import GENERIC, PAIRS, TILED, Paths

_V2 = {"cx16", "lahf_lm", "popcnt", "pni", "ssse3", "sse4_1", "sse4_2"}
_V3 = _V2 | {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_V4_FLAGS = ("-march=x86-64-v4", "-mavx512vnni")
_VNNI = Paths("VNNI", one_panel=4, stored=48, stored_of=(("Q6_K", 20),))
BF16_DOT = "-DKVLOOM_BF16_DOT"
"""Have attention multiply bf16 pairs as they are (csrc/pairs.h), in tiles where there are some (csrc/amx_pairs.h)."""


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
    paths: Paths

    @property
    def file(self) -> str:
        """Its library's name."""
        return f"kvloom-{self.name}.so"


FAST_DOT = Variant(
    "x86-64-v4-bf16",
    "x86_64",
    frozenset(_V4 | {"avx512_vnni", "avx512_bf16", "AuthenticAMD"}),
    (*_V4_FLAGS, "-mavx512bf16", BF16_DOT),
    replace(_VNNI, attention=PAIRS),
)
"""Where bf16 dot products start as often as fp32 multiply-adds: on AMD twice a cycle (measured on Zen 5), which doubles what
attention computes; on Intel (Emerald Rapids) every other cycle, which gains nothing. Told by the maker's name, not by a
timing, so that a machine computes the same bits at every start."""

TILE_FLAGS = frozenset({"amx_tile", "amx_int8", "amx_bf16"})
"""AMX, in the words of /proc/cpuinfo."""

VARIANTS = (
    FAST_DOT,
    Variant(
        "x86-64-v4-amx",
        "x86_64",
        frozenset(_V4 | {"avx512_vnni", "avx512_bf16"} | TILE_FLAGS),
        (*_V4_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16", BF16_DOT),
        replace(_VNNI, tiles=16, attention=TILED),  # as estimated in csrc/amx_linear.h: no processor here has any
    ),
    Variant("x86-64-v4-vnni", "x86_64", frozenset(_V4 | {"avx512_vnni"}), _V4_FLAGS, _VNNI),
    Variant("x86-64-v3", "x86_64", frozenset(_V3), ("-march=x86-64-v3",), Paths("AVX2", stored=3, stored_of=(("Q8_0", 24),))),
    Variant("aarch64", "aarch64", frozenset({"fp", "asimd"}), (), GENERIC),
)
"""The best of each machine first. A processor with AVX-512 and no VNNI runs x86-64-v3."""

_LINES = (("flags\t", "flags ", "Features"), ("vendor_id",))


def processor_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What every core of this machine can do and the system lets this process do, and who made it, in the words of
    /proc/cpuinfo; empty where that cannot be read."""
    flags = _told(cpuinfo)
    return flags - TILE_FLAGS if flags >= TILE_FLAGS and tiles_refused() else flags


def tiles_note(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Why this process does not use the processor's AMX tiles, if it has some; or empty."""
    why = tiles_refused() if _told(cpuinfo) >= TILE_FLAGS else ""
    return f"AMX tiles not used: {why}" if why else ""


def _told(cpuinfo: Path) -> frozenset[str]:
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    cores, makers = (
        [frozenset(line.partition(":")[2].split()) for line in lines if line.startswith(names)] for names in _LINES
    )
    return frozenset.intersection(*cores).union(*makers) if cores else frozenset()


_ARCH_PRCTL, _REQUEST, _TILE_DATA = 158, 0x1023, 18
"""Of Linux on x86-64: the call's number, ARCH_REQ_XCOMP_PERM, and XFEATURE_XTILEDATA (Documentation/arch/x86/xstate.rst)."""


@functools.cache
def tiles_refused() -> str:
    """Asks the system, once, to let this process and its threads use AMX's tiles; why it does not, or empty if it does.

    Without that, the first instruction on a tile would end the process. Linux before 5.16 and sandboxes may refuse.
    """
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return "no Linux on x86-64"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(_ARCH_PRCTL), ctypes.c_long(_REQUEST), ctypes.c_long(_TILE_DATA)) == 0:
        return ""
    number = ctypes.get_errno()
    return f"arch_prctl says {errno.errorcode.get(number, str(number))}"


def missing(variant: Variant, flags: frozenset[str], machine: str = "") -> str:
    """What this machine lacks to run a variant, as "avx512_vnni, avx512f"; empty if nothing.

    flags: of `processor_flags`; machine: of `platform.machine()` unless given.
    """
    machine = machine or platform.machine()
    if machine != variant.machine:
        return f"a processor of the kind {variant.machine} (this one is {machine})"
    return ", ".join(sorted(variant.needs - flags))


def runnable(flags: frozenset[str]) -> Iterator[Variant]:
    """Variants that this machine can run, the best first."""
    return (one for one in VARIANTS if not missing(one, flags))


def paths_of_native(flags: frozenset[str]) -> Paths:
    """What a library takes that is made for this very processor: the same as the best variant's."""
    return next((one.paths for one in runnable(flags)), GENERIC)
