"""CPU back end in C++: attention, layer operations and quantised linear layers.

`load` takes the library that came with the package, or builds one when it must (seconds, once per machine), and returns a back
end that keeps the contract of `kernels/interface.py`. A row's result does not depend on the batch it is computed in: see
csrc/plan.h.
"""

from __future__ import annotations

from .backend import NativeKernels, load
from .build import Built, build
from .compiler import NativeUnavailable

__all__ = ["Built", "NativeKernels", "NativeUnavailable", "build", "load"]
