"""The native back end for tests, which are skipped where it cannot be had."""

from __future__ import annotations

import pytest

from kvloom.kernels.cpu.native import NativeKernels, NativeUnavailable, load


def native_kernels(threads: int = 2, *, generic: bool = False) -> NativeKernels:
    """The native back end; where it cannot be had (no compiler, another processor), the test is skipped."""
    try:
        return load(threads=threads, generic=generic)
    except (NativeUnavailable, ValueError) as error:
        pytest.skip(str(error))
