"""Kernels compiled ahead of time for GPUs that need not be there: registers, spills, shared memory, instructions.

Operations are called as they are, while their launches are recorded instead of made: what is compiled is what a GPU would be
given.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

SHARED = 101_376
"""Bytes of shared memory that a program may have: on devices of 8.6, 8.9 and 12.0; others of 8.0 and up have more."""

PER_SM = {80: 167_936, 90: 233_472}
"""Bytes that a multiprocessor has."""


class Built(NamedTuple):
    """A kernel as one call launches it, compiled for one architecture. Bytes are a program's, registers a thread's."""

    call: str
    kernel: str
    arch: int
    warps: int
    registers: int
    spilled: int
    shared: int
    ptx: str

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's 64 warps that can be there at once."""
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers, by_shared = 65_536 // per_warp // self.warps, PER_SM[self.arch] // (self.shared + 1024)
        return min(by_registers, by_shared, 32, 64 // self.warps) * self.warps / 64

    @property
    def wide_loads(self) -> bool:
        """Whether global memory is read 16 bytes to a thread."""
        return bool(re.search(r"ld\.global\S*\.(v4\.b32|v2\.b64)|cp\.async\.cg\.shared\.global", self.ptx))

    @property
    def tensor_cores(self) -> str:
        """The instruction that multiplies matrices, or nothing."""
        found = re.search(r"wgmma|\bmma\.sync", self.ptx)
        return found[0].removesuffix(".sync") if found else ""


class Launch(NamedTuple):
    """One launch of a kernel: `arguments` and `options` as it was called."""

    kernel: JITFunction
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches within are recorded, and not made."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels are interpreted here; unset TRITON_INTERPRET to compile them")
    launches: list[Launch] = []
    run = JITFunction.run

    def record(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(kernel, arguments, options))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def source(launch: Launch, arch: int) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton makes of the launch before it compiles it for that architecture, and with which options."""
    backend, kernel = make_backend(GPUTarget("cuda", arch, 32)), launch.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, types, options = binder(*launch.arguments, **launch.options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, dict(launch.options), bound, types, options)
    return ASTSource(kernel, signature, constants, attributes), parsed.__dict__


def variant(launch: Launch, arch: int) -> Hashable:
    """What a launch must have in common with an earlier one to find its kernel compiled."""
    found, options = source(launch, arch)
    return found.hash(), repr(sorted(options.items(), key=str))


def build(call: str, launch: Launch, arch: int) -> Built:
    """What the launch would run on that architecture."""
    kernel, (found, options) = launch.kernel, source(launch, arch)
    done = triton.compile(found, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Built(call, kernel.__name__, arch, done.metadata.num_warps, used["REG"], max(used["STACK"], used["LOCAL"]),
                 done.metadata.shared, done.asm["ptx"])  # fmt: skip
