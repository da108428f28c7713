"""The report on a sweep: one table of settings, speed and quality, and what nothing else beats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from kvloom.loadtest.load.outputs import REQUESTS, SUMMARY
from kvloom.loadtest.report.bars import curves, runs_beside
from kvloom.loadtest.report.compare import definitions, origin
from kvloom.loadtest.report.document import NONE, Document, Table, amount, ms, percent
from kvloom.loadtest.report.pages import write_document
from kvloom.loadtest.report.run import Run, load_run
from kvloom.loadtest.report.tables import settings as settings_table
from kvloom.loadtest.report.verdict import warnings
from kvloom.loadtest.sweep.grid import Result, load_results
from kvloom.loadtest.sweep.pareto import QUALITIES, SPEEDS, Row, front, pareto_plot, precise, quality_of

DEFINITIONS = {
    "front": "no other combination at the same load is at least as good in quality and in the named speed, and better in one",
    "needle": "share of questions answered rightly whose answer stands somewhere in a long text; 95% interval by Wilson",
    "KL": "KL(reference || server) per decoded token of the same forced text, over the reference's 20 likeliest tokens and one "
    "bucket for the rest, nats; a lower bound of the full KL; 95% interval by bootstrap over texts",
    "top-1": "share of decoded tokens for which server and reference have the same likeliest token",
    "perplexity": "of the forced text, each token computed as a decode row",
}


def write_sweep(folder: Path, out: Path | None = None) -> list[Path]:
    """Report on the sweep in `folder`, into it or `out`. Returns the files written. Raises ReportError."""
    results, interrupted = load_results(folder)
    there = [r for r in results if any((folder / r.folder / name).exists() for name in (SUMMARY, REQUESTS))]
    runs = [load_run(folder / result.folder, result.label) for result in there]
    return write_document(document(results, list(zip(there, runs)), interrupted), out or folder)


def document(results: Sequence[Result], entries: Sequence[tuple[Result, Run]], interrupted: bool) -> Document:
    """What there is to say of a sweep."""
    rows = [Row(result, run, stage) for result, run in entries for stage in run.stages]
    fronts = [[front(rows, speed, quality) for speed in SPEEDS] for quality in QUALITIES]
    runs = [run for _, run in entries]
    tables = [table for table in (main_table(rows, fronts), agreement_table(entries), left_out(results)) if table.rows]
    plots = [pareto_plot(rows, quality, found) for quality, found in zip(QUALITIES, fronts)]
    best = {rows[i].run.title for part in fronts for marks in part for i in marks}
    plots += [runs_beside(runs), *curves(sorted(runs, key=lambda run: run.title not in best))] if runs else []
    return Document(
        f"Sweep over {len(results)} combinations of settings",
        origin(runs[:1]),
        list(_verdict(results, rows, fronts)),
        list(_warnings(results, entries, interrupted)),
        tables,
        plots,
        {**DEFINITIONS, **(definitions(runs[0]) if runs else {})},
        [settings_table(runs[0])] if runs else [],
    )


def main_table(rows: Sequence[Row], fronts: Sequence[Sequence[frozenset[int]]]) -> Table:
    """A row per load and combination; those on a front are marked."""
    measured = [q for q in QUALITIES if any(quality_of(row.result, q) is not None for row in rows)]
    times = [f"{name} {quantile} ms" for name in ("TTFT", "TPOT") for quantile in ("p50", "p99")]
    head = ["load", "settings", *times, "output tok/s", "hit rate", "failed"]
    head += [quality.name for quality in measured] + (["on the front of"] if measured else [])
    on = [
        {SPEEDS[j].name.split(",")[0] for part in fronts for j, marks in enumerate(part) if i in marks}
        for i in range(len(rows))
    ]
    order = sorted(range(len(rows)), key=lambda i: [row.stage.label for row in rows].index(rows[i].stage.label))
    cells = []
    for i in order:
        result, stage = rows[i].result, rows[i].stage
        times = [ms(stage.figures.get(f"{p}_{m}_ms")) for m in ("ttft", "tpot") for p in ("p50", "p99")]
        known = [quality.show(quality_of(result, quality)) for quality in measured]
        marks = [", ".join(sorted(on[i])) or NONE] if measured else []
        cells.append([stage.label, result.label, *times, amount(stage.figures.get("output_throughput")),
                      percent(stage.figures.get("hit_rate")), amount(stage.figures.get("failed")), *known, *marks])  # fmt: skip
    marked = frozenset(place for place, i in enumerate(order) if on[i]) if measured else frozenset()
    note = "Bold rows are on a Pareto front of quality against speed among the rows of their load." if measured else ""
    return Table("Speed and quality", head, cells, note, marked)


def agreement_table(entries: Sequence[tuple[Result, Run]]) -> Table:
    """Every figure of the agreement probe."""
    rows = []
    for result, _ in entries:
        found = result.quality.get("agreement") or {}
        if "kl_mean" in found:
            bounds = found["kl_interval"]
            interval = f"{bounds[0]:.3g} to {bounds[1]:.3g}" if bounds else NONE
            kls = [precise(found["kl_mean"]), interval, precise(found["kl_p99"]), percent(found["covered"])]
            rows.append([result.label, amount(found["tokens"]), f"{found['perplexity']:.3f}", percent(found["top1"]), *kls])
    names = {str((result.quality.get("agreement") or {}).get("reference", "")) for result, _ in entries} - {""}
    head = ["settings", "tokens", "perplexity", "top-1 agreement", "KL mean", "KL mean, 95% interval", "KL p99", "mass listed"]
    note = "Teacher-forced through the decode path. Mass listed: the reference's probability of the tokens that the KL sees."
    return Table(f"Agreement with {', '.join(sorted(names))}", head, rows, note)


def left_out(results: Sequence[Result]) -> Table:
    """What was not measured, in the server's words."""
    rows = [[result.label, result.outcome, result.message or NONE] for result in results if result.outcome != "measured"]
    rows += [[r.label, f"{name} probe", part["error"]] for r in results for name, part in r.quality.items() if "error" in part]
    return Table("Not measured", ["settings", "outcome", "why"], rows)


def _verdict(results: Sequence[Result], rows: Sequence[Row], fronts: Sequence[Sequence[frozenset[int]]]) -> Iterator[str]:
    count = {outcome: sum(r.outcome == outcome for r in results) for outcome in ("measured", "refused", "failed")}
    parts = [f"{number} {outcome}" for outcome, number in count.items() if number]
    yield f"{len(results)} combinations: {', '.join(parts) or 'none measured'}."
    if rows:
        load = max(rows, key=lambda row: row.stage.load or 0.0).stage.label
        own = [row for row in rows if row.stage.label == load]
        for speed in SPEEDS:
            known = [(speed.sign * v, row) for row in own if (v := row.stage.number(speed.key)) is not None]
            if len(known) > 1:
                best = max(known, key=lambda pair: pair[0])[1]
                yield f"At {load} the best {speed.name}: {ms(best.stage.number(speed.key))} with {best.result.label}."
    for quality, found in zip(QUALITIES, fronts):
        for speed, marks in list(zip(SPEEDS, found))[:1]:
            if names := list(dict.fromkeys(rows[i].result.label for i in sorted(marks))):
                yield f"On the front of {quality.name} against {speed.name}: {'; '.join(names)}."


def _warnings(results: Sequence[Result], entries: Sequence[tuple[Result, Run]], interrupted: bool) -> Iterator[str]:
    if interrupted:
        yield "The sweep was interrupted: what follows is what was measured until then."
    for result in results:
        context, budget = (result.quality.get("agreement") or {}).get("context"), result.settings.get("budget", "")
        if context and budget.isdigit() and int(budget) >= context:
            yield f"{result.label}: the budget covers the probe's context of {context} tokens, so agreement shows little."
    for result, run in entries:
        yield from (f"{result.label}: {text}" for text in warnings(run))
