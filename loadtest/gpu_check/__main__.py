"""All that has to be seen on a GPU, in one command and under eight minutes:

    python -m kvloom.loadtest.gpu_check [--json FILE] [--minutes 7.5]     on the GPU that torch sees; `make gpu-check`
    python -m kvloom.loadtest.gpu_check --tiny                            the same code on a CPU, with a tiny model

    tests     the kernel tests of every back end, on the device (needs pytest and hypothesis)
    results   every call against the reference, in bf16, fp16 and fp32
    replay    captured steps give the tokens of single calls, for every method
    times     every call: microseconds, and bytes per second beside the GPU's, against the bars of docs/gpu.md
    engine    tokens per second of an 8B-shaped model with random weights, dense and each method, short and long contexts
    libraries FlashInfer and flash-attn, where installed: decode rows and a chunk against the reference, and times

Ends with 1 if anything is wrong; a bar that is missed is told, and no error. What was left out is told with the reason.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from kvloom.kernels import load
from kvloom.kernels.dense import LIBRARIES
from kvloom.loadtest.bench import timing
from kvloom.loadtest.bench.kernel_cases import cases
from kvloom.loadtest.bench.roofline import SHAPES, Shape
from kvloom.loadtest.gpu_check import engine_stages, kernel_stages
from kvloom.loadtest.gpu_check.engine_stages import Load, Sizes
from kvloom.loadtest.gpu_check.stages import Finding, Stage, carried_out, table
from kvloom.loadtest.study.machine import describe

BESIDE = ("numpy", "triton", "pytest", "hypothesis", "flashinfer-python", "flash-attn")
"""Packages whose versions are told; the first two are needed."""
TINY = Shape(layers=3, q_heads=4, kv_heads=2, head_dim=16, hidden=64, intermediate=96, vocab=320)
OF_A_GPU = Sizes(
    SHAPES["llama-3-8b"], (Load(16, 1024, 512), Load(4, 32_768, 4096)), 32,
    small=Shape(4, 32, 8, 128, 1024, 2048, 4096), compared=Load(8, 700, 256),  # a size that is captured: no padding
)  # fmt: skip
OF_A_CPU = Sizes(TINY, (Load(2, 90, 32), Load(2, 150, 48)), 4, small=TINY, compared=Load(2, 90, 48))


def stages(device: torch.device, backend: str) -> list[Stage]:
    """With the seconds that each may take: 7 minutes and a half together."""
    kernels, tiny = load(backend, device.type), device.type != "cuda"
    sizes, calls = (OF_A_CPU if tiny else OF_A_GPU), cases(SHAPES["llama-3-8b"])
    files = ("select", "score") if tiny else kernel_stages.FILES
    dtypes = (torch.float32,) if tiny else (torch.bfloat16, torch.float16, torch.float32)
    timed = [case.small() for case in calls] if tiny else calls
    where = "cpu:0" if tiny else device.type
    return [
        Stage("tests", 150, partial(kernel_stages.contract, files, kernels.name, where)),
        Stage("results", 80, partial(kernel_stages.correctness, calls, kernels, device, dtypes)),
        Stage("replay", 50, partial(engine_stages.replays, sizes, kernels, device)),
        Stage("times", 80, partial(kernel_stages.times, timed, kernels, device)),
        Stage("engine", 90, partial(engine_stages.speeds, sizes, kernels, device)),
        Stage("libraries", 120, partial(kernel_stages.libraries, list(LIBRARIES), ("--backend", kernels.name))),
    ]


def versions() -> dict[str, str]:
    """Of what is there, and what is not."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    for name in BESIDE:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Check, print the table, write it; returns the exit code."""
    made = argparse.ArgumentParser(prog="gpu_check", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    made.add_argument("--json", type=Path, default=Path("build/gpu-check.json"), help="default: %(default)s")
    made.add_argument("--minutes", type=float, default=7.5, help="in all; what does not fit is left out (default: %(default)s)")
    made.add_argument("--tiny", action="store_true", help="on a CPU, with a tiny model, to see that the check itself works")
    made.add_argument("--backend", help="kernels (default: triton; with --tiny torch)")
    args = made.parse_args(argv)
    if not args.tiny and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no GPU here; --tiny runs the same code on a CPU", file=sys.stderr)
        return 2
    if importlib.util.find_spec("platformdirs") is None:
        os.environ.setdefault("KVLOOM_CACHE", str(args.json.parent / "cache"))
    if args.tiny:
        print("with --tiny, calls and models are small and on the CPU: times say nothing")
    device = torch.device("cpu") if args.tiny else torch.device("cuda", torch.cuda.current_device())
    began, about = time.monotonic(), {"device": timing.name_of(device), "machine": describe(), **versions()}
    print("\n".join(f"{name:>18}  {value}" for name, value in about.items()), flush=True)
    todo = stages(device, args.backend or ("torch" if args.tiny else "triton"))
    found = carried_out(todo, 60 * args.minutes, lambda one: print("  ".join(one), flush=True))
    took = time.monotonic() - began
    print(f"\n{table(found)}\n\n{took:.0f} s, {summary(found)}")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    content = {**about, "seconds": round(took, 1), "findings": [finding._asdict() for finding in found]}
    args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written: {args.json}")
    return int(any(finding.verdict == "WRONG" for finding in found))


def summary(found: Sequence[Finding]) -> str:
    """How many of each."""
    counts = {
        name: sum(one.verdict == name for one in found) for name in ("right", "WRONG", "bar met", "bar missed", "left out")
    }
    return ", ".join(f"{number} {name}" for name, number in counts.items())


if __name__ == "__main__":
    sys.exit(main())
