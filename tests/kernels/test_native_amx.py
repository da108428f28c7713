"""Linear layers in AMX tiles: with a model of the tiles (csrc/amx_model.h), and what compilers make of the instructions."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import cast

import pytest
import torch

from kvloom.kernels.cpu.native import NativeKernels, variants
from kvloom.kernels.cpu.native.compiler import COMMON_FLAGS, SOURCES, find_compiler, zig
from kvloom.kernels.cpu.native.library import LINEAR
from kvloom.kernels.cpu.native.linear import QuantLinear, pack
from kvloom.kernels.cpu.native.paths import NEVER
from kvloom.kernels.cpu.native.variants import TILE_FLAGS, VARIANTS, processor_flags
from kvloom.kernels.quantized import KINDS
from tests.conftest import native_kernels
from tests.kernels.conftest import activations
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
def modelled(native: NativeKernels, tmp_path_factory: pytest.TempPathFactory) -> NativeKernels:
    """Linear layers alone, with the model of tiles."""
    target, compiler = tmp_path_factory.mktemp("amx") / "linear.so", find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = ["-march=native", "-DKVLOOM_AMX_MODEL", "-shared"]
    sources = [str(SOURCES / name) for name in ("linear.cpp", "parallel.cpp")]
    subprocess.run([*compiler, *QUICK, *flags, *sources, "-o", str(target)], check=True, stderr=subprocess.DEVNULL)
    handle = ctypes.CDLL(str(target))
    library = SimpleNamespace(
        linear=lambda *fields: handle.kvloom_linear(LINEAR.struct.pack(*fields)),
        linear_bytes=native.library.linear_bytes,
        paths=AMX.paths,
    )
    return cast(NativeKernels, SimpleNamespace(library=library, threads=2))


@pytest.mark.parametrize("kind", ALL)
def test_tiles_give_the_bits_of_vnni(native: NativeKernels, modelled: NativeKernels, kind: str) -> None:
    """Rows that fill no tile and no chunk, outputs that fill no panel, inputs that fill no slice; few rows are not in tiles."""
    values = KINDS[kind].values
    for rows, outputs, inputs in ((3, 33, 256), (16, 1, values), (17, 16, 3 * values), (31, 100, 33 * 32), (257, 40, 1280)):
        stored = random_stored(kind, outputs, -(-inputs // values) * values)
        packed = pack(native, stored)
        x = activations(rows, packed.inputs, torch.bfloat16)
        bias, stream = torch.linspace(-2, 2, outputs), torch.linspace(-3, 3, rows * outputs).view(rows, outputs).bfloat16()
        mine, wanted = stream.clone(), stream.clone()
        QuantLinear(modelled, packed, bias)(x, mine, residual=mine)
        QuantLinear(native, packed, bias)(x, wanted, residual=wanted)
        assert torch.equal(mine, wanted)
        room = torch.full((rows, outputs + 3), 9.0)
        QuantLinear(modelled, packed)(x, room[:, :outputs])
        assert torch.equal(room[:, :outputs], QuantLinear(native, packed)(x, torch.empty(rows, outputs)))
        assert (room[:, outputs:] == 9.0).all()


@pytest.mark.parametrize("tiles", [1, 16, NEVER])
def test_where_tiles_begin_shows_in_no_row(native: NativeKernels, modelled: NativeKernels, tiles: int) -> None:
    packed = pack(native, random_stored("Q4_K", 48, 512))
    modelled.library.paths = replace(AMX.paths, tiles=tiles)
    x = activations(23, 512, torch.float32)
    together = QuantLinear(modelled, packed)(x, torch.empty(23, 48))
    assert torch.equal(together, QuantLinear(native, packed)(x, torch.empty(23, 48)))
    for row in range(0, 23, 5):
        assert torch.equal(QuantLinear(modelled, packed)(x[row : row + 1], torch.empty(1, 48))[0], together[row])


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """scripts/check_kernels.py"""
    spec = importlib.util.spec_from_file_location("check_kernels", ROOT / "scripts" / "check_kernels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
@pytest.mark.parametrize("name", COMPILERS)
def test_the_instructions_are_where_they_belong(script: ModuleType, name: str, tmp_path: Path) -> None:
    compiler = COMPILERS[name]
    if not compiler:
        pytest.skip(f"no {name}")
    functions = script.tile_instructions(compiler, tmp_path, QUICK)
    assert script.wrong_instructions(functions) == []


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (["tileloadd 4", "ldtilecfg", "tilerelease"], "not configured first"),
        (["ldtilecfg", "tilerelease", "tileloadd 4"], "not configured first"),
        (["tileloadd 4", "tilezero 0", "tdpbssd 4 6 0", "tilestored 0"], "other tiles"),
        (["tdpbssd 6 4 0", "tilestored 0"], "what belongs to them"),
    ],
)
def test_instructions_elsewhere_are_told_of(script: ModuleType, function: list[str], said: str) -> None:
    right = ["ldtilecfg", "tileloadd 4", "tileloadd 6", "tilezero 0", "tdpbssd 6 4 0", "tilestored 0", "tilerelease"]
    assert script.wrong_instructions([right] * len(ALL)) == []
    found = script.wrong_instructions([right] * (len(ALL) - 1) + [function])
    assert any(said in one for one in found) and any("for 8 kinds" in one for one in found)


def test_a_system_that_refuses_tiles_is_a_processor_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"vendor_id\t: GenuineIntel\nflags\t\t: {' '.join(AMX.needs)} avx512_bf16 amx_bf16\n")
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
