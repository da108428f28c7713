"""Packed weights that outlive the process: what loading a model made is mapped at the next start instead of made again.

Owns one file per model, weights mode, dtype and layout in a folder of the cache. A file is used only if

    it belongs to this user or to root, and nobody else may write it or its folder
    its key names these weights (config and sampled contents), this mode, this dtype, these head groups and this layout
    the model's files have the size and modification time they had, so that an edit which sampling could miss is seen
    every megabyte of it has the sum that was written with it

and is made anew otherwise. It appears complete or not at all, also with several processes at once, which share its pages.
A folder that cannot be written costs nothing but the time of loading.

    entry, entry, ...   each from a multiple of 64 bytes on
    directory           JSON: key, sources, entries with their sums
    footer              bytes of the directory, BLAKE2b of it, magic
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import re
import shutil
import stat
import struct
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvloom.engine.model.config import log
from kvloom.kernels.quantized import PackedWeight

MOST_FILES = 8
MOST_BYTES = 16 << 30
"""Of all files together; the least recently used go first."""
LEAST_BYTES = 16 << 20
"""A smaller model is packed in no time, and would only take a place."""

_MAGIC = b"kvloom packed 1\n"
_FOOTER = struct.Struct("<Q16s16s")
_MOST_DIRECTORY = 64 << 20
_ALIGNMENT = 64
_CHUNK = 1 << 20
_SUFFIX, _PART, _PART_SECONDS = ".packed", ".part", 3600
_MATRIX = "matrix "
"""In front of a matrix's name: an embedding table may be there in both forms."""
_DTYPES = {str(dtype): dtype for dtype in (torch.uint8, torch.bfloat16, torch.float16, torch.float32)}


class CachedFile(NamedTuple):
    """One file of the cache, for people to look at."""

    name: str
    size: int
    used: float
    """Unix seconds of its last use."""


@dataclasses.dataclass(frozen=True, slots=True)
class PackedKey:
    """What packed weights depend on."""

    name: str
    """Of the model's file or folder; for people, in the file's name."""
    files: tuple[Path, ...]
    parts: tuple[str, ...]
    """Everything else that makes other bytes: fingerprint, mode, dtype, head groups, layout."""

    @property
    def file_name(self) -> str:
        digest = hashlib.blake2b("\0".join(self.parts).encode(), digest_size=8).hexdigest()
        return f"{re.sub(r'[^0-9A-Za-z.-]+', '_', self.name)[:80]}-{digest}{_SUFFIX}"

    def sources(self) -> list[list[int]]:
        """Size and modification time of the model's files."""
        return [[found.st_size, found.st_mtime_ns] for found in (path.stat() for path in self.files)]


class PackedCache:
    """The weights of one model: those found, or, if there were none, those to keep."""

    def __init__(self, folder: Path, key: PackedKey) -> None:
        self._path, self._key = folder / key.file_name, key
        self._made: list[tuple[dict[str, Any], Tensor]] = []
        try:
            self._found = _read(self._path, key)
        except FileNotFoundError:
            self._found = {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            log.warning("%s is not used (%s); the weights are packed again", self._path, error)
            self._found = {}

    @property
    def hit(self) -> bool:
        """Whether the weights are there already."""
        return bool(self._found)

    def matrix(self, name: str) -> PackedWeight | None:
        """The packed matrix of this name, if it was found; mapped, so do not write."""
        found = self._found.get(_MATRIX + name)
        return found if isinstance(found, PackedWeight) else None

    def tensor(self, name: str) -> Tensor | None:
        """The plain tensor of this name, if it was found; mapped, so do not write."""
        found = self._found.get(name)
        return found if isinstance(found, Tensor) else None

    def keep(self, name: str, made: PackedWeight | Tensor) -> None:
        """Note what was made, for `save`."""
        if isinstance(made, Tensor):
            self._made.append(({"name": name}, made))
        else:
            shape = {"outputs": made.outputs, "inputs": made.inputs, "kind": made.kind}
            self._made.append(({"name": _MATRIX + name, **shape}, made.data))

    def save(self) -> None:
        """Write what was kept, if it was not found and is worth it. Never raises: without it the next start takes longer."""
        size = sum(tensor.nbytes for _, tensor in self._made)
        if self.hit or not LEAST_BYTES <= size <= MOST_BYTES // 2:
            return
        try:
            self._write(size)
        except OSError as error:
            log.info("packed weights are not kept (%s); every start will pack them again", error)

    def _write(self, size: int) -> None:
        folder = self._path.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < 2 * size:
            raise OSError(f"{folder} has less than {2 * size / 1e9:.1f} GB free")
        handle, part = tempfile.mkstemp(dir=folder, suffix=_PART)
        try:
            with os.fdopen(handle, "wb") as file:
                _write(file, self._key, self._made)
            os.replace(part, self._path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
        log.info("packed weights are kept in %s (%.0f MB)", self._path, size / 1e6)
        _prune(folder, self._path.name)


def list_packed(folder: Path) -> list[CachedFile]:
    """The files of a cache folder, last used first; none if it cannot be read."""
    found = []
    with contextlib.suppress(OSError):
        for path in folder.glob("*" + _SUFFIX):
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append(CachedFile(path.name, status.st_size, status.st_mtime))
    return sorted(found, key=lambda file: file.used, reverse=True)


# Reading -------------------------------------------------------------------------------------------------------------


def _read(path: Path, key: PackedKey) -> dict[str, PackedWeight | Tensor]:
    """Entries of a file by name. Raises FileNotFoundError, and OSError or ValueError with the reason not to use it."""
    _check_owner(path.parent.stat(), "its folder")
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        _check_owner(os.fstat(file.fileno()), "it")
        # Private and writable on paper, so that torch accepts views of it without a warning; nothing writes.
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)
    directory = _directory(data)
    if directory["key"] != list(key.parts):
        raise ValueError("it holds other weights")
    if directory["sources"] != key.sources():
        raise ValueError("the model's files have changed since")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # summing up does not need the interpreter's lock
        found = dict(pool.map(lambda entry: (entry["name"], _entry(data, entry)), directory["entries"]))
    with contextlib.suppress(OSError):
        os.utime(path)
    return found


def _check_owner(status: os.stat_result, what: str) -> None:
    if status.st_uid not in (0, os.geteuid()):
        raise ValueError(f"{what} belongs to another user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(f"{what} can be written by other users")


def _directory(data: np.ndarray) -> dict[str, Any]:
    if len(data) < _FOOTER.size:
        raise ValueError("it is truncated")
    size, digest, magic = _FOOTER.unpack(data[len(data) - _FOOTER.size :].tobytes())
    begin = len(data) - _FOOTER.size - size
    if magic != _MAGIC or size > _MOST_DIRECTORY or begin < 0:
        raise ValueError("it is truncated or damaged")
    text = data[begin : begin + size].tobytes()
    if _digest(text) != digest:
        raise ValueError("it is damaged")
    directory: dict[str, Any] = json.loads(text)
    return directory


def _entry(data: np.ndarray, entry: dict[str, Any]) -> PackedWeight | Tensor:
    raw = data[entry["offset"] : entry["offset"] + entry["bytes"]]
    if len(raw) != entry["bytes"] or _sums(raw) != entry["sums"]:
        raise ValueError(f"{entry['name']} is damaged in it")
    tensor = torch.from_numpy(raw).view(_DTYPES[entry["dtype"]]).view(entry["shape"])
    if not entry["name"].startswith(_MATRIX):
        return tensor
    return PackedWeight(tensor, entry["outputs"], entry["inputs"], entry["kind"])


# Writing -------------------------------------------------------------------------------------------------------------


def _write(file: IO[bytes], key: PackedKey, made: Sequence[tuple[dict[str, Any], Tensor]]) -> None:
    entries = []
    for entry, tensor in made:
        raw = tensor.cpu().contiguous().view(torch.uint8).numpy().reshape(-1)
        offset = file.tell()
        file.write(raw.data)
        file.write(bytes(-len(raw) % _ALIGNMENT))
        shape = {"dtype": str(tensor.dtype), "shape": list(tensor.shape), "offset": offset, "bytes": len(raw)}
        entries.append({**entry, **shape, "sums": _sums(raw)})
    text = json.dumps({"key": list(key.parts), "sources": key.sources(), "entries": entries}).encode()
    file.write(text)
    file.write(_FOOTER.pack(len(text), _digest(text), _MAGIC))


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=16).digest()


def _sums(raw: np.ndarray) -> list[int]:
    """Of every megabyte, the sum of its 64-bit words (modulo 2^64): at the speed of memory, unlike a cryptographic digest,
    and enough against damage; whoever could forge the file could forge a digest inside it, too."""
    whole = len(raw) // _CHUNK * _CHUNK
    rest = np.zeros(_CHUNK, np.uint8)
    rest[: len(raw) - whole] = raw[whole:]
    words = raw[:whole].view(np.int64).reshape(-1, _CHUNK // 8).sum(axis=1)
    return [*words.tolist(), int(rest.view(np.int64).sum())]


def _prune(folder: Path, newest: str) -> None:
    """Remove what exceeds the bounds, least recently used first, and what a process that died left behind."""
    total = 0
    for index, file in enumerate(sorted(list_packed(folder), key=lambda file: file.name != newest)):
        total += file.size
        if index >= MOST_FILES or total > MOST_BYTES:
            with contextlib.suppress(OSError):
                (folder / file.name).unlink()
    for part in folder.glob("*" + _PART):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > _PART_SECONDS:
                part.unlink()
