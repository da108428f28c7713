"""Dense projections and what they are made from."""

from __future__ import annotations

import pytest
import torch
from gguf.constants import GGMLQuantizationType

from kvloom.engine.errors import ConfigError
from kvloom.engine.model.dequantize import dequantize
from kvloom.engine.model.linear import DenseLinear, LinearWeight, PackedLinear, make_linear
from kvloom.engine.model.load_gguf import GGUFWeights
from kvloom.engine.model.quantized import QuantizedLinear, round_to_int4, round_to_int8, unpack
from kvloom.kernels.reference import ReferenceKernels

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
    assert weight.quantized() is not None and not read
    weight.dense(torch.float32)
    assert read == list(QKV)


def test_quantized_parts_are_stacked(write_gguf) -> None:
    weight = LinearWeight(GGUFWeights(write_gguf("Q4_1")), QKV)
    rows = weight.quantized()
    assert rows is not None and rows.shape == weight.shape and rows.kind == "Q4_1"
    values = dequantize(rows.blocks, GGMLQuantizationType.Q4_1, torch.empty(rows.shape))
    assert torch.equal(values, weight.dense(torch.float32))


def test_mixed_kinds_have_no_quantized_form(write_gguf) -> None:
    import numpy as np
    from gguf.quants import quantize

    other = (quantize(np.ones((32, 64), np.float32), GGMLQuantizationType.Q8_0), "Q8_0")
    source = GGUFWeights(write_gguf("Q4_1", tensors={"blk.0.attn_v.weight": other}))
    assert LinearWeight(source, QKV).quantized() is None
    assert LinearWeight(source, QKV[:2]).quantized() is not None


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


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_stored_codes_are_unpacked_exactly(write_gguf, kind: str) -> None:
    weight = LinearWeight(GGUFWeights(write_gguf(kind)), QKV)
    rows = weight.quantized()
    assert rows is not None
    assert torch.equal(unpack(rows).dense(), weight.dense(torch.float32))


@pytest.mark.parametrize(("round_", "bits"), [(round_to_int8, 8), (round_to_int4, 4)])
def test_rounding_is_to_nearest(round_, bits: int) -> None:
    weight = torch.randn(8, 96)
    weight[3] = 0.25  # a group of equal values
    codes = round_(weight)
    assert codes.bits == bits
    steps = codes.scales.repeat_interleave(32, 1)
    assert ((codes.dense() - weight).abs() <= steps * 0.51 + 2e-3 * weight.abs()).all()


@pytest.mark.parametrize(
    ("kind", "mode", "sensitive", "bits"),
    [("Q4_1", "auto", False, 4), ("Q8_0", "auto", False, 8), ("F16", "auto", False, 8), ("Q4_1", "int4", False, 4),
     ("Q8_0", "int4", False, 4), ("Q8_0", "int4", True, 8), ("F16", "int4", False, 4), ("F16", "int8", True, 8),
     ("Q4_1", "int8", False, 4)],
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
