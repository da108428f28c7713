"""What a weights mode came to is said in words, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize

from kvloom.engine.model import packed_cache
from kvloom.engine.model.held import Held
from kvloom.engine.model.linear import LinearWeight, make_linear
from kvloom.engine.model.load import load_model
from kvloom.engine.model.load_gguf import GGUFWeights
from kvloom.kernels.reference import ReferenceKernels
from tests.kernels.stored import random_stored


@pytest.mark.parametrize(
    ("kind", "mode", "told"),
    [
        ("Q4_1", "auto", "layers int4 (the file's codes), head int8 (rounded from F32)"),
        ("Q8_0", "auto", "layers int8 (the file's codes), head int8 (rounded from F32)"),
        ("Q5_0", "auto", "layers int5 (the file's codes), head int8 (rounded from F32)"),
        ("F16", "auto", "layers int8 (rounded from F16), head int8 (rounded from F32)"),
        ("Q8_0", "int4", "layers int4 (rounded from Q8_0), head int8 (rounded from F32)"),
        ("Q4_1", "int8", "layers int4 (the file's codes), head int8 (rounded from F32)"),
        ("Q4_1", "bf16", "layers and head bfloat16"),
    ],
)
def test_what_became_of_it(
    write_gguf: Callable[..., Path], native: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    kind: str, mode: Any, told: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(packed_cache, "LEAST_BYTES", 0)
    path = write_gguf(kind)
    for _ in range(2):  # the second time from the cache
        assert load_model(path, "bf16", native, mode, packed_folder=tmp_path / "packed").weights_held == told


def test_mixed_layers(write_gguf: Callable[..., Path], native: Any) -> None:
    other = (quantize(np.ones((32, 64), np.float32), GGMLQuantizationType.Q8_0), "Q8_0")
    path = write_gguf("Q4_0", tensors={"blk.0.attn_v.weight": other})
    told = "layers int4 (the file's codes) and int8 (the file's codes), head int8 (rounded from F32)"
    assert load_model(path, "bf16", native).weights_held == told


def test_where_nothing_is_rounded(write_gguf: Callable[..., Path], native: Any) -> None:
    assert load_model(write_gguf("Q4_1"), "fp32", native).weights_held == "layers and head float32"
    assert load_model(write_gguf("Q4_1"), "bf16", ReferenceKernels()).weights_held == "layers and head bfloat16"


def test_codes_that_were_rounded_again_are_no_codes_of_the_file(write_gguf: Callable[..., Path], native: Any) -> None:
    """Columns in another order tear blocks of 256 apart; what they are rounded to may have as many bits."""
    stored = random_stored("Q4_K", 64, 256)
    path = write_gguf("F32", hidden=64, tensors={"blk.0.ffn_down.weight": (stored.blocks.numpy(), "Q4_K")}, inner=256)
    source = GGUFWeights(path)
    weight = LinearWeight(source, ("model.layers.0.mlp.down_proj.weight",), columns=torch.arange(256).flip(0))
    held = Held()
    held.note("layers", make_linear(weight, None, "int4", torch.bfloat16, native), weight)
    assert str(held) == "layers int4 (rounded from Q4_K)"
