"""`kvloom eval answers`: which answers count as changed, and what is printed of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvloom import LLM
from kvloom.engine.errors import ConfigError
from kvloom.loadtest.quality.answer_changes import ask, changes, main, questions, rows


def test_there_are_three_hundred_different_questions() -> None:
    asked = questions()
    assert len(asked) == len(set(asked)) == 300
    assert asked == questions() and "What is the capital of France?" in asked


def test_an_answer_differs_if_one_token_does_or_its_end() -> None:
    found = changes([(1, 2, 3), (1, 2), (5,), (7, 8)], [(1, 9, 3), (1, 2, 3), (5,), (6, 8)])
    assert found.places == (0, 1, 2)
    assert (found.share, found.at_once) == (0.75, 0.25)
    assert found.interval.low < 0.75 < found.interval.high
    with pytest.raises(ValueError, match="as many of each"):
        changes([(1,)], [])


def test_every_mode_is_held_against_bf16_and_fp32() -> None:
    answers = {"fp32": [(1,), (2,)], "bf16": [(1,), (3,)], "auto": [(4,), (3,)]}
    told = {(row["weights"], row["against"]): (row["differ"], row["median"]) for row in rows(answers)}
    assert told == {("bf16", "fp32"): (0.5, 1), ("auto", "bf16"): (0.5, 1), ("auto", "fp32"): (1.0, 1)}


def test_answers_are_greedy_and_one_per_question(make_llm: Callable[..., LLM]) -> None:
    llm, asked = make_llm(), questions()[:5]
    found = ask(llm, asked, 6)
    assert len(found) == 5 and all(1 <= len(answer) <= 6 for answer in found)
    assert found == ask(llm, asked, 6)
    assert [answer[:3] for answer in found] == [answer[:3] for answer in ask(llm, asked, 3)]


def test_the_command_asks_and_writes(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "answers.json", tmp_path / "answers.md"
    result = tmp_path / "figures" / "answers.json"
    assert (
        main(
            [
                str(tiny),
                "--every",
                "100",
                "--tokens",
                "3",
                "--json",
                str(out),
                "--markdown",
                str(page),
                "--publish",
                str(result),
            ]
        )
        == 0
    )
    written = json.loads(out.read_text())
    assert list(written["answers"]) == ["fp32", "bf16", "auto"] and len(written["questions"]) == 3
    assert [(row["weights"], row["against"]) for row in written["rows"]] == [
        ("bf16", "fp32"),
        ("auto", "bf16"),
        ("auto", "fp32"),
    ]
    assert [row[:2] for row in json.loads(result.read_text())["rows"]] == [["bf16", "fp32"], ["auto", "bf16"], ["auto", "fp32"]]
    assert "| auto | bf16 |" in page.read_text() and "| auto | bf16 |" in capsys.readouterr().out


def test_unknown_modes_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="'fp8'; allowed: bf16, auto, int8, int4"):
        main(["there is no such model", "--modes", "fp8"])
