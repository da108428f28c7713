"""Whose request it is: the header of trusted proxies, the names of the tenants file, and salts."""

import socket

import pytest

from kvloom.engine.errors import ConfigError
from kvloom.engine.requests.tenants import Tenants
from kvloom.server import auth, cli
from kvloom.server.auth import KeyRing
from kvloom.server.options import ServerOptions, server_options

BODY = {"model": "echo-model", "prompt": "a", "max_tokens": 1}
LOCAL = ("127.0.0.0/8",)


def ask(running, **headers):
    names = {key.replace("_", "-"): value for key, value in headers.items()}
    with running.client() as client:
        return client.post("/v1/completions", json=BODY, headers=names)


def tenants(engine):
    return [call["tenant"] for call in engine.calls]


def test_a_trusted_proxy_names_the_tenant(serving, fake):
    engine = fake.FakeEngine()
    running = serving(engine, trusted_proxies=LOCAL)
    assert ask(running, X_KVLoom_Tenant="acme.prod-1_x").status_code == 200
    assert ask(running).status_code == 200
    assert tenants(engine) == ["acme.prod-1_x", ""]


@pytest.mark.parametrize("proxies", [(), ("10.0.0.0/8", "::1")])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models", "/metrics"])
def test_from_others_the_header_is_refused_and_says_why(serving, fake, proxies, path):
    engine = fake.FakeEngine()
    with serving(engine, trusted_proxies=proxies).client() as client:
        response = client.get(path, headers={"X-KVLoom-Tenant": "acme", "X-Forwarded-For": "127.0.0.2"})
        assert client.get("/health", headers={"X-KVLoom-Tenant": "acme"}).status_code == 200
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (400, "untrusted_tenant", "invalid_request_error")
    assert "--trusted-proxies" in error["message"] and not engine.calls


@pytest.mark.parametrize("name", ["", "a b", "a/b", "x" * 65, "é", "a\tb"])
def test_a_name_that_cannot_be_is_refused(serving, name):
    response = ask(serving(trusted_proxies=LOCAL), X_KVLoom_Tenant=name.encode("latin-1"))
    assert response.status_code == 400 and response.json()["error"]["code"] == "invalid_tenant"


def test_two_names_are_refused(serving):
    with serving(trusted_proxies=LOCAL).client() as client:
        response = client.get("/v1/models", headers=[("X-KVLoom-Tenant", "a"), ("X-KVLoom-Tenant", "b")])
    assert response.status_code == 400 and "2 times" in response.json()["error"]["message"]


def test_a_proxy_needs_a_key_where_keys_are_asked_for(serving, fake):
    engine = fake.FakeEngine()
    running = serving(engine, trusted_proxies=LOCAL, api_key=("k",))
    assert ask(running, X_KVLoom_Tenant="acme").status_code == 401
    assert ask(running, X_KVLoom_Tenant="acme", Authorization="Bearer k").status_code == 200
    assert ask(running, Authorization="Bearer k").status_code == 200
    assert tenants(engine) == ["acme", KeyRing(["k"]).tenant("k")]


def test_keys_of_the_tenants_file_are_let_in_under_its_names(serving, fake):
    engine = fake.FakeEngine()
    known = Tenants.parse({"tenants": {"acme": {"api_keys": ["k1", "k2"]}, "other": {"api_keys": ["k3"]}}})
    options = ServerOptions(api_key=("k4",)).with_tenants(known)
    running = serving(engine, api_key=options.api_key, tenant_keys=options.tenant_keys)
    for key in ("k1", "k2", "k3", "k4"):
        assert ask(running, Authorization=f"Bearer {key}").status_code == 200
    assert ask(running, Authorization="Bearer k5").status_code == 401
    assert tenants(engine) == ["acme", "acme", "other", KeyRing(["k4"]).tenant("k4")]
    assert "k1" not in repr(options)


def test_keys_of_the_file_alone_guard_as_well(serving):
    assert ask(serving(tenant_keys={"k": "acme"})).status_code == 401


def test_a_key_in_two_places_is_refused():
    with pytest.raises(ConfigError, match="tenant acme") as error:
        ServerOptions(api_key=("sesame",), tenant_keys={"sesame": "acme"})
    assert "sesame" not in str(error.value)


@pytest.mark.parametrize("network", ["10.0.0.1/8", "nowhere", "10.0.0.0/40"])
def test_networks_are_checked(network):
    with pytest.raises(ConfigError, match="trusted_proxies"):
        ServerOptions(trusted_proxies=(network,))


def test_flags(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("trusted-proxies: [10.0.0.0/8, 127.0.0.1]\ntenants: t.yaml\n")
    config, options = cli.serve_settings(cli.parse(["serve", "--config", str(file)]))
    assert options.trusted_proxies == ("10.0.0.0/8", "127.0.0.1") and config.tenants.tenants == "t.yaml"
    flags = ["serve", "--trusted-proxies", "10.0.0.0/8", "--trusted-proxies", "::1", "--max-wait-ms", "5"]
    config, options = cli.serve_settings(cli.parse(flags))
    assert options.trusted_proxies == ("10.0.0.0/8", "::1") and config.scheduler.max_wait_ms == 5
    assert "tenant_keys" not in {option.name for option in server_options()}, "keys have no place on a command line"


@pytest.mark.parametrize(
    ("peer", "trusted"),
    [(("10.1.2.3", 5), True), (("::ffff:10.1.2.3", 5), True), (("11.1.2.3", 5), False), (("fd00::1", 5), True),
     (("fe80::1", 5), False), (None, False), (("", 0), False), (("testclient", 1), False)],
)  # fmt: skip
def test_who_is_trusted(peer, trusted):
    middleware = auth.TenantMiddleware(None, ServerOptions(trusted_proxies=("10.0.0.0/8", "fd00::/8")).proxies(), print)
    assert middleware._trusts({"client": peer}) is trusted


def test_a_salt_reaches_the_engine(serving, fake):
    engine = fake.FakeEngine()
    with serving(engine).client() as client:
        assert client.post("/v1/completions", json={**BODY, "cache_salt": "mine"}).status_code == 200
    assert engine.calls[0]["cache_salt"] == "mine"


def test_a_raw_header_with_odd_bytes_does_no_harm(serving):
    running = serving(trusted_proxies=LOCAL)
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-KVLoom-Tenant: \xff\xfe\r\n\r\n")
        answer = b""
        while chunk := connection.recv(4096):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 400") and b"invalid_tenant" in answer
