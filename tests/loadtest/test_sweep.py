"""Sweeps: which combinations are tried, which are on the front, and a whole sweep against a fake server command."""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from kvloom.engine.errors import ConfigError
from kvloom.loadtest.load.run import Outcome
from kvloom.loadtest.quality.scoring import Position, ProbeError, Window, _positions, compare, kl
from kvloom.loadtest.report import main as report_main
from kvloom.loadtest.sweep import command, measure
from kvloom.loadtest.sweep.grid import Point, expand, flags, parse_grid
from kvloom.loadtest.sweep.pareto import pareto_front

NAN = math.nan


def combinations(*texts: str) -> list[str]:
    return [" ".join(f"{k}={v}" for k, v in settings) for settings in expand(parse_grid(texts))]


def test_the_grid_is_a_product_without_repetition() -> None:
    assert combinations("selection=dense,token_select", "budget=256,512") == [
        "selection=dense", "selection=token_select budget=256", "selection=token_select budget=512"]  # fmt: skip
    assert combinations("budget=256,256", "reuse=off,exact") == ["budget=256 reuse=off", "budget=256 reuse=exact"]
    assert combinations() == [""]


def test_values_may_be_json_objects() -> None:
    (settings, other) = expand(parse_grid(['selection_options={"sinks": 4, "pages": 2},{"sinks": 8}']))
    assert flags(settings) == ["--selection-options", '{"sinks": 4, "pages": 2}']
    assert flags(other) == ["--selection-options", '{"sinks": 8}']
    assert combinations("selection=dense,recycled", "draft=true,false", "draft_tokens=2") == [
        "selection=dense",
        "selection=recycled draft=true draft_tokens=2",
        "selection=recycled draft=false draft_tokens=2",
    ]


def test_dense_comes_first_as_the_reference() -> None:
    assert combinations("selection=tidal_decode,dense")[0] == "selection=dense"


def test_a_budget_counts_where_retention_uses_it() -> None:
    found = combinations("selection=dense", "budget=1,2", "retention=everything,razor")
    assert found == [
        "selection=dense retention=everything",
        "selection=dense budget=1 retention=razor",
        "selection=dense budget=2 retention=razor",
    ]


@pytest.mark.parametrize("text", ["budget", "=1", "budget=", "Budget=1", "bud get=1"])
def test_bad_grids_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not NAME=VALUE"):
        parse_grid([text])


def test_a_setting_may_be_named_once() -> None:
    with pytest.raises(ConfigError, match="twice"):
        parse_grid(["max-num-seqs=1", "max_num_seqs=2"])


def test_settings_become_flags_and_names() -> None:
    settings = (("selection", "token_select"), ("max_num_seqs", "4"), ("access_log", "false"))
    assert flags(settings) == ["--selection", "token_select", "--max-num-seqs", "4", "--no-access-log"]
    assert Point("kvloom", settings[:2], "").label == "token_select, max_num_seqs 4"
    assert Point("vllm", (), "").label == "vllm"
    assert Point("kvloom", (("model", "a/b c"),), "").slug == "kvloom-model-a-b-c"


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(1, 1), (2, 2), (3, 1)], [False, True, True]),
        ([(1, 3), (2, 2), (3, 1)], [True, True, True]),
        ([(1, 1), (1, 1), (0, 1), (1, 0)], [True, True, False, False]),
        ([(5, NAN), (1, 1), (NAN, 9)], [False, True, False]),
        ([(math.inf, 0), (1, 1)], [True, True]),
        ([], []),
    ],
)
def test_the_pareto_front(points: list[tuple[float, float]], front: list[bool]) -> None:
    assert pareto_front(points) == front


def position(token: str, **shares: float) -> Position:
    top = {name: math.log(share) for name, share in shares.items()}
    return Position(token, top[token], top)


def test_kl_over_listed_tokens_and_the_rest() -> None:
    p, q = position("a", a=0.5, b=0.25), position("a", a=0.25, b=0.5)
    assert kl(p, p) == 0.0
    assert kl(p, q) == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))


def test_kl_of_a_token_that_is_not_listed_uses_the_bound() -> None:
    full_p = {"a": 0.05, "b": 0.9, "c": 0.03, "d": 0.02}
    full_q = {"a": 0.4, "b": 0.1, "c": 0.3, "d": 0.2}
    full = sum(p * math.log(p / full_q[name]) for name, p in full_p.items())
    found = kl(position("a", a=0.05, b=0.9), position("a", a=0.4, c=0.3, d=0.2))  # b is not listed: at most 0.2
    assert 0.9 < found <= full


def test_agreement_of_two_servers() -> None:
    reference = [[position("a", a=0.5, b=0.25)] * 3, [position("a", a=0.5, b=0.25)]]
    found = [[position("a", a=0.5, b=0.25)] * 3, [position("a", a=0.25, b=0.5)]]
    result = compare(reference, found)
    assert (result.tokens, result.top1, result.perplexity_reference) == (4, 0.75, pytest.approx(2.0))
    assert result.perplexity == pytest.approx(2 ** (5 / 4))
    assert result.covered == pytest.approx(0.75)
    assert result.kl_mean == pytest.approx(0.25 * math.log(2) / 4)
    with pytest.raises(ProbeError, match="same tokens"):
        compare(reference, found[:1])


@pytest.mark.parametrize(
    ("choice", "why"),
    [
        ({"text": "something else", "logprobs": {}}, "tokens of its own"),
        ({"text": "a b"}, "0 log-probabilities for 2"),
        ({"text": "a b", "logprobs": {"tokens": ["a"], "token_logprobs": [0.0], "top_logprobs": [{}]}}, "1 log-prob"),
    ],
)
def test_a_server_that_does_not_force_tokens_is_told_apart(choice: dict[str, object], why: str) -> None:
    with pytest.raises(ProbeError, match=why):
        _positions(Window([1], [2, 3], "a b"), choice)


@pytest.fixture
def sweep(tiny: Path, tmp_path: Path) -> list[str]:
    """The flags of a small sweep over the fake server."""
    script = Path(__file__).with_name("fake_openai.py")
    start = f"fake={shlex.join([sys.executable, str(script)])} {{port}} {shlex.quote(str(tiny))} {{settings}}"
    return ["--start", start, "--tokenizer", str(tiny), "--input-len", "24", "--output-len", "6", "--concurrency", "1,2",
            "--num-requests", "4", "--warmup", "1", "--quality", "agreement", "--quality-context", "20",
            "--quality-tokens", "8", "--out", str(tmp_path / "out")]  # fmt: skip


def results(folder: Path) -> dict[str, dict[str, object]]:
    return {row["label"]: row for row in json.loads((folder / "sweep.json").read_text())["results"]}


def test_a_sweep_from_end_to_end(sweep: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    code = command.main([*sweep, "--grid", "selection=dense,token_select,refused", "--grid", "budget=16,64"])
    assert code == 0
    found = results(out)
    assert {label: row["outcome"] for label, row in found.items()} == {
        "fake, dense": "measured",
        "fake, token_select, budget 16": "measured",
        "fake, token_select, budget 64": "measured",
        "fake, refused, budget 16": "refused",
        "fake, refused, budget 64": "refused",
    }
    kls = [found[f"fake, {name}"]["quality"]["agreement"]["kl_mean"] for name in ("dense", "token_select, budget 64")]  # type: ignore[index]
    assert kls[0] == 0.0 and kls[1] > 0.0
    for name in ("report.md", "report.html"):
        text = (out / name).read_text()
        assert "3 measured, 2 refused" in text and "allowed: dense" in text
    assert (out / "pareto_agreement.png").read_bytes().startswith(b"\x89PNG")
    assert "Agreement with fake, dense" in (out / "report.md").read_text()
    again = tmp_path / "again"
    assert report_main([str(out), "--out", str(again)]) == 0
    assert (again / "report.md").read_text() == (out / "report.md").read_text()


def test_servers_that_fail_are_listed_and_told(sweep: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*sweep, "--grid", "selection=crash,deaf,own"]) == 1
    found = results(tmp_path / "out")
    assert {row["outcome"] for label, row in found.items() if "own" not in label} == {"failed"}
    assert "exit code 3" in str(found["fake, crash"]["message"])
    assert "tokens of its own" in str(found["fake, own"]["quality"])
    report = (tmp_path / "out" / "report.md").read_text()
    assert "1 measured, 2 failed" in report and "agreement probe" in report


def test_ctrl_c_keeps_what_was_measured(sweep: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = measure.bench

    def twice(*words: Any) -> Outcome:
        calls.append(words)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(*words)

    monkeypatch.setattr(measure, "bench", twice)
    assert command.main([*sweep, "--grid", "selection=dense,a,b", "--grid", "budget=16"]) == 130
    assert [row["outcome"] for row in results(tmp_path / "out").values()] == ["measured", "interrupted"]
    assert "was interrupted" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        ([], "nothing to measure"),
        (["m", "--base-url", "http://x"], "set by the sweep"),
        (["m", "--start", "a=b"], "{port}"),
        (["--start", "a=b {port}", "--start", "a=c {port}"], "same name"),
        (["m", "--rate", "fast"], "--rate"),
        (["m", "--grid", "x"], "--grid"),
        (["m", "--quality", "needle", "--quality-arg=--rate=1"], "exclude each other"),
    ],
)
def test_wrong_flags_end_before_a_server_starts(argv: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(argv) == 2
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1
