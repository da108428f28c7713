"""Figures from records whose every instant is known."""

from __future__ import annotations

import math

import pytest

from kvloom.loadtest.client.arrivals import Load
from kvloom.loadtest.client.drive import StageRun
from kvloom.loadtest.client.record import Record
from kvloom.loadtest.load.measures import Slo, Spread, peak_concurrency, stage_summary, summarise
from kvloom.loadtest.study.intervals import bootstrap_median


def record(index: int, sent: float, first: float, gap: float, tokens: int, **more: object) -> Record:
    """Sent, first text after `first` seconds, one token per chunk every `gap` seconds."""
    chunks = [sent + first + i * gap for i in range(tokens)]
    return Record(index=index, scheduled=sent - 0.01, sent=sent, chunks=chunks, last=chunks[-1], ended=chunks[-1] + 0.001,
                  prompt_tokens=10, output_tokens=tokens, tokens_from="usage", **more)  # type: ignore[arg-type]  # fmt: skip


def failed(index: int, sent: float, kind: str) -> Record:
    return Record(index=index, scheduled=sent, sent=sent, ended=sent + 0.5, error=f"{kind} it was", error_kind=kind)


RUN = StageRun(
    started=100.0,
    planned=7,
    records=[
        record(0, 100.0, 0.1, 0.02, 5, cached_tokens=4, tenant="a", label="turn 1", correct=True),
        record(
            1, 100.5, 0.3, 0.04, 5, cached_tokens=8, tenant="b", label="turn 2", correct=False, kv={"reused": {"prefix": 8}}
        ),
        record(2, 101.0, 0.2, 0.02, 1, tenant="a", label="turn 1"),
        failed(3, 101.0, "http_429"),
        failed(4, 101.0, "stream"),
        Record(index=5, scheduled=101.0, sent=101.0, ended=101.1, cancelled=True, tenant="b", output_tokens=3, chunks=[101.05]),
    ],
)


def test_times_counts_and_throughput() -> None:
    stage = stage_summary(RUN, Load(rate=2.0), None, last_due=3.5)
    assert (stage["completed"], stage["failed"], stage["cancelled"], stage["not_sent"]) == (3, 2, 1, 1)
    assert stage["failures"] == {"http_429": 1, "stream": 1}
    assert stage["duration"] == pytest.approx(1.2)  # 100.0 -> 101.2
    assert stage["output_throughput"] == pytest.approx(11 / 1.2)
    assert stage["total_token_throughput"] == pytest.approx(41 / 1.2)
    assert stage["mean_ttft_ms"] == pytest.approx(200)
    assert stage["median_ttft_ms"] == stage["p50_ttft_ms"] == pytest.approx(200)
    assert stage["std_ttft_ms"] == pytest.approx(81.65, rel=1e-3)
    assert stage["mean_tpot_ms"] == pytest.approx(30)  # of 20 and 40: a single token has none
    assert stage["mean_itl_ms"] == pytest.approx(30)
    assert stage["p99_e2el_ms"] == pytest.approx(454.8, abs=0.1)  # of 180, 200 and 460
    assert stage["client_lag"]["mean_ms"] == pytest.approx(5)
    assert stage["client_lag"]["max_ms"] == pytest.approx(10)
    assert (stage["request_rate"], stage["tokens_per_chunk"], stage["tokens_from_chunks"]) == (2.0, 1.0, 0)


def test_reuse_correctness_and_groups() -> None:
    stage = stage_summary(RUN, Load(rate=2.0), None, last_due=3.5)
    assert stage["cached_tokens"] == 12
    assert stage["hit_rate"] == pytest.approx(0.6), "the request whose server told nothing must not count"
    assert stage["correct_rate"] == 0.5
    assert stage["kv"] == {"reused.prefix": 8}
    assert list(stage["tenants"]) == ["a", "b"]
    assert stage["tenants"]["a"]["share"] == pytest.approx(6 / 11)
    assert (stage["tenants"]["b"]["completed"], stage["tenants"]["b"]["cancelled"]) == (1, 1)
    assert stage["labels"]["turn 2"]["mean_ttft_ms"] == pytest.approx(300)


def test_goodput_counts_requests_that_meet_every_limit() -> None:
    for words, met in ((["ttft:250"], 2), (["ttft:350", "tpot:30"], 2), (["e2el:190"], 1), (["ttft:1"], 0)):
        stage = stage_summary(RUN, Load(rate=2.0), Slo.parse(words), last_due=3.5)
        assert stage["request_goodput"] == pytest.approx(met / 1.2), words
        assert stage["goodput_share"] == pytest.approx(met / 5), "failures are not good"
    assert stage["slo"] == {"ttft_ms": 1.0, "tpot_ms": None, "e2el_ms": None}
    for word in ("ttft", "itl:3", "tpot:fast"):
        with pytest.raises(ValueError, match="MILLISECONDS"):
            Slo.parse([word])


def test_nothing_completed_gives_null_not_nan() -> None:
    stage = stage_summary(StageRun(0.0, 2, [failed(0, 1.0, "timeout"), failed(1, 1.5, "timeout")]), Load(concurrency=2), None)
    assert stage["mean_ttft_ms"] is None and stage["median_ttft_ms_ci95"] is None and stage["hit_rate"] is None
    assert (stage["completed"], stage["output_throughput"], stage["request_rate"], stage["max_concurrency"]) == (
        0,
        0.0,
        "inf",
        2,
    )
    assert stage["duration"] == pytest.approx(1.0)
    assert math.isnan(summarise([]).ttft.mean)
    assert not any(isinstance(value, float) and math.isnan(value) for value in stage.values())


def test_a_trace_and_a_ramp_offer_their_mean_rate() -> None:
    assert stage_summary(RUN, Load(), None, last_due=3.5)["request_rate"] == 2.0


def test_peak_concurrency_counts_overlaps() -> None:
    assert peak_concurrency(RUN.records) == 4
    apart = [record(0, 0.0, 0.1, 0.1, 2), record(1, 0.201, 0.1, 0.1, 2)]
    assert peak_concurrency(apart) == 1, "one that starts as another ends does not overlap"


def test_the_interval_holds_the_median_and_narrows() -> None:
    few, many = [float(i % 10) for i in range(10)], [float(i % 10) for i in range(1000)]
    wide, narrow = bootstrap_median(few), bootstrap_median(many)
    assert wide is not None and narrow is not None
    assert wide[0] <= 4.5 <= wide[1]
    assert narrow[1] - narrow[0] < wide[1] - wide[0]
    assert bootstrap_median([1.0]) is None


def test_spread_of_one_value() -> None:
    one = Spread.of([2.0])
    assert (one.mean, one.p50, one.p90, one.p99) == (2.0, 2.0, 2.0, 2.0) and math.isnan(one.std)
