"""A report as one HTML file that needs nothing else: no script, no font, no network, plots inside.

Reads on a phone (tables scroll sideways, plots are as wide as the screen) and in dark mode (each plot is there twice).
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from html import escape
from typing import NamedTuple

from kvloom.loadtest.report.document import Document, Table

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


def write(document: Document, images: Mapping[str, Images]) -> str:
    """The page. `images`: by the name of the plot."""
    title = escape(document.title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<style>{STYLE}</style></head>\n'
        f"<body>\n<h1>{title}</h1>\n" + "\n".join(_parts(document, images)) + "\n</body></html>\n"
    )


def _parts(document: Document, images: Mapping[str, Images]) -> Iterator[str]:
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
    for table in document.tables:
        yield _folded(table.title, _table(table)) if table.folded else f"<h2>{escape(table.title)}</h2>{_table(table)}"
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in document.definitions.items())
    yield _folded("Definitions", f"<dl>{terms}</dl>")
    for table in document.settings:
        if table.rows:
            yield _folded(table.title, _table(table))


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _picture(images: Images, text: str) -> str:
    light, dark = (f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in images)
    source = f'<source media="(prefers-color-scheme:dark)" srcset="{dark}">'
    return f'<picture>{source}<img src="{light}" alt="{escape(text)}"></picture>'


def _table(table: Table) -> str:
    texts = table.texts
    head = "".join(_cell("th", cell, i in texts) for i, cell in enumerate(table.head))
    rows = "".join(
        f"<tr{' class=marked' if i in table.marked else ''}>"
        + "".join(_cell("td", cell, j in texts) for j, cell in enumerate(row))
        + "</tr>"
        for i, row in enumerate(table.rows)
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}'


def _cell(tag: str, text: str, is_text: bool) -> str:
    long = len(text) > LONG if tag == "td" else max(map(len, text.split()), default=0) > LONG_WORD
    kinds = [name for name, given in (("text", is_text), ("long", long)) if given]
    attribute = f' class="{" ".join(kinds)}"' if kinds else ""
    return f"<{tag}{attribute}>{escape(text)}</{tag}>"
