"""The tables of a report on one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from kvloom.loadtest.report.bars import CLASSES, classes
from kvloom.loadtest.report.document import NONE, Table, amount, ms, percent
from kvloom.loadtest.report.run import Run, Stage

METRICS = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E"}
FEW = 100
ERROR_LENGTH = 160


def tables(run: Run) -> list[Table]:
    """All of them; those without rows are left out."""
    made = [stages(run), latency(run), failures(run), beside_server(run), kv_totals(run)]
    made += [by_class(run, key, title) for key, title, _ in CLASSES]
    return [table for table in made if table.rows]


def stages(run: Run) -> Table:
    """A row per load: what was asked, what came back, and how fast."""
    times = [f"{name} {quantile} ms" for name in ("TTFT", "TPOT") for quantile in ("p50", "p99")]
    rates = ["requests/s", "output tok/s", "total tok/s"]
    head = ["load", "requests", "ok", "failed", "cancelled", "not sent", *rates, *times, "goodput req/s", "hit rate", "correct"]
    head.append("client lag p99 ms")
    return _told(Table("Loads", head, [_stage_row(stage) for stage in run.stages]))


def _stage_row(stage: Stage) -> list[str]:
    figures = stage.figures
    lag = figures.get("client_lag") or {}
    times = [ms(figures.get(f"{p}_{m}_ms")) for m in ("ttft", "tpot") for p in ("p50", "p99")]
    rates = [amount(figures.get(k)) for k in ("request_throughput", "output_throughput", "total_token_throughput")]
    numbers = [amount(figures.get(k)) for k in ("num_prompts", "completed", "failed", "cancelled")]
    numbers.append(amount(figures.get("not_sent") or None))
    return [stage.label, *numbers, *rates, *times, amount(figures.get("request_goodput")), percent(figures.get("hit_rate")),
            percent(figures.get("correct_rate")), ms(lag.get("p99_ms"))]  # fmt: skip


def latency(run: Run) -> Table:
    """Every quantile of every time, over successful requests only."""
    rows = []
    shown = sorted({number for stage in run.stages for number in stage.figures.get("percentiles") or (50, 90, 99)})
    quantiles = ["mean", *(f"p{percentile:g}" for percentile in shown), "std"]
    for stage in run.stages:
        for key, name in METRICS.items():
            cells = [ms(stage.figures.get(f"{quantile}_{key}_ms")) for quantile in quantiles]
            cells.append(_interval(stage.figures.get(f"median_{key}_ms_ci95")))
            if any(cell != NONE for cell in cells):
                rows.append([stage.label, name, *cells])
    fewest = min((stage.completed for stage in run.stages if stage.completed), default=0)
    note = "Milliseconds, over successful requests only; failed ones are counted, never averaged in."
    if fewest == 1:
        note += " With one request every figure is that request's own."
    elif 0 < fewest < FEW:
        note += f" With {fewest} requests p99 is little else than the slowest of them."
    return _told(Table("Latency", ["load", "ms", *quantiles, "p50, 95% interval"], rows, note))


def _told(table: Table) -> Table:
    """The table without the columns that say nothing."""
    kept = [i for i in range(len(table.head)) if any(row[i] != NONE for row in table.rows)]
    return replace(table, head=[table.head[i] for i in kept], rows=[[row[i] for i in kept] for row in table.rows])


def failures(run: Run) -> Table:
    """Failed requests by kind, with an error of each in the server's words."""
    rows = []
    for stage in run.stages:
        for kind, count in (stage.figures.get("failures") or {}).items():
            if not count:
                continue
            first = (stage.figures.get("first_errors") or {}).get(kind)
            said = first or next((str(row.values["error"]) for row in stage.rows if row.failure == kind), "")
            share = percent(count / total if (total := stage.number("num_prompts")) else None)
            rows.append([stage.label, kind, amount(count), share, " ".join(said.split())[:ERROR_LENGTH] or NONE])
    return Table("Failures by kind", ["load", "kind", "requests", "share", "for instance"], rows)


def beside_server(run: Run) -> Table:
    """What the server measured of itself beside what the client saw."""
    rows = []
    for stage in run.stages:
        for key, value in (stage.figures.get("server") or {}).items():
            if isinstance(value, Mapping):
                rows += [[stage.label, f"{words(key)}, {words(part)}", NONE, amount(v)] for part, v in value.items()]
            elif value is not None:
                show = percent if key.endswith("hit_rate") else ms if key.endswith("_ms") else amount
                client = "hit_rate" if key.endswith("hit_rate") else key
                rows.append([stage.label, words(key), show(stage.figures.get(client)), show(value)])
    note = "The server's TTFT begins when a request has arrived and does not hold the way there and back."
    return Table("The server's own figures", ["load", "figure", "client", "server"], rows, note, folded=True)


def kv_totals(run: Run) -> Table:
    """Sums of `usage.kv` over successful requests: what the method did."""
    totals = [(stage, stage.figures.get("kv") or {}) for stage in run.stages]
    rows = [[stage.label, words(key).replace(".", ": "), amount(value)] for stage, kv in totals for key, value in kv.items()]
    return Table("What the requests' usage says of the KV cache", ["load", "figure", "sum"], rows, folded=True)


def by_class(run: Run, key: str, title: str) -> Table:
    """Figures by tenant or label."""
    rows = []
    for stage in run.stages:
        for name, figures in classes(stage, key).items():
            counts = [amount(figures.get(k)) for k in ("completed", "failed", "output_tokens")]
            times = [ms(figures.get(k)) for k in ("mean_ttft_ms", "p99_ttft_ms")]
            rows.append([stage.label, name or "(none)", *counts, percent(figures.get("share")), *times])
    head = ["load", key.removesuffix("s"), "ok", "failed", "output tokens", "share", "mean TTFT ms", "p99 TTFT ms"]
    return Table(title, head, rows)


def words(key: str) -> str:
    """mean_ttft_ms -> mean TTFT, ms"""
    text, unit = (key.removesuffix("_ms"), ", ms") if key.endswith("_ms") else (key, "")
    names = {**METRICS, "kv": "KV"}
    return " ".join(names.get(word, word) for word in text.split("_") if word) + unit


def _interval(bounds: object) -> str:
    return f"{ms(bounds[0])} to {ms(bounds[1])}" if isinstance(bounds, (list, tuple)) and len(bounds) == 2 else NONE


def settings(run: Run) -> Table:
    """How the run was made, so that it can be made again."""
    rows = []
    for key, value in run.settings.items():
        if key == "definitions":
            continue
        pairs = value.items() if isinstance(value, Mapping) else [("", value)]
        rows += [[f"{key.replace('_', ' ')} {name}".strip(), _plain(part)] for name, part in pairs]
    return Table(f"Settings of {run.title}", ["setting", "value"], rows)


def _plain(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(_plain, value)) or NONE
    return NONE if value is None else str(value)
