"""The report on one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvloom.loadtest.report.document import Document
from kvloom.loadtest.report.figures import plots
from kvloom.loadtest.report.run import Run
from kvloom.loadtest.report.tables import settings, tables, words
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
