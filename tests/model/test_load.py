"""Assembly: fused projections, shared embeddings, fingerprints, context limits, and what the caller hears of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvloom.engine.errors import ConfigError, ModelError
from kvloom.engine.model.load import load_model, open_checkpoint


def test_projections_are_fused_in_order(write_gguf, kernels) -> None:
    path = write_gguf("Q8_0")
    _, source, _ = open_checkpoint(path)
    layer = load_model(path, "fp32", kernels).decoder.layers[1]
    prefix = "model.layers.1."
    for made, parts in ((layer.qkv, [f"self_attn.{p}_proj" for p in "qkv"]), (layer.gate_up, ["mlp.gate_proj", "mlp.up_proj"])):
        assert torch.equal(made.weight, torch.cat([source.tensor(f"{prefix}{part}.weight") for part in parts]))


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_types(write_gguf, kernels, dtype, expected) -> None:
    """Matrices in the model's type; norm weights and tables in fp32."""
    decoder = load_model(write_gguf("Q4_1"), dtype, kernels).decoder
    layer = decoder.layers[0]
    x = torch.zeros(1, layer.qkv.in_features, dtype=expected)
    assert {decoder.embedding.weight.dtype, layer.qkv(x).dtype, decoder.dtype} == {expected}
    assert {layer.input_norm.dtype, decoder.final_norm.dtype, decoder.rotary.cos.dtype} == {torch.float32}


def test_tied_head_shares_the_embedding_table(write_gguf, kernels) -> None:
    decoder = load_model(write_gguf("F32"), "fp32", kernels).decoder
    assert decoder.head.weight.data_ptr() == decoder.embedding.weight.data_ptr()


def test_weights_do_not_depend_on_the_file_afterwards(write_gguf, kernels, run_logits) -> None:
    path = write_gguf("F32")
    decoder = load_model(path, "fp32", kernels).decoder
    before = run_logits(decoder, [1, 2, 3])
    data = bytearray(path.read_bytes())
    path.write_bytes(bytes(len(data)))
    assert torch.equal(run_logits(decoder, [1, 2, 3]), before)


def test_progress_counts_layers(write_gguf, kernels) -> None:
    seen: list[tuple[int, int]] = []
    load_model(write_gguf("F32"), "fp32", kernels, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_fingerprint_names_the_weights(write_gguf, kernels, tmp_path) -> None:
    path = write_gguf("F32")
    first = load_model(path, "fp32", kernels).fingerprint
    moved = tmp_path / "elsewhere.gguf"
    moved.write_bytes(path.read_bytes())
    assert load_model(moved, "bf16", kernels, max_model_len=8).fingerprint == first
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    moved.write_bytes(data)
    assert load_model(moved, "fp32", kernels).fingerprint != first


def test_context_limit(write_gguf, kernels) -> None:
    path = write_gguf("F32")
    loaded = load_model(path, "fp32", kernels, max_model_len=10)
    assert loaded.config.max_position == 10 and loaded.decoder.rotary.cos.shape == (10, 8)
    assert dataclasses.replace(loaded.config, max_position=64) == load_model(path, "fp32", kernels).config
    for wrong in (0, 65):
        with pytest.raises(ConfigError, match="this model allows 1 to 64"):
            load_model(path, "fp32", kernels, max_model_len=wrong)


def test_paths_that_hold_no_model(tmp_path, kernels) -> None:
    with pytest.raises(ModelError, match=r"does not exist; give a model folder or a \.gguf file"):
        load_model(tmp_path / "nothing", "fp32", kernels)
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        load_model(tmp_path, "fp32", kernels)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match="not a GGUF file"):
        load_model(tmp_path / "notes.txt", "fp32", kernels)
