"""Dense projections and what they are made from."""

from __future__ import annotations

import pytest
import torch
from gguf.constants import GGMLQuantizationType

from kvloom.engine.model.dequantize import dequantize
from kvloom.engine.model.linear import DenseLinear, LinearWeight, make_linear
from kvloom.engine.model.load_gguf import GGUFWeights

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
    made = make_linear(weight, None, "bf16", torch.bfloat16)
    assert torch.equal(made(torch.eye(64, dtype=torch.bfloat16)).T, weight.dense(torch.bfloat16))
