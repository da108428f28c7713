"""One runner for every study of `kvloom eval`: flags, engine, cases in turn, rows on disk, table, Ctrl-C.

A study is a class that says its columns, its cases and how one is measured:

    cases     what there will be rows of; those that the results hold already (--resume) are left out
    prepare   once for all cases of a group that are left: prompts into the prefix cache, dense distributions
    measure   one case -> its row

A row holds what tells its case from others, the settings of the run that `identity` names, the model and the machine, and the
figures. Whatever ends a run early, the rows so far are written and printed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvloom.engine import LLM
from kvloom.loadtest.study import flags
from kvloom.loadtest.study.flags import INTERRUPTED
from kvloom.loadtest.study.machine import describe
from kvloom.loadtest.study.results import Column, Results, Row, console

__all__ = ["console"]

LINE_SECONDS = 10.0
"""Where there is no terminal, a line of progress at most so often."""


def engine(args: argparse.Namespace, **more: Any) -> LLM:
    """The model of a command line with `flags.add_engine`, on the CPU, where studies read what they measure. Raises ModelError
    or ConfigError.

    Shadow passes are off: they are read by nobody here, and would count as bytes read.
    """
    names = ("dtype", "weights", "backend", "kv_memory", "threads")
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return LLM(args.model, **{**given, "device": "cpu", "shadow_interval": 0, **more})


def about(llm: LLM) -> Row:
    """What every row says of the model and the machine."""
    model = llm.model
    known = {"dtype": model.dtype, "weights": model.weights, "backend": model.backend}
    return {"model": Path(model.name).name, **known, "machine": describe()}


def described(llm: LLM) -> str:
    """The same in a sentence, for the end of a report."""
    told = "{model}, {dtype}, weights {weights}, {backend} kernels. Measured {machine}."
    return told.format(**about(llm))


class Steps:
    """Progress over a known number of steps, each with a name: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=total)
        self._done, self._total, self._clock, self._said = 0, total, clock, -LINE_SECONDS

    def __enter__(self) -> Steps:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def name(self, what: str) -> None:
        """What is being done now."""
        self._bar.update(self._task, description=what)
        if self._bar.disable and self._clock() - self._said >= LINE_SECONDS:
            self._said = self._clock()
            console.print(f"{self._done}/{self._total} {what}", markup=False)

    def done(self, steps: int = 1) -> None:
        """So many steps more."""
        self._done += steps
        self._bar.advance(self._task, steps)


def finish(results: Results, measure: Callable[[], None]) -> int:
    """Run a measurement to its end, to Ctrl-C or to an error; print and write what there is. Returns the exit code."""
    code = 0
    try:
        measure()
    except KeyboardInterrupt:
        code = INTERRUPTED
        console.print(f"[yellow]interrupted: {len(results.rows)} rows were measured")
    finally:
        if results.rows:
            results.conclude()
            for path in (results.json, results.markdown, results.publish):
                if path is not None:
                    console.print(f"written: {path}")
    return code


@dataclass(frozen=True, slots=True)
class Case:
    """One row to come."""

    what: Any
    """Is measured: a method, a retention, a task."""
    label: str
    row: Row = field(default_factory=dict)
    """What tells it from other cases."""
    group: Hashable = None
    """Cases of a group share what `prepare` computes."""


class Study:
    """What a study says of itself; `command` makes a command of it."""

    title: ClassVar[str]
    columns: ClassVar[Sequence[Column]]
    identity: ClassVar[Sequence[str]]
    """Keys that tell one row from another."""
    llm: LLM
    note = ""
    """Said under the table: settings, what is in brackets, model and machine."""
    sort_by: str = ""
    """Key that rows are sorted by at the end; empty: they stay in the order of measuring."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Checks what can be checked before a model is loaded, then loads it. Raises ConfigError, ModelError."""
        self.args = args
        self.cases: Sequence[Case] = ()

    @staticmethod
    def add_flags(made: argparse.ArgumentParser) -> None:
        """All flags of the command."""

    def row(self, case: Case) -> Row:
        """A case's row before anything is measured."""
        known = {**case.row, **about(self.llm)}
        settings = {key: getattr(self.args, key) for key in self.identity if key not in known and hasattr(self.args, key)}
        return {**case.row, **settings, **about(self.llm)}

    def choose(self, missing: Sequence[Case]) -> Sequence[Case]:
        """What is measured so that these cases get rows: they, and what they are compared with."""
        return missing

    def preparations(self, group: Hashable) -> int:
        """Steps of progress that `prepare` takes."""
        return 0

    def measurements(self, case: Case) -> int:
        """Steps of progress that `measure` takes."""
        return 1

    def prepare(self, group: Hashable, steps: Steps) -> None:
        """What the cases of a group share."""

    def measure(self, case: Case, steps: Steps) -> Row:
        """The figures of a case. Raises ConfigError or InvalidRequestError."""
        raise NotImplementedError

    def conclude(self, results: Results) -> None:
        """What else is made of the rows, once they are printed and written."""


def run(study: Study, results: Results) -> None:
    """Measure every case that the results lack, group by group."""
    todo = study.choose([case for case in study.cases if results.find(study.row(case)) is None])
    groups = list(dict.fromkeys(case.group for case in todo))
    with Steps(sum(map(study.preparations, groups)) + sum(map(study.measurements, todo))) as steps:
        for group in groups:
            study.prepare(group, steps)
            for case in todo:
                if case.group == group:
                    steps.name(case.label)
                    results.add({**study.row(case), **study.measure(case, steps)})
    results.rows.sort(key=lambda row: row[study.sort_by] if study.sort_by else 0)


def command(prog: str, study: type[Study]) -> Callable[[Sequence[str] | None], int]:
    """`main` of a study: measures, prints and writes; returns the exit code. Description: that of the study's module."""

    def main(argv: Sequence[str] | None = None) -> int:
        made = flags.parser(prog, sys.modules[study.__module__].__doc__)
        study.add_flags(made)
        args = made.parse_args(argv)
        begun = study(args)
        files = args.json, args.markdown, args.publish
        results = Results(study.columns, study.identity, study.title, *files, begun.note).resumed(args.resume)
        code = finish(results, lambda: run(begun, results))
        begun.conclude(results)
        return code

    return main
