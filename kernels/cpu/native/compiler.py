"""The C++ compiler: which one there is, and the library that it makes of csrc/.

Imports nothing of the package, so that wheels are built without torch. The library's threads are its own (csrc/parallel.h):
no OpenMP.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
COMMON_FLAGS = ("-std=c++17", "-O3", "-pthread", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")

Progress = Callable[[str, int, int], None]
"""Called with (stage, files done, files in all) while the library is compiled."""


class NativeUnavailable(Exception):
    """The library cannot be had here; the message says why. Callers fall back to another back end."""


def find_compiler() -> list[str] | None:
    """The command that compiles: what CXX names; or else what is installed, the clang of the package ziglang at last."""
    named = os.environ.get("CXX")
    candidates = [named] if named else ["g++", "clang++", "c++"]
    if found := next(filter(None, map(shutil.which, candidates)), None):
        return [found]
    return None if named else zig()


def zig() -> list[str] | None:
    """The command of the package ziglang's clang, which compiles for other machines too; None if it is not installed."""
    return None if importlib.util.find_spec("ziglang") is None else [sys.executable, "-m", "ziglang", "c++"]


def spelled(flags: Sequence[str], compiler: Sequence[str]) -> list[str]:
    """Flags as this compiler spells them: to zig, x86-64-v3 is x86_64_v3."""
    if "ziglang" not in compiler:
        return list(flags)
    return [flag.replace("x86-64-v", "x86_64_v") for flag in flags]


def version(compiler: Sequence[str]) -> str:
    """What it says of itself. Raises NativeUnavailable."""
    shown = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    if shown.returncode:
        raise NativeUnavailable(f"{' '.join(compiler)} --version failed: {shown.stderr.strip()}")
    return shown.stdout


def compile_library(
    compiler: Sequence[str], flags: Sequence[str], target: Path, progress: Progress | None = None, link: Sequence[str] = ()
) -> None:
    """Compile every source, link, and move the library into place in one step.

    link: further flags for the linker. Raises NativeUnavailable with what the compiler says.
    """
    progress, stage = progress or (lambda stage, done, total: None), "compiling kernels, once on this machine"
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        sources = sorted(SOURCES.glob("*.cpp"))
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        jobs = [[*compiler, *flags, "-c", str(source), "-o", str(made)] for source, made in zip(sources, objects)]
        progress(stage, 0, len(jobs))
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for done, job in enumerate(as_completed([pool.submit(_run, job) for job in jobs]), 1):
                job.result()
                progress(stage, done, len(jobs))
        library = Path(scratch) / target.name
        _run([*compiler, *link, "-shared", "-pthread", *map(str, objects), "-o", str(library)])
        library.chmod(0o755)
        os.replace(library, target)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NativeUnavailable(f"{' '.join(command)}\nfailed:\n{done.stderr.strip()[-2000:]}")
