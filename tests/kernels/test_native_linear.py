"""Quantised linear layers against x @ W.T with the dequantised weight, in fp64.

Two errors are separated. The rounding of activations is reproduced exactly (`rounded`), which leaves only fp32 summation and
the output's rounding: a tight bound. And the whole result is held to the bound that the rounding of x implies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvloom.engine.model.quantized import dense, round_to_int4, round_to_int8
from kvloom.kernels.cpu.native import NativeKernels
from kvloom.kernels.cpu.native.linear import PackedRows, QuantLinear, pack
from kvloom.kernels.quantized import KINDS, PackedWeight, StoredWeight
from tests.conftest import native_kernels
from tests.kernels.conftest import activations, close
from tests.kernels.stored import ALL, dense_of, random_stored

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 127
"""The code of a group's largest magnitude: csrc/dot.h."""


@pytest.fixture(scope="module", params=["machine", "generic"])
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    """The build for this machine, and the one without any processor-specific code."""
    return native_kernels(generic=request.param == "generic")


def packed_and_dense(kernels: NativeKernels, kind: str, outputs: int, inputs: int) -> tuple[PackedWeight, Tensor]:
    """A packed random weight and the matrix, fp64, that it stands for."""
    stored = random_stored(kind, outputs, inputs)
    return pack(kernels, stored), dense_of(stored)


def rounded(x: Tensor) -> Tensor:
    """x as the layer sees it: codes of 8 bits per row and group of 32, in fp32 as the kernel does it; fp64."""
    groups = x.float().unflatten(1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / LARGEST
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return ((groups * inverse).round().double() * scale.double()).flatten(1)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 8, 17, 64, 241])
def test_equals_dense_product_of_rounded_activations(kernels: NativeKernels, kind: str, rows: int) -> None:
    packed, dense = packed_and_dense(kernels, kind, 100, 512)
    x = activations(rows, 512, torch.bfloat16)
    out = QuantLinear(kernels, packed)(x, torch.empty(rows, 100))
    assert close(out, rounded(x) @ dense.T)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 31, 33, 48, 576])
def test_output_sizes_that_fill_no_panel(kernels: NativeKernels, kind: str, outputs: int) -> None:
    packed, dense = packed_and_dense(kernels, kind, outputs, 256)
    x = activations(7, 256, torch.float32)
    room = torch.full((7, outputs + 3), 9.0)
    QuantLinear(kernels, packed)(x, room[:, :outputs])
    assert close(room[:, :outputs], rounded(x) @ dense.T)
    assert (room[:, outputs:] == 9.0).all()


@pytest.mark.parametrize("kind", ALL)
def test_error_is_within_what_rounding_activations_allows(kernels: NativeKernels, kind: str) -> None:
    packed, dense = packed_and_dense(kernels, kind, 64, 768)
    x = activations(9, 768, torch.float32)
    out = QuantLinear(kernels, packed)(x, torch.empty(9, 64))
    half_step = (x.unflatten(1, (-1, 32)).abs().amax(-1) / (2 * LARGEST)).repeat_interleave(32, 1).double()
    bound = half_step @ dense.abs().T + 1e-5 * (x.double().abs() @ dense.abs().T)
    assert ((out.double() - x.double() @ dense.T).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 20])
def test_dtypes_bias_and_residual(kernels: NativeKernels, dtype: torch.dtype, rows: int) -> None:
    packed, dense = packed_and_dense(kernels, "Q4_1", 45, 96)
    x, bias = activations(rows, 96, dtype), torch.linspace(-2, 2, 45).to(dtype)
    stream = torch.linspace(-3, 3, rows * 45).view(rows, 45).to(dtype)
    product = rounded(x) @ dense.T + bias.double()
    layer = QuantLinear(kernels, packed, bias)
    assert close(layer(x, torch.empty(rows, 45, dtype=dtype)), product)
    expected = product + stream.double()
    assert close(layer(x, stream, residual=stream), expected)


@pytest.mark.parametrize("kind", ALL)
def test_a_row_does_not_depend_on_its_batch(kernels: NativeKernels, kind: str) -> None:
    packed, _ = packed_and_dense(kernels, kind, 80, 256)
    layer = QuantLinear(kernels, packed)
    x = activations(23, 256, torch.bfloat16)
    together = layer(x, torch.empty(23, 80))
    for row in range(23):
        assert torch.equal(layer(x[row : row + 1], torch.empty(1, 80))[0], together[row])


def test_rows_of_a_wider_tensor(kernels: NativeKernels) -> None:
    packed, dense = packed_and_dense(kernels, "Q8_0", 32, 64)
    wide = torch.randn(5, 200, generator=torch.Generator().manual_seed(1))
    out = QuantLinear(kernels, packed)(wide[:, 100:164], torch.empty(5, 32))
    assert close(out, rounded(wide[:, 100:164]) @ dense.T)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_packed_matrix_are_the_files_numbers(kernels: NativeKernels, kind: str, dtype: torch.dtype) -> None:
    """Rounded once, as the dense table is."""
    packed, dense = packed_and_dense(kernels, kind, 70, 512)
    rows, room = torch.tensor([69, 0, 17, 17, 33]), torch.full((5, 520), 9.0, dtype=dtype)
    out = PackedRows(kernels, packed)(rows, room[:, :512])
    assert torch.equal(out, dense[rows].float().to(dtype)) and (room[:, 512:] == 9.0).all()
    beyond = PackedRows(kernels, packed)(torch.tensor([-1, 70, 1 << 40]), torch.ones(3, 512, dtype=dtype))
    assert not beyond.any()


def test_packed_weights_take_the_bytes_of_the_file() -> None:
    kernels = native_kernels()
    for kind in ALL:
        stored = random_stored(kind, 64, 2048)
        assert pack(kernels, stored).data.numel() == stored.blocks.numel()


@pytest.mark.parametrize(("round_", "most"), [(round_to_int8, 0.502), (round_to_int4, 0.52)])
def test_quantizers_round_to_nearest(round_: Callable[[Tensor], StoredWeight], most: float) -> None:
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(3))
    stored = round_(weight)
    groups = weight.unflatten(1, (-1, 32))
    span = groups.amax(-1) - groups.amin(-1) if stored.kind == "Q4_1" else groups.abs().amax(-1)
    step = (span / (15 if stored.kind == "Q4_1" else 127)).repeat_interleave(32, 1)
    assert torch.equal(dense(stored).double(), dense_of(stored))
    assert ((dense(stored) - weight).abs() <= most * step + 1e-3 * weight.abs()).all()


def test_wrong_shapes_and_codes_are_refused(kernels: NativeKernels) -> None:
    packed, _ = packed_and_dense(kernels, "Q8_0", 16, 64)
    layer = QuantLinear(kernels, packed)
    with pytest.raises(ValueError, match="16 x 64"):
        layer(torch.zeros(1, 32), torch.empty(1, 16))
    with pytest.raises(ValueError, match="16 x 64"):
        layer(torch.zeros(2, 64), torch.empty(1, 16))
    with pytest.raises(ValueError, match="16 x 64 of Q8_0 take"):
        QuantLinear(kernels, packed._replace(data=packed.data[:-1]))
    with pytest.raises(ValueError, match="16 x 80 of Q8_0 take"):
        QuantLinear(kernels, packed._replace(inputs=80))
    with pytest.raises(ValueError, match="bytes"):
        PackedRows(kernels, packed._replace(kind="Q6_K"))
    with pytest.raises(ValueError, match="int64"):
        PackedRows(kernels, packed)(torch.zeros(2, dtype=torch.int32), torch.empty(2, 64))


@pytest.mark.parametrize("kind", ALL)
def test_what_is_no_such_weight_is_not_packed(kernels: NativeKernels, kind: str) -> None:
    stored = random_stored(kind, 4, 256)
    with pytest.raises(ValueError, match="'Q2_K'; allowed: Q4_0, Q4_1"):
        pack(kernels, stored._replace(kind="Q2_K"))
    with pytest.raises(ValueError, match=f"4 x 272 of {kind}"):
        pack(kernels, stored._replace(shape=(4, 272)))
    with pytest.raises(ValueError, match=r"5 x 256"):
        pack(kernels, stored._replace(shape=(5, 256)))
    with pytest.raises(ValueError, match=r"torch.int8"):
        pack(kernels, stored._replace(blocks=stored.blocks.view(torch.int8)))


DIGESTS = {
    "Q4_0": "f192ccdc72af619e",
    "Q4_1": "7048ffcb3ed66d6b",
    "Q5_0": "0fe4078aab836d7a",
    "Q5_1": "1ca9ef2177f36cb1",
    "Q8_0": "db0918404ea0a03c",
    "Q4_K": "d6dd5f6a2c73f40c",
    "Q5_K": "ac643be124f975ed",
    "Q6_K": "ca91770ab23769fc",
}


@pytest.mark.parametrize("kind", ALL)
def test_the_layout_of_packed_weights_goes_by_its_name(kernels: NativeKernels, kind: str) -> None:
    """Files of packed weights are found by the name of their layout: who changes the bytes gives them another."""
    outputs, inputs = 40, 512
    size = KINDS[kind].row_bytes(inputs)
    blocks = (torch.arange(outputs * size).view(outputs, size) * 7 % 256).to(torch.uint8)
    packed = pack(kernels, StoredWeight(kind, blocks, (outputs, inputs)))
    found = hashlib.sha256(packed.data.numpy().tobytes()).hexdigest()[:16]
    assert kernels.quantized is not None
    assert (kernels.quantized.layout, found) == ("native 2", DIGESTS[kind])
