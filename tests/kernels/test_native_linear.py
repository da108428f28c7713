"""Quantised linear layers against x @ W.T with the dequantised weight, in fp64.

Two errors are separated. The rounding of activations is reproduced exactly (`rounded`), which leaves only fp32 summation and
the output's rounding: a tight bound. And the whole result is held to the bound that the rounding of x implies.
"""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from kvloom.engine.model.quantized import round_to_int4, round_to_int8
from kvloom.kernels.cpu.native import NativeKernels
from kvloom.kernels.cpu.native.linear import PackedWeight, QuantLinear, pack_int4, pack_int8
from tests.conftest import native_kernels
from tests.kernels.conftest import activations, close

FORMATS = ("q4_0", "q4_1", "q8_0")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 127 * 128
"""The code of a group's largest magnitude: csrc/dot.h."""


@pytest.fixture(scope="module", params=["machine", "generic"])
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    """The build for this machine, and the one without any processor-specific code."""
    return native_kernels(generic=request.param == "generic")


def packed_and_dense(kernels: NativeKernels, layout: str, outputs: int, inputs: int) -> tuple[PackedWeight, Tensor]:
    """A packed random weight and the matrix, fp64, that it stands for."""
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(outputs + inputs)) * 0.05
    if layout == "q8_0":
        _, codes, scales, _ = round_to_int8(weight)
        return pack_int8(kernels, codes, scales), codes.double() * scales.double().repeat_interleave(32, 1)
    _, codes, scales, mins = round_to_int4(weight)
    spread = scales.double().repeat_interleave(32, 1)
    if layout == "q4_1":
        return pack_int4(kernels, codes, scales, mins), codes.double() * spread + mins.double().repeat_interleave(32, 1)
    nibbles = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return pack_int4(kernels, nibbles, scales), (codes.double() - 8) * spread


def rounded(x: Tensor) -> Tensor:
    """x as the layer sees it: codes of 15 bits per row and group of 32, in fp32 as the kernel does it; fp64."""
    groups = x.float().unflatten(1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / LARGEST
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return ((groups * inverse).round().double() * scale.double()).flatten(1)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 8, 17, 64, 130, 241, 490])
def test_equals_dense_product_of_rounded_activations(kernels: NativeKernels, layout: str, rows: int) -> None:
    packed, dense = packed_and_dense(kernels, layout, 100, 192)
    x = activations(rows, 192, torch.bfloat16)
    out = QuantLinear(kernels, packed)(x, torch.empty(rows, 100))
    assert close(out, rounded(x) @ dense.T)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 31, 33, 48, 576])
def test_output_sizes_that_fill_no_panel(kernels: NativeKernels, layout: str, outputs: int) -> None:
    packed, dense = packed_and_dense(kernels, layout, outputs, 64)
    x = activations(7, 64, torch.float32)
    room = torch.full((7, outputs + 3), 9.0)
    QuantLinear(kernels, packed)(x, room[:, :outputs])
    assert close(room[:, :outputs], rounded(x) @ dense.T)
    assert (room[:, outputs:] == 9.0).all()


@pytest.mark.parametrize("layout", FORMATS)
def test_error_is_within_what_rounding_activations_allows(kernels: NativeKernels, layout: str) -> None:
    packed, dense = packed_and_dense(kernels, layout, 64, 576)
    x = activations(9, 576, torch.float32)
    out = QuantLinear(kernels, packed)(x, torch.empty(9, 64))
    half_step = (x.unflatten(1, (-1, 32)).abs().amax(-1) / (2 * LARGEST)).repeat_interleave(32, 1).double()
    bound = half_step @ dense.abs().T + 1e-5 * (x.double().abs() @ dense.abs().T)
    assert ((out.double() - x.double() @ dense.T).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 20])
def test_dtypes_bias_and_residual(kernels: NativeKernels, dtype: torch.dtype, rows: int) -> None:
    packed, dense = packed_and_dense(kernels, "q4_1", 45, 96)
    x, bias = activations(rows, 96, dtype), torch.linspace(-2, 2, 45).to(dtype)
    stream = torch.linspace(-3, 3, rows * 45).view(rows, 45).to(dtype)
    product = rounded(x) @ dense.T + bias.double()
    layer = QuantLinear(kernels, packed, bias)
    assert close(layer(x, torch.empty(rows, 45, dtype=dtype)), product)
    expected = product + stream.double()
    assert close(layer(x, stream, residual=stream), expected)


def test_a_row_does_not_depend_on_its_batch(kernels: NativeKernels) -> None:
    packed, _ = packed_and_dense(kernels, "q4_1", 80, 256)
    layer = QuantLinear(kernels, packed)
    x = activations(23, 256, torch.bfloat16)
    together = layer(x, torch.empty(23, 80))
    for row in range(23):
        assert torch.equal(layer(x[row : row + 1], torch.empty(1, 80))[0], together[row])


def test_rows_of_a_wider_tensor(kernels: NativeKernels) -> None:
    packed, dense = packed_and_dense(kernels, "q8_0", 32, 64)
    wide = torch.randn(5, 200, generator=torch.Generator().manual_seed(1))
    out = QuantLinear(kernels, packed)(wide[:, 100:164], torch.empty(5, 32))
    assert close(out, rounded(wide[:, 100:164]) @ dense.T)


def test_int8_with_one_scale_per_output(kernels: NativeKernels) -> None:
    codes = torch.randint(-128, 128, (20, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(2))
    scales = torch.linspace(0.01, 0.2, 20).half().float()
    x = activations(3, 64, torch.float32)
    out = QuantLinear(kernels, pack_int8(kernels, codes, scales))(x, torch.empty(3, 20))
    assert close(out, rounded(x) @ (codes.double() * scales.double()[:, None]).T)


def test_quantizers_round_to_nearest() -> None:
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(3))
    _, codes8, scales8, _ = round_to_int8(weight)
    error = (codes8 * scales8.repeat_interleave(32, 1) - weight).abs()
    assert (error <= 0.502 * scales8.repeat_interleave(32, 1)).all()
    _, codes4, scales4, mins4 = round_to_int4(weight)
    error = (codes4 * scales4.repeat_interleave(32, 1) + mins4.repeat_interleave(32, 1) - weight).abs()
    assert (error <= 0.52 * scales4.repeat_interleave(32, 1)).all()


def test_wrong_shapes_and_codes_are_refused(kernels: NativeKernels) -> None:
    packed, _ = packed_and_dense(kernels, "q8_0", 16, 64)
    layer = QuantLinear(kernels, packed)
    with pytest.raises(ValueError, match="16 x 64"):
        layer(torch.zeros(1, 32), torch.empty(1, 16))
    with pytest.raises(ValueError, match="16 x 64"):
        layer(torch.zeros(2, 64), torch.empty(1, 16))
    with pytest.raises(ValueError, match="below 16"):
        pack_int4(kernels, torch.full((1, 32), 16, dtype=torch.uint8), torch.ones(1, 1))
    with pytest.raises(ValueError, match="scales must be"):
        pack_int8(kernels, torch.zeros(1, 48, dtype=torch.int8), torch.ones(1, 1))


def test_the_contracts_pack_reads_all_three_formats(kernels: NativeKernels) -> None:
    assert kernels.quantized is not None
    weight = torch.randn(20, 64, generator=torch.Generator().manual_seed(4))
    x, bias = activations(3, 64, torch.bfloat16), torch.ones(20)
    _, codes4, scales4, mins4 = round_to_int4(weight)
    _, codes8, scales8, _ = round_to_int8(weight)
    cases = [
        (4, codes4, scales4, mins4, codes4 * scales4.repeat_interleave(32, 1) + mins4.repeat_interleave(32, 1)),
        (4, codes4, scales4, None, (codes4.double() - 8) * scales4.repeat_interleave(32, 1)),
        (8, codes8, scales8, None, codes8 * scales8.repeat_interleave(32, 1)),
    ]
    for bits, codes, scales, mins, dense in cases:
        packed = kernels.quantized.pack(bits, codes, scales, mins)
        out = kernels.quantized.linear(packed, bias)(x, torch.empty(3, 20))
        assert close(out, rounded(x) @ dense.double().T + 1)
    with pytest.raises(ValueError, match="mins"):
        kernels.quantized.pack(8, codes8, scales8, scales8)
    with pytest.raises(ValueError, match="allowed: 4, 8"):
        kernels.quantized.pack(5, codes4, scales4, None)
    with pytest.raises(ValueError, match="20 x 64 need"):
        kernels.quantized.linear(packed._replace(data=packed.data[:-1]), None)


@pytest.mark.parametrize(
    ("bits", "minimum", "digest"),
    [(4, True, "c89f491f22fb6c91"), (4, False, "34268b5973b82513"), (8, False, "5caa445e56803f35")],
)
def test_the_layout_of_packed_weights_goes_by_its_name(kernels: NativeKernels, bits: int, minimum: bool, digest: str) -> None:
    """Files of packed weights are found by the name of their layout: who changes the bytes gives them another."""
    codes = (torch.arange(40 * 64).view(40, 64) * 7 % (1 << bits)).to(torch.uint8)
    scales = (torch.arange(80, dtype=torch.float32).view(40, 2) + 1) / 64
    mins = -scales / 2 if minimum else None
    assert kernels.quantized is not None
    packed = kernels.quantized.pack(bits, codes if bits == 4 else codes.view(torch.int8), scales, mins)
    found = hashlib.sha256(packed.data.numpy().tobytes()).hexdigest()[:16]
    assert (kernels.quantized.layout, found) == ("native 1", digest)
