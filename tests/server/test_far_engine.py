"""The whole HTTP side over an engine that stands far away: the same answers, whatever is asked."""

from __future__ import annotations

import asyncio
import functools
import json
import re

import pytest

from kvloom.engine.client import EngineClient, fold_of
from kvloom.engine.errors import ContextLengthError, InternalError, OverloadedError
from kvloom.engine.requests.request import KVOptions
from kvloom.engine.requests.stats import EngineStats

CHAT = {"messages": [{"role": "user", "content": "hello world"}], "max_tokens": 5}
TEXT = {"prompt": "hello world", "max_tokens": 6}
REQUESTS = [
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/v1/chat/completions", {**CHAT, "n": 2, "logprobs": True, "top_logprobs": 2, "kv": {"explain": True}}),
    ("POST", "/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
    ("POST", "/v1/completions", {**TEXT, "echo": True, "logprobs": 2}),
    ("POST", "/v1/completions", {**TEXT, "prompt": ["hello", "the lazy dog"], "stop": "fox", "logit_bias": {"5": 1.5}}),
    ("POST", "/v1/completions", {**TEXT, "stream": True, "stop": "world"}),
    ("POST", "/v1/completions", {**TEXT, "prompt_logprobs": 1, "kv": {"selection": "recycled", "budget": 64}}),
    ("POST", "/v1/completions", {**TEXT, "prompt": [5] * 5000}),
    ("POST", "/v1/completions", {**TEXT, "temperature": -1}),
    ("POST", "/v1/kv/segments", {"text": "the quick brown fox"}),
    ("DELETE", "/v1/kv/segments", None),
    ("POST", "/v1/kv/explain", {"prompt": "hello world"}),
    ("GET", "/v1/kv/explain?prompt=hello", None),
    ("GET", "/v1/kv", None),
    ("GET", "/v1/models", None),
    ("GET", "/health", None),
    ("GET", "/load", None),
    ("POST", "/v1/kv/reset", None),
    ("GET", "/", None),
    ("POST", "/tokenize", {"prompt": "hello"}),
]


def told(response):
    """Status and text, without ids, times and addresses."""
    return response.status_code, re.sub(r'"(id|created)":("[^"]*"|\d+)|127\.0\.0\.1:\d+', "", response.text)


def test_every_route_answers_as_beside_the_engine(serving, fake):
    far = fake.FarEngine(fake.FakeEngine())
    with serving(fake.FakeEngine()).client() as beside, serving(far).client() as away:
        for method, path, body in REQUESTS:
            assert told(away.request(method, path, json=body)) == told(beside.request(method, path, json=body)), path
        names = [re.findall(r"^(?:# \w+ )?(kvloom:[^ ]+)", client.get("/metrics").text, re.M) for client in (away, beside)]
    assert names[0] == names[1] and "kvloom:num_requests_running" in names[0]
    asked = {"generate", "explain", "purge", "reset", "tenants", "stats", "health"}
    assert set(far.crossed) == asked, "every question of the routes has crossed, and nothing else"


def test_who_stands_far_away_offers_the_protocol_and_no_more(fake):
    protocol = {name for name in (*vars(EngineClient), *EngineClient.__annotations__) if not name.startswith("_")}
    assert {name for name in dir(fake.FarEngine(fake.FakeEngine())) if not name.startswith("_")} - {"crossed"} == protocol


@pytest.mark.parametrize(
    ("error", "status", "header", "param"),
    [
        (OverloadedError("too much waits", retry_after=7), 429, "7", None),
        (ContextLengthError("too long", "max_tokens"), 400, None, "max_tokens"),
        (InternalError("internal error; the server's log says more"), 500, None, None),
    ],
)
def test_errors_keep_what_they_say(serving, fake, error, status, header, param):
    engine = fake.FakeEngine()
    engine.refuse = error
    with serving(fake.FarEngine(engine)).client() as client:
        for path, body in (("/v1/completions", TEXT), ("/v1/kv/explain", {"prompt": "a"})):
            response = client.post(path, json=body)
            assert (response.status_code, response.headers.get("retry-after")) == (status, header)
            assert response.json()["error"]["param"] == param


def test_leaving_ends_the_request_far_away(serving, fake, until):
    engine = fake.FakeEngine(step_seconds=0.002)
    body = {**TEXT, "max_tokens": 4000, "stream": True, "n": 2}
    with serving(fake.FarEngine(engine)).client() as client:
        with client.stream("POST", "/v1/completions", json=body) as response:
            assert next(response.iter_lines()).startswith("data: {")
        until(lambda: len(engine.aborted) == 2 and not engine.live)


def test_the_end_of_a_far_engine_reaches_streams_and_health(serving, fake):
    engine = fake.FakeEngine(step_seconds=0.005)
    with serving(fake.FarEngine(engine)).client() as client:
        with client.stream("POST", "/v1/completions", json={**TEXT, "max_tokens": 4000, "stream": True}) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: {")
            engine.dead = "the machine is gone"
            rest = [line for line in lines if line]
        assert json.loads(rest[-2][6:])["error"]["code"] == "engine_dead" and rest[-1] == "data: [DONE]"
        assert client.get("/health").status_code == 503 and "kvloom:engine_up" in client.get("/metrics").text
        assert client.post("/v1/completions", json=TEXT).status_code == 503


def test_a_failure_far_away_is_told(serving, fake):
    engine = fake.FakeEngine()
    engine.fail_after = 2
    with serving(fake.FarEngine(engine)).client() as client:
        assert client.post("/v1/completions", json=TEXT).json()["error"]["code"] == "generation_failed"


async def over(engines, method, *args):
    """What a router over several engines does: ask all where the protocol says so, and make one answer."""
    answers = [await getattr(engine, method)(*args) for engine in engines]
    return functools.reduce(fold_of(method), answers)


async def _ask_all(engines):
    return [
        await over(engines, *call)
        for call in (("stats",), ("health",), ("purge", "alice"), ("tenants",), ("abort", "x"), ("reset",))
    ]


def test_what_concerns_every_engine_says_so_and_how_answers_make_one(fake):
    engines = [fake.FarEngine(fake.FakeEngine()) for _ in range(3)]
    engines[1]._engine.dead = "gone"
    engines[1]._engine._check = lambda: None
    stats, health, purged, tenants, nothing, reset = asyncio.run(_ask_all(engines))
    assert isinstance(stats, EngineStats) and stats.capacity_tokens == 4800 and stats.share.segments == 12
    assert (health.ok, health.reason) == (False, "gone") and purged == 9 and nothing is None
    assert reset == {"blocks": 60, "segments": 12}
    assert tenants["alice"].segment_bytes == 3 * 3072 and tenants[""].tokens == {"prefix": 30, "stale": 180}
    assert [fold_of(name) for name in ("generate", "explain", "peek")] == [None] * 3, "these go where the request goes"
    assert KVOptions(segment="public").everywhere and not KVOptions(share="public", reuse="approx").everywhere
