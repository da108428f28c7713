"""Every combination of a sweep in turn: its server started, put under load and probed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from kvloom.engine.errors import KVLoomError
from kvloom.loadtest.client.servers import Server, Started, StartError, running
from kvloom.loadtest.load.plan import Plan
from kvloom.loadtest.load.printout import show
from kvloom.loadtest.load.run import bench
from kvloom.loadtest.study.flags import FAILED, complain
from kvloom.loadtest.sweep.grid import Point
from kvloom.loadtest.sweep.probe import Prober
from kvloom.loadtest.sweep.results import RESULTS, Result


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
