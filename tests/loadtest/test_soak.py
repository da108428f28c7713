"""The soak: a small one against a served model, and what it calls a problem."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from kvloom.loadtest.bench import soak
from kvloom.loadtest.client.servers import Server, running
from kvloom.loadtest.fuzz.api import TEMPLATE
from kvloom.loadtest.fuzz.engines import write_model


def test_a_small_soak_finds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "SETTLE_SECONDS", 0.1)
    monkeypatch.setattr(soak, "ABORT_SECONDS", 4.0)
    monkeypatch.setattr(soak, "WORDS", ("a", "b"))  # the model's context is short
    write_model(tmp_path)
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    command = f"{sys.executable} -m kvloom.server.cli serve {tmp_path} --port {{port}} --chat-template {template}"
    with running(Server("soak", f"{command} --kv-memory 1MiB"), tmp_path) as started:
        assert started.pid is not None
        rows = asyncio.run(soak.soak(soak.Target(started.url, started.pid), aborts=20, readers=0, streams=30, requests=40))
    assert [row["lost"] for row in rows] == [0] * 6
    assert [row.get("answered") for row in rows] == [0, 0, 30, 20, 20, None] and rows[0]["left"] == 20
    assert not [problem for problem in soak.problems(rows) if "grew" not in problem]  # so small a one still grows


GOOD = {"requests": 10, "answered": 0, "429": 0, "left": 0, "ended": 0, "hung": 0, "seconds": 1.0, "resident": 100.0, "lost": 0}


@pytest.mark.parametrize(
    ("row", "change", "said"),
    [
        (0, {"left": 9}, "9 left"), (0, {"seconds": 11.0}, "11.0 s"), (1, {"ended": 9}, "9 of 10 that do not read"),
        (2, {"answered": 6, "429": 3}, "6 answered and 3 refused of 10"), (3, {"lost": 1}, "1 blocks lost"),
        (4, {"hung": 1, "answered": 9}, "1 hung"), (4, {"resident": 103.1}, "grew by 3.1%"), (5, {"lost": 2}, "2 blocks lost"),
    ],
)  # fmt: skip
def test_every_promise_is_looked_at(row: int, change: dict[str, float], said: str) -> None:
    good = [{**GOOD, "part": "a", "left": 10}, {**GOOD, "part": "b", "ended": 10}]
    good += [{**GOOD, "part": name, "answered": 10} for name in "cde"] + [{"part": "f", "resident": 100.0, "lost": 0}]
    assert soak.problems(good) == []
    found = soak.problems([{**part, **change} if i == row else part for i, part in enumerate(good)])
    assert found and all(said in problem or "answered" in problem for problem in found) and any(said in one for one in found)
