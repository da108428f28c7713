"""What a workload is: a name, options that are described once, and a function from (options, text, seed, count) to jobs.

Promises of every workload: the same options, text, seed and count give the same jobs; `count` jobs come out (fewer only where
a trace has fewer), the first ones do not depend on how many follow, and a job's sharing figures are what `sharing` finds in
the prompts themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kvloom.engine.bounds import wrong
from kvloom.engine.errors import ConfigError
from kvloom.loadtest.client.record import Job
from kvloom.loadtest.workloads.corpus import TextSource
from kvloom.loadtest.workloads.sharing import with_sharing

Build = Callable[[Any, TextSource, int, int], list[Job]]
"""(options, text, seed, count) -> jobs. Raises ConfigError."""

LONGEST = 1 << 20
"""Tokens of a prompt or of an answer, beyond any model that is served today: more is a slip of the keyboard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One kind of load."""

    name: str
    help: str
    """One line."""
    options: type
    """A frozen dataclass; the docstring of a field is its help on the command line (`engine.config.option_fields`)."""
    make: Build
    endless: bool = True
    """Whether other seeds make other prompts; if not, warming up must not use them up."""

    def build(self, options: Any, text: TextSource, seed: int, count: int, *, chat: bool = False) -> list[Job]:
        """`count` jobs; `chat`: with text where token ids would be. Raises ConfigError for options that cannot work."""
        if count < 1:
            raise ConfigError(f"{count} requests were asked for; allowed: 1 or more")
        if not isinstance(options, self.options):
            raise ConfigError(f"the workload {self.name} takes {self.options.__name__}, not {type(options).__name__}")
        jobs = self.make(options, text, seed, count)
        return with_sharing([_as_text(job, text) for job in jobs] if chat else jobs, text)


def workload(name: str, options: type, about: str, *, endless: bool = True) -> Callable[[Build], Workload]:
    """Makes a workload of the function that builds its jobs."""
    return lambda make: Workload(name=name, help=about, options=options, make=make, endless=endless)


def _as_text(job: Job, text: TextSource) -> Job:
    """The job with text for its token ids, of as many tokens, or nearly: some neighbours merge when they are read again."""
    if isinstance(job.prompt, str):
        return job
    said = ""
    for _ in range(3):
        said = text.decode(text.encode(said)[: len(job.prompt)] if said else job.prompt).replace("\ufffd", "")
    return replace(job, prompt=said)


class Options:
    """Settings whose fields are declared with their ranges (`engine.bounds.bounded`)."""

    __slots__ = ()

    def __post_init__(self) -> None:
        """Raises ConfigError for a value of another type, or out of its range."""
        if (found := wrong(self)) is not None:
            value = f"{found.value:g}" if isinstance(found.value, (int, float)) else repr(found.value)
            raise ConfigError(f"{found.name} is {value}; allowed: {found.allowed}")


def require(options: object, low: float, high: float, name: str) -> None:
    """Raise ConfigError unless an option lies within [low, high], where that follows from another option."""
    if not low <= (value := getattr(options, name)) <= high:
        raise ConfigError(f"{name} is {value:g}; allowed: {low:g} to {high:g}")
