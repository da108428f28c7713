"""Side by side: the same requests from the same client to each server in turn, on an otherwise idle machine.

    kvloom bench peers --start 'vllm=bash peers.sh vllm DIR {port}' --start 'llama=bash peers.sh llama DIR {port}'
    kvloom bench peers --url vllm=http://127.0.0.1:8001

kvloom is started by this script, a peer by the command given (with {port} filled in) or found at a URL. Every round starts
each server, waits until it is healthy, warms it up, runs every case and stops it. The table gives medians over rounds, and
ratios of medians. Prompts are random token ids, different in every round, the same for every server; greedy, `ignore_eos`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from kvloom.loadtest.flags import need
from kvloom.loadtest.machine import describe
from kvloom.loadtest.measures import Summary, summarise
from kvloom.loadtest.record import Job
from kvloom.loadtest.servers import Server, StartError, model_name, running

console = Console(highlight=False)


@dataclass(frozen=True, slots=True)
class Case:
    """One load: requests of `inputs` random tokens and `outputs` generated ones, `concurrency` at a time."""

    name: str
    concurrency: int
    inputs: int
    outputs: int
    requests: int


CASES = (
    Case("c1", 1, 512, 64, 8),
    Case("c8", 8, 512, 64, 24),
    Case("c16", 16, 1024, 64, 24),
    Case("long", 8, 7500, 64, 8),
)
FIRST_TOKEN, LAST_TOKEN = 300, 48_000
"""Token ids that are ordinary text in SmolLM2's vocabulary."""


@dataclass(frozen=True, slots=True)
class Run:
    """One case on one server in one round."""

    server: str
    case: str
    round: int
    start_seconds: float | None
    summary: Summary


def jobs(case: Case, seed: int) -> list[Job]:
    """The case's requests: the same for every server, different for every seed."""
    source = random.Random(f"{case.name}-{seed}")
    return [Job(prompt=[source.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(case.inputs)], output_tokens=case.outputs)
            for _ in range(case.requests)]  # fmt: skip


async def measure(url: str, case: Case, seed: int) -> Summary:
    from kvloom.loadtest.client import Client  # aiohttp: the command's help is read without it
    from kvloom.loadtest.drive import closed_loop

    async with Client(url, model_name(url)) as client:
        return summarise(await closed_loop(client, jobs(case, seed), case.concurrency))


def one_line(summary: Summary) -> str:
    times = (("TTFT", summary.ttft), ("TPOT", summary.tpot), ("ITL", summary.itl))
    parts = [f"{name} p50 {spread.p50 * 1e3:.1f} ms" for name, spread in times]
    return "  ".join([*parts, f"{summary.output_throughput:.1f} tok/s", f"{summary.wall:.1f} s", f"failed {summary.failed}"])


def measure_server(server: Server, cases: Sequence[Case], seed: int, logs: Path) -> list[Run]:
    """One round of one server."""
    runs = []
    with running(server, logs) as (url, start_seconds):
        asyncio.run(measure(url, Case("warm-up", 2, 256, 8, 4), seed))
        for case in cases:
            summary = asyncio.run(measure(url, case, seed))
            runs.append(Run(server.name, case.name, seed, start_seconds, summary))
            console.print(f"round {seed}  {server.name:8} {case.name:5} {one_line(summary)}", soft_wrap=True)
    return runs


METRICS = (
    ("TTFT p50, ms", "ttft"),
    ("TPOT p50, ms", "tpot"),
    ("ITL p50, ms", "itl"),
    ("output tok/s", "output_throughput"),
    ("wall, s", "wall"),
)


def value(run: Run, metric: str) -> float:
    found = getattr(run.summary, metric)
    return float(found) if isinstance(found, float) else float(found.p50) * 1e3


def median_of(runs: Sequence[Run], server: str, case: str, metric: str) -> float:
    """Over rounds."""
    found = [value(run, metric) for run in runs if (run.server, run.case) == (server, case)]
    return statistics.median(found) if found else float("nan")


def rounds_of(runs: Sequence[Run]) -> str:
    """How many rounds stand behind the medians, naming what was measured less often than the rest."""
    counts = Counter((run.server, run.case) for run in runs)
    most = max(counts.values())
    fewer = "".join(f" ({server} {case}: {count})" for (server, case), count in counts.items() if count < most)
    return f"{most} rounds{fewer}"


def table(runs: Sequence[Run], cases: Sequence[Case]) -> str:
    """Markdown: a row per case and metric, a column per server, ratios of kvloom to each peer."""
    names = list(dict.fromkeys(run.server for run in runs))
    peers = [name for name in names if name != "kvloom"]

    head = ["case", "metric", *names, *(f"kvloom / {peer}" for peer in peers)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for case in cases:
        title = f"{case.name}: {case.concurrency} x {case.inputs} in / {case.outputs} out, {case.requests} requests"
        for label, metric in METRICS:
            medians = {name: median_of(runs, name, case.name, metric) for name in names}
            ratios = [f"{medians['kvloom'] / medians[peer]:.2f}x" for peer in peers] if "kvloom" in medians else []
            lines.append("| " + " | ".join([title, label, *(f"{medians[name]:.1f}" for name in names), *ratios]) + " |")
            title = ""
    starts = {
        name: [run.start_seconds for run in runs if run.server == name and run.start_seconds is not None] for name in names
    }
    cells = [f"{statistics.median(starts[name]):.1f}" if starts[name] else "-" for name in names]
    own = statistics.median(starts["kvloom"]) if starts.get("kvloom") else float("nan")
    ratios = [f"{own / statistics.median(starts[peer]):.2f}x" if starts[peer] else "-" for peer in peers]
    lines.append("| " + " | ".join(["start to healthy", "s", *cells, *ratios]) + " |")
    failed = sum(run.summary.failed for run in runs)
    return "\n".join([*lines, "", f"Medians of {rounds_of(runs)}; {failed} failed requests. Measured {describe()}."])


def plot(runs: Sequence[Run], cases: Sequence[Case], path: Path) -> None:
    """One panel per metric, a group of bars per case, medians over rounds, as multiples of kvloom's figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(run.server for run in runs))
    panels = (("time to first token", "ttft"), ("time per output token", "tpot"), ("wall time", "wall"))
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 4), layout="constrained")
    for axis, (title, metric) in zip(axes, panels):
        for i, name in enumerate(names):
            medians = [
                median_of(runs, name, case.name, metric) / median_of(runs, "kvloom", case.name, metric) for case in cases
            ]
            places = [x + i * 0.8 / len(names) for x in range(len(cases))]
            bars = axis.bar(places, medians, 0.76 / len(names), label=name)
            axis.bar_label(bars, [f"{value:.1f}x" for value in medians], fontsize=8, padding=2)
        axis.set_xticks([x + 0.4 - 0.4 / len(names) for x in range(len(cases))])
        axis.set_xticklabels([f"{case.concurrency} x {case.inputs}" for case in cases])
        axis.set(title=f"{title}, kvloom = 1 (lower is better)", xlabel="concurrency x prompt tokens", ylim=(0, None))
        axis.margins(y=0.12)
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def recorded(path: Path) -> list[Run]:
    """Runs that an earlier measurement wrote. Raises SystemExit if the file holds none."""
    try:
        rows = json.loads(path.read_text())
        return [Run(**{**row, "summary": Summary.from_dict(row["summary"])}) for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SystemExit(f"{path} does not hold recorded runs: {error}") from None


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kvloom bench peers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--start", action="append", default=[], metavar="NAME=COMMAND", help="a peer to start; {port} is filled in"
    )
    parser.add_argument("--url", action="append", default=[], metavar="NAME=URL", help="a peer that already runs")
    parser.add_argument("--kvloom", default="", help="further flags for kvloom serve")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", default=",".join(case.name for case in CASES), help="which of: %(default)s")
    parser.add_argument("--only", default="", help="comma-separated servers to run, kvloom among them (default: all)")
    parser.add_argument("--out", type=Path, default=Path("results/peers"), help="folder for raw results and logs")
    parser.add_argument(
        "--from", type=Path, nargs="+", dest="recorded", metavar="FILE", help="report recorded runs (runs.json)"
    )
    parser.add_argument("--plot", type=Path, default=None, help="also draw the comparison into this PNG file")
    parser.add_argument("--markdown", type=Path, default=None, help="also write the table into this file")
    return parser.parse_args(argv)


def servers(args: argparse.Namespace) -> list[Server]:
    found = [Server("kvloom", command=f"{sys.executable} -m kvloom.server.cli serve smollm2 --port {{port}} {args.kvloom}")]
    for option, field in (("start", "command"), ("url", "url")):
        for text in getattr(args, option):
            name, _, rest = text.partition("=")
            if not name or not rest:
                raise SystemExit(f"--{option} {text!r} is not NAME=...")
            found.append(Server(name, **{field: rest}))
    wanted = [name for name in args.only.split(",") if name]
    return [server for server in found if not wanted or server.name in wanted]


def measure_all(args: argparse.Namespace, cases: Sequence[Case]) -> list[Run]:
    """Every round of every server; what is measured so far is on disk after each."""
    runs: list[Run] = []
    for seed in range(args.rounds):
        for server in servers(args):
            runs += measure_server(server, cases, seed, args.out)
            (args.out / "runs.json").write_text(json.dumps([asdict(run) for run in runs], indent=1))
    return runs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit code."""
    args = parse(argv)
    known = {case.name: case for case in CASES}
    if unknown := [name for name in args.cases.split(",") if name not in known]:
        raise SystemExit(f"no case named {', '.join(unknown)}; there are {', '.join(known)}")
    cases = [known[name] for name in args.cases.split(",")]
    need(*([] if args.recorded else ["aiohttp"]), *(["matplotlib"] if args.plot else []))
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        runs = [run for file in args.recorded for run in recorded(file)] if args.recorded else measure_all(args, cases)
    except StartError as error:
        raise SystemExit(str(error)) from None
    text = table(runs, cases)
    console.print(text, soft_wrap=True)
    if args.plot:
        plot(runs, cases, args.plot)
    if args.markdown:
        args.markdown.write_text(
            f"# kvloom beside its peers\n\n{' '.join((__doc__ or '').split(chr(10) * 2)[2].split())}\n\n{text}\n"
        )
    return 1 if any(run.summary.failed for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
