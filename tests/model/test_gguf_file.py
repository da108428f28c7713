"""The GGUF container: what it says is read, what it cannot mean is refused."""

from __future__ import annotations

import struct
import warnings

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from kvloom.engine.errors import ModelError
from kvloom.engine.model.gguf_file import GGUFFile, read_metadata


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("a.count", 7)
    writer.add_float32("a.ratio", 0.5)
    writer.add_bool("a.flag", True)
    writer.add_int64("a.big", -(2**40))
    writer.add_string("a.text", "grüße")
    writer.add_array("a.words", ["one", "", "drei", "四"])
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_array("a.floats", [0.5, 0.25])
    writer.add_tensor("x", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("y", np.arange(6, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata(small) -> None:
    found = read_metadata(small)
    assert found.pop("general.architecture") == "llama"
    assert found == {
        "a.count": 7, "a.ratio": 0.5, "a.flag": True, "a.big": -(2**40), "a.text": "grüße",
        "a.words": ["one", "", "drei", "四"], "a.numbers": [1, -2, 3], "a.floats": [0.5, 0.25],
    }  # fmt: skip


def test_only_the_keys_asked_for(small) -> None:
    assert read_metadata(small, ["a.words", "a.absent"]) == {"a.words": ["one", "", "drei", "四"]}


def test_directory_and_bytes(small) -> None:
    file = GGUFFile(small)
    x, y = file.tensors["x"], file.tensors["y"]
    assert (x.shape, x.kind.name, y.shape, y.kind.name) == ((3, 4), "F32", (6,), "F16")
    assert np.array_equal(file.bytes_of(x).view(np.float32), np.arange(12).reshape(3, 4))
    assert np.array_equal(file.bytes_of(y).view(np.float16)[0], np.arange(6))


def test_every_truncation_is_an_error(small, tmp_path) -> None:
    """Cut anywhere, the file is refused; only the padding behind the last tensor may be missing."""
    whole, cut = small.read_bytes(), tmp_path / "cut.gguf"
    file = GGUFFile(small)
    end = max(t.offset + t.size for t in file.tensors.values())
    for size in range(0, end, 3):
        cut.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"cut\.gguf"):
            GGUFFile(cut)


def test_damage_ends_in_model_error_or_not_at_all(small, tmp_path) -> None:
    """Any one byte of the header set to 255: a clear error or a file that still makes sense, never another exception."""
    whole, bad = bytearray(small.read_bytes()), tmp_path / "bad.gguf"
    refused = 0
    for position in range(GGUFFile(small).tensors["x"].offset):
        damaged = whole.copy()
        damaged[position] = 255
        bad.write_bytes(damaged)
        try:
            dict(GGUFFile(bad).metadata)
        except ModelError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(("patch", "named"), [
    ({0: b"GGML"}, "not a GGUF file"),
    ({4: struct.pack("<I", 1)}, "version 1"),
    ({4: struct.pack(">I", 3)}, "version 50331648"),
    ({8: struct.pack("<Q", 2**60)}, "0 dimensions"),
    ({16: struct.pack("<Q", 2**60)}, "truncated"),
])  # fmt: skip
def test_wrong_header(small, patch, named) -> None:
    data = bytearray(small.read_bytes())
    for position, value in patch.items():
        data[position : position + len(value)] = value
    small.write_bytes(data)
    with pytest.raises(ModelError, match=named):
        GGUFFile(small)


def directory(path) -> int:
    """Where the directory entry of tensor y begins."""
    return path.read_bytes().index(struct.pack("<Q", 1) + b"y")


@pytest.mark.parametrize(("offset", "named"), [
    (0, "tensor '[xy]' begins at byte .*behind the tensor before it"),
    (32, "begins at byte"),
    (57, "allowed: multiples of 32"),
    (2**40, "ends at byte"),
    (2**64 - 1, "ends at byte"),
])  # fmt: skip
def test_tensors_that_overlap_or_lie_outside(small, offset, named) -> None:
    data = bytearray(small.read_bytes())
    at = directory(small) + 9 + 4 + 8 + 4  # name, dimensions, one of them, type
    data[at : at + 8] = struct.pack("<Q", offset)
    small.write_bytes(data)
    with pytest.raises(ModelError, match=named):
        GGUFFile(small)


def test_a_key_that_is_given_twice(small) -> None:
    small.write_bytes(small.read_bytes().replace(b"a.ratio", b"a.count"))
    with pytest.raises(ModelError, match=r"'a\.count' is given twice"):
        GGUFFile(small)


@pytest.mark.parametrize(("value", "named"), [("2", "split.count is '2'"), (-1, None)])
def test_a_count_of_shards_that_is_no_number(tmp_path, value, named) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    (writer.add_string if isinstance(value, str) else writer.add_int32)("split.count", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if named is None:
        assert not GGUFFile(tmp_path / "x.gguf").tensors
    else:
        with pytest.raises(ModelError, match=named):
            GGUFFile(tmp_path / "x.gguf")


@pytest.mark.parametrize(("key", "size"), [(b"a.words", 2**40), (b"a.numbers", 2**61), (b"a.floats", 2**63)])
def test_arrays_that_are_longer_than_the_file(small, key, size) -> None:
    data = bytearray(small.read_bytes())
    at = data.index(key) + len(key) + 4 + 4  # type, type of the entries
    data[at : at + 8] = struct.pack("<Q", size)
    small.write_bytes(data)
    with pytest.raises(ModelError, match="truncated"):
        GGUFFile(small)


def test_shards_are_refused(tmp_path) -> None:
    path = tmp_path / "model-00001-of-00002.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="2 GGUF shards"):
        GGUFFile(path)


@pytest.mark.parametrize("content", [None, b""])
def test_absent_and_empty(tmp_path, content) -> None:
    path = tmp_path / "none.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match="cannot be read"):
        GGUFFile(path)


def test_agrees_with_the_gguf_package_on_the_built_in_model(smollm2) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = GGUFReader(smollm2)
    ours = GGUFFile(smollm2)
    assert {t.name: (tuple(reversed(t.shape.tolist())), t.data_offset, t.n_bytes) for t in theirs.tensors} == {
        t.name: (t.shape, t.offset, t.size) for t in ours.tensors.values()
    }
    for key, value in ours.metadata.items():
        assert theirs.fields[key].contents() == value, key
