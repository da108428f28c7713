"""Commands without the packages of the `bench` extra: help works, and what is missing is said before anything is measured."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kvloom.server.cli import MEASUREMENTS

CODE = """
import contextlib, io, json, sys
sys.modules["aiohttp"] = sys.modules["matplotlib"] = None  # as if they were not installed
from kvloom.server.cli import main
found = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
        except Exception as error:
            code = repr(error)
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""
COMMANDS = [(group, name) for group, entries in MEASUREMENTS.items() for name in entries]
MEASURED = [
    ["bench", "serve", "--concurrency", "1"],
    ["bench", "sweep", "nobody/such", "--concurrency", "1"],
    ["bench", "report", "nowhere"],
    ["bench", "engine", "nobody/such"],
    ["bench", "peers", "--start", "a=b {port}"],
    ["bench", "peers", "--from", "nowhere.json", "--plot", "a.png"],
    ["eval", "tasks", "nobody/such"],
    ["eval", "server", "--base-url", "http://127.0.0.1:9", "--model", "m"],
    ["calibrate", "razor", "nobody/such", "--heatmap", "a.png"],
]


@pytest.fixture(scope="module")
def without() -> list[list[object]]:
    """Exit code, output and errors of each command in a Python that has neither aiohttp nor matplotlib."""
    lines = [*([group, name, "--help"] for group, name in COMMANDS), *MEASURED]
    run = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(lines)], capture_output=True, text=True, timeout=300, check=True
    )
    found: list[list[object]] = json.loads(run.stdout.splitlines()[-1])
    return found


def test_help_needs_no_extra(without: list[list[object]]) -> None:
    for (group, name), (code, out, err) in zip(COMMANDS, without):
        assert code == 0 and f"kvloom {group} {name}" in str(out), (group, name, code, err)


def test_what_is_missing_is_said_first(without: list[list[object]]) -> None:
    for words, (code, out, err) in zip(MEASURED, without[len(COMMANDS) :]):
        assert code == 2 and not out, (words, code, err)
        assert "pip install -e '.[bench]'" in str(err) and str(err).count("\n") == 1, (words, err)
        assert "aiohttp" in str(err) or "matplotlib" in str(err)
