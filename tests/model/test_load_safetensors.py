"""Safetensors folders: whole, sharded, and everything that can be wrong with them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from kvloom.engine.errors import ModelError
from kvloom.engine.model.hf_config import config_from_hf
from kvloom.engine.model.load import fingerprint_of, load_model
from kvloom.engine.model.load_safetensors import SafetensorsWeights
from kvloom.engine.model.weights import expected_shapes

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 32,
}  # fmt: skip
INDEX = "model.safetensors.index.json"


def weights(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A complete checkpoint; changes replace, add or (None) drop tensors."""
    made = {name: torch.ones(shape) for name, shape in expected_shapes(config_from_hf(CONFIG)).items()}
    return {name: tensor for name, tensor in (made | changes).items() if tensor is not None}


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights(), tmp_path / "model.safetensors")
    return tmp_path


def shard(folder: Path, weight_map: object | None = None) -> None:
    """Split the checkpoint in two and write an index; weight_map replaces the true one."""
    names = sorted(weights())
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in parts.items():
        save_file({name: weights()[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    true = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"weight_map": true if weight_map is None else weight_map}))


def test_single_file(folder, kernels) -> None:
    source = SafetensorsWeights(folder)
    assert source.names() == frozenset(weights())
    assert source.shape("lm_head.weight") == (30, 16) and source.quantized("lm_head.weight") is None
    assert load_model(folder, "fp32", kernels).decoder.config.layers == 2


def test_shards(folder, kernels) -> None:
    shard(folder)
    assert SafetensorsWeights(folder).names() == frozenset(weights())
    assert [path.name for path in SafetensorsWeights(folder).files] == ["a.safetensors", "b.safetensors"]


def test_read_into_converts(folder) -> None:
    save_file(weights(**{"model.norm.weight": torch.full((16,), 1 / 3, dtype=torch.bfloat16)}), folder / "model.safetensors")
    source, out = SafetensorsWeights(folder), torch.empty(16)
    source.read_into("model.norm.weight", out)
    assert source.tensor("model.norm.weight").dtype == torch.bfloat16
    assert torch.equal(out, torch.full((16,), 1 / 3).bfloat16().float())


@pytest.mark.parametrize(("changes", "named"), [
    ({"model.layers.1.mlp.up_proj.weight": None}, "lacks model.layers.1.mlp.up_proj.weight"),
    ({"lm_head.weight": None}, "lacks lm_head.weight"),
    ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}, "no use for: model.layers.0.self_attn.q_proj.bias"),
    ({"model.layers.0.mlp.up_proj.weight": torch.ones(24, 15)}, r"shape \(24, 15\); the config says \(24, 16\)"),
    ({"model.norm.weight": torch.ones(16, dtype=torch.int8)}, "type I8"),
])  # fmt: skip
def test_tensors_that_do_not_fit(folder, kernels, changes, named) -> None:
    save_file(weights(**changes), folder / "model.safetensors")
    with pytest.raises(ModelError, match=named):
        load_model(folder, "fp32", kernels)


def test_many_missing_tensors_are_counted(folder, kernels) -> None:
    save_file({"model.norm.weight": torch.ones(16)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="and 17 more"):
        load_model(folder, "fp32", kernels)


def test_tables_of_old_checkpoints_are_ignored(folder, kernels) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(weights(**extra), folder / "model.safetensors")
    assert load_model(folder, "fp32", kernels).config.layers == 2


@pytest.mark.parametrize("keep", [0, 4, 7, 8, 100, -1])
def test_truncated_file(folder, kernels, keep) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated, damaged"):
        load_model(folder, "fp32", kernels)


def test_no_weights(folder, kernels) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds neither"):
        load_model(folder, "fp32", kernels)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"pickled weights \(pytorch_model.bin\)"):
        load_model(folder, "fp32", kernels)


@pytest.mark.parametrize(("weight_map", "named"), [
    ({"x": "../secret.safetensors"}, "secret"),
    ({"x": "/etc/passwd"}, "passwd"),
    ({"x": "sub/a.safetensors"}, "sub/a"),
    ({"x": "a.bin"}, "a.bin"),
    ({"x": 3}, "names 3"),
    ({"x": "gone.safetensors"}, "gone.safetensors, which is not there"),
    (["a.safetensors"], "not an index"),
    ({"x": ["a.safetensors"]}, "not an index"),
])  # fmt: skip
def test_index_that_leads_astray(folder, kernels, weight_map, named) -> None:
    (folder.parent / "secret.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    shard(folder, weight_map)
    with pytest.raises(ModelError, match=named):
        load_model(folder, "fp32", kernels)


@pytest.mark.parametrize("text", ["{", "[]", '{"metadata": {}}'])
def test_broken_index(folder, kernels, text) -> None:
    shard(folder)
    (folder / INDEX).write_text(text)
    with pytest.raises(ModelError, match="not an index"):
        load_model(folder, "fp32", kernels)


def test_a_tensor_in_two_shards(folder, kernels) -> None:
    shard(folder)
    save_file(weights(), folder / "a.safetensors")
    with pytest.raises(ModelError, match="another shard"):
        load_model(folder, "fp32", kernels)


# The output projection and the embedding ---------------------------------------------------------------------------------


def tied(folder: Path, **changes: torch.Tensor | None) -> None:
    """A checkpoint whose config ties, with random tables; changes replace, add or (None) drop tensors."""
    torch.manual_seed(3)
    embedding = torch.randn(30, 16)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": True}))
    tables = {"model.embed_tokens.weight": embedding, "lm_head.weight": None}
    save_file(weights(**(tables | changes)), folder / "model.safetensors", {"format": "pt"})


def equals_transformers(folder: Path, kernels, run_logits) -> bool:
    oracle = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = oracle(torch.tensor([[3, 1, 4, 1, 5]])).logits[0]
    found = run_logits(load_model(folder, "fp32", kernels).decoder, [3, 1, 4, 1, 5])
    return torch.allclose(found, expected, rtol=0, atol=1e-4)


def test_a_tied_config_with_a_head_of_its_own_is_untied(folder, kernels, run_logits, caplog) -> None:
    tied(folder, **{"lm_head.weight": torch.randn(30, 16)})
    with caplog.at_level(logging.WARNING, "kvloom.model"):
        loaded = load_model(folder, "fp32", kernels)
    assert not loaded.config.tied_embeddings
    assert str(folder) in caplog.text and "lm_head.weight differs" in caplog.text
    assert equals_transformers(folder, kernels, run_logits)
    assert fingerprint_of(folder) == loaded.fingerprint


@pytest.mark.parametrize("kind", [None, torch.float32, torch.bfloat16])
def test_a_tied_config_with_a_copy_or_without_a_head_stays_tied(folder, kernels, run_logits, caplog, kind) -> None:
    tied(folder)
    if kind is not None:
        copy = safe_open(folder / "model.safetensors", "pt").get_tensor("model.embed_tokens.weight").bfloat16()
        tied(folder, **{"model.embed_tokens.weight": copy, "lm_head.weight": copy.to(kind, copy=True)})
    with caplog.at_level(logging.WARNING, "kvloom.model"):
        loaded = load_model(folder, "fp32", kernels)
    assert loaded.config.tied_embeddings and not caplog.text
    assert loaded.decoder.head.weight.data_ptr() == loaded.decoder.embedding.weight.data_ptr()
    assert equals_transformers(folder, kernels, run_logits)


def test_heads_that_cannot_be(folder, kernels) -> None:
    tied(folder, **{"lm_head.weight": torch.randn(31, 16)})
    with pytest.raises(ModelError, match=r"lm_head.weight has shape \(31, 16\); the config says \(30, 16\)"):
        load_model(folder, "fp32", kernels)
    save_file(weights(**{"lm_head.weight": None}), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ModelError, match=rf"{folder}: .*lacks lm_head.weight.*tie_word_embeddings: true"):
        load_model(folder, "fp32", kernels)
