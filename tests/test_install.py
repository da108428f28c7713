"""Installing: where torch comes from, and what a plain build downloads."""

from __future__ import annotations

import importlib.util
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/install.py as a module whose calls of pip are noted in `calls` instead of made."""
    spec = importlib.util.spec_from_file_location("install", ROOT / "scripts" / "install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(module, "pip", lambda *arguments: calls.append(arguments) or 0)
    monkeypatch.setattr(module, "calls", calls, raising=False)
    monkeypatch.setattr(module, "installed", lambda requirement: False)
    return module


class _Index(BaseHTTPRequestHandler):
    """An index that has torch, and nothing else."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/whl/cpu/torch/" else 404)
        self.end_headers()

    def log_message(self, *arguments: object) -> None: ...


def test_torch_alone_comes_from_the_cpu_index(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    server = HTTPServer(("127.0.0.1", 0), _Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    index = f"http://127.0.0.1:{server.server_port}/whl/cpu"
    monkeypatch.setenv("TORCH_INDEX", index)
    try:
        assert install.main([]) == 0
    finally:
        server.shutdown()
        server.server_close()
    assert install.calls == [("--no-deps", "--index-url", index, install.torch_pin()), ("--editable", str(ROOT))]


def test_a_folder_of_wheels_stands_in_for_an_index(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_INDEX", str(tmp_path))
    assert install.main(["dev", "demo"]) == 0
    assert install.calls == [
        ("--no-deps", "--no-index", "--find-links", str(tmp_path), install.torch_pin()),
        ("--editable", f"{ROOT}[dev,demo]"),
    ]


def test_images_have_torch_alone_first_and_then_a_copy(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_INDEX", "")
    assert install.main(["--only-torch"]) == 0 and install.main(["--fixed", "bench"]) == 0
    assert install.calls == [(install.torch_pin(),), (install.torch_pin(),), (f"{ROOT}[bench]",)]


@pytest.mark.parametrize("index", ["http://127.0.0.1:9/whl/cpu", "no URL"])
def test_an_index_that_does_not_answer_is_said_and_replaced(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], index: str
) -> None:
    monkeypatch.setenv("TORCH_INDEX", index)
    assert install.main([]) == 0
    assert install.calls[0] == (install.torch_pin(),)
    assert f"{index} does not answer" in capsys.readouterr().out


def test_no_index_means_what_pip_is_configured_for(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_INDEX", "")
    assert install.main([]) == 0
    assert install.calls[0] == (install.torch_pin(),)


def test_what_pip_says_of_torch_ends_the_install(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_INDEX", "")
    monkeypatch.setattr(install, "pip", lambda *arguments: 3)
    assert install.main([]) == 3


def test_a_build_needs_setuptools_alone() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        needs = tomllib.load(file)["build-system"]["requires"]
    assert [need.split(">")[0] for need in needs] == ["setuptools"]
