"""GGUF formats that no kernel multiplies: loaded by decoding, said in the log, rounded to 8 bits by weights auto."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as oracle

from kvloom.engine.model.linear import DenseLinear, LinearWeight, make_linear
from kvloom.engine.model.load_gguf import GGUFWeights
from kvloom.engine.model.quantized import QuantizedLinear
from kvloom.kernels.reference import ReferenceKernels

HALF = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
SCALES = {"Q2_K": {80: HALF, 82: HALF}, "Q3_K": {108: HALF}, "IQ4_NL": {0: HALF}, "MXFP4": {0: np.array([120], np.uint8)},
          "IQ4_XS": {0: HALF}, "IQ3_S": {0: HALF}, "TQ2_0": {64: HALF}}  # fmt: skip
"""Where in a block the scales are, and bytes that make them small: any other bytes are codes, whatever they are."""


def blocks(kind: str, rows: int, columns: int) -> np.ndarray:
    """Random codes under sensible scales: [rows, bytes] uint8."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    raw = np.random.default_rng(5).integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    for at, scale in SCALES[kind].items():
        raw[..., at : at + len(scale)] = scale
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", SCALES)
def test_they_are_decoded_and_the_log_says_so(
    write_gguf: Callable[..., Path], caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    caplog.set_level(logging.INFO)
    raw = blocks(kind, 512, 256)
    path = write_gguf("F16", hidden=256, inner=512, tensors={"blk.0.ffn_gate.weight": (raw, kind)})
    source = GGUFWeights(path)
    name = "model.layers.0.mlp.gate_proj.weight"
    wanted = torch.from_numpy(oracle(raw, GGMLQuantizationType[kind]).reshape(512, 256))
    assert torch.isfinite(wanted).all() and wanted.std() > 1e-3
    assert torch.equal(source.tensor(name), wanted) and source.quantized(name) is None
    assert f"{kind} are decoded when loaded" in caplog.text
    dense = make_linear(LinearWeight(source, (name,)), None, "bf16", torch.float32, ReferenceKernels())
    assert isinstance(dense, DenseLinear) and torch.equal(dense.weight, wanted)


def test_auto_rounds_them_to_eight_bits(write_gguf: Callable[..., Path], native: Any) -> None:
    path = write_gguf("F16", hidden=256, inner=512, tensors={"blk.0.ffn_gate.weight": (blocks("Q3_K", 512, 256), "Q3_K")})
    weight = LinearWeight(GGUFWeights(path), ("model.layers.0.mlp.gate_proj.weight",))
    made = make_linear(weight, None, "auto", torch.bfloat16, native)
    assert isinstance(made, QuantizedLinear) and 8 < 8 * made.nbytes / (512 * 256) < 9
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    wanted = x.float() @ weight.dense(torch.float32).T
    assert (made(x, torch.empty(3, 512)) - wanted).norm() < 0.01 * wanted.norm()


def test_ordinary_files_say_nothing(write_gguf: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    GGUFWeights(write_gguf("Q8_0"))
    assert "decoded" not in caplog.text
