"""`kvloom serve PATH` with a path that holds no model: one line that names it on stderr, exit code 1, no traceback."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvloom.server import cli


def write(root: Path, name: str, content: bytes = b"") -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def link(root: Path, name: str, target: str) -> Path:
    (root / name).symlink_to(target)
    return root / name


def folder(root: Path, **files: bytes) -> Path:
    for name, content in files.items():
        write(root, f"model/{name.replace('__', '.')}", content)
    (root / "model").mkdir(exist_ok=True)
    return root / "model"


LLAMA = b'{"architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, '
LLAMA += b'"num_attention_heads": 2, "intermediate_size": 8}'
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty folder": (folder, "holds neither safetensors nor a .gguf file"),
    "empty file": (lambda root: write(root, "x.gguf"), "cannot be read"),
    "text": (lambda root: write(root, "x.gguf", b"hello"), "is not a GGUF file"),
    "other file": (lambda root: write(root, "x.bin", b"hello"), "is not a .gguf file"),
    "device": (lambda root: "/dev/null", "holds neither"),
    "link to nothing": (lambda root: link(root, "x.gguf", "nowhere"), "is a link that leads nowhere"),
    "link to itself": (lambda root: link(root, "x", "x"), "is a link that leads nowhere"),
    "nobody's home": (lambda root: "~nobodyofthisname/model", "~nobodyofthisname"),
    "a very long name": (lambda root: "x" * 5000, "cannot be read: File name too long"),
    "a zero byte": (lambda root: "x\0y", "there is no model"),
    "no config": (lambda root: folder(root, model__safetensors=b""), "has no config.json"),
    "broken config": (lambda root: folder(root, model__safetensors=b"", config__json=b"{"), "config.json cannot be read"),
    "binary config": (lambda root: folder(root, model__safetensors=b"", config__json=b"\xff"), "config.json cannot be read"),
    "foreign config": (lambda root: folder(root, model__safetensors=b"", config__json=b"{}"), "is not supported"),
    "empty weights": (lambda root: folder(root, model__safetensors=b"", config__json=LLAMA), "model.safetensors is truncated"),
    "weights of nothing": (
        lambda root: folder(root, model__safetensors=b"\2\0\0\0\0\0\0\0{}", config__json=LLAMA), "the checkpoint lacks"
    ),
    "huge header": (lambda root: folder(root, model__safetensors=b"\xff" * 64, config__json=LLAMA), "is truncated, damaged"),
    "not utf-8": (lambda root: write(root, os.fsdecode(b"x\xff.gguf"), b"hello"), "is not a GGUF file"),
    "weights in a folder that is not utf-8": (
        lambda root: folder(root / os.fsdecode(b"\xff"), model__safetensors=b"x", config__json=LLAMA), "model.safetensors"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_exit_code_1(tmp_path, capsys, monkeypatch, case) -> None:
    make, told = CASES[case]
    monkeypatch.setattr("kvloom.server.cli._serve", lambda arguments: load(arguments.model))
    assert cli.main(["serve", str(make(tmp_path))]) == 1
    err = capsys.readouterr().err
    assert err.startswith("kvloom: ") and err.count("\n") == 1 and len(err) < 1000
    assert told in err, err


def load(model: str) -> int:
    """What serving does up to the engine, without compiling kernels."""
    from kvloom.engine.model.load import load_model
    from kvloom.engine.startup.catalog import resolve
    from kvloom.kernels.reference import ReferenceKernels

    load_model(resolve(model).path, "fp32", ReferenceKernels())
    return 0
