"""Rows of results on disk: written after every measurement, so that an interrupted run keeps what it has.

JSON is a list of rows; Markdown is one table of chosen columns. With resuming, rows that an earlier run wrote for the same
settings are not measured again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from kvloom.engine.errors import ConfigError
from kvloom.loadtest.figures import markdown, publish

Row = dict[str, Any]
console = Console(highlight=False)


class Column(NamedTuple):
    """One column of a table."""

    title: str
    key: str
    form: str | Callable[[Any], str] = ""
    """As in format(), empty for text and whole numbers; or what makes text of a value."""
    factor: float = 1.0
    always: bool = False
    """Whether it is shown if no row has a value for it."""


def cell(column: Column, row: Mapping[str, Any]) -> str:
    """A value with its 95% interval, if the row has one under `<key>_ci`; a dash for what was not measured."""
    value = row.get(column.key)
    if value is None:
        return "-"
    if callable(column.form):
        return column.form(value)
    if isinstance(value, (dict, list)):
        return json.dumps(value) if value else ""
    if isinstance(value, str):
        return value
    interval = row.get(f"{column.key}_ci")
    return _number(column, value) + (f" ({_number(column, interval[0])} to {_number(column, interval[1])})" if interval else "")


def _number(column: Column, value: float) -> str:
    assert not callable(column.form)
    return format(value if column.factor == 1 else value * column.factor, column.form or ",")


def cells(columns: Sequence[Column], rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table as text; most columns that no row has a value for are left out."""
    kept = [column for column in columns if column.always or any(row.get(column.key) is not None for row in rows)]
    return [column.title for column in kept], [[cell(column, row) for column in kept] for row in rows]


def table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """The same in Markdown."""
    return markdown(*cells(columns, rows))


def console_table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> Table:
    """The same for a terminal; numbers stand to the right."""
    made = Table(title=title or None)
    for i, name in enumerate(head):
        figures = rows and all(row[i][:1].isdigit() or row[i][:1] in "+-" for row in rows)
        made.add_column(name, justify="right" if figures else "left")
    for row in rows:
        made.add_row(*row)
    return made


@dataclass(slots=True)
class Results:
    """The rows of a run and where they go."""

    columns: Sequence[Column]
    identity: Sequence[str]
    """Keys that tell one row from another: what `find` compares."""
    title: str
    json: Path | None = None
    markdown: Path | None = None
    publish: Path | None = None
    """A result file for the documents (`loadtest.figures`)."""
    note: str = ""
    """Said under the table: model, machine, settings."""
    rows: list[Row] = field(default_factory=list)

    def resume(self) -> None:
        """Take over the rows of the JSON file, if it is there. Raises ConfigError if it holds none."""
        if self.json is None:
            raise ConfigError("--resume needs --json FILE, which holds what was measured")
        if not self.json.exists():
            return
        try:
            rows = json.loads(self.json.read_text())
            self.rows = [dict(row) for row in rows]
        except (ValueError, TypeError):
            raise ConfigError(f"--json {self.json} holds no list of rows; give another file, or leave out --resume") from None

    def resumed(self, resume: bool) -> Results:
        """The same with the rows of an earlier run, if that is to go on. Raises ConfigError."""
        if resume:
            self.resume()
        return self

    def find(self, row: Mapping[str, Any]) -> Row | None:
        """The row that was measured with the same identity."""
        wanted = self._key(row)
        return next((known for known in self.rows if self._key(known) == wanted), None)

    def add(self, row: Row) -> None:
        """Take a row in, in place of one with the same identity, and write the files."""
        known = self.find(row)
        if known is None:
            self.rows.append(row)
        else:
            self.rows[self.rows.index(known)] = row
        self.write()

    def write(self) -> None:
        """Write both files: whole or not at all."""
        if self.json is not None:
            _replace(self.json, json.dumps(self.rows, indent=1) + "\n")
        if self.markdown is not None:
            _replace(self.markdown, self.text() + "\n")
        if self.publish is not None:
            publish(self.publish, *cells(self.columns, self.rows), self.note)

    def text(self) -> str:
        """The Markdown."""
        head = f"# {self.title}\n\n" if self.title else ""
        return f"{head}{table(self.columns, self.rows)}\n\n{self.note}"

    def conclude(self) -> int:
        """Write the files and print the table; returns the exit code 0."""
        self.write()
        console.print(self.text(), soft_wrap=True, markup=False)
        return 0

    def _key(self, row: Mapping[str, Any]) -> str:
        return json.dumps([row.get(key) for key in self.identity], sort_keys=True)


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
