"""The calls that `kvloom bench kernels` makes: each operation, of the sizes that docs/gpu.md has bars for.

A case is checked against the reference where it is made small, and timed as large as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvloom.kernels import Kernels, load
from kvloom.loadtest.bench import kernel_calls as calls
from kvloom.loadtest.bench import roofline
from kvloom.loadtest.bench.kernel_calls import BLOCK, Prepare, Tensors, on_host
from kvloom.loadtest.bench.roofline import Cost, Shape, Size

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2**-9, torch.bfloat16: 2**-7}
"""Of a result, relative to the largest number of the reference's; whole numbers must be equal."""
ROUNDED = 2**-6
"""Instead, where activations are rounded to 8 bits before they are multiplied."""


class Bar(NamedTuple):
    """What a case has to reach on a GPU, as in docs/gpu.md."""

    us: float = 0.0
    """Microseconds at most; 0 for none."""
    of_bandwidth: float = 0.0
    """Least share of the memory's published bandwidth."""


NO_BAR = Bar()


@dataclass(frozen=True)
class KernelCase:
    """One call, to be checked and timed."""

    name: str
    size: Size
    shape: Shape
    make: Callable[[Tensors, Shape, Size], Prepare]
    count: Callable[[Shape, Size, int], Cost]
    bar: Bar = NO_BAR

    def cost(self, dtype: torch.dtype = torch.bfloat16) -> Cost:
        """Of one call."""
        return self.count(self.shape, self.size, dtype.itemsize)

    def small(self) -> KernelCase:
        """The same with less of everything, but the same heads to a group and numbers to a head."""
        shape, size = self.shape, self.size
        heads = min(2, shape.kv_heads)
        shape = shape._replace(q_heads=shape.q_heads // shape.kv_heads * heads, kv_heads=heads, hidden=256, intermediate=320,
                               vocab=1000)  # fmt: skip
        context, k = min(size.context, 700), min(size.k, 90)
        rows, groups = min(size.rows, 40 if self.make is calls.chunk else 5), min(size.groups, heads)
        size = Size(rows, context, k, groups, min(size.inputs, 256), min(size.outputs, 320), size.bits)
        return KernelCase(self.name, size, shape, self.make, self.count)


def error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference relative to the largest number; of whole numbers the share that differs."""
    found = found.cpu()
    if not wanted.is_floating_point():
        return float((found != wanted).double().mean())
    difference = (found.double() - wanted.double()).abs().max()
    return float(difference / wanted.double().abs().max().clamp_min(1e-30)) if bool(difference.isfinite()) else float("inf")


def check(
    case: KernelCase, kernels: Kernels, device: torch.device, dtype: torch.dtype, block: int = BLOCK
) -> tuple[float, bool] | None:
    """The largest error of a small case against the reference, computed on the CPU, and whether it is within the tolerance.
    None if these kernels have no such operation. block: tokens of a block of KV."""
    small, cpu = case.small(), torch.device("cpu")
    run = small.make(on_host(device, dtype, block=block), small.shape, small.size)(kernels)
    reference = small.make(on_host(cpu, dtype, block=block), small.shape, small.size)(load("reference"))
    if run is None or reference is None:
        return None
    pairs = list(zip(run(), reference(), strict=True))
    errors = [error(found, wanted) for found, wanted in pairs]
    rounds = kernels.name == "native" and small.size.bits < 16
    allowed = [max(TOLERANCE[wanted.dtype], ROUNDED * rounds) if wanted.is_floating_point() else 0.0 for _, wanted in pairs]
    return max(errors), all(one <= most for one, most in zip(errors, allowed))


SPARSE = ("score 1 x 32,768", "pool 1 x 32,768", "select 4,096 of 32,768", "list 4,096 of 32,768")
"""A layer that makes its list anew, beside DENSE."""
DENSE = "decode 1 x 32,768"
SPARSE_BAR = 0.5
"""Of the dense layer's time."""


def cases(shape: Shape) -> list[KernelCase]:
    """Every call that is made."""
    few, wide, top, heads = 32, 32_768, 4_096, shape.kv_heads
    four = shape._replace(kv_heads=4, q_heads=shape.q_heads // heads * 4)
    return [
        KernelCase("decode 32 x 4,096", Size(few, 4096), shape, calls.decode, roofline.decode, Bar(of_bandwidth=0.8)),
        KernelCase("decode 1 x 16,384, 4 KV heads", Size(1, 16_384), four, calls.decode, roofline.decode, Bar(us=26)),
        KernelCase(DENSE, Size(1, wide), shape, calls.decode, roofline.decode),
        KernelCase(SPARSE[0], Size(1, wide), shape, calls.score, roofline.score),
        KernelCase(SPARSE[1], Size(1, wide), shape, calls.pool, roofline.pool),
        KernelCase(SPARSE[2], Size(1, wide, top, heads), shape, calls.select, roofline.select),
        KernelCase(SPARSE[3], Size(1, wide, top), shape, calls.listed, roofline.listed),
        KernelCase("top-k 512 of 65,536, batch 4", Size(4, 65_536, 512), shape, calls.select, roofline.select, Bar(us=20)),
        KernelCase("chunk 2,048 over 8,192", Size(2048, 8192), shape, calls.chunk, roofline.chunk),
        *_linears(shape, few),
        KernelCase("rotate_store 32", Size(few), shape, calls.rotate_store, roofline.rotate_store),
        KernelCase("store 2,048", Size(2048), shape, calls.store, roofline.store),
        KernelCase("rotate 2,048", Size(2048), shape, calls.rotate, roofline.rotate),
        KernelCase("add_rms_norm 32", Size(few), shape, calls.add_rms_norm, roofline.add_rms_norm),
        KernelCase("silu_mul 32", Size(few), shape, calls.silu_mul, roofline.silu_mul),
        KernelCase("sample 32", Size(few), shape, calls.sample, roofline.sample),
        KernelCase("renew 32", Size(few, wide, top), shape, calls.renew, roofline.renew),
        KernelCase("fold 16 of 32", Size(few, k=16), shape, calls.fold, roofline.fold),
    ]


def _linears(shape: Shape, rows: int) -> Iterator[KernelCase]:
    """A layer's projections and the head, which is never held in 4 bits."""
    for name, (inputs, outputs) in shape.linears().items():
        for bits in (16, 8) if name == "head" else (16, 8, 4):
            size = Size(rows, inputs=inputs, outputs=outputs, bits=bits)
            yield KernelCase(f"{name} x {rows}, {bits} bit", size, shape, calls.linear, roofline.linear)
