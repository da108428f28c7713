"""What a check has found, stage by stage, and the time each of them may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

import torch

from kvloom.engine.device import out_of_memory

Verdict = Literal["right", "WRONG", "bar met", "bar missed", "measured", "left out"]


class Finding(NamedTuple):
    """One line of the table."""

    stage: str
    what: str
    verdict: Verdict
    figure: str = ""
    """What was measured, or why nothing was."""
    bar: str = ""
    """What was to be reached."""


class Deadline:
    """The end of a stage. A stage asks before each piece of work, and tells what it has left out."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    @property
    def left(self) -> float:
        """Seconds, never below 0."""
        return max(0.0, self._end - self._clock())


class Stage(NamedTuple):
    """A part of the check. seconds: at most, before it leaves out the rest; run: yields what it finds."""

    name: str
    seconds: float
    run: Callable[[Deadline], Iterator[Finding]]


def carried_out(stages: Iterable[Stage], total: float, told: Callable[[Finding], None]) -> list[Finding]:
    """Run stages in turn within `total` seconds. What raises ends its stage, as WRONG unless memory ran out, and the next
    begins."""
    whole, found = Deadline(total), list[Finding]()

    def take(finding: Finding) -> None:
        found.append(finding)
        told(finding)

    for stage in stages:
        if not whole.left:
            take(Finding(stage.name, "all of it", "left out", "no time was left"))
            continue
        try:
            for finding in stage.run(Deadline(min(stage.seconds, whole.left))):
                take(finding)
        except torch.OutOfMemoryError as error:
            asked = out_of_memory(error)
            take(Finding(stage.name, "the rest of it", "left out", f"{asked} did not fit into the GPU's memory"))
        except Exception as error:
            take(Finding(stage.name, "what ended it", "WRONG", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
    return found


def table(findings: Iterable[Finding]) -> str:
    """Columns of text."""
    rows = [Finding._fields, *findings]
    widths = [max(len(row[i]) for row in rows) for i in range(len(Finding._fields))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
