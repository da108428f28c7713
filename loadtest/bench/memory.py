"""`kvloom bench memory`: what a model takes of memory, beside its file and the KV that is in use.

    resident   of this process, pages of mapped files among them: with everything imported, with the model, after a prompt
    model      resident after the prompt, less that before the model was loaded
    ratio      of that to the bytes of the model's files and of the KV in use

The model is loaded twice: the first time may pack its weights, the second finds them packed (docs/engine.md).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from kvloom.engine import LLM, SamplingParams
from kvloom.engine.startup.catalog import resolve
from kvloom.loadtest.bench.contexts import random_tokens
from kvloom.loadtest.figures import publish
from kvloom.loadtest.study.flags import BenchError, add_model, add_outputs, parser
from kvloom.loadtest.study.results import Column, Row, cells, console, console_table

PROMPT, OUTPUTS = 512, 64
_MIB = 1 << 20
COLUMNS = (
    Column("start", "start"), Column("resident before, MiB", "before", ".0f"), Column("with the model", "loaded", ".0f"),
    Column("after a prompt", "ran", ".0f"), Column("file, MiB", "file", ".0f"), Column("KV in use, MiB", "kv", ".1f"),
    Column("model, MiB", "model", ".0f"), Column("ratio", "ratio", ".2f"),
)  # fmt: skip


def resident() -> float:
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def inside(model: str) -> Row:
    """Load the model in this process, run a prompt, and tell the memory before, between and after."""
    before = resident()
    llm = LLM(model, device="cpu", kv_memory="256MiB")
    loaded = resident()
    llm.generate([random_tokens(PROMPT, 1000, 0)], SamplingParams(max_tokens=OUTPUTS, ignore_eos=True))
    cache = llm.core.cache
    blocks = -(-(PROMPT + OUTPUTS) // cache.block_size)
    kv = blocks * sum(group.storage.block_bytes for group in cache.groups) / _MIB
    return {"before": before, "loaded": loaded, "ran": resident(), "kv": kv}


def measured(model: str, start: str) -> Row:
    """A row of the table, of a process of its own. Raises BenchError."""
    command = [sys.executable, "-m", "kvloom.loadtest.bench.memory", "--inside", model]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"the process that loads the model ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    row: Row = json.loads(done.stdout.splitlines()[-1])
    path = resolve(model).path
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    file, taken = sum(file.stat().st_size for file in files) / _MIB, row["ran"] - row["before"]
    return {**row, "start": start, "file": file, "model": taken, "ratio": taken / (file + row["kv"])}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    made = parser("bench memory", __doc__)
    add_model(made)
    made.add_argument("--inside", action="store_true", help="measure in this process: for those that this command starts")
    add_outputs(made)
    args = made.parse_args(argv)
    if args.inside:
        print(json.dumps(inside(args.model)))
        return 0
    table = cells(COLUMNS, [measured(args.model, start) for start in ("first", "second")])
    console.print(console_table(*table, "Memory of a model"))
    if args.publish:
        name = Path(args.model).name
        publish(args.publish, *table, f"{name}, a prompt of {PROMPT} tokens and {OUTPUTS} more, KV in bf16.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
