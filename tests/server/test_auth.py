"""API keys and CORS."""

import openai
import pytest

from kvloom.server.auth import KeyRing

PATHS = [
    *(("POST", path) for path in ("/v1/completions", "/v1/chat/completions", "/tokenize")),
    *(("GET", path) for path in ("/v1/models", "/v1/kv", "/metrics", "/version", "/docs", "/openapi.json")),
    *(("GET", path) for path in ("/nothing", "/health/x", "//health")),
]


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_every_path_but_health_needs_a_key(serving, method, path):
    with serving(api_key=("k1", "k2")).client() as client:
        for headers in ({}, {"Authorization": "Bearer"}, {"Authorization": "Bearer k"}, {"Authorization": "k1"},
                        {"Authorization": "Basic k1"}, {"Authorization": "Bearer k1 k2"}):  # fmt: skip
            response = client.request(method, path, headers=headers)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        assert client.get("/health").status_code == 200
        assert client.request(method, path, headers={"Authorization": "bearer k2"}).status_code != 401


def test_openai_error_and_tenants(serving, fake):
    engine = fake.FakeEngine()
    running = serving(engine, api_key=("first", "second"))
    with pytest.raises(openai.AuthenticationError):
        running.openai(api_key="third").models.list()
    for key in ("first", "second", "first"):
        running.openai(api_key=key).completions.create(model="echo-model", prompt="a", max_tokens=1)
    one, two, again = (call["tenant"] for call in engine.calls)
    assert one == again != two and len(one) == 12 and "first" not in one


def test_key_ring():
    ring = KeyRing(["a", "b"])
    assert ring and not KeyRing([])
    assert ring.tenant("a") == KeyRing(["x", "a"]).tenant("a") and ring.tenant("c") is None and ring.tenant("") is None


def test_large_body_without_key_is_unauthorised(serving):
    with serving(api_key=("k",), max_body=1024).client() as client:
        assert client.post("/v1/completions", json={"prompt": "a" * 5000}).status_code == 401


def test_cors_is_off_unless_asked(serving):
    origin = {"Origin": "https://a.example"}
    with serving().client() as client:
        assert "access-control-allow-origin" not in client.get("/health", headers=origin).headers
    with serving(cors=("https://a.example",), api_key=("k",)).client() as client:
        assert client.get("/health", headers=origin).headers["access-control-allow-origin"] == "https://a.example"
        other = client.get("/health", headers={"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers
        wanted = origin | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        assert client.options("/v1/completions", headers=wanted).status_code == 200
