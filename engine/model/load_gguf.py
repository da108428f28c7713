"""Weights of a GGUF file under their Hugging Face names.

Owns the name map and the row order: llama.cpp stores the q and k projections of the llama architecture with each head's rows
interleaved for its own rotary layout (pairs 2i, 2i + 1); here rows are put back for half-split pairs (i, i + dim/2).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvloom.engine.errors import ModelError
from kvloom.engine.model.config import ModelConfig, log
from kvloom.engine.model.dequantize import BY_PACKAGE, SUPPORTED, dequantize
from kvloom.engine.model.gguf_config import config_from_gguf
from kvloom.engine.model.gguf_file import GGUFFile, GGUFTensor
from kvloom.engine.model.weights import EMBEDDING, FINAL_NORM, HEAD, layer_prefix
from kvloom.kernels.quantized import KINDS, StoredWeight

_ROPE_FREQS = "rope_freqs.weight"
_TOP = {"token_embd.weight": EMBEDDING, "output_norm.weight": FINAL_NORM, "output.weight": HEAD}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFWeights:
    """A `WeightSource` over one GGUF file, and the `config` that its metadata describes."""

    def __init__(self, path: Path, file: GGUFFile | None = None) -> None:
        """file: the one at `path`, if it is open already."""
        self.files = (path,)
        self._file = file or GGUFFile(path)
        _check_kinds(self._file)
        self._tensors = {_canonical(name): t for name, t in self._file.tensors.items() if name != _ROPE_FREQS}
        self.config: ModelConfig = config_from_gguf(self._file, self._divisors())
        self._heads: dict[str, int] = {}
        if self._file.metadata["general.architecture"] == "llama":
            self._heads = {"self_attn.q_proj": self.config.q_heads, "self_attn.k_proj": self.config.kv_heads}

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def kind(self, name: str) -> str:
        return self._tensors[name].kind.name

    def tensor(self, name: str) -> Tensor:
        out = torch.empty(self.shape(name), dtype=torch.float32)
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: Tensor) -> None:
        tensor = self._tensors[name]
        if len(tensor.shape) == 1:  # a bias: stored as one row, but its entries belong to rows
            dequantize(self._bytes(tensor), tensor.kind, out.view(1, -1))
            if (order := self._row_order(name)) is not None:
                out.copy_(out[order])
        else:
            dequantize(self._ordered(name), tensor.kind, out)

    def quantized(self, name: str) -> StoredWeight | None:
        tensor = self._tensors[name]
        if tensor.kind.name not in KINDS or len(tensor.shape) != 2:
            return None
        rows, columns = tensor.shape
        return StoredWeight(tensor.kind.name, self._ordered(name), (rows, columns))

    def release(self) -> None:
        self._file.release()

    def _bytes(self, tensor: GGUFTensor) -> Tensor:
        return torch.from_numpy(self._file.bytes_of(tensor))

    def _ordered(self, name: str) -> Tensor:
        """A matrix's rows as stored, in Hugging Face order."""
        stored, order = self._file.bytes_of(self._tensors[name]), self._row_order(name)
        return torch.from_numpy(stored if order is None else stored[order])

    def _row_order(self, name: str) -> np.ndarray | None:
        """For each row in Hugging Face order, the row of the file that holds it; None if they are the same."""
        heads = next((heads for part, heads in self._heads.items() if part in name), None)
        if heads is None:
            return None
        return np.arange(self.shape(name)[0]).reshape(heads, -1, 2).swapaxes(1, 2).ravel()

    def _divisors(self) -> tuple[float, ...] | None:
        tensor = self._file.tensors.get(_ROPE_FREQS)
        if tensor is None:
            return None
        if len(tensor.shape) != 1:
            raise ModelError(f"tensor {_ROPE_FREQS} has shape {tensor.shape}; allowed: one dimension")
        out = torch.empty(1, tensor.shape[-1])
        return tuple(dequantize(self._bytes(tensor), tensor.kind, out)[0].tolist())


def _check_kinds(file: GGUFFile) -> None:
    for tensor in file.tensors.values():
        if tensor.kind not in SUPPORTED:
            allowed = ", ".join(kind.name for kind in SUPPORTED)
            raise ModelError(f"{file.path}: tensor {tensor.name} is of type {tensor.kind.name}; supported: {allowed}")
    if decoded := sorted({tensor.kind.name for tensor in file.tensors.values() if tensor.kind in BY_PACKAGE}):
        log.info("%s: %s are decoded when loaded, and take more memory than in the file", file.path.name, ", ".join(decoded))


def _canonical(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; a name that has none is kept, and refused by `check_weights`."""
    if name in _TOP:
        return _TOP[name]
    match name.split("."):
        case ["blk", layer, part, kind] if part in _IN_LAYER and layer.isdecimal():
            return f"{layer_prefix(int(layer))}{_IN_LAYER[part]}.{kind}"
    return name
