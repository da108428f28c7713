"""Dense projections and what they are made from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize

from kvloom.engine.errors import ConfigError
from kvloom.engine.model.dequantize import dequantize
from kvloom.engine.model.linear import DenseLinear, LinearWeight, PackedLinear, make_embedding, make_linear
from kvloom.engine.model.load_gguf import GGUFWeights
from kvloom.engine.model.quantized import (
    DenseEmbedding,
    PackedEmbedding,
    QuantizedLinear,
    StackedLinear,
    dense,
    round_to_int4,
    round_to_int8,
)
from kvloom.engine.model.weights import EMBEDDING
from kvloom.kernels.quantized import KINDS
from kvloom.kernels.reference import ReferenceKernels
from tests.kernels.stored import random_stored

QKV = tuple(f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkv")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense(bias, dtype) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(6, 4, dtype=dtype), torch.randn(3, 4, dtype=dtype)
    b = torch.randn(6, dtype=dtype) if bias else None
    layer = DenseLinear(weight, b)
    expected = (x.double() @ weight.double().T + (b.double() if b is not None else 0)).float()
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert (layer.in_features, layer.out_features) == (4, 6)
    torch.testing.assert_close(layer(x).float(), expected, rtol=0, atol=tolerance)
    out, wide = torch.empty(3, 6, dtype=dtype), torch.empty(3, 6)
    assert layer(x, out) is out and torch.equal(out, layer(x))
    assert layer(x, wide) is wide and torch.equal(wide, layer(x).float())


def test_nothing_is_read_before_it_is_asked_for(write_gguf) -> None:
    source, read = GGUFWeights(write_gguf("Q4_0")), []
    original = source.read_into
    source.read_into = lambda name, out: (read.append(name), original(name, out))
    weight = LinearWeight(source, QKV)
    assert weight.shape == (64 + 32 + 32, 64) and weight.rows == (64, 32, 32) and not read
    assert weight.stored() is not None and not read
    weight.dense(torch.float32)
    assert read == list(QKV)


def test_quantized_parts_are_stacked(write_gguf) -> None:
    weight = LinearWeight(GGUFWeights(write_gguf("Q4_1")), QKV)
    rows = weight.stored()
    assert rows is not None and rows.shape == weight.shape and rows.kind == "Q4_1"
    values = dequantize(rows.blocks, GGMLQuantizationType.Q4_1, torch.empty(rows.shape))
    assert torch.equal(values, weight.dense(torch.float32))


@pytest.fixture
def mixed(write_gguf) -> GGUFWeights:
    """q and k in Q4_1, v in Q8_0, as files called Q4_K_M mix their kinds."""
    values = quantize(np.random.default_rng(1).standard_normal((32, 64), np.float32), GGMLQuantizationType.Q8_0)
    return GGUFWeights(write_gguf("Q4_1", tensors={"blk.0.attn_v.weight": (values, "Q8_0")}))


def test_mixed_kinds_are_stored_run_by_run(mixed: GGUFWeights) -> None:
    weight = LinearWeight(mixed, QKV)
    assert weight.stored() is None and weight.kind() is None
    assert [(run.names, run.kind()) for run in weight.runs()] == [(QKV[:2], "Q4_1"), (QKV[2:], "Q8_0")]


@pytest.mark.parametrize("permuted", [False, True])
def test_mixed_kinds_stay_the_files_codes(mixed: GGUFWeights, native, permuted: bool) -> None:
    """Also with rows in another order, as long as each run keeps its own."""
    rows = (
        torch.cat([torch.arange(64).flip(0), 64 + torch.arange(32).roll(5), 96 + torch.arange(32).flip(0)])
        if permuted
        else None
    )
    weight, bias = LinearWeight(mixed, QKV, rows=rows), torch.linspace(-3, 3, 128).bfloat16()
    made = make_linear(weight, bias, "auto", torch.bfloat16, native)
    assert isinstance(made, StackedLinear) and [part.form for part in made.parts] == ["int4", "int8"]
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    wanted = x.float() @ weight.dense(torch.float32).T + bias.float()
    assert made(x).shape == (5, 128)
    assert (made(x, torch.empty(5, 128)) - wanted).norm() / wanted.norm() < 0.01


def test_rows_that_leave_their_run_are_rounded(mixed: GGUFWeights, native) -> None:
    weight = LinearWeight(mixed, QKV, rows=torch.arange(128).flip(0))
    made = make_linear(weight, None, "auto", torch.bfloat16, native)
    assert isinstance(made, QuantizedLinear) and made.form == "int8"


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_embedding_of_the_files_codes_is_the_dense_one(write_gguf, native, kind: str) -> None:
    stored = random_stored(kind, 40, 256)
    source = GGUFWeights(write_gguf("F32", hidden=256, tensors={"token_embd.weight": (stored.blocks.numpy(), kind)}))
    weight = LinearWeight(source, (EMBEDDING,))
    made = make_embedding(weight, "auto", torch.bfloat16, native)
    plain = make_embedding(weight, "bf16", torch.bfloat16, native)
    assert isinstance(made, PackedEmbedding) and isinstance(plain, DenseEmbedding)
    tokens, outs = torch.tensor([3, 39, 0, 3]), [torch.empty(4, 256, dtype=torch.bfloat16) for _ in range(2)]
    assert torch.equal(made(tokens, outs[0]), plain(tokens, outs[1]))


def test_plain_mode_is_dense(write_gguf) -> None:
    weight = LinearWeight(GGUFWeights(write_gguf("Q4_1")), QKV[:1])
    made = make_linear(weight, None, "bf16", torch.bfloat16, ReferenceKernels())
    assert torch.equal(made(torch.eye(64, dtype=torch.bfloat16)).T, weight.dense(torch.bfloat16))


def test_packed_weights_agree_with_plain_ones() -> None:
    if not PackedLinear.works():
        pytest.skip("this build of torch does not pack bf16 on this processor")
    weight, bias = torch.randn(96, 64, dtype=torch.bfloat16), torch.randn(96, dtype=torch.bfloat16)
    for rows in (1, 3, 40):
        x = torch.randn(rows, 64, dtype=torch.bfloat16)
        wanted = DenseLinear(weight, bias)(x).float()
        packed = PackedLinear(weight, bias)
        assert torch.allclose(packed(x).float(), wanted, atol=0.1, rtol=0.02)
        logits = torch.empty(rows, 96)
        assert torch.equal(packed(x, logits), packed(x).float())


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_stored_codes_are_read_exactly(write_gguf, kind: str) -> None:
    weight = LinearWeight(GGUFWeights(write_gguf(kind)), QKV)
    rows = weight.stored()
    assert rows is not None
    assert torch.equal(dense(rows), weight.dense(torch.float32))


@pytest.mark.parametrize(("round_", "bits"), [(round_to_int8, 8), (round_to_int4, 4)])
def test_groups_of_equal_values_are_kept(round_, bits: int) -> None:
    weight = torch.randn(8, 96)
    weight[3], weight[4] = 0.25, 0.0
    made = round_(weight)
    assert KINDS[made.kind].bits == bits
    assert ((dense(made) - weight)[3].abs() <= 2e-3 * 0.25).all() and torch.equal(dense(made)[4], weight[4])


@pytest.mark.parametrize(
    ("kind", "mode", "sensitive", "bits"),
    [("Q4_1", "auto", False, 4), ("Q8_0", "auto", False, 8), ("F16", "auto", False, 8), ("Q4_1", "int4", False, 4),
     ("Q8_0", "int4", False, 4), ("Q8_0", "int4", True, 8), ("F16", "int4", False, 4), ("F16", "int8", True, 8),
     ("Q4_1", "int8", False, 4), ("Q5_0", "auto", False, 5), ("Q5_1", "int8", False, 5), ("Q5_0", "int4", False, 4)],
)  # fmt: skip
def test_modes_choose_codes(write_gguf, native, kind: str, mode: str, sensitive: bool, bits: int) -> None:
    weight = LinearWeight(GGUFWeights(write_gguf(kind)), QKV, sensitive=sensitive)
    made = make_linear(weight, None, mode, torch.bfloat16, native)
    assert isinstance(made, QuantizedLinear)
    per_weight = 8 * made.nbytes / (made.in_features * made.out_features)
    assert bits < per_weight < bits + 1.5
    x = torch.randn(5, made.in_features, dtype=torch.bfloat16)
    wanted = x.float() @ weight.dense(torch.float32).T
    error = (made(x, torch.empty(5, made.out_features)) - wanted).norm() / wanted.norm()
    assert error < (0.15 if bits == 4 and kind != "Q4_1" else 0.02)


def test_exact_modes_stay_exact(write_gguf, native) -> None:
    weight = LinearWeight(GGUFWeights(write_gguf("Q4_1")), QKV)
    assert isinstance(make_linear(weight, None, "auto", torch.float32, native), DenseLinear)
    with pytest.raises(ConfigError, match="native"):
        make_linear(weight, None, "int8", torch.bfloat16, ReferenceKernels())
