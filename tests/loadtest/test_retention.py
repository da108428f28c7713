"""`kvloom eval retention` and `kvloom plan` on the tiny model: memory is counted, what differs shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvloom.engine.calibration import RazorCalibration
from kvloom.engine.errors import ConfigError
from kvloom.loadtest.quality import retention
from kvloom.server.cli import main

SCORES = ((0.1, 0.9), (0.8, 0.2), (0.3, 0.4))


def find(model_key: str) -> RazorCalibration:
    return RazorCalibration(model_key=model_key, model="tiny", induction=SCORES, echo=SCORES)


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("kvloom.engine.retention.razor", "kvloom.engine.capacity"):
        monkeypatch.setattr(f"{module}.find_razor", find)


def test_eval_retention(calibrated: None, tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(retention.__file__).read_text() * 2)
    rows = tmp_path / "rows.json"
    memory = 3 * 21 * 16 * 2 * 2 * 16 * 4 * 3  # three requests of 336 tokens
    argv = [str(tiny), "--dtype", "fp32", "--weights", "bf16", "--kv-memory", "8MiB", "--text", str(text), "--context", "300",
            "--settings", "razor:induction_share=0.3:least=24:share=6", "--batch", "2", "--windows", "2", "--scored", "12",
            "--rounds", "1", "--steps", "4", "--requests", "5", "--room", "24", "--memory", str(memory),
            "--json", str(rows), "--markdown", str(tmp_path / "table.md")]  # fmt: skip
    assert retention.main(argv) == 0
    everything, razor = json.loads(rows.read_text())
    assert (everything["retention"], razor["retention"]) == ("everything", "razor")
    assert everything["kl_mean"] == 0.0 < razor["kl_mean"]
    assert everything["held_share"] == 1.0 and razor["held_share"] < 0.6
    assert everything["at_once"] == 3 < razor["at_once"]
    assert razor["bytes_read"] < everything["bytes_read"]
    assert "| razor |" in (tmp_path / "table.md").read_text()


def test_settings_begin_with_everything() -> None:
    found = retention.settings("razor,everything,razor:share=4")
    assert [setting.config for setting in found] == [
        {"retention": "everything"},
        {"retention": "razor"},
        {"retention": "razor", "retention_options": '{"share": 4}'},
    ]
    with pytest.raises(ConfigError, match="--methods"):
        retention.settings("razor:share")


def test_plan_lists_every_retention(calibrated: None, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tiny), "--memory", "8MiB", "--dtype", "fp32"]) == 0
    printed = capsys.readouterr().out
    assert "everything" in printed and "50%: kvloom serve" in printed and "induction_share" in printed
    assert main(["plan", str(tiny), "--memory", "100", "--dtype", "fp32"]) == 2
    assert "the weights alone take" in capsys.readouterr().err
    assert main(["plan", str(tiny), "--memory", "much"]) == 2
    assert main(["plan", str(tiny), "--memory", "8MiB", "--block-size", "3"]) == 2
    assert main(["plan", str(tiny), "--memory", "8MiB", "--max-model-len", "9999"]) == 2


def test_plan_without_a_calibration_says_so(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tiny), "--memory", "8MiB"]) == 0
    assert "kvloom calibrate razor" in capsys.readouterr().out
