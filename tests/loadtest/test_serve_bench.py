"""`kvloom bench serve` from its command line to its files, against the fake server and against none."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvloom.loadtest.client.record import Record
from kvloom.loadtest.load.command import main
from kvloom.loadtest.load.outputs import COLUMNS, cells
from kvloom.loadtest.load.plan import parse
from kvloom.loadtest.load.search import Search, sentence
from kvloom.loadtest.report import pages as files
from kvloom.loadtest.workloads.corpus import TextSource

KEYS = {
    *("date", "backend", "model_id", "num_prompts", "request_rate", "burstiness", "max_concurrency", "duration", "completed"),
    *("failed", "total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput", "output_throughput"),
    "total_token_throughput",
    *(
        f"{figure}_{name}_ms"
        for name in ("ttft", "tpot", "itl", "e2el")
        for figure in ("mean", "median", "std", "p50", "p90", "p99")
    ),
}
"""What `vllm bench serve` writes."""


@pytest.fixture
def bench(server: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command on small prompts; gives the exit code. Figures are not drawn."""
    monkeypatch.setattr(files, "write_report", lambda folder: [folder / "report.html"])
    monkeypatch.delenv("KVLOOM_API_KEY", raising=False)

    def run(*words: str) -> int:
        small = ["--input-len", "24", "--output-len", "4", "--num-requests", "6", "--warmup", "2", "--tokenizer", str(tiny)]
        return main(["--base-url", server.url, "--out", str(tmp_path / "out"), *small, *words])

    return run


def summary(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "out" / "summary.json").read_text())


def rows(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "out" / "requests.jsonl").read_text().splitlines()]


def test_a_closed_loop_run_leaves_summary_and_requests(bench: Any, server: Any, tmp_path: Path, capsys: Any) -> None:
    assert bench("--concurrency", "2", "--goodput", "ttft:60000", "--extra-body", '{"top_k": 1}') == 0
    found = summary(tmp_path)
    (stage,) = found["stages"]
    assert stage.keys() >= KEYS
    assert {key: found[key] for key in stage} == stage, "a single stage also stands at the top"
    assert (stage["completed"], stage["failed"], stage["total_output_tokens"], stage["total_input_tokens"]) == (6, 0, 24, 144)
    assert (stage["max_concurrency"], stage["request_rate"], stage["goodput_share"], stage["server"]) == (2, "inf", 1.0, None)
    assert stage["kv"] == {"reused.a": 12}
    settings = found["settings"]
    assert (settings["model"], settings["mode"], settings["workload_options"]["input_len"]) == ("fake", "closed", 24)
    assert "sending" in settings["definitions"]["ttft"] and not found["interrupted"]
    lines = rows(tmp_path)
    assert sorted(line["index"] for line in lines) == list(range(6))
    for line in lines:
        assert 0 <= line["scheduled"] <= line["sent"] < line["first_byte"] <= line["first_text"] == line["chunks"][0]
        assert line["last"] == line["chunks"][-1] <= line["ended"] and len(line["chunks"]) == 4
        assert (line["stage"], line["workload"], line["error_kind"], line["cached_tokens"]) == (0, "random", None, 1)
        assert "text" not in line
    assert len(server.seen) == 1 + 2 + 6, "a test request, warm-up, and the run"
    assert all(body["top_k"] == 1 for body in server.seen)
    assert "client lag" in capsys.readouterr().out


def test_stages_and_warm_up_draw_other_prompts(bench: Any, server: Any, tmp_path: Path) -> None:
    assert bench("--rate", "inf,500", "--save-text") == 0
    assert [stage["request_rate"] for stage in summary(tmp_path)["stages"]] == ["inf", 500.0]
    assert "completed" not in summary(tmp_path)
    prompts = [str(body["prompt"]) for body in server.seen[1:]]
    assert len(prompts) == 14 == len(set(prompts))
    assert rows(tmp_path)[0]["text"].startswith("w0 w1")
    server.seen.clear()
    assert bench("--concurrency", "1,2", "--same-prompts", "--warmup", "0") == 0
    prompts = [str(body["prompt"]) for body in server.seen[1:]]
    assert sorted(prompts[:6]) == sorted(prompts[6:])


def test_failures_are_counted_by_kind_and_said(bench: Any, server: Any, tmp_path: Path, capsys: Any) -> None:
    server.on_request = lambda number: server.refusals.append((429, {"Retry-After": "0.01"})) if number in (4, 6) else None
    assert bench("--concurrency", "1") == 0
    stage = summary(tmp_path)
    assert (stage["completed"], stage["failed"], stage["failures"]) == (4, 2, {"http_429": 2})
    assert {line["error_kind"] for line in rows(tmp_path)} == {None, "http_429"}
    error = capsys.readouterr().err
    assert "2 of 6 requests failed: 2 http_429" in error and "--retries" in error and len(error.splitlines()) == 1
    server.seen.clear()
    assert bench("--concurrency", "1", "--retries", "2") == 0
    assert (summary(tmp_path)["failed"], summary(tmp_path)["retries"]) == (0, 2)


def test_a_server_that_dies_in_mid_run_ends_in_a_line_and_a_partial_report(
    bench: Any, server: Any, tmp_path: Path, capsys: Any
) -> None:
    server.die_after = 1 + 2 + 5
    assert bench("--concurrency", "2,4", "--num-requests", "300") == 1
    found = summary(tmp_path)
    assert found["server_lost"] and len(found["stages"]) == 1, "no further stage is tried"
    stage = found["stages"][0]
    assert stage["completed"] >= 4 and stage["failures"]["connect"] >= 3 and stage["not_sent"] > 200
    assert len(rows(tmp_path)) == stage["completed"] + stage["failed"]
    assert "went away after" in capsys.readouterr().err.splitlines()[-1]


def test_ctrl_c_writes_what_was_measured(bench: Any, server: Any, tmp_path: Path, capsys: Any) -> None:
    server.on_request = lambda number: os.kill(os.getpid(), signal.SIGINT) if number == 8 else None
    assert bench("--concurrency", "2", "--num-requests", "300") == 130
    found = summary(tmp_path)
    assert found["interrupted"] and 1 <= found["completed"] < 300
    assert found["failed"] == 0 and found["cancelled"] >= 1 and found["not_sent"] > 200
    assert len(rows(tmp_path)) == found["completed"] + found["cancelled"]
    assert "interrupted; what was measured" in capsys.readouterr().err


def test_nobody_there(bench: Any, tmp_path: Path, capsys: Any) -> None:
    assert bench("--concurrency", "2", "--base-url", "http://127.0.0.1:9", "--ready-timeout", "0.1") == 1
    error = capsys.readouterr().err
    assert "no server is ready at http://127.0.0.1:9" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out" / "requests.jsonl").exists()


def test_refusals_at_the_start(bench: Any, server: Any, capsys: Any) -> None:
    assert bench("--concurrency", "2", "--model", "other") == 1
    assert "HTTP 404: no model other here" in capsys.readouterr().err
    server.keys = ("main", "theirs")
    assert bench("--concurrency", "2") == 1
    assert "--api-key" in capsys.readouterr().err
    assert bench("--concurrency", "2", "--model", "fake", "--api-key", "wrong") == 1
    assert "HTTP 401: the API key is not known here" in capsys.readouterr().err
    assert bench("--concurrency", "2", "--api-key", "main", "--tenant-key", "acme=wrong") == 1
    assert "of tenant acme: HTTP 401" in capsys.readouterr().err
    assert bench("--concurrency", "2", "--api-key", "main", "--tenant-key", "acme=theirs") == 0
    assert "main" not in capsys.readouterr().out


def test_a_stage_without_any_completed_request_fails(bench: Any, server: Any, tmp_path: Path, capsys: Any) -> None:
    server.on_request = lambda number: server.refusals.append((500, {})) if number > 3 else None
    assert bench("--concurrency", "2") == 1
    assert summary(tmp_path)["failures"] == {"http_500": 6}
    assert "6 http_500 (HTTP 500: status 500, as told)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--concurrency", "0"], "above 0"),
        (["--rate", "fast"], "numbers"),
        (["--rate", "1", "--concurrency", "2"], "exclude each other"),
        (["--concurrency", "2", "--max-concurrency", "2"], "--max-concurrency"),
        ([], "give --rate"),
        (["--ramp-up", "linear", "--ramp-from", "1"], "--ramp-to"),
        (["--rate", "1", "--input-len", "many"], "input_len is 'many'"),
        (["--rate", "1", "--workload", "nonsense"], "no workload named 'nonsense'"),
        (["--rate", "1", "--extra-body", "[1]"], "JSON object"),
        (["--rate", "1", "--tenant-key", "s3cret"], "TENANT=KEY"),
        (["--rate", "1", "--goodput", "ttft"], "MILLISECONDS"),
        (["--rate", "1", "--tokenizer", "nobody/knows/this"], "--tokenizer"),
        (["--rate", "1", "--base-url", "localhost"], "http://HOST:PORT"),
        (["--rate", "1", "--num-requests", "0"], "1 to 1e+06"),
        (["--rate", "1", "--burstiness", "0"], "0.001 to 1000"),
        (["--rate", "1", "--timeout", "nan"], "--timeout is nan; allowed: 0.001 to 86400"),
        (["--rate", "nan"], "--rate is 'nan'"),
        (["--rate", "1e9"], "up to 100000"),
        (["--rate", "1", "--goodput", "ttft:-5"], "MILLISECONDS"),
        (["--rate", "1", "--slo", "ttft=0"], "more than 0"),
        (["--rate", "1", "--slo", "ttft=5s", "--goodput", "tpot:5"], "give one of them"),
        (["--rate", "1", "--percentiles", "50,101"], "up to 100"),
        (["--rate", "1", "--percentiles", ""], "--percentiles"),
        (["--rate", "1", "--header", "s3cret"], "NAME: VALUE"),
        (["--rate", "1", "--header", "X-A: s3cret\r\nX-B: 1"], "on one line"),
        (["--rate", "1", "--header", "Content-Length: 3"], "cannot set Content-Length"),
        (["--stages", "2"], "RATE@TIME"),
        (["--stages", "2@30s,c4@30s"], "all of rates"),
        (["--stages", "inf@30s"], "must be a number"),
        (["--stages", "2@0s"], "more than 0"),
        (["--stages", "2@30 days"], "no time"),
        (["--stages", "2@30s"], "--num-requests follows"),
        (["--stages", "90000@1h"], "1,000,000 requests"),
        (["--stages", "2@1s", "--rate", "1"], "exclude each other"),
        (["--find-rate"], "--slo ttft=500ms"),
        (["--find-rate", "--slo", "ttft=5s", "--concurrency", "2"], "rates of its own"),
        (["--find-rate", "--slo", "ttft=5s", "--rate", "1,2"], "one rate"),
        (["--find-rate", "--slo", "ttft=5s", "--find-steps", "0"], "1 to 50"),
        (["--find-rate", "--slo", "ttft=5s", "--slo-share", "1.5"], "0.01 to 1"),
    ],
)
def test_wrong_flags_end_in_one_line(bench: Any, server: Any, capsys: Any, words: list[str], hint: str) -> None:
    assert bench(*words) == 2
    error = capsys.readouterr().err
    assert hint in error and len(error.splitlines()) == 1 and "s3cret" not in error
    assert not server.seen


def test_a_malformed_trace_ends_in_one_line(server: Any, tiny: Path, tmp_path: Path, capsys: Any) -> None:
    trace = tmp_path / "trace.jsonl"
    words = ["--base-url", server.url, "--workload", "trace", "--tokenizer", str(tiny), "--trace", str(trace)]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "trace.jsonl" in capsys.readouterr().err
    trace.write_text('{"timestamp": 0, "input_length": "many"}\n')
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "trace.jsonl" in error and len(error.splitlines()) == 1
    assert not server.seen


def test_unknown_flags_end_in_one_line(capsys: Any) -> None:
    for words, hint in ((["--frobnicate"], "--frobnicate"), (["--workload", "random", "--documents", "3"], "--workload rag")):
        with pytest.raises(SystemExit) as end:
            parse(["--rate", "1", *words])
        error = capsys.readouterr().err
        assert end.value.code == 2 and hint in error and len(error.splitlines()) == 1


def test_the_key_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLOOM_API_KEY", "k")
    assert parse(["--rate", "1"]).api_key == "k"
    assert parse(["--rate", "1", "--api-key", "given"]).api_key == "given"


def test_server_figures_stand_beside_ours(bench: Any, server: Any, tmp_path: Path) -> None:
    seconds = "kvloom:time_to_first_token_seconds"
    server.metrics = f"{seconds}_sum {{n}}\n{seconds}_count {{n}}\nkvloom:num_preemptions_total 0\n"
    assert bench("--concurrency", "3") == 0
    assert summary(tmp_path)["server"]["mean_ttft_ms"] == pytest.approx(1000)
    assert summary(tmp_path)["server"]["preemptions"] == 0


def test_reservations_are_said(bench: Any, server: Any, capsys: Any) -> None:
    server.cached = 12
    assert bench("--concurrency", "3") == 0
    assert "72 of 144 prompt tokens cached (50.0%); the server knew them from an earlier run" in capsys.readouterr().out
    server.cached = 1
    assert bench("--concurrency", "3") == 0
    assert "earlier run" not in capsys.readouterr().out
    server.usage = False
    assert bench("--concurrency", "3") == 0
    assert "6 answers came without usage" in capsys.readouterr().out


def test_the_chat_endpoint_gets_text_for_token_ids(bench: Any, server: Any, tmp_path: Path, tiny: Path) -> None:
    assert bench("--concurrency", "2", "--endpoint", "chat", "--input-len", "64") == 0
    text = TextSource.load(str(tiny))
    for body in server.seen[3:]:
        (message,) = body["messages"]
        assert message["role"] == "user" and "\ufffd" not in message["content"]
        assert abs(len(text.encode(message["content"])) - 64) <= 6
    assert summary(tmp_path)["completed"] == 6 and "prompt" not in server.seen[-1]


def test_headers_are_sent_with_every_request_and_not_written_down(bench: Any, server: Any, tmp_path: Path) -> None:
    assert bench("--concurrency", "2", "--header", "X-Route: left", "--header", "authorization: Bearer s3cret",
                 "--api-key", "other") == 0  # fmt: skip
    for body in server.seen:
        assert body["headers"]["X-Route"] == "left"
        keys = [value for name, value in body["headers"].items() if name.lower() == "authorization"]
        assert keys == ["Bearer s3cret"], "one header, and the caller's"
    assert summary(tmp_path)["settings"]["headers"] == ["X-Route", "authorization"]
    assert "s3cret" not in (tmp_path / "out" / "summary.json").read_text()


def test_percentiles_are_those_that_were_asked_for(bench: Any, tmp_path: Path, capsys: Any) -> None:
    assert bench("--concurrency", "2", "--percentiles", "99.9,25") == 0
    found = summary(tmp_path)
    assert found["percentiles"] == [25.0, 99.9]
    waits = [line["first_text"] - line["sent"] for line in rows(tmp_path)]
    assert found["p25_ttft_ms"] == pytest.approx(float(np.percentile(waits, 25)) * 1e3, abs=0.01)
    assert found["p25_ttft_ms"] <= found["p50_ttft_ms"] <= found["p99.9_ttft_ms"]
    table = capsys.readouterr().out
    assert "p25" in table and "p99.9" in table and "p90" not in table


def test_a_line_per_request_for_a_spreadsheet(bench: Any, server: Any, tmp_path: Path) -> None:
    server.on_request = lambda number: server.refusals.append((500, {})) if number == 5 else None
    assert bench("--concurrency", "1") == 0
    with (tmp_path / "out" / "requests.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["index"] for line in lines] == [str(row["index"]) for row in rows(tmp_path)]
    for line, row in zip(lines, rows(tmp_path)):
        assert line["error_kind"] == (row["error_kind"] or "") and line["output_tokens"] == str(row["output_tokens"])
        if not row["error"]:
            assert float(line["ttft_ms"]) == pytest.approx((row["first_text"] - row["sent"]) * 1e3, abs=0.01)
        else:
            assert not line["ttft_ms"] and "status 500" in line["error"]
    record = Record(index=0, label="=1+1", error="@evil")
    line = dict(zip(COLUMNS, cells({"label": "=1+1", "error": "@evil"}, record)))
    assert (line["label"], line["error"]) == ("'=1+1", "'@evil")


def test_stages_by_time(bench: Any, server: Any, tmp_path: Path) -> None:
    plan = parse(["--stages", "2@30s,4@1m"])
    assert [(load.name, plan.requests(load)) for load in plan.loads] == [("rate 2 for 30 s", 60), ("rate 4 for 60 s", 240)]
    small = ["--input-len", "24", "--output-len", "4", "--warmup", "0"]
    server.delay = 0.01
    assert bench(*small, "--stages", "c2@400ms,c4@0.2s", "--num-requests", "400") == 0
    first, second = summary(tmp_path)["stages"]
    assert (first["name"], second["name"]) == ("concurrency 2 for 0.4 s", "concurrency 4 for 0.2 s")
    for stage, seconds, limit in ((first, 0.4, 2), (second, 0.2, 4)):
        mine = [row for row in rows(tmp_path) if row["stage"] == stage["stage"]]
        assert 0 < stage["completed"] == stage["num_prompts"] == len(mine) < 400 and not stage["not_sent"]
        assert all(row["scheduled"] <= seconds for row in mine) and stage["peak_concurrency"] <= limit
        assert not stage["ran_out"]
    assert bench(*small, "--stages", "c2@1h", "--num-requests", "6") == 0
    assert summary(tmp_path)["ran_out"] and summary(tmp_path)["completed"] == 6


def test_a_search_for_the_highest_rate(bench: Any, server: Any, tmp_path: Path, capsys: Any) -> None:
    words = ("--find-rate", "--rate", "500", "--find-steps", "3", "--slo", "ttft=60s,e2el=1m")
    assert bench(*words) == 0
    found = summary(tmp_path)
    assert [step["rate"] for step in found["search"]["steps"]] == [500, 1000, 2000]
    assert found["search"]["rate"] == 2000 and found["search"]["too_much"] is None
    assert [stage["request_rate"] for stage in found["stages"]] == [500, 1000, 2000]
    assert found["settings"]["loads"] == ["rate 500", "rate 1000", "rate 2000"] and found["settings"]["slo_share"] == 0.95
    prompts = [str(body["prompt"]) for body in server.seen[3:]]
    assert len(set(prompts)) == 18, "every step has prompts of its own"
    assert "2000 req/s keeps 95% of requests within the objectives" in capsys.readouterr().out


def answers(limit: float, rate: float) -> float:
    return 1.0 if rate <= limit else 0.2


@pytest.mark.parametrize("limit", [5.3, 0.3, 40.0, 1.0])
def test_a_search_ends_next_to_the_limit(limit: float) -> None:
    search = Search(1.0, 0.95, 20)
    while (rate := search.next()) is not None:
        search.add(rate, answers(limit, rate))
    found = search.result()
    assert found["rate"] <= limit < found["too_much"] <= found["rate"] * 1.0501
    assert len(found["steps"]) < 14 and f"is {found['rate']:g} req/s" in sentence(found)


def test_a_search_is_bounded() -> None:
    search = Search(1.0, 0.95, 4)
    while (rate := search.next()) is not None:
        search.add(rate, None)
    assert [step.rate for step in search.steps] == [1, 0.5, 0.25, 0.125] and search.result()["rate"] is None
    assert "No rate that was tried" in sentence(search.result())


def test_a_server_that_trusts_nobody_is_told_how_to(server: Any, tiny: Path, capsys: Any) -> None:
    server.trusting = False
    for workload in ("tenants", "rag"):
        words = ["--input-len", "160"] if workload == "tenants" else []
        small = ["--num-requests", "6", "--warmup", "2", "--tokenizer", str(tiny), "--output-len", "4"]
        code = main(["--base-url", server.url, "--workload", workload, "--concurrency", "2", *words, *small])
        error = capsys.readouterr().err
        port = server.url.rsplit(":", 1)[1]
        assert code == 1 and f"`kvloom serve fake --port {port} --trusted-proxies 127.0.0.1`" in error, error
        assert len(error.splitlines()) == 1 and all(not body.get("user") for body in server.seen[:-1])
        server.seen.clear()
