"""Engines for the fuzzer, over one random Llama of two layers on disk, whose steps take well under a millisecond.

Every order, small steps and large ones, small caches, every default that a server may have.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvloom.engine import LLM
from kvloom.engine.calibration import RazorCalibration, save_razor, store
from kvloom.kernels import load

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, LONGEST = 2, 32, 4, 2, 8, 48, 160
END = "<|end|>"


def write_model(folder: Path) -> None:
    """Write config, weights and tokenizer into a folder."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END: 0, **{byte: i + 1 for i, byte in enumerate(bytes_)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(vocabulary), "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM, "max_position_embeddings": LONGEST, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "eos_token_id": 0, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_weights(len(vocabulary)), str(folder / "model.safetensors"))


def _weights(vocab: int) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, HIDDEN), "lm_head.weight": (vocab, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        shapes |= {
            at + "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            at + "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            at + "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            at + "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            at + "mlp.gate_proj.weight": (INNER, HIDDEN),
            at + "mlp.up_proj.weight": (INNER, HIDDEN),
            at + "mlp.down_proj.weight": (HIDDEN, INNER),
        }
    weights = {name: torch.randn(shape, generator=source) * 0.2 for name, shape in shapes.items()}
    norms = [f"model.layers.{i}.{part}_layernorm.weight" for i in range(LAYERS) for part in ("input", "post_attention")]
    return weights | {name: torch.ones(HIDDEN) for name in (*norms, "model.norm.weight")}


_SHARE = (
    '{"verified": true, "min_match": 32, "min_reusable": 48, "min_gain": -1, "shadow_share": 0.3, "reject_above": %s, '
    '"shadow_kl": 1000, "shadow_top1": 0}'
)

SETTINGS: tuple[dict[str, Any], ...] = (
    {"scheduler": "cache_aware", "block_size": 4, "kv_memory": 48 * 1024, "max_batched_tokens": 64, "max_num_seqs": 16,
     "step_time_ms": 1},
    {"scheduler": "priority", "block_size": 16, "kv_memory": 192 * 1024, "max_batched_tokens": 256, "max_num_seqs": 32},
    {"scheduler": "fcfs", "block_size": 1, "kv_memory": 44 * 1024, "max_batched_tokens": 8, "max_num_seqs": 24},
    {"scheduler": "cache_aware", "reuse": "approx", "block_size": 8, "kv_memory": 64 * 1024, "max_batched_tokens": 32,
     "step_time_ms": 0},
    {"scheduler": "fcfs", "retention": "razor", "kv_memory": 192 * 1024, "block_size": 4, "max_num_seqs": 8,
     "retention_options": '{"induction_share": 0.3, "echo_share": 0.1, "min_window": 8}'},
    {"scheduler": "fcfs", "selection": "recycled", "budget": 16, "selection_options": '{"stride": 3}', "draft": True,
     "draft_tokens": 16, "kv_memory": 44 * 1024, "block_size": 4, "max_batched_tokens": 8, "max_num_seqs": 4},
    {"scheduler": "priority", "selection": "token_select", "budget": 16, "kv_memory": 48 * 1024, "block_size": 2,
     "selection_options": '{"prefill_budget": 24, "chunk": 16}', "max_batched_tokens": 48, "max_num_seqs": 16},
    {"scheduler": "fcfs", "reuse": "off", "block_size": 32, "kv_memory": 96 * 1024, "max_batched_tokens": 1, "max_num_seqs": 4},
)  # fmt: skip
"""Settings of `EngineConfig` by name."""


@functools.cache
def _multiplies_codes() -> bool:
    """Whether the native back end can be had here."""
    return load().quantized is not None


def complete(number: int) -> dict[str, Any]:
    """The settings of one engine, ready for `LLM`."""
    found = {"dtype": "fp32", "segment_memory": 64 * 1024, "threads": 1, **SETTINGS[number % len(SETTINGS)]}
    if (number + number // len(SETTINGS)) % 2 and _multiplies_codes():
        found["weights"] = "int8"  # whose steps are captured
    if "retention" not in found:
        found["kvshare_options"] = _SHARE % (0 if number % 3 == 1 else 10)  # which rejects everything, or next to nothing
    return found


TENANTS = "tenants:\n  alice: {group: g}\n  bob: {group: g, weight: 3}\n  press: {publishes: true}\ndefault: {group: g}\n"


@contextmanager
def stage(folder: Path) -> Iterator[None]:
    """The model in a folder, and a made-up calibration of its heads that is found only inside."""
    write_model(folder)
    (folder / "tenants.yaml").write_text(TENANTS)
    with patch.object(store, "own_folder", lambda: folder / "calibrations"):
        key = engine(folder, 0).core.runner.geometry.model_key
        scores = tuple(tuple(float(layer == head) for head in range(KV_HEADS)) for layer in range(LAYERS))
        save_razor(RazorCalibration(model_key=key, model="fuzz", induction=scores, echo=scores))
        yield


def engine(folder: Path, number: int) -> LLM:
    """One of them, by its settings. Call inside `stage`."""
    return LLM(str(folder), device="cpu", tenants=str(folder / "tenants.yaml"), **complete(number))
