"""Every kernel compiled ahead of time for GPUs that need not be there: registers, spills, shared memory, instructions.

    python -m kvloom.kernels.triton.compiled [80 90]        a Markdown table of what CALLS launch, for sm_80 and sm_90

The operations themselves are called, on tensors of a model's shapes, while their launches are recorded instead of made: what is
compiled is what a GPU would be given.
"""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from kvloom.kernels.interface import COMPARES, Compare, Folded, Lists, PagedKV, Renewal, Rows
from kvloom.kernels.triton import TritonKernels, choose, rows, sampling

SHARED = {80: 166_912, 90: 232_448}
"""Bytes of shared memory that a program may have, by architecture."""

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


def build(call: str, launch: Launch, arch: int) -> Built:
    """What the launch would run on that architecture."""
    target = GPUTarget("cuda", arch, 32)
    backend, kernel = make_backend(target), launch.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, types, options = binder(*launch.arguments, **launch.options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, dict(launch.options), bound, types, options)
    done = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=parsed.__dict__)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Built(call, kernel.__name__, arch, done.metadata.num_warps, used["REG"], max(used["STACK"], used["LOCAL"]),
                 done.metadata.shared, done.asm["ptx"])  # fmt: skip


def table(built: Iterable[Built]) -> str:
    """Markdown, a line for each kernel of a call; what differs between architectures one behind the other."""
    lines = ["| call | kernel | warps | registers | spilled | shared memory | occupancy | 16-byte loads | tensor cores |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for (call, kernel), ones in itertools.groupby(built, key=lambda one: (one.call, one.kernel)):
        cells = zip(*((one.warps, one.registers, one.spilled, one.shared, f"{one.occupancy:.0%}",
                       "yes" if one.wide_loads else "", one.tensor_cores) for one in ones))  # fmt: skip
        both = [" / ".join(dict.fromkeys(map(str, cell))) for cell in cells]
        lines.append(f"| {' | '.join([call, f'`{kernel}`', *both])} |")
    return "\n".join(lines)


# The calls: 64 rows of a model with 32 query heads and 8 KV heads of 128, in bf16, 32,768 tokens to a request -----------------

ROWS, Q_HEADS, KV_HEADS, DIM, WIDTH = 64, 32, 8, 128, 32_768


def _of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


_fp32 = functools.partial(_of, dtype=torch.float32)
_int32 = functools.partial(_of, dtype=torch.int32)
_int64 = functools.partial(_of, dtype=torch.int64)


def _cache() -> PagedKV:
    return PagedKV(*(_of(64, KV_HEADS, 16, DIM) for _ in "kv"))


def _rotate_store(q_norm: Tensor | None) -> None:
    rows.rotate_store(_of(ROWS, (Q_HEADS + 2 * KV_HEADS) * DIM), _fp32(4096, DIM // 2), _fp32(4096, DIM // 2), _int64(ROWS),
                      _cache(), _int64(ROWS), _of(ROWS, Q_HEADS, DIM), q_norm, q_norm, 1e-6)  # fmt: skip


def _pool() -> None:
    choose.pool(_fp32(ROWS, Q_HEADS, WIDTH), _int32(ROWS), _int32(ROWS), KV_HEADS, how="sum", window=7,
                out=_fp32(ROWS, KV_HEADS, WIDTH), active=_int32(ROWS))  # fmt: skip


def _select() -> None:
    choose.select(_fp32(ROWS, KV_HEADS, WIDTH), _int32(ROWS), 2048, offset=_int32(ROWS), at=_int32(ROWS),
                  out=(_int32(KV_HEADS, 2048), None))  # fmt: skip


def _renew(compare: Compare) -> None:
    how = Renewal(tail=0, query=8, width=2048, recent=64, most=256, compare=compare, threshold=0.9, dense=False)
    choose.renew(_of(ROWS, Q_HEADS, DIM), _int32(1 << 20), _int32(ROWS), _int32(ROWS), _int32(ROWS), how,
                 (_fp32(ROWS, DIM // 2), _fp32(ROWS, DIM // 2)), _int32(ROWS), _int32(ROWS), _int32(ROWS, KV_HEADS),
                 _int64(3))  # fmt: skip


def _attend(what: str, dtype: torch.dtype = torch.bfloat16, dim: int = DIM) -> None:
    """what: "decode", "lists" (all that can be asked for), "chunk" or "score"."""
    kernels, zeros = TritonKernels("cpu"), _int32(ROWS).zero_()
    seen = Rows(
        _int32(1 if what == "chunk" else ROWS, WIDTH // 16), zeros, zeros, zeros, None, None if what == "chunk" else zeros
    )
    if what == "lists":
        seen = seen._replace(lists=Lists(zeros, *(_int32(ROWS, KV_HEADS) for _ in "ol")))
    kv = PagedKV(*(_of(64, KV_HEADS, 16, dim, dtype=dtype) for _ in "kv"))
    q, plan = _of(ROWS, Q_HEADS, dim, dtype=dtype), kernels.plan(seen, Q_HEADS, KV_HEADS, dim)
    plan.tiles = plan.tiles[-1:]  # of a chunk, those that share reads
    logits = _fp32(ROWS, Q_HEADS, WIDTH)
    more: dict[str, Any] = {"lse": _fp32(ROWS, Q_HEADS), "logits": logits, "heads": _int32(KV_HEADS), "read": _int64(ROWS),
                            "folded": Folded(zeros, zeros, zeros)}  # fmt: skip
    if what == "score":
        kernels.score(q, kv, plan, scale=0.1, out=logits, active=zeros)
    else:
        kernels.attend(q, kv, plan, scale=0.1, out=q, **more if what == "lists" else {})


def _fold() -> None:
    request, first, last, at = (_int32(ROWS) for _ in range(4))
    TritonKernels("cpu").fold(_cache(), _int32(ROWS, WIDTH // 16), request, first, last, _int32(1 << 20), at, origin=4, most=16)


CALLS: dict[str, Callable[[], object]] = {
    **{what: functools.partial(_attend, what) for what in ("decode", "lists", "chunk", "score")},
    "lists of 64, fp16": lambda: _attend("lists", torch.float16, 64),
    "chunk of 256": lambda: _attend("chunk", dim=256),
    "decode, fp32": lambda: _attend("decode", torch.float32),
    "chunk, fp32": lambda: _attend("chunk", torch.float32),
    "fold": _fold,
    "store": lambda: rows.store(_of(ROWS, KV_HEADS, DIM), _of(ROWS, KV_HEADS, DIM), _cache(), _int64(ROWS)),
    "rotate": lambda: rows.rotate(_of(ROWS, KV_HEADS, DIM), _int32(ROWS), _fp32(DIM // 2), _of(ROWS, KV_HEADS, DIM)),
    "rotate_store": lambda: _rotate_store(None),
    "rotate_store with QK norm": lambda: _rotate_store(_of(DIM)),
    "add_rms_norm": lambda: rows.add_rms_norm(_of(ROWS, 4096), _of(ROWS, 4096), _of(4096), 1e-6, _of(ROWS, 4096)),
    "silu_mul": lambda: rows.silu_mul(_of(ROWS, 2 * 14_336), _of(ROWS, 14_336)),
    "pool": _pool,
    "select": _select,
    **{f"renew ({compare})": functools.partial(_renew, compare) for compare in COMPARES},
    "sample": lambda: sampling.sample(_fp32(ROWS, 151_936), _of(ROWS, 5, dtype=torch.float64), _int64(ROWS)),
}
"""One call per operation and kind of launch, by the name under which it appears."""


def every(arches: Iterable[int] = tuple(SHARED)) -> list[Built]:
    """What all calls launch, for these architectures."""
    built = []
    for name, call in CALLS.items():
        with recorded() as launches:
            call()
        built += [build(name, launch, arch) for launch in launches for arch in arches]
    return built


if __name__ == "__main__":
    print(table(every(tuple(map(int, sys.argv[1:])) or tuple(SHARED))))
