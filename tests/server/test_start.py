"""How a server starts: what it does not import, what it reads once, what it does beside the imports."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvloom.engine.config import EngineConfig
from kvloom.engine.errors import ModelError, ModelNotFoundError
from kvloom.engine.model import gguf_file
from kvloom.engine.startup import aside as aside_module
from kvloom.engine.startup.aside import aside, load_torch_library
from kvloom.engine.startup.catalog import at_hand, resolve
from kvloom.engine.startup.prepare import Prepared
from kvloom.server import serve
from kvloom.server.collector import no_collections

NOT_AT_START = (
    "transformers",
    "ray",
    "numba",
    "huggingface_hub",
    "matplotlib",
    "scipy",
    "pandas",
    "torch._dynamo",
    "torch._inductor",
    "triton",
)


def in_new_process(code: str) -> object:
    """What the code prints last, read as JSON."""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_start_imports_what_it_needs_alone(tiny: Path) -> None:
    code = f"""
import json, sys
from kvloom.engine.config import EngineConfig
from kvloom.server import serve
from kvloom.server.options import ServerOptions
config = EngineConfig.from_flat({{"model": {str(tiny)!r}, "kv_memory": "1MiB"}})
client = serve._start_engine(config, print)
serve.create_app(client, ServerOptions())
client.close()
print(json.dumps([name for name in {NOT_AT_START!r} if name in sys.modules]))
"""
    assert in_new_process(code) == []


def test_what_begins_before_torch_is_there_does_not_import_it() -> None:
    code = "import json, sys, kvloom.server.serve, kvloom.engine.startup.prepare; print(json.dumps('torch' in sys.modules))"
    assert in_new_process(code) is False


def test_a_header_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = gguf_file._read_header
    seen: list[Path] = []

    def counted(reader: gguf_file._Reader) -> tuple[int, int]:
        seen.append(reader.path)
        return read(reader)

    monkeypatch.setattr(gguf_file, "_read_header", counted)
    config = EngineConfig.from_flat({"model": "smollm2", "kv_memory": "8MiB"})
    client = serve._start_engine(config, lambda stage, done, total: None)
    try:
        assert client.tokenizer.encode("a") and seen == [resolve("smollm2").path]
    finally:
        client.close()


def test_errors_of_files_come_to_whoever_asks(tmp_path: Path) -> None:
    absent = Prepared(lambda: resolve("/not/there.gguf"))
    for part in ("files", "gguf", "tokenizer"):
        with pytest.raises(ModelNotFoundError, match="there is no model"):
            getattr(absent, part)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    broken = Prepared(lambda: resolve(str(tmp_path / "broken.gguf")))
    with pytest.raises(ModelError, match=r"broken\.gguf is truncated"):
        _ = broken.files


def test_a_folder_has_no_header(tiny: Path) -> None:
    prepared = Prepared(lambda: resolve(str(tiny)))
    assert prepared.gguf is None and prepared.files.path == tiny and prepared.tokenizer.vocab_size > 0


def test_only_what_is_here_is_begun_with(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert at_hand(str(tiny)) and not at_hand("somebody/something") and not at_hand("")
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path))
    assert not at_hand("smollm2")


def test_work_aside_gives_its_result_or_its_error() -> None:
    assert aside(lambda: 7).result(10) == 7
    with pytest.raises(ZeroDivisionError):
        aside(lambda: 1 // 0).result(10)


def test_the_library_is_there_before_torch_is_imported() -> None:
    code = """
import json, pathlib, sys
from kvloom.engine.startup.aside import load_torch_library
load_torch_library()
loaded = "libtorch_cpu" in pathlib.Path("/proc/self/maps").read_text()
print(json.dumps([loaded, "torch" in sys.modules]))
"""
    assert in_new_process(code) == [True, False]


def test_a_torch_that_looks_otherwise_is_left_to_its_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aside_module.importlib.util, "find_spec", lambda name: None)
    load_torch_library()


def test_nothing_is_collected_during_a_start_nor_walked_over_later() -> None:
    frozen = gc.get_freeze_count()
    try:
        with no_collections():
            assert not gc.isenabled()
            made = [[i] for i in range(1000)]
        assert gc.isenabled() and gc.get_freeze_count() >= frozen + len(made)
        assert not any(found is made[0] for found in gc.get_objects())
    finally:
        gc.unfreeze()
