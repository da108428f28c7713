"""The comparison of servers as a table and a picture: medians over rounds, ratios, and what each server was."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvloom.loadtest.figures import markdown
from kvloom.loadtest.load.measures import Summary
from kvloom.loadtest.study.machine import describe
from kvloom.loadtest.study.pictures import picture


@dataclass(frozen=True, slots=True)
class Case:
    """One load: requests of `inputs` random tokens and `outputs` generated ones, `concurrency` at a time."""

    name: str
    concurrency: int
    inputs: int
    outputs: int
    requests: int
    busy: int = 0
    """Processes beside it that want a core each, all the time."""
    arriving: int = 0
    """Tokens of prompts that arrive, `requests` at once, beside `concurrency` streams; 0: there are none but the case's own."""

    @property
    def metrics(self) -> Sequence[tuple[str, str]]:
        """What its rows show: what a busy process costs shows in means and tails, not in medians."""
        return ARRIVING_METRICS if self.arriving else BESIDE_METRICS if self in BESIDE else METRICS

    def __str__(self) -> str:
        if self.arriving:
            streams = f"{self.concurrency} stream{'s' * (self.concurrency > 1)}"
            return f"{self.name}: {self.requests} x {self.arriving} in, arriving beside {streams}"
        beside = f", beside {self.busy} busy process{'es' * (self.busy > 1)}" if self.busy else ""
        return f"{self.name}: {self.concurrency} x {self.inputs} in / {self.outputs} out, {self.requests} requests{beside}"


CASES = (
    Case("c1", 1, 512, 64, 8),
    Case("c8", 8, 512, 64, 24),
    Case("c16", 16, 1024, 64, 24),
    Case("long", 8, 7500, 64, 8),
)
BESIDE = tuple(Case(f"beside{busy}", 1, 512, 64, 16, busy) for busy in range(3))
"""Measured when asked for: one stream on a machine that somebody else uses too."""
ARRIVING = tuple(Case(f"arrive{prompts}", streams, 120, 4000, prompts, arriving=7270) for streams, prompts in ((1, 1), (8, 4)))
"""Measured when asked for: long prompts that come while others read."""
MORE = {"beside busy processes": BESIDE, "long prompts arriving beside streams": ARRIVING}
OWN_PRECISION = "4-bit codes, 8-bit activations"
"""Of the built-in model by default."""


@dataclass(frozen=True, slots=True)
class Run:
    """One case on one server in one round."""

    server: str
    case: str
    round: int
    start_seconds: float | None
    summary: Summary
    memory: float | None = None
    """MiB that it held after the case; None if that is not known."""


METRICS = (
    ("TTFT p50, ms", "ttft"),
    ("TPOT p50, ms", "tpot"),
    ("ITL p50, ms", "itl"),
    ("output tok/s", "output_throughput"),
    ("wall, s", "wall"),
)


BESIDE_METRICS = (
    ("TTFT mean, ms", "ttft.mean"),
    ("TPOT mean, ms", "tpot.mean"),
    ("ITL p50, ms", "itl.p50"),
    ("ITL p99, ms", "itl.p99"),
    ("ITL longest, ms", "itl.most"),
)


ARRIVING_METRICS = (
    ("gap of streams p50, ms", "itl.p50"),
    ("gap of streams p99, ms", "itl.p99"),
    ("longest gap, ms", "itl.most"),
    ("TTFT p50 of prompts, ms", "ttft"),
)


def value(run: Run, metric: str) -> float:
    """Of a metric such as wall, itl (its median, in ms) or itl.p99."""
    name, _, part = metric.partition(".")
    found = getattr(run.summary, name)
    return float(found) if isinstance(found, float) else float(getattr(found, part or "p50")) * 1e3


def median_of(runs: Sequence[Run], server: str, case: str, metric: str) -> float:
    """Over rounds."""
    found = [value(run, metric) for run in runs if (run.server, run.case) == (server, case)]
    return statistics.median(found) if found else float("nan")


def rounds_of(runs: Sequence[Run]) -> str:
    """How many rounds stand behind the medians, naming what was measured less often than the rest."""
    counts = Counter((run.server, run.case) for run in runs)
    most = max(counts.values())
    fewer = "".join(f" ({server} {case}: {count})" for (server, case), count in counts.items() if count < most)
    return f"{most} round{'s' * (most > 1)}{fewer}"


@dataclass(frozen=True, slots=True)
class About:
    """What a server was: said in every head of a column, in the picture and below the table."""

    precision: str = ""
    """Of weights and activations, such as bf16."""
    command: str = ""
    """That started it, or its URL."""
    version: str = ""
    """What --version's command printed: version and build flags."""


def titled(name: str, about: Mapping[str, About]) -> str:
    """A server's name with its precision."""
    known = about.get(name)
    return f"{name} ({known.precision})" if known and known.precision else name


def pairs(names: Sequence[str], about: Mapping[str, About]) -> list[tuple[str, str]]:
    """Which kvloom is set beside which peer: the plain one beside all, another beside those of its precision."""
    ours = [name for name in names if name.startswith("kvloom")]
    peers = [name for name in names if name not in ours]
    precision = {name: about[name].precision if name in about else "" for name in names}
    return [(own, peer) for own in ours for peer in peers
            if own == "kvloom" or (precision[own] and precision[own] == precision[peer])]  # fmt: skip


def cells(runs: Sequence[Run], cases: Sequence[Case], about: Mapping[str, About]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a row per case and metric, a column per server, ratios of medians."""
    names = list(dict.fromkeys(run.server for run in runs))
    beside = pairs(names, about)
    head = ["case", "metric", *(titled(name, about) for name in names), *(f"{own} / {peer}" for own, peer in beside)]
    rows = []
    for case in cases:
        title = str(case)
        for label, metric in case.metrics:
            medians = {name: median_of(runs, name, case.name, metric) for name in names}
            rows.append([title, label, *(f"{medians[name]:.1f}" for name in names), *ratios(medians, beside)])
            title = ""
    for title, unit, field in (("start to healthy", "s", "start_seconds"), ("resident after all", "MiB", "memory")):
        found = {name: last_of(runs, name, cases[-1].name, field) for name in names}
        if title == "start to healthy" or not all(map(math.isnan, found.values())):
            shown = ["-" if math.isnan(found[name]) else f"{found[name]:.1f}" for name in names]
            rows.append([title, unit, *shown, *ratios(found, beside)])
    return head, rows


def last_of(runs: Sequence[Run], server: str, case: str, field: str) -> float:
    """Median over rounds of what was known after their last case; NaN where nothing was."""
    values = [getattr(run, field) for run in runs if (run.server, run.case) == (server, case)]
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else math.nan


def ratios(medians: Mapping[str, float], beside: Sequence[tuple[str, str]]) -> list[str]:
    found = [medians[own] / medians[peer] if medians[peer] else math.nan for own, peer in beside]
    return ["-" if math.isnan(value) else f"{value:.2f}x" for value in found]


def note(runs: Sequence[Run], about: Mapping[str, About]) -> str:
    """What stands below the table: rounds, failures, and what each server was."""
    failed = sum(run.summary.failed for run in runs)
    lines = [f"Medians of {rounds_of(runs)}; {failed} failed requests. Measured {describe()}."]
    for name, known in about.items():
        said = [f"`{known.command}`" if known.command else "", " ".join(known.version.split())]
        lines.append(f"- {titled(name, about)}: {'; '.join(part for part in said if part) or 'nothing is known of it'}")
    return "\n\n".join([lines[0], "\n".join(lines[1:])]).strip()


def table(runs: Sequence[Run], cases: Sequence[Case], about: Mapping[str, About] | None = None) -> str:
    """The comparison in Markdown."""
    return f"{markdown(*cells(runs, cases, about or {}))}\n\n{note(runs, about or {})}"


def plot(runs: Sequence[Run], cases: Sequence[Case], path: Path, about: Mapping[str, About] | None = None) -> None:
    """One panel per metric, a group of bars per case, medians over rounds, as multiples of kvloom's figure."""
    names = list(dict.fromkeys(run.server for run in runs))
    panels = (("time to first token", "ttft"), ("time per output token", "tpot"), ("wall time", "wall"))
    with picture(path, 1, len(panels), (13, 4)) as (figure, axes):
        for axis, (title, metric) in zip(axes[0], panels):
            own = [median_of(runs, "kvloom", case.name, metric) for case in cases]
            for i, name in enumerate(names):
                medians = [median_of(runs, name, case.name, metric) / base for case, base in zip(cases, own)]
                places = [x + i * 0.8 / len(names) for x in range(len(cases))]
                bars = axis.bar(places, medians, 0.76 / len(names), label=titled(name, about or {}))
                axis.bar_label(bars, [f"{value:.1f}x" for value in medians], fontsize=8, padding=2)
            axis.set_xticks([x + 0.4 - 0.4 / len(names) for x in range(len(cases))])
            axis.set_xticklabels([f"{case.concurrency} x {case.inputs}" for case in cases])
            axis.set(title=f"{title}, kvloom = 1 (lower is better)", xlabel="concurrency x prompt tokens")
            axis.margins(y=0.12)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(names), frameon=False)
