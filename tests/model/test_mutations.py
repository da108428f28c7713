"""Broken model files, by the hundred: loading ends in a model that runs or in an error raised on purpose that names the path.

Fields of every file are replaced, dropped and retyped, and bytes are damaged, at random from fixed seeds.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import resource
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from kvloom.engine.config import EngineConfig
from kvloom.engine.errors import KVLoomError
from kvloom.engine.model.gguf_file import GGUFFile
from kvloom.engine.model.load import load_model
from kvloom.engine.startup.build import build
from kvloom.engine.startup.prepare import load_tokenizer
from kvloom.engine.text import check_vocabulary, end_tokens
from kvloom.engine.text.spelling import byte_alphabet

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 5, 64, 255, 10**6, 2**31, 10**9, 10**18, 2**63, 0.0, 0.5, -1.5, 1e30, 1e308, "", "x",
    "0", "\x00", "llama", "é" * 300, [], [0], [10**9, -1], ["x"], [None], {}, {"x": 1}, {"rope_type": "yarn"},
    float("nan"), float("inf"),
]  # fmt: skip
BEYOND_64_BITS = [10**30, 10**400, -(10**30)]
MOST_MEMORY = 400 << 20  # bytes that all cases together may add to the peak


def outcome(path: Path, kernels: Any, run_logits: Callable[..., Any]) -> str:
    """'runs', or the error's name. Anything but an error raised on purpose goes through."""
    try:
        loaded = load_model(path, "fp32", kernels, max_model_len=8)
        tokenizer = load_tokenizer(path)
        check_vocabulary(tokenizer, loaded.config.vocab_size, path)
        ends = end_tokens(tokenizer, loaded.config.eos_token_ids, loaded.config.vocab_size, path)
    except KVLoomError as error:
        named = str(path) in str(error) or "max_model_len" in str(error)
        assert named and len(str(error)) < 2000, f"the error does not name the path, or is too long: {str(error)[:300]}"
        return type(error).__name__
    assert all(0 <= token < loaded.config.vocab_size for token in ends)
    assert run_logits(loaded.decoder, [1, 2, 3]).shape == (3, loaded.config.vocab_size)
    tokenizer.decode(tokenizer.encode("hello <|im_end|> world"))
    return "runs"


def peak() -> int:
    """Most memory this process ever used, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested JSON, some of each long list or object."""
    found = [path] if path else []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(entries)[:12]:
        found += places(inner, (*path, key))
    return found


def mutated(value: Any, chance: random.Random, values: list[Any]) -> Any:
    """The JSON with one place replaced or dropped, sometimes two."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice([1, 1, 2])):
        *way, last = chance.choice(places(value))
        inner = value
        for key in way:
            inner = inner[key]
        if chance.random() < 0.15:
            del inner[last]
        else:
            inner[last] = copy.deepcopy(chance.choice(values))
        if not places(value):
            break
    return value


# Hugging Face folders ----------------------------------------------------------------------------------------------------

EXTRA = {
    "rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256},
    "rope_parameters": None, "layer_types": None, "sliding_window": None, "bos_token_id": 0, "quantization_config": None,
}  # fmt: skip


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    made = tmp_path / "model"
    shutil.copytree(tiny, made)
    config = made / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | EXTRA))
    return made


@pytest.mark.parametrize(("name", "count", "seed"), [
    ("config.json", 100, 1), ("generation_config.json", 20, 2), ("tokenizer_config.json", 40, 3), ("tokenizer.json", 50, 4),
])  # fmt: skip
def test_fields_of_a_folder(folder, kernels, run_logits, name, count, seed) -> None:
    chance, file, before = random.Random(seed), folder / name, peak()
    whole = json.loads(file.read_text())
    seen: Counter[str] = Counter()
    for _ in range(count):
        file.write_text(json.dumps(mutated(whole, chance, VALUES + BEYOND_64_BITS)))
        seen[outcome(folder, kernels, run_logits)] += 1
    assert seen["runs"] and (seen["ModelError"] or name == "generation_config.json"), seen
    assert peak() - before < MOST_MEMORY


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json",
                                  "special_tokens_map.json", "chat_template.json", "chat_template.jinja"])  # fmt: skip
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b'{"a": ' * 50_000, "cut", "folder"])
def test_files_that_are_no_json(folder, kernels, run_logits, name, content) -> None:
    file = folder / name
    whole = file.read_bytes() if file.exists() else b"{}"
    if content == "folder":
        file.unlink(missing_ok=True)
        file.mkdir()
    else:
        file.write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    found = outcome(folder, kernels, run_logits)
    assert found == "ModelError" or name == "chat_template.jinja" or name == "tokenizer.json", found


def damage(file: Path, whole: bytes, chance: random.Random, header: int) -> None:
    """Write the file with some bytes of its first `header` changed, or its end cut off."""
    data = bytearray(whole)
    for _ in range(chance.choice([1, 1, 2, 8])):
        data[chance.randrange(header)] = chance.choice([0, 1, 0x22, 0x7B, 0x7F, 0x80, 0xFF, chance.randrange(256)])
    file.write_bytes(data[: chance.randrange(len(data))] if chance.random() < 0.1 else data)


def test_bytes_of_safetensors(folder, kernels, run_logits) -> None:
    chance, file, before = random.Random(5), folder / "model.safetensors", peak()
    whole = file.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    seen: Counter[str] = Counter()
    for i in range(60):
        damage(file, whole, chance, 8 if i % 10 == 0 else header)
        seen[outcome(folder, kernels, run_logits)] += 1
    assert seen["ModelError"] > 30, seen
    assert peak() - before < MOST_MEMORY


# GGUF --------------------------------------------------------------------------------------------------------------------


def packed(value: Any) -> tuple[int, bytes]:
    """A metadata value's type and bytes. Raises struct.error if GGUF has no such value."""
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return (4, struct.pack("<I", value)) if 0 <= value < 2**32 else (11, struct.pack("<q", value))
    if isinstance(value, float):
        return 12, struct.pack("<d", value)
    if isinstance(value, str):
        text = value.encode()
        return 8, struct.pack("<Q", len(text)) + text
    if isinstance(value, list):
        entries = [packed(entry) for entry in value]
        kinds = {kind for kind, _ in entries} or {4}
        if len(kinds) > 1:
            raise struct.error("entries of several types")
        return 9, struct.pack("<IQ", kinds.pop(), len(value)) + b"".join(data for _, data in entries)
    raise struct.error(f"{type(value)} is no metadata")


def write(path: Path, metadata: Mapping[str, Any], source: GGUFFile) -> int:
    """A GGUF with this metadata and the tensors of `source`; returns where the tensors' data begins."""
    base = min(tensor.offset for tensor in source.tensors.values())
    out = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(source.tensors), len(metadata)))
    for key, value in metadata.items():
        kind, data = packed(value)
        out += packed(key)[1] + struct.pack("<I", kind) + data
    for tensor in source.tensors.values():
        shape = tuple(reversed(tensor.shape))
        out += packed(tensor.name)[1] + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        out += struct.pack("<IQ", tensor.kind, tensor.offset - base)
    out += bytes(-len(out) % 32)
    path.write_bytes(bytes(out) + source.path.read_bytes()[base:])
    return len(out)


@pytest.fixture
def gguf(write_gguf: Callable[..., Path], tmp_path: Path) -> tuple[Path, dict[str, Any], GGUFFile]:
    """A whole model: where to write it, its metadata, and the file that its tensors come from."""
    tokens = [*byte_alphabet(), "he", "ll", "hell", "hello", "<|endoftext|>", "<|im_end|>"]
    source = GGUFFile(write_gguf("Q4_0", vocab=len(tokens)))
    metadata = {key: source.metadata[key] for key in source.metadata if not key.startswith("tokenizer.")} | {
        "llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 1.0, "llama.attention.key_length": 16,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["h e", "l l", "he ll", "hell o"],
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 2) + [3, 3],
        "tokenizer.ggml.eos_token_id": len(tokens) - 2, "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False, "split.count": 0, "general.alignment": 32,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
    }  # fmt: skip
    path = tmp_path / "whole.gguf"
    write(path, metadata, source)
    return path, metadata, source


def test_metadata_of_a_gguf(gguf, kernels, run_logits) -> None:
    path, whole, source = gguf
    assert outcome(path, kernels, run_logits) == "runs"
    chance, before = random.Random(6), peak()
    seen: Counter[str] = Counter()
    while seen.total() < 150:
        try:
            write(path, mutated(whole, chance, VALUES), source)
        except struct.error:
            continue
        seen[outcome(path, kernels, run_logits)] += 1
    assert seen["runs"] and seen["ModelError"] > 50, seen
    assert peak() - before < MOST_MEMORY


def test_bytes_of_a_gguf(gguf, kernels, run_logits) -> None:
    path, whole, source = gguf
    header, chance, before = write(path, whole, source), random.Random(7), peak()
    data = path.read_bytes()
    seen: Counter[str] = Counter()
    for _ in range(150):
        damage(path, data, chance, header)
        seen[outcome(path, kernels, run_logits)] += 1
    assert seen["runs"] and seen["ModelError"] > 50, seen
    assert peak() - before < MOST_MEMORY


def test_a_name_that_is_no_utf_8_becomes_one_that_can_be_sent(gguf, caplog) -> None:
    caplog.set_level(logging.ERROR, "kvloom")  # test workers cannot send log lines with such a name
    odd = gguf[0].rename(gguf[0].parent / os.fsdecode(b"odd\xff.gguf"))
    info = build(EngineConfig.from_flat({"model": str(odd), "dtype": "fp32", "kv_memory": "1MiB"})).model
    assert info.root == "odd\ufffd" and info.name.endswith("odd\ufffd.gguf")
