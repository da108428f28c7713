"""Published figures: the documents say what their result files say, and the check finds where they do not."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from kvloom.loadtest.figures import FOLDER, Pages, adopt, commit, has_figures, main, render, without_outputs
from kvloom.loadtest.study.machine import describe
from kvloom.loadtest.study.results import Column, Results

ROOT = Path(__file__).resolve().parents[2]
TABLE = "| method | ms | of dense |\n|---|---|---|\n| a | 1.5 (1.2 to 1.8) | 40% |\n| b | 3.0 | 80% |\n"
PAGE = f"# Speed\n\n{TABLE}\nHalf: a takes 1.5 ms.\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small checkout whose one table has been adopted."""
    (tmp_path / FOLDER).mkdir(parents=True)
    (tmp_path / "README.md").write_text("Reads 40% of it.\n")
    (tmp_path / "docs" / "speed.md").write_text(PAGE)
    claims = [{"file": "README.md", "text": "Reads 40%", "result": "speed", "cell": [0, "of dense"]},
              {"file": "docs/speed.md", "text": "a takes 1.5 ms", "result": "speed", "cell": [0, "ms"]}]  # fmt: skip
    (tmp_path / FOLDER / "prose.json").write_text(json.dumps(claims))
    (tmp_path / FOLDER / "unbacked.json").write_text("[]")
    adopt(tmp_path, "docs/speed.md:1", "speed", "kvloom eval speed", "2026-11-22, 2 cores")
    return tmp_path


def problems(root: Path) -> list[str]:
    return list(Pages(root).problems())


def test_the_documents_of_this_checkout_agree_with_their_results(tmp_path: Path) -> None:
    assert problems(ROOT) == []
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    text = (tmp_path / "docs" / "bench-weights.md").read_text()
    kl = json.loads((ROOT / FOLDER / "weights.json").read_text())["rows"][1][4]
    assert f"| {kl} |" in text
    (tmp_path / "docs" / "bench-weights.md").write_text(text.replace(kl, f"{kl}1", 1))
    assert len(problems(tmp_path)) == 1


def test_a_page_is_what_its_result_file_says(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = root / "docs" / "speed.md"
    assert problems(root) == [] and "<!-- figures: speed -->\n| method" in page.read_text()
    page.write_text(page.read_text().replace("3.0", "2.0"))
    assert "docs/speed.md: the table speed" in problems(root)[0]
    assert main(["--root", str(root)]) == 1 and "run with --write" in capsys.readouterr().err
    assert main(["--root", str(root), "--write"]) == 0
    assert "| b | 3.0 | 80% |" in page.read_text()


def test_prose_is_held_to_its_cell(root: Path) -> None:
    (root / "README.md").write_text("Reads 41% of it.\n")
    assert "not there" in problems(root)[0]
    (root / "README.md").write_text("Reads 40% of it.\n")
    result = root / FOLDER / "speed.json"
    result.write_text(result.read_text().replace("40%", "45%"))
    main(["--root", str(root), "--write"])
    assert problems(root) == ["README.md: 'Reads 40%' says otherwise than speed, which has 45%"]


def test_a_table_without_a_result_file_is_found_or_listed(root: Path) -> None:
    table = "| load | ms | MB |\n|---|---|---|\n| x | 5 | 7 |\n"
    (root / "README.md").write_text("Reads 40% of it.\n\n" + table)
    assert "no result file stands behind the table | load" in problems(root)[0]
    (root / FOLDER / "unbacked.json").write_text(json.dumps([{"file": "README.md", "head": "| load | ms | MB |", "why": "."}]))
    assert problems(root) == []
    (root / "README.md").write_text("Reads 40% of it.\n")
    assert "is listed in unbacked.json and not there" in problems(root)[0]
    assert not has_figures("| option | default | |\n|---|---|---|\n| a | 3 | what |\n| b | 4 | how |\n")


def test_a_region_of_nothing_is_found(root: Path) -> None:
    page = root / "docs" / "speed.md"
    page.write_text(page.read_text().replace("figures: speed", "figures: spead"))
    assert any("no result for spead" in line for line in problems(root))


def test_a_command_writes_its_result_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / FOLDER / "speed.json"
    known = json.loads(path.read_text())
    view = {"title": "which", "columns": {"time": "ms"}, "rows": [["method a", 0]], "note": ""}
    path.write_text(json.dumps(known | {"views": {"short": view}}))
    words = ["/somewhere/bin/kvloom", "eval", "speed", "--publish", str(path), "--seed", "3", "--resume", "--json=x.json"]
    monkeypatch.setattr(sys, "argv", words)
    results = Results(
        (Column("method", "method"), Column("ms", "ms", ".1f")), ("method",), "Speed", publish=path, note="One run."
    )
    results.add({"method": "a", "ms": 1.25, "ms_ci": [1.0, 1.5]})
    made = json.loads(path.read_text())
    assert made["command"] == "kvloom eval speed --seed 3" and made["machine"] == describe() and made["commit"] == commit()
    assert made["rows"] == [["a", "1.2 (1.0 to 1.5)"]] and made["views"] == {"short": view}, "views stay"
    assert f"One run. Written by `kvloom eval speed --seed 3` at commit {commit()}, measured {describe()}." in render(made)
    assert render(made, "short") == "| which | time |\n|---|---|\n| method a | 1.2 |\n"
    assert str(root) not in path.read_text()


def test_flags_that_say_where_results_go_are_no_part_of_a_command() -> None:
    assert without_outputs(["a", "--out", "b", "--json=c", "--resume", "d"]) == ["a", "d"]
    found = commit()
    assert found is None or len(found) >= 10
