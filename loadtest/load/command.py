"""`kvloom bench serve`: load on a running server, and what it made of it.

    kvloom bench serve --base-url http://127.0.0.1:8000 --workload random --input-len 512 --output-len 64 --concurrency 8
    kvloom bench serve --workload file --file prompts.jsonl --endpoint chat --stages 2@30s,4@1m --percentiles 50,90,99.9
    kvloom bench serve --find-rate --slo ttft=500ms,tpot=50ms --slo-share 0.95

Writes summary.json, requests.jsonl, requests.csv and a report into --out. What sends (`serve_run`) and what draws (`report`) is
imported when the command line has been read: its help needs neither aiohttp nor matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from kvloom.engine.errors import ConfigError, KVLoomError
from kvloom.loadtest.load.plan import Plan, parse
from kvloom.loadtest.load.search import sentence
from kvloom.loadtest.load.terminal import failures, show
from kvloom.loadtest.study.flags import FAILED, INTERRUPTED, USAGE_ERROR, complain, need

if TYPE_CHECKING:
    from kvloom.loadtest.load.run import Outcome


def conclude(plan: Plan, outcome: Outcome, console: Console) -> int:
    """Print and report what was measured; returns the exit code."""
    if not outcome.stages:
        return complain("interrupted before anything was measured", INTERRUPTED)
    from kvloom.loadtest.report.pages import write_report

    show(console, outcome.stages)
    if outcome.search:
        console.print(sentence(outcome.search), soft_wrap=True)
    files = write_report(plan.out)
    console.print(
        f"written to {plan.out}: summary.json, requests.jsonl, requests.csv, {', '.join(file.name for file in files)}",
        soft_wrap=True,
    )
    code = 0
    for stage in outcome.stages:
        if line := failures(stage):
            complain(line, code)
        if not stage["completed"] and not outcome.interrupted:
            code = FAILED
    if outcome.interrupted:
        return complain(f"interrupted; what was measured until then is in {plan.out}", INTERRUPTED)
    if outcome.lost:
        sent = sum(stage["completed"] for stage in outcome.stages)
        return complain(
            f"the server at {plan.base_url} went away after {sent} completed requests; those are in {plan.out}", FAILED
        )
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    console = Console(highlight=False)
    try:
        plan = parse(argv)
        need("aiohttp", "matplotlib")
        from kvloom.loadtest.load.run import bench

        return conclude(plan, bench(plan, console), console)
    except ConfigError as error:
        return complain(error, USAGE_ERROR)
    except (KVLoomError, OSError) as error:
        return complain(error, FAILED)
