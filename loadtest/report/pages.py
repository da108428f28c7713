"""A report's files: Markdown with the plots as PNG beside it, and one HTML file that needs nothing else.

The HTML has no script, no font, no network, plots inside; it reads on a phone (tables scroll sideways, plots are as wide as the
screen) and in dark mode (each plot is there twice).
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from kvloom.loadtest.report.compare import comparison, document
from kvloom.loadtest.report.document import Document, Table
from kvloom.loadtest.report.plot import DARK, LIGHT, render
from kvloom.loadtest.report.run import Run, load_run

STYLE = """
:root{color-scheme:light dark;
 --paper:#fff;--ink:#1c2024;--soft:#5b6570;--line:#d9dde2;--card:#f5f7f9;--mind:#fff4df;--edge:#e69f00}
@media (prefers-color-scheme:dark){:root{
 --paper:#171a1f;--ink:#e4e7eb;--soft:#a3adb8;--line:#3a4048;--card:#1f242b;--mind:#3a2f17}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:76rem;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0 1rem;overflow-wrap:anywhere}h2{font-size:1.15rem;margin:2rem 0 .5rem}
h3{font-size:1rem;margin:0}.origin{color:var(--soft);font-size:.9rem;margin:.2rem 0;overflow-wrap:anywhere}
.verdict{background:var(--card);border-radius:.6rem;padding:.8rem 1rem .8rem 2rem;margin:.8rem 0 1.6rem;font-size:1.05rem;
 overflow-wrap:anywhere}
.mind{background:var(--mind);border-left:4px solid var(--edge);padding:.6rem 1rem;margin:.8rem 0;overflow-wrap:anywhere}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:.6rem}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .55rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{white-space:normal;vertical-align:bottom}td:first-child{white-space:nowrap}th.long{overflow-wrap:anywhere;min-width:6rem}
tr:last-child td{border-bottom:0}th{color:var(--soft);font-weight:600}
th:first-child,td:first-child,th.text,td.text{text-align:left}td.text:not(:first-child){white-space:normal;overflow-wrap:anywhere}td.long{white-space:normal;min-width:16rem;overflow-wrap:anywhere}
tr.marked td{font-weight:700;background:var(--card)}
.note,figcaption{color:var(--soft);font-size:.9rem;margin:.4rem 0}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,30rem),1fr));gap:1.5rem;align-items:start}
figure{margin:0}figure img{display:block;width:100%;max-width:46rem;height:auto}
dt{font-weight:600}dd{margin:0 0 .5rem}summary{cursor:pointer;font-weight:600;margin:1rem 0 .5rem}
""".strip()
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
LONG = 40
"""Characters from which a cell may break into lines."""
LONG_WORD = 16
"""Characters of a word, such as a run's name, from which a column's head may break within it."""


class Images(NamedTuple):
    """A plot as PNG, once per theme."""

    light: bytes
    dark: bytes


def html(document: Document, images: Mapping[str, Images]) -> str:
    """The page. `images`: by the name of the plot."""
    title = escape(document.title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<style>{STYLE}</style></head>\n'
        f"<body>\n<h1>{title}</h1>\n" + "\n".join(_html_parts(document, images)) + "\n</body></html>\n"
    )


def _html_parts(document: Document, images: Mapping[str, Images]) -> Iterator[str]:
    yield "".join(f'<p class="origin">{escape(line)}</p>' for line in document.origin)
    yield '<ul class="verdict">' + "".join(f"<li>{escape(line)}</li>" for line in document.verdict) + "</ul>"
    for line in document.warnings:
        yield f'<p class="mind"><strong>Mind:</strong> {escape(line)}</p>'
    yield '<div class="plots">'
    for plot in document.plots:
        if plot.name in images:
            yield f"<figure><h3>{escape(plot.title)}</h3><figcaption>{escape(plot.caption)}</figcaption>"
            yield f"{_picture(images[plot.name], f'{plot.title}. {plot.caption}')}</figure>"
    yield "</div>"
    for plot in document.plots:
        if plot.name not in images:
            yield f'<p class="note">{escape(plot.title)} is left out: {escape(plot.why)}.</p>'
    for part in document.tables:
        yield _folded(part.title, _html_table(part)) if part.folded else f"<h2>{escape(part.title)}</h2>{_html_table(part)}"
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in document.definitions.items())
    yield _folded("Definitions", f"<dl>{terms}</dl>")
    for part in document.settings:
        if part.rows:
            yield _folded(part.title, _html_table(part))


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _picture(images: Images, text: str) -> str:
    light, dark = (f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in images)
    source = f'<source media="(prefers-color-scheme:dark)" srcset="{dark}">'
    return f'<picture>{source}<img src="{light}" alt="{escape(text)}"></picture>'


def _html_table(part: Table) -> str:
    texts = part.texts
    head = "".join(_cell("th", cell, i in texts) for i, cell in enumerate(part.head))
    rows = "".join(
        f"<tr{' class=marked' if i in part.marked else ''}>"
        + "".join(_cell("td", cell, j in texts) for j, cell in enumerate(row))
        + "</tr>"
        for i, row in enumerate(part.rows)
    )
    note = f'<p class="note">{escape(part.note)}</p>' if part.note else ""
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}'


def _cell(tag: str, text: str, is_text: bool) -> str:
    long = len(text) > LONG if tag == "td" else max(map(len, text.split()), default=0) > LONG_WORD
    kinds = [name for name, given in (("text", is_text), ("long", long)) if given]
    attribute = f' class="{" ".join(kinds)}"' if kinds else ""
    return f"<{tag}{attribute}>{escape(text)}</{tag}>"


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
        images[plot.name] = Images(render(plot, LIGHT), render(plot, DARK))
        path.write_bytes(images[plot.name].light)
        written.append(path)
    for name, text in (("report.md", markdown(what, images)), ("report.html", html(what, images))):
        (out / name).write_text(text, encoding="utf-8")
        written.append(out / name)
    return written
