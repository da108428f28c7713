"""Reports from synthetic runs of every shape: whole, partial, without success, of one request, over several loads."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvloom.loadtest.report import main
from kvloom.loadtest.report.bars import heaviest, plots
from kvloom.loadtest.report.compare import differences
from kvloom.loadtest.report.pages import write_report
from kvloom.loadtest.report.run import ReportError, Row, load_run
from kvloom.loadtest.report.tables import failures, latency
from kvloom.loadtest.report.timeline import Kinds, kinds
from kvloom.loadtest.report.verdict import verdict, warnings

PNG = b"\x89PNG"


def request(source: random.Random, index: int, stage: int, sent: float, slow: float, **extra: Any) -> dict[str, Any]:
    """A request that behaves as on a server that is `slow` times busier than idle."""
    first = sent + source.gammavariate(8, 0.025) * slow
    chunks = [first]
    for _ in range(23):
        chunks.append(chunks[-1] + source.gammavariate(20, 0.0015) * slow * (12 if source.random() < 0.02 else 1))
    return {"index": index, "stage": stage, "workload": "rag", "tenant": "", "label": "", "scheduled": sent - 0.001,
            "sent": sent, "first_byte": first - 0.001, "first_text": first, "chunks": chunks, "last": chunks[-1],
            "prompt_tokens": 512, "output_tokens": 24, "cached_tokens": 0,
            "kv": None, "finish_reason": "length", "cancelled": False, "error": None,
            "error_kind": None, "status": 200, "retries": 0, "correct": None, **extra}  # fmt: skip


def broken(row: dict[str, Any], kind: str, text: str) -> dict[str, Any]:
    """The same request, failed before its first token."""
    return {**row, "first_text": None, "chunks": [], "error": text, "error_kind": kind, "output_tokens": 0}


def spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    found = np.array(values) * 1e3
    points = dict(zip(("p50", "p90", "p99"), np.percentile(found, (50, 90, 99)).tolist())) if len(found) else {}
    named = {"mean": float(found.mean()), "std": float(found.std()), "median": points["p50"], **points} if len(found) else {}
    keys = ("mean", "median", "std", "p50", "p90", "p99")
    return {f"{key}_{name}_ms": named.get(key) for key in keys}


def figures(rows: Sequence[dict[str, Any]], **extra: Any) -> dict[str, Any]:
    """A stage of the summary, counted from its requests."""
    good = [row for row in rows if row["chunks"] and not row["error"]]
    wall = max((row["last"] for row in good), default=0.0)
    kinds_ = [row["error_kind"] for row in rows if row["error"]]
    tokens = sum(row["output_tokens"] for row in good)
    times = {
        **spread("ttft", [row["chunks"][0] - row["sent"] for row in good]),
        **spread("tpot", [(row["last"] - row["chunks"][0]) / 23 for row in good]),
        **spread("itl", [b - a for row in good for a, b in zip(row["chunks"], row["chunks"][1:])]),
        **spread("e2el", [row["last"] - row["sent"] for row in good]),
    }
    cached, prompt = sum(row["cached_tokens"] or 0 for row in good), sum(row["prompt_tokens"] for row in good)
    return {"num_prompts": len(rows), "completed": len(good), "failed": len(kinds_), "cancelled": 0, "duration": wall,
            "failures": {kind: kinds_.count(kind) for kind in kinds_}, "total_input_tokens": prompt,
            "total_output_tokens": tokens, "output_tokens": tokens,
            "output_throughput": tokens / wall if wall else 0.0,
            "total_token_throughput": (tokens + prompt) / wall if wall else 0.0,
            "request_throughput": len(good) / wall if wall else 0.0, "request_goodput": None, "cached_tokens": cached,
            "hit_rate": cached / prompt if prompt else None, "client_lag": {"mean_ms": 0.5, "p99_ms": 1.2, "max_ms": 2.0},
            "correct_rate": None, "slo": None, "server": None, "timeline": [], "tenants": {}, "labels": {},
            "max_concurrency": None, **times, **extra}  # fmt: skip


def save(folder: Path, rows: Sequence[dict[str, Any]], stages: Sequence[dict[str, Any]], **extra: Any) -> Path:
    """A run on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"base_url": "http://127.0.0.1:8000", "model": "smollm2", "workload": "rag", "seed": 0, "mode": "open",
                "workload_options": {"documents": 8, "document_len": 256}, "machine": "2026-01-01, some processor, 2 cores",
                "definitions": {"TTFT": "sending -> first non-empty text", "TPOT": "(E2E - TTFT) / (output tokens - 1)"},
                **extra.pop("settings", {})}  # fmt: skip
    whole = {"settings": settings, "interrupted": False, "stages": stages, **extra, **(stages[0] if len(stages) == 1 else {})}
    (folder / "summary.json").write_text(json.dumps(whole))
    (folder / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rich_run(folder: Path, *, count: int = 60, speed: float = 1.0, settings: dict[str, Any] | None = None) -> Path:
    """A run with everything: four rates, tenants, labels, hits by kind, failures, server figures, objectives."""
    source = random.Random(7)
    rows: list[dict[str, Any]] = []
    stages = []
    for stage, (rate, slow) in enumerate(((1.0, 1.0), (2.0, 1.15), (4.0, 1.8), (8.0, 5.0))):
        part = [one(source, stage, i, rate, slow / speed) for i in range(count)]
        if stage == 3:
            part[-3:] = [broken(part[-3], "http_429", "HTTP 429: too many | waiting\ntokens"),
                         broken(part[-2], "http_429", "HTTP 429"),
                         broken(part[-1], "timeout", "no answer in 60 s")]  # fmt: skip
        rows += part
        names = ("steady", "bursty", "noisy <b>")
        by = {name: figures([row for row in part if row["tenant"] == name]) for name in names}
        server = {"mean_ttft_ms": 190.0 * slow, "mean_queue_ms": 20.0 * slow, "prefix_hit_rate": 0.41, "preemptions": stage}
        timeline = [{"t": float(t), "running": 3, "waiting": 1, "kv_usage": min(1.0, 0.1 + 0.04 * t * slow),
                     "hit_rate": 0.5 - 0.4 / (t + 1)} for t in range(int(count / rate))]  # fmt: skip
        stages.append(figures(part, request_rate=rate, burstiness=1.0, request_goodput=0.9 * min(rate, 4 / slow),
                              goodput_share=0.995 if slow < 2 else 0.35, slo={"ttft_ms": 500, "tpot_ms": 60, "e2el_ms": None},
                              server=server, timeline=timeline, labels={"turn 1": by["steady"], "turn 2": by["bursty"]},
                              tenants={name: {**by[name], "share": 1 / 3} for name in names}))  # fmt: skip
    return save(folder, rows, stages, settings=settings or {})


def one(source: random.Random, stage: int, i: int, rate: float, slow: float) -> dict[str, Any]:
    tenant = ("steady", "bursty", "noisy <b>")[i % 3]
    hit = 16 * min(i, 14)
    kv = {"cached_tokens": hit, "reused_tokens": 128 if i % 2 else 0, "recomputed_tokens": 24 if i % 2 else 0}
    row = request(source, i, stage, i / rate, slow * (1.5 if i % 3 == 2 else 1), tenant=tenant, label=f"turn {i % 2 + 1}")
    return {**row, "cached_tokens": hit, "kv": kv}


def bare_run(folder: Path, count: int = 6, **extra: Any) -> Path:
    """One closed load and nothing that is optional."""
    source = random.Random(1)
    rows = [request(source, i, 0, i * 0.2, 1.0, cached_tokens=None) for i in range(count)]
    return save(
        folder, rows, [figures(rows, request_rate="inf", max_concurrency=2, hit_rate=None, cached_tokens=None)], **extra
    )


class Page(HTMLParser):
    """Checks that tags close in order, and keeps what a browser would load."""

    VOID = frozenset({"meta", "img", "source", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for key, value in attrs if key in ("src", "srcset", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page(folder: Path) -> Page:
    found = Page()
    found.feed((folder / "report.html").read_text())
    found.close()
    assert not found.open
    return found


def pngs(folder: Path) -> set[str]:
    found = list(folder.glob("*.png"))
    assert all(path.read_bytes().startswith(PNG) and path.stat().st_size > 5_000 for path in found)
    return {path.stem for path in found}


ALL = {"ttft_cdf", "latency_rate", "throughput_ttft", "goodput_rate", "itl_timeline", "cache_hits", "tenants", "labels"}


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = rich_run(tmp_path_factory.mktemp("rich") / "run")
    assert set(write_report(folder)) == {path for path in folder.iterdir() if path.suffix not in (".json", ".jsonl")}
    return folder


def test_a_full_run_has_every_plot_and_stands_alone(rich: Path) -> None:
    assert pngs(rich) == ALL
    found = page(rich)
    assert len(found.loads) == 2 * len(ALL)  # a light and a dark picture of each
    assert all(load.startswith("data:image/png;base64,") for load in found.loads)
    markdown = (rich / "report.md").read_text()
    assert all(f"({name}.png)" in markdown for name in ALL)
    for text in (found.text, markdown):
        assert "left out" not in text
        assert "sending -" in text  # the definitions that the run recorded
        assert "237 of 240 requests succeeded" in text and "2 http_429, 1 timeout" in text


def test_text_of_servers_and_users_cannot_change_the_page(rich: Path) -> None:
    assert "noisy <b>" in page(rich).text and "noisy <b>" not in (rich / "report.md").read_text()
    markdown = (rich / "report.md").read_text()
    tables = [block for block in markdown.split("\n\n") if block.startswith("| ")]
    assert len(tables) >= 6
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1


def test_tables_hold_the_figures_of_the_summary(rich: Path) -> None:
    run = load_run(rich)
    rows = latency(run).rows
    assert [(row[0], row[1]) for row in rows[:4]] == [("1 req/s", name) for name in ("TTFT", "TPOT", "ITL", "E2E")]
    assert rows[0][2] == f"{run.stages[0].figures['mean_ttft_ms']:.0f}"
    assert [row[:3] for row in failures(run).rows] == [["8 req/s", "http_429", "2"], ["8 req/s", "timeout", "1"]]
    assert "up to 4 req/s" in " ".join(verdict(run))


def test_a_bare_run_says_why_plots_are_missing(tmp_path: Path) -> None:
    folder = bare_run(tmp_path / "bare")
    (folder / "tenants.png").write_bytes(b"of an earlier report")
    write_report(folder)
    assert pngs(folder) == {"ttft_cdf", "itl_timeline"}
    text = page(folder).text
    for name in ("Latency against load", "Throughput against TTFT", "Goodput against load", "Cache hits", "Tenants"):
        assert any(line.startswith(name) and "left out: " in line for line in text.splitlines()), name
    assert "2 at a time" in text


def test_a_single_request(tmp_path: Path) -> None:
    folder = bare_run(tmp_path, count=1)
    write_report(folder)
    assert "1 of 1 requests succeeded" in page(folder).text
    text = page(folder).text
    assert "With one request every figure is that request's own" in text
    assert "interval" not in text and "interval" not in (folder / "report.md").read_text()


def test_a_run_without_success_is_a_report_of_failures(tmp_path: Path) -> None:
    source = random.Random(1)
    rows = [broken(request(source, i, 0, 0.0, 1.0), "connect", "Cannot connect to host 127.0.0.1:9") for i in range(3)]
    folder = save(tmp_path, rows, [figures(rows, request_rate=2.0)])
    write_report(folder)
    assert pngs(folder) == set()
    text = page(folder).text
    assert "No request succeeded. 3 failed: 3 connect." in text
    assert "Cannot connect to host" in text and "no request brought text" in text


def test_an_interrupted_run_without_a_summary(tmp_path: Path) -> None:
    folder = rich_run(tmp_path / "run", count=12)
    (folder / "summary.json").unlink()
    with (folder / "requests.jsonl").open("a") as file:
        file.write('{"index": 99, "chu')
    run = load_run(folder)
    assert (run.interrupted, len(run.rows), len(run.stages)) == (True, 48, 4)
    assert [stage.failed for stage in run.stages] == [0, 0, 0, 3]
    found = " ".join(warnings(run))
    assert "interrupted" in found and "no summary.json" in found and "1 lines of requests.jsonl" in found
    write_report(folder)
    assert "45 of 48 requests succeeded" in page(folder).text
    assert {"ttft_cdf", "itl_timeline", "cache_hits"} <= pngs(folder)


def test_a_summary_without_requests_still_has_its_curves(tmp_path: Path) -> None:
    folder = rich_run(tmp_path, count=6)
    (folder / "requests.jsonl").unlink()
    drawn = {plot.name for plot in plots([load_run(folder)]) if plot.draw}
    assert drawn == {"latency_rate", "throughput_ttft", "goodput_rate", "tenants", "labels"}


@pytest.mark.parametrize("content", ["[1]", "{", '{"stages": []}'])
def test_a_folder_without_a_run_is_refused_in_one_line(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "summary.json").write_text(content)
    if content != '{"stages": []}':
        with pytest.raises(ReportError, match="holds no run"):
            write_report(tmp_path)
        assert main([str(tmp_path)]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    else:
        write_report(tmp_path)
        assert "No request succeeded" in page(tmp_path).text


def test_a_late_client_is_warned_of(tmp_path: Path) -> None:
    folder = bare_run(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    assert not any("late" in line for line in warnings(load_run(folder)))
    summary["stages"][0]["client_lag"]["p99_ms"] = 0.11 * summary["stages"][0]["mean_ttft_ms"]
    (folder / "summary.json").write_text(json.dumps(summary))
    assert any("client was late" in line for line in warnings(load_run(folder)))


def test_chunks_of_several_tokens_are_warned_of(tmp_path: Path) -> None:
    rows = [request(random.Random(1), 0, 0, 0.0, 1.0, output_tokens=72)]
    folder = save(tmp_path, rows, [figures(rows, request_rate=1.0)])
    assert any("3.0 tokens" in line for line in warnings(load_run(folder)))


def test_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = rich_run(tmp_path / "a", count=12), rich_run(tmp_path / "b", count=12, speed=2.0, settings={"seed": 1})
    out = tmp_path / "out"
    assert main([str(a), str(b), "--name", "ours", "--name", "theirs", "--out", str(out)]) == 0
    assert str(out / "report.html") in capsys.readouterr().out
    assert pngs(out) == {"runs", "ttft_cdf", "latency_rate", "throughput_ttft", "goodput_rate"}
    text = page(out).text
    assert "theirs / ours" in text and "theirs against ours at 8 req/s: median TTFT 0.50x" in text
    assert "Not like for like: seed differs (ours: 0; theirs: 1)" in text
    assert "Failures by kind" not in text and "failures by kind" in text


def test_several_folders_default_to_a_folder_beside_the_first(tmp_path: Path) -> None:
    folders = [bare_run(tmp_path / name) for name in "abc"]
    assert main([str(folder) for folder in folders]) == 0
    assert (tmp_path / "comparison" / "report.md").exists()
    assert differences([load_run(folder) for folder in folders]) == []


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt_tokens": 100, "cached_tokens": 64}, Kinds(64, 0, 0, 36)),
        ({"prompt_tokens": 100, "cached_tokens": None, "kv": None}, Kinds(0, 0, 0, 100)),
        (
            {"prompt_tokens": 100, "cached_tokens": 32, "kv": {"reused_tokens": 48, "recomputed_tokens": 8}},
            Kinds(32, 48, 8, 12),
        ),
    ],
)
def test_kinds_of_hits_sum_to_the_prompt(row: dict[str, Any], expected: Kinds) -> None:
    assert kinds(Row(row)) == expected
    assert sum(expected) == 100


def test_timelines_show_the_heaviest_stage_with_requests(rich: Path) -> None:
    assert heaviest(load_run(rich)).load == 8.0


@pytest.mark.parametrize("change", [lambda s: s.pop("settings"), lambda s: s["stages"][0].update(tenants=None, server=None)])
def test_missing_keys_are_not_fatal(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    folder = bare_run(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    change(summary)
    (folder / "summary.json").write_text(json.dumps(summary))
    write_report(folder)
    assert "6 of 6 requests succeeded" in page(folder).text
