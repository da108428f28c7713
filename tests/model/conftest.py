"""Helpers of the model tests: a runner over the reference kernels, tiny checkpoints, and GGUF files written from them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from torch import Tensor

from kvloom.engine.model.decoder import Decoder
from kvloom.engine.settings.folders import cache_folder
from kvloom.kernels import load
from kvloom.kernels.interface import Kernels, PagedKV, Rows
from kvloom.kernels.reference import ReferenceKernels

BLOCK = 4


@pytest.fixture(scope="session")
def native() -> Kernels:
    """This machine's native back end; skips where it cannot be had."""
    try:
        return load("native")
    except Exception as reason:
        pytest.skip(f"no native back end: {reason}")


class SequenceAttention:
    """`LayerAttention` of one sequence: a paged cache whose blocks lie in reverse order, filled chunk by chunk."""

    def __init__(self, decoder: Decoder, tokens: int) -> None:
        self.decoder, config, blocks = decoder, decoder.config, -(-tokens // BLOCK) + 1
        shape = (blocks, config.kv_heads, BLOCK, config.head_dim)
        self.caches = [
            PagedKV(torch.zeros(shape, dtype=decoder.dtype), torch.zeros(shape, dtype=decoder.dtype))
            for _ in range(config.layers)
        ]
        self.table = torch.arange(blocks - 1, -1, -1, dtype=torch.int32)

    def step(self, positions: Tensor) -> None:
        """Plan the rows at these positions."""
        config, rows = self.decoder.config, positions.shape[0]
        self.positions = positions
        self.slots = self.table[positions // BLOCK].long() * BLOCK + positions % BLOCK
        zeros = torch.zeros(rows, dtype=torch.int32)
        visible = Rows(self.table[None], zeros, zeros, (positions + 1).to(torch.int32))
        self.plan = self.decoder.kernels.plan(visible, config.q_heads, config.kv_heads, config.head_dim)

    def __call__(self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        decoder, config = self.decoder, self.decoder.config
        cos, sin, _ = decoder.rotary
        q = torch.empty(qkv.shape[0], config.q_heads, config.head_dim, dtype=decoder.dtype)
        cache, kernels = self.caches[layer], decoder.kernels
        kernels.rotate_store(qkv, cos, sin, self.positions, cache, self.slots, q, q_norm, k_norm, config.rms_eps)
        out = torch.empty_like(q)
        kernels.attend(q, cache, self.plan, scale=config.head_dim**-0.5, out=out)
        return out.view(qkv.shape[0], config.q_size)


RunLogits = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, and on a busy machine wait long for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def kernels() -> Kernels:
    return ReferenceKernels()


@pytest.fixture
def run_logits() -> RunLogits:
    """(decoder, tokens, chunks) -> logits [tokens, vocab]; chunks: rows per step, default all at once."""

    def run(decoder: Decoder, tokens: Sequence[int], chunks: Sequence[int] | None = None) -> Tensor:
        attention, parts, begin = SequenceAttention(decoder, len(tokens)), [], 0
        for size in chunks or [len(tokens)]:
            attention.step(torch.arange(begin, begin + size))
            hidden = decoder.forward(torch.tensor(tokens[begin : begin + size]), attention)
            parts.append(decoder.logits(hidden))
            begin += size
        return torch.cat(parts)

    return run


@pytest.fixture
def sequence_attention() -> type[SequenceAttention]:
    return SequenceAttention


TENSORS = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Write a GGUF of two layers with random weights; returns its path.

    kind: type of the matrices; keys: metadata of the architecture that replaces or (None) drops the default; tensors: more
    tensors, name -> fp32 array, or (raw bytes, kind) - they replace those of the same name.
    """

    def write(kind: str = "F32", arch: str = "llama", keys: dict | None = None, tensors: dict | None = None,
              hidden: int = 64, heads: int = 4, kv_heads: int = 2, inner: int = 96, vocab: int = 40) -> Path:  # fmt: skip
        path = tmp_path / f"{arch}-{kind}.gguf"
        writer, random = GGUFWriter(path, arch), np.random.default_rng(7)
        metadata = {
            "block_count": 2, "context_length": 64, "embedding_length": hidden, "feed_forward_length": inner,
            "attention.head_count": heads, "attention.head_count_kv": kv_heads, "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 5000.0, **(keys or {}),
        }  # fmt: skip
        for key, value in metadata.items():
            add = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}.get(type(value))
            if add is not None:
                add(f"{arch}.{key}", value)
        writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
        writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(vocab)])
        for name, data in _random_tensors(random, kind, hidden, heads, kv_heads, inner, vocab).items():
            if name not in (tensors or {}):
                _add(writer, name, data)
        for name, data in (tensors or {}).items():
            _add(writer, name, data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def _random_tensors(
    random: np.random.Generator, kind: str, hidden: int, heads: int, kv_heads: int, inner: int, vocab: int
) -> dict:
    dim = hidden // heads
    shapes = {"q": (heads * dim, hidden), "k": (kv_heads * dim, hidden), "v": (kv_heads * dim, hidden),
              "o": (hidden, heads * dim), "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}  # fmt: skip
    tensors: dict = {"token_embd.weight": _normal(random, vocab, hidden), "output_norm.weight": _norm(random, hidden)}
    for layer in range(2):
        tensors[f"blk.{layer}.attn_norm.weight"] = _norm(random, hidden)
        tensors[f"blk.{layer}.ffn_norm.weight"] = _norm(random, hidden)
        for part, shape in shapes.items():
            data = (_normal(random, *shape) * 0.2).astype(np.float32)
            raw = quantize(data, GGMLQuantizationType[kind]) if kind != "F32" else data
            tensors[f"blk.{layer}.{TENSORS[part]}.weight"] = raw if kind in ("F32", "F16") else (raw, kind)
    return tensors


def _add(writer: GGUFWriter, name: str, data: object) -> None:
    if isinstance(data, tuple):
        writer.add_tensor(name, data[0], raw_dtype=GGMLQuantizationType[data[1]])
    else:
        writer.add_tensor(name, data)


def _normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape, dtype=np.float32)


def _norm(random: np.random.Generator, size: int) -> np.ndarray:
    return (1 + 0.1 * random.standard_normal(size)).astype(np.float32)


@pytest.fixture(scope="session")
def read_with_transformers() -> Callable[[Path], torch.nn.Module]:
    """transformers' own reading of a GGUF file, as an fp32 model. Without `from_pretrained`, which wants accelerate."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    @mock.patch("gguf.GGUFReader", functools.cache(GGUFReader))  # seconds per reading of a real vocabulary
    def read(path: Path) -> torch.nn.Module:
        settings = load_gguf_checkpoint(str(path))["config"]
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
        tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32).eval()
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}
        model.tie_weights()
        return model

    return read


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The built-in model's file, where the cache has it."""
    path = cache_folder() / "models" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        pytest.skip(f"the model file is not in the cache ({path}); `make setup` puts it there")
    return path
