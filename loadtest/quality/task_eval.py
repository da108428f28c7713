"""Long-context tasks in the manner of RULER, by method, length and depth.

    kvloom eval tasks --tasks needle,documents --lengths 1000,2000,4000,7000 --methods sink_window,token_select --budgets 256 \\
        --json FILE --markdown FILE --out FOLDER

Writes a heat map of length x depth per task into --out. The default model does needle and number almost without fault up to
7,000 tokens, and most of multi_key and documents; multi_value and tracking are hard for it (see the dense rows).
"""

from __future__ import annotations

import argparse
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvloom.engine.errors import ConfigError
from kvloom.loadtest.quality import spec, text
from kvloom.loadtest.quality.decoding import prefill
from kvloom.loadtest.quality.spec import COST_COLUMNS, METHOD_COLUMNS
from kvloom.loadtest.quality.tasks import TASKS, Trial, ask, haystacks, trials
from kvloom.loadtest.study.flags import add, need, numbers
from kvloom.loadtest.study.pictures import picture
from kvloom.loadtest.study.results import Column, Results, Row
from kvloom.loadtest.study.runner import Case, Steps, Study, command, console, described

DEPTHS = 8


class Grid:
    """Mean score by length and depth; cells without trials are NaN."""

    def __init__(self, lengths: Sequence[int], depths: int = DEPTHS) -> None:
        self.lengths = list(lengths)
        self._sums, self._counts = (np.zeros((depths, len(lengths))) for _ in range(2))

    def add(self, length: int, depth: float, score: float) -> None:
        """depth: from 0, the beginning of the text, to 1."""
        cell = min(int(depth * len(self._sums)), len(self._sums) - 1), self.lengths.index(length)
        self._sums[cell] += score
        self._counts[cell] += 1

    @property
    def means(self) -> npt.NDArray[np.float64]:
        """[depths, lengths]"""
        with np.errstate(invalid="ignore"):
            return self._sums / np.where(self._counts == 0, np.nan, self._counts)


def draw(path: Path, title: str, grids: Mapping[str, Grid]) -> None:
    """Write a PNG with a panel per grid. Raises ValueError without any."""
    if not grids:
        raise ValueError("there is no grid to draw")
    across = min(4, len(grids))
    down = -(-len(grids) // across)
    with picture(path, down, across, (1.2 + 3.0 * across, 0.8 + 2.9 * down)) as (figure, axes):
        for axis in axes.flat[len(grids) :]:
            axis.axis("off")
        for axis, (name, grid) in zip(axes.flat, grids.items()):
            means = grid.means
            image = axis.imshow(means, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            for (row, column), value in np.ndenumerate(means):
                if not np.isnan(value):
                    axis.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=7)
            axis.set_title(name, fontsize=9)
            axis.set_xticks(range(len(grid.lengths)), [f"{length:,}" for length in grid.lengths], fontsize=8)
            axis.set_yticks(range(len(means)), [f"{100 * i // len(means)}%" for i in range(len(means))], fontsize=8)
        figure.supxlabel("tokens of context")
        figure.supylabel("depth of the fact")
        figure.suptitle(title)
        figure.colorbar(image, ax=axes, label="right answers", shrink=0.8)


class Tasks(Study):
    """Measures methods on every task at every length."""

    title = "Long-context tasks"
    columns = (
        Column("task", "task"),
        Column("context", "context"),
        *METHOD_COLUMNS,
        Column("accuracy", "accuracy", ".1%"),
        Column("trials", "trials"),
        *COST_COLUMNS,
    )
    identity = ("model", "dtype", "weights", "task", "method", "budget", "options", "context", "batch", "haystacks", "seed")

    @staticmethod
    def add_flags(made: argparse.ArgumentParser) -> None:
        spec.add_flags(made)
        add(made, ("tasks", "needle,number,multi_key,documents", f"of {', '.join(TASKS)}"), kind=str)
        add(made, ("lengths", "1000,2000,4000,7000", "tokens of haystack"), kind=str)
        add(made, ("haystacks", 4, "per task and length"))
        add(made, ("out", Path("results/tasks"), "folder for heat maps"), kind=Path)

    def __init__(self, args: argparse.Namespace) -> None:
        tasks = args.tasks.split(",")
        if unknown := [task for task in tasks if task not in TASKS]:
            raise ConfigError(f"--tasks names {', '.join(unknown)}; allowed: {', '.join(TASKS)}")
        need("matplotlib")
        self.args, specs, lengths = args, spec.plan(args.methods, args.budgets), numbers(args.lengths, "--lengths")
        self.cases = [
            Case(one, f"{task} {length}: {one.label}", {"task": task, **one.row, "context": length}, (task, length))
            for task in tasks
            for length in lengths
            for one in specs
        ]
        self.llm = spec.engine_for(args, specs)
        self.text = text.real_text(self.llm, args.text)
        brackets = "95% intervals (Wilson's; by bootstrap over haystacks where answers are shares)"
        self.note = f"In brackets: {brackets}. {described(self.llm)}"

    def prepare(self, group: Hashable, steps: Steps) -> None:
        assert isinstance(group, tuple)
        task, length = group
        steps.name(f"{task} {length}: computing prompts")
        self.questions: list[Trial] = trials(task, self.llm.tokenizer, self.text, length, self.args.haystacks, self.args.seed)
        prefill(self.llm, haystacks(self.questions))

    def measure(self, case: Case, steps: Steps) -> Row:
        found = ask(self.llm, self.questions, case.what.kv, self.args.batch)
        steps.done()
        depths = [[answer.trial.depth, answer.score] for answer in found.answers]
        return {**found.figures(), **found.cost.figures(), "label": case.what.label, "scores": depths}

    def conclude(self, results: Results) -> None:
        for path in maps(self.args.out, results.rows):
            console.print(f"written: {path}")


def maps(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """A heat map per task, a panel per method. Returns what was written."""
    written = []
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        lengths = sorted({row["context"] for row in mine})
        grids: dict[str, Grid] = {}
        for row in mine:
            grid = grids.setdefault(row["label"], Grid(lengths, DEPTHS))
            for depth, score in row["scores"]:
                grid.add(row["context"], depth, score)
        written.append(folder / f"{task}.png")
        draw(written[-1], f"{task}: share of right answers", grids)
    return written


main = command("eval tasks", Tasks)
