"""`kvloom bench paths`: what it times, what it says, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from kvloom.engine.errors import ConfigError
from kvloom.kernels.cpu.native.linear import pack
from kvloom.kernels.cpu.native.paths import NEVER, ONE_PANEL, STORED, TILES, UNPACKED, Paths
from kvloom.loadtest.bench import paths
from tests.conftest import native_kernels
from tests.kernels.stored import random_stored

FULL = Paths("VNNI", one_panel=2, stored=8, tiles=16)


def test_the_table_says_which_loop_rows_take() -> None:
    taken = [FULL.loop(rows) for rows in (1, 2, 3, 8, 9, 15, 16, 4096)]
    assert taken == [ONE_PANEL, ONE_PANEL, STORED, STORED, UNPACKED, UNPACKED, TILES, TILES]
    assert str(FULL) == (
        "linear layers: VNNI, 1-2 rows one panel at a time, 3-8 rows stored panels, from 9 unpacked panels, from 16 AMX tiles; "
        "attention over bf16: fp32"
    )
    assert str(Paths("plain C++")) == "linear layers: plain C++; attention over bf16: fp32"


@pytest.mark.parametrize("loop", [ONE_PANEL, STORED, UNPACKED, TILES])
def test_one_loop_for_all_rows(loop: str) -> None:
    alone = FULL.only(loop, 8)
    assert {alone.loop(rows) for rows in (1, 5, 8)} == {loop} and alone.products == "VNNI"


def test_every_loop_is_timed_and_the_table_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = native_kernels(threads=1)
    before = kernels.library.paths
    if not before.stored:
        pytest.skip("this processor's kernels have one loop")
    monkeypatch.setattr(paths, "OUTPUTS", 64)
    monkeypatch.setattr(paths, "INPUTS", 256)
    monkeypatch.setattr(paths, "IN_MEMORY", 1)
    rows = list(paths.linears(kernels, "Q4_K", [1, 40], 2))
    assert kernels.library.paths is before
    for row in rows:
        loops = paths.loops(kernels, int(row["rows"]))
        assert row["taken"] in loops and all(row[loop] > 0 for loop in loops) and row["over"] >= 1
    told = paths.attention({"a": kernels, "b": kernels}, 1)
    assert all(set(found) == {"a", "b"} for found in told.values())


def test_loops_give_the_same_bits() -> None:
    kernels = native_kernels(threads=1)
    if kernels.library.paths.tiles != NEVER or not kernels.library.paths.stored:
        pytest.skip("loops of other libraries are compared in test_native_amx")
    packed, x = pack(kernels, random_stored("Q4_K", 100, 512)), torch.randn(3, 512)
    outs = [paths.layers(kernels, [packed], loop)[0](x, torch.empty(3, 100)) for loop in paths.loops(kernels, 3)]
    assert len(outs) > 1 and all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize(
    ("flag", "given"), [("--kinds", "Q2_K"), ("--rows", "0"), ("--rows", "4097"), ("--allowed", "0.5"), ("--allowed", "nan")]
)
def test_settings_have_a_range(flag: str, given: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag} is"):
        paths.main([flag, given])


def test_a_processor_without_variants_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "processor_flags", frozenset)
    with pytest.raises(ConfigError, match="no variant"):
        paths.main([])
