"""Logits of every supported architecture equal those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvloom.engine.model.load import LoadedModel, load_model

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 24}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", {"head_dim": 20}),
    "llama-no-gqa": ("Llama", {"num_key_value_heads": 6}),
    "llama-one-kv-head": ("Llama", {"num_key_value_heads": 1}),
    "llama-llama3": ("Llama", {"head_dim": 16, "rope_parameters": LLAMA3}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}}),
    "mistral": ("Mistral", {"sliding_window": None, "num_key_value_heads": 3}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen2-yarn-mscale": ("Qwen2", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False}}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "qwen3-biases": ("Qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
}
TOKENS = [(7 * i * i + 3 * i) % 61 for i in range(45)]


@pytest.fixture(params=CASES, scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A saved random model and transformers' logits for TOKENS."""
    family, changes = CASES[request.param]
    config = getattr(transformers, f"{family}Config")(**(SIZES | changes))
    torch.manual_seed(11)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith((".bias", "norm.weight")):  # transformers starts them at 0 and 1, which would hide a mistake
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    with torch.no_grad():
        return folder, model(torch.tensor([TOKENS])).logits[0]


def test_equal_transformers(checkpoint, kernels, run_logits) -> None:
    folder, expected = checkpoint
    decoder = load_model(folder, "fp32", kernels).decoder
    torch.testing.assert_close(run_logits(decoder, TOKENS), expected, rtol=0, atol=1e-4)


def test_equal_in_two_chunks(checkpoint, kernels, run_logits) -> None:
    folder, expected = checkpoint
    decoder = load_model(folder, "fp32", kernels).decoder
    torch.testing.assert_close(run_logits(decoder, TOKENS, [19, 26]), expected, rtol=0, atol=1e-4)


def test_low_precision_stays_close(checkpoint, kernels, run_logits) -> None:
    """bf16 weights and activations with an fp32 residual stream: a few roundings away from fp32, not more."""
    folder, expected = checkpoint
    loaded: LoadedModel = load_model(folder, "bf16", kernels)
    logits = run_logits(loaded.decoder, TOKENS)
    assert logits.dtype == torch.float32
    assert (logits - expected).norm() < 0.05 * expected.norm()


def test_sharded_checkpoint(tmp_path, kernels, run_logits) -> None:
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0]
    decoder = load_model(tmp_path, "fp32", kernels).decoder
    torch.testing.assert_close(run_logits(decoder, TOKENS), expected, rtol=0, atol=1e-4)
