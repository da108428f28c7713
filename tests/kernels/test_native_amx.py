"""Kernels on AMX tiles: with a model of the tiles (csrc/amx_model.h), and what compilers make of the instructions."""

from __future__ import annotations

import importlib.util
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kvloom.kernels.cpu.native import NativeKernels, variants
from kvloom.kernels.cpu.native.build import build
from kvloom.kernels.cpu.native.compiler import COMMON_FLAGS, compile_library, find_compiler, zig
from kvloom.kernels.cpu.native.library import Library
from kvloom.kernels.cpu.native.linear import QuantLinear, pack
from kvloom.kernels.cpu.native.paths import NEVER, PAIRS
from kvloom.kernels.cpu.native.variants import BF16_DOT, TILE_FLAGS, VARIANTS, processor_flags
from kvloom.kernels.quantized import KINDS
from tests.conftest import native_kernels
from tests.kernels import test_pairs as pairs
from tests.kernels.conftest import activations, make_rows, paged
from tests.kernels.stored import ALL, random_stored

AMX = next(one for one in VARIANTS if one.name == "x86-64-v4-amx")
COMPILERS = {"gcc": ["g++"] if shutil.which("g++") else None, "zig": zig()}
QUICK = ["-O1" if flag == "-O3" else flag for flag in COMMON_FLAGS]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def native() -> NativeKernels:
    """What runs here, without tiles."""
    kernels = native_kernels()
    if kernels.library.paths.products != "VNNI":
        pytest.skip("tiles are compared with VNNI, which this processor has not")
    kernels.library.paths = replace(kernels.library.paths, tiles=NEVER)
    return kernels


@pytest.fixture(scope="module")
def kernels(native: NativeKernels, tmp_path_factory: pytest.TempPathFactory) -> NativeKernels:
    """With the model of tiles, in linear layers, and where this processor has products of bf16 pairs in attention."""
    target, compiler = tmp_path_factory.mktemp("amx") / "kernels.so", find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    compile_library(compiler, [*QUICK, "-march=native", "-DKVLOOM_AMX_MODEL", BF16_DOT, "-w"], target)
    return NativeKernels(Library(target, AMX.paths), threads=2)


def test_a_library_compiled_without_tiles_takes_none(kernels: NativeKernels) -> None:
    """A compiler that is older than the processor leaves them out, whatever the processor's flags promise."""
    assert kernels.library.paths.tiles == AMX.paths.tiles
    without = Library(build(generic=True).path, AMX.paths).paths
    assert (without.tiles, without.attention) == (NEVER, PAIRS)


@pytest.mark.parametrize("kind", ALL)
def test_tiles_give_the_bits_of_vnni(native: NativeKernels, kernels: NativeKernels, kind: str) -> None:
    """Rows that fill no tile and no chunk, outputs that fill no panel, inputs that fill no slice; few rows are not in tiles."""
    values = KINDS[kind].values
    for rows, outputs, inputs in ((3, 33, 256), (16, 1, values), (17, 16, 3 * values), (31, 100, 33 * 32), (257, 40, 1280)):
        stored = random_stored(kind, outputs, -(-inputs // values) * values)
        packed = pack(native, stored)
        x = activations(rows, packed.inputs, torch.bfloat16)
        bias, stream = torch.linspace(-2, 2, outputs), torch.linspace(-3, 3, rows * outputs).view(rows, outputs).bfloat16()
        mine, wanted = stream.clone(), stream.clone()
        QuantLinear(kernels, packed, bias)(x, mine, residual=mine)
        QuantLinear(native, packed, bias)(x, wanted, residual=wanted)
        assert torch.equal(mine, wanted)
        room = torch.full((rows, outputs + 3), 9.0)
        QuantLinear(kernels, packed)(x, room[:, :outputs])
        assert torch.equal(room[:, :outputs], QuantLinear(native, packed)(x, torch.empty(rows, outputs)))
        assert (room[:, outputs:] == 9.0).all()


@pytest.mark.parametrize("tiles", [1, 16, NEVER])
def test_where_tiles_begin_shows_in_no_row(
    native: NativeKernels, kernels: NativeKernels, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack(native, random_stored("Q4_K", 48, 512))
    monkeypatch.setattr(kernels.library, "paths", replace(AMX.paths, tiles=tiles))
    x = activations(23, 512, torch.float32)
    together = QuantLinear(kernels, packed)(x, torch.empty(23, 48))
    assert torch.equal(together, QuantLinear(native, packed)(x, torch.empty(23, 48)))
    for row in range(0, 23, 5):
        assert torch.equal(QuantLinear(kernels, packed)(x[row : row + 1], torch.empty(1, 48))[0], together[row])


@pytest.mark.parametrize(("dim", "group"), [(20, 1), (36, 3), (64, 8), (80, 7), (128, 6)])
def test_attention_of_odd_numbers_of_everything(kernels: NativeKernels, dim: int, group: int) -> None:
    pairs.test_odd_numbers_of_everything(kernels, dim, group)


def test_attention_has_the_same_bits_however_a_prompt_was_cut(kernels: NativeKernels) -> None:
    pairs.test_a_row_has_the_same_bits_however_its_prompt_was_cut(kernels, 64, 3)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("seen", [5, 65])
def test_attention_beside_what_no_row_sees(kernels: NativeKernels, seen: int, tokens: int) -> None:
    pairs.test_positions_that_no_row_sees_may_hold_anything(kernels, seen, tokens)


def test_attention_is_summed_in_another_order(native: NativeKernels, kernels: NativeKernels) -> None:
    """So these are tiles."""
    if "avx512_bf16" not in processor_flags():
        pytest.skip("this processor has no products of bf16 pairs, which round the weights for tiles")
    store = paged(1, 700, 2, 64, dtype=torch.bfloat16)
    rows = make_rows(store, [0] * 40, [0] * 40, range(641, 681))
    q = pairs.queries(rows, 6, 64)
    tiled, other = pairs.attend(kernels, q, store.kv, rows), pairs.attend(native, q, store.kv, rows)
    torch.testing.assert_close(tiled, other, atol=2e-3, rtol=2**-8)
    assert not torch.equal(tiled, other)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """scripts/check_kernels.py"""
    spec = importlib.util.spec_from_file_location("check_kernels", ROOT / "scripts" / "check_kernels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
@pytest.mark.parametrize("source", ["linear.cpp", "attention.cpp"])
@pytest.mark.parametrize("name", COMPILERS)
def test_the_instructions_are_where_they_belong(script: ModuleType, name: str, source: str, tmp_path: Path) -> None:
    compiler = COMPILERS[name]
    if not compiler:
        pytest.skip(f"no {name}")
    functions = script.tile_instructions(compiler, source, tmp_path, QUICK)
    assert script.wrong_instructions(source, functions) == []


RIGHT = ["ldtilecfg", "tileloadd 4", "tileloadd 6", "tilezero 0", "tdpbssd 6 4 0", "tilestored 0", "tilerelease"]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (["tileloadd 4", "ldtilecfg", "tilerelease"], "not configured first"),
        (["ldtilecfg", "tilerelease", "tileloadd 4"], "not configured first"),
        (["tdpbssd 4 6 0"], "other tiles"),
        ([], "7 functions with tiles, for 8 kinds"),
    ],
)
def test_instructions_elsewhere_are_told_of(script: ModuleType, function: list[str], said: str) -> None:
    assert script.wrong_instructions("linear.cpp", [RIGHT] * len(ALL)) == []
    assert any(said in one for one in script.wrong_instructions("linear.cpp", [RIGHT] * (len(ALL) - 1) + [function]))
    assert script.wrong_instructions("linear.cpp", [RIGHT[1:-1]]) != []


def test_a_system_that_refuses_tiles_is_a_processor_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"vendor_id\t: GenuineIntel\nflags\t\t: {' '.join(AMX.needs)}\n")
    monkeypatch.setattr(variants, "tiles_refused", lambda: "arch_prctl says EPERM")
    flags = processor_flags(cpuinfo)
    assert next(variants.runnable(flags)).name == "x86-64-v4-vnni" and not flags & TILE_FLAGS
    assert variants.tiles_note(cpuinfo) == "AMX tiles not used: arch_prctl says EPERM"
    monkeypatch.setattr(variants, "tiles_refused", lambda: "")
    assert next(variants.runnable(processor_flags(cpuinfo))) is AMX
    assert variants.tiles_note(cpuinfo) == ""
    monkeypatch.setattr(variants, "tiles_refused", lambda: "arch_prctl says EPERM")
    cpuinfo.write_text("flags\t\t: avx2\n")
    assert variants.tiles_note(cpuinfo) == ""


@pytest.mark.skipif("amx_tile" in variants._told(Path("/proc/cpuinfo")), reason="this processor has tiles")
def test_the_system_is_asked() -> None:
    """Where no processor has tiles, Linux has none to give."""
    assert re.fullmatch(r"no Linux on x86-64|arch_prctl says E\w+", variants.tiles_refused())
