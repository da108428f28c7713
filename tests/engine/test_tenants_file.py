"""The tenants file: what it says, and what it may not say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvloom.engine import LLM
from kvloom.engine.config import EngineConfig
from kvloom.engine.errors import ConfigError
from kvloom.engine.requests.tenants import Tenant, Tenants

FILE = """
tenants:
  acme:
    weight: 2
    cache_bytes: 512MiB
    segment_bytes: 1000
    group: partners
    publishes: true
    api_keys: [first-key, "2"]
  small:
default:
  weight: 0.5
  cache_bytes: 1MiB
"""


def test_a_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text(FILE)
    tenants = Tenants.read(str(file))
    assert tenants.get("acme") == Tenant("acme", "partners", 2.0, 512 << 20, 1000, True)
    assert tenants.get("small") == Tenant("small"), "a tenant that is listed does not get the default's settings"
    assert tenants.get("other") == Tenant("other", weight=0.5, cache_bytes=1 << 20)
    assert tenants.keys == {"first-key": "acme", "2": "acme"}
    assert "first-key" not in repr(tenants)
    assert Tenants.read(None).get("x") == Tenant("x")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "list"),
        ({"tenant": {}}, "'tenant'"),
        ({"tenants": {"a b": {}}}, "'a b'"),
        ({"tenants": {7: {}}}, "7"),
        ({"tenants": {"a": {"wieght": 1}}}, "wieght"),
        ({"tenants": {"a": {"weight": 0}}}, "tenant a: weight is 0"),
        ({"tenants": {"a": {"weight": float("nan")}}}, "nan"),
        ({"tenants": {"a": {"weight": True}}}, "True"),
        ({"tenants": {"a": {"cache_bytes": "much"}}}, "tenant a: cache_bytes: 'much'"),
        ({"tenants": {"a": {"cache_bytes": -1}}}, "-1"),
        ({"tenants": {"a": {"segment_bytes": 1.5}}}, "1.5"),
        ({"tenants": {"a": {"publishes": "yes"}}}, "'yes'"),
        ({"tenants": {"a": {"group": "x y"}}}, "'x y'"),
        ({"tenants": {"a": {"api_keys": "k"}}}, "list"),
        ({"tenants": {"a": {"api_keys": [1]}}}, "list of texts"),
        ({"default": {"api_keys": ["k"]}}, "api_keys"),
        ({"default": {"weight": 1000}}, "default: weight"),
    ],
)
def test_what_cannot_be_understood_is_named(content: object, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        Tenants.parse(content, "tenants file f")
    assert words in str(error.value) and "tenants file f" in str(error.value)


def test_a_key_belongs_to_one_tenant_and_is_not_told() -> None:
    with pytest.raises(ConfigError) as error:
        Tenants.parse({"tenants": {"a": {"api_keys": ["secret"]}, "b": {"api_keys": ["secret"]}}})
    assert "tenant a" in str(error.value) and "secret" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "tenants:\n  a: {weight: 2}\n  b:\n  a: {weight: 1}\n",
        "tenants:\n  a:\n    weight: 2\n    weight: 1\n",
        "tenants:\n  a: {api_keys: [secret, secret]}\n",
        "tenants:\n  a: {api_keys: [secret]}\n  b: {api_keys: [other, secret]}\n",
        'tenants:\n  a: {}\n  "a": {}\n',
        '{"tenants": {"a": {}, "a": {"weight": 2}}}',
        "tenants: {a: }\ndefault: {}\ntenants: {b: }\n",
    ],
)
def test_what_is_given_twice_is_an_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="twice") as error:
        Tenants.read(str(file))
    assert "secret" not in str(error.value)


def test_a_setting_given_twice_is_an_error(tmp_path: Path) -> None:
    from kvloom.server.cli import read_yaml

    file = tmp_path / "config.yaml"
    for text in ("port: 1\nport: 2\n", "max-body: 1\nmax_body: 2\n"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="twice"):
            read_yaml(file)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Tenants.read(str(tmp_path / "none.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("tenants:\n  a: {api_keys: [secret\n")
    with pytest.raises(ConfigError, match="not YAML") as error:
        Tenants.read(str(broken))
    assert "secret" not in str(error.value)


def test_the_engine_keeps_quotas_and_weights(make_llm: Callable[..., LLM], tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text("tenants:\n  heavy: {weight: 4}\ndefault: {cache_bytes: 0}\n")
    core = make_llm(tenants=str(file), scheduler="cache_aware", max_wait_ms=100).core
    assert core.cache.pool.claim("heavy") == (4.0, None)
    assert core.cache.pool.claim("else") == (1.0, 0)
    assert core._scheduler._fairness._weight("heavy") == 4.0
    with pytest.raises(ConfigError, match="cannot be read"):
        make_llm(tenants=str(tmp_path / "none.yaml"))


def test_settings() -> None:
    config = EngineConfig.from_flat({"scheduler": "cache_aware", "max_wait_ms": "50", "tenants": "f.yaml"})
    assert (config.scheduler.max_wait_ms, config.tenants.tenants) == (50, "f.yaml")
    with pytest.raises(ConfigError, match="max_wait_ms is -1"):
        EngineConfig.from_flat({"max_wait_ms": -1})


@pytest.mark.parametrize("order", ["fcfs", "priority", "cache_aware"])
def test_every_order_gives_the_same_tokens(make_llm: Callable[..., LLM], order: str) -> None:
    from kvloom.engine.requests.sampling import SamplingParams

    prompts = [f"{'once upon a time ' * 12}{i}" for i in range(6)]
    params = SamplingParams(temperature=0, max_tokens=8)
    plain = make_llm().generate(prompts, params)
    other = make_llm(scheduler=order, max_num_seqs=2, max_batched_tokens=48).generate(prompts, params)
    assert [r.tokens for r in plain] == [r.tokens for r in other]
