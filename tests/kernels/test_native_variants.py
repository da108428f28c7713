"""Ready-made libraries: which is chosen, what is refused, and that no processor is given what it cannot run."""

from __future__ import annotations

import importlib
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from kvloom import kernels
from kvloom.engine import LLM
from kvloom.engine.errors import ConfigError
from kvloom.kernels.cpu.native import NativeUnavailable, load
from kvloom.kernels.cpu.native.linear import QuantLinear, pack
from kvloom.kernels.cpu.native.paths import GENERIC
from kvloom.kernels.cpu.native.variants import BF16_DOT, VARIANTS, Variant, missing, processor_flags
from tests.kernels.stored import ALL, random_stored

builder = importlib.import_module("kvloom.kernels.cpu.native.build")  # the package has a function of that name
BY_NAME = {one.name: one for one in VARIANTS}
V3, VNNI, BF16 = BY_NAME["x86-64-v3"], BY_NAME["x86-64-v4-vnni"], BY_NAME["x86-64-v4-bf16"]
AMX = BY_NAME["x86-64-v4-amx"]
WORDS = {
    "AVX": "avx", "AVX2": "avx2", "AVX512F": "avx512f", "AVX512BW": "avx512bw", "AVX512CD": "avx512cd", "AVX512DQ": "avx512dq",
    "AVX512VL": "avx512vl", "AVX512VNNI": "avx512_vnni", "AVX512BF16": "avx512_bf16",
    "AMX_TILE": "amx_tile", "AMX_INT8": "amx_int8", "AMX_BF16": "amx_bf16",
    "BMI": "bmi1", "BMI2": "bmi2", "F16C": "f16c", "FMA": "fma",
    "LZCNT": "abm", "MOVBE": "movbe", "POPCNT": "popcnt", "SSE3": "pni", "SSSE3": "ssse3", "SSE4_1": "sse4_1",
    "SSE4_2": "sse4_2", "CRC32": "sse4_2", "XSAVE": "xsave", "LAHF_SAHF": "lahf_lm",
}  # fmt: skip
"""What gcc says by __NAME__, in the words of /proc/cpuinfo."""
NO_FEATURE = re.compile(r"__(FP_FAST_|tune_|k8|MMX_WITH_SSE|EVEX|GCC_HAVE_SYNC)|KVLOOM_")
intel = pytest.mark.skipif(platform.machine() != "x86_64", reason="another kind of machine")


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a wheel's libraries, with a file for each variant, and no setting."""
    folder = tmp_path / "prebuilt"
    folder.mkdir()
    for one in VARIANTS:
        (folder / one.file).write_bytes(b"")
    monkeypatch.setattr(builder, "PREBUILT", folder)
    monkeypatch.delenv("KVLOOM_NATIVE", raising=False)
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    return folder


def processor(monkeypatch: pytest.MonkeyPatch, machine: str, *flags: str) -> None:
    """Runs here from now on: another processor."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(builder, "processor_flags", lambda: frozenset(flags))


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("flags\t\t: fpu avx2 avx512f\nvmx flags\t: ept\n\nprocessor\t: 1\nflags\t\t: fpu avx2\n", {"fpu", "avx2"}),
        ("vendor_id\t: AuthenticAMD\nflags\t: sse\nvendor_id\t: AuthenticAMD\nflags\t: sse\n", {"AuthenticAMD", "sse"}),
        ("processor\t: 0\nFeatures\t: fp asimd evtstrm\nCPU part\t: 0xd0c\n", {"fp", "asimd", "evtstrm"}),
        ("flags\n\x00\xff", set()),
        ("", set()),
    ],
)  # fmt: skip
def test_what_every_core_can(tmp_path: Path, text: str, flags: set[str]) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert processor_flags(tmp_path / "cpuinfo") == flags
    assert processor_flags(tmp_path / "absent") == frozenset()


@intel
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, which would say")
@pytest.mark.parametrize("variant", [V3, VNNI, AMX, BF16], ids=lambda one: one.name)
def test_a_variant_needs_all_that_its_flags_let_a_compiler_use(variant: Variant) -> None:
    def says(*flags: str) -> set[str]:
        command = ["g++", *flags, "-dM", "-E", "-x", "c++", "/dev/null"]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return {line.split()[1] for line in shown.splitlines()}

    more = {name for name in says(*variant.flags) - says("-march=x86-64") if not NO_FEATURE.match(name)}
    words = {WORDS.get(name.strip("_"), name) for name in more}
    assert words <= variant.needs
    assert variant.needs - words <= {"cx16", "AuthenticAMD"}


@pytest.mark.parametrize(
    ("machine", "flags", "chosen"),
    [
        ("x86_64", BF16.needs, BF16),
        ("x86_64", BF16.needs - {"AuthenticAMD"} | {"GenuineIntel"}, VNNI),
        ("x86_64", BF16.needs - {"avx512_bf16"}, VNNI),
        ("x86_64", AMX.needs | {"GenuineIntel"}, AMX),
        ("x86_64", AMX.needs - {"amx_int8"}, VNNI),
        ("x86_64", VNNI.needs, VNNI),
        ("x86_64", VNNI.needs - {"avx512_vnni"}, V3),
        ("x86_64", VNNI.needs - {"avx512vl"} | {"avx512_bf16"}, V3),
        ("aarch64", {"fp", "asimd", "sve"}, BY_NAME["aarch64"]),
    ],
)
def test_the_best_that_the_processor_can_run(
    shipped: Path, monkeypatch: pytest.MonkeyPatch, machine: str, flags: set[str], chosen: Variant
) -> None:
    processor(monkeypatch, machine, *flags)
    built = builder.build()
    assert built.path == shipped / chosen.file and str(built) == f"{chosen.name}, ready-made"
    assert built.paths == chosen.paths


@pytest.mark.parametrize(
    ("flags", "best"),
    [
        (BF16.needs, BF16),
        (BF16.needs - {"AuthenticAMD"} | {"GenuineIntel"}, VNNI),
        (VNNI.needs | {"AuthenticAMD"}, VNNI),
        (AMX.needs, AMX),
    ],
)
def test_a_build_for_this_processor_follows_the_same_rule(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], best: Variant
) -> None:
    processor(monkeypatch, "x86_64", *flags)
    monkeypatch.setenv("KVLOOM_NATIVE", "native")
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(builder, "_from_source", lambda *tuned, progress: asked.append(tuned) or Path("made"))
    assert builder.build().paths == best.paths
    monkeypatch.delenv("KVLOOM_NATIVE")
    assert builder.build(generic=True).paths == GENERIC
    assert asked == [("-march=native", *[BF16_DOT] * (best in (BF16, AMX))), ("-DKVLOOM_GENERIC",)]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "riscv64", "arm64"])
@pytest.mark.parametrize("flags", [V3.needs - {"fma"}, frozenset({"fp"}), frozenset()])
def test_what_the_processor_cannot_run_is_not_chosen(
    shipped: Path, monkeypatch: pytest.MonkeyPatch, machine: str, flags: set[str]
) -> None:
    processor(monkeypatch, machine, *flags)
    with pytest.raises(NativeUnavailable, match="no C\\+\\+ compiler"):
        builder.build()
    for one in VARIANTS:
        monkeypatch.setenv("KVLOOM_NATIVE", one.name)
        with pytest.raises(ValueError, match=f"'{one.name}': this machine lacks .*; allowed here: auto, native$"):
            builder.build()


def test_a_refusal_says_what_is_missing_and_what_is_not(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, "x86_64", *V3.needs)
    monkeypatch.setenv("KVLOOM_NATIVE", VNNI.name)
    lacks = "avx512_vnni, avx512bw, avx512cd, avx512dq, avx512f, avx512vl"
    with pytest.raises(ValueError, match=f"lacks {lacks}; allowed here: auto, native, x86-64-v3$"):
        kernels.load("auto")
    monkeypatch.setenv("KVLOOM_NATIVE", "avx2")
    with pytest.raises(ValueError, match=r"'avx2': no such variant; allowed here: auto, native, x86-64-v3$"):
        kernels.load("native")
    with pytest.raises(ConfigError, match=r"^KVLOOM_NATIVE is 'avx2'"):
        LLM("smollm2", device="cpu")
    monkeypatch.setenv("KVLOOM_NATIVE", V3.name)
    assert builder.build().path == shipped / V3.file
    assert missing(V3, V3.needs, "aarch64") == "a processor of the kind x86_64 (this one is aarch64)"


def test_who_asks_for_a_build_is_told_that_there_is_no_compiler(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLOOM_NATIVE", "native")
    with pytest.raises(ValueError, match=r"KVLOOM_NATIVE is 'native', which cannot be had here: no C\+\+ compiler"):
        kernels.load("auto")


@intel
def test_another_variant_gives_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own loops of every kernel are tested in test_native; here: the same integers, and sums in another order."""
    make = torch.Generator().manual_seed(3)
    x, outs = torch.randn(5, 256, generator=make), []
    for name in ("native", V3.name):
        monkeypatch.setenv("KVLOOM_NATIVE", name)
        try:
            made = load(threads=1)
        except ValueError as error:
            pytest.skip(str(error))
        assert made.build == ("built here for this processor" if name == "native" else "x86-64-v3, built here")
        layers = [QuantLinear(made, pack(made, random_stored(kind, 160, 256))) for kind in ALL]
        outs.append(torch.cat([layer(x, torch.empty(5, 160)) for layer in layers]))
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-4)
