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

FULL = Paths("VNNI", one_panel=2, stored=9, stored_of=(("Q6_K", 5), ("Q8_0", 12)), tiles=14)


def test_the_table_says_which_loop_rows_take() -> None:
    def taken(kind: str) -> list[str]:
        return [FULL.loop(rows, kind) for rows in (1, 2, 3, 5, 6, 9, 10, 12, 13, 14, 4096)]

    some, many = [ONE_PANEL] * 2, [TILES] * 2
    assert taken("Q4_K") == some + [STORED] * 4 + [UNPACKED] * 3 + many
    assert taken("Q6_K") == some + [STORED] * 2 + [UNPACKED] * 5 + many
    assert taken("Q8_0") == some + [STORED] * 6 + [UNPACKED] + many
    assert str(FULL) == (
        "linear layers: VNNI, 1-2 rows one panel at a time, 3-9 rows stored panels (Q6_K to 5, Q8_0 to 12), "
        "from 10 unpacked panels, from 14 AMX tiles; attention over bf16: fp32"
    )
    assert str(Paths("VNNI", one_panel=2, stored=40, tiles=16)).startswith(
        "linear layers: VNNI, 1-2 rows one panel at a time, 3-15 rows stored panels, from 16 AMX tiles;"
    )
    assert str(Paths("plain C++")) == "linear layers: plain C++; attention over bf16: fp32"


@pytest.mark.parametrize("loop", [ONE_PANEL, STORED, UNPACKED, TILES])
def test_one_loop_for_all_rows(loop: str) -> None:
    alone = FULL.only(loop)
    assert {alone.loop(rows, "Q6_K") for rows in (1, 8, 300)} == {loop} and alone.products == "VNNI"


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
        loops = paths.loops(kernels)
        assert row["taken"] in loops and all(row[loop] > 0 for loop in loops) and row["over"] >= 1
    told = paths.attention({"a": kernels, "b": kernels}, 1)
    assert all(set(found) == {"a", "b"} for found in told.values())


def test_loops_give_the_same_bits() -> None:
    kernels = native_kernels(threads=1)
    if kernels.library.paths.tiles != NEVER or not kernels.library.paths.stored:
        pytest.skip("loops of other libraries are compared in test_native_amx")
    packed, x = pack(kernels, random_stored("Q4_K", 100, 512)), torch.randn(21, 512)
    outs = [paths.layers(kernels, [packed], loop)[0](x, torch.empty(21, 100)) for loop in paths.loops(kernels)]
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
