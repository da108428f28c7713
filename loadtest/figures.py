"""Published figures: every table of measurements in the documents is rendered from a result file, and a check compares.

    python -m kvloom.loadtest.figures            compare README.md and docs/*.md with docs/figures/*.json (`make figures-check`)
    python -m kvloom.loadtest.figures --write    render the tables anew
    python -m kvloom.loadtest.figures --adopt docs/page.md:N NAME --command '...'    make a result file of a page's N-th table

A measuring command writes docs/figures/NAME.json with `--publish`: cells as they are shown, the command line, machine, date and
commit. In a page the table stands between `<!-- figures: NAME -->` and `<!-- /figures -->`. `views` of a result file pick rows
and columns for another place (`<!-- figures: NAME.view -->`). Numbers in prose are listed in docs/figures/prose.json, each with
the cell that says it. A table of numbers with neither must be listed in docs/figures/unbacked.json with the reason; the check
names those every time.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvloom.loadtest.study.flags import complain
from kvloom.loadtest.study.machine import describe

FOLDER = Path("docs/figures")
OUTPUT_FLAGS = frozenset({"--json", "--markdown", "--publish", "--plot", "--out", "--resume"})
PROSE, UNBACKED = "prose.json", "unbacked.json"
_REGION = re.compile(r"<!-- figures: (\S+) -->\n(.*?)<!-- /figures -->", re.S)
_TABLE = re.compile(r"(?:^\|.*\n)+", re.M)
_NUMBER = re.compile(r"[-+]?\d")
Result = Mapping[str, Any]


def commit() -> str | None:
    """The commit of the sources that run, with + if they were changed since; None where there is no checkout."""
    root = Path(__file__).resolve().parents[1]
    try:
        words = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def publish(path: Path, head: Sequence[str], rows: Sequence[Sequence[str]], note: str = "", *, command: str = "",
            machine: str = "") -> None:  # fmt: skip
    """Write a result file: what this process measured, by which command, where, when, and of which commit.

    command, machine: in place of this process's own. Views that an earlier file had stay.
    """
    words = without_outputs(["kvloom", *sys.argv[1:]])
    views = json.loads(path.read_text())["views"] if path.exists() else {}
    said = {"command": command or shlex.join(words), "machine": machine or describe(), "commit": commit()}
    content = {**said, "head": list(head), "rows": [list(row) for row in rows], "note": note, "views": views}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def without_outputs(words: Sequence[str]) -> list[str]:
    """A command line without the flags that only say where results go."""
    kept, skip = [], False
    for word in words:
        name, mark, _ = word.partition("=")
        if not skip and name not in OUTPUT_FLAGS:
            kept.append(word)
        skip = not skip and name in OUTPUT_FLAGS and not mark and name != "--resume"
    return kept


def render(result: Result, view: str = "") -> str:
    """The Markdown between the marks: the table, and below it the note with the command, the machine and the commit."""
    head, rows = list(result["head"]), [list(row) for row in result["rows"]]
    note = str(result["note"])
    if view:
        chosen = result["views"][view]
        columns = [head.index(source) for source in chosen["columns"].values()]
        picked = [(name, rows[i]) for name, i in chosen["rows"]]
        rows = [[name, *(_shown(row[i]) for i in columns)] for name, row in picked]
        head, note = [chosen.get("title", ""), *chosen["columns"]], str(chosen.get("note", ""))
    elif result.get("commit"):
        measured = "" if result["machine"] in note else f", measured {result['machine']}"
        space = "\n\n" if "\n" in note else " "  # behind a list it would be part of the last item
        note = f"{note}{space}Written by `{result['command']}` at commit {result['commit']}{measured}.".strip()
    return "\n".join([markdown(head, rows), "", *([note, ""] if note else [])])


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells as they are."""
    return "\n".join("| " + " | ".join(row) + " |" if row else "|" + "---|" * len(head) for row in (head, (), *rows))


def _shown(cell: str) -> str:
    """A cell without its interval."""
    return re.sub(r" \([^()]* to [^()]*\)$", "", cell)


class Pages:
    """The documents and the result files of one checkout."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
        folder = root / FOLDER
        self.results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))
                        if path.name not in (PROSE, UNBACKED)}  # fmt: skip
        self.prose, self.unbacked = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (PROSE, UNBACKED))

    def rendered(self, text: str) -> str:
        """A page with every region as its result file says. Raises KeyError or ValueError for one that is not there."""
        return _REGION.sub(self._region, text)

    def _region(self, found: re.Match[str]) -> str:
        name, _, view = found[1].partition(".")
        return f"<!-- figures: {found[1]} -->\n{render(self.results[name], view)}<!-- /figures -->"

    def problems(self) -> Iterator[str]:
        """What does not agree."""
        for path in self.files:
            text, name = path.read_text(encoding="utf-8"), str(path.relative_to(self.root))
            for region in _REGION.finditer(text):
                try:
                    if self._region(region) != region[0]:
                        yield f"{name}: the table {region[1]} is not that of its result file; run with --write"
                except (KeyError, ValueError, IndexError) as error:
                    yield f"{name}: no result for {region[1]} ({error})"
            known = {entry["head"] for entry in self.unbacked if entry["file"] == name}
            for table in tables(_REGION.sub("", text)):
                if has_figures(table) and table.splitlines()[0] not in known:
                    yield f"{name}: no result file stands behind the table {table.splitlines()[0][:90]}"
            there = {table.splitlines()[0] for table in tables(text)}
            yield from (f"{name}: {head[:90]} is listed in {UNBACKED} and not there" for head in known - there)
        yield from self._prose()

    def _prose(self) -> Iterator[str]:
        for claim in self.prose:
            text = " ".join((self.root / claim["file"]).read_text(encoding="utf-8").split())
            if claim["text"] not in text:
                yield f"{claim['file']}: {claim['text']!r} is listed in {PROSE} and not there"
                continue
            result = self.results[claim["result"]]
            row, column = claim["cell"]
            cell = _shown(result["rows"][row][list(result["head"]).index(column)])
            if claim.get("value", cell) != cell or cell.lstrip("+") not in claim["text"]:
                yield f"{claim['file']}: {claim['text']!r} says otherwise than {claim['result']}, which has {cell}"


def tables(text: str) -> list[str]:
    """The Markdown tables of a page."""
    return [found[0] for found in _TABLE.finditer(text if text.endswith("\n") else text + "\n")]


def has_figures(table: str) -> bool:
    """Whether a table holds measurements: a third of its cells begin with a number, in two columns at least."""
    rows = [[cell.strip().strip("*`") for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    marks = [[bool(_NUMBER.match(cell)) for cell in row] for row in rows]
    cells = [mark for row in marks for mark in row]
    return bool(cells) and sum(cells) >= len(cells) / 3 and sum(map(any, zip(*marks))) >= 2


def adopt(root: Path, place: str, name: str, command: str, machine: str) -> None:
    """Make a result file of a table that a page has already, with the machine and date that the page states."""
    page, _, number = place.rpartition(":")
    text = (root / page).read_text(encoding="utf-8")
    table = tables(text)[int(number) - 1]
    head, _, *rows = ([cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
                      for line in table.splitlines())  # fmt: skip
    said: dict[str, Any] = {"command": command, "machine": machine, "commit": None}
    content = {**said, "head": head, "rows": rows, "note": "", "views": {}}
    (root / FOLDER / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (root / page).write_text(text.replace(table, f"<!-- figures: {name} -->\n{render(content)}<!-- /figures -->\n"))


def main(argv: Sequence[str] | None = None) -> int:
    """Compare or write; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m kvloom.loadtest.figures", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--root", type=Path, default=Path("."), help="of the checkout (default: the current folder)")
    parser.add_argument("--write", action="store_true", help="render the tables anew")
    parser.add_argument("--adopt", nargs=2, metavar=("PAGE:N", "NAME"), help="make a result file of a page's N-th table")
    parser.add_argument("--command", default="", help="which command wrote the adopted table")
    parser.add_argument("--machine", default="", help="date and machine of the adopted table")
    args = parser.parse_args(argv)
    if args.adopt:
        adopt(args.root, args.adopt[0], args.adopt[1], args.command, args.machine)
        return 0
    pages = Pages(args.root)
    if args.write:
        for path in pages.files:
            path.write_text(pages.rendered(path.read_text(encoding="utf-8")), encoding="utf-8")
    found = list(pages.problems())
    for problem in found:
        complain(problem, 1)
    for entry in pages.unbacked:
        print(f"without a result file: {entry['file']}: {entry['head'][:60]} ({entry['why']})")
    print(f"{len(pages.results)} result files, {len(pages.prose)} figures in prose: {len(found)} differ")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
