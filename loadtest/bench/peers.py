"""Side by side: the same requests from the same client to each server in turn, on an otherwise idle machine.

    kvloom bench peers --start 'vllm=bash peers.sh vllm DIR {port}' --precision vllm=bf16 --version 'vllm=vllm --version' \\
        --also 'kvloom-bf16=--weights bf16' --precision kvloom-bf16=bf16
    kvloom bench peers --url vllm=http://127.0.0.1:8001 --precision vllm=fp32

kvloom is started by this script, a peer by the command given (with {port} filled in) or found at a URL. Every round starts
each server, waits until it is healthy, warms it up, runs every case and stops it. The table gives medians over rounds, and
ratios of medians: of kvloom as it comes to every peer, and of a further kvloom (`--also`) to the peers of its precision, like
for like. Prompts are random token ids, different in every round, the same for every server; greedy, `ignore_eos`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvloom.loadtest.bench.peers_table import CASES, MORE, OWN_PRECISION, About, Case, Run, cells, note, plot, table
from kvloom.loadtest.client.record import Job, Record
from kvloom.loadtest.client.servers import Server, StartError, model_name, resident, running
from kvloom.loadtest.figures import commit, publish
from kvloom.loadtest.load.measures import Spread, Summary, summarise
from kvloom.loadtest.study.flags import add_outputs, need, parser
from kvloom.loadtest.study.results import console
from kvloom.version import __version__

if TYPE_CHECKING:
    from kvloom.loadtest.client.client import Client

LEAD = 20
"""Chunks that every stream has sent before prompts arrive."""
LEAD_SECONDS = 300.0


async def measure_arriving(client: Client, streams: Sequence[Job], prompts: Sequence[Job]) -> Summary:
    """Start the streams, send all prompts at once when all of them flow, and end them when the prompts have their first tokens.

    `ttft` is of the prompts; `itl` of the streams' gaps of which some part lies between the sending of the prompts and the last
    of their first tokens. A stream that failed, or ended before that, counts as failed; on a server that does not let all of
    them flow together they all do, and no prompt is sent.
    """
    flowing = [Record.of(index, job) for index, job in enumerate(streams)]
    tasks = [asyncio.create_task(client.send(job, record)) for job, record in zip(streams, flowing)]
    try:
        begun = time.perf_counter()
        while any(len(record.chunks) < LEAD for record in flowing) and not any(task.done() for task in tasks):
            if time.perf_counter() - begun > LEAD_SECONDS:
                return replace(summarise([]), failed=len(streams))
            await asyncio.sleep(0.01)
        arrived = [Record.of(index, job) for index, job in enumerate(prompts)]
        await asyncio.gather(*(client.send(job, record) for job, record in zip(prompts, arrived)))
        ended = sum(task.done() for task in tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    summary = summarise(arrived)
    return replace(summary, itl=Spread.of(gaps(flowing, arrived)), failed=summary.failed + ended)


def gaps(streams: Sequence[Record], prompts: Sequence[Record]) -> list[float]:
    """Seconds between chunks of streams while prompts were computed; of a stream that sent no more, until the end of that."""
    begin, end = min(record.sent for record in prompts), max((record.chunks or [record.sent])[0] for record in prompts)
    instants = [[*record.chunks, *([end] if record.chunks and record.chunks[-1] < end else [])] for record in streams]
    return [late - early for chunks in instants for early, late in pairwise(chunks) if late > begin and early < end]


FIRST_TOKEN, LAST_TOKEN = 300, 48_000
"""Token ids that are ordinary text in SmolLM2's vocabulary."""


def jobs(case: Case, seed: int) -> list[Job]:
    """The case's requests: the same for every server, different for every seed."""
    count, source = case.concurrency if case.arriving else case.requests, random.Random(f"{case.name}-{seed}")
    return [_job(source, case.inputs, case.outputs) for _ in range(count)]


def arrivals(case: Case, seed: int) -> list[Job]:
    """The prompts that arrive beside them."""
    source = random.Random(f"{case.name}-{seed}-arriving")
    return [_job(source, case.arriving, 1) for _ in range(case.requests)]


def _job(source: random.Random, inputs: int, outputs: int) -> Job:
    return Job(prompt=[source.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(inputs)], output_tokens=outputs)


async def measure(url: str, case: Case, seed: int) -> Summary:
    from kvloom.loadtest.client.client import Client
    from kvloom.loadtest.client.drive import closed_loop

    async with Client(url, model_name(url)) as client:
        if case.arriving:
            return await measure_arriving(client, jobs(case, seed), arrivals(case, seed))
        return summarise(await closed_loop(client, jobs(case, seed), case.concurrency))


def one_line(summary: Summary) -> str:
    times = (("TTFT", summary.ttft), ("TPOT", summary.tpot), ("ITL", summary.itl))
    parts = [f"{name} p50 {spread.p50 * 1e3:.1f} ms" for name, spread in times]
    return "  ".join([*parts, f"{summary.output_throughput:.1f} tok/s", f"{summary.wall:.1f} s", f"failed {summary.failed}"])


@contextlib.contextmanager
def busy(processes: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many processes that want a core each, pinned to none, while the context and this process last."""
    program = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
    found = [subprocess.Popen([sys.executable, "-S", "-c", program]) for _ in range(processes)]
    try:
        yield found
    finally:
        for process in found:
            process.kill()
            process.wait()


def measure_server(server: Server, cases: Sequence[Case], seed: int, logs: Path) -> list[Run]:
    """One round of one server."""
    runs = []
    with running(server, logs) as (url, start_seconds, pid):
        asyncio.run(measure(url, Case("warm-up", 2, 256, 8, 4), seed))
        for case in cases:
            with busy(case.busy):
                summary = asyncio.run(measure(url, case, seed))
            memory = None if pid is None else resident(pid)
            runs.append(Run(server.name, case.name, seed, start_seconds, summary, memory))
            console.print(f"round {seed}  {server.name:8} {case.name:5} {one_line(summary)}", soft_wrap=True)
    return runs


def recorded(path: Path) -> tuple[list[Run], dict[str, About]]:
    """Runs that an earlier measurement wrote, and what it knew of the servers. Raises SystemExit if the file holds none."""
    try:
        content = json.loads(path.read_text())
        rows, known = (content, {}) if isinstance(content, list) else (content["runs"], content["about"])
        runs = [Run(**{**row, "summary": Summary.from_dict(row["summary"])}) for row in rows]
        return runs, {name: About(**values) for name, values in known.items()}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SystemExit(f"{path} does not hold recorded runs: {error}") from None


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser("bench peers", __doc__, allow_abbrev=True)
    several: dict[str, Any] = {"action": "append", "default": []}
    made.add_argument("--start", **several, metavar="NAME=COMMAND", help="a peer to start; {port} is filled in")
    made.add_argument("--url", **several, metavar="NAME=URL", help="a peer that already runs")
    made.add_argument("--model", default="smollm2", help="what kvloom serves")
    made.add_argument("--kvloom", default="", help="further flags for kvloom serve")
    made.add_argument("--also", **several, metavar="kvloom-NAME=FLAGS", help="a further kvloom: 'kvloom-bf16=--weights bf16'")
    made.add_argument("--precision", **several, metavar="NAME=TEXT", help="of a server's weights: vllm=bf16; in every head")
    made.add_argument("--version", **several, metavar="NAME=COMMAND", help="prints a server's version and build flags")
    made.add_argument("--rounds", type=int, default=3)
    more = "; ".join(f"{what}: {_names(cases)}" for what, cases in MORE.items())
    made.add_argument("--cases", help=f"which of: {_names(CASES)} (the default; with --from all that were run); {more}")
    made.add_argument("--only", default="", help="comma-separated servers to run, kvloom among them (default: all)")
    made.add_argument("--out", type=Path, default=Path("results/peers"), help="folder for raw results and logs")
    again = "report recorded runs (runs.json)"
    made.add_argument("--from", type=Path, nargs="+", dest="recorded", metavar="FILE", help=again)
    made.add_argument("--plot", type=Path, help="also draw the comparison into this PNG file")
    add_outputs(made, rows="", table="also write the table into this file")
    return made.parse_args(argv)


def _names(cases: Sequence[Case]) -> str:
    return ",".join(case.name for case in cases)


def named(option: str, texts: Sequence[str]) -> dict[str, str]:
    """NAME=... of a flag that may be repeated. Raises SystemExit."""
    found = {}
    for text in texts:
        name, _, rest = text.partition("=")
        if not name or not rest or name in found:
            raise SystemExit(f"--{option} {text!r} is not NAME=..., once for each name")
        found[name] = rest
    return found


def servers(args: argparse.Namespace) -> list[Server]:
    """What is measured: kvloom, further kvlooms, peers."""
    ours = {"kvloom": args.kvloom, **named("also", args.also)}
    if wrong := [name for name in ours if not name.startswith("kvloom")]:
        raise SystemExit(f"--also {wrong[0]}=... is a kvloom; let its name begin with kvloom-")
    serve = f"{sys.executable} -m kvloom.server.cli serve {shlex.quote(args.model)} --port {{port}} "
    commands = {**{name: serve + flags for name, flags in ours.items()}, **named("start", args.start)}
    found = [Server(name, command=command) for name, command in commands.items()]
    found += [Server(name, url=url) for name, url in named("url", args.url).items()]
    wanted = [name for name in args.only.split(",") if name]
    return [server for server in found if not wanted or server.name in wanted]


def known_of(args: argparse.Namespace, chosen: Sequence[Server]) -> dict[str, About]:
    """Precision, command and version of every server. Raises SystemExit for a name that is none, or a command that fails."""
    own = {} if "--weights" in args.kvloom or args.model != "smollm2" else {"kvloom": OWN_PRECISION}
    precision, versions = own | named("precision", args.precision), named("version", args.version)
    names = [server.name for server in servers(argparse.Namespace(**{**vars(args), "only": ""}))]
    if unknown := [name for name in {**precision, **versions} if name not in names]:
        raise SystemExit(f"there is no server named {', '.join(unknown)}; there are {', '.join(names)}")
    about = {}
    for server in chosen:
        ours = server.name.startswith("kvloom")
        version = f"kvloom {__version__}, commit {commit()}" if ours else said(versions.get(server.name, ""))
        command = (server.command or server.url or "").replace(f"{sys.executable} -m kvloom.server.cli", "kvloom").strip()
        about[server.name] = About(precision.get(server.name, ""), command, version)
    return about


def said(command: str) -> str:
    """What a command prints of itself, in one line. Raises SystemExit if it cannot be run."""
    if not command:
        return ""
    try:
        run = subprocess.run(shlex.split(command), capture_output=True, text=True, timeout=120)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise SystemExit(f"--version: {command} cannot be run: {error}") from None
    return " ".join((run.stdout + run.stderr).split())[:500]


def measure_all(args: argparse.Namespace, cases: Sequence[Case]) -> tuple[list[Run], dict[str, About]]:
    """Every round of every server; what is measured so far is on disk after each."""
    runs: list[Run] = []
    chosen = servers(args)
    about = known_of(args, chosen)
    for seed in range(args.rounds):
        for server in chosen:
            runs += measure_server(server, cases, seed, args.out)
            content = {"about": {name: asdict(known) for name, known in about.items()}, "runs": [asdict(run) for run in runs]}
            (args.out / "runs.json").write_text(json.dumps(content, indent=1))
    return runs, about


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit code."""
    args = parse(argv)
    known = {case.name: case for case in (*CASES, *(case for cases in MORE.values() for case in cases))}
    asked = _names(CASES) if args.cases is None else args.cases
    if unknown := [name for name in asked.split(",") if name not in known]:
        raise SystemExit(f"no case named {', '.join(unknown)}; there are {', '.join(known)}")
    cases = [known[name] for name in asked.split(",")]
    if args.plot and not any(case in CASES for case in cases):
        raise SystemExit(f"--plot draws {_names(CASES)}; none of them is among --cases")
    need(*([] if args.recorded else ["aiohttp"]), *(["matplotlib"] if args.plot else []))
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        found = [recorded(file) for file in args.recorded] if args.recorded else [measure_all(args, cases)]
    except StartError as error:
        raise SystemExit(str(error)) from None
    runs = [run for part, _ in found for run in part]
    about = {name: told for _, part in found for name, told in part.items()}
    if args.recorded and args.cases is None:
        cases = [case for name, case in known.items() if any(run.case == name for run in runs)]
    text = table(runs, cases, about)
    console.print(text, soft_wrap=True)
    if args.plot:
        plot(runs, [case for case in cases if case in CASES], args.plot, about)
    if args.publish:
        publish(args.publish, *cells(runs, cases, about), note(runs, about))
    if args.markdown:
        how = " ".join((__doc__ or "").split("\n\n")[2].split())
        args.markdown.write_text(f"# kvloom beside its peers\n\n{how}\n\n{text}\n")
    return 1 if any(run.summary.failed for run in runs) else 0
