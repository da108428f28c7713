"""KV memory beside what the machine has: refused with the sum shown, or told."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from kvloom.engine import LLM
from kvloom.engine.errors import ConfigError
from kvloom.engine.startup import memory
from kvloom.engine.startup.available import GIB, MIB, size
from kvloom.engine.startup.memory import check_kv_memory


def test_more_than_the_machine_has_is_refused_with_the_sum(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 20 * GIB)
    with pytest.raises(ConfigError) as error:
        LLM(str(tiny), kv_memory="900GiB")
    text = str(error.value)
    for part in (
        "900.0 GiB for the KV cache",
        "450.0 GiB for segments",
        "112.5 GiB for selection",
        "1,462.5 GiB",
        "20.0 GiB are free",
    ):
        assert part in text
    most = int(text.split("give about ")[1].split("MiB")[0]) * MIB
    assert most == pytest.approx(20 * GIB / 1.625, abs=MIB)
    check_kv_memory(most, most // 2, most // 8)


def test_what_fits_alone_but_not_with_all_beside_it_is_told(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 10 * MIB)
    with caplog.at_level(logging.WARNING, "kvloom.engine"):
        LLM(str(tiny), kv_memory="8MiB", dtype="fp32")
    assert "8 MiB for the KV cache" in caplog.text and "10 MiB are free" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "kvloom.engine"):
        LLM(str(tiny), kv_memory="8MiB", dtype="fp32", segment_memory=0, selection_memory=MIB)
    assert "memory can run out" not in caplog.text


def test_a_context_that_is_cut_says_what_the_whole_one_takes(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "kvloom.engine"):
        llm = LLM(str(tiny), kv_memory="100KiB", dtype="fp32")
    tokens = llm.core.cache.longest
    assert f"kv_memory holds {tokens} tokens" in caplog.text and "the model's 512, which takes about" in caplog.text


def test_sizes() -> None:
    assert [size(count) for count in (23_040, 300 * MIB, 3 * GIB // 2, 900 * GIB)] == [
        "23,040 bytes", "300 MiB", "1.5 GiB", "900.0 GiB"
    ]  # fmt: skip
