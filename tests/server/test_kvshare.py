"""Approximate reuse over HTTP, with a real engine on a tiny model: openai-python, plain requests, wrong input, metrics."""

from __future__ import annotations

import random

import openai
import pytest

from kvloom.engine.config import EngineConfig
from kvloom.engine.thread.client import ThreadEngineClient

OPTIONS = (
    '{"verified": true, "min_match": 32, "min_reusable": 48, "min_gain": -1, "reject_above": 10, "shadow_share": 0, '
    '"heal": true, "policy": "blend", "ratio": 0.2}'
)
TENANTS = "tenants:\n  alice: {group: g}\n  bob: {group: g}\n  press: {publishes: true}\n"


def text(seed: int, length: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 300) for _ in range(length)]


OPERATOR = {"Authorization": "Bearer root"}
DOCUMENT = text(1, 200)


def prompt(seed: int) -> list[int]:
    return [*text(100 + seed, 30), *DOCUMENT, *text(200 + seed, 30)]


@pytest.fixture
def running(tiny, tmp_path, serving):
    file = tmp_path / "tenants.yaml"
    file.write_text(TENANTS)
    config = EngineConfig.from_flat(
        {"model": str(tiny), "served_model_name": "echo-model", "dtype": "fp32", "kv_memory": "8MiB", "tenants": str(file),
         "kvshare_options": OPTIONS, "segment_memory": "64MiB"}
    )  # fmt: skip
    engine = ThreadEngineClient.start(config)
    try:
        yield serving(engine, trusted_proxies=("127.0.0.1/32",), admin_key=("root",))
    finally:
        engine.close()


def complete(served, tokens, tenant="alice", **kv):
    client = served.openai(default_headers={"X-KVLoom-Tenant": tenant})
    return client.completions.create(
        model="echo-model", prompt=tokens, max_tokens=2, temperature=0, extra_body={"kv": {"reuse": "approx", **kv}}
    )


def test_usage_tells_what_was_reused(running):
    first = complete(running, prompt(1)).usage.kv
    assert first["reused_tokens"] == first["recomputed_tokens"] == 0
    found = complete(running, prompt(2), explain=True)
    kv = found.usage.kv
    assert kv["reused_tokens"] > 100 and kv["recomputed_tokens"] == pytest.approx(0.2 * 200, abs=8)
    assert found.usage.prompt_tokens_details.cached_tokens == kv["cached_tokens"] == 0
    assert [run["donor"] for run in kv["explain"]["runs"]] == ["context"]
    assert complete(running, prompt(3), tenant="bob", explain=True).usage.kv["explain"]["runs"] == []


def test_streams_tell_it_too(running):
    complete(running, prompt(1))
    client = running.openai(default_headers={"X-KVLoom-Tenant": "alice"})
    stream = client.completions.create(
        model="echo-model", prompt=prompt(2), max_tokens=2, stream=True, stream_options={"include_usage": True},
        extra_body={"kv": {"reuse": "approx", "explain": True, "kvshare": {"policy": "dhd", "ratio": 0.1}}},
    )  # fmt: skip
    usage = list(stream)[-1].usage
    assert usage.kv["reused_tokens"] > 100 and usage.kv["explain"]["tokens"]["stale"] == usage.kv["reused_tokens"]


def test_segments_are_uploaded_explained_and_purged(running):
    headers = {"X-KVLoom-Tenant": "alice"}
    with running.client(**headers) as client:
        made = client.post("/v1/kv/segments", json={"tokens": DOCUMENT, "scope": "group"})
        assert made.status_code == 200, made.text
        assert made.json()["tokens"] == made.json()["given_tokens"] == 200 and made.json()["segments"] >= 1
        told = client.post("/v1/kv/explain", json={"prompt": prompt(5)}).json()
        assert told["prompt_tokens"] == 260
        assert {(run["donor"], run["scope"]) for run in told["runs"]} == {("isolated", "group")}
        assert all(run["text"] for run in told["runs"]) and told["broken"]
        short = client.get("/v1/kv/explain", params={"prompt": "hello"}).json()
        assert short["runs"] == [] and short["cached_tokens"] == 0
        assert complete(running, prompt(6), tenant="bob", explain=True).usage.kv["reused_tokens"] > 100
        state = client.get("/v1/kv", headers=OPERATOR).json()
        assert state["kvshare"]["segments"]["count"] >= 1 and state["tenants"]["alice"]["segment_bytes"] > 0
        assert client.delete("/v1/kv/segments").json()["deleted"] >= 1
        assert client.post("/v1/kv/explain", json={"prompt": prompt(7)}).json()["runs"] == []


def test_idle_servers_heal(running, until):
    complete(running, prompt(1))
    complete(running, [*prompt(2), *text(300, 100)])
    with running.client(**OPERATOR) as client:
        until(lambda: client.get("/v1/kv").json()["kvshare"]["left"]["healed_tokens"] > 0)
        assert client.get("/v1/kv").json()["kvshare"]["errands"] == 0
    again = complete(running, [*prompt(2), *text(300, 100), *text(9, 20)])
    assert again.usage.prompt_tokens_details.cached_tokens >= 350


def test_metrics(running):
    complete(running, prompt(1))
    complete(running, prompt(2))
    with running.client(**OPERATOR) as client:
        body = client.get("/metrics").text
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in body.splitlines() if not line.startswith("#")}
    label = 'engine="0",model_name="echo-model"'
    pick = lambda name, more="": next(v for k, v in values.items() if k.startswith("kvloom:" + name + "{") and more in k)  # noqa: E731
    assert label.split(",")[0] in body
    assert pick("kvshare_reused_tokens_total") > 100
    assert pick("kvshare_tokens_total", 'kind="stale"') == pick("kvshare_reused_tokens_total")
    assert pick("kvshare_requests_total", 'path="segment"') == 1
    assert pick("kvshare_recomputed_ratio_bucket", 'le="+Inf"') == 1
    assert pick("kvshare_segments") > 0 and pick("kvshare_enabled") == 1
    assert "alice" not in body


@pytest.mark.parametrize(
    ("kv", "param"),
    [
        ({"reuse": "approx", "kvshare": {"rato": 1}}, "kv.kvshare.rato"),
        ({"reuse": "approx", "kvshare": {"ratio": 2}}, "kv.kvshare.ratio"),
        ({"reuse": "approx", "kvshare": {"policy": 3}}, "kv.kvshare.policy"),
        ({"reuse": "approx", "share": "public"}, "kv.share"),
        ({"reuse": "approx", "share": "all"}, "kv.share"),
        ({"reuse": "exact", "share": "tenant"}, "kv.share"),
        ({"kvshare": {"ratio": 0.5}}, "kv.kvshare"),
        ({"reuse": "some"}, "kv.reuse"),
    ],
    ids=str,
)
def test_wrong_input(running, kv, param):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(running, [5, 6, 7], **kv) if "reuse" in kv else running.openai().completions.create(
            model="echo-model", prompt=[5, 6, 7], extra_body={"kv": kv}
        )
    assert caught.value.param == param
    assert complete(running, [5, 6, 7]).choices[0].finish_reason == "length"  # and the server goes on


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tokens": DOCUMENT, "scope": "public"}, "scope"),
        ({"tokens": DOCUMENT, "scope": "none"}, "scope"),
        ({"tokens": DOCUMENT, "text": "both"}, "text"),
        ({}, "text"),
        ({"tokens": [10**6]}, "tokens"),
        ({"tokens": text(1, 600)}, "tokens"),
        ({"texts": ["word " * 40, "word " * 2000]}, "texts[1]"),
        ({"tokens": DOCUMENT, "scop": "group"}, "scop"),
        ({"tokens": DOCUMENT, "cache_salt": ""}, "cache_salt"),
        ({"tokens": DOCUMENT, "scope": "group", "cache_salt": "s"}, "scope"),
        ({"texts": []}, "texts"),
    ],
    ids=[
        "public",
        "none",
        "two inputs",
        "no input",
        "vocabulary",
        "too long",
        "one of several",
        "misspelt",
        "salt",
        "salted",
        "empty",
    ],
)
def test_wrong_uploads(running, body, param):
    with running.client(**{"X-KVLoom-Tenant": "alice"}) as client:
        refused = client.post("/v1/kv/segments", json=body)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == param


def test_segments_of_a_salt_are_found_under_it_alone(running):
    with running.client(**{"X-KVLoom-Tenant": "alice"}) as client:
        body = {"tokens": DOCUMENT, "cache_salt": "s"}
        assert client.post("/v1/kv/segments", json=body).json()["tokens"] == 200
        assert client.post("/v1/kv/segments", json=body).json()["tokens"] == 0, "it is there already"
        asked = {"prompt": prompt(5)}
        assert client.post("/v1/kv/explain", json=asked).json()["runs"] == []
        assert client.post("/v1/kv/explain", json={**asked, "cache_salt": "s"}).json()["runs"]


def test_without_approximate_reuse_an_explanation_says_so(running):
    explained = complete(running, prompt(1), reuse="exact", explain=True).usage.kv["explain"]
    assert explained == {"cached_tokens": 0, "reason": "only an exact prefix was looked for"}
    assert "explain" not in complete(running, prompt(1), explain=None).usage.kv, "null is the default"


def test_where_it_is_the_default_its_options_stand_alone(tiny, serving):
    config = EngineConfig.from_flat(
        {"model": str(tiny), "served_model_name": "echo-model", "dtype": "fp32", "kv_memory": "8MiB", "reuse": "approx",
         "kvshare_options": OPTIONS}
    )  # fmt: skip
    engine = ThreadEngineClient.start(config)
    try:
        client = serving(engine).openai()
        for seed, kv in ((1, {"share": "none"}), (2, {}), (3, {"kvshare": {"ratio": 1.0}})):
            made = client.completions.create(model="echo-model", prompt=prompt(seed), max_tokens=1, extra_body={"kv": kv})
            reused, recomputed = made.usage.kv["reused_tokens"], made.usage.kv["recomputed_tokens"]
            assert (reused + recomputed > 150) == (seed == 3), "the first leaves nothing, the second has no donor"
            assert not reused
    finally:
        engine.close()


# Over the fake engine -----------------------------------------------------------------------------------------------------


def test_what_the_engine_is_asked(serving, fake):
    engine = fake.FakeEngine()
    with serving(engine).client() as client:
        made = client.post("/v1/kv/segments", json={"texts": ["hello world", "lazy dog"], "cache_salt": "s", "model": None})
        assert client.delete("/v1/kv/segments").json() == {"object": "kv.segments", "deleted": 3}
    tokens = [engine.tokenizer.encode(text) for text in ("hello world", "lazy dog")]
    assert [call["prompt"] for call in engine.calls] == tokens and engine.purged == [""]
    assert all(call["kv"].segment == "tenant" and call["cache_salt"] == "s" for call in engine.calls)
    count = sum(map(len, tokens))
    assert made.json() == {"object": "kv.segments", "scope": "tenant", "given_tokens": count, "segments": 2, "tokens": count,
                           "bytes": 100 * count}  # fmt: skip


def test_options_reach_the_engine_beside_those_of_a_selection(serving, fake):
    engine = fake.FakeEngine()
    kv = {
        "reuse": "approx",
        "share": "group",
        "explain": True,
        "kvshare": {"ratio": 0.2},
        "recycled": {"stride": 4},
        "budget": 64,
    }
    with serving(engine).client() as client:
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, "kv": kv}).status_code == 200
        for wrong, param in (
            ({"kvshare": 5}, "kv.kvshare"),
            ({"explain": "yes"}, "kv.explain"),
            ({"segment": "x"}, "kv.segment"),
        ):
            refused = client.post("/v1/completions", json={"prompt": "a", "kv": wrong})
            assert refused.status_code == 400 and refused.json()["error"]["param"] == param
    options = engine.calls[0]["kv"]
    assert (options.reuse, options.share, options.explain, options.segment) == ("approx", "group", True, None)
    assert (options.selection, options.options, options.reuse_options) == ("recycled", {"stride": 4}, {"ratio": 0.2})


def test_several_prompts_have_an_explanation_each(serving, fake):
    engine = fake.FakeEngine()
    engine.reused = 5
    body = {"prompt": ["hello", "hello world"], "n": 2, "max_tokens": 2, "kv": {"explain": True}}
    with serving(engine).client() as client:
        kv = client.post("/v1/completions", json=body).json()["usage"]["kv"]
    halves = [len(engine.tokenizer.encode(text)) // 2 for text in ("hello", "hello world")]
    assert [one["cached_tokens"] for one in kv["explain"]] == halves
    assert (kv["cached_tokens"], kv["reused_tokens"], kv["recomputed_tokens"]) == (sum(halves), 10, 2), "once per prompt"


def test_explanations_show_the_callers_own_text(served):
    with served.client() as client:
        told = client.post("/v1/kv/explain", json={"prompt": "the quick brown fox jumps over the lazy dog", "cache_salt": "s"})
        assert told.json()["runs"][0]["text"].startswith("the quick") and told.json()["runs"][0]["text"].endswith("lazy dog")
        assert served.engine.calls[-1]["cache_salt"] == "s"
        chat = client.post("/v1/kv/explain", json={"messages": [{"role": "user", "content": "hi"}]}).json()
        assert chat["prompt_tokens"] == client.post(
            "/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}
        ).json()["count"]  # fmt: skip
        assert client.get("/v1/kv/explain", params={"prompt": "hello"}).json()["prompt_tokens"] > 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [5] * 4096}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt"),
        ({"prompt": "a", "tenant": "alice"}, "tenant"),
        ({"prompt": "a", "model": "other"}, "model"),
    ],
    ids=["none", "no text", "no tokens", "types", "vocabulary", "too long", "two inputs", "misspelt", "model"],
)
def test_wrong_questions(served, body, param):
    with served.client() as client:
        refused = client.post("/v1/kv/explain", json=body)
        assert client.get("/v1/kv/explain").json()["error"]["param"] == "prompt"
    assert refused.status_code == (404 if param == "model" else 400) and refused.json()["error"]["param"] == param


def test_a_dead_engine_answers_with_503(serving, fake):
    engine = fake.FakeEngine()
    engine.dead = "step 7 failed"
    with serving(engine).client() as client:
        for method, path, body in (
            ("POST", "/v1/kv/segments", {"text": "hello"}),
            ("DELETE", "/v1/kv/segments", None),
            ("POST", "/v1/kv/explain", {"prompt": "hello"}),
        ):
            refused = client.request(method, path, json=body)
            assert refused.status_code == 503 and "step 7" in refused.json()["error"]["message"]


def test_who_leaves_is_not_waited_for(serving, fake, until):
    engine = fake.FakeEngine()
    engine.held = True
    running = serving(engine)
    with running.connect() as connection:
        body = b'{"texts": ["hello", "world"]}'
        head = (
            f"POST /v1/kv/segments HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        until(lambda: engine.live)
    until(lambda: engine.aborted)
    assert len(engine.calls) == 1 and not engine.live
