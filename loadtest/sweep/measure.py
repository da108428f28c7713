"""Every combination of a sweep in turn: its server started, put under load, and asked for its quality over HTTP."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from kvloom.engine.errors import KVLoomError
from kvloom.loadtest.client.servers import Server, Started, StartError, running
from kvloom.loadtest.load.plan import Plan, parse
from kvloom.loadtest.load.run import bench
from kvloom.loadtest.load.terminal import show
from kvloom.loadtest.quality.scoring import ProbeError, Scores, Window, compare, score, windows
from kvloom.loadtest.study.flags import FAILED, complain
from kvloom.loadtest.study.intervals import wilson
from kvloom.loadtest.sweep.grid import RESULTS, Point, Result
from kvloom.loadtest.workloads.corpus import TextSource


class Prober:
    """Asks every server the same. The first server that can be probed for agreement is the reference of the others."""

    def __init__(self, args: argparse.Namespace, plan: Plan, console: Console) -> None:
        """`plan`: the load, whose tokenizer, seed and key the probes share. Raises ConfigError for a wrong --quality-arg."""
        self._args = args
        self._console = console
        self._plan = plan
        self._windows: list[Window] = []
        self._reference: tuple[str, Scores] | None = None
        words = ["--workload", "needle", "--num-requests", str(args.quality_requests), "--concurrency", "1", "--warmup", "0"]
        words += ["--tokenizer", plan.tokenizer, "--seed", str(plan.seed), *args.quality_arg]
        self._needle_plan = replace(parse(words), api_key=plan.api_key) if "needle" in args.quality else None

    def probe(self, url: str, model: str, folder: Path, result: Result) -> None:
        """Put the figures of every probe that was asked for into the result. `folder`: of the run under load."""
        work: dict[str, Callable[[], dict[str, Any]]] = {
            "needle": lambda: self._needle(url, folder / "needle"),
            "agreement": lambda: self._agreement(url, model, result.label),
        }
        for name in dict.fromkeys(self._args.quality):
            try:
                result.quality[name] = work[name]()
            except ProbeError as error:
                result.quality[name] = {"error": str(error)}

    def _needle(self, url: str, folder: Path) -> dict[str, Any]:
        """Share of right answers to questions whose answer stands somewhere in a long text."""
        assert self._needle_plan is not None
        outcome = bench(replace(self._needle_plan, base_url=url, out=folder), self._console)
        if outcome.interrupted:
            raise KeyboardInterrupt
        (stage,) = outcome.stages
        if stage["correct_rate"] is None:
            raise ProbeError(f"no answer of the needle probe could be checked; {stage['failed']} requests failed")
        completed = stage["completed"]
        return {"correct": stage["correct_rate"], "n": completed, "failed": stage["failed"],
                "interval": wilson(stage["correct_rate"] * completed, completed)}  # fmt: skip

    def _agreement(self, url: str, model: str, label: str) -> dict[str, Any]:
        """Perplexity, and how near the distributions are to the reference's."""
        args = self._args
        if not self._windows:
            source = TextSource.load(self._plan.tokenizer)
            self._windows = windows(source, args.quality_texts, args.quality_context, args.quality_tokens)
        found = score(url, model, self._windows, self._plan.api_key)
        if self._reference is None:
            self._reference = (label, found)
        name, reference = self._reference
        return {"reference": name, "context": args.quality_context, **asdict(compare(reference, found))}


class Sweep:
    """One sweep. `results` holds what was measured, also after Ctrl-C."""

    def __init__(self, args: argparse.Namespace, load: Sequence[str], plan: Plan) -> None:
        self._load = list(load)
        self._plan = plan
        self._out: Path = args.out
        self._console = Console(highlight=False)
        self._prober = Prober(args, plan, self._console)
        self.results: list[Result] = []
        self.interrupted = False

    def run(self, todo: Sequence[Point]) -> None:
        """Measure every point; ends early on Ctrl-C."""
        (self._out / "logs").mkdir(parents=True, exist_ok=True)
        for i, point in enumerate(todo):
            self._console.print(f"{i + 1} of {len(todo)}: {point.label}", markup=False)
            result = Result(point.server, dict(point.settings), point.label, point.slug)
            self.results.append(result)
            try:
                self._measure(point, result)
            except KeyboardInterrupt:
                result.outcome, self.interrupted = "interrupted", True
            self._save()
            if result.message:
                complain(f"{point.label}: {result.message}", FAILED)
            if self.interrupted:
                return

    def _measure(self, point: Point, result: Result) -> None:
        try:
            with running(Server(point.slug, point.command), self._out / "logs") as started:
                self._under_load(started, result)
        except StartError as error:
            result.outcome = "refused" if error.refused else "failed"
            result.message = error.words if error.refused else str(error)
        except KVLoomError as error:
            result.outcome, result.message = "failed", str(error)

    def _under_load(self, started: Started, result: Result) -> None:
        result.start_seconds = started.seconds
        folder = self._out / result.folder
        outcome = bench(replace(self._plan, base_url=started.url, out=folder), self._console)
        show(self._console, outcome.stages)
        if outcome.interrupted:
            raise KeyboardInterrupt
        if outcome.lost or not all(stage["completed"] for stage in outcome.stages):
            result.message = "the server went away" if outcome.lost else "a load completed no request"
            return
        self._prober.probe(started.url, outcome.model, folder, result)
        result.outcome = "measured"

    def _save(self) -> None:
        content = {"interrupted": self.interrupted, "load": self._load, "results": [asdict(result) for result in self.results]}
        (self._out / RESULTS).write_text(json.dumps(content, indent=1) + "\n")
