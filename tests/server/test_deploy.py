"""What lies in deploy/: it parses, fits its schemas, and names metrics that the server has."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}


def _load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "deploy" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = _load("check")


@pytest.fixture(scope="module", autouse=True)
def no_settings_of_this_machine():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("KVLOOM_BIND", "KVLOOM_PORT", "KVLOOM_SECRETS", "COMPOSE_FILE", "COMPOSE_PROFILES"):
            patch.delenv(name, raising=False)
        yield


@pytest.mark.parametrize("piece", check.FILES, ids=lambda piece: piece.__name__)
def test_files_parse_and_fit_their_schemas(piece):
    print(piece())


def told(serving, fake):
    """Every name on /metrics, with the labels that its samples have here."""
    with serving(tenant_names=("alice",)).client() as client:
        client.post("/v1/completions", json={"prompt": "hello", "max_tokens": 2})
        client.post("/v1/completions", json={"prompt": "hello", "temperature": -1})
        page = client.get("/metrics").text
    kinds = dict(re.findall(r"^# TYPE (\S+) (\w+)$", page, re.M))
    labels = {}
    for name, inside in re.findall(r"^(kvloom:\w+)\{(.*)\} ", page, re.M):
        labels.setdefault(name, set()).update(re.findall(r"(\w+)=", inside))
    return {name + suffix for name, kind in kinds.items() for suffix in SUFFIXES[kind]}, labels


def test_panels_and_alerts_name_metrics_and_labels_that_the_server_has(serving, fake):
    names, labels = told(serving, fake)
    rules = (ROOT / "deploy" / "prometheus" / "alerts.yml").read_text()
    expressions = [*check.queries(), *re.findall(r"expr: (.*)", rules)]
    assert len(expressions) > 60
    for expression in expressions:
        used = re.findall(r"kvloom:\w+", expression)
        assert used or "up{" in expression
        assert set(used) <= names, expression
        for by in re.findall(r"by \(([^)]*)\)", expression):
            for name in used:
                if name in labels:  # a family without samples here has none to look at
                    assert set(re.split(r",\s*", by)) <= labels[name], expression


def test_every_check_of_files_can_fail(monkeypatch, tmp_path):
    broken, text = tmp_path / "broken.yaml", check.RAY_MANIFEST.read_text()
    broken.write_text("kind: Deployment\napiVersion: apps/v1\nmetadata: {name: x}\nspec: {replicas: many}\n")
    monkeypatch.setattr(check, "MANIFEST", broken)
    with pytest.raises(check.Wrong, match="many"):
        check.kubernetes()
    monkeypatch.setattr(check, "RAY_MANIFEST", broken)
    for good, bad, told in (
        ("mode: token", "mode: disabled", "may run anything"),
        ("maxReplicas: 8", "maxReplicas: 4", "no such workers"),
        ("periodSeconds: 2\n", "periodSeconds: soon\n", "soon"),
    ):
        broken.write_text(text.replace(good, bad))
        with pytest.raises(check.Wrong, match=told):
            check.kuberay()
    broken.write_text(text)
    definition = tmp_path / "crd.yaml"
    spec = {"properties": {name: {} for name in ("serveConfigV2", "upgradeStrategy", "rayClusterDeletionDelaySeconds")}}
    schema = {"properties": {"apiVersion": {}, "kind": {}, "metadata": {}, "spec": spec}}
    definition.write_text(json.dumps({"spec": {"versions": [{"name": "v1", "schema": {"openAPIV3Schema": schema}}]}}))
    with pytest.raises(check.Wrong, match="'rayClusterConfig' was unexpected"):
        check.crd(definition)
    broken.write_text("services: {server: {image: x, ports: ['0.0.0.0:1:1'], security_opt: ['no-new-privileges:true']}}\n")
    monkeypatch.setattr(check, "COMPOSE", (broken,))
    with pytest.raises(check.Wrong, match="published to all"):
        check.compose()
    broken.write_text("services: {server: {image: x, ports: ['99999:1']}}\n")
    with pytest.raises(check.Wrong, match="99999"):
        check.compose()
    monkeypatch.setattr(check, "ROOT", tmp_path)
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /x && sudo apt-get install y\n")
    with pytest.raises(check.Wrong, match="DL3006"):
        check.dockerfile()


def test_keys_are_drawn_once_and_lie_in_a_folder_of_their_owner(tmp_path, monkeypatch):
    folder = tmp_path / "secrets"
    check.call("sh", ROOT / "deploy" / "secrets.sh", folder)
    before = {file.name: file.read_text() for file in folder.iterdir()}
    check.call("sh", ROOT / "deploy" / "secrets.sh", folder)
    assert before == {file.name: file.read_text() for file in folder.iterdir()}
    assert len({before[name] for name in ("api_key", "admin_key", "grafana_password")}) == 3
    assert all(re.fullmatch(r"[0-9a-f]{48}", before[name]) for name in ("api_key", "admin_key", "grafana_password"))
    monkeypatch.setenv("KVLOOM_SECRETS", str(tmp_path / "elsewhere"))
    check.call("sh", ROOT / "deploy" / "secrets.sh")
    assert {file.name for file in (tmp_path / "elsewhere").iterdir()} == before.keys()
    assert folder.stat().st_mode & 0o777 == 0o700 and all(file.stat().st_mode & 0o022 == 0 for file in folder.iterdir())
