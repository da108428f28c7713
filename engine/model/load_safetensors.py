"""Weights of a Hugging Face folder: model.safetensors, or shards named by model.safetensors.index.json.

Files are memory-mapped through the `safetensors` package, which checks headers against file sizes. Paths in an index must
stay inside the folder. Pickled checkpoints (*.bin, *.pt) can run code when opened and are refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvloom.engine.errors import ModelError
from kvloom.kernels.quantized import StoredWeight

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")


class SafetensorsWeights:
    """A `WeightSource` over one or more .safetensors files. `files`: those it reads, sorted by name."""

    def __init__(self, folder: Path) -> None:
        self.files = tuple(sorted(_find_files(folder)))
        self._files: dict[str, Any] = {}
        for path in self.files:
            self._add(path, _open(path))

    def names(self) -> frozenset[str]:
        return frozenset(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def kind(self, name: str) -> str:
        return str(self._files[name].get_slice(name).get_dtype())

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def read_into(self, name: str, out: Tensor) -> None:
        out.copy_(self.tensor(name))

    def quantized(self, name: str) -> StoredWeight | None:
        """None: safetensors checkpoints that are supported hold plain numbers."""
        return None

    def release(self) -> None:
        """Nothing: tensors are views of files that are mapped as long as somebody looks."""

    def _add(self, path: Path, opened: Any) -> None:
        for name in opened.keys():  # noqa: SIM118 - an open file, not a dict
            if name in self._files:
                raise ModelError(f"tensor {name} is in {path.name} and in another shard of the same model")
            if (kind := opened.get_slice(name).get_dtype()) not in _FLOATS:
                raise ModelError(f"{path}: tensor {name} is of type {kind}; supported: {', '.join(_FLOATS)}")
            self._files[name] = opened


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is truncated, damaged or unreadable ({error}); fetch it again") from error


def _find_files(folder: Path) -> set[Path]:
    if (folder / _INDEX).exists():
        return _indexed_files(folder)
    if (folder / _SINGLE).exists():
        return {folder / _SINGLE}
    pickled = [path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth")]
    if pickled:
        raise ModelError(
            f"{folder} holds pickled weights ({pickled[0]}), which could run code when opened; convert them to safetensors"
        )
    raise ModelError(f"{folder} holds neither {_SINGLE} nor {_INDEX}")


def _indexed_files(folder: Path) -> set[Path]:
    """The shards that the index names; each must be a file directly in the folder."""
    path = folder / _INDEX
    try:
        shards = set(json.loads(path.read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is not an index of shards (an object with weight_map): {error!r}") from error
    for shard in shards:
        if not isinstance(shard, str) or shard != Path(shard).name or not shard.endswith(".safetensors"):
            raise ModelError(f"{path} names {shard!r}; allowed: names of .safetensors files beside it")
        if not (folder / shard).is_file():
            raise ModelError(f"{path} names {shard}, which is not there; fetch the model again")
    return {folder / shard for shard in shards}
