"""A report's files: Markdown with the plots as PNG beside it, and one HTML file that needs nothing else.

The HTML has no script, no font, no network, plots inside; it reads on a phone (tables scroll sideways, plots are as wide as the
screen) and in dark mode (each plot is there twice).
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader

from kvloom.loadtest.report.compare import comparison, document
from kvloom.loadtest.report.document import Document, Table
from kvloom.loadtest.report.plot import DARK, LIGHT, render
from kvloom.loadtest.report.run import Run, load_run

LONG = 40
"""Characters from which a cell may break into lines."""
LONG_WORD = 16
"""Characters of a word, such as a run's name, from which a column's head may break within it."""


class Images(NamedTuple):
    """A plot as PNG, once per theme."""

    light: bytes
    dark: bytes


def html(document: Document, images: Mapping[str, Images]) -> str:
    """The page, as `page.html` says. `images`: by the name of the plot."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    pages.filters["png"] = lambda image: f"data:image/png;base64,{base64.b64encode(image).decode()}"
    return pages.get_template("page.html").render(document=document, images=images, kinds=_kinds)


def _kinds(tag: str, text: str, is_text: bool) -> str | None:
    """Classes of a cell; `tag`: td, or th in the head."""
    long = len(text) > LONG if tag == "td" else max(map(len, text.split()), default=0) > LONG_WORD
    return " ".join(name for name, given in (("text", is_text), ("long", long)) if given) or None


def markdown(document: Document, drawn: Collection[str]) -> str:
    """Markdown text. `drawn`: names of the plots that exist as NAME.png beside it."""
    return "\n\n".join(_markdown_parts(document, drawn)) + "\n"


def _markdown_parts(document: Document, drawn: Collection[str]) -> Iterator[str]:
    yield f"# {_escape(document.title)}"
    yield "\n\n".join(_escape(line) for line in document.origin)
    yield "\n".join(f"- {_escape(line)}" for line in document.verdict)
    if document.warnings:
        yield "\n".join(f"> **Mind:** {_escape(line)}\n>" for line in document.warnings).removesuffix("\n>")
    yield "## Plots"
    for plot in document.plots:
        if plot.name in drawn:
            yield f"### {_escape(plot.title)}\n\n{_escape(plot.caption)}\n\n![{_escape(plot.title)}]({plot.name}.png)"
    if left := [plot for plot in document.plots if plot.name not in drawn]:
        yield "\n".join(f"- {_escape(plot.title)} is left out: {_escape(plot.why)}." for plot in left)
    for part in document.tables:
        yield f"## {_escape(part.title)}"
        yield markdown_table(part)
    yield "## Definitions"
    yield "\n".join(f"- **{_escape(name)}**: {_escape(text)}" for name, text in document.definitions.items())
    for part in document.settings:
        if part.rows:
            yield f"## {_escape(part.title)}"
            yield markdown_table(part)


def markdown_table(part: Table) -> str:
    """A Markdown table, numbers to the right."""
    lines = [_row(part.head), "|" + "".join("---|" if i in part.texts or not i else "---:|" for i in range(len(part.head)))]
    for i, row in enumerate(part.rows):
        lines.append(_row([f"**{_escape(cell)}**" for cell in row] if i in part.marked else [_escape(cell) for cell in row]))
    return "\n".join(lines) + (f"\n\n{_escape(part.note)}" if part.note else "")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escape(text: str) -> str:
    """Text that a server or a user wrote cannot change the shape of the page."""
    flat = " ".join(text.split())
    return flat.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`").replace("*", "\\*")


def write_report(folder: Path, out: Path | None = None, name: str = "") -> list[Path]:
    """Report on the run in `folder`, into it or `out`. Returns the files written. Raises ReportError if there is no run."""
    return write_document(document(load_run(folder, name)), out or folder)


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
        images[plot.name] = Images(render(plot, LIGHT), render(plot, DARK))
        path.write_bytes(images[plot.name].light)
        written.append(path)
    for name, text in (("report.md", markdown(what, images)), ("report.html", html(what, images))):
        (out / name).write_text(text, encoding="utf-8")
        written.append(out / name)
    return written
