"""`kvloom bench kernels`: each kernel against the reference, and its time against what the device can do.

    error          of small tensors, the largest difference from the reference relative to its largest number; of whole numbers
                   the share that differs
    us             median time of a call of full size; on a GPU replayed from a CUDA graph, the second-level cache emptied
    GB/s, TFLOP/s  bytes that have to be moved, and FLOPs (`loadtest/bench/roofline.py`), over that time
    over floor     that time over the least that this device could need, by the bandwidth of a copy and the rate of a bf16
                   matrix product, measured in the same run
    FlashInfer     its time for the same, where it is installed, unless --attention-backend names who attends

`--roofline` measures nothing: it tells bytes, FLOPs and the least time on an A100, H100 and H200 by their data sheets.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from kvloom.engine.device import settle
from kvloom.engine.errors import ConfigError
from kvloom.engine.model.load import TORCH_DTYPES
from kvloom.kernels import Kernels as BackEnd
from kvloom.kernels import load
from kvloom.kernels.dense import beside, installed
from kvloom.loadtest.bench import kernel_calls, timing
from kvloom.loadtest.bench.kernel_cases import DENSE, SPARSE, KernelCase, cases, check
from kvloom.loadtest.bench.roofline import GPUS, SHAPES, Cost
from kvloom.loadtest.study.flags import BenchError, add_outputs, add_resume
from kvloom.loadtest.study.machine import describe
from kvloom.loadtest.study.results import Column, Results, Row
from kvloom.loadtest.study.runner import Case, Steps, Study, command

COSTS = (Column("call", "case"), Column("MB", "bytes", ",.1f", 1e-6), Column("GFLOP", "flops", ",.2f", 1e-9))
BESIDE = (kernel_calls.decode, kernel_calls.chunk)
"""What libraries compute as well."""
SUM = "a layer that chooses"


class _Kernels(Study):
    """Flags that both tables have, and their calls."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        if args.shape not in SHAPES:
            raise ConfigError(f"--shape is {args.shape!r}; known: {', '.join(SHAPES)}")
        if args.dtype not in TORCH_DTYPES:
            raise ConfigError(f"--dtype is {args.dtype!r}; allowed: {', '.join(TORCH_DTYPES)}")
        self.dtype = TORCH_DTYPES[args.dtype]
        if not 1 <= args.block_size <= 256:
            raise ConfigError(f"--block-size is {args.block_size}; allowed: 1 to 256")
        wanted = [part.strip() for part in args.only.split(",")]
        chosen = [one for one in cases(SHAPES[args.shape]) if any(part in one.name for part in wanted)]
        self.cases = [Case(one, one.name, {"case": one.name, **one.cost(self.dtype)._asdict()}) for one in chosen]
        if not self.cases:
            raise ConfigError(f"--only is {args.only!r}, which no call's name holds")

    @staticmethod
    def add_flags(made: argparse.ArgumentParser) -> None:
        made.add_argument("--shape", default="llama-3-8b", help=f"model: {', '.join(SHAPES)} (default: %(default)s)")
        made.add_argument("--dtype", default="bf16", help="bf16, fp16 or fp32 (default: %(default)s)")
        made.add_argument("--backend", default="auto", help="kernels, as in kvloom serve (default: %(default)s)")
        made.add_argument("--device", default="auto", help="as in kvloom serve (default: %(default)s)")
        made.add_argument("--attention-backend", default="auto", help="as in kvloom serve (default: the kernels themselves)")
        made.add_argument("--block-size", type=int, default=kernel_calls.BLOCK, help="tokens of a block (default: %(default)s)")
        made.add_argument("--only", default="", help="parts of names of calls, separated by commas (default: all)")
        made.add_argument("--check", action="store_true", help="compare with the reference alone, and time nothing")
        made.add_argument("--roofline", action="store_true", help="bytes, FLOPs and least times of GPUs that need not be here")
        add_outputs(made)
        add_resume(made)

    def row(self, case: Case) -> Row:
        return {**case.row, "shape": self.args.shape, "dtype": self.args.dtype}


class Roofline(_Kernels):
    """What each call needs at least."""

    title = "Kernels: what they need at least"
    columns = (*COSTS, *(Column(f"{gpu.name}, us", gpu.name, ",.1f", 1e6) for gpu in GPUS))
    identity = ("case", "shape", "dtype")

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        sheets = ", ".join(f"{gpu.name} {gpu.bandwidth / 1e12:.3g} TB/s and {gpu.rate / 1e12:.0f} TFLOP/s" for gpu in GPUS)
        self.note = f"One layer of {args.shape}, {args.dtype}, by data sheets: {sheets}. Nothing was measured."
        chosen = {case.label: case for case in self.cases}
        if all(name in chosen for name in SPARSE):
            total = Cost(0)
            for name in SPARSE:
                total = total.plus(chosen[name].what.cost(self.dtype))
            at = self.cases.index(chosen[SPARSE[-1]]) + 1
            summed = Case(total, SUM, {"case": f"{SUM}: {' + '.join(n.split()[0] for n in SPARSE)}", **total._asdict()})
            self.cases = [*self.cases[:at], summed, *self.cases[at:]]

    def measure(self, case: Case, steps: Steps) -> Row:
        cost = case.what if isinstance(case.what, Cost) else case.what.cost(self.dtype)
        steps.done()
        return {gpu.name: cost.seconds(gpu) for gpu in GPUS}


class Kernels(_Kernels):
    """What each call takes here."""

    title = "Kernels"
    columns = (
        *COSTS, Column("error", "error", ".1e"), Column("", "right"), Column("us", "seconds", ",.1f", 1e6),
        Column("GB/s", "bandwidth", ",.1f", 1e-9), Column("TFLOP/s", "rate", ",.2f", 1e-12),
        Column("over floor", "over_floor", ".2f"), Column("FlashInfer, us", "flashinfer", ",.1f", 1e6),
    )  # fmt: skip
    identity = ("case", "shape", "dtype", "backend", "attention", "block", "device")

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.device = settle(args.device, args.backend).device
        try:
            self.kernels = load(args.backend, self.device.type)
        except Exception as error:  # no compiler, or another device's kernels
            raise ConfigError(f"--backend is {args.backend}, which cannot be had here: {error}") from error
        self.beside = self._library("flashinfer") if self.device.type == "cuda" and installed("flashinfer") else None
        if args.attention_backend not in ("auto", self.kernels.name):
            self.beside, self.kernels = None, self._library(args.attention_backend)
        self.name = timing.name_of(self.device)
        about = self.kernels.name + (f" kernels and {self.kernels.dense}" if self.kernels.dense else " kernels")
        self.note = f"{args.shape}, {args.dtype}, {about} on {self.name}, blocks of {args.block_size}. Measured {describe()}."
        if not args.check:
            self.here = timing.measure(self.device)
            told = f"copies {self.here.bandwidth / 1e9:,.0f} GB/s, bf16 products {self.here.rate / 1e12:,.2f} TFLOP/s"
            self.note = f"{self.note} Ceilings: {told}."

    def _library(self, name: str) -> BackEnd:
        """The kernels with that library. Raises ConfigError if it cannot be had, or serves no such heads or blocks."""
        shape, block = SHAPES[self.args.shape], self.args.block_size
        try:
            found: Any = beside(self.kernels, name, self.device, self.dtype)
            kv = kernel_calls.on_device(self.device, self.dtype, block).cache(shape, 1, block)[0]
            found.prepare(kv, shape.q_heads)
        except Exception as error:  # what a library or its compiler raises
            raise ConfigError(f"--attention-backend is {name}, which cannot be had here: {error}") from error
        return cast(BackEnd, found)

    def row(self, case: Case) -> Row:
        about = {"attention": self.kernels.dense or "", "block": self.args.block_size}
        return {**super().row(case), "backend": self.kernels.name, **about, "device": self.name, "machine": describe()}

    @torch.inference_mode()
    def measure(self, case: Case, steps: Steps) -> Row:
        found = check(case.what, self.kernels, self.device, self.dtype, self.args.block_size)
        row: Row = {} if found is None else {"error": found[0], "right": "yes" if found[1] else "WRONG"}
        if found is not None and not self.args.check:
            cost, seconds = case.what.cost(self.dtype), self._time(case.what, self.kernels)
            row |= {"seconds": seconds, "bandwidth": cost.bytes / seconds, "rate": cost.flops / seconds,
                    "over_floor": seconds / cost.seconds(self.here)}  # fmt: skip
            if self.beside is not None and case.what.make in BESIDE:
                row["flashinfer"] = self._time(case.what, self.beside)
        steps.done()
        return row

    def _time(self, case: KernelCase, kernels: BackEnd) -> float:
        run = case.make(kernel_calls.on_device(self.device, self.dtype, self.args.block_size), case.shape, case.size)(kernels)
        assert run is not None
        return timing.timed(run, self.device).seconds

    def conclude(self, results: Results) -> None:
        """Raises BenchError if a kernel does not compute what the reference does."""
        took = {row["case"]: row["seconds"] for row in results.rows if row.get("seconds")}
        if all(name in took for name in (*SPARSE, DENSE)):
            share, alone = sum(took[name] for name in SPARSE) / took[DENSE], took[SPARSE[-1]] / took[DENSE]
            print(f"{SUM} takes {share:.2f} of a dense layer's time, one that reuses its list {alone:.2f}")
        wrong = [row["case"] for row in results.rows if row.get("right") == "WRONG"]
        if wrong:
            raise BenchError(f"not what the reference computes: {', '.join(wrong)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    made: Callable[[Sequence[str] | None], int] = command("bench kernels", Roofline if "--roofline" in words else Kernels)
    return made(words)
