"""Models, health, version, metrics, the cache's state, tokens, and the API's own description."""

import asyncio
import json

from prometheus_client.parser import text_string_to_metric_families

from kvloom.engine.errors import OverloadedError
from kvloom.server import metrics


def test_models(served):
    models = list(served.openai().models.list())
    assert [model.id for model in models] == ["echo-model"] and models[0].object == "model"
    assert served.openai().models.retrieve("echo-model").max_model_len == 4096


def test_model_names_may_hold_slashes(serving, fake):
    from dataclasses import replace

    engine = fake.FakeEngine()
    engine.model = replace(engine.model, name="org/name")
    assert serving(engine).openai().models.retrieve("org/name").id == "org/name"


def test_health_and_version(served):
    from kvloom import __version__

    with served.client() as client:
        health = client.get("/health")
        assert health.status_code == 200 and health.content == b""
        assert client.get("/version").json() == {"version": __version__}


def test_probes_under_other_names_need_no_key(serving):
    with serving(api_key=("k",)).client() as client:
        for method, path in (("GET", "/ready"), ("GET", "/ping"), ("POST", "/ping"), ("HEAD", "/ready")):
            answer = client.request(method, path)
            assert answer.status_code == 200 and answer.content == b"", path
        assert client.get("/load").status_code == client.get("/tokenizer_info").status_code == 401


def test_load_counts_what_runs(serving, fake, until):
    engine = fake.FakeEngine(step_seconds=0.001)
    with serving(engine).client() as client:
        assert client.get("/load").json() == {"server_load": 0}
        with client.stream("POST", "/v1/completions", json={"prompt": "a", "max_tokens": 4000, "stream": True}):
            until(lambda: engine.live)
            assert client.get("/load").json() == {"server_load": 1}


def test_reset_is_for_the_operator(serving):
    paths = ("/v1/kv/reset", "/reset_prefix_cache")
    with serving().client() as alone:
        answers = [alone.post(path) for path in paths]
    told = {"object": "kv.reset", "blocks": 20, "segments": 4}
    assert [answer.json() for answer in answers] == [told, {"success": True, **told}]
    running = serving(api_key=("k",), admin_key=("root",))
    with running.client(Authorization="Bearer k") as tenant:
        for answer in (*map(tenant.post, paths), tenant.get("/load"), tenant.get("/metrics")):
            assert answer.status_code == 403 and answer.json()["error"]["code"] == "admin_only"
    with running.client(Authorization="Bearer root") as operator:
        assert operator.post(paths[0]).status_code == operator.get("/load").status_code == 200


def test_engine_death(serving, fake, until):
    """Streams get an error and the end mark, new requests and /health a 503."""
    engine = fake.FakeEngine(step_seconds=0.005)
    running = serving(engine)
    with running.client() as client:
        body = {"prompt": "hello", "max_tokens": 4000, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: {")
            engine.dead = "step 7 failed"
            rest = [line for line in lines if line]
        assert json.loads(rest[-2][6:])["error"]["code"] == "engine_dead" and rest[-1] == "data: [DONE]"
        health = client.get("/health")
        assert health.status_code == 503 and "step 7 failed" in health.json()["error"]["message"]
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 503
        assert samples(client)["kvloom:engine_up"] == 0


def samples(client):
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "echo-model" and sample.labels["engine"] == "0"
            extra = [value for name, value in sample.labels.items() if name not in ("model_name", "engine")]
            found[",".join([sample.name, *extra])] = sample.value
    return found


def test_metrics(serving, fake):
    engine = fake.FakeEngine(step_seconds=0.001)
    with serving(engine).client() as client:
        client.post("/v1/completions", json={"prompt": "hello world", "max_tokens": 6, "n": 2})
        client.post("/v1/completions", json={"prompt": "hello world", "max_tokens": 6, "stop": "world", "stream": True})
        client.post("/v1/completions", json={"prompt": "a", "max_tokens": -1})
        got = samples(client)
    tokens = engine.generated
    assert got["kvloom:request_success_total,length"] == 2 and got["kvloom:request_success_total,stop"] == 1
    assert got["kvloom:request_success_total,abort"] == 0 and got["kvloom:requests_refused_total,400"] == 1
    assert got["kvloom:time_to_first_token_seconds_count"] == 3
    assert got["kvloom:time_to_first_token_by_path_seconds_count,prefix"] == 3
    assert got["kvloom:time_to_first_token_by_path_seconds_count,segment"] == 0
    assert got["kvloom:inter_token_latency_seconds_count"] == tokens - 3
    assert got["kvloom:e2e_request_latency_seconds_count"] == 3
    assert got["kvloom:request_time_per_output_token_seconds_count"] == 3
    assert got["kvloom:request_generation_tokens_sum"] == tokens
    assert got["kvloom:request_prompt_tokens_sum"] == 3 * len(engine.tokenizer.encode("hello world"))
    assert got["kvloom:time_to_first_token_seconds_bucket,2560.0"] == 3
    assert got["kvloom:generation_tokens_total"] == tokens and got["kvloom:prompt_tokens_total"] == 400
    assert got["kvloom:prefix_cache_queries_total"] == 200 and got["kvloom:prefix_cache_hits_total"] == 50
    assert got["kvloom:replayed_tokens_total"] == 5
    step = {name.removeprefix("kvloom:engine_step_"): value for name, value in got.items() if "engine_step_" in name}
    assert [step[f"time_seconds_{part}"] for part in ("bucket,0.005", "bucket,0.02", "count", "sum")] == [3, 5, 5, 0.5]
    assert [step[f"prompt_rows_{part}"] for part in ("bucket,0.0", "bucket,64.0", "count", "sum")] == [4, 5, 5, 60]
    assert got["kvloom:selection_state_bytes"] == 768 and got["kvloom:selection_state_capacity_bytes"] == 3 << 20
    assert got["kvloom:num_preemptions_total"] == 2 and got["kvloom:kv_cache_usage_perc"] == 0.1
    assert got["kvloom:num_requests_running"] == 0 and got["kvloom:num_requests_waiting"] == 0
    assert got["kvloom:kv_blocks,full,cached"] == 20 and got["kvloom:kv_blocks,local,free"] == 40
    assert any(name.startswith("kvloom:engine_info,") and ",fake," in name for name in got)
    assert not any(name.endswith("_created") for name in got)


def test_metrics_of_approximate_reuse(serving, fake):
    engine = fake.FakeEngine()
    engine.reused = 5
    with serving(engine).client() as client:
        client.post("/v1/completions", json={"prompt": "hello world", "max_tokens": 2})
        got = samples(client)
        page = client.get("/metrics").text
    share = {name.removeprefix("kvloom:kvshare_"): value for name, value in got.items() if "kvshare" in name}
    assert got["kvloom:time_to_first_token_by_path_seconds_count,segment"] == 1
    assert (share["tokens_total,stale"], share["tokens_total,rejected"]) == (60, 0), "kinds are there before they happen"
    assert (share["reused_tokens_total"], share["recomputed_tokens_total"]) == (60, 12)
    assert share["requests_total,segment,"] == 1 and share["requests_total,full,too little to reuse"] == 2
    assert (share["runs_by_donor_total,context"], share["runs_by_scope_total,public"]) == (2, 1)
    lengths = [share[f"run_length_tokens_bucket,{bound}"] for bound in ("64.0", "128.0", "256.0", "2048.0", "+Inf")]
    assert lengths == [1, 1, 3, 3, 4] and share["run_length_tokens_count"] == 4
    assert share["recomputed_ratio_bucket,0.15"] == 0 and share["recomputed_ratio_bucket,0.2"] == 1
    assert share["match_seconds_total"] == 0.25 and share["deviation_sum_total"] / share["deviation_runs_total"] == 0.25
    assert (share["enabled"], share["segments"], share["segment_capacity_bytes"]) == (1, 4, 8192)
    assert "alice" not in page, "no client chooses a label"


def test_kv(served):
    with served.client() as client:
        body = client.get("/v1/kv").json()
    assert body["capacity_tokens"] == 1600 and body["block_size"] == 16 and body["hit_rate"] == 0.25
    assert body["blocks"]["full"] == {"total": 100, "free": 70, "cached": 20, "in_use": 10}
    assert body["blocks"]["local"]["total"] == 40
    assert body["tenants"][""] == {
        "cached_blocks": 20, "in_use_blocks": 10, "segment_bytes": 1024, "tokens": {"prefix": 10, "stale": 60},
        "reuse_checks": "passed",
    }  # fmt: skip
    assert body["tenants"]["alice"] == {
        "cached_blocks": 0,
        "in_use_blocks": 0,
        "segment_bytes": 3072,
        "tokens": {"fresh": 18},
        "reuse_checks": "passed",
    }
    assert body["selection_state"] == {"bytes": 768, "capacity_bytes": 3 << 20}
    assert body["requests"]["replayed_tokens"] == 5
    share = body["kvshare"]
    assert share["segments"] == {"count": 4, "bytes": 4096, "capacity_bytes": 8192, "evictions": 0}
    assert share["recomputed_share"] == 12 / 72 and share["deviation"] == 0.25
    assert {"path": "full", "reason": "too little to reuse", "count": 2} in share["requests"]


def test_tenants_are_told_of_themselves_alone(serving):
    running = serving(tenant_keys={"k": "alice", "l": "bob"}, admin_key=("root",))
    for key, tenants in (("k", {"alice": 3072}), ("l", {"bob": 0})):
        with running.client(Authorization=f"Bearer {key}") as client:
            body, page = client.get("/v1/kv").json(), client.get("/metrics")
        assert {name: figures["segment_bytes"] for name, figures in body["tenants"].items()} == tenants
        assert set(body) == {"capacity_tokens", "block_size", "blocks", "hit_rate", "tenants"}, "nothing that others change"
        assert body["capacity_tokens"] == 1600 and body["blocks"]["full"] == {"total": 100}
        assert page.status_code == 403 and page.json()["error"]["code"] == "admin_only"
    with running.client(Authorization="Bearer root") as client:
        body = client.get("/v1/kv").json()
        assert list(body["tenants"]) == ["", "alice"] and body["kvshare"]["segments"]["bytes"] == 4096
        assert samples(client)["kvloom:kvshare_segments"] == 4
    with serving(trusted_proxies=("10.0.0.0/8",)).client() as client:
        assert list(client.get("/v1/kv").json()["tenants"]) == [""], "whom a proxy names nobody for is nobody in particular"
        assert client.get("/metrics").status_code == 403


def test_metrics_tell_of_tenants_that_the_operator_named(serving, fake):
    """Of no others: not of the tenant of requests without one, which the engine knows as well."""
    with serving(tenant_keys={"k": "alice"}, tenant_names=("alice", "carol"), admin_key=("root",)).client() as client:
        found = [line for line in client.get("/metrics", headers={"Authorization": "Bearer root"}).text.splitlines()
                 if line.startswith("kvloom:tenant_")]  # fmt: skip
    assert len(found) == 7 and not any('tenant=""' in line or "bob" in line for line in found)
    own = 'engine="0",model_name="echo-model",tenant="alice"'
    assert f"kvloom:tenant_segment_bytes{{{own}}} 3072.0" in found
    assert 'kvloom:tenant_tokens_total{engine="0",kind="fresh",model_name="echo-model",tenant="alice"} 18.0' in found


def test_metrics_go_without_tenants_that_the_engine_cannot_tell_of(serving, fake, monkeypatch):
    class Slow(fake.FakeEngine):
        async def tenants(self, names=None):
            if self.overloaded:
                raise OverloadedError("too many questions")
            await asyncio.sleep(60)

    monkeypatch.setattr(metrics, "TENANTS_SECONDS", 0.01)
    engine = Slow()
    with serving(engine, tenant_names=("alice",)).client() as client:
        for engine.overloaded in (True, False):
            page = client.get("/metrics").text
            assert "kvloom:engine_up" in page and 'tenant="alice"' not in page


def test_a_single_key_is_shown_everything(serving):
    with serving(api_key=("k",)).client(Authorization="Bearer k") as client:
        assert client.get("/metrics").status_code == 200 and "kvshare" in client.get("/v1/kv").json()


def test_an_admin_key_alone_guards_figures_only(serving):
    running = serving(admin_key=("root",))
    with running.client() as client:
        assert client.get("/v1/models").status_code == 200 and client.get("/metrics").status_code == 403
        assert client.get("/metrics", headers={"Authorization": "Bearer root"}).status_code == 200
        assert client.get("/metrics", headers={"Authorization": "Bearer toor"}).status_code == 403


def test_tokenize_and_back(served):
    with served.client() as client:
        body = client.post("/tokenize", json={"prompt": "hello 🦊", "return_token_strs": True}).json()
        assert body["tokens"] == served.engine.tokenizer.encode("hello 🦊") and body["count"] == len(body["tokens"])
        assert len(body["token_strs"]) == body["count"] and body["max_model_len"] == 4096
        assert client.post("/detokenize", json={"tokens": body["tokens"]}).json() == {"prompt": "hello 🦊"}
        chat = client.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
        text = client.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n" and chat["token_strs"] is None


def test_description(served):
    with served.client() as client:
        schema = client.get("/openapi.json").json()
        paths = schema["paths"]
        assert client.get("/docs").status_code == 200
    assert "422" not in str(schema) and "HTTPValidationError" not in str(schema)
    assert all("429" in operation["responses"] for path in paths.values() for operation in path.values())
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/kv", "/tokenize", "/health", "/metrics"} <= set(paths)


def test_access_line_holds_no_text(serving, fake, caplog):
    caplog.set_level("INFO", "kvloom.access")
    with serving(fake.FakeEngine()).client() as client:
        client.post("/v1/completions", json={"prompt": "confidential", "max_tokens": 3}, headers={"X-Request-Id": "abc"})
    line = caplog.messages[-1]
    assert (
        line.startswith("abc prompt=")
        and " reused=0 " in line
        and "generated=3" in line
        and "finish=length" in line
        and "confidential" not in line
    )


def test_access_line_can_be_off(serving, fake, caplog):
    caplog.set_level("INFO", "kvloom.access")
    with serving(fake.FakeEngine(), access_log=False).client() as client:
        client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
    assert not caplog.messages


SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
            "frequency_penalty": 0.0}  # fmt: skip


def test_every_name_of_a_model_may_be_asked_for_and_the_first_is_told(serving, fake):
    from dataclasses import replace

    engine = fake.FakeEngine()
    engine.model = replace(engine.model, other_names=("gpt-4o", "org/model"))
    with serving(engine).client() as client:
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == [fake.MODEL, "gpt-4o", "org/model"]
        assert client.get("/v1/models/org/model").json()["id"] == "org/model"
        assert client.get("/v1/models/other").status_code == 404
        for name in (fake.MODEL, "gpt-4o", "org/model", None):
            reply = client.post("/v1/completions", json={"model": name, "prompt": "hi", "max_tokens": 1})
            assert reply.json()["model"] == fake.MODEL
        refused = client.post("/v1/completions", json={"model": "other", "prompt": "hi"})
        assert refused.status_code == 404 and "'echo-model' or 'gpt-4o' or 'org/model'" in refused.json()["error"]["message"]


def test_how_many_tokens_a_model_recommends_and_allows(serving, fake):
    """The recommendation is for chats that do not say; the limit for all."""
    from dataclasses import replace

    from kvloom.engine.requests.sampling import SamplingDefaults

    engine, nine = fake.FakeEngine(), {"max_tokens": 9}
    bodies = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}), ("/v1/completions", {"prompt": "hi"})
    asked = [(path, {**body, **more}) for path, body in bodies for more in ({}, nine)]
    for defaults, expected in (
        (SamplingDefaults(max_tokens=5), [5, 9, 16, 9]),
        (SamplingDefaults(max_tokens=5, most_tokens=5), [5, 5, 5, 5]),
    ):
        engine.model = replace(engine.model, sampling=defaults)
        with serving(engine).client() as client:
            replies = [client.post(path, json=body) for path, body in asked]
            assert [reply.json()["usage"]["completion_tokens"] for reply in replies] == expected
            too_many = client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 9, "min_tokens": 9})
            assert too_many.status_code == (200 if defaults.most_tokens is None else 400)


def test_the_models_own_sampling_stands_in_for_what_a_request_does_not_say(serving, fake):
    from dataclasses import replace

    from kvloom.engine.requests.sampling import SamplingDefaults

    engine = fake.FakeEngine()
    engine.model = replace(engine.model, sampling=SamplingDefaults(temperature=0.2, top_p=0.9))
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    asked = [{}, {"temperature": 0.7}, {"top_p": 1.0}, {"temperature": None, "top_p": None}]
    with serving(engine).client() as client:
        assert client.get("/v1/models").json()["data"][0]["default_sampling"] == SAMPLING | {"temperature": 0.2, "top_p": 0.9}
        for path, body in (("/v1/chat/completions", chat), ("/v1/completions", {"prompt": "hi", "max_tokens": 2})):
            engine.calls.clear()
            assert all(client.post(path, json={**body, **more}).status_code == 200 for more in asked)
            used = [(call["sampling"].temperature, call["sampling"].top_p) for call in engine.calls]
            assert used == [(0.2, 0.9), (0.7, 0.9), (0.2, 1.0), (0.2, 0.9)]


def test_without_a_recommendation_sampling_is_openais(served):
    assert served.client().get("/v1/models").json()["data"][0]["default_sampling"] == SAMPLING
    served.openai().completions.create(model="echo-model", prompt="hi", max_tokens=1)
    assert (served.engine.calls[-1]["sampling"].temperature, served.engine.calls[-1]["sampling"].top_p) == (1.0, 1.0)
