"""`kvloom eval retention` and `kvloom plan` on the tiny model: memory is counted, what differs shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvloom.engine import LLM
from kvloom.engine.calibration import RazorCalibration
from kvloom.engine.errors import ConfigError
from kvloom.engine.requests.request import KVOptions
from kvloom.loadtest.quality import retention
from kvloom.loadtest.quality.tasks import ask, in_prompt, trials
from kvloom.server.cli import main

SCORES = ((0.1, 0.9), (0.8, 0.2), (0.3, 0.4))


def find(model_key: str) -> RazorCalibration:
    return RazorCalibration(model_key=model_key, model="tiny", induction=SCORES, echo=SCORES)


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("kvloom.engine.retention.window", "kvloom.engine.startup.capacity"):
        monkeypatch.setattr(f"{module}.find_razor", find)


def test_eval_retention(calibrated: None, tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(retention.__file__).read_text() * 2)
    rows = tmp_path / "rows.json"
    memory = 3 * 21 * 16 * 2 * 2 * 16 * 4 * 3  # three requests of 336 tokens
    argv = [str(tiny), "--dtype", "fp32", "--weights", "bf16", "--kv-memory", "8MiB", "--text", str(text), "--context", "300",
            "--settings", "razor:induction_share=0.3:min_window=24:window_divisor=6", "--batch", "2", "--windows", "2",
            "--scored", "12", "--rounds", "1", "--steps", "4", "--requests", "5", "--room", "24", "--memory", str(memory),
            "--json", str(rows), "--markdown", str(tmp_path / "table.md")]  # fmt: skip
    assert retention.main(argv) == 0
    everything, razor = json.loads(rows.read_text())
    assert (everything["retention"], razor["retention"]) == ("everything", "razor")
    assert everything["kl_mean"] == 0.0 < razor["kl_mean"]
    assert everything["held_share"] == 1.0 and razor["held_share"] < 0.6
    assert everything["at_once"] == 3 < razor["at_once"]
    assert razor["bytes_read"] < everything["bytes_read"]
    assert "| razor |" in (tmp_path / "table.md").read_text()


def test_every_retention_beside_every_method(calibrated: None, tiny: Path, tmp_path: Path) -> None:
    """One table: dense, a method alone, razor alone, and both together read less each time."""
    text = tmp_path / "text.txt"
    text.write_text(Path(retention.__file__).read_text() * 2)
    rows = tmp_path / "rows.json"
    argv = [str(tiny), "--dtype", "fp32", "--weights", "bf16", "--kv-memory", "8MiB", "--text", str(text), "--context", "400",
            "--settings", "razor:induction_share=0.3:min_window=24:window_divisor=6", "--methods", "tidal_decode",
            "--budgets", "64", "--batch", "2", "--windows", "2", "--scored", "6", "--rounds", "1", "--steps", "3",
            "--requests", "2", "--room", "4", "--memory", "4MiB", "--haystacks", "1", "--json", str(rows)]  # fmt: skip
    assert retention.main(argv) == 0
    found = json.loads(rows.read_text())
    cases = [(row["retention"], row["method"], row["budget"]) for row in found]
    pairs = [("dense", None), ("tidal_decode", 64)]
    assert cases == [(kept, *method) for kept in ("everything", "razor") for method in pairs]
    dense, alone, razor, both = found
    assert both["bytes_read"] < min(alone["bytes_read"], razor["bytes_read"]) and dense["bytes_read"] > alone["bytes_read"]
    assert both["held_bytes"] == razor["held_bytes"] < dense["held_bytes"] == alone["held_bytes"]
    assert dense["kl_mean"] == 0.0 < min(row["kl_mean"] for row in (alone, razor, both))
    assert all(row["needle_trials"] == 8 for row in found)


def test_settings_begin_with_everything() -> None:
    found = retention.settings("razor,everything,razor:window_divisor=4")
    assert [setting.config for setting in found] == [
        {"retention": "everything"},
        {"retention": "razor"},
        {"retention": "razor", "retention_options": '{"window_divisor": 4}'},
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


def test_a_later_turn_finds_what_only_dropped_tokens_held() -> None:
    """On the built-in model: facts stand before the window of local heads, and are asked for after those have dropped them."""
    shared = {"kv_memory": "128MiB", "max_model_len": 2048}
    options = '{"induction_share": 0.29, "min_window": 64, "window_divisor": 100}'
    everything, razor = LLM("smollm2", **shared), LLM("smollm2", **shared, retention="razor", retention_options=options)
    text = everything.tokenizer.encode(Path(retention.__file__).read_text(), add_special_tokens=False)
    asked = [trial for trial in trials("number", razor.tokenizer, text, 1000, 1, 0) if trial.depth < 0.8]
    window = KVOptions(selection="sink_window", budget=400)  # as much as razor reads: 0.31 + 0.69 * 0.08 of 1000, and more
    found, dense = ask(razor, asked, KVOptions(), 4), ask(everything, asked, KVOptions(), 4)
    blind = ask(everything, asked, window, 4)
    assert found.cost.held < 1.1 * dense.cost.held and found.cost.attended < 0.5 * dense.cost.attended
    assert dense.accuracy > 0.5 and found.accuracy >= 0.6 * dense.accuracy
    assert blind.accuracy <= 0.5 * found.accuracy, "facts beyond the window can be guessed, so this shows nothing"
    turn = in_prompt(asked)  # the question ends a new prompt, which all heads read densely; its answer's first token does too
    again, exact = ask(razor, turn, KVOptions(), 4), ask(everything, turn, KVOptions(), 4)
    assert [a.score for a in again.answers] == [a.score for a in exact.answers]
