"""A report as Markdown, with the plots as files beside it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from kvloom.loadtest.report.document import Document, Table


def write(document: Document, drawn: Collection[str]) -> str:
    """Markdown text. `drawn`: names of the plots that exist as NAME.png beside it."""
    return "\n\n".join(_parts(document, drawn)) + "\n"


def _parts(document: Document, drawn: Collection[str]) -> Iterator[str]:
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
        yield table(part)
    yield "## Definitions"
    yield "\n".join(f"- **{_escape(name)}**: {_escape(text)}" for name, text in document.definitions.items())
    for part in document.settings:
        if part.rows:
            yield f"## {_escape(part.title)}"
            yield table(part)


def table(part: Table) -> str:
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
