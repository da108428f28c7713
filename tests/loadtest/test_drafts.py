"""`kvloom eval drafts` from end to end on the tiny model."""

import json
from pathlib import Path

import pytest

from kvloom.engine import LLM
from kvloom.engine.errors import ConfigError
from kvloom.loadtest.quality import drafts


def test_identity_and_speed_are_measured(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "drafts.json"
    arguments = [str(tiny), "--dtype", "fp32", "--weights", "bf16", "--kv-memory", "16MiB", "--methods", "sink_window"]
    arguments += ["--threads", "1"]
    arguments += ["--prompts", "3", "--prompt-tokens", "80", "--identity-budget", "24", "--tokens", "8", "--rounds", "1"]
    arguments += ["--cases", "2x100", "--budget", "24", "--draft-tokens", "2", "--json", str(out)]
    assert drafts.main([*arguments, "--markdown", str(tmp_path / "drafts.md")]) == 0
    rows = json.loads(out.read_text())
    assert rows["identity"][0]["identical"] == rows["identity"][0]["prompts"] == 3
    assert rows["speed"][0]["dense_ms"] > 0 and 0 <= rows["speed"][0]["accepted"] <= 1
    assert "| sink_window |" in (tmp_path / "drafts.md").read_text()


def test_unknown_methods_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        drafts.main(["--methods", "nearest"])
    assert "allowed: sink_window" in capsys.readouterr().err


def test_differences_are_shown_with_their_gap(tiny: Path) -> None:
    """Between dense runs of two other texts, which differ for sure; and none between a run and itself."""
    llm = LLM(str(tiny), dtype="fp32", weights="bf16", kv_memory="16MiB", threads=1)
    a, b = llm.generate([[3, 4, 5, 6] * 20, [9, 8, 7] * 20], drafts.greedy(8, logprobs=20))
    assert drafts.difference(llm, 0, a, a) is None
    found = drafts.difference(llm, 7, a, b)
    assert found is not None and found.prompt == 7
    assert a.tokens[: found.position] == b.tokens[: found.position]
    ours, theirs = a.tokens[found.position], b.tokens[found.position]
    assert ours != theirs and found.dense == repr(llm.tokenizer.decode([ours]))
    row = a.logprobs[found.position]
    assert row.token == ours and found.logprob == row.logprob
    assert found.gap == row.logprob - dict(row.top).get(theirs, float("-inf"))
    assert found.gap > 0


def test_rows_are_gathered_over_runs(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "drafts.json"
    words = [str(tiny), "--weights", "bf16", "--kv-memory", "16MiB", "--methods", "sink_window", "--threads", "1"]
    words += ["--cases", "", "--prompts", "2", "--prompt-tokens", "60", "--identity-budget", "24", "--tokens", "4"]
    words += ["--json", str(out), "--markdown", str(tmp_path / "drafts.md"), "--resume"]
    for dtype in ("fp32", "bf16", "fp32"):
        assert drafts.main([*words, "--dtype", dtype]) == 0
    assert [row["dtype"] for row in json.loads(out.read_text())["identity"]] == ["bf16", "fp32"]
    table = (tmp_path / "drafts.md").read_text()
    assert table.count("| sink_window |") == 2 + table.count("'") // 4  # and one per difference, with two tokens in quotes
    with pytest.raises(ConfigError, match="--resume needs --json"):
        drafts.main(["--resume"])
