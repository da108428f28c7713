"""Which library of this back end is loaded: one that came with the package, or one built on the machine that runs it.

Owns the choice ($KVLOOM_NATIVE) and the cache of built libraries. Promises that a library is only chosen if this processor can
run it; that one found in the cache was made from these sources, with these flags, on this kind of processor; and that two
processes may build at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kvloom.kernels.trust import code_folder, foreign

from .compiler import COMMON_FLAGS, SOURCES, NativeUnavailable, Progress, compile_library, find_compiler, spelled, version
from .paths import GENERIC, WIDE, Paths
from .variants import BF16_DOT, VARIANTS, missing, paths_of_native, processor_flags, runnable

PREBUILT = Path(__file__).parent / "prebuilt"
"""Where a wheel has its libraries, one for each variant; a checkout has none."""
VARIABLE, AUTO, NATIVE = "KVLOOM_NATIVE", "auto", "native"
"""The setting, and those of its values that name no variant."""


class Built(NamedTuple):
    """A library to load."""

    path: Path
    variant: str
    """A name of VARIANTS; "native", made for this very processor; or "generic"."""
    paths: Paths = GENERIC
    """Those it takes."""

    def __str__(self) -> str:
        made = "ready-made" if self.path.parent == PREBUILT else "built here"
        return f"{made} for this processor" if self.variant == NATIVE else f"{self.variant}, {made}"


def build(*, generic: bool = False, progress: Progress | None = None) -> Built:
    """The shared library for this machine: the best that came with the package and that this processor can run; where there
    is none, one for this very processor, built if the cache has none.

    $KVLOOM_NATIVE names another: "native" is always built here, and a variant that did not come with the package is built
    too. generic: no processor-specific code at all, as on a machine without vector extensions; for tests.
    Raises NativeUnavailable when nothing that came fits and there is neither a compiler nor a library built earlier, or when
    the compiler fails; ValueError if that, or another processor, stands in the way of what $KVLOOM_NATIVE names.
    """
    wanted = AUTO if generic else os.environ.get(VARIABLE) or AUTO
    if wanted == AUTO:
        ready = () if generic else (one for one in runnable(processor_flags()) if (PREBUILT / one.file).is_file())
        if found := next(iter(ready), None):
            return Built(PREBUILT / found.file, found.name, found.paths)
        return _for_this_machine(generic, progress)
    try:
        if wanted == NATIVE:
            return _for_this_machine(False, progress)
        return _named(wanted, progress)
    except NativeUnavailable as error:
        raise ValueError(f"{VARIABLE} is {wanted!r}, which cannot be had here: {error}") from error


def _for_this_machine(generic: bool, progress: Progress | None) -> Built:
    if generic:
        return Built(_from_source("-DKVLOOM_GENERIC", progress=progress), "generic")
    paths = paths_of_native(processor_flags())
    tuned = ["-march=native" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "-mcpu=native"]
    if paths.attention != WIDE:
        tuned.append(BF16_DOT)
    return Built(_from_source(*tuned, progress=progress), NATIVE, paths)


def _named(name: str, progress: Progress | None) -> Built:
    flags = processor_flags()
    variant = next((one for one in VARIANTS if one.name == name), None)
    if variant is None or (lacks := missing(variant, flags)):
        why = "no such variant" if variant is None else f"this machine lacks {lacks}"
        allowed = (AUTO, NATIVE, *(one.name for one in runnable(flags)))
        raise ValueError(f"{VARIABLE} is {name!r}: {why}; allowed here: {', '.join(allowed)}")
    path = PREBUILT / variant.file
    return Built(path if path.is_file() else _from_source(*variant.flags, progress=progress), variant.name, variant.paths)


def _from_source(*tuned: str, progress: Progress | None) -> Path:
    flags = [*COMMON_FLAGS, *tuned]
    wanted = _digest(_sources_bytes(), " ".join(flags).encode(), _processor().encode())
    folder = cache_folder()
    compiler = find_compiler()
    if compiler is None:
        return _built_earlier(folder, wanted)
    target = folder / f"kvloom-{wanted}-{_digest(version(compiler).encode())}.so"
    if not _usable(target):
        with _locked(folder):
            if not _usable(target):  # another process may have built it while this one waited
                compile_library(compiler, spelled(flags, compiler), target, progress)
    return target


def cache_folder() -> Path:
    """Where built libraries are kept: KVLOOM_CACHE, or the user's cache folder of kvloom; never where others may write."""
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(os.environ.get("KVLOOM_CACHE") or f"{users}/kvloom").expanduser() / "native"
    try:
        return code_folder(folder)
    except OSError as error:
        raise NativeUnavailable(f"cannot create {folder}: {error}; set KVLOOM_CACHE to a writable folder") from error


def _processor() -> str:
    """What -march=native depends on, so that a cache folder shared between machines stays right."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor() or platform.machine()


def _sources_bytes() -> bytes:
    return b"".join(path.name.encode() + path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.is_file())


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _usable(library: Path) -> bool:
    """Whether it is there, and nobody else can have written it: otherwise it is built anew in its place."""
    return library.is_file() and foreign(library) is None


def _built_earlier(folder: Path, wanted: str) -> Path:
    found = sorted(filter(_usable, folder.glob(f"kvloom-{wanted}-*.so")))
    if not found:
        raise NativeUnavailable(
            "no C++ compiler found (looked for CXX, g++, clang++, c++, ziglang); for several times the speed install one: "
            "pip install ziglang, or your system's g++"
        )
    return found[-1]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError as error:
        raise NativeUnavailable("the native back end needs a POSIX system") from error
    with open(folder / "build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, also when the process dies
        yield
