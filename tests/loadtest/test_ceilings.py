"""Formulas of bytes read, held to the engine's counters; and the table that is made of them."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from kvloom import LLM, KVOptions, SamplingParams
from kvloom.engine.errors import ConfigError
from kvloom.engine.selection import METHODS
from kvloom.engine.selection.base import read_options
from kvloom.loadtest.quality import ceilings, methods
from kvloom.loadtest.quality.ceilings import FORMULAS, Shape, Work

MakeLLM = Callable[..., LLM]
LAYERS, PROMPT, BUDGET = 3, 90, 32


def after(make: MakeLLM, kv: KVOptions, tokens: int) -> tuple[LLM, Any]:
    """An engine that has generated so many tokens, and its counters."""
    llm = make(reuse="off", shadow_interval=0, threads=1)
    text = [Random(4).randrange(3, 300) for _ in range(PROMPT)]
    llm.generate([text], SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True), kv=kv)
    return llm, llm.stats()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dense", {}),
        ("sink_window", {"sinks": 3}),
        ("tidal_decode", {"layers": [1]}),
        ("tidal_decode", {"layers": [1], "output": "dense"}),
        ("tidal_decode", {"layers": [0, 1]}),
        ("token_select", {"theta": 0.3}),
        ("token_select", {"theta": 2.0, "local": 7}),
        ("recycled", {"stride": 4, "recent": 5}),
        ("recycled", {"stride": 3, "refresh": "dense"}),
    ],
)
def test_formulas_are_what_the_engine_counts(make_llm: MakeLLM, method: str, options: dict[str, Any]) -> None:
    """To the byte, one decode row at a time, with the method's own count of lists and positions."""
    budget = None if method == "dense" else BUDGET
    kv = KVOptions(selection=method, budget=budget, options=options)
    shares = set()
    _, before = after(make_llm, kv, 4)
    for tokens in range(5, 11):
        llm, now = after(make_llm, kv, tokens)
        shape = Shape.of(llm.core.runner.geometry, 4)
        n = PROMPT + tokens - 1
        work, selector = Work(n, budget or n), None
        if budget is not None:
            selector = METHODS[method].make(read_options(METHODS[method], options), budget, llm.core.runner.geometry, None)
            old, new = before.selection[method], now.selection[method]
            work = work._replace(made=(new.selections - old.selections) / LAYERS)
            if method in ceilings.FITTED:
                work = work._replace(attended=(new.attended - old.attended) / LAYERS)
        counted = now.kv_bytes_read - before.kv_bytes_read
        assert counted == pytest.approx(FORMULAS[method](selector, shape, work).kv, rel=1e-12)
        if method in ceilings.FITTED and options.get("refresh") != "dense":
            assert ceilings.made(selector, shape, work, counted) == pytest.approx(work.made)
        shares.add(work.made)
        before = now
    if method in ceilings.FITTED and options.get("theta") != 2.0:
        assert any(0 < share < 1 for share in shares)  # some layers made a list, others did not


def test_the_table_of_a_run(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, rows = tmp_path / "text.txt", tmp_path / "rows.json"
    text.write_text(Path(methods.__file__).read_text())
    assert methods.main([str(tiny), "--dtype", "fp32", "--weights", "bf16", "--kv-memory", "8MiB", "--threads", "1", "--text",
                         str(text), "--methods", "sink_window,tidal_decode,token_select:theta=0.5,recycled", "--context", "300",
                         "--windows", "2", "--scored", "4", "--batch", "2", "--haystacks", "0", "--rounds", "1", "--steps", "3",
                         "--budgets", "32", "--json", str(rows)]) == 0  # fmt: skip
    assert ceilings.main([str(tiny), "--json", str(rows), "--markdown", str(tmp_path / "table.md")]) == 0
    llm = LLM(str(tiny), dtype="fp32", kv_memory="8MiB")
    found = {row["method"]: ceilings.ceiling(row, llm.core.runner.geometry) for row in json.loads(rows.read_text())}
    assert all(row["formula"] == pytest.approx(row["counted"]) for row in found.values())
    assert found["dense"]["ceiling"] == 1.0
    assert found["sink_window"]["ceiling"] == pytest.approx(304 / 32)  # 2 requests, in the second of three timed steps
    assert found["recycled"]["ceiling_scores"] < found["recycled"]["ceiling"] < found["sink_window"]["ceiling"]
    assert 0 < found["token_select"]["made"] <= 1
    table = (tmp_path / "table.md").read_text()
    assert "| sink_window | 32 |" in table and "2 requests of 300 tokens" in table and table.strip() in capsys.readouterr().out


def test_other_files_and_rows_are_refused(tmp_path: Path, make_llm: MakeLLM) -> None:
    wrong = tmp_path / "rows.json"
    for content in ("", "[]", '{"a": 1}', '[{"method": "dense"}]'):
        wrong.write_text(content)
        with pytest.raises(ConfigError, match="holds no rows of kvloom eval methods"):
            ceilings.read_rows(wrong)
    with pytest.raises(ConfigError, match=r"nearest \{\} has no formula here"):
        ceilings.ceiling({"method": "nearest", "budget": 3, "options": {}}, make_llm().core.runner.geometry)
