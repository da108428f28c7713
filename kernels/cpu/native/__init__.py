"""CPU back end in C++: attention, layer operations and quantised linear layers.

`load` builds the library when it must (seconds, once per machine) and returns a back end that keeps the contract of
`kernels/interface.py`. A row's result does not depend on the batch it is computed in: see csrc/plan.h.
"""

from __future__ import annotations

from .backend import NativeKernels, load
from .build import NativeUnavailable, build

__all__ = ["NativeKernels", "NativeUnavailable", "build", "load"]
