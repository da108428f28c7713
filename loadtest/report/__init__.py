"""Reports on load tests: `report.md`, `report.html` and PNG plots from what a run left on disk.

    kvloom bench report DIR             writes the report into DIR
    kvloom bench report A B C --out D   writes one report into D with B and C beside A

A report can be made from a partial run. It says what is missing, shows failures by kind, and leaves out a plot that would be
empty with a line that says why.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kvloom.loadtest.report.run import ReportError, load_run
from kvloom.loadtest.study.flags import need


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kvloom bench report", description="Report on load tests that were run before, one alone or several side by side."
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a folder written by kvloom bench serve or sweep")
    parser.add_argument("--name", action="append", default=[], help="what to call a run, in the order of folders; repeat it")
    parser.add_argument(
        "--out", type=Path, help="where to write (default: DIR itself; with several, 'comparison' beside the first)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report and say where it is. Returns the exit code."""
    args = parse(argv)
    names = [*args.name, *[""] * len(args.folders)]
    need("matplotlib")
    try:
        written = _write(args.folders, names, args.out)
    except (ReportError, OSError) as error:
        print(f"kvloom bench report: {error}", file=sys.stderr)
        return 1
    for path in written:
        print(path)
    return 0


def _write(folders: Sequence[Path], names: Sequence[str], out: Path | None) -> list[Path]:
    from kvloom.loadtest.report.pages import compare_runs, write_report

    if len(folders) == 1 and (folders[0] / "sweep.json").exists():
        from kvloom.loadtest.sweep.report import write_sweep

        return write_sweep(folders[0], out)
    if len(folders) == 1:
        return write_report(folders[0], out, names[0])
    runs = [load_run(folder, name) for folder, name in zip(folders, names)]
    return compare_runs(runs, out or folders[0].resolve().parent / "comparison")
