"""Pages for people: / and /docs load nothing from elsewhere, and say what is served."""

import re
from dataclasses import replace

import pytest


def linked(text):
    """Every address that a page loads or links to."""
    return re.findall(r"""(?:src|href)=["']([^"']+)["']|url: ["']([^"']+)["']""", text)


@pytest.mark.parametrize("path", ["/", "/docs", "/redoc"])
def test_pages_load_nothing_from_elsewhere(served, path):
    with served.client() as client:
        answer = client.get(path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
        found = [one or other for one, other in linked(answer.text)]
        assert found and not [address for address in found if "//" in address]
        for address in found:
            assert client.get("/" + address.lstrip("/")).status_code == 200, address


def test_home_says_what_is_served(served):
    with served.client() as client:
        text = client.get("/").text
    assert "echo-model" in text and "4,096 tokens" in text and "/v1/chat/completions" in text


def test_home_escapes_what_it_shows(serving, fake):
    engine = fake.FakeEngine()
    engine.model = replace(engine.model, name="<script>alert(1)</script>")
    with serving(engine).client() as client:
        text = client.get("/").text
    assert "<script>" not in text and "&lt;script&gt;" in text
