"""Kernels: attention over paged KV and the row-wise operations around it. Knows tensors only; imports nothing of the engine.

`load` picks a back end once, at start-up. All back ends keep the contract of `interface`; `reference` defines it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from kvloom.kernels.counters import Counters
from kvloom.kernels.interface import Allowed, Kernels, Lists, PagedKV, Plan, PoolHow, Rows

__all__ = ["BACKENDS", "Allowed", "Counters", "Kernels", "Lists", "PagedKV", "Plan", "PoolHow", "Rows", "load"]

BACKENDS = ("native", "triton", "torch", "reference")
"""In the order in which `auto` tries them: native on cpu alone, triton on cuda alone."""

_log = logging.getLogger(__name__)


def load(
    backend: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Kernels:
    """The kernels named, or with "auto" the first of BACKENDS that works here.

    threads: the native back end's, None for as many as torch has; those of the others are torch's own. progress: called with
    (stage, done, total) while a compiler runs.
    Raises ValueError for an unknown name, or a device the back end does not serve; what the back end raises if it was named
    and cannot be had (`native.NativeUnavailable`).
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown kernel back end {backend!r}; allowed: auto, {', '.join(BACKENDS)}")
    if device != "cpu" and backend == "native":
        raise ValueError(f"the native back end runs on cpu, not on {device!r}; use triton or torch there")
    if backend != "auto":
        return _make(backend, device, threads, progress)
    for name in BACKENDS:
        if name == ("triton" if device == "cpu" else "native"):
            continue
        try:
            return _make(name, device, threads, progress)
        except Exception as error:
            if name == "reference" or isinstance(error, ValueError):
                raise
            _log.info("kernel back end %s is not available: %s", name, error)
    raise AssertionError("the reference back end always loads")


def _make(name: str, device: str, threads: int | None, progress: Callable[[str, int, int], None] | None) -> Kernels:
    if name == "native":
        from kvloom.kernels.cpu.native import load as load_native

        return load_native(threads, progress=progress)
    if name == "triton":
        from kvloom.kernels.triton import load as load_triton

        return load_triton(device)
    if name == "torch":
        from kvloom.kernels.vectorized import TorchKernels

        return TorchKernels()
    from kvloom.kernels.reference import ReferenceKernels

    return ReferenceKernels()
