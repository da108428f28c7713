"""The report on one run, and the one on several beside each other: a column per run, and ratios to the first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from kvloom.loadtest.report.bars import plots
from kvloom.loadtest.report.document import NONE, Document, Table, amount, ms, percent, ratio
from kvloom.loadtest.report.plot import shorten
from kvloom.loadtest.report.run import Run, Stage
from kvloom.loadtest.report.tables import METRICS, settings, tables, words
from kvloom.loadtest.report.timeline import heaviest
from kvloom.loadtest.report.verdict import verdict, warnings

LAG = "how much later than planned the client sent a request; if it is not small, the client was the bottleneck"
HIT_RATE = "prompt tokens taken from the server's cache / prompt tokens, over successful requests"
OWN = {"client lag": LAG, "hit rate": HIT_RATE}
"""What a report needs where the run recorded none."""


def document(run: Run) -> Document:
    """What there is to say of one run."""
    model = run.settings.get("model")
    title = f"Load test: {run.settings.get('workload') or run.title}" + (f" on {model}" if model else "")
    return Document(
        title, origin([run]), verdict(run), warnings(run), tables(run), plots([run]), definitions(run), [settings(run)]
    )


def origin(runs: Sequence[Run]) -> list[str]:
    """When, where and against what the runs were made: a line for all if they have it in common, else one each."""
    told = [(run.settings.get("machine") or "on an unknown machine", run.settings.get("base_url") or "") for run in runs]
    lines = [f"Measured {machine}; {url}".rstrip("; ") for machine, url in told]
    if len(set(lines)) == 1:
        return lines[:1]
    return [f"{run.title}: {line}" for run, line in zip(runs, lines)]


def definitions(run: Run) -> Mapping[str, str]:
    """What each figure means, as the load test itself recorded it."""
    recorded = run.settings.get("definitions") or {}
    return {**OWN, **{words(str(key)): str(text) for key, text in recorded.items()}}


LIKE = ("workload", "workload_options", "seed", "mode", "model", "slo", "machine")
"""Settings in which runs must be equal to be compared."""
RATES = (
    ("output tokens/s", "output_throughput", amount),
    ("total tokens/s", "total_token_throughput", amount),
    ("requests/s", "request_throughput", amount),
    ("goodput, requests/s", "request_goodput", amount),
    ("hit rate", "hit_rate", percent),
    ("correct answers", "correct_rate", percent),
    ("succeeded", "completed", amount),
    ("failed", "failed", amount),
)
COUNTS = ("completed", "failed")


def comparison(runs: Sequence[Run]) -> Document:
    """A report on several runs. The first is what the others are compared with."""
    first = runs[0]
    lines = [line for run in runs[1:] for line in _beside(first, run)]
    lines += [f"{run.title}: {text}" for run in runs for text in verdict(run)[:1]]
    doubts = [*differences(runs), *(f"{run.title}: {text}" for run in runs for text in warnings(run))]
    details = [
        Table(f"{run.title}: {table.title.lower()}", table.head, table.rows, table.note)
        for run in runs
        for table in tables(run)
        if table.title == "Failures by kind"
    ]
    shown = [*beside(runs), *details]
    title = "Load test: " + " beside ".join(run.title for run in runs)
    return Document(title, origin(runs), lines, doubts, shown, plots(runs), definitions(first), [settings(run) for run in runs])


def differences(runs: Sequence[Run]) -> list[str]:
    """Settings in which the runs differ though a comparison needs them equal."""
    found = []
    for key in LIKE:
        values = [run.settings.get(key) for run in runs]
        if key == "machine":  # its date differs always
            values = [str(value).split(", ", 1)[-1] for value in values]
        if any(value != values[0] for value in values):
            said = "; ".join(f"{run.title}: {value}" for run, value in zip(runs, values))
            found.append(f"Not like for like: {key.replace('_', ' ')} differs ({said}).")
    return found


def _beside(first: Run, run: Run) -> Iterator[str]:
    """One run against the first, in words."""
    a, b = _common_loads(first, run)
    if a is None or b is None:
        return
    faster = [(name, b.number(key), a.number(key)) for name, key in (("TTFT", "p50_ttft_ms"), ("TPOT", "p50_tpot_ms"))]
    parts = [f"median {name} {ratio(x, y)}" for name, x, y in faster if x is not None and y]
    if (speed := ratio(b.number("output_throughput"), a.number("output_throughput"))) != NONE:
        parts.append(f"output tokens/s {speed}")
    if parts:
        yield f"{run.title} against {first.title} at {b.label}: {', '.join(parts)}."


def _common_loads(first: Run, run: Run) -> tuple[Stage | None, Stage | None]:
    """The highest load that both ran, else the only one of each."""
    shared = [(a, b) for a in first.stages for b in run.stages if a.label == b.label and a.completed and b.completed]
    if shared:
        return max(shared, key=lambda pair: pair[0].load or 0.0)
    if len(first.stages) == len(run.stages) == 1:
        return heaviest(first), heaviest(run)
    return None, None


def beside(runs: Sequence[Run]) -> list[Table]:
    """A table per load, the highest first and the others folded: a row per figure, a column per run, and how many times the
    first run's figure each other one is."""
    loads = sorted(_by_load(runs), key=lambda pair: max((s.load or 0.0 for s in pair[1] if s is not None), default=0.0))[::-1]
    found = [_at(load, stages, runs, quantiles=("mean", "p50", "p90", "p99") if len(loads) == 1 else ("p50", "p99"))
             for load, stages in loads]  # fmt: skip
    return [replace(table, folded=i > 0) for i, table in enumerate(table for table in found if table.rows)]


def _at(load: str, stages: Sequence[Stage | None], runs: Sequence[Run], quantiles: Sequence[str]) -> Table:
    titles, rows = [run.title for run in runs], []
    times = [(f"{name} {q}, ms", f"{q}_{key}_ms", ms) for key, name in METRICS.items() for q in quantiles]
    for name, key, show in (*times, *RATES):
        values = [None if stage is None else stage.number(key) for stage in stages]
        if any(value is not None for value in values):
            against = [NONE if key in COUNTS else ratio(value, values[0]) for value in values[1:]]
            rows.append([name, *(show(value) for value in values), *against])
    note = (
        f"Ratios are to {titles[0]}: below 1 is faster for times, above 1 for throughput. Failed requests are not averaged in."
    )
    ratios = [f"{shorten(title, 20)} / {shorten(titles[0], 20)}" for title in titles[1:]]
    return Table(f"Side by side at {load}", ["figure", *titles, *ratios], rows, note)


def _by_load(runs: Sequence[Run]) -> Iterator[tuple[str, list[Stage | None]]]:
    """Stages of the same load of every run, None where a run lacks it. Single stages stand side by side at any load."""
    if all(len(run.stages) == 1 for run in runs):
        loads = list(dict.fromkeys(run.stages[0].label for run in runs))
        yield " / ".join(loads), [run.stages[0] for run in runs]
        return
    for load in dict.fromkeys(stage.label for run in runs for stage in run.stages):
        yield load, [next((stage for stage in run.stages if stage.label == load), None) for run in runs]
