"""A report before it has a form: sentences, tables and plots, to be written as Markdown and as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvloom.loadtest.report.plot import Plot
from kvloom.loadtest.report.run import number

NONE = "-"


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text. The first column names the row; rows in `marked` stand out."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    marked: frozenset[int] = frozenset()
    folded: bool = False
    """Whether a page shows it only when asked."""

    @property
    def texts(self) -> frozenset[int]:
        """The columns that hold no number, and so stand to the left."""
        return frozenset(i for i in range(len(self.head)) if not any(_is_number(row[i]) for row in self.rows))


@dataclass(frozen=True, slots=True)
class Document:
    """What a report says, in the order of reading."""

    title: str
    origin: Sequence[str]
    """What was measured on which machine, and when."""
    verdict: Sequence[str]
    """The result in a few sentences."""
    warnings: Sequence[str]
    """What stands against believing it."""
    tables: Sequence[Table]
    plots: Sequence[Plot]
    definitions: Mapping[str, str]
    settings: Sequence[Table] = field(default=())


def _is_number(text: str) -> bool:
    return text.removeprefix("-")[:1].isdigit() and len(text) < 20


def ms(value: object) -> str:
    """Milliseconds with as many digits as mean something."""
    found = number(value)
    if found is None:
        return NONE
    return f"{found:,.0f}" if abs(found) >= 100 else f"{found:.1f}" if abs(found) >= 10 else f"{found:.2f}"


def amount(value: object, digits: int = 2) -> str:
    """A count or a rate: whole numbers stay whole."""
    found = number(value)
    if found is None:
        return NONE
    return f"{found:,.0f}" if found == int(found) or abs(found) >= 1000 else f"{found:,.{digits}f}"


def percent(value: object) -> str:
    found = number(value)
    return NONE if found is None else f"{found:.1%}"


def ratio(value: object, base: object) -> str:
    """value / base, to read as "this many times the first"."""
    a, b = number(value), number(base)
    return NONE if a is None or not b else f"{a / b:.2f}x"
