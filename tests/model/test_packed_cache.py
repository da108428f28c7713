"""Packed weights on disk: the second start maps what the first one made, and trusts nothing that it should not."""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvloom.engine.model import packed_cache
from kvloom.engine.model.load import load_model
from kvloom.engine.model.packed_cache import PackedCache, PackedKey, list_packed
from kvloom.kernels.quantized import PackedWeight


@pytest.fixture(autouse=True)
def small_models_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_cache, "LEAST_BYTES", 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "packed"


def logits(path: Path, native: Any, folder: Path | None, **options: Any) -> torch.Tensor:
    model = load_model(path, "bf16", native, packed_folder=folder, **options)
    return model.decoder.logits(torch.linspace(-1, 1, 2 * 64).view(2, 64).to(model.decoder.dtype))


def only(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def reads_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("weights were packed again")

    monkeypatch.setattr("kvloom.engine.model.linear._codes", refuse)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16"])
def test_the_second_start_maps_what_the_first_one_packed(
    write_gguf: Callable[..., Path], native: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = write_gguf(kind)
    plain, first = logits(path, native, None), logits(path, native, folder)
    status = only(folder).stat()
    assert stat.S_IMODE(status.st_mode) == 0o600 and stat.S_IMODE(folder.stat().st_mode) == 0o700
    reads_no_weights(monkeypatch)
    assert torch.equal(first, plain) and torch.equal(logits(path, native, folder), plain)
    assert only(folder).stat().st_ino == status.st_ino


def test_other_modes_dtypes_and_heads_have_files_of_their_own(
    write_gguf: Callable[..., Path], native: Any, folder: Path
) -> None:
    path = write_gguf("F16")
    for weights in ("auto", "int8", "int4"):
        load_model(path, "bf16", native, weights, packed_folder=folder)
    load_model(path, "fp16", native, packed_folder=folder)
    load_model(path, "bf16", native, packed_folder=folder, head_groups=lambda config, _: [((1,), (0,))] * config.layers)
    assert len(list(folder.iterdir())) == 5
    load_model(path, "fp32", native, packed_folder=folder)
    load_model(path, "bf16", native, "bf16", packed_folder=folder)
    assert len(list(folder.iterdir())) == 5, "dense weights are not packed"


def _flip(at: float) -> Callable[[bytes], bytes]:
    def flip(data: bytes) -> bytes:
        index = int(at * (len(data) - 1))
        return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]

    return flip


DAMAGE = {
    "first byte": _flip(0.0),
    "middle": _flip(0.5),
    "directory": lambda data: data[:-60] + bytes([data[-60] ^ 1]) + data[-59:],
    "magic": _flip(1.0),
    "truncated": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "longer": lambda data: data + b"x",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_file_is_seen_and_made_anew(
    write_gguf: Callable[..., Path], native: Any, folder: Path, caplog: pytest.LogCaptureFixture,
    damage: Callable[[bytes], bytes],
) -> None:  # fmt: skip
    path = write_gguf("Q8_0")
    wanted = logits(path, native, folder)
    whole = only(folder).read_bytes()
    only(folder).write_bytes(damage(whole))
    assert torch.equal(logits(path, native, folder), wanted)
    assert "packed again" in caplog.text and only(folder).read_bytes() == whole


def test_changed_weights_are_not_confused(write_gguf: Callable[..., Path], native: Any, folder: Path) -> None:
    path = write_gguf("Q8_0")
    logits(path, native, folder)
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 16
    path.write_bytes(raw)
    assert torch.equal(logits(path, native, folder), logits(path, native, None))


def test_a_change_that_sampling_misses_is_seen_by_the_files_time(
    write_gguf: Callable[..., Path], native: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvloom.engine.model.load._fingerprint", lambda config, files: "the same for every file")
    path = write_gguf("Q8_0")
    logits(path, native, folder)
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 16
    path.write_bytes(raw)
    os.utime(path, ns=(0, 12345))
    assert torch.equal(logits(path, native, folder), logits(path, native, None))


def test_a_file_with_other_fields_is_made_anew(
    write_gguf: Callable[..., Path], native: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write = write_gguf("Q8_0"), packed_cache._write

    def names_alone(file: Any, key: PackedKey, made: list[tuple[dict[str, Any], torch.Tensor]]) -> None:
        write(file, key, [({"name": entry["name"]}, tensor) for entry, tensor in made])

    with monkeypatch.context() as patch:
        patch.setattr(packed_cache, "_write", names_alone)
        wanted = logits(path, native, folder)
    assert torch.equal(logits(path, native, folder), wanted)
    reads_no_weights(monkeypatch)
    assert torch.equal(logits(path, native, folder), wanted)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_others_may_write_is_not_used(
    write_gguf: Callable[..., Path], native: Any, folder: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    path = write_gguf("Q8_0")
    wanted = logits(path, native, folder)
    target, mode = (only(folder), 0o622) if what == "file" else (folder, 0o777)
    target.chmod(mode)
    assert torch.equal(logits(path, native, folder), wanted)
    assert "can be written by other users" in caplog.text


def test_a_file_of_another_user_is_not_used(
    write_gguf: Callable[..., Path], native: Any, folder: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = write_gguf("Q8_0")
    wanted = logits(path, native, folder)
    os.chown(only(folder), 12345, -1) if os.geteuid() == 0 else monkeypatch.setattr(os, "geteuid", lambda: 54321)
    assert torch.equal(logits(path, native, folder), wanted)
    assert "belongs to another user" in caplog.text


def test_a_link_is_not_followed(write_gguf: Callable[..., Path], native: Any, folder: Path, tmp_path: Path) -> None:
    path = write_gguf("Q8_0")
    wanted = logits(path, native, folder)
    kept = only(folder)
    kept.rename(tmp_path / "elsewhere")
    kept.symlink_to(tmp_path / "elsewhere")
    assert torch.equal(logits(path, native, folder), wanted)
    assert not only(folder).is_symlink()


def test_a_folder_that_cannot_be_written_is_no_error(
    write_gguf: Callable[..., Path], native: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "file").write_text("in the way")
    path = write_gguf("Q8_0")
    assert torch.equal(logits(path, native, tmp_path / "file" / "packed"), logits(path, native, None))
    assert "are not kept" in caplog.text


def test_a_full_disk_is_no_error(
    write_gguf: Callable[..., Path], native: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed_cache, "_write", full)
    logits(write_gguf("Q8_0"), native, folder)
    assert list(folder.iterdir()) == []


def some(folder: Path, source: Path, name: str, size: int = 1000) -> PackedCache:
    cache = PackedCache(folder, PackedKey(name, (source,), (name,)))
    cache.keep("a", PackedWeight(torch.arange(size, dtype=torch.int64).to(torch.uint8), 1, size, "Q4_0"))
    return cache


def test_old_files_go_and_what_dead_processes_left(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_cache, "MOST_FILES", 3)
    source = tmp_path / "model"
    source.write_text("weights")
    folder.mkdir(mode=0o700)
    fresh, stale = folder / "a.part", folder / "b.part"
    fresh.touch(), stale.touch()
    os.utime(stale, (0, 0))
    for index in range(5):
        some(folder, source, f"model{index}").save()
        for age, file in enumerate(list_packed(folder)):
            os.utime(folder / file.name, (time.time() - 100 * age, time.time() - 100 * age))
        assert some(folder, source, "model0").hit, "what is used stays"
    names = [file.name.split("-")[0] for file in list_packed(folder)]
    assert sorted(names) == ["model0", "model3", "model4"]
    assert fresh.exists() and not stale.exists()
    monkeypatch.setattr(packed_cache, "MOST_BYTES", 5000)
    some(folder, source, "large", 2400).save()
    assert len(list_packed(folder)) == 2 and some(folder, source, "large").hit
    some(folder, source, "too large", 2600).save()
    assert not some(folder, source, "too large").hit


def test_small_models_are_not_worth_a_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_cache, "LEAST_BYTES", 2000)
    some(folder, tmp_path, "small").save()
    assert not folder.exists()


def test_several_processes_may_start_at_once(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.write_text("weights")
    writers = [threading.Thread(target=lambda: some(folder, source, "same", 1 << 20).save()) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = some(folder, source, "same", 1 << 20)
    matrix = found.matrix("a")
    assert found.hit and matrix is not None and torch.equal(matrix.data[:256], torch.arange(256).to(torch.uint8))
    assert [path.suffix for path in folder.iterdir()] == [".packed"]


def test_a_mapped_file_outlives_its_replacement(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.write_text("weights")
    some(folder, source, "same").save()
    matrix = some(folder, source, "same").matrix("a")
    assert matrix is not None
    (folder / "empty").touch()
    os.replace(folder / "empty", next(folder.glob("*.packed")))
    assert torch.equal(matrix.data[:256], torch.arange(256).to(torch.uint8))
    assert not some(folder, source, "same").hit
