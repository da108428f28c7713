"""Retention razor over HTTP: selection methods work beside it, and what cannot is a 400 that says why."""

from __future__ import annotations

import pytest

from kvloom.engine.calibration import RazorCalibration
from kvloom.engine.config import EngineConfig
from kvloom.engine.thread.client import ThreadEngineClient

SCORES = ((0.1, 0.9), (0.8, 0.2), (0.3, 0.4))


@pytest.fixture
def running(tiny, serving, monkeypatch):
    found = RazorCalibration(model_key="", model="tiny", induction=SCORES, echo=SCORES)
    monkeypatch.setattr("kvloom.engine.retention.window.find_razor", lambda key: found)
    config = EngineConfig.from_flat(
        {"model": str(tiny), "served_model_name": "m", "dtype": "fp32", "kv_memory": "8MiB", "retention": "razor",
         "retention_options": '{"induction_share": 0.3, "min_window": 24}'}
    )  # fmt: skip
    engine = ThreadEngineClient.start(config)
    try:
        yield serving(engine)
    finally:
        engine.close()


def complete(client, **kv):
    body = {"model": "m", "prompt": list(range(3, 90)), "max_tokens": 8, "temperature": 0, "kv": kv}
    return client.post("/v1/completions", json=body)


def test_what_composes_and_what_does_not(running):
    with running.client() as client:
        alone = complete(client).json()["usage"]["kv"]
        for kv in ({"selection": "tidal_decode"}, {"selection": "recycled"}, {"selection": "token_select"}):
            answer = complete(client, **kv, budget=24)
            assert answer.status_code == 200 and 0 < answer.json()["usage"]["kv"]["attended_tokens"] < alone["attended_tokens"]
        for kv, why in (
            ({"selection": "razor_view"}, "it says itself which heads those are"),
            ({"selection": "tidal_decode", "tidal_decode": {"correct_every": 4}}, "from KV that others have dropped"),
            (
                {"selection": "token_select", "budget": 64, "token_select": {"positions": "reindexed"}},
                "others read at true positions",
            ),
            ({"reuse": "approx"}, "drops KV that would be reused"),
        ):
            answer = complete(client, **kv)
            error = answer.json()["error"]
            assert answer.status_code == 400 and why in error["message"] and error["param"] in ("kv.selection", "kv.reuse")
