"""`kvloom bench builds` and `kvloom bench quota`: what they compare, and what they refuse."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kvloom.engine import LLM
from kvloom.engine.errors import ConfigError
from kvloom.loadtest.bench import builds, quota
from kvloom.loadtest.bench.engine import prefill_seconds
from kvloom.loadtest.study.flags import BenchError


def test_builds_take_turns_and_are_told_beside_the_first(make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        builds,
        "PARTS",
        {"decode": partial(builds._decode, batch=2, context=20), "prefill": partial(prefill_seconds, length=24)},
    )
    rows = builds.measure({"native": make_llm(), "other": make_llm()}, 2)
    assert [set(row) for row in rows] == [{"build", "decode", "times decode", "prefill", "times prefill"}] * 2
    assert rows[0]["times decode"] == rows[0]["times prefill"] == 1.0
    assert all(row[part] > 0 for row in rows for part in ("decode", "prefill"))


def test_a_build_is_named_for_its_engine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVLOOM_NATIVE", raising=False)
    with builds.named("x86-64-v3"):
        assert os.environ["KVLOOM_NATIVE"] == "x86-64-v3"
    assert "KVLOOM_NATIVE" not in os.environ
    monkeypatch.setenv("KVLOOM_NATIVE", "native")
    with pytest.raises(ConfigError), builds.named("x86-64-v3"):
        raise ConfigError("no such model")
    assert os.environ["KVLOOM_NATIVE"] == "native"


def test_without_a_variant_there_is_nothing_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builds, "processor_flags", frozenset)
    with pytest.raises(ConfigError, match="nothing to compare"):
        builds.main(["smollm2"])


def test_what_is_told_of_steps() -> None:
    row = quota.summary(1.5, 2, [0.01] * 98 + [0.02, 0.5])
    assert row["quota"] == 1.5 and row["threads"] == "2" and row["median"] == 0.01
    assert row["mean"] == pytest.approx(0.015) and row["rate"] == pytest.approx(1 / 0.015) and row["slow"] > 0.02


@pytest.mark.parametrize("given", ["0", "nan", "x", "1,,2", "-1"])
def test_quotas_have_a_range(given: str) -> None:
    with pytest.raises(ConfigError, match="--quotas is"):
        quota.main(["smollm2", f"--quotas={given}"])


def test_a_quota_above_the_cores_there_are_is_none() -> None:
    with pytest.raises(ConfigError, match="may use"):
        quota.main(["smollm2", "--quotas", "1000"])


def test_a_group_that_cannot_be_made_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "MOUNTED", tmp_path / "absent")
    with pytest.raises(BenchError, match="needs root"):
        quota.main(["smollm2", "--quotas", "1", "--threads", "1", "--rounds", "1"])


def test_an_engine_joins_the_group_before_it_starts(
    make_llm: Callable[..., LLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    joined = tmp_path / "cgroup.procs"

    def start(model: str, **settings: Any) -> LLM:
        assert joined.read_text() == "0" and (model, settings["threads"]) == ("smollm2", 2)
        return make_llm()

    monkeypatch.setattr(quota, "LLM", start)
    monkeypatch.setattr(quota, "CONTEXT", 20)
    monkeypatch.setattr(quota, "STEPS", 3)
    assert quota.main(["smollm2", "--inside", str(joined), "--threads", "2"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3
