"""Prometheus text of three servers, and the differences made from it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from kvloom.loadtest.client.client import Client
from kvloom.loadtest.client.scrape import Scraper, difference, parse

LABELS = '{model_name="m",engine="0"}'
PAGE = """# HELP vllm:time_to_first_token_seconds Time to first token.
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{{le="0.1",model_name="m"}} 3
vllm:time_to_first_token_seconds_sum{labels} {ttft}
vllm:time_to_first_token_seconds_count{labels} {n}
vllm:prefix_cache_queries_total{labels} {queries}
vllm:prefix_cache_hits_total{labels} {hits}
vllm:prefix_cache_hits_total{{model_name="m",engine="1"}} 5
vllm:num_preemptions_total{labels} 2
vllm:num_requests_running{labels} 3.0
process_cpu_seconds_total 17.5
"""


def page(prefix: str, **values: float) -> str:
    return PAGE.format(labels=LABELS, **values).replace("vllm:", prefix)


@pytest.mark.parametrize("prefix", ["kvloom:", "vllm:"])
def test_differences_between_two_pages(prefix: str) -> None:
    before = parse(page(prefix, ttft=1.0, n=10, queries=100, hits=20))
    after = parse(page(prefix, ttft=2.5, n=15, queries=300, hits=120))
    assert before["prefix_cache_hits_total"] == 25, "label sets are added"
    assert "process_cpu_seconds_total" not in before
    figures = difference(before, after)
    assert figures["mean_ttft_ms"] == pytest.approx(300)
    assert figures["hit_rate"] == pytest.approx(0.5)
    assert figures["preemptions"] == 0
    assert figures["mean_queue_ms"] is None and figures["kv_read_bytes"] is None


def test_reuse_of_segments() -> None:
    text = "".join(f"kvloom:kvshare_{name}_tokens_total{LABELS} {{{name}}}\n" for name in ("reused", "recomputed", "refreshed"))
    text += 'kvloom:kvshare_tokens_total{{kind="stale",model_name="m"}} 9\n'
    before, after = (parse(text.replace(LABELS, "").format(reused=n, recomputed=n // 2, refreshed=3)) for n in (10, 110))
    figures = difference(before, after)
    assert (figures["segment_tokens"], figures["recomputed_tokens"], figures["refreshed_tokens"]) == (100, 50, 0)
    assert "kvshare_tokens_total" not in before, "it holds the same tokens by kind"
    assert difference({}, parse(page("vllm:", ttft=1, n=1, queries=1, hits=0)))["segment_tokens"] is None


def test_names_of_llama_cpp() -> None:
    text = "llamacpp:tokens_predicted_total {n}\nllamacpp:requests_deferred 2\nllamacpp:kv_cache_usage_ratio 0.5\n"
    figures = difference(parse(text.format(n=10)), parse(text.format(n=74)))
    assert figures["generation_tokens"] == 64 and figures["hit_rate"] is None


def scrape(server: Any, interval: float, seconds: float) -> tuple[Any, list[Any]]:
    async def work() -> tuple[Any, list[Any]]:
        async with Client(server.url, "fake") as client:
            scraper = Scraper(client, interval)
            await scraper.begin()
            watch = asyncio.create_task(scraper.watch(time.perf_counter()))
            await asyncio.sleep(seconds)
            watch.cancel()
            return await scraper.finish(), scraper.timeline

    return asyncio.run(work())


def test_a_stage_is_watched(server: Any) -> None:
    server.metrics = page("kvloom:", ttft=1.0, n=1, queries=100, hits=20)
    figures, timeline = scrape(server, 0.03, 0.3)
    assert len(timeline) >= 2
    assert timeline[0].keys() == {"t", "running", "waiting", "kv_usage", "hit_rate", "reused"}
    assert timeline[0]["running"] == 3 and timeline[0]["waiting"] is None and timeline[0]["reused"] == {"prefix": 0}
    assert timeline[0]["t"] < timeline[1]["t"]
    assert figures["peak_running"] == 3 and figures["peak_waiting"] is None


def test_of_a_server_that_went_away_the_last_scrape_counts(server: Any) -> None:
    seconds = "kvloom:time_to_first_token_seconds"

    async def work() -> Any:
        async with Client(server.url, "fake") as client:
            scraper = Scraper(client, 0.01)
            server.metrics = f"{seconds}_sum 1\n{seconds}_count 1\n"
            await scraper.begin()
            server.metrics = f"{seconds}_sum 4\n{seconds}_count 2\n"
            watch = asyncio.create_task(scraper.watch(time.perf_counter()))
            while not scraper.timeline:
                await asyncio.sleep(0.01)
            watch.cancel()
            server.metrics = None
            return await scraper.finish()

    assert asyncio.run(work())["mean_ttft_ms"] == pytest.approx(3000)


def test_a_server_without_metrics_is_fine(server: Any) -> None:
    assert scrape(server, 0.01, 0.05) == (None, [])
    server.metrics = "<html>not metrics</html>"
    assert scrape(server, 0.01, 0.05) == (None, [])
