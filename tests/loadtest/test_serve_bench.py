"""`kvloom bench serve` from its command line to its files, against the fake server and against none."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from kvloom.loadtest.plan import parse
from kvloom.loadtest.report import files
from kvloom.loadtest.serve_bench import main

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
        (["--rate", "1", "--endpoint", "chat"], "token ids"),
        (["--rate", "1", "--base-url", "localhost"], "http://HOST:PORT"),
        (["--rate", "1", "--num-requests", "0"], "1 or more"),
        (["--rate", "1", "--burstiness", "0"], "more than 0"),
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
