"""Block formats, bit for bit against the gguf package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as oracle

from kvloom.engine.model import dequantize as module
from kvloom.engine.model.dequantize import SUPPORTED, dequantize

COLUMNS = 512


def random_rows(kind: GGMLQuantizationType, rows: int) -> np.ndarray:
    """Random bytes: every value a block can hold, scales that are no number included."""
    block, size = GGML_QUANT_SIZES[kind]
    return np.random.default_rng(kind).integers(0, 256, (rows, COLUMNS // block * size), dtype=np.uint8)


@pytest.mark.parametrize("kind", SUPPORTED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("slice_size", [1, 1 << 11, 1 << 15])
def test_equals_the_gguf_package(kind, slice_size, monkeypatch) -> None:
    monkeypatch.setattr(module, "_SLICE", slice_size)
    raw = random_rows(kind, 7)
    with np.errstate(all="ignore"):
        expected = oracle(raw, kind).reshape(7, COLUMNS)
    found = dequantize(torch.from_numpy(raw), kind, torch.empty(7, COLUMNS))
    assert np.array_equal(found.numpy(), expected, equal_nan=True)


@pytest.mark.parametrize("kind", SUPPORTED, ids=lambda kind: kind.name)
def test_rounds_once_to_the_type_of_out(kind) -> None:
    raw = torch.from_numpy(random_rows(kind, 3))
    exact = dequantize(raw, kind, torch.empty(3, COLUMNS))
    rounded = dequantize(raw, kind, torch.empty(3, COLUMNS, dtype=torch.bfloat16))
    torch.testing.assert_close(rounded, exact.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_names() -> None:
    names = {kind.name for kind in SUPPORTED}
    assert names >= {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"}
    assert names >= {"Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "IQ2_XS", "IQ3_S", "TQ1_0", "MXFP4"}
    assert not names & {"I8", "I32", "F64", "Q8_1", "Q8_K"}
