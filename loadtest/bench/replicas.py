"""`kvloom bench replicas`: two replicas beside one engine of the same KV memory, and beside two engines behind other routers.

    right     answers that came whole; with rag, that also hold the fact that was asked for
    found     percent of prompt tokens whose KV was there: cached, or in segments of other prompts, repaired ones included
    TTFT      median and 99th percentile, ms

All setups get the same two cores, the same KV memory in all and the same requests: shared_prefix with 12 prefixes of 1,024
tokens, more than one replica's cache holds, and rag, which shuffles documents. Routers that are not named are left out (smg and
vllm-router: programs of packages of these names).

    kvloom bench replicas --routers smg=./env/bin/smg,vllm-router=./env/bin/vllm-router
    kvloom bench replicas --overhead         time per output token: one replica beside one engine, a thread each, both at once
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvloom.loadtest.client.servers import Server, free_port, running
from kvloom.loadtest.figures import publish
from kvloom.loadtest.study.flags import BenchError, add_model, add_outputs, count, parser
from kvloom.loadtest.study.results import Column, Row, cells, console, console_table

REUSE = "--kvshare-options '{\"verified\": true}'"
POLICIES = {
    "smg": ("cache_aware", "round_robin", "power_of_two"),
    "vllm-router": ("cache_aware",),
}
"""Of each router, those that are measured."""
WORKLOADS = {
    "shared_prefix": ["--groups", "12", "--prefix-len", "1024", "--output-len", "8"],
    "rag": ["--tenants", "1", "--documents", "24", "--extra-body", '{"kv": {"reuse": "approx"}}'],
}
COLUMNS = (
    Column("load", "load"), Column("served by", "setup"), Column("right", "right"), Column("found", "found", ".1f", 100),
    Column("TTFT p50, ms", "p50", ".0f"), Column("p99", "p99", ".0f"), Column("all done, s", "seconds", ".1f"),
)  # fmt: skip


OVERHEAD = (
    Column("streams", "streams"), Column("in one process, ms", "inside", ".2f"), Column("behind Ray, ms", "replica", ".2f"),
    Column("ratio", "ratio", ".3f"), Column("least", "least", ".3f"), Column("most", "most", ".3f"),
)  # fmt: skip


def overhead(model: str, rounds: int, logs: Path) -> tuple[list[Row], str]:
    """What Ray adds to the time per output token, by streams; the two servers answer in turn. And what memory it takes, in
    words."""
    names = {"inside": "--threads 1", "replica": "--threads 1 --replicas 1"}
    found = []
    with contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(running(Server(name, serve(model, 512, more)), logs)) for name, more in names.items()
        }
        pid = servers["replica"].pid
        memory = "" if pid is None else told_memory(pid)
        for streams in (1, 8):
            more = ["--input-len", "120", "--output-len", "96"]
            runs = [{name: run(one.url, "random", streams, streams, seed, more)["p50_tpot_ms"] for name, one in servers.items()}
                    for seed in range(rounds + 1)][1:]  # fmt: skip
            ratios = sorted(one["replica"] / one["inside"] for one in runs)
            medians = {name: statistics.median(one[name] for one in runs) for name in names}
            found.append({"streams": str(streams), **medians, "ratio": statistics.median(ratios), "least": ratios[0],
                          "most": ratios[-1]})  # fmt: skip
    return found, memory


def told_memory(front: int) -> str:
    """The memory of a server and of the processes that it began, in words: pages that several share count for each in part."""
    parents, megabytes = {}, {"the HTTP side": 0.0, "the replica": 0.0, "Ray's own processes": 0.0}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    mine = {front}
    while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= more
    for pid in mine:
        with contextlib.suppress(OSError):
            command = Path("/proc", str(pid), "cmdline").read_bytes()
            kind = "the HTTP side" if pid == front else "the replica" if b"ServeReplica" in command else "Ray's own processes"
            lines = Path("/proc", str(pid), "smaps_rollup").read_text().splitlines()
            megabytes[kind] += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    return "Memory at the start, MiB: " + ", ".join(f"{kind} {held:.0f}" for kind, held in megabytes.items()) + "."


def serve(model: str, mebibytes: int, more: str) -> str:
    """A command that serves the model with so much KV memory on a {port}."""
    python = f"{sys.executable} -m kvloom.server.cli"
    return f"{python} serve {model} --port {{port}} --kv-memory {mebibytes}MiB --trusted-proxies 127.0.0.1 {REUSE} {more}"


@contextlib.contextmanager
def behind(router: str, policy: str, model: str, mebibytes: int, logs: Path) -> Iterator[str]:
    """Two engines, a core each, behind a router of somebody else's; its URL."""
    with contextlib.ExitStack() as stack:
        workers = []
        for core in range(2):
            command = f"taskset -c {core} {serve(model, mebibytes, '--threads 1')}"
            workers.append(stack.enter_context(running(Server(f"engine{core}", command), logs)).url)
        urls, telling = " ".join(workers), free_port()
        start = f"{router} launch" if Path(router).name == "smg" else router
        command = f"{start} --host 127.0.0.1 --port {{port}} --policy {policy} --prometheus-port {telling} --worker-urls {urls}"
        yield stack.enter_context(running(Server(f"{Path(router).name}-{policy}", command), logs)).url


@contextlib.contextmanager
def setup(name: str, routers: dict[str, str], model: str, mebibytes: int, logs: Path) -> Iterator[str]:
    """What is measured under that name; its URL. mebibytes: of KV, in all."""
    if name in ("one engine", "kvloom"):
        more, memory = ("--threads 2", mebibytes) if name == "one engine" else ("--replicas 2", mebibytes // 2)
        with running(Server(name.replace(" ", "-"), serve(model, memory, more)), logs) as started:
            yield started.url
        return
    router, policy = name.split(" ", 1)
    with behind(routers[router], policy, model, mebibytes // 2, logs) as url:
        yield url


def run(url: str, workload: str, requests: int, concurrency: int, seed: int, more: Sequence[str]) -> Row:
    """The summary of a load test of a server, and under `lines` what it wrote of every request. Raises BenchError."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "kvloom.server.cli", "bench", "serve", "--base-url", url, "--workload", workload,
                   "--num-requests", str(requests), "--concurrency", str(concurrency), "--seed", str(seed), "--out", folder,
                   "--ready-timeout", "60", "--scrape-interval", "0", *more]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
        if done.returncode:
            raise BenchError(f"the load test ended with {done.returncode}: {done.stderr.strip()[-500:]}")
        told: Row = json.loads((Path(folder) / "summary.json").read_text())
        lines = (Path(folder) / "requests.jsonl").read_text().splitlines()
    return {**told, "lines": [json.loads(line) for line in lines]}


def load(url: str, workload: str, requests: int, concurrency: int, seed: int) -> Row:
    """What a load test came to. Raises BenchError."""
    told = run(url, workload, requests, concurrency, seed, ["--endpoint", "chat", *WORKLOADS[workload]])
    kv = [line.get("kv") or {} for line in told["lines"]]
    reused = sum(one.get("reused_tokens", 0) + one.get("recomputed_tokens", 0) for one in kv)
    return {
        "completed": told["completed"], "asked": requests, "correct": told["correct_rate"], "p50": told["p50_ttft_ms"],
        "p99": told["p99_ttft_ms"], "seconds": told["duration"],
        "found": (told["cached_tokens"] + reused) / told["total_input_tokens"],
    }  # fmt: skip


def summary(workload: str, name: str, runs: Sequence[Row]) -> Row:
    """One row of several runs: counts of all, medians of the rest."""
    asked, whole = sum(run["asked"] for run in runs), sum(run["completed"] for run in runs)
    correct = [run["correct"] for run in runs if run["correct"] is not None]
    right = f"{whole} of {asked}" + (f", {100 * statistics.fmean(correct):.0f}% say so" if correct else "")
    medians = {key: statistics.median(run[key] for run in runs) for key in ("found", "p50", "p99", "seconds")}
    return {"load": workload, "setup": name, "right": right, **medians}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    made = parser("bench replicas", __doc__)
    add_model(made)
    made.add_argument("--routers", default="", metavar="NAME=PROGRAM,...", help="smg and vllm-router, where they are")
    made.add_argument("--kv-mib", type=count, default=512, help="KV memory in all (default: %(default)s)")
    made.add_argument("--requests", type=count, default=48, help="in a run (default: %(default)s)")
    made.add_argument("--concurrency", type=count, default=6, help="requests under way (default: %(default)s)")
    made.add_argument(
        "--rounds", type=count, default=2, help="runs of each; four times as many for --overhead (default: %(default)s)"
    )
    made.add_argument("--overhead", action="store_true", help="measure what Ray adds to the time per output token instead")
    add_outputs(made)
    args = made.parse_args(argv)
    routers = dict(pair.split("=", 1) for pair in args.routers.split(",") if "=" in pair)
    if unknown := set(routers) - set(POLICIES):
        raise BenchError(f"--routers names {', '.join(sorted(unknown))}; known: {', '.join(POLICIES)}")
    if args.overhead:
        with tempfile.TemporaryDirectory() as logs:
            rows, memory = overhead(args.model, 4 * args.rounds, Path(logs))
        table = cells(OVERHEAD, rows)
        note = f"{args.model}, 120 tokens in, 96 out, a thread each; medians of {4 * args.rounds} rounds. {memory}".strip()
        console.print(console_table(*table, "Time per output token"), note, sep="\n", soft_wrap=True)
        if args.publish:
            publish(args.publish, *table, note)
        return 0
    names = ["one engine", "kvloom", *(f"{router} {policy}" for router in routers for policy in POLICIES[router])]
    runs: dict[tuple[str, str], list[Row]] = {(workload, name): [] for workload in WORKLOADS for name in names}
    with tempfile.TemporaryDirectory() as logs:
        for seed in range(args.rounds):
            for workload, name in runs:  # each with caches of its own
                with setup(name, routers, args.model, args.kv_mib, Path(logs)) as url:
                    runs[workload, name].append(load(url, workload, args.requests, args.concurrency, seed))
    table = cells(COLUMNS, [summary(*key, found) for key, found in runs.items()])
    console.print(console_table(*table, "Replicas and routers"))
    if args.publish:
        note = (
            f"{args.model}, {args.kv_mib} MiB of KV in all, two cores; {args.requests} requests in each of {args.rounds} runs, "
            f"{args.concurrency} under way; median run."
        )
        publish(args.publish, *table, note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
