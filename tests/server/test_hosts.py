"""Web pages cannot reach a server on loopback under names of their own."""

import pytest

from kvloom.server.hosts import guards_hosts, is_loopback
from kvloom.server.options import ServerOptions


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "LOCALHOST.", "127.0.0.1:1", "127.3.2.1", "[::1]", "[::1]:80"])
def test_names_of_this_machine_are_let_in(serving, host):
    with serving(allowed_hosts=()).client(Host=host) as client:
        assert client.get("/v1/models").status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.0.1", "0.0.0.0", "[::2]",
     "evil@localhost", "localhost/x", "localhost:x:y", ""],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/models", "/nothing"])
def test_other_names_are_refused(serving, host, path):
    with serving(allowed_hosts=()).client(Host=host) as client:
        response = client.get(path)
        assert response.status_code == 403 and response.json()["error"]["code"] == "host_not_allowed"
        assert client.get("/health").status_code == 200, "a probe may come by any name"


def test_two_hosts_are_refused(serving):
    with serving(allowed_hosts=()).connect() as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 403")


def test_names_that_the_operator_allows(serving):
    running = serving(allowed_hosts=("Box.local",))
    for host, status in (("box.local:8000", 200), ("other.local", 403)):
        with running.client(Host=host) as client:
            assert client.get("/v1/models").status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://localhost:3000", 200), ("http://127.0.0.1", 200), ("https://evil.example", 403), ("null", 403), ("file://", 403)],
)
def test_pages_of_other_sites_are_refused(serving, origin, status):
    with serving().client(Origin=origin) as client:
        assert client.get("/v1/models").status_code == status


def test_pages_that_cors_names_are_let_in(serving):
    with serving(cors=("https://a.example",)).client(Origin="https://a.example") as client:
        assert client.get("/v1/models").headers["access-control-allow-origin"] == "https://a.example"
    with serving(cors=("*",)).client(Origin="null") as client:
        assert client.get("/v1/models").status_code == 200


def test_only_where_a_page_could_get_in():
    assert guards_hosts(ServerOptions()) and guards_hosts(ServerOptions(host="localhost", admin_key=("a",)))
    assert not guards_hosts(ServerOptions(api_key=("k",))) and not guards_hosts(ServerOptions(host="0.0.0.0"))
    assert is_loopback("::1") and not is_loopback("localhost.x")
