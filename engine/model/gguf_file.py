"""The GGUF container: metadata and tensor directory of one memory-mapped file.

Owns the file format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) and nothing of what a model makes of it.
Promises that every length and offset is checked against the file before use, so a truncated or hostile file ends in a
ModelError, never in a crash. `gguf.GGUFReader` needs seconds for a vocabulary of 49,152 tokens because it makes three numpy
views per string; this reader steps over arrays in milliseconds and decodes one when it is asked for.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import struct
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType

from kvloom.engine.errors import ModelError
from kvloom.engine.model.files import Fields, shown

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {
    code: struct.Struct("<" + letter)
    for code, letter in {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}.items()
}
_U32, _U64 = _SCALARS[4], _SCALARS[10]


class GGUFTensor(NamedTuple):
    """One entry of the directory. `shape` is in row-major order (outermost first), the reverse of the file's own."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    """Absolute byte position in the file."""
    size: int
    """Bytes."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, that is of the last dimension."""
        return _row_bytes(self.kind, self.shape[-1])


class GGUFFile:
    """A GGUF file: `metadata` (key -> value, arrays as lists, decoded on access) and `tensors` (name -> directory entry).

    Raises ModelError if the file is not GGUF, not of a known version, split in shards, or shorter than it says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = _map(path)
        reader = _Reader(path, self._data)
        tensor_count, pairs = _read_header(reader)
        self.metadata: Mapping[str, Any] = _Metadata(reader, pairs)
        if (shards := Fields(self.metadata).integer("split.count", 0)) > 1:
            raise ModelError(f"{path} is one of {shards} GGUF shards; join them first (llama-gguf-split --merge)")
        self.tensors = _read_directory(reader, tensor_count, self.metadata)

    def bytes_of(self, tensor: GGUFTensor) -> np.ndarray:
        """A tensor's rows as stored: uint8 [rows, row_bytes], memory-mapped, private (writes never reach the file)."""
        flat = np.frombuffer(self._data, dtype=np.uint8, count=tensor.size, offset=tensor.offset)
        return flat.reshape(-1, tensor.row_bytes)

    def release(self) -> None:
        """Give back the memory of what was read: the system reads it again from the file when somebody asks."""
        with contextlib.suppress(OSError):  # of pages that are locked into memory
            self._data.madvise(mmap.MADV_DONTNEED)


def read_metadata(path: Path, keys: Collection[str] | None = None) -> dict[str, Any]:
    """Metadata of a GGUF file as plain Python values; strings as str, arrays as lists.

    keys: the only ones to read (missing ones are left out); None reads all. A tokenizer is made from tokenizer.ggml.model,
    .pre, .tokens, .token_type, .merges, .scores, .bos_token_id, .eos_token_id, .add_bos_token, .add_space_prefix and
    tokenizer.chat_template. Raises ModelError.
    """
    metadata = GGUFFile(Path(path)).metadata
    return {key: metadata[key] for key in metadata if keys is None or key in keys}


class _Reader:
    """A cursor over the mapped file; each read is checked against its end."""

    def __init__(self, path: Path, data: mmap.mmap, position: int = 0) -> None:
        self.path, self.data, self.position = path, data, position

    def take(self, size: int) -> int:
        """Step over `size` bytes and return where they began."""
        begin = self.position
        if size > len(self.data) - begin:
            raise self.truncated(begin)
        self.position = begin + size
        return begin

    def truncated(self, begin: int) -> ModelError:
        return ModelError(
            f"{self.path} is truncated or damaged: what begins at byte {begin:,} would end beyond the file's "
            f"{len(self.data):,} bytes; fetch it again"
        )

    def scalar(self, code: struct.Struct) -> Any:
        return code.unpack_from(self.data, self.take(code.size))[0]

    def string(self) -> str:
        size = self.scalar(_U64)
        begin = self.take(size)
        return self.data[begin : begin + size].decode("utf-8", "replace")

    def value(self, kind: int, keep: bool = True) -> Any:
        """A metadata value of type `kind`; without `keep` only the cursor moves over it."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ModelError(f"{self.path}: metadata of unknown type {kind} at byte {self.position:,}")
        item, count = self.scalar(_U32), self.scalar(_U64)
        if item == _STRING:
            return self.strings(count, keep)
        if item not in _SCALARS:
            raise ModelError(f"{self.path}: metadata array of unsupported type {item} at byte {self.position:,}")
        code = _SCALARS[item]
        begin = self.take(count * code.size)
        return np.frombuffer(self.data, np.dtype(code.format), count, begin).tolist() if keep else None

    def strings(self, count: int, keep: bool) -> list[str]:
        """Like `string`, `count` times over, without a call per string: vocabularies have 10^5 of them."""
        data, position, end, length = self.data, self.position, len(self.data), _U64.unpack_from
        found: list[str] = []
        for _ in range(count):
            begin = position + 8
            position = begin + length(data, position)[0] if begin <= end else end + 1
            if position > end:
                raise self.truncated(begin)
            if keep:
                found.append(data[begin:position].decode("utf-8", "replace"))
        self.position = position
        return found


class _Metadata(Mapping[str, Any]):
    """The key-value section. Made by one pass that notes where each value lies; values are decoded on access."""

    def __init__(self, reader: _Reader, pairs: int) -> None:
        self._path, self._data = reader.path, reader.data
        self._values: dict[str, tuple[int, int]] = {}
        for _ in range(pairs):
            key, kind = reader.string(), reader.scalar(_U32)
            if key in self._values:
                raise ModelError(f"{reader.path}: metadata key {shown(key)} is given twice; convert the model again")
            self._values[key] = kind, reader.position
            reader.value(kind, keep=False)

    def __getitem__(self, key: str) -> Any:
        kind, position = self._values[key]
        return _Reader(self._path, self._data, position).value(kind)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _read_header(reader: _Reader) -> tuple[int, int]:
    """Check magic and version; return the number of tensors and of metadata pairs."""
    if (magic := bytes(reader.data[:4])) != _MAGIC:
        raise ModelError(f"{reader.path} is not a GGUF file: it begins with {magic!r}, not {_MAGIC!r}")
    reader.position = 4
    version = reader.scalar(_U32)
    if version not in _VERSIONS:
        raise ModelError(f"{reader.path} is GGUF version {version}; supported: 2 and 3, little-endian")
    return reader.scalar(_U64), reader.scalar(_U64)


def _read_directory(reader: _Reader, count: int, metadata: Mapping[str, Any]) -> dict[str, GGUFTensor]:
    entries = [_read_entry(reader) for _ in range(count)]
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise ModelError(f"{reader.path}: general.alignment is {shown(alignment)}; allowed: a power of two")
    base = -(-reader.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    free = base
    for entry in sorted(entries, key=lambda entry: entry.offset):
        tensor = entry._replace(offset=base + entry.offset)
        if tensor.name in tensors:
            raise ModelError(f"{reader.path}: tensor {shown(tensor.name)} is listed twice")
        if tensor.offset + tensor.size > len(reader.data):
            raise ModelError(
                f"{reader.path} is truncated: tensor {shown(tensor.name)} ends at byte {tensor.offset + tensor.size:,}, "
                f"the file has {len(reader.data):,}; fetch it again"
            )
        if tensor.offset < free or entry.offset % alignment:
            raise ModelError(
                f"{reader.path}: tensor {shown(tensor.name)} begins at byte {tensor.offset:,}; allowed: multiples of "
                f"{alignment} behind the tensor before it, which ends at {free:,}"
            )
        free = tensor.offset + tensor.size
        tensors[tensor.name] = tensor
    return tensors


def _read_entry(reader: _Reader) -> GGUFTensor:
    """One directory entry, its offset still relative to the data section."""
    name, dims = reader.string(), reader.scalar(_U32)
    if not 1 <= dims <= 4:
        raise ModelError(f"{reader.path}: tensor {shown(name)} has {dims} dimensions; allowed: 1 to 4")
    shape = tuple(reversed([reader.scalar(_U64) for _ in range(dims)]))
    code, offset = reader.scalar(_U32), reader.scalar(_U64)
    try:
        kind = GGMLQuantizationType(code)
        row_bytes = _row_bytes(kind, shape[-1])
    except (ValueError, KeyError):
        raise ModelError(f"{reader.path}: tensor {shown(name)} of shape {shape} has unknown or unfitting type {code}") from None
    return GGUFTensor(name, kind, shape, offset, math.prod(shape[:-1]) * row_bytes)


def _row_bytes(kind: GGMLQuantizationType, columns: int) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    if columns < 1 or columns % block:
        raise ValueError(f"{columns} columns are no multiple of {block}")
    return columns // block * size


def _map(path: Path) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            # Private and writable on paper, so that torch accepts views of it without a warning; nothing writes.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
