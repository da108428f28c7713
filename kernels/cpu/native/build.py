"""Builds the C++ library of this back end on the machine that runs it.

Owns the compiler call and the cache of built libraries. Promises that a library found in the cache was made from these
sources, with these flags, on this kind of processor, and that two processes may build at once. The library's threads are its
own (csrc/parallel.h): no OpenMP.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from kvloom.kernels.trust import code_folder, foreign

SOURCES = Path(__file__).parent / "csrc"
COMMON_FLAGS = ("-std=c++17", "-O3", "-pthread", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")


Progress = Callable[[str, int, int], None]
"""Called with (stage, files done, files in all) while the library is compiled."""


class NativeUnavailable(Exception):
    """The library cannot be had here; the message says why. Callers fall back to another back end."""


def build(*, generic: bool = False, progress: Progress | None = None) -> Path:
    """The shared library for this machine, built if the cache has none.

    generic: no processor-specific code at all, as on a machine without vector extensions; for tests.
    Raises NativeUnavailable when there is neither a compiler nor a library built earlier, or when the compiler fails.
    """
    flags = _flags(generic)
    wanted = _digest(_sources_bytes(), " ".join(flags).encode(), _processor().encode())
    folder = cache_folder()
    compiler = _compiler()
    if compiler is None:
        return _built_earlier(folder, wanted)
    target = folder / f"kvloom-{wanted}-{_digest(_version(compiler).encode())}.so"
    if not _usable(target):
        with _locked(folder):
            if not _usable(target):  # another process may have built it while this one waited
                _compile(compiler, flags, target, progress or (lambda stage, done, total: None))
    return target


def cache_folder() -> Path:
    """Where built libraries are kept: KVLOOM_CACHE, or the user's cache folder of kvloom; never where others may write."""
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(os.environ.get("KVLOOM_CACHE") or f"{users}/kvloom").expanduser() / "native"
    try:
        return code_folder(folder)
    except OSError as error:
        raise NativeUnavailable(f"cannot create {folder}: {error}; set KVLOOM_CACHE to a writable folder") from error


def _flags(generic: bool) -> list[str]:
    if generic:
        return [*COMMON_FLAGS, "-DKVLOOM_GENERIC"]
    tuned = "-march=native" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "-mcpu=native"
    return [*COMMON_FLAGS, tuned]


def _compiler() -> list[str] | None:
    """The command that compiles: what CXX names; or else what is installed, the clang of the package ziglang at last."""
    named = os.environ.get("CXX")
    candidates = [named] if named else ["g++", "clang++", "c++"]
    if found := next(filter(None, map(shutil.which, candidates)), None):
        return [found]
    if not named and importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "c++"]
    return None


def _version(compiler: list[str]) -> str:
    shown = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    if shown.returncode:
        raise NativeUnavailable(f"{' '.join(compiler)} --version failed: {shown.stderr.strip()}")
    return shown.stdout


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


def _compile(compiler: list[str], flags: list[str], target: Path, progress: Progress) -> None:
    """Compiles every source, links, and moves the library into place in one step."""
    stage = "compiling kernels, once on this machine"
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sorted(SOURCES.glob("*.cpp"))]
        jobs = [
            [*compiler, *flags, "-c", str(source), "-o", str(made)]
            for source, made in zip(sorted(SOURCES.glob("*.cpp")), objects)
        ]
        progress(stage, 0, len(jobs))
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for done, job in enumerate(as_completed([pool.submit(_run, job) for job in jobs]), 1):
                job.result()
                progress(stage, done, len(jobs))
        library = Path(scratch) / target.name
        _run([*compiler, "-shared", "-pthread", *map(str, objects), "-o", str(library)])
        library.chmod(0o755)
        os.replace(library, target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NativeUnavailable(f"{' '.join(command)}\nfailed:\n{done.stderr.strip()[-2000:]}")
