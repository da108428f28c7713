"""GGUF models: every type of matrix, the order of q and k rows, and what the metadata must say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as oracle

from kvloom.engine.errors import ModelError
from kvloom.engine.model.dequantize import dequantize
from kvloom.engine.model.load import load_model
from kvloom.engine.model.load_gguf import GGUFWeights
from kvloom.engine.model.quantized import dense
from kvloom.engine.model.weights import check_weights, expected_shapes

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]
LAYER = "model.layers.1."


def stored(path, name: str) -> np.ndarray:
    """A tensor's values by the gguf package's decoder, in the file's row order."""
    source = GGUFWeights(path)._file
    tensor = source.tensors[name]
    return oracle(source.bytes_of(tensor), tensor.kind).reshape(tensor.shape)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Inverse of convert_hf_to_gguf.py's permutation, on [rows, columns]."""
    dim = rows.shape[0] // heads
    return rows.reshape(heads, dim // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_tensors_of_every_type(write_gguf, kind) -> None:
    path = write_gguf(kind)
    source = GGUFWeights(path)
    check_weights(source, source.config)
    for name, ours, heads in (("attn_q", "self_attn.q_proj", 4), ("attn_k", "self_attn.k_proj", 2),
                              ("attn_v", "self_attn.v_proj", None), ("ffn_down", "mlp.down_proj", None)):  # fmt: skip
        expected = stored(path, f"blk.1.{name}.weight")
        expected = unpermute(expected, heads) if heads else expected
        assert np.array_equal(source.tensor(f"{LAYER}{ours}.weight").numpy(), expected), name


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_quants(write_gguf, kind) -> None:
    """The gguf package cannot write K-quants, so their blocks are random bytes with a sane scale."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    raw = np.random.default_rng(3).integers(0, 256, (256, 256 // block * size), dtype=np.uint8)
    scales = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]
    for at in scales:
        raw[:, at : at + 2] = np.full((256, 1), 0.01, dtype=np.float16).view(np.uint8)
    path = write_gguf("F32", hidden=256, heads=4, kv_heads=4, tensors={"blk.1.attn_q.weight": (raw, kind)})
    source, name = GGUFWeights(path), LAYER + "self_attn.q_proj.weight"
    expected = unpermute(oracle(raw, GGMLQuantizationType[kind]).reshape(256, 256), 4)
    assert np.array_equal(source.tensor(name).numpy(), expected)
    rows = source.quantized(name)
    assert rows is not None and rows.kind == kind and np.array_equal(dense(rows).numpy(), expected)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_rows_are_in_hugging_face_order(write_gguf, kind) -> None:
    source = GGUFWeights(write_gguf(kind))
    for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj"):
        name = f"{LAYER}{part}.weight"
        rows = source.quantized(name)
        assert rows is not None and rows.kind == kind and rows.shape == source.shape(name)
        assert rows.blocks.dtype == torch.uint8 and rows.blocks.shape[0] == rows.shape[0]
        values = dequantize(rows.blocks, GGMLQuantizationType[kind], torch.empty(rows.shape))
        assert torch.equal(values, source.tensor(name))


def test_other_types_have_no_quantized_rows(write_gguf) -> None:
    source = GGUFWeights(write_gguf("F16"))
    assert source.quantized(LAYER + "self_attn.q_proj.weight") is None
    assert source.quantized(LAYER + "input_layernorm.weight") is None


def test_rows_of_other_architectures_are_not_permuted(write_gguf) -> None:
    biases = {
        f"blk.{i}.attn_{p}.bias": np.arange(n, dtype=np.float32) for i in (0, 1) for p, n in (("q", 64), ("k", 32), ("v", 32))
    }
    path = write_gguf("Q8_0", arch="qwen2", tensors=biases)
    source = GGUFWeights(path)
    assert source.config.qkv_bias and source.config.architecture == "Qwen2ForCausalLM"
    assert np.array_equal(source.tensor(LAYER + "self_attn.q_proj.weight").numpy(), stored(path, "blk.1.attn_q.weight"))
    assert torch.equal(source.tensor(LAYER + "self_attn.k_proj.bias"), torch.arange(32.0))


def test_biases_of_llama_are_permuted_as_their_rows(write_gguf) -> None:
    biases = {
        f"blk.{i}.attn_{p}.bias": np.arange(n, dtype=np.float32) for i in (0, 1) for p, n in (("q", 64), ("k", 32), ("v", 32))
    }
    source = GGUFWeights(write_gguf("F32", tensors=biases))
    expected = unpermute(np.arange(64, dtype=np.float32)[:, None], 4)[:, 0]
    assert np.array_equal(source.tensor(LAYER + "self_attn.q_proj.bias").numpy(), expected)
    assert torch.equal(source.tensor(LAYER + "self_attn.v_proj.bias"), torch.arange(32.0))


@pytest.mark.parametrize(("arch", "kind"), [("llama", "Q8_0"), ("llama", "F16"), ("qwen2", "Q4_0")])
def test_logits_equal_transformers_reading_the_same_file(
    write_gguf, arch, kind, kernels, run_logits, read_with_transformers
) -> None:
    biases = {
        f"blk.{i}.attn_{p}.bias": np.full(n, 0.5, np.float32) for i in (0, 1) for p, n in (("q", 64), ("k", 32), ("v", 32))
    }
    keys = {"vocab_size": 40, "rope.dimension_count": 16}
    path = write_gguf(kind, arch=arch, keys=keys, tensors=biases if arch == "qwen2" else None)
    with torch.no_grad():
        expected = read_with_transformers(path)(torch.tensor([TOKENS])).logits[0]
    found = run_logits(load_model(path, "fp32", kernels).decoder, TOKENS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_config(write_gguf) -> None:
    config = GGUFWeights(write_gguf("Q4_1", keys={"attention.sliding_window": 48})).config
    assert (config.layers, config.hidden_size, config.q_heads, config.kv_heads, config.head_dim) == (2, 64, 4, 2, 16)
    assert (config.vocab_size, config.intermediate_size, config.rms_eps) == (40, 96, pytest.approx(1e-5))
    assert (config.rope.theta, config.tied_embeddings, config.eos_token_ids) == (5000.0, True, (2,))
    assert (config.dtype, config.max_position, config.sliding_window) == ("Q4_1", 48, 48)


def test_untied_head_and_head_size(write_gguf, kernels, run_logits) -> None:
    """A head of its own, and heads wider than hidden / heads (qwen3 with QK norm)."""
    random = np.random.default_rng(1)
    wide = {f"blk.{i}.attn_{p}.weight": random.standard_normal(s, dtype=np.float32) for i in (0, 1)
            for p, s in (("q", (96, 64)), ("k", (48, 64)), ("v", (48, 64)), ("output", (64, 96)))}  # fmt: skip
    norms = {f"blk.{i}.attn_{p}_norm.weight": np.full(24, 1.5, np.float32) for i in (0, 1) for p in "qk"}
    head = {"output.weight": random.standard_normal((40, 64), dtype=np.float32)}
    path = write_gguf("F32", arch="qwen3", keys={"attention.key_length": 24, "attention.value_length": 24},
                      tensors=wide | norms | head)  # fmt: skip
    loaded = load_model(path, "fp32", kernels)
    assert (loaded.config.head_dim, loaded.config.qk_norm, loaded.config.tied_embeddings) == (24, True, False)
    assert run_logits(loaded.decoder, TOKENS).isfinite().all()
    assert torch.equal(loaded.decoder.head.weight, torch.from_numpy(head["output.weight"]))


def test_rope_freqs_and_yarn(write_gguf) -> None:
    divisors = np.linspace(1, 8, 8, dtype=np.float32)
    rope = GGUFWeights(write_gguf("F32", tensors={"rope_freqs.weight": divisors})).config.rope
    assert rope.divisors == tuple(divisors.tolist())
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
    rope = GGUFWeights(write_gguf("F32", keys=yarn)).config.rope
    assert (rope.kind, rope.factor, rope.original_max_position) == ("yarn", 4.0, 16)
    assert rope.attention_factor == pytest.approx(1 + 0.1 * np.log(4))
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    assert GGUFWeights(write_gguf("F32", keys=linear)).config.rope.kind == "linear"


@pytest.mark.parametrize(("change", "named"), [
    ({"arch": "gemma2"}, "gemma2"),
    ({"keys": {"expert_count": 8}}, "expert_count"),
    ({"keys": {"final_logit_softcapping": 30.0}}, "final_logit_softcapping"),
    ({"keys": {"rope.dimension_count": 8}}, "partial rotary"),
    ({"keys": {"rope.scaling.type": "longrope"}}, "longrope"),
    ({"keys": {"attention.key_length": 16, "attention.value_length": 8}}, "different size"),
    ({"keys": {"block_count": None}}, "block_count"),
    ({"keys": {"block_count": "two"}}, "block_count"),
    ({"keys": {"block_count": 4_000_000_000}}, "layers is 4000000000"),
    ({"keys": {"rope.freq_base": float("nan")}}, "finite"),
    ({"keys": {"block_count": 3}}, "lacks model.layers.2"),
    ({"keys": {"block_count": 1}}, "no use for: model.layers.1"),
    ({"keys": {"embedding_length": 32}}, "has shape"),
    ({"tensors": {"blk.0.ffn_gate_exps.weight": np.zeros((2, 2), np.float32)}}, "blk.0.ffn_gate_exps"),
    ({"tensors": {"rope_freqs.weight": np.ones(3, np.float32)}}, "rope_freqs"),
    ({"tensors": {"blk.0.attn_v.weight": np.zeros((32, 64), np.float64)}}, "F64"),
])  # fmt: skip
def test_refused_by_name(write_gguf, kernels, change, named) -> None:
    with pytest.raises(ModelError, match=named):
        load_model(write_gguf("F32", **change), "fp32", kernels)


def test_unsupported_quantisation_is_named(write_gguf, kernels) -> None:
    with pytest.raises(ModelError, match="I8; supported: F32"):
        load_model(write_gguf("F32", tensors={"blk.0.attn_v.weight": np.zeros((32, 64), np.int8)}), "fp32", kernels)


def test_expected_shapes_are_those_of_the_file(write_gguf) -> None:
    source = GGUFWeights(write_gguf("Q8_0"))
    assert expected_shapes(source.config) == {name: source.shape(name) for name in source.names()}
