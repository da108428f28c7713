"""Progress of long measurements where there is no terminal: lines, not control characters."""

from __future__ import annotations

import pytest

from kvloom.loadtest.study import runner as setup


def test_a_line_now_and_then_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    with setup.Steps(40, clock=lambda: now) as steps:
        for step in range(40):
            steps.name(f"prompt {step} [dense]")
            steps.done()
            now += 1.0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{step}/40 prompt {step} [dense]" for step in (0, 10, 20, 30)]
