"""From a model folder or a .gguf file to a decoder that is ready to run.

Owns the assembly: projections are fused (q, k, v; gate, up) and converted one at a time, so that the peak is the finished
model plus one projection. Where a model's files come from (names, downloads) is the catalogue's business.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvloom.engine.config import DType, WeightMode
from kvloom.engine.device import CPU
from kvloom.engine.errors import ConfigError, ModelError
from kvloom.engine.model.config import ModelConfig, log
from kvloom.engine.model.decoder import Decoder, Layer
from kvloom.engine.model.files import naming
from kvloom.engine.model.gguf_file import GGUFFile
from kvloom.engine.model.heads import Heads, output_columns, projection_rows
from kvloom.engine.model.held import Held
from kvloom.engine.model.hf_config import read_hf_config
from kvloom.engine.model.linear import Linear, LinearWeight, make_embedding, make_linear, quantizes
from kvloom.engine.model.load_gguf import GGUFWeights
from kvloom.engine.model.load_safetensors import SafetensorsWeights
from kvloom.engine.model.packed_cache import PackedCache, PackedKey
from kvloom.engine.model.quantized import DenseEmbedding, PackedEmbedding, QuantizedLinear
from kvloom.engine.model.weights import EMBEDDING, FINAL_NORM, HEAD, WeightSource, check_weights, layer_prefix, settle_head
from kvloom.kernels.interface import Kernels

TORCH_DTYPES: dict[DType, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Progress = Callable[[int, int], None]
"""Called with (layers done, layers in all) after each layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A decoder, its config (max_position cut to what was asked for) and the identity of its weights."""

    decoder: Decoder
    config: ModelConfig
    fingerprint: str
    """Hex digest of config and weights, the same wherever the files lie. Independent of dtype and weights mode, which
    change stored KV too: a cache domain must name them beside it."""
    weights_held: str
    """What the weights mode came to, in words; see `engine.model.held`."""


def load_model(
    path: Path,
    dtype: DType,
    kernels: Kernels,
    weights: WeightMode = "auto",
    max_model_len: int | None = None,
    progress: Progress | None = None,
    head_groups: Callable[[ModelConfig, str], Sequence[Heads] | None] = lambda config, fingerprint: None,
    packed_folder: Path | None = None,
    gguf: GGUFFile | None = None,
    device: torch.device = CPU,
) -> LoadedModel:
    """path: a folder (config.json, *.safetensors) or a .gguf file; max_model_len: positions to prepare for, at most the
    model's own; head_groups: from config and fingerprint, the KV heads of every group in every layer, None for one group;
    packed_folder: where packed weights are kept from one start to the next, None for nowhere; gguf: the .gguf file, if it is
    open already; device: where the weights go, one projection at a time.

    Raises ModelError if files are absent, damaged or unsupported, ConfigError if a setting does not fit the model.
    """
    started = time.perf_counter()
    path = Path(path)
    config, source, files = open_checkpoint(path, gguf)
    with naming(path):
        check_weights(source, config)
        fingerprint = _fingerprint(config, files)
    config = _limit_context(config, max_model_len)
    groups = head_groups(config, fingerprint)
    cache = None
    if packed_folder is not None and kernels.quantized is not None and quantizes(weights, TORCH_DTYPES[dtype], kernels):
        parts = (fingerprint, weights, dtype, repr(groups), kernels.quantized.layout)
        cache = PackedCache(packed_folder, PackedKey(path.name, files, parts))
    assembly = _Assembly(config, source, TORCH_DTYPES[dtype], weights, kernels, groups, cache, device)
    decoder = assembly.decoder(progress)
    source.release()
    log.info("loaded %s (%s, %s) in %.2f s", path.name, config.architecture, config.dtype, time.perf_counter() - started)
    if cache is not None:
        cache.save()
    return LoadedModel(decoder=decoder, config=config, fingerprint=fingerprint, weights_held=str(assembly.held))


def fingerprint_of(path: Path) -> str:
    """The identity of a model's config and weights, as in `LoadedModel`, without loading it. Raises ModelError."""
    config, _, files = open_checkpoint(path)
    with naming(path):
        return _fingerprint(config, files)


def open_checkpoint(path: Path, gguf: GGUFFile | None = None) -> tuple[ModelConfig, WeightSource, tuple[Path, ...]]:
    """Config, weights (mapped, not read) and weight files of a model; gguf: the .gguf file, if it is open already. Raises
    ModelError that names the path."""
    path = Path(path)
    with naming(path):
        if path.is_dir():
            config, shards = read_hf_config(path), SafetensorsWeights(path)
            return settle_head(shards, config, path), shards, shards.files
        if path.is_file():
            weights = GGUFWeights(path, gguf)
            return weights.config, weights, weights.files
    raise ModelError(f"{path} does not exist; give a model folder or a .gguf file")


def _limit_context(config: ModelConfig, max_model_len: int | None) -> ModelConfig:
    if max_model_len is None:
        return config
    if not 1 <= max_model_len <= config.max_position:
        raise ConfigError(f"max_model_len is {max_model_len}; this model allows 1 to {config.max_position}")
    return dataclasses.replace(config, max_position=max_model_len)


class _Assembly:
    """Makes a decoder's parts from a source, in one dtype and mode."""

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        dtype: torch.dtype,
        mode: WeightMode,
        kernels: Kernels,
        groups: Sequence[Heads] | None = None,
        cache: PackedCache | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.config, self.source, self.dtype, self.mode, self.kernels = config, source, dtype, mode, kernels
        self.groups, self.cache, self.device = groups, cache, device
        self.held = Held()

    def decoder(self, progress: Progress | None) -> Decoder:
        config = self.config
        embedding = self.embedding()
        layers = []
        for index in range(config.layers):
            layers.append(self.layer(layer_prefix(index), None if self.groups is None else self.groups[index]))
            if progress is not None:
                progress(index + 1, config.layers)
        return Decoder(
            config,
            self.dtype,
            self.kernels,
            embedding=embedding,
            layers=layers,
            final_norm=self.read(FINAL_NORM, torch.float32),
            head=self.head(embedding),
        )

    def embedding(self) -> DenseEmbedding | PackedEmbedding:
        weight = LinearWeight(self.source, (EMBEDDING,))
        return make_embedding(weight, self.mode, self.dtype, self.kernels, self.cache, self.device)

    def layer(self, prefix: str, heads: Heads | None = None) -> Layer:
        config = self.config
        rows = None if heads is None else projection_rows(config, heads)
        columns = None if heads is None else output_columns(config, heads)
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        return Layer(
            input_norm=self.read(prefix + "input_layernorm.weight", torch.float32),
            qkv=self.linear([attention + part for part in ("q_proj", "k_proj", "v_proj")], config.qkv_bias, rows=rows),
            q_norm=self.read(attention + "q_norm.weight", torch.float32) if config.qk_norm else None,
            k_norm=self.read(attention + "k_norm.weight", torch.float32) if config.qk_norm else None,
            o=self.linear([attention + "o_proj"], config.o_bias, columns=columns),
            mlp_norm=self.read(prefix + "post_attention_layernorm.weight", torch.float32),
            gate_up=self.linear([mlp + "gate_proj", mlp + "up_proj"], config.mlp_bias),
            down=self.linear([mlp + "down_proj"], config.mlp_bias),
        )

    def head(self, embedding: DenseEmbedding | PackedEmbedding) -> Linear:
        tied, table = self.config.tied_embeddings, embedding.weight if isinstance(embedding, DenseEmbedding) else None
        weight = LinearWeight(self.source, (EMBEDDING if tied else HEAD,), table if tied else None, sensitive=True)
        if tied and isinstance(embedding, PackedEmbedding) and self.kernels.quantized is not None:
            made: Linear = QuantizedLinear(self.kernels.quantized, embedding.packed)
        else:
            made = make_linear(weight, None, self.mode, self.dtype, self.kernels, self.cache, self.device)
        self.held.note("head", made, weight)
        return made

    def linear(self, parts: list[str], biased: bool, *, rows: Tensor | None = None, columns: Tensor | None = None) -> Linear:
        weight = LinearWeight(self.source, tuple(part + ".weight" for part in parts), rows=rows, columns=columns)
        bias = torch.cat([self.read(part + ".bias", self.dtype) for part in parts]) if biased else None
        bias = bias[rows] if bias is not None and rows is not None else bias
        made = make_linear(weight, bias, self.mode, self.dtype, self.kernels, self.cache, self.device)
        self.held.note("layers", made, weight)
        return made

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        out = torch.empty(self.source.shape(name), dtype=dtype)
        self.source.read_into(name, out)
        return out.to(self.device)


_WINDOW, _WINDOWS = 4096, 1024


def _fingerprint(config: ModelConfig, files: Iterable[Path]) -> str:
    """BLAKE2b over the config, each file's size, and windows of 4 KiB spread evenly over it (all of a file up to 4 MiB): some
    milliseconds whatever the model's size. Tells checkpoints apart; it is no proof against one made to collide."""
    digest = hashlib.blake2b(json.dumps(dataclasses.asdict(config), sort_keys=True).encode(), digest_size=16)
    for path in files:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with open(path, "rb") as file:
            for index in range(min(_WINDOWS, -(-size // _WINDOW))):
                file.seek(index * max(_WINDOW, (size - _WINDOW) // (_WINDOWS - 1)))
                digest.update(file.read(_WINDOW))
    return digest.hexdigest()
