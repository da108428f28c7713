"""`kvloom eval drafts` from end to end on the tiny model."""

import json
from pathlib import Path

import pytest

from kvloom.loadtest.quality import drafts


def test_identity_and_speed_are_measured(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "drafts.json"
    arguments = [str(tiny), "--dtype", "fp32", "--weights", "bf16", "--kv-memory", "16MiB", "--methods", "sink_window"]
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
