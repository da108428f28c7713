"""A report's files: Markdown, HTML and the plots as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvloom.loadtest.report import html, markdown
from kvloom.loadtest.report.compare import comparison, document
from kvloom.loadtest.report.document import Document
from kvloom.loadtest.report.plot import DARK, LIGHT, render
from kvloom.loadtest.report.run import Run, load_run


def write_report(folder: Path) -> list[Path]:
    """Report on the run in `folder`, into it. Returns the files written. Raises ReportError if there is no run."""
    return write_run(load_run(folder), folder)


def write_run(run: Run, out: Path) -> list[Path]:
    """Report on one run, into `out`. Returns the files written."""
    return write_document(document(run), out)


def compare_runs(runs: Sequence[Run], out: Path) -> list[Path]:
    """Report on several runs side by side, into `out`. Returns the files written."""
    return write_document(comparison(runs), out)


def write_document(what: Document, out: Path) -> list[Path]:
    """Write a report in all its forms. Plots of an earlier report that this one leaves out are removed."""
    out.mkdir(parents=True, exist_ok=True)
    images, written = {}, []
    for plot in what.plots:
        path = out / f"{plot.name}.png"
        if plot.draw is None:
            path.unlink(missing_ok=True)
            continue
        images[plot.name] = html.Images(render(plot, LIGHT), render(plot, DARK))
        path.write_bytes(images[plot.name].light)
        written.append(path)
    for name, text in (("report.md", markdown.write(what, images)), ("report.html", html.write(what, images))):
        (out / name).write_text(text, encoding="utf-8")
        written.append(out / name)
    return written
