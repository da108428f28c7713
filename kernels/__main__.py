"""`python -m kvloom.kernels`: make the back ends of this machine ready, so that no request waits for a compiler.

Builds the C++ library if there is a compiler, and says so if there is none. Without it, compiles the numba kernels for bf16
into their cache; beside it they are a fallback that compiles on first use. With --all, compiles them for every dtype anyway.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from kvloom.kernels import load, warm
from kvloom.kernels.interface import Kernels

_ALL = (torch.bfloat16, torch.float16, torch.float32)


def _say(text: str) -> None:
    print(f"kernels: {text}", flush=True)


def _progress(what: str, seconds: float) -> None:
    if seconds > 1.0:  # cached ones take milliseconds and need no line
        _say(f"numba   {what} compiled in {seconds:.0f} s")


def _compiling(stage: str, done: int, total: int) -> None:
    _say(f"native  {stage}: {done} of {total} files")


def _prepare(name: str, dtypes: Sequence[torch.dtype]) -> Kernels | None:
    """Load one back end and run all of its operations; None, with a line saying why, if it cannot be had."""
    start = time.perf_counter()
    try:
        kernels = load(name, progress=_compiling)
        warm(kernels, dtypes, _progress)
    except Exception as error:  # a missing compiler, a missing package: the next back end serves instead
        _say(f"{name:7} not available: {error}")
        return None
    _say(f"{name:7} ready in {time.perf_counter() - start:.0f} s")
    return kernels


def main() -> int:
    """Prepare what `auto` will pick, or everything; returns 0 once a back end works."""
    parser = argparse.ArgumentParser(prog="python -m kvloom.kernels", description="Make the kernels of this machine ready.")
    parser.add_argument("--all", action="store_true", help="also compile the fallback, for every dtype")
    everything = parser.parse_args().all
    if _prepare("native", _ALL[:1]) is None or everything:
        _prepare("numba", _ALL if everything else _ALL[:1])
    _say(f"using {load().name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
