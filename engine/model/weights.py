"""Where weights come from: the protocol of a checkpoint, and what a Llama-family checkpoint must hold.

Names are those of Hugging Face whatever the file format (model.layers.0.self_attn.q_proj.weight). A source only maps its
files; bytes are read when a tensor is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from kvloom.engine.errors import ModelError
from kvloom.engine.model.config import ModelConfig, log
from kvloom.kernels.quantized import StoredWeight

_ROWS = 1024  # compared at a time

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


class WeightSource(Protocol):
    """A checkpoint. Methods raise ModelError for data that cannot be read, KeyError for a name that is not in `names`."""

    def names(self) -> frozenset[str]:
        """Canonical names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def kind(self, name: str) -> str:
        """The type it is stored in, such as Q4_1 or BF16."""
        ...

    def tensor(self, name: str) -> Tensor:
        """The tensor in the checkpoint's type (fp32 if it is quantised); may be a memory-mapped view, so do not write."""
        ...

    def read_into(self, name: str, out: Tensor) -> None:
        """Convert the tensor into `out` (same shape, any floating type), without an intermediate of its size."""
        ...

    def quantized(self, name: str) -> StoredWeight | None:
        """The matrix as stored, if it is of one of `kernels.quantized.KINDS`: rows in the order of the Hugging Face matrix
        (llama.cpp's permutation of q and k undone)."""
        ...

    def release(self) -> None:
        """Give back memory that reading took; what is asked for later is read again."""
        ...


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this config holds."""
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, config.hidden_size),
        FINAL_NORM: (config.hidden_size,),
    }
    if not config.tied_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    for layer in range(config.layers):
        shapes |= {layer_prefix(layer) + name: shape for name, shape in _layer_shapes(config)}
    return shapes


def _layer_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, q, kv, inner = config.hidden_size, config.q_size, config.kv_size, config.intermediate_size
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    if config.qk_norm:
        yield "self_attn.q_norm.weight", (config.head_dim,)
        yield "self_attn.k_norm.weight", (config.head_dim,)
    for name, rows, columns, biased in (
        ("self_attn.q_proj", q, hidden, config.qkv_bias),
        ("self_attn.k_proj", kv, hidden, config.qkv_bias),
        ("self_attn.v_proj", kv, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, q, config.o_bias),
        ("mlp.gate_proj", inner, hidden, config.mlp_bias),
        ("mlp.up_proj", inner, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, inner, config.mlp_bias),
    ):
        yield f"{name}.weight", (rows, columns)
        if biased:
            yield f"{name}.bias", (rows,)


def settle_head(source: WeightSource, config: ModelConfig, where: object) -> ModelConfig:
    """The config with `tied_embeddings` as the checkpoint has it: an output projection of its own that differs from the
    embedding table is used, whatever the config says, as in transformers. where: named in the warning."""
    if not config.tied_embeddings or not source.names() >= {EMBEDDING, HEAD} or _equal(source, EMBEDDING, HEAD):
        return config
    log.warning(
        "%s: config.json ties the output projection to the embedding (tie_word_embeddings), but the checkpoint's %s differs "
        "from %s; both are used as they are. Set tie_word_embeddings to false to silence this warning",
        where, HEAD, EMBEDDING,
    )  # fmt: skip
    return replace(config, tied_embeddings=False)


def _equal(source: WeightSource, one: str, other: str) -> bool:
    """Whether two tensors hold the same numbers; looks at some rows at a time, until they differ."""
    if source.shape(one) != source.shape(other):
        return False
    left, right = source.tensor(one), source.tensor(other)
    if left.dtype == right.dtype and left.data_ptr() == right.data_ptr():
        return True
    return all(torch.equal(a.float(), b.float()) for a, b in zip(left.split(_ROWS), right.split(_ROWS)))


def check_weights(source: WeightSource, config: ModelConfig) -> None:
    """Raise ModelError if tensors are missing, left over or of another shape than the config says.

    A tensor that nothing would read is an error too: a bias that is silently dropped makes a different model.
    """
    expected, found = expected_shapes(config), source.names()
    if missing := sorted(expected.keys() - found):
        hint = "; if its output projection is the embedding, config.json must say tie_word_embeddings: true"
        raise ModelError(
            f"the checkpoint lacks {_some(missing)}; is it complete, and does its config belong to it"
            f"{hint if missing == [HEAD] else ''}?"
        )
    if extra := sorted(name for name in found - expected.keys() if not _harmless(name)):
        raise ModelError(f"the checkpoint holds tensors that {config.architecture} has no use for: {_some(extra)}")
    for name, shape in expected.items():
        if source.shape(name) != shape:
            raise ModelError(f"tensor {name} has shape {source.shape(name)}; the config says {shape}")


def _harmless(name: str) -> bool:
    """Recomputed tables of old checkpoints, and the copy of a tied embedding table."""
    return name.endswith("rotary_emb.inv_freq") or name == HEAD


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
