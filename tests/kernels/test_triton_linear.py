"""Quantised linear layers of the Triton back end, run by its interpreter, against the dequantised weight in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom.kernels.quantized import PackedWeight
from tests.kernels.conftest import activations, close
from tests.kernels.stored import dense_of, random_stored

pytest.importorskip("triton")

from kvloom.kernels.triton import linear
from kvloom.kernels.triton.linear import TritonQuantized

FORMATS = ("Q4_0", "Q4_1", "Q8_0")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several splits of a small weight, each another program's up to 20 rows."""
    monkeypatch.setattr(linear, "LEAST", 2)
    monkeypatch.setattr(linear, "FEW", 20)


def packed_and_dense(quantized: TritonQuantized, kind: str, outputs: int, inputs: int) -> tuple[PackedWeight, Tensor]:
    """A packed random weight and the matrix, fp64, that it stands for."""
    stored = random_stored(kind, outputs, inputs)
    return quantized.pack(stored), dense_of(stored)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("dtype", "rows"), [*((dtype, 20) for dtype in DTYPES), (torch.bfloat16, 1), (torch.bfloat16, 33)])
def test_equals_the_dense_product(kind: str, dtype: torch.dtype, rows: int) -> None:
    """Few rows and many; rows of a wider tensor, into one; nothing but the output is written."""
    quantized = TritonQuantized("cpu")
    packed, dense = packed_and_dense(quantized, kind, 70, 160)
    bias = torch.linspace(-2, 2, 70).to(dtype)
    x, room = activations(rows, 160, dtype), torch.full((rows, 90), 9.0, dtype=dtype)
    wider = torch.cat([x, x.new_full((rows, 8), torch.nan)], 1)
    layer = quantized.linear(packed, bias)
    quantized.scratch.fill_(torch.nan)
    out = layer(wider[:, :160], room[:, :70])
    assert out.data_ptr() == room.data_ptr()
    assert close(out, x.double() @ dense.T + bias.double())
    assert (room[:, 70:] == 9.0).all()
    plain = quantized.linear(packed, None)(x, torch.empty(rows, 70))
    assert close(plain, x.double() @ dense.T)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.sampled_from(FORMATS), st.integers(1, 130), st.integers(1, 9), st.integers(1, 40))
def test_any_shape(kind: str, outputs: int, groups: int, rows: int) -> None:
    quantized = TritonQuantized("cpu")
    packed, dense = packed_and_dense(quantized, kind, outputs, groups * 32)
    x = activations(rows, groups * 32, torch.bfloat16)
    out = quantized.linear(packed, None)(x, torch.full((rows, outputs), torch.nan))
    assert close(out, x.double() @ dense.T)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_a_row_does_not_depend_on_its_batch(kind: str) -> None:
    """One row alone, among few rows, and among so many that programs compute all splits. Sums of a group are exact: those of
    the interpreter's library depend on where a row lies."""
    quantized = TritonQuantized("cpu")
    packed, _ = packed_and_dense(quantized, kind, 70, 160)
    layer, make = quantized.linear(packed, None), torch.Generator().manual_seed(1)
    x = torch.randint(-60, 60, (40, 160), generator=make).bfloat16()
    together = layer(x, torch.empty(40, 70))
    for first, last in ((0, 1), (3, 4), (0, 20), (3, 39)):
        assert torch.equal(layer(x[first:last], torch.empty(last - first, 70)), together[first:last])


def test_what_does_not_belong_together_is_refused() -> None:
    quantized = TritonQuantized("cpu")
    packed, _ = packed_and_dense(quantized, "Q8_0", 16, 64)
    layer = quantized.linear(packed, None)
    with pytest.raises(ValueError, match="16 x 64"):
        layer(torch.zeros(1, 32), torch.empty(1, 16))
    with pytest.raises(ValueError, match="16 x 64"):
        layer(torch.zeros(2, 64), torch.empty(1, 16))
    with pytest.raises(TypeError, match="float64"):
        layer(torch.zeros(1, 64).double(), torch.empty(1, 16))
    with pytest.raises(ValueError, match="bias must be"):
        quantized.linear(packed, torch.zeros(15))
    with pytest.raises(ValueError, match="16 x 64 need"):
        quantized.linear(packed._replace(data=packed.data[:-1]), None)
    stored = random_stored("Q8_0", 16, 64)
    with pytest.raises(ValueError, match="'Q4_K'; allowed: Q4_0, Q4_1, Q8_0"):
        quantized.pack(stored._replace(kind="Q4_K"))
    with pytest.raises(ValueError, match="16 x 48 of Q8_0"):
        quantized.pack(stored._replace(shape=(16, 48)))
