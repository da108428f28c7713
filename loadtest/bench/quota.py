"""`kvloom bench quota`: decode steps under a control group's quota of processor time, by the number of threads.

    step      milliseconds: the mean, the median, and what one step in a hundred takes longer than
    tok/s     of one request

Each engine runs in a process of its own inside a new group, which needs root, and a mounted controller of either version. The
group has all the weight there is, so that the quota limits it and little else does.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvloom.engine import LLM
from kvloom.engine.errors import ConfigError
from kvloom.engine.startup.processors import processors
from kvloom.loadtest.bench.engine import decode_steps
from kvloom.loadtest.figures import publish
from kvloom.loadtest.study.flags import BenchError, add_model, add_outputs, count, listed, parser
from kvloom.loadtest.study.results import Column, Row, cells, console, console_table

MOUNTED = Path("/sys/fs/cgroup")
PERIOD = 100_000
"""Microseconds: the kernel's own default."""
CONTEXT, STEPS = 512, 240
COLUMNS = (
    Column("quota, cores", "quota", "g"), Column("threads", "threads"), Column("mean step, ms", "mean", ".1f", 1e3),
    Column("median", "median", ".1f", 1e3), Column("one in a hundred", "slow", ".1f", 1e3), Column("tok/s", "rate", ".1f"),
)  # fmt: skip


@contextlib.contextmanager
def group(quota: float) -> Iterator[Path]:
    """A new group with a quota in cores; the file that a process writes 0 into to be in it. Raises BenchError."""
    top = MOUNTED / "cpu" if (MOUNTED / "cpu").is_dir() else MOUNTED
    folder = top / f"kvloom-{os.getpid()}-{time.monotonic_ns()}"
    granted = round(quota * PERIOD)
    try:
        folder.mkdir()
        try:
            if (folder / "cpu.cfs_quota_us").exists():
                (folder / "cpu.cfs_period_us").write_text(str(PERIOD))
                (folder / "cpu.cfs_quota_us").write_text(str(granted))
                (folder / "cpu.shares").write_text("262144")
            else:
                (folder / "cpu.max").write_text(f"{granted} {PERIOD}")
                (folder / "cpu.weight").write_text("10000")
            yield folder / "cgroup.procs"
        finally:
            folder.rmdir()
    except OSError as error:
        raise BenchError(f"no control group with a quota can be made here: {error}; it needs root") from error


def steps(model: str, quota: float, threads: int) -> list[float]:
    """Seconds of decode steps of an engine of its own. Raises BenchError."""
    with group(quota) as joined:
        command = [
            sys.executable,
            "-m",
            "kvloom.loadtest.bench.quota",
            "--inside",
            str(joined),
            "--threads",
            str(threads),
            model,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"the engine inside the group ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def inside(joined: Path, model: str, threads: int) -> None:
    """Join the group, and print the seconds of decode steps."""
    joined.write_text("0")
    llm = LLM(model, device="cpu", threads=threads, kv_memory="256MiB")
    print(json.dumps(decode_steps(llm, 1, CONTEXT, STEPS)))


def summary(quota: float, threads: int, seconds: Sequence[float]) -> Row:
    """A row of the table."""
    mean = statistics.fmean(seconds)
    slow = statistics.quantiles(seconds, n=100)[-1]
    return {
        "quota": quota,
        "threads": str(threads),
        "mean": mean,
        "median": statistics.median(seconds),
        "slow": slow,
        "rate": 1 / mean,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    made = parser("bench quota", __doc__)
    add_model(made)
    made.add_argument("--quotas", default="1,1.5,2", help="in cores (default: %(default)s)")
    made.add_argument("--threads", default="1,2", help="of the engine (default: %(default)s)")
    made.add_argument("--rounds", type=count, default=3, help="engines for each pair (default: %(default)s)")
    made.add_argument("--inside", type=Path, help="the group's file to join first: for the engines that this command starts")
    add_outputs(made)
    args = made.parse_args(argv)
    threads = listed("--threads", args.threads, int, lambda number: 1 <= number <= 1024, "whole numbers from 1 to 1024")
    if args.inside is not None:
        inside(args.inside, args.model, threads[0])
        return 0
    quotas = listed("--quotas", args.quotas, float, lambda number: 0.01 <= number <= 1024, "numbers from 0.01 to 1024")
    if max(quotas) > processors().cores:
        raise ConfigError(f"--quotas is {args.quotas!r}, but this process may use {processors().cores} cores")
    pairs = [(quota, number) for quota in quotas for number in threads]
    spent: dict[tuple[float, int], list[float]] = {pair: [] for pair in pairs}
    for _ in range(args.rounds):
        for pair in pairs:
            spent[pair] += steps(args.model, *pair)
    table = cells(COLUMNS, [summary(*pair, seconds) for pair, seconds in spent.items()])
    console.print(console_table(*table, "Decode steps under a quota"))
    if args.publish:
        note = (
            f"{args.model}, one request at a context of {CONTEXT}, {STEPS} steps in each of {args.rounds} processes, in turn; "
            f"periods of {PERIOD // 1000} ms."
        )
        publish(args.publish, *table, note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
